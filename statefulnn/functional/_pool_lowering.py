"""Maxima and sums over windows of any number of axes, as shifts and selections.

The window reductions of XLA, and the scatters in their derivatives, are slow on CPUs. Small windows are
therefore unrolled: one strided slice for each element of a window. Derivatives go the other way: a
padded input falls into blocks of one stride each, window number o covers the blocks o, o + 1, ..., and
each block asks these windows whether their maximum is its own. Large windows go axis by axis.

Terms: a tap is the number of an element within its window, counted row by row; the border is the padding.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.functional._checks import shape_error, widened

# Above this many elements a window is not unrolled.
MOST_TAPS = 64


@dataclass(frozen=True)
class Windows:
    """Where windows lie: one number for each of the last axes of an array, or for those in `axes`."""

    sizes: tuple[int, ...]
    outs: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    axes: tuple[int, ...]  # negative

    @functools.cached_property
    def taps(self) -> tuple[tuple[int, ...], ...]:
        """The coordinates of the elements of a window, row by row."""
        return tuple(itertools.product(*(range(k) for k in self.kernel)))

    @functools.cached_property
    def reach(self) -> tuple[int, ...]:
        """How many blocks of one stride a window covers."""
        return tuple(
            (d * (k - 1)) // s + 1
            for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    def along(self, i: int) -> Windows:
        """Return the windows along one of the axes."""
        one = lambda values: (values[i],)
        return Windows(
            one(self.sizes),
            one(self.outs),
            one(self.kernel),
            one(self.stride),
            one(self.padding),
            one(self.dilation),
            one(self.axes),
        )

    def positions(self, i: int) -> np.ndarray:
        """Return the coordinates of every window along an axis, ``(out, k)``, also in the border."""
        starts = np.arange(self.outs[i]) * self.stride[i] - self.padding[i]
        return starts[:, None] + np.arange(self.kernel[i]) * self.dilation[i]

    def shaped(self, i: int, values: np.ndarray) -> Any:
        """Return one number for each window along an axis, in a shape that broadcasts to all."""
        return values.reshape((-1,) + (1,) * (-self.axes[i] - 1))

    def inside(self, tap: tuple[int, ...]) -> np.ndarray:
        """Say for which windows a tap lies in the input."""
        masks = []
        for i, t in enumerate(tap):
            place = self.positions(i)[:, t]
            masks.append(self.shaped(i, (place >= 0) & (place < self.sizes[i])))
        return functools.reduce(np.logical_and, masks)

    def per_axis(self, ndim: int, values: Sequence[Any], other: Any) -> list[Any]:
        """Return a value for each axis of an array, `other` for those without windows."""
        every = [other] * ndim
        for axis, value in zip(self.axes, values, strict=True):
            every[axis] = value
        return every

    def views(self, x: jax.Array, border: ArrayLike) -> list[Any]:
        """Return one element of every window, for each tap."""
        pads = []
        for size, out, k, s, p, d in zip(
            self.sizes,
            self.outs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        ):
            pads.append((p, max((out - 1) * s + d * (k - 1) + 1 - size - p, 0), 0))
        if any(low or high for low, high, _ in pads):
            config = self.per_axis(x.ndim, pads, (0, 0, 0))
            x = lax.pad(x, np.asarray(border, x.dtype)[()], config)
        steps = self.per_axis(x.ndim, self.stride, 1)
        found = []
        for tap in self.taps:
            starts = [t * d for t, d in zip(tap, self.dilation, strict=True)]
            stops = [
                a + (n - 1) * s + 1 for a, n, s in zip(starts, self.outs, self.stride, strict=True)
            ]
            limits = [
                size if stop is None else stop
                for size, stop in zip(x.shape, self.per_axis(x.ndim, stops, None), strict=True)
            ]
            found.append(lax.slice(x, self.per_axis(x.ndim, starts, 0), limits, steps))
        return found


@functools.lru_cache(maxsize=1024)
def windows(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
    function: str,
) -> Windows:
    """Return the windows over the last axes of an input of these sizes, or raise ShapeError."""
    for name, values in (("kernel_size", kernel), ("stride", stride), ("dilation", dilation)):
        if any(v < 1 for v in values):
            raise shape_error(
                f"{function} was given {name}={values}",
                f"{name} must be greater than zero",
                f"{name}=1",
            )
    outs = []
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        extent = d * (k - 1) + 1
        if not 0 <= p <= extent // 2:
            raise shape_error(
                f"{function} was given padding={p}, kernel_size={k}, dilation={d}",
                "pad should be at most half of effective kernel size, and not negative: windows "
                "of nothing but padding have no value",
                f"padding={extent // 2} or less",
            )
        rest = size + 2 * p - extent
        out = (rest + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= size + p:
            out -= 1  # a window must start inside the input or its left border
        if out < 1:
            raise shape_error(
                f"{function} was given input of spatial sizes {sizes}, kernel_size={kernel}, "
                f"padding={padding}",
                "the window is larger than the input: the output size is too small",
                "a smaller kernel_size, or a larger input",
            )
        outs.append(out)
    axes = tuple(range(-len(sizes), 0))
    return Windows(sizes, tuple(outs), kernel, stride, padding, dilation, axes)


def index_dtype() -> Any:
    """Return the dtype of indices: int64, or int32 where 64 bits are off."""
    return jax.dtypes.canonicalize_dtype(np.int64)


def lowest(dtype: DTypeLike) -> Any:
    """Return what is not larger than any number of a dtype."""
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).min


# Maxima: the first of equal elements, and the last NaN if there is one.


def largest(x: jax.Array, w: Windows) -> Any:
    """Return the maximum of each window; derivatives go to the element that was taken."""
    if len(w.taps) > MOST_TAPS and w.axes[1:]:
        for i in reversed(range(len(w.axes))):
            x = largest(x, w.along(i))
        return x
    if len(w.taps) > MOST_TAPS:
        return jnp.take_along_axis(x, _places_along(lax.stop_gradient(x), w), w.axes[0])
    return _unrolled(x, w) if jnp.issubdtype(x.dtype, jnp.floating) else _scan(x, w)


def largest_with_index(x: jax.Array, w: Windows) -> tuple[Any, Any]:
    """Return the maximum of each window and where it was, counted row by row over the axes."""
    value, still = largest(x, w), lax.stop_gradient(x)
    if len(w.taps) <= MOST_TAPS:
        return value, _index_of(_scan(still, w, taps=True), w)
    index: Any = None
    step = 1
    for i in reversed(range(len(w.axes))):
        one = w.along(i)
        place = _places_along(still, one)
        further = place * np.asarray(step, place.dtype)
        axis = w.axes[i]
        index = place if index is None else jnp.take_along_axis(index, place, axis) + further
        still = jnp.take_along_axis(still, place, axis)
        step *= w.sizes[i]
    return value, index


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _unrolled(x: jax.Array, w: Windows) -> Any:
    return _scan(x, w)


@_unrolled.defjvp
def _unrolled_jvp(w: Windows, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    taps = _scan(lax.stop_gradient(x), w, taps=True)
    # XLA would compute the taps of a window again for each of its elements, where a ReLU comes next. It
    # computes once what has a remainder; here one that changes nothing.
    taps = lax.rem(taps, np.int8(MOST_TAPS + 1))
    return _unrolled(x, w), _picked(dx, taps, w)


def _scan(x: jax.Array, w: Windows, taps: bool = False) -> Any:
    # The maxima, or their taps.
    best: Any = None
    taken: Any = None
    views = w.views(x, lowest(x.dtype))
    bordered = any(w.padding) or not all(w.inside(tap).all() for tap in (w.taps[0], w.taps[-1]))
    started = np.zeros((), bool)
    for number, (tap, value) in enumerate(zip(w.taps, views, strict=True)):
        valid = w.inside(tap) if bordered else np.ones((), bool)
        if best is None:
            best, taken = value, jnp.zeros(value.shape, jnp.int8)
        else:
            better = (value > best) | (value != value)
            if (valid & ~started).any():  # never an element of the border, not even among -inf
                better = better | jnp.asarray(valid & ~started)
            # For taps no selections: XLA makes branches of them, which the processor predicts badly. Their
            # numbers grow; the sign of a zero, which the larger of two does not keep, is not asked for.
            best = lax.max(best, value) if taps else jnp.where(better, value, best)
            taken = lax.max(taken, better.astype(jnp.int8) * np.int8(number))
        started = started | valid
    return taken if taps else best


def _index_of(taps: jax.Array, w: Windows) -> Any:
    dtype = index_dtype()
    taps = taps.astype(dtype)
    index: Any = 0
    for i in range(len(w.axes)):
        below = math.prod(w.kernel[i + 1 :])
        t = lax.rem(lax.div(taps, lax.full_like(taps, below)), lax.full_like(taps, w.kernel[i]))
        start = w.shaped(i, w.positions(i)[:, 0]).astype(dtype)
        place = start + t * np.asarray(w.dilation[i], dtype)
        index = place + index * np.asarray(w.sizes[i], dtype) if i else place
    return index


def _places_along(x: jax.Array, w: Windows) -> Any:
    # The coordinates of maxima along one axis.
    positions = w.positions(0)
    valid = (positions >= 0) & (positions < w.sizes[0])
    if len(w.taps) <= MOST_TAPS:
        return _index_of(_scan(x, w, taps=True), w)
    return places(x, np.where(valid, positions, -1), w.axes[0])


def winner(x: jax.Array, axis: int) -> Any:
    """Return where along an axis the maximum is: the first one, or the last NaN."""
    nan = x != x
    last = x.shape[axis] - 1 - jnp.argmax(jnp.flip(nan, axis), axis)
    return jnp.where(nan.any(axis), last, jnp.argmax(x, axis))


def places(x: jax.Array, positions: np.ndarray, axis: int) -> Any:
    """Return where the maxima of windows along an axis are, as coordinates.

    Args:
        x: any shape.
        positions: ``(out, k)``, the coordinates in each window, -1 for the border.
        axis: negative.
    """
    valid = positions >= 0
    column = (-1,) + (1,) * (-axis - 1)
    lead = (*positions.shape, *column[1:])
    windowed = jnp.take(x, np.maximum(positions, 0), axis)  # (*, out, k, *)
    bottom = np.asarray(lowest(x.dtype), x.dtype)[()]
    windowed = jnp.where(valid.reshape(lead), windowed, bottom)
    tap = winner(windowed, axis)
    everywhere_lowest = jnp.max(windowed, axis) == bottom
    first = valid.argmax(1).astype(tap.dtype).reshape(column)
    tap = jnp.where(everywhere_lowest, first, tap)
    taps = np.arange(positions.shape[1]).astype(tap.dtype).reshape(lead[1:])
    where = positions.astype(index_dtype()).reshape(lead)
    chosen = jnp.expand_dims(tap, axis) == taps
    return jnp.where(chosen, where, np.zeros((), where.dtype)).sum(axis)


# The input is linear here. Only the taps are kept for the transpose: without the checkpoint a mask for
# each element of a window would be.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _picked(x: jax.Array, taps: jax.Array | None, w: Windows) -> Any:
    """Return the sum over each window, or of `x` only the element at its tap."""
    ndim = x.ndim
    blocks_of = [out + q - 1 for out, q in zip(w.outs, w.reach, strict=True)]
    ends = [
        (p, n * s - size - p, 0)
        for p, n, s, size in zip(w.padding, blocks_of, w.stride, w.sizes, strict=True)
    ]
    zero = np.zeros((), x.dtype)[()]
    if any(low or high for low, high, _ in ends):
        x = lax.pad(x, zero, w.per_axis(ndim, ends, (0, 0, 0)))
    # (*, blocks, stride, blocks, stride, ...)
    shape: list[int] = []
    inner: list[int] = []  # the axes within a block
    split: list[int] = [False] * ndim
    for axis in w.axes:
        split[axis] = True
    strides = w.per_axis(ndim, w.stride, 1)
    for axis, size in enumerate(x.shape):
        if split[axis]:
            inner.append(len(shape) + 1)
            shape += [size // strides[axis], strides[axis]]
        else:
            shape.append(size)
    x = x.reshape(shape)
    overlap = any(q > 1 for q in w.reach)
    around = [(q - 1, q - 1, 0) for q in w.reach]
    if taps is not None and overlap:
        taps = lax.pad(taps, np.int8(-1), w.per_axis(ndim, around, (0, 0, 0)))
    total: Any = None
    for shift in itertools.product(*(range(q) for q in w.reach)):
        code = _codes(shift, w, tuple(inner), len(shape))
        if code is None:
            continue
        if taps is None:
            chosen = code >= 0
        else:
            of_window = taps
            for axis, m, q, n in zip(w.axes, shift, w.reach, blocks_of, strict=True):
                start = q - 1 - m
                of_window = lax.slice_in_dim(of_window, start, start + n, axis=axis)
            chosen = jnp.expand_dims(of_window, inner) == code
        part = jnp.where(chosen, x, zero).sum(tuple(inner))
        if overlap:
            ends = [(q - 1 - m, m, 0) for m, q in zip(shift, w.reach, strict=True)]
            part = lax.pad(part, zero, w.per_axis(ndim, ends, (0, 0, 0)))
        total = part if total is None else total + part
    if overlap:
        for axis, q, out in zip(w.axes, w.reach, w.outs, strict=True):
            total = lax.slice_in_dim(total, q - 1, q - 1 + out, axis=axis)
    return total


def _codes(shift: tuple[int, ...], w: Windows, inner: tuple[int, ...], ndim: int) -> Any:
    # The taps of a window that the elements of a block are, -1 where they are none; the window begins
    # `shift` blocks earlier. Computed, because XLA's loops read a constant array much more slowly.
    shape = [1] * ndim
    for axis, s in zip(inner, w.stride, strict=True):
        shape[axis] = s
    code: Any = None
    valid: Any = None
    for axis, m, s, k, d in zip(inner, shift, w.stride, w.kernel, w.dilation, strict=True):
        if not any(o % d == 0 and o // d < k for o in range(m * s, m * s + s)):
            return None
        offset = lax.broadcasted_iota(jnp.int32, shape, axis) + np.int32(m * s)
        tap = lax.div(offset, np.int32(d))
        fits = (tap < np.int32(k)) & (tap * np.int32(d) == offset)
        code = tap if code is None else code * np.int32(k) + tap
        valid = fits if valid is None else valid & fits
    return jnp.where(valid, code, np.int32(-1)).astype(jnp.int8)


# Sums.


def sums(x: jax.Array, w: Windows) -> Any:
    """Return the sum over each window, whose border counts as zeros; low precision as float32."""
    x = widened(x)
    if len(w.taps) > MOST_TAPS and w.axes[1:]:
        for i in reversed(range(len(w.axes))):
            x = sums(x, w.along(i))
        return x
    if len(w.taps) > MOST_TAPS:
        return _long_sums(x, w)
    return _unrolled_sums(x, w) if jnp.issubdtype(x.dtype, jnp.floating) else _added(x, w)


def _long_sums(x: jax.Array, w: Windows) -> Any:
    ((size,), (out,), (k,), (s,), (p,)) = w.sizes, w.outs, w.kernel, w.stride, w.padding
    high = max((out - 1) * s + k - size - p, 0)
    one = lambda value, other: tuple(w.per_axis(x.ndim, [value], other))
    zero = np.zeros((), x.dtype)[()]
    padded = lax.pad(x, zero, one((p, high, 0), (0, 0, 0)))
    return lax.reduce_window(padded, zero, lax.add, one(k, 1), one(s, 1), "VALID")


def _added(x: jax.Array, w: Windows) -> Any:
    return functools.reduce(lax.add, w.views(x, 0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _unrolled_sums(x: jax.Array, w: Windows) -> Any:
    return _added(x, w)


@_unrolled_sums.defjvp
def _unrolled_sums_jvp(w: Windows, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return _unrolled_sums(primals[0], w), _picked(tangents[0], None, w)
