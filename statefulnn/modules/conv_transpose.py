"""Transposed convolutional layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import init
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.placement import DeviceLike
from statefulnn.functional.conv_transpose import conv_transpose_nd, transposed_sizes
from statefulnn.modules.conv import Size, _Convolution


class _ConvTransposeNd(_Convolution):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            name = f"nn.{type(self).__name__}"
            raise ValueError(
                explain(
                    f"made {name} with padding_mode={padding_mode!r}",
                    "a transposed convolution cuts its output by the padding, so there is no border "
                    "to fill",
                    f"{name}(..., padding_mode='zeros'), and F.pad for the output",
                )
            )
        self._set(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        init.rules(self).conv_transpose(
            self.weight, self.bias, groups=self.groups, stride=self.stride
        )

    def forward(self, input: ArrayLike, output_size: Sequence[int] | None = None) -> jax.Array:
        return conv_transpose_nd(
            self.spatial,
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self._output_padding(input, output_size),
            self.groups,
            self.dilation,
        )

    def _output_padding(self, input: Any, output_size: Sequence[int] | None) -> tuple[int, ...]:
        if output_size is None:
            return self.output_padding
        n, shape = self.spatial, input.shape
        name = f"nn.{type(self).__name__}"
        given = f"{name} was given input of shape {tuple(shape)} and output_size={output_size}"
        try:
            sizes = tuple(output_size)
        except TypeError:
            raise DtypeError(
                explain(
                    given, "one size for each axis is needed", f"output_size={(output_size,) * n}"
                )
            ) from None
        if len(sizes) == len(shape):
            sizes = sizes[-n:]
        if len(sizes) != n:
            raise ValueError(
                explain(
                    given,
                    f"the {n} spatial sizes are needed, or those of all {len(shape)} axes",
                    "output_size=target.shape",
                )
            )
        least = transposed_sizes(
            shape[-n:], self.kernel_size, self.stride, self.padding, self.dilation
        )
        extra = tuple(size - low for size, low in zip(sizes, least, strict=True))
        if any(not 0 <= e < s for e, s in zip(extra, self.stride, strict=True)):
            most = tuple(low + s - 1 for low, s in zip(least, self.stride, strict=True))
            raise ValueError(
                explain(
                    given,
                    f"the sizes that a convolution maps to this input go from {least} to {most}",
                    f"output_size={least}",
                )
            )
        return extra


class ConvTranspose1d(_ConvTransposeNd):
    """Apply a transposed convolution over one axis: a convolution's gradient by its input.

    Args:
        in_channels: C.
        out_channels: the number of output channels.
        kernel_size: k.
        stride: the step of the kernel in the output.
        padding: how many positions are cut off on both sides.
        output_padding: positions added at the end.
        groups: the number of independent groups of channels.
        bias: whether a bias is added.
        dilation: the distance between the kernel's points.
        padding_mode: "zeros"; there is no other.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, out_channels, L')``, where L' is
          ``(L - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1``.
        - output_size (an argument of the call): the spatial sizes, in place of `output_padding`.

    Attributes:
        weight: ``(C, out_channels / groups, k)``, from U(±1/√n),
            ``n = out_channels / groups · k``.
        bias: ``(out_channels,)``, likewise, or None.

    Raises:
        ValueError: from a call, if no convolution maps `output_size` to the input's size.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ConvTranspose1d(16, 33, 4, stride=2, padding=1)(jnp.ones((20, 16, 50))).shape
        (20, 33, 100)
    """

    spatial = 1


class ConvTranspose2d(_ConvTransposeNd):
    """Apply a transposed convolution over two axes: a convolution's gradient by its input.

    Args:
        in_channels: C.
        out_channels: the number of output channels.
        kernel_size: one number, or kH and kW.
        stride: the step of the kernel in the output, one number or one an axis.
        padding: how many positions are cut off on both sides, one number or one an axis.
        output_padding: positions added at the end, one number or one an axis.
        groups: the number of independent groups of channels.
        bias: whether a bias is added.
        dilation: the distance between the kernel's points, one number or one an axis.
        padding_mode: "zeros"; there is no other.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, out_channels, H', W')``, each size
          ``(S - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1``.
        - output_size (an argument of the call): the spatial sizes, in place of `output_padding`.

    Attributes:
        weight: ``(C, out_channels / groups, kH, kW)``, from U(±1/√n),
            ``n = out_channels / groups · kH · kW``.
        bias: ``(out_channels,)``, likewise, or None.

    Raises:
        ValueError: from a call, if no convolution maps `output_size` to the input's size.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ConvTranspose2d(3, 8, 4, stride=2, padding=1)(jnp.ones((2, 3, 16, 16))).shape
        (2, 8, 32, 32)
    """

    spatial = 2


class ConvTranspose3d(_ConvTransposeNd):
    """Apply a transposed convolution over three axes: a convolution's gradient by its input.

    Args:
        in_channels: C.
        out_channels: the number of output channels.
        kernel_size: one number, or kD, kH and kW.
        stride: the step of the kernel in the output, one number or one an axis.
        padding: how many positions are cut off on both sides, one number or one an axis.
        output_padding: positions added at the end, one number or one an axis.
        groups: the number of independent groups of channels.
        bias: whether a bias is added.
        dilation: the distance between the kernel's points, one number or one an axis.
        padding_mode: "zeros"; there is no other.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, out_channels, D', H', W')``, each size
          ``(S - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1``.
        - output_size (an argument of the call): the spatial sizes, in place of `output_padding`.

    Attributes:
        weight: ``(C, out_channels / groups, kD, kH, kW)``, from U(±1/√n),
            ``n = out_channels / groups · kD · kH · kW``.
        bias: ``(out_channels,)``, likewise, or None.

    Raises:
        ValueError: from a call, if no convolution maps `output_size` to the input's size.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ConvTranspose3d(3, 8, 2, stride=2)(jnp.ones((2, 3, 4, 4, 4))).shape
        (2, 8, 8, 8, 8)
    """

    spatial = 3
