"""Transposed convolutions: the maps by which gradients pass back through convolutions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import (
    array,
    channels_advice,
    numbers,
    require_same_dtype,
    shape_error,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._conv_lowering import convolve_transposed, repeated_on_cpu
from statefulnn.functional.conv import (
    check_axes,
    check_bias,
    check_groups,
    static,
    steps,
    with_bias,
)


@functools.partial(compiled, static_argnums=(3, 4, 5, 6, 7, 8))
@ruled(Rule.LOW)
def _conv_transpose(
    x: jax.Array,
    weight: jax.Array,
    bias: Any,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    repeated: bool,
) -> Any:
    # Checked here, where the code runs once for each combination of shapes and dtypes: an eager call
    # like an earlier one pays nothing for it.
    spatial = weight.ndim - 2
    function = f"F.conv_transpose{spatial}d"
    given = f"{function} was given input of shape {x.shape} and weight of shape {weight.shape}"
    stride, dilation = steps(x, weight, stride, dilation, spatial, function)
    padding = numbers(padding, spatial, "padding", function)
    extra = numbers(output_padding, spatial, "output_padding", function)
    for name, values in (("padding", padding), ("output_padding", extra)):
        if min(values) < 0:
            raise shape_error(
                f"{function} was given {name}={values}",
                f"negative {name} is not supported",
                f"{name}=0",
            )
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise shape_error(
            f"{function} was given output_padding={extra}, stride={stride}, dilation={dilation}",
            "output_padding must be smaller than stride or dilation: it chooses among the sizes that "
            "a convolution maps to the input's",
            "output_padding=0, or pad the output",
        )
    check_groups(weight.shape[0], groups, "takes", given)
    channels = x.shape[-spatial - 1]
    if channels != weight.shape[0]:
        raise shape_error(
            given,
            f"the input has {channels} channels and the weight expects {weight.shape[0]}",
            channels_advice(
                x,
                weight.shape[0],
                spatial,
                f"nn.ConvTranspose{spatial}d({channels}, {weight.shape[1] * groups}, "
                f"{tuple(weight.shape[2:])})",
            ),
        )
    check_bias(bias, weight.shape[1] * groups, given)
    require_same_dtype(function, input=x, weight=weight, bias=bias)
    sizes = transposed_sizes(x.shape[-spatial:], weight.shape[2:], stride, padding, dilation)
    sizes = tuple(size + e for size, e in zip(sizes, extra, strict=True))
    if any(size < 1 for size in sizes):
        raise shape_error(
            f"{given}, padding={padding}, dilation={dilation}",
            f"the output would have the size {sizes}",
            "less padding, or a larger input",
        )
    batched = x.ndim == weight.ndim
    out = convolve_transposed(
        x if batched else x[None], weight, stride, padding, dilation, groups, sizes, repeated
    )
    out = with_bias(out, bias)
    return out if batched else out[0]


def transposed_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Return the smallest sizes that a convolution maps to `sizes`: without output_padding."""
    return tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    )


def conv_transpose_nd(
    spatial: int,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> jax.Array:
    """Convolve, transposed, over `spatial` axes; the public functions fill in the number."""
    function = f"F.conv_transpose{spatial}d"
    x = array(input, "input", function)
    w = array(weight, "weight", function)
    b = None if bias is None else array(bias, "bias", function)
    check_axes(x, w, spatial, function, "in_channels, out_channels / groups")
    return _conv_transpose(
        x,
        w,
        b,
        static(stride),
        static(padding),
        static(output_padding),
        groups,
        static(dilation),
        repeated_on_cpu(),
    )


def conv_transpose1d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """Apply a transposed convolution over one axis: a convolution's gradient by its input.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``.
        weight: ``(C, out_channels / groups, k)``.
        bias: ``(out_channels,)`` or None.
        stride: the step of the kernel in the output.
        padding: how many positions are cut off on both sides.
        output_padding: positions added at the end: which of the `stride`
            sizes that a convolution maps to the input's the output has.
        groups: the number of independent groups of channels.
        dilation: the distance between the kernel's points.

    Returns:
        ``(N, out_channels, L')``, where L' is
        ``(L - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.conv_transpose1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.conv_transpose1d(jnp.arange(3.0)[None, None], jnp.ones((1, 1, 2)), stride=2).tolist()
        [[[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]]
    """
    return conv_transpose_nd(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """Apply a transposed convolution over two axes: a convolution's gradient by its input.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(C, out_channels / groups, kH, kW)``.
        bias: ``(out_channels,)`` or None.
        stride: the step of the kernel in the output, one number or one an axis.
        padding: how many positions are cut off on both sides, one number or one an axis.
        output_padding: positions added at the end, one number or one an axis: which of the `stride`
            sizes that a convolution maps to the input's the output has.
        groups: the number of independent groups of channels.
        dilation: the distance between the kernel's points, one number or one an axis.

    Returns:
        ``(N, out_channels, H', W')``, each size
        ``(S - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.conv_transpose2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.conv_transpose2d(jnp.ones((1, 3, 8, 8)), jnp.ones((3, 5, 2, 2)), stride=2).shape
        (1, 5, 16, 16)
    """
    return conv_transpose_nd(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """Apply a transposed convolution over three axes: a convolution's gradient by its input.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.
        weight: ``(C, out_channels / groups, kD, kH, kW)``.
        bias: ``(out_channels,)`` or None.
        stride: the step of the kernel in the output, one number or one an axis.
        padding: how many positions are cut off on both sides, one number or one an axis.
        output_padding: positions added at the end, one number or one an axis: which of the `stride`
            sizes that a convolution maps to the input's the output has.
        groups: the number of independent groups of channels.
        dilation: the distance between the kernel's points, one number or one an axis.

    Returns:
        ``(N, out_channels, D', H', W')``, each size
        ``(S - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.conv_transpose3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.conv_transpose3d(jnp.ones((1, 3, 4, 4, 4)), jnp.ones((3, 5, 2, 2, 2)), stride=2).shape
        (1, 5, 8, 8, 8)
    """
    return conv_transpose_nd(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )
