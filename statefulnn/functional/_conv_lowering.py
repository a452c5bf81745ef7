"""How a convolution is computed: the one place where that is chosen, by measurement.

Measured with ``python benchmarks/conv_lowering.py`` (see there for the shapes). A lowering is listed
where it wins both forward and with gradients.

(measurements)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

Pads = Sequence[tuple[int, int]]

# Above this many taps a depthwise kernel is left to XLA: the unrolled sum would be long to compile.
MOST_TAPS = 64


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
    zero = jax.numpy.zeros((), x.dtype)
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


def convolve(
    x: Any, w: Any, stride: Sequence[int], pads: Pads, dilation: Sequence[int], groups: int
) -> Any:
    """Convolve ``(N, C, *)`` with ``(O, C / groups, *)``, by the lowering that is fastest there.

    The choice between platforms is made when the code is compiled for one, not when it is traced.
    """
    depthwise = groups == x.shape[1] and groups > 1 and x.size > 0
    if not depthwise or math.prod(w.shape[2:]) > MOST_TAPS:
        return general(x, w, stride, pads, dilation, groups)
    return lax.platform_dependent(
        x,
        w,
        cpu=lambda x, w: shifted_sum(x, w, stride, pads, dilation),
        default=lambda x, w: general(x, w, stride, pads, dilation, groups),
    )
