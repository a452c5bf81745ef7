"""Layers that undo max pooling."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module
from statefulnn.functional._checks import numbers

Size = int | Sequence[int]


class _MaxUnpool(Module):
    spatial: int

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0) -> None:
        super().__init__()
        name, n = f"nn.{type(self).__name__}", self.spatial
        self.kernel_size = numbers(kernel_size, n, "kernel_size", name)
        self.stride = self.kernel_size if stride is None else numbers(stride, n, "stride", name)
        self.padding = numbers(padding, n, "padding", name)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class MaxUnpool1d(_MaxUnpool):
    """Put the values of a max pooling back where they came from, among zeros.

    Args:
        kernel_size: the size of the window that was pooled.
        stride: its step; None for its size.
        padding: the padding that was added.

    Shape:
        - input, and indices as MaxPool1d returns them: ``(N, C, L)`` or ``(C, L)``;
          output: ``(N, C, L')``, of the spatial sizes `output_size` if given.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> pool, unpool = nn.MaxPool1d(2, return_indices=True), nn.MaxUnpool1d(2)
        >>> unpool(*pool(jnp.ones((1, 4)))).shape
        (1, 4)
    """

    spatial = 1

    def forward(
        self, input: ArrayLike, indices: ArrayLike, output_size: Sequence[int] | None = None
    ) -> jax.Array:
        return F.max_unpool1d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class MaxUnpool2d(_MaxUnpool):
    """Put the values of a max pooling back where they came from, among zeros.

    Args:
        kernel_size: the size of the window that was pooled.
        stride: its step; None for its size.
        padding: the padding that was added.

    Shape:
        - input, and indices as MaxPool2d returns them: ``(N, C, H, W)`` or ``(C, H, W)``;
          output: ``(N, C, H', W')``, of the spatial sizes `output_size` if given.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> pool, unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        >>> unpool(*pool(jnp.ones((1, 4, 4)))).shape
        (1, 4, 4)
    """

    spatial = 2

    def forward(
        self, input: ArrayLike, indices: ArrayLike, output_size: Sequence[int] | None = None
    ) -> jax.Array:
        return F.max_unpool2d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class MaxUnpool3d(_MaxUnpool):
    """Put the values of a max pooling back where they came from, among zeros.

    Args:
        kernel_size: the size of the window that was pooled.
        stride: its step; None for its size.
        padding: the padding that was added.

    Shape:
        - input, and indices as MaxPool3d returns them: ``(N, C, D, H, W)`` or ``(C, D, H, W)``;
          output: ``(N, C, D', H', W')``, of the spatial sizes `output_size` if given.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> pool, unpool = nn.MaxPool3d(2, return_indices=True), nn.MaxUnpool3d(2)
        >>> unpool(*pool(jnp.ones((1, 4, 4, 4)))).shape
        (1, 4, 4, 4)
    """

    spatial = 3

    def forward(
        self, input: ArrayLike, indices: ArrayLike, output_size: Sequence[int] | None = None
    ) -> jax.Array:
        return F.max_unpool3d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )
