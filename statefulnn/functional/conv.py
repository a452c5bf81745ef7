"""Convolutions over one, two and three spatial axes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.core.repeated import in_loss_of_example
from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import (
    array,
    channels_advice,
    numbers,
    rank_advice,
    require_rank,
    require_same_dtype,
    shape_error,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._conv_lowering import convolve, repeated_on_cpu
from statefulnn.functional.padding import BORDERS, check_border, continued

# How the spatial axes of an input and of a kernel are called in messages.
AXES = {1: ("L", "k"), 2: ("H, W", "kH, kW"), 3: ("D, H, W", "kD, kH, kW")}


def static(value: Any) -> Any:
    """Return an argument that compiled code may be keyed by: sequences as tuples."""
    if isinstance(value, (int, str, tuple)) or not hasattr(value, "__iter__"):
        return value
    return tuple(value)


@functools.partial(compiled, static_argnums=(3, 4, 5, 6, 7, 8, 9))
@ruled(Rule.LOW)
def _conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    repeated: bool,
    of_example: bool,
) -> Any:
    # Checked here, where the code runs once for each combination of shapes and dtypes: an eager call
    # like an earlier one pays nothing for it.
    spatial = weight.ndim - 2
    function = f"F.conv{spatial}d"
    stride, dilation = steps(x, weight, stride, dilation, spatial, function)
    kernel = weight.shape[2:]
    pads = padded(padding, kernel, stride, dilation, function)
    given = f"{function} was given input of shape {x.shape} and weight of shape {weight.shape}"
    channels = x.shape[-spatial - 1]
    check_groups(weight.shape[0], groups, "makes", given)
    if channels != weight.shape[1] * groups:
        raise shape_error(
            f"{given}, and groups={groups}",
            f"the input has {channels} channels and the weight expects {weight.shape[1] * groups}",
            channels_advice(
                x,
                weight.shape[1] * groups,
                spatial,
                f"nn.Conv{spatial}d({channels}, {weight.shape[0]}, {tuple(kernel)})",
            ),
        )
    check_bias(bias, weight.shape[0], given)
    require_same_dtype(function, input=x, weight=weight, bias=bias)
    for size, k, d, (low, high) in zip(x.shape[-spatial:], kernel, dilation, pads, strict=True):
        if size + low + high < d * (k - 1) + 1:
            raise shape_error(
                f"{given}, and padding={padding}, dilation={dilation}",
                f"the kernel covers {d * (k - 1) + 1} positions and the padded input has "
                f"{size + low + high}",
                "a smaller kernel, more padding, or a larger input",
            )
        if padding_mode != "zeros":
            context = f"{given}, and padding={padding}, padding_mode={padding_mode!r}"
            check_border(size, low, high, padding_mode, context)
    batched = x.ndim == weight.ndim
    if not batched:
        x = x[None]
    if padding_mode != "zeros":
        for axis, (low, high) in enumerate(pads, 2):
            x = continued(x, axis, low, high, padding_mode)
        pads = ((0, 0),) * spatial
    out = convolve(x, weight, stride, pads, dilation, groups, repeated, of_example)
    out = with_bias(out, bias)
    return out if batched else out[0]


def with_bias(out: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Add a bias for each channel of ``(N, C, *)``."""
    return out if bias is None else out + bias.reshape(1, -1, *(1,) * (out.ndim - 2))


