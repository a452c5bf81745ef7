"""Changes of shape as layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.module import Module


class Flatten(Module):
    """Merge neighbouring axes into one; by default all but the batch axis.

    Args:
        start_dim: the first axis to merge.
        end_dim: the last one.

    Shape:
        - input: any; output: ``(*, product of the merged axes, *)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Flatten()(jnp.ones((32, 1, 5, 5))).shape
        (32, 25)
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.flatten(input, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Unflatten(Module):
    """Split one axis into several.

    Args:
        dim: the axis; axes have no names here.
        unflattened_size: a tuple or list of the sizes of the new axes; one of them may be -1.

    Shape:
        - input: ``(*, S, *)``; output: ``(*, *unflattened_size, *)``, where the sizes multiply up to S.

    Raises:
        DtypeError: if the sizes are no tuple or list of integers, as ``(("C", 2), ("H", 5))``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Unflatten(1, (2, 5, 5))(jnp.ones((3, 50))).shape
        (3, 2, 5, 5)
    """

    def __init__(self, dim: int, unflattened_size: Sequence[int]) -> None:
        super().__init__()
        sizes = unflattened_size
        if not isinstance(sizes, (tuple, list)) or not all(isinstance(n, int) for n in sizes):
            raise DtypeError(
                explain(
                    f"made nn.Unflatten with unflattened_size={sizes!r}",
                    "the sizes of the new axes are needed, and axes have no names",
                    "nn.Unflatten(1, (2, 5))",
                )
            )
        self.dim = dim
        self.unflattened_size = sizes

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.unflatten(input, self.dim, self.unflattened_size)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, unflattened_size={self.unflattened_size}"
