"""Sums, means, extrema, orders: over all axes or some."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.bridge.torch.operators._promotion import (
    cast,
    category,
    dtype_of,
    floating,
    integer,
    wide,
)
from statefulnn.bridge.torch.operators._subgradients import absolute, length, picked, root
from statefulnn.bridge.torch.operators._table import operator

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from statefulnn.bridge.torch.operators._table import Axes, Scalar


def axes(dim: Axes) -> Axes:
    """Return JAX's axes for torch's: an empty list stands for all."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return None
    return tuple(dim) if isinstance(dim, (list, tuple)) else dim


def _summed(x: jax.Array, dtype: str | None) -> jax.Array:
    if dtype is not None:
        return cast(x, dtype_of(dtype))
    return cast(x, integer()) if category(x.dtype) < 2 else x


@operator("sum")
def sum_(
    x: jax.Array, dim: Axes = None, keepdim: bool = False, *, dtype: str | None = None
) -> jax.Array:
    return jnp.sum(_summed(x, dtype), axes(dim), keepdims=keepdim)


@operator("nansum")
def nansum(
    x: jax.Array, dim: Axes = None, keepdim: bool = False, *, dtype: str | None = None
) -> jax.Array:
    return jnp.nansum(_summed(x, dtype), axes(dim), keepdims=keepdim)


@operator("mean")
def mean(
    x: jax.Array, dim: Axes = None, keepdim: bool = False, *, dtype: str | None = None
) -> jax.Array:
    return jnp.mean(cast(x, dtype_of(dtype, x.dtype)), axes(dim), keepdims=keepdim)


@operator("prod")
def prod(
    x: jax.Array, dim: Axes = None, keepdim: bool = False, *, dtype: str | None = None
) -> jax.Array:
    return jnp.prod(_summed(x, dtype), axes(dim), keepdims=keepdim)


def _spread(
    x: jax.Array, dim: Axes, unbiased: bool | None, keepdim: bool, correction: Scalar | None
) -> jax.Array:
    """Return the variance, with ``n - correction`` in the denominator, not below 0, before it is rounded."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    where = axes(dim)
    x = cast(x, wide(x.dtype))
    squares = jnp.square(absolute(x - jnp.mean(x, where, keepdims=True)))
    count = x.size if where is None else 1
    for axis in (where,) if isinstance(where, int) else where or ():
        count *= x.shape[axis]
    correction = int(unbiased) if isinstance(unbiased, bool) else correction
    correction = 1 if correction is None else correction
    divisor = jnp.maximum(
        jnp.asarray(count - correction, squares.dtype), jnp.zeros((), squares.dtype)
    )
    return jnp.sum(squares, where, keepdims=keepdim) / divisor


@operator("var", "var.dim", "var.correction")
def var(
    x: jax.Array,
    dim: Axes = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: Scalar | None = None,
) -> jax.Array:
    return cast(_spread(x, dim, unbiased, keepdim, correction), jnp.finfo(x.dtype).dtype)


@operator("std", "std.dim", "std.correction")
def std(
    x: jax.Array,
    dim: Axes = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: Scalar | None = None,
) -> jax.Array:
    return cast(root(_spread(x, dim, unbiased, keepdim, correction)), jnp.finfo(x.dtype).dtype)


def _middle(x: jax.Array, dim: Axes, keepdim: bool) -> jax.Array:
    return jnp.mean(x, axes(None if isinstance(dim, bool) else dim), keepdims=keepdim)


@operator("var_mean")
def var_mean(
    x: jax.Array,
    dim: Axes = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: Scalar | None = None,
) -> tuple[jax.Array, jax.Array]:
    return var(x, dim, unbiased, keepdim, correction=correction), _middle(x, dim, keepdim)


@operator("std_mean")
def std_mean(
    x: jax.Array,
    dim: Axes = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: Scalar | None = None,
) -> tuple[jax.Array, jax.Array]:
    return std(x, dim, unbiased, keepdim, correction=correction), _middle(x, dim, keepdim)


for _name, _function in {"amax": jnp.max, "amin": jnp.min}.items():
    operator(_name)(
        lambda x, dim=(), keepdim=False, _f=_function: _f(x, axes(dim), keepdims=keepdim)
    )
for _name, _function in {"max": jnp.max, "min": jnp.min}.items():
    operator(_name)(lambda x, _f=_function: _f(x))


def _with_place(best: Callable, place: Callable) -> Callable:
    def reduced(x: jax.Array, axis: int, keepdims: bool) -> tuple[jax.Array, jax.Array]:
        return best(x, axis, keepdims=keepdims), _index(place(_ordered(x), axis, keepdims=keepdims))

    run = picked(reduced)
    return lambda x, dim, keepdim=False: (
        run(x, dim, keepdim) if x.ndim else (x, jnp.zeros((), integer()))
    )


def _index(x: jax.Array) -> jax.Array:
    return cast(x, integer())


def _ordered(x: jax.Array) -> jax.Array:
    return cast(x, jnp.int8) if x.dtype == bool else x


operator("max.dim")(_with_place(jnp.max, jnp.argmax))
operator("min.dim")(_with_place(jnp.min, jnp.argmin))


@operator("aminmax")
def aminmax(
    x: jax.Array, *, dim: int | None = None, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    return jnp.min(x, dim, keepdims=keepdim), jnp.max(x, dim, keepdims=keepdim)


@operator("argmax")
def argmax(x: jax.Array, dim: int | None = None, keepdim: bool = False) -> jax.Array:
    return _index(jnp.argmax(_ordered(x), dim, keepdims=keepdim))


@operator("argmin")
def argmin(x: jax.Array, dim: int | None = None, keepdim: bool = False) -> jax.Array:
    return _index(jnp.argmin(_ordered(x), dim, keepdims=keepdim))


@operator("any")
def any_(x: jax.Array, dim: Axes = None, keepdim: bool = False) -> jax.Array:
    return jnp.any(x, axes(dim), keepdims=keepdim)


@operator("all")
def all_(x: jax.Array, dim: Axes = None, keepdim: bool = False) -> jax.Array:
    return jnp.all(x, axes(dim), keepdims=keepdim)


@operator("count_nonzero")
def count_nonzero(x: jax.Array, dim: Axes = None) -> jax.Array:
    return _index(jnp.count_nonzero(x, axes(dim)))


@operator("logsumexp")
def logsumexp(x: jax.Array, dim: Axes, keepdim: bool = False) -> jax.Array:
    return jax.scipy.special.logsumexp(floating(x)[0], axes(dim), keepdims=keepdim)


@operator("norm", "linalg_vector_norm")
def norm(
    x: jax.Array,
    ord: float | None = 2,
    dim: Axes = None,
    keepdim: bool = False,
    *,
    dtype: str | None = None,
) -> jax.Array:
    own = dtype_of(dtype, x.dtype)
    x = cast(x, wide(own))  # squares of half precision overflow
    ord = 2 if ord is None else ord
    return cast(_norm(x, ord, axes(dim), keepdim), jnp.finfo(own).dtype)


def _norm(x: jax.Array, ord: float, where: Axes, keepdim: bool) -> jax.Array:
    if ord in (float("inf"), float("-inf")):
        best = jnp.max if ord > 0 else jnp.min
        return best(absolute(x), where, keepdims=keepdim)
    if ord == 0:
        return jnp.sum(cast(x != 0, x.dtype), where, keepdims=keepdim)
    return length(x, ord, where, keepdim)


# --------------------------------------------------------------------------------------------------
# Running results and orders


@operator("cumsum")
def cumsum(x: jax.Array, dim: int, dtype: str | None = None) -> jax.Array:
    return x if not x.ndim else jnp.cumsum(_summed(x, dtype), dim)


@operator("cumprod")
def cumprod(x: jax.Array, dim: int, dtype: str | None = None) -> jax.Array:
    return x if not x.ndim else jnp.cumprod(_summed(x, dtype), dim)


@operator("logcumsumexp")
def logcumsumexp(x: jax.Array, dim: int) -> jax.Array:
    return lax.cumlogsumexp(x, dim % x.ndim)


def _running(function: Callable) -> Callable:
    def run(x: jax.Array, axis: int, _: bool) -> tuple[jax.Array, jax.Array]:
        best = function(x, axis)
        places = lax.broadcasted_iota(integer(), x.shape, axis)
        # The last of equal ones, as torch has it.
        held = jnp.where(x == best, places, -1)
        return best, lax.cummax(held, axis)

    given = picked(run)
    return lambda x, dim: given(x, dim % x.ndim, True) if x.ndim else (x, jnp.zeros((), integer()))


operator("cummax")(_running(lax.cummax))
operator("cummin")(_running(lax.cummin))


@operator("sort", "sort.stable")
def sort(
    x: jax.Array, dim: int = -1, descending: bool = False, *, stable: bool = False
) -> tuple[jax.Array, jax.Array]:
    places = argsort(x, dim, descending)
    return jnp.take_along_axis(x, places, dim) if x.ndim else x, places


@operator("argsort", "argsort.stable")
def argsort(
    x: jax.Array, dim: int = -1, descending: bool = False, *, stable: bool = False
) -> jax.Array:
    if not x.ndim:
        return jnp.zeros((), integer())
    return _index(jnp.argsort(_ordered(x), dim, stable=True, descending=descending))


@operator("topk")
def topk(
    x: jax.Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[jax.Array, jax.Array]:
    moved = jnp.moveaxis(x, dim, -1)
    if largest and isinstance(moved.shape[-1], int):
        values, places = lax.top_k(moved, k)
    else:
        ordered = jnp.argsort(moved, -1, stable=True, descending=largest)
        places = jnp.take(ordered, jnp.arange(k), -1)
        values = jnp.take_along_axis(moved, places, -1)
    return jnp.moveaxis(values, -1, dim), jnp.moveaxis(_index(places), -1, dim)


def _ranked(
    x: jax.Array, dim: int, keepdim: bool, rank: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the number of a rank along an axis, and its place; the rank is chosen when NaNs are marked."""
    if not x.ndim:
        return x, jnp.zeros((), integer())
    places = jnp.argsort(_ordered(x), dim, stable=True)
    at = jnp.broadcast_to(
        rank(jnp.isnan(x)), (*x.shape[: dim % x.ndim], 1, *x.shape[dim % x.ndim + 1 :])
    )
    chosen = jnp.take_along_axis(places, at, dim)
    values = jnp.take_along_axis(x, chosen, dim)
    if not keepdim:
        values, chosen = jnp.squeeze(values, dim), jnp.squeeze(chosen, dim)
    return values, _index(chosen)