def steps(
    x: jax.Array,
    weight: jax.Array,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    spatial: int,
    function: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return stride and dilation as tuples; raise unless they and the sizes are positive."""
    stride = numbers(stride, spatial, "stride", function)
    dilation = numbers(dilation, spatial, "dilation", function)
    for name, values in (("stride", stride), ("dilation", dilation)):
        if min(values) < 1:
            raise shape_error(
                f"{function} was given {name}={values}",
                f"non-positive {name} is not supported",
                f"{name}=1",
            )
    for name, shape in (("input", x.shape[-spatial:]), ("weight", weight.shape[2:])):
        if 0 in shape:
            raise shape_error(
                f"{function} was given {name} of spatial shape {shape}",
                "only the batch and the channels may be empty",
                "at least one position along each spatial axis",
            )
    return stride, dilation


def check_groups(channels: int, groups: int, does: str, given: str) -> None:
    """Raise unless the channels on the weight's first axis can be shared out to the groups."""
    if groups < 1 or channels < groups or channels % groups:
        raise shape_error(
            f"{given}, and groups={groups}",
            f"each group {does} the same number of channels, one at least, and the weight has "
            f"{channels} on its first axis",
            f"a number of channels that {max(groups, 1)} divides",
        )


def check_bias(bias: jax.Array | None, channels: int, given: str) -> None:
    """Raise unless there is one bias for each output channel, or none at all."""
    if bias is not None and bias.shape != (channels,):
        raise shape_error(
            f"{given}, and bias of shape {bias.shape}",
            f"one bias for each of {channels} output channels is needed",
            f"a bias of shape {(channels,)}",
        )


def check_axes(x: jax.Array, weight: jax.Array, spatial: int, function: str, layout: str) -> None:
    """Raise unless input and weight have the axes of `spatial` dimensions."""
    if weight.ndim != spatial + 2 or x.ndim not in (spatial + 1, spatial + 2):
        axes, kernel = AXES[spatial]
        raise shape_error(
            f"{function} was given input of shape {x.shape} and weight of shape {weight.shape}",
            f"the input is (N, C, {axes}) or (C, {axes}), the weight ({layout}, {kernel})",
            rank_advice(x, (spatial + 1, spatial + 2)),
        )


def padded(
    padding: str | int | Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    function: str,
) -> tuple[tuple[int, int], ...]:
    """Return what is added before and after each spatial axis."""
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * len(kernel)
        if padding != "same":
            raise shape_error(
                f"{function} was given padding={padding!r}",
                'the names of paddings are "same" and "valid"',
                'padding="same", or a number',
            )
        if any(s != 1 for s in stride):
            raise shape_error(
                f"{function} was given padding='same' and stride={tuple(stride)}",
                "padding='same' is not supported for strided convolutions: what it should be depends "
                "on the input's size",
                "a number, such as padding=kernel_size // 2",
            )
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    pads = numbers(padding, len(kernel), "padding", function)
    if any(p < 0 for p in pads):
        raise shape_error(
            f"{function} was given padding={padding}",
            "negative padding is not supported",
            "cut the border off the output by indexing",
        )
    return tuple((p, p) for p in pads)


def conv_nd(
    spatial: int,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> jax.Array:
    """Convolve over `spatial` axes; `conv1d` to `conv3d` are this with the number filled in."""
    function = f"F.conv{spatial}d"
    x = array(input, "input", function)
    w = array(weight, "weight", function)
    b = None if bias is None else array(bias, "bias", function)
    check_axes(x, w, spatial, function, "out_channels, in_channels / groups")
    how = static(stride), static(padding), static(dilation), groups, padding_mode
    return _conv(x, w, b, *how, repeated_on_cpu(), in_loss_of_example())


def conv1d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolve (cross-correlate) over one axis.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``.
        weight: ``(out_channels, C / groups, k)``.
        bias: ``(out_channels,)`` or None.
        stride: the step of the kernel.
        padding: zeros added on both sides; "same" keeps the length, "valid" adds none.
        dilation: the distance between the kernel's points.
        groups: the number of independent groups of channels.

    Returns:
        ``(N, out_channels, (L + 2 padding - dilation (k - 1) - 1) // stride + 1)``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.conv1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.conv1d(jnp.arange(4.0)[None, None], jnp.ones((1, 1, 2))).tolist()
        [[[1.0, 3.0, 5.0]]]
    """
    return conv_nd(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolve (cross-correlate) over two axes.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(out_channels, C / groups, kH, kW)``.
        bias: ``(out_channels,)`` or None.
        stride: the step of the kernel, one number or one an axis.
        padding: zeros added on both sides, one number or one an axis; "same" keeps the size, "valid"
            adds none.
        dilation: the distance between the kernel's points, one number or one an axis.
        groups: the number of independent groups of channels.

    Returns:
        ``(N, out_channels, H', W')``, each size ``(S + 2 padding - dilation (k - 1) - 1) // stride + 1``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.conv2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.conv2d(jnp.ones((1, 3, 8, 8)), jnp.ones((5, 3, 3, 3)), padding=1).shape
        (1, 5, 8, 8)
    """
    return conv_nd(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolve (cross-correlate) over three axes.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.
        weight: ``(out_channels, C / groups, kD, kH, kW)``.
        bias: ``(out_channels,)`` or None.
        stride: the step of the kernel, one number or one an axis.
        padding: zeros added on both sides, one number or one an axis; "same" keeps the size, "valid"
            adds none.
        dilation: the distance between the kernel's points, one number or one an axis.
        groups: the number of independent groups of channels.

    Returns:
        ``(N, out_channels, D', H', W')``, each size ``(S + 2 padding - dilation (k - 1) - 1) // stride + 1``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.conv3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.conv3d(jnp.ones((1, 3, 8, 8, 8)), jnp.ones((5, 3, 3, 3, 3)), padding=1).shape
        (1, 5, 8, 8, 8)
    """
    return conv_nd(3, input, weight, bias, stride, padding, dilation, groups)


@functools.partial(compiled, static_argnums=3)
def _conv_tbc(x: Any, weight: Any, bias: Any, pad: int) -> Any:
    given = f"F.conv_tbc was given input of shape {x.shape} and weight of shape {weight.shape}"
    require_rank(x, (3,), "input", "F.conv_tbc", "(T, N, C)")
    require_rank(weight, (3,), "weight", "F.conv_tbc", "(k, C, out_channels)")
    if x.shape[2] != weight.shape[1]:
        raise shape_error(
            given,
            f"the input has {x.shape[2]} channels and the weight expects {weight.shape[1]}",
            "the time on the first axis and the channels on the last",
        )
    check_bias(bias, weight.shape[2], given)
    if x.shape[0] + 2 * pad + 1 < weight.shape[0]:
        raise shape_error(
            f"{given}, and pad={pad}",
            f"the kernel covers {weight.shape[0]} positions and the padded input has "
            f"{x.shape[0] + 2 * pad}",
            "a smaller kernel, more padding, or a longer input",
        )
    require_same_dtype("F.conv_tbc", input=x, weight=weight, bias=bias)
    layout = ("WNC", "WIO", "WNC")
    out = lax.conv_general_dilated(x, weight, (1,), ((pad, pad),), dimension_numbers=layout)
    return out + bias[None, None]


def conv_tbc(input: ArrayLike, weight: ArrayLike, bias: ArrayLike, pad: int = 0) -> jax.Array:
    """Convolve over the first axis: time, batch, channels.

    Args:
        input: ``(T, N, C)``.
        weight: ``(k, C, out_channels)``.
        bias: ``(out_channels,)``.
        pad: zeros added at both ends.

    Returns:
        ``(T + 2 pad - k + 1, N, out_channels)``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ, or there is no bias.

    Source: ``torch.nn.functional.conv_tbc``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.conv_tbc(jnp.ones((7, 2, 3)), jnp.ones((3, 3, 5)), jnp.zeros(5), pad=1).shape
        (7, 2, 5)
    """
    x = array(input, "input", "F.conv_tbc")
    w = array(weight, "weight", "F.conv_tbc")
    return _conv_tbc(x, w, array(bias, "bias", "F.conv_tbc"), pad)


def check_padding_mode(padding_mode: str, layer: str) -> None:
    """Raise unless a padding mode exists."""
    if padding_mode != "zeros" and padding_mode not in BORDERS:
        raise ValueError(
            explain(
                f"{layer} was given padding_mode={padding_mode!r}",
                "padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular'",
                f"{layer}(..., padding_mode='zeros')",
            )
        )
