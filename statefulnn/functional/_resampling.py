"""Resampling along one axis: each output is a weighted sum of a few inputs, its taps.

Which inputs and which weights depends on sizes only, so it is worked out in numpy while code is
traced. The forward sum reads the taps alone, so that one infinite pixel spoils its neighbourhood and
not its whole row; so does the derivative, which is written down, since XLA's own is a scatter, many
times slower on CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

# Beyond these, shifted copies cost more than an indexed read.
MOST_PHASES = 4
MOST_SLICES = 16


class How(NamedTuple):
    """What determines the taps of one axis."""

    kind: str  # nearest, nearest-exact, linear, bicubic, lanczos or area
    before: int
    after: int
    factor: float | None  # None: the quotient of the sizes
    align_corners: bool
    antialias: bool
    wide: bool  # whether torch computes the positions in float64
    small: bool  # whether torch takes its path for small images


class Taps(NamedTuple):
    """Indices and weights, both (taps, after); no weights for a single tap of weight 1."""

    index: np.ndarray
    weight: np.ndarray | None


@functools.lru_cache(maxsize=512)
def taps(how: How) -> Taps:
    """Return which inputs each output reads, and their weights."""
    if how.kind in ("nearest", "nearest-exact"):
        return Taps(_nearest(how)[None], None)
    if how.kind == "area":
        return _windows(how)
    if how.before == how.after and (how.kind == "linear" or how.antialias):
        return Taps(np.arange(how.after)[None], None)  # a copy, whatever the factor
    if how.antialias:
        return _filtered(how)
    at = _positions(how)
    if how.kind == "linear":
        at = np.maximum(at, 0)
    # Rounding may put a position that lies on an input just below it: seen from there, its neighbours
    # would not be the same at each period.
    low = np.floor(at + 1e-6 * np.maximum(at, 1)).astype(np.int64)
    part = (at - low).astype(at.dtype)
    if how.kind == "linear":
        offsets, weight = np.arange(2), np.stack([1 - part, part])
    else:
        offsets, weight = np.arange(-1, 3), _cubic(part)
    index = low + offsets[:, None]
    return Taps(index, weight.astype(at.dtype))


def _ratio(how: How) -> Any:
    real = np.float64 if how.wide else np.float32
    if how.align_corners:
        return real(how.before - 1) / real(how.after - 1) if how.after > 1 else real(0)
    if how.factor is not None and how.factor > 0:
        return real(1.0 / how.factor)
    return real(how.before) / real(how.after)


def _positions(how: How) -> np.ndarray:
    """Return where each output lies among the inputs."""
    ratio = _ratio(how)
    out = np.arange(how.after, dtype=ratio.dtype)
    half = ratio.dtype.type(0.5)
    return ratio * out if how.align_corners else ratio * (out + half) - half


def _nearest(how: How) -> np.ndarray:
    out = np.arange(how.after)
    if how.small:
        how = how._replace(wide=False)
        if how.kind == "nearest" and how.after in (how.before, 2 * how.before):
            return out // (how.after // how.before)
    ratio = _ratio(how)
    half = ratio.dtype.type(0.5)
    if how.kind == "nearest":
        at = out.astype(ratio.dtype) * ratio
    elif how.small:
        at = (out + 0.5) * float(ratio)
    else:
        at = (ratio * (out.astype(ratio.dtype) + half) - half) + half
    return np.minimum(np.floor(at.astype(np.float32)).astype(np.int64), how.before - 1)


def _cubic(part: np.ndarray) -> np.ndarray:
    """Return Keys' cubic convolution with a = -0.75 at four taps."""
    a = part.dtype.type(-0.75)

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return np.stack([far(part + 1), near(part), near(1 - part), far(2 - part)])


def _table(
    start: np.ndarray, count: np.ndarray, weight: Callable[[np.ndarray], np.ndarray]
) -> Taps:
    """Return windows of different widths as taps: what is missing repeats the last, at weight 0."""
    steps = np.arange(max(int(count.max(initial=1)), 1))[:, None]
    inside = steps < count
    index = start + np.minimum(steps, np.maximum(count - 1, 0))
    return Taps(index, np.where(inside, weight(index), 0))


def _windows(how: How) -> Taps:
    out = np.arange(how.after)
    start = out * how.before // max(how.after, 1)
    stop = -((out + 1) * how.before // -max(how.after, 1))
    return _table(start, stop - start, lambda index: 1.0 / np.maximum(stop - start, 1))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0)