@operator("median.dim")
def median(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    n = x.shape[dim] if x.ndim else 1
    count = lambda nan: jnp.sum(nan, dim, keepdims=True)
    # One NaN makes the median NaN: they come last, and the first of them is taken.
    rank = lambda nan: jnp.where(count(nan) > 0, n - count(nan), (n - 1) // 2)
    return _ranked(x, dim, keepdim, rank)


@operator("nanmedian.dim")
def nanmedian(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    n = x.shape[dim] if x.ndim else 1
    rank = lambda nan: jnp.maximum(n - jnp.sum(nan, dim, keepdims=True) - 1, 0) // 2
    return _ranked(x, dim, keepdim, rank)


@operator("median.default")
def median_of_all(x: jax.Array) -> jax.Array:
    return median(x.ravel(), 0)[0]


@operator("nanmedian.default")
def nanmedian_of_all(x: jax.Array) -> jax.Array:
    return nanmedian(x.ravel(), 0)[0]


@operator("kthvalue")
def kthvalue(
    x: jax.Array, k: int, dim: int = -1, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    return _ranked(x, dim, keepdim, lambda _: jnp.asarray(k - 1))


@operator("mode")
def mode(x: jax.Array, dim: int = -1, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return the most frequent number, of several the smallest, and its last place."""
    if not x.ndim:
        return x, jnp.zeros((), integer())
    moved = jnp.moveaxis(x, dim, -1)
    same = moved[..., :, None] == moved[..., None, :]
    often = jnp.sum(same, -1)
    most = often == jnp.max(often, -1, keepdims=True)
    places = jnp.argsort(_ordered(moved), -1, stable=True)
    first = jnp.argmax(jnp.take_along_axis(most, places, -1), -1, keepdims=True)
    chosen = jnp.take_along_axis(places, first, -1)
    alike = moved == jnp.take_along_axis(moved, chosen, -1)
    last = moved.shape[-1] - 1 - jnp.argmax(jnp.flip(alike, -1), -1, keepdims=True)
    values = jnp.moveaxis(jnp.take_along_axis(moved, last, -1), -1, dim)
    last = jnp.moveaxis(last, -1, dim)
    if not keepdim:
        values, last = jnp.squeeze(values, dim), jnp.squeeze(last, dim)
    return values, _index(last)


def _quantile(skips_nan: bool) -> Callable:
    def run(
        x: Any,
        q: ArrayLike,
        dim: int | None = None,
        keepdim: bool = False,
        *,
        interpolation: str = "linear",
    ) -> jax.Array:
        q = cast(q, x.dtype)
        whole = x.ravel() if dim is None else jnp.moveaxis(x, dim, -1)
        ordered = jnp.sort(whole, -1)  # NaNs come last
        nans = jnp.sum(jnp.isnan(whole), -1, keepdims=True)
        last = cast(whole.shape[-1] - 1, x.dtype)
        rank = q.ravel() * (jnp.maximum(last - cast(nans, x.dtype), 0.0) if skips_nan else last)
        rank = rank if skips_nan else jnp.where(nans > 0, last, rank)
        taken = lambda place: jnp.take_along_axis(ordered, cast(place, jnp.int32), -1)
        below = jnp.floor(rank)
        single = {"lower": below, "higher": jnp.ceil(rank), "nearest": jnp.round(rank)}
        if interpolation in single:
            found = taken(single[interpolation])
        else:
            weight = rank - below if interpolation == "linear" else jnp.asarray(0.5, x.dtype)
            low, high = taken(below), taken(jnp.ceil(rank))
            found = low + weight * (high - low)
        if keepdim:  # one axis for the numbers q, in front, and one for what they are numbers of
            axis = [1] * x.ndim if dim is None else None
            many = jnp.moveaxis(found, -1, 0)
            many = many.reshape(-1, *axis) if axis else jnp.expand_dims(many, dim % x.ndim + 1)
        else:
            many = jnp.moveaxis(found, -1, 0)
        return many if q.ndim else many[0]

    return run


operator("quantile")(_quantile(False))
operator("nanquantile")(_quantile(True))


@operator("diff")
def diff(
    x: jax.Array,
    n: int = 1,
    dim: int = -1,
    prepend: jax.Array | None = None,
    append: jax.Array | None = None,
) -> jax.Array:
    return jnp.diff(x, n, dim, prepend, append)


@operator("histc")
def histc(x: jax.Array, bins: int = 100, min: ArrayLike = 0, max: ArrayLike = 0) -> jax.Array:
    if min == max:  # torch takes the range of the numbers, or one around a single one
        min, max = jnp.min(x), jnp.max(x)
        min, max = jnp.where(min == max, min - 1, min), jnp.where(min == max, max + 1, max)
    numbers = cast(x.ravel(), jnp.float32) if category(x.dtype) < 2 else x.ravel()
    low, high = cast(min, numbers.dtype), cast(max, numbers.dtype)
    places = cast(jnp.floor((numbers - low) / (high - low) * bins), jnp.int32)
    places = jnp.where(numbers == high, bins - 1, places)
    outside = (numbers < low) | (numbers > high)
    places = jnp.where(outside, bins, places)
    return jnp.zeros(bins, x.dtype).at[places].add(jnp.ones_like(x.ravel()), mode="drop")
