"""Convolutional layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import init
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike
from statefulnn.functional._checks import numbers
from statefulnn.functional.conv import check_padding_mode, conv_nd, padded

Size = int | Sequence[int]


class _Convolution(Module):
    """What convolutions and transposed ones share: their attributes, parameters and repr."""

    spatial: int
    transposed = False
    padding: Any

    def _set(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size | str,
        output_padding: Size,
        dilation: Size,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
    ) -> None:
        name, n = f"nn.{type(self).__name__}", self.spatial
        if groups <= 0:
            raise ValueError(
                explain(f"made {name} with groups={groups}", "groups must be positive", "groups=1")
            )
        for which, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(
                    explain(
                        f"made {name} with {which}={channels} and groups={groups}",
                        f"{which} must be divisible by groups",
                        f"a number of groups that divides {channels}",
                    )
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = numbers(kernel_size, n, "kernel_size", name)
        self.stride = numbers(stride, n, "stride", name)
        named = isinstance(padding, str) and not self.transposed
        self.padding = padding if named else numbers(padding, n, "padding", name)
        self.dilation = numbers(dilation, n, "dilation", name)
        padded(self.padding, self.kernel_size, self.stride, self.dilation, name)  # checks them
        self.output_padding = numbers(output_padding, n, "output_padding", name)
        self.groups = groups
        self.padding_mode = padding_mode
        first, second = in_channels, out_channels
        if not self.transposed:
            first, second = second, first
        self.weight = init.empty_parameter(
            (first, second // groups, *self.kernel_size), dtype, device
        )
        self.register_parameter(
            "bias", init.empty_parameter(out_channels, dtype, device) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
            f"stride={self.stride}",
        ]
        if self.padding != (0,) * self.spatial:
            parts.append(f"padding={self.padding}")
        if self.dilation != (1,) * self.spatial:
            parts.append(f"dilation={self.dilation}")
        if self.output_padding != (0,) * self.spatial:
            parts.append(f"output_padding={self.output_padding}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join(parts)


class _ConvNd(_Convolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        check_padding_mode(padding_mode, f"nn.{type(self).__name__}")
        self._set(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            0,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        init.rules(self).conv(self.weight, self.bias)

    def forward(self, input: ArrayLike) -> jax.Array:
        return conv_nd(
            self.spatial,
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
        )


class Conv1d(_ConvNd):
    """Convolve (cross-correlate) over one axis.

    Args:
        in_channels: C.
        out_channels: the number of kernels.
        kernel_size: k.
        stride: the step of the kernel.
        padding: what is added on both sides; "same" keeps the length, "valid" adds nothing.
        dilation: the distance between the kernel's points.
        groups: the number of independent groups of channels.
        bias: whether a bias is added.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, out_channels, L')``,
          ``L' = (L + 2 padding - dilation (k - 1) - 1) // stride + 1``.

    Attributes:
        weight: ``(out_channels, C / groups, k)``, from U(±1/√fan_in), ``fan_in = C / groups · k``.
        bias: ``(out_channels,)``, likewise, or None.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Conv1d(16, 33, 3, stride=2)(jnp.ones((20, 16, 50))).shape
        (20, 33, 24)
    """

    spatial = 1


class Conv2d(_ConvNd):
    """Convolve (cross-correlate) over two axes.

    Args:
        in_channels: C.
        out_channels: the number of kernels.
        kernel_size: one number, or kH and kW.
        stride: the step of the kernel.
        padding: what is added on both sides; "same" keeps the size, "valid" adds nothing.
        dilation: the distance between the kernel's points.
        groups: the number of independent groups of channels.
        bias: whether a bias is added.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, out_channels, H', W')``, each size
          ``(S + 2 padding - dilation (k - 1) - 1) // stride + 1``.

    Attributes:
        weight: ``(out_channels, C / groups, kH, kW)``, from U(±1/√fan_in),
            ``fan_in = C / groups · kH · kW``.
        bias: ``(out_channels,)``, likewise, or None.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Conv2d(3, 8, 3, padding="same")(jnp.ones((2, 3, 16, 16))).shape
        (2, 8, 16, 16)
    """

    spatial = 2


class Conv3d(_ConvNd):
    """Convolve (cross-correlate) over three axes.

    Args:
        in_channels: C.
        out_channels: the number of kernels.
        kernel_size: one number, or kD, kH and kW.
        stride: the step of the kernel.
        padding: what is added on both sides; "same" keeps the size, "valid" adds nothing.
        dilation: the distance between the kernel's points.
        groups: the number of independent groups of channels.
        bias: whether a bias is added.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, out_channels, D', H', W')``, each size
          ``(S + 2 padding - dilation (k - 1) - 1) // stride + 1``.

    Attributes:
        weight: ``(out_channels, C / groups, kD, kH, kW)``, from U(±1/√fan_in),
            ``fan_in = C / groups · kD · kH · kW``.
        bias: ``(out_channels,)``, likewise, or None.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Conv3d(3, 8, 3, padding="same")(jnp.ones((2, 3, 8, 8, 8))).shape
        (2, 8, 8, 8, 8)
    """

    spatial = 3
