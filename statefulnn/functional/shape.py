"""Changes of shape."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import array, dimension, shape_error
from statefulnn.functional._compiled import compiled


@functools.partial(compiled, static_argnums=1)
def _reshape(x: jax.Array, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape)


def flatten(input: ArrayLike, start_dim: int = 0, end_dim: int = -1) -> jax.Array:
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


def unflatten(input: ArrayLike, dim: int, sizes: Sequence[int]) -> jax.Array:
    """Split one axis into several.

    Args:
        input: any shape with at least one axis.
        dim: the axis.
        sizes: the sizes of the new axes, whose product is the axis's size; one of them may be -1.

    Raises:
        ShapeError: if the sizes do not multiply up to the axis's size.
        IndexError: if there is no such axis.
        DtypeError: if dim or sizes are no integers.

    Source: ``torch.unflatten``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.unflatten(jnp.ones((2, 12)), 1, (3, -1)).shape
        (2, 3, 4)
    """
    x = array(input, "input", "F.unflatten")
    given = f"F.unflatten was given dim={dim!r} and sizes={sizes!r} for shape {x.shape}"
    try:
        new = tuple(operator.index(size) for size in sizes)
        axis = operator.index(dim)
    except TypeError:
        raise DtypeError(
            explain(
                given,
                "axes have numbers, not names, and sizes are integers",
                "F.unflatten(input, 1, (3, -1))",
            )
        ) from None
    if not x.shape:
        raise shape_error(given, "there is no axis to split", "an array with at least one axis")
    axis = dimension(axis, x.ndim, "F.unflatten")
    size = x.shape[axis]
    unknown = new.count(-1)
    rest = math.prod(n for n in new if n != -1)
    if unknown == 1 and rest > 0 and size % rest == 0:
        new = tuple(size // rest if n == -1 else n for n in new)
    if not new or min(new) < 0 or math.prod(new) != size:
        raise shape_error(
            given,
            f"the sizes must multiply up to the {size} of the axis, and one of them at most may be "
            "left open with -1",
            f"F.unflatten(input, {dim}, (-1,)), or sizes whose product is {size}",
        )
    return _reshape(x, (*x.shape[:axis], *new, *x.shape[axis + 1 :]))
