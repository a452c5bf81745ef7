"""Max pooling layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module

Size = int | Sequence[int]


class _MaxPool(Module):
    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class MaxPool1d(_MaxPool):
    """Take the largest element of each window.

    Args:
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: -inf added on both sides, at most half the window.
        dilation: the distance between the elements of a window.
        return_indices: also return where each maximum was, as positions in the flattened ``L``.
        ceil_mode: also take a last window that hangs over the border.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.MaxPool1d(3, stride=2)(jnp.ones((20, 16, 50))).shape
        (20, 16, 24)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool2d(_MaxPool):
    """Take the largest element of each window.

    Args:
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: -inf added on both sides, at most half the window.
        dilation: the distance between the elements of a window.
        return_indices: also return where each maximum was, as positions in the flattened ``H x W``.
        ceil_mode: also take a last window that hangs over the border.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.MaxPool2d(3, stride=2)(jnp.ones((20, 16, 50, 32))).shape
        (20, 16, 24, 15)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool3d(_MaxPool):
    """Take the largest element of each window.

    Args:
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: -inf added on both sides, at most half the window.
        dilation: the distance between the elements of a window.
        return_indices: also return where each maximum was, as positions in the flattened ``D x H x W``.
        ceil_mode: also take a last window that hangs over the border.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.MaxPool3d(3, stride=2)(jnp.ones((2, 4, 10, 9, 8))).shape
        (2, 4, 4, 4, 3)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )
