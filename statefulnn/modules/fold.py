"""Sliding blocks of images as layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module

Size = int | Sequence[int]


class Fold(Module):
    """Put sliding blocks back into an image, and add where they overlap.

    Args:
        output_size: H and W, or one number for both.
        kernel_size: the size of a block, one number or two.
        dilation: the distance between the points of a block, one number or two.
        padding: how far the blocks reach beyond the image on both sides, one number or two.
        stride: the step from block to block, one number or two.

    Shape:
        - input: ``(N, C · kH · kW, L)`` or ``(C · kH · kW, L)``; output: ``(N, C, H, W)`` or
          ``(C, H, W)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Fold(output_size=(4, 5), kernel_size=2)(jnp.ones((1, 12, 12))).shape
        (1, 3, 4, 5)
    """

    def __init__(
        self,
        output_size: Size,
        kernel_size: Size,
        dilation: Size = 1,
        padding: Size = 0,
        stride: Size = 1,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.fold(
            input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, padding={self.padding}, stride={self.stride}"
        )


class Unfold(Module):
    """Lay the sliding blocks of an image side by side, each as a column.

    Args:
        kernel_size: the size of a block, one number or two.
        dilation: the distance between the points of a block, one number or two.
        padding: zeros added on both sides, one number or two.
        stride: the step from block to block, one number or two.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C · kH · kW, L)`` or
          ``(C · kH · kW, L)``, where L counts the blocks.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Unfold(kernel_size=(2, 3))(jnp.ones((2, 5, 3, 4))).shape
        (2, 30, 4)
    """

    def __init__(
        self, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, padding={self.padding}, "
            f"stride={self.stride}"
        )
