"""Convolutions over one and two spatial axes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import explain
from statefulnn.functional._checks import array, numbers, require_same_dtype, shape_error
from statefulnn.functional._conv_lowering import convolve

# How a border is filled, by torch's name and by numpy's.
PADDING_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _conv(
    x: Any,
    weight: Any,
    bias: Any,
    stride: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
) -> Any:
    batched = x.ndim == weight.ndim
    if not batched:
        x = x[None]
    if padding_mode != "zeros":
        x = jnp.pad(x, ((0, 0), (0, 0), *pads), mode=PADDING_MODES[padding_mode])
        pads = ((0, 0),) * len(pads)
    out = convolve(x, weight, stride, pads, dilation, groups)
    if bias is not None:
        out = out + bias.reshape(1, -1, *(1,) * (out.ndim - 2))
    return out if batched else out[0]


def padded(
    padding: Any,
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
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str = "zeros",
) -> Any:
    """Convolve over `spatial` axes; `conv1d` and `conv2d` are this with the number filled in."""
    function = f"F.conv{spatial}d"
    x = array(input, "input", function)
    w = array(weight, "weight", function)
    b = None if bias is None else array(bias, "bias", function)
    axes = "L" if spatial == 1 else "H, W"
    given = f"{function} was given input of shape {x.shape} and weight of shape {w.shape}"
    if w.ndim != spatial + 2 or x.ndim not in (spatial + 1, spatial + 2):
        raise shape_error(
            given,
            f"the input is (N, C, {axes}) or (C, {axes}), the weight "
            f"(out_channels, in_channels / groups, {'k' if spatial == 1 else 'kH, kW'})",
            "reshape to these axes: input[None] adds one in front",
        )
    stride = numbers(stride, spatial, "stride", function)
    dilation = numbers(dilation, spatial, "dilation", function)
    for name, values in (("stride", stride), ("dilation", dilation)):
        if any(v < 1 for v in values):
            raise shape_error(
                f"{function} was given {name}={values}",
                f"non-positive {name} is not supported",
                f"{name}=1",
            )
    kernel = w.shape[2:]
    pads = padded(padding, kernel, stride, dilation, function)
    channels = x.shape[-spatial - 1]
    if groups < 1 or w.shape[0] % groups:
        raise shape_error(
            f"{given}, and groups={groups}",
            "each group makes the same number of output channels",
            f"out_channels that {max(groups, 1)} divides",
        )
    if channels != w.shape[1] * groups:
        raise shape_error(
            f"{given}, and groups={groups}",
            f"the input has {channels} channels and the weight expects {w.shape[1] * groups}",
            f"nn.Conv{spatial}d({channels}, {w.shape[0]}, {tuple(kernel)}), or an input with its "
            f"{w.shape[1] * groups} channels on axis {x.ndim - spatial - 1}",
        )
    for size, k, d, (low, high) in zip(x.shape[-spatial:], kernel, dilation, pads, strict=True):
        if size + low + high < d * (k - 1) + 1:
            raise shape_error(
                f"{given}, and padding={padding}, dilation={dilation}",
                f"the kernel covers {d * (k - 1) + 1} positions and the padded input has "
                f"{size + low + high}",
                "a smaller kernel, more padding, or a larger input",
            )
        if padding_mode == "reflect" and max(low, high) >= size:
            raise shape_error(
                f"{given}, and padding={padding}, padding_mode='reflect'",
                f"a border of {max(low, high)} cannot be mirrored from an axis of {size}",
                f"padding below {size}",
            )
        if padding_mode == "circular" and max(low, high) > size:
            raise shape_error(
                f"{given}, and padding={padding}, padding_mode='circular'",
                f"a border of {max(low, high)} would wrap around an axis of {size} more than once",
                f"padding of at most {size}",
            )
    if b is not None and b.shape != w.shape[:1]:
        raise shape_error(
            f"{given}, and bias of shape {b.shape}",
            f"one bias for each of {w.shape[0]} output channels is needed",
            f"a bias of shape {w.shape[:1]}",
        )
    require_same_dtype(function, input=x, weight=w, bias=b)
    return _conv(x, w, b, stride, pads, dilation, groups, padding_mode)


def conv1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
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
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
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


def check_padding_mode(padding_mode: str, layer: str) -> None:
    """Raise unless a padding mode exists."""
    if padding_mode != "zeros" and padding_mode not in PADDING_MODES:
        raise ValueError(
            explain(
                f"{layer} was given padding_mode={padding_mode!r}",
                "padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular'",
                f"{layer}(..., padding_mode='zeros')",
            )
        )
