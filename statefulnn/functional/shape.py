"""Changes of shape."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from statefulnn.functional._checks import array, dimension, shape_error


@functools.partial(jax.jit, static_argnums=1)
def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape)


def flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Merge neighbouring axes into one.

    Args:
        input: any shape.
        start_dim: the first axis to merge.
        end_dim: the last one.

    Source: ``torch.flatten``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.flatten(jnp.ones((2, 3, 4)), 1).shape
        (2, 12)
    """
    x = array(input, "input", "F.flatten")
    start = dimension(start_dim, x.ndim, "F.flatten")
    end = dimension(end_dim, x.ndim, "F.flatten")
    if start > end:
        raise shape_error(
            f"F.flatten was given start_dim={start_dim} and end_dim={end_dim} for shape {x.shape}",
            "start_dim cannot come after end_dim",
            f"F.flatten(input, {end_dim}, {start_dim})",
        )
    shape = x.shape
    merged = (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])
    return x if merged == shape else _reshape(x, merged)
