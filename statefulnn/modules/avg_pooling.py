"""Average and power-average pooling layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module
from statefulnn.functional._checks import numbers

Size = int | Sequence[int]


class _AvgPool(Module):
    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool1d(Module):
    """Take the mean of each window.

    Args:
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: zeros added on both sides, at most half the window.
        ceil_mode: also take a last window that hangs over the border.
        count_include_pad: whether the zeros of the padding count as elements.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AvgPool1d(3, stride=2)(jnp.ones((20, 16, 50))).shape
        (20, 16, 24)
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__()
        name = "nn.AvgPool1d"
        self.kernel_size = numbers(kernel_size, 1, "kernel_size", name)
        self.stride = self.kernel_size if stride is None else numbers(stride, 1, "stride", name)
        self.padding = numbers(padding, 1, "padding", name)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.avg_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool2d(_AvgPool):
    """Take the mean of each window.

    Args:
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: zeros added on both sides, at most half the window.
        ceil_mode: also take a last window that hangs over the border.
        count_include_pad: whether the zeros of the padding count as elements.
        divisor_override: divide by this instead of by the number of elements.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AvgPool2d((3, 2), stride=(2, 1))(jnp.ones((20, 16, 50, 32))).shape
        (20, 16, 24, 31)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(_AvgPool):
    """Take the mean of each window.

    Args:
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: zeros added on both sides, at most half the window.
        ceil_mode: also take a last window that hangs over the border.
        count_include_pad: whether the zeros of the padding count as elements.
        divisor_override: divide by this instead of by the number of elements.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AvgPool3d((3, 2, 2), stride=(2, 1, 2))(jnp.ones((2, 4, 10, 9, 8))).shape
        (2, 4, 4, 8, 4)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class _LPPool(Module):
    def __init__(
        self,
        norm_type: float,
        kernel_size: Size,
        stride: Size | None = None,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.norm_type = norm_type
        self.kernel_size = kernel_size
        self.stride = stride
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        return (
            f"norm_type={self.norm_type}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"ceil_mode={self.ceil_mode}"
        )


class LPPool1d(_LPPool):
    """Take the sum of the p-th powers of each window, and of that the p-th root.

    Args:
        norm_type: p; infinity takes the largest absolute value.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        ceil_mode: also take a last window that hangs over the edge.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LPPool1d(2, 3, stride=2)(jnp.ones((20, 16, 50))).shape
        (20, 16, 24)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.lp_pool1d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool2d(_LPPool):
    """Take the sum of the p-th powers of each window, and of that the p-th root.

    Args:
        norm_type: p; infinity takes the largest absolute value.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        ceil_mode: also take a last window that hangs over the edge.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LPPool2d(2, 3, stride=2)(jnp.ones((20, 16, 50, 32))).shape
        (20, 16, 24, 15)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.lp_pool2d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool3d(_LPPool):
    """Take the sum of the p-th powers of each window, and of that the p-th root.

    Args:
        norm_type: p; infinity takes the largest absolute value.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        ceil_mode: also take a last window that hangs over the edge.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LPPool3d(2, 3, stride=2)(jnp.ones((2, 4, 10, 9, 8))).shape
        (2, 4, 4, 4, 3)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.lp_pool3d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )
