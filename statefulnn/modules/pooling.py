"""Pooling layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statefulnn import functional as F
from statefulnn.core.module import Module

Size = int | Sequence[int]


class MaxPool2d(Module):
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

    def forward(self, input: Any) -> Any:
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class AvgPool2d(Module):
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

    def forward(self, input: Any) -> Any:
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AdaptiveAvgPool2d(Module):
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        output_size: ``H'`` and ``W'``, or one number for both; None keeps the input's size.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AdaptiveAvgPool2d((5, None))(jnp.ones((1, 64, 8, 9))).shape
        (1, 64, 5, 9)
    """

    def __init__(self, output_size: int | None | Sequence[int | None]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, input: Any) -> Any:
        return F.adaptive_avg_pool2d(input, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"
