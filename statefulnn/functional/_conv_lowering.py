"""How a convolution is computed: the one place where that is chosen, by measurement.

``python benchmarks/conv_lowering.py`` on 2 CPU cores, JAX 0.10.2, batch 32, float32; time as a multiple
of that of ``lax.conv_general_dilated``, forward and with both gradients:

=====================================  =======  =========  =========================================
convolution                            forward  gradients  chosen on CPU
=====================================  =======  =========  =========================================
depthwise 3x3, 64 channels, 32x32         0.02       0.23  a sum of shifted products
depthwise 3x3, stride 2                   0.05       0.06
depthwise 3x3, two outputs a channel      0.03       0.01
depthwise 7x7, 64 channels, 16x16         0.06       0.56
depthwise width 4, 128 channels, 256      0.01       0.04
3x3 in 4 groups, 64 channels, 16x16       0.38       0.03  one convolution a group
3x3 in 16 groups, 64 channels, 16x16      0.84       0.02
1x1, 64 to 128 channels, 16x16            0.89       0.57  a matrix product
all others: channels last inside          1.00       1.00  ``lax.conv_general_dilated``
=====================================  =======  =========  =========================================

Also tried: groups as a batched matrix product over stacked shifts (3.5 and 0.12 in 4 groups), a sum of
shifted products for a single input channel (0.56 and 4.8). On other platforms the library behind XLA's
own operation is left to choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

Pads = Sequence[tuple[int, int]]

# Above this many taps a depthwise kernel is left to XLA: the unrolled sum would be long to compile.
MOST_TAPS = 128


def general(
    x: Any, w: Any, stride: Sequence[int], pads: Pads, dilation: Sequence[int], groups: int
) -> Any:
    """Convolve by XLA's own operation; ``(N, C, *)`` and ``(O, C / groups, *)``."""
    layout = "HW"[: x.ndim - 2] if x.ndim <= 4 else "DHW"
    return lax.conv_general_dilated(
        x,
        w,
        tuple(stride),
        tuple(pads),
        rhs_dilation=tuple(dilation),
        dimension_numbers=(f"NC{layout}", f"OI{layout}", f"NC{layout}"),
        feature_group_count=groups,
    )


def shifted_sum(x: Any, w: Any, stride: Sequence[int], pads: Pads, dilation: Sequence[int]) -> Any:
    """Convolve each channel with its own kernels, as a sum of shifted products."""
    channels = x.shape[1]
    per_channel = w.shape[0] // channels
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), (0, 0, 0), *((low, high, 0) for low, high in pads)])
    kernel = w.shape[2:]
    out_sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    taps = w.reshape(channels, per_channel, math.prod(kernel))
    spatial = (1,) * len(kernel)
    out = None
    for tap in range(taps.shape[2]):
        shift, rest = [], tap
        for k in reversed(kernel):
            rest, position = divmod(rest, k)
            shift.insert(0, position)
        starts = [p * d for p, d in zip(shift, dilation, strict=True)]
        stops = [a + s * (n - 1) + 1 for a, s, n in zip(starts, stride, out_sizes, strict=True)]
        window = lax.slice(
            x, (0, 0, *starts), (x.shape[0], channels, *stops), (1, 1, *stride)
        )  # (N, C, *out)
        if per_channel > 1:
            term = window[:, :, None] * taps[None, :, :, tap].reshape(
                1, channels, per_channel, *spatial
            )
        else:
            term = window * taps[:, 0, tap].reshape(1, channels, *spatial)
        out = term if out is None else out + term
    assert out is not None
    return out.reshape(x.shape[0], channels * per_channel, *out_sizes)


def group_by_group(
    x: Any, w: Any, stride: Sequence[int], pads: Pads, dilation: Sequence[int], groups: int
) -> Any:
    """Convolve each group of channels by itself."""
    inputs, kernels = jnp.split(x, groups, axis=1), jnp.split(w, groups, axis=0)
    outs = [general(a, b, stride, pads, dilation, 1) for a, b in zip(inputs, kernels, strict=True)]
    return jnp.concatenate(outs, axis=1)


def pointwise(x: Any, w: Any, stride: Sequence[int], pads: Pads) -> Any:
    """Convolve with a kernel of one point, as a matrix product over channels."""
    if any(low or high for low, high in pads):
        x = jnp.pad(x, ((0, 0), (0, 0), *pads))
    if any(s != 1 for s in stride):
        x = lax.slice(x, (0,) * x.ndim, x.shape, (1, 1, *stride))
    batch, channels, *sizes = x.shape
    flat = x.reshape(batch, channels, math.prod(sizes))
    out = jnp.einsum("oc,ncs->nos", w.reshape(w.shape[:2]), flat)
    return out.reshape(batch, w.shape[0], *sizes)


def convolve(
    x: Any, w: Any, stride: Sequence[int], pads: Pads, dilation: Sequence[int], groups: int
) -> Any:
    """Convolve ``(N, C, *)`` with ``(O, C / groups, *)``, by the lowering that is fastest there.

    The choice between platforms is made when the code is compiled for one, not when it is traced.
    """
    taps = math.prod(w.shape[2:])
    arguments = (tuple(stride), tuple(pads), tuple(dilation))
    if x.size == 0 or w.size == 0:
        return general(x, w, *arguments, groups)
    if groups > 1 and groups == x.shape[1] and taps <= MOST_TAPS:
        on_cpu = lambda x, w: shifted_sum(x, w, *arguments)
    elif groups > 1:
        on_cpu = lambda x, w: group_by_group(x, w, *arguments, groups)
    elif taps == 1:
        on_cpu = lambda x, w: pointwise(x, w, *arguments[:2])
    else:
        return general(x, w, *arguments, groups)
    return lax.platform_dependent(
        x, w, cpu=on_cpu, default=lambda x, w: general(x, w, *arguments, groups)
    )
