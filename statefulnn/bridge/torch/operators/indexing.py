"""Taking elements by index, and putting them there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

import statefulnn.functional as F
from statefulnn.bridge.torch.operators._promotion import (
    cast,
    counted,
    integer,
    is_array,
    promoted,
)
from statefulnn.bridge.torch.operators._table import operator
from statefulnn.bridge.torch.operators.views import chosen, sliced
from statefulnn.core.errors import ShapeError, explain

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import ArrayLike

    from statefulnn.bridge.torch.operators._table import Scalar


def _indices(indices: Sequence[jax.Array | None]) -> tuple[jax.Array | slice, ...]:
    """Return torch's list of indices as jnp's; None takes a whole axis."""
    for index in indices:
        if index is not None and index.dtype == bool and index.ndim:
            raise ShapeError(
                explain(
                    "indexed an array by truth values",
                    "how many there are, and so the shape of the result, depends on the numbers",
                    "torch.where(mask, a, b) keeps the shape",
                )
            )
    return tuple(slice(None) if i is None else i for i in indices)


@operator("index")
def index(x: jax.Array, indices: Sequence[jax.Array | None]) -> jax.Array:
    return x[_indices(indices)]


@operator("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(
    x: jax.Array,
    indices: Sequence[jax.Array | None],
    values: jax.Array,
    accumulate: bool = False,
    unsafe: bool = False,
) -> jax.Array:
    values = cast(values, x.dtype)
    given = [i for i in indices if i is not None]
    if len(given) == 1 and given[0].dtype == bool:
        (mask,) = given
        after = x.ndim - (len(indices) - 1) - mask.ndim
        if (
            values.ndim > after
        ):  # one for all places of the mask: nodes.counts_places refuses others
            place = values.ndim - after - 1
            ends = values.shape[:place], values.shape[place + 1 :]
            values = values.reshape(*ends[0], *[1] * mask.ndim, *ends[1])
        return jnp.where(
            mask.reshape(*mask.shape, *[1] * after), x + values if accumulate else values, x
        )
    where = x.at[_indices(indices)]
    return where.add(values) if accumulate else where.set(values)


@operator("_unsafe_index")
def unsafe_index(x: jax.Array, indices: Sequence[jax.Array | None]) -> jax.Array:
    return index(x, indices)


@operator("index_select")
def index_select(x: jax.Array, dim: int, index: jax.Array) -> jax.Array:
    return jnp.take(x, jnp.atleast_1d(index), dim) if x.ndim else x


@operator("take")
def take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.ravel()[index]


@operator("take_along_dim")
def take_along_dim(x: jax.Array, indices: jax.Array, dim: int | None = None) -> jax.Array:
    return jnp.take_along_axis(x, indices, dim)


@operator("gather")
def gather(x: jax.Array, dim: int, index: jax.Array, *, sparse_grad: bool = False) -> jax.Array:
    return x[_along(x, dim, index)] if x.ndim else jnp.broadcast_to(x, index.shape)


def _along(x: jax.Array, dim: int, index: jax.Array) -> tuple[jax.Array, ...]:
    """Return indices that take `index` along one axis, and count along the others."""
    dim %= x.ndim
    places = []
    for axis in range(x.ndim):
        shape = [1] * x.ndim
        shape[axis] = index.shape[axis]
        places.append(index if axis == dim else counted(index.shape[axis]).reshape(shape))
    return tuple(places)


def _source(index: jax.Array, source: Any, dtype: np.dtype) -> jax.Array:
    """Return the part of a source that belongs to the indices."""
    if not hasattr(source, "shape") or not source.shape:
        return jnp.broadcast_to(cast(source, dtype), index.shape)
    pairs = zip(index.shape, source.shape, strict=True)
    return cast(source[tuple(slice(None if n == m else n) for n, m in pairs)], dtype)


@operator("scatter")
def scatter(
    x: jax.Array, dim: int, index: jax.Array, source: ArrayLike, *, reduce: str | None = None
) -> jax.Array:
    where = x.at[_along(x, dim, index)]
    source = _source(index, source, x.dtype)
    return {None: where.set, "add": where.add, "multiply": where.multiply}[reduce](source)


@operator("scatter_add")
def scatter_add(x: jax.Array, dim: int, index: jax.Array, source: jax.Array) -> jax.Array:
    return x.at[_along(x, dim, index)].add(_source(index, source, x.dtype))


@operator("scatter_reduce")
def scatter_reduce(
    x: jax.Array,
    dim: int,
    index: jax.Array,
    source: jax.Array,
    reduce: str,
    *,
    include_self: bool = True,
) -> jax.Array:
    places = _along(x, dim, index)
    source = _source(index, source, x.dtype)
    if reduce == "mean":
        ones = jnp.ones_like(source)
        count = jnp.full_like(x, 1 if include_self else 0).at[places].add(ones)
        start = x if include_self else jnp.zeros_like(x)
        total = start.at[places].add(source)
        touched = jnp.zeros(x.shape, bool).at[places].set(True)
        whole = jnp.floor_divide if jnp.issubdtype(x.dtype, jnp.integer) else jnp.true_divide
        return jnp.where(touched, whole(total, jnp.maximum(count, jnp.ones_like(count))), x)
    start = x
    if not include_self:
        info = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
        neutral = {
            "sum": 0,
            "prod": 1,
            "amax": info(x.dtype).min,
            "amin": info(x.dtype).max,
        }[reduce]
        start = x.at[places].set(jnp.asarray(neutral, x.dtype))
    where = start.at[places]
    if reduce == "prod":
        return _multiplied(start, places, source)
    return {"sum": where.add, "amax": where.max, "amin": where.min}[reduce](source)


@jax.custom_jvp
def _multiplied(x: jax.Array, places: tuple[jax.Array, ...], source: jax.Array) -> jax.Array:
    return x.at[places].multiply(source)


@_multiplied.defjvp
def _(
    values: tuple[jax.Array, tuple[jax.Array, ...], jax.Array],
    tangents: tuple[jax.Array, Any, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """JAX has this derivative for places that differ only."""
    (x, places, source), (by_x, _, by_source) = values, tangents
    some = lambda a: jnp.where(a == 0, jnp.ones_like(a), a)
    zero = lambda a: (a == 0).astype(jnp.int32)
    product = some(x).at[places].multiply(some(source))  # of those that are not zero
    zeros = zero(x).at[places].add(zero(source))

    def others(a: jax.Array, product: jax.Array, zeros: jax.Array) -> jax.Array:
        """Return the product of the other factors."""
        return jnp.where(zeros == zero(a), product / some(a), jnp.zeros_like(a))

    moved = by_x * others(x, product, zeros)
    moved = moved.at[places].add(by_source * others(source, product[places], zeros[places]))
    return _multiplied(x, places, source), moved


@operator("index_reduce")
def index_reduce(
    x: jax.Array,
    dim: int,
    index: jax.Array,
    source: jax.Array,
    reduce: str,
    *,
    include_self: bool = True,
) -> jax.Array:
    shape = [1] * x.ndim
    shape[dim] = -1
    places = jnp.broadcast_to(index.reshape(shape), source.shape)
    return scatter_reduce(x, dim, places, source, reduce, include_self=include_self)


@operator("put")
def put(x: jax.Array, index: jax.Array, source: jax.Array, accumulate: bool = False) -> jax.Array:
    where = x.ravel().at[index.ravel()]
    source = source.ravel()
    return (where.add(source) if accumulate else where.set(source)).reshape(x.shape)


@operator("diagonal_scatter")
def diagonal_scatter(
    x: jax.Array, source: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> jax.Array:
    moved = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
    n = counted(source.shape[-1])
    out = moved.at[..., n + max(0, -offset), n + max(0, offset)].set(source)
    return jnp.moveaxis(out, (-2, -1), (dim1, dim2))


@operator("index_add")
def index_add(
    x: jax.Array, dim: int, index: jax.Array, source: jax.Array, *, alpha: Scalar = 1
) -> jax.Array:
    source = cast(source, x.dtype) * cast(alpha, x.dtype)
    return x.at[(*[slice(None)] * (dim % x.ndim), index)].add(source)


@operator("index_copy")
def index_copy(x: jax.Array, dim: int, index: jax.Array, source: jax.Array) -> jax.Array:
    return x.at[(*[slice(None)] * (dim % x.ndim), index)].set(source)


@operator("index_fill")
def index_fill(x: jax.Array, dim: int, index: jax.Array, value: ArrayLike) -> jax.Array:
    return x.at[(*[slice(None)] * (dim % x.ndim), index)].set(cast(value, x.dtype))


@operator("select_scatter")
def select_scatter(x: jax.Array, source: jax.Array, dim: int, index: int) -> jax.Array:
    return x.at[chosen(x, dim, index)].set(source)


@operator("slice_scatter")
def slice_scatter(
    x: jax.Array,
    source: jax.Array,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> jax.Array:
    return x.at[sliced(x, dim, start, end, step)].set(source)


@operator("one_hot")
def one_hot(x: jax.Array, num_classes: int = -1) -> jax.Array:
    return F.one_hot(x, num_classes)


@operator("isin")
def isin(
    elements: ArrayLike,
    test_elements: ArrayLike,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> jax.Array:
    return jnp.isin(*promoted(elements, test_elements), invert=invert)  # type: ignore


@operator("searchsorted", "searchsorted.Tensor", "searchsorted.Scalar")
def searchsorted(
    ordered: jax.Array,
    x: ArrayLike,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: jax.Array | None = None,
) -> jax.Array:
    side = side or ("right" if right else "left")
    x = cast(x, ordered.dtype) if not is_array(x) else x
    if sorter is not None:
        ordered = jnp.take_along_axis(ordered, sorter, -1)
    if not isinstance(
        ordered.shape[-1] * x.size, int
    ):  # of sizes that have names: no loop of known length
        before = jnp.less if side == "left" else jnp.less_equal
        found = jnp.sum(before(ordered[..., None, :], x[..., None]), -1)
    elif ordered.ndim == 1:
        found = jnp.searchsorted(ordered, x, side)
    else:  # each row has its own
        find = functools.partial(jnp.searchsorted, side=side)
        rows = jax.vmap(find)(ordered.reshape(-1, ordered.shape[-1]), x.reshape(-1, x.shape[-1]))
        found = rows.reshape(x.shape)
    return cast(found, jnp.int32 if out_int32 else integer())


@operator("bucketize", "bucketize.Tensor", "bucketize.Scalar")
def bucketize(
    x: ArrayLike, ordered: jax.Array, *, out_int32: bool = False, right: bool = False
) -> jax.Array:
    return searchsorted(ordered, x, out_int32=out_int32, right=right)


@operator("masked_scatter")
def masked_scatter(x: jax.Array, mask: jax.Array, source: jax.Array) -> jax.Array:
    mask = jnp.broadcast_to(mask, x.shape)
    places = jnp.cumsum(mask.ravel()) - 1
    return jnp.where(mask, cast(source.ravel()[places].reshape(x.shape), x.dtype), x)