def _keys(x: np.ndarray) -> np.ndarray:
    # a = -0.5 here, as in image libraries.
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _sinc3(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


_FILTERS = {"linear": (_triangle, 1.0), "bicubic": (_keys, 2.0), "lanczos": (_sinc3, 3.0)}


def _filtered(how: How) -> Taps:
    """Return the taps of a filter that is widened by the ratio when shrinking."""
    window, radius = _FILTERS[how.kind]
    ratio = _ratio(how)
    real = ratio.dtype.type
    stretch = max(ratio, real(1))
    reach = real(radius) * stretch
    half = real(0.5)
    centre = ratio * (np.arange(how.after, dtype=ratio.dtype) + half)
    start = np.maximum((centre - reach + half).astype(np.int64), 0)
    stop = np.minimum((centre + reach + half).astype(np.int64), how.before)
    found = _table(
        start, stop - start, lambda index: window(np.abs((index - centre + half) / stretch))
    )
    assert found.weight is not None
    total = found.weight.sum(0)
    return Taps(found.index, found.weight / np.where(total == 0, 1, total))


def along_axis(x: jax.Array, axis: int, how: How) -> Any:
    """Resample one axis of a floating array."""
    index, weight = taps(how)
    before, after = how.before, how.after
    if weight is None:
        if before == after and (index[0] == np.arange(after)).all():
            return x
        if after % before == 0 and (index[0] == np.arange(after) // (after // before)).all():
            return _repeated(x, axis, after // before)
    if how.kind == "area" and after and before % after == 0:
        shape = (*x.shape[:axis], after, before // after, *x.shape[axis + 1 :])
        return x.reshape(shape).sum(axis + 1) / (before // after)
    return _resampled(x, axis, how)


def _repeated(x: jax.Array, axis: int, times: int) -> Any:
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    axes = tuple(a for a in range(x.ndim + 1) if a != axis + 1)
    out = lax.broadcast_in_dim(x, shape, axes)
    return out.reshape(*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _resampled(x: jax.Array, axis: int, how: How) -> Any:
    index, weight = taps(how)
    period = _period(index, how)
    if period is None:
        return _gathered(x, axis, index, weight)
    return _shifted(x, axis, index, weight, period)


@_resampled.defjvp
def _resampled_jvp(axis: int, how: How, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    (x,), (slope,) = primals, tangents
    return _resampled(x, axis, how), _scattered(slope, axis, how)


def _scattered(x: jax.Array, axis: int, how: How) -> Any:
    """Resample by adding each input to the outputs that read it: what this is the transpose of only reads."""
    index, weight = _readers(how)
    out = jnp.zeros((*x.shape[:axis], how.after, *x.shape[axis + 1 :]), x.dtype)
    for row, factor in zip(index, weight, strict=True):
        part = x * _spread(factor, axis, x.ndim, x.dtype)
        if (row < 0).any():
            part = jnp.where(_spread(row >= 0, axis, x.ndim, bool), part, 0)
        at = (slice(None),) * axis + (np.maximum(row, 0).astype(np.int32),)
        out = out.at[at].add(part, mode="promise_in_bounds")
    return out


@functools.lru_cache(maxsize=512)
def _readers(how: How) -> tuple[np.ndarray, np.ndarray]:
    """Return which outputs read each input, -1 for no more of them, and the weights: (readers, before)."""
    index, weight = taps(how)
    weight = np.ones(index.shape) if weight is None else weight
    pairs = np.clip(index, 0, how.before - 1) * how.after + np.arange(how.after)
    if how.before == how.after:
        pairs, weight = pairs[weight != 0], weight[weight != 0]  # a copy, as torch's derivative is
    pairs, place = np.unique(pairs, return_inverse=True)
    read, reader = np.divmod(pairs, max(how.after, 1))
    number = np.arange(pairs.size) - np.searchsorted(read, read)
    readers = np.full((number.max(initial=-1) + 1, how.before), -1)
    weights = np.zeros(readers.shape)
    readers[number, read] = reader
    weights[number, read] = np.bincount(place.ravel(), weight.ravel())
    return readers, weights


def _period(index: np.ndarray, how: How) -> tuple[int, int] | None:
    """Return after how many outputs the pattern of taps repeats, and how many inputs further."""
    common = math.gcd(how.before, how.after)
    if common == 0:
        return None
    outs, ins = how.after // common, how.before // common
    if outs > MOST_PHASES or outs * len(index) > MOST_SLICES or how.antialias or how.kind == "area":
        return None
    base = index.reshape(len(index), common, outs) - ins * np.arange(common)[:, None]
    return (outs, ins) if (base == base[:, :1]).all() else None


def _spread(weight: np.ndarray, axis: int, ndim: int, dtype: DTypeLike) -> np.ndarray:
    shape = [1] * ndim
    shape[axis] = weight.size
    return weight.reshape(shape).astype(dtype)


def _shifted(
    x: jax.Array, axis: int, index: np.ndarray, weight: np.ndarray | None, period: tuple[int, int]
) -> Any:
    """Sum shifted copies: one for each tap of each phase, and the phases laid out in turn."""
    outs, ins = period
    size, count = x.shape[axis], index.shape[1] // outs
    low = max(0, -int(index.min()))
    high = max(0, int(index.max()) - (size - 1))
    # The outermost input goes on beyond the border.
    first = lax.slice_in_dim(x, 0, 1, axis=axis)
    last = lax.slice_in_dim(x, size - 1, size, axis=axis)
    if low or high:
        x = jnp.concatenate([first] * low + [x] + [last] * high, axis)
    phases = []
    for phase in range(outs):
        terms = []
        for tap, row in enumerate(index):
            start = int(row[phase]) + low
            part = lax.slice_in_dim(x, start, start + ins * (count - 1) + 1, ins, axis)
            if weight is not None:
                part = part * _spread(weight[tap, phase::outs], axis, x.ndim, x.dtype)
            terms.append(part)
        phases.append(functools.reduce(lax.add, terms))
    if outs == 1:
        return phases[0]
    out = jnp.stack(phases, axis + 1)
    return out.reshape(*x.shape[:axis], count * outs, *x.shape[axis + 1 :])


def _gathered(x: jax.Array, axis: int, index: np.ndarray, weight: np.ndarray | None) -> Any:
    """Sum indexed reads, one for each tap; more than a few of them in one read."""
    at = np.clip(index, 0, max(x.shape[axis] - 1, 0)).astype(np.int32)
    if weight is None:
        return _read(x, at[0], axis)
    # A tap that repeats the one before at weight 0 is none: infinity times 0 would be NaN.
    none = (np.diff(index, axis=0, prepend=index[:1] - 1) == 0) & (weight == 0)

    def weighted(part: jax.Array, row: np.ndarray, none: np.ndarray) -> Any:
        shape = (*row.shape, *(1,) * (x.ndim - axis - 1))
        part = part * row.reshape(shape).astype(x.dtype)
        return jnp.where(none.reshape(shape), 0, part) if none.any() else part

    if len(index) > 4:
        return weighted(_read(x, at.T, axis), weight.T, none.T).sum(axis + 1)  # (*, after, taps, *)
    parts = [_read(x, row, axis) for row in at]
    return functools.reduce(lax.add, map(weighted, parts, weight, none))


def _read(x: jax.Array, index: np.ndarray, axis: int) -> Any:
    at = (slice(None),) * axis + (index,)
    return x.at[at].get(mode="promise_in_bounds")


def along_axis_of_bytes(x: jax.Array, axis: int, how: How) -> Any:
    """Resample one axis of a uint8 image, in whole numbers: the weights are rounded to 15 bits."""
    index, weight = taps(how)
    if weight is None:
        return along_axis(x, axis, how)
    if how.before == how.after:
        return x  # a copy, whatever the factor
    # Taps beyond the border meet on the outermost pixel, and are rounded together.
    index, weight = np.clip(index, 0, how.before - 1), weight.copy()
    for tap in range(1, len(index)):
        same = index[tap] == index[tap - 1]
        weight[tap] += np.where(same, weight[tap - 1], 0)
        weight[tap - 1] = np.where(same, 0, weight[tap - 1])
    bits, largest = 0, weight.max()
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    weight = np.trunc(weight * (1 << bits) + np.copysign(0.5, weight)).astype(np.int32)
    out = _gathered(x.astype(np.int32), axis, index, weight) + np.int32(1 << (bits - 1))
    return jnp.clip(out >> np.int32(bits), 0, 255).astype(np.uint8)
