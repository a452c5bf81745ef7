"""Shapes: views, joining, padding, and writing through a view."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.bridge.torch.operators._promotion import counted, dtype_of, promoted, result_type
from statefulnn.bridge.torch.operators._table import OPERATORS, operator
from statefulnn.bridge.torch.structures import minimum

if TYPE_CHECKING:
    from statefulnn.bridge.torch.operators._table import Axes, Size

_ENDLESS = 2**31 - 1


@operator("getitem")
def getitem(x: Any, index: int) -> Any:
    return x[index]


@operator("view.dtype")
def view_dtype(x: jax.Array, dtype: str) -> jax.Array:
    new = dtype_of(dtype)
    ratio = new.itemsize // x.dtype.itemsize
    if ratio > 1:  # the last axis has the parts of each number
        x = x.reshape(*x.shape[:-1], x.shape[-1] // ratio, ratio)
    out = jax.lax.bitcast_convert_type(x, new)
    return out.reshape(*x.shape[:-1], -1) if out.ndim > x.ndim else out


@operator("view", "reshape", "_unsafe_view")
def reshape(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jnp.reshape(x, tuple(shape))


@operator("view_as", "reshape_as")
def reshape_as(x: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.reshape(x, other.shape)


@operator("flatten")
def flatten(x: jax.Array, start_dim: int = 0, end_dim: int = -1) -> jax.Array:
    if not x.ndim:
        return x.reshape(1)
    first, last = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])


@operator("unflatten")
def unflatten(x: jax.Array, dim: int, sizes: Sequence[int]) -> jax.Array:
    dim %= x.ndim
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes = [x.shape[dim] // known if s == -1 else s for s in sizes]
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@operator("permute")
def permute(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.transpose(x, dims)


@operator("transpose", "swapaxes", "swapdims")
def transpose(x: jax.Array, dim0: int, dim1: int) -> jax.Array:
    return x if not x.ndim else jnp.swapaxes(x, dim0, dim1)


@operator("t")
def t(x: jax.Array) -> jax.Array:
    return x.T


@operator("numpy_T", "mT", "matrix_H", "adjoint", "mH")
def matrix_transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


OPERATORS["numpy_T"] = t
OPERATORS["adjoint"] = OPERATORS["mH"] = OPERATORS["matrix_H"] = lambda x: jnp.conj(
    matrix_transpose(x)
)


@operator("movedim", "moveaxis")
def movedim(x: jax.Array, source: Size, destination: Size) -> jax.Array:
    return jnp.moveaxis(x, source, destination)


@operator("unsqueeze")
def unsqueeze(x: jax.Array, dim: int) -> jax.Array:
    return jnp.expand_dims(x, dim)


@operator("squeeze")
def squeeze(x: jax.Array, dim: Axes = None) -> jax.Array:
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    if not x.ndim:
        return x
    return jnp.squeeze(x, tuple({d % x.ndim for d in dims if x.shape[d] == 1}))


@operator("expand")
def expand(x: jax.Array, size: Sequence[int], *, implicit: bool = False) -> jax.Array:
    front = len(size) - x.ndim
    shape = [x.shape[i - front] if s == -1 else s for i, s in enumerate(size)]
    return jnp.broadcast_to(x, shape)


@operator("expand_as")
def expand_as(x: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, other.shape)


@operator("broadcast_to")
def broadcast_to(x: jax.Array, size: Sequence[int]) -> jax.Array:
    return expand(x, size)


@operator("broadcast_tensors")
def broadcast_tensors(tensors: Sequence[jax.Array]) -> Sequence[jax.Array]:
    return jnp.broadcast_arrays(*tensors)


@operator("slice", "slice_copy")
def slice_(
    x: jax.Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> jax.Array:
    return x[sliced(x, dim, start, end, step)]


def sliced(
    x: jax.Array, dim: int, start: int | None, end: int | None, step: int
) -> tuple[slice, ...]:
    """Return the index of a slice; an end beyond all integers of JAX's is none."""
    end = None if isinstance(end, int) and end >= _ENDLESS else end
    return (*[slice(None)] * (dim % x.ndim), slice(start, end, step))


def chosen(x: jax.Array, dim: int, index: int) -> tuple[Any, ...]:
    """Return the index of one place along an axis, which may be a size that has a name."""
    place = index if isinstance(index, int) else jnp.asarray(index)
    return (*[slice(None)] * (dim % x.ndim), place)


@operator("select")
def select(x: jax.Array, dim: int, index: int) -> jax.Array:
    return x[chosen(x, dim, index)]


@operator("narrow")
def narrow(x: jax.Array, dim: int, start: int, length: int) -> jax.Array:
    start = start % x.shape[dim] if start < 0 else start
    return slice_(x, dim, start, start + length)


@operator("split")
def split(x: jax.Array, size: int, dim: int = 0) -> list[jax.Array] | _Pieces:
    if isinstance(size, (list, tuple)):
        return split_with_sizes(x, size, dim)
    length = x.shape[dim]
    if not isinstance(length, int) or not isinstance(size, int):
        return _Pieces(lambda i: slice_(x, dim, i * size, minimum((i + 1) * size, length)))
    if not length:
        return [x]
    return [slice_(x, dim, i, i + size) for i in range(0, length, size)]


class _Pieces:
    """Parts of an array along an axis whose size has a name: there is no telling how many."""

    def __init__(self, part: Callable[[int], jax.Array]) -> None:
        self.part = part

    def __getitem__(self, i: int) -> jax.Array:
        return self.part(i)


@operator("split_with_sizes", "split.sizes")
def split_with_sizes(x: jax.Array, sizes: Sequence[int], dim: int = 0) -> list[jax.Array]:
    ends = itertools.accumulate(sizes)
    return [slice_(x, dim, e - n, e) for e, n in zip(ends, sizes, strict=True)]


@operator("tensor_split")
def tensor_split(x: jax.Array, sections: Size, dim: int = 0) -> list[jax.Array]:
    return jnp.array_split(x, sections, dim)


@operator("chunk")
def chunk(x: jax.Array, chunks: int, dim: int = 0) -> list[jax.Array] | _Pieces:
    size = -(-x.shape[dim] // chunks)
    return split(x, max(1, size) if isinstance(size, int) else size, dim)


@operator("unsafe_chunk")
def unsafe_chunk(x: jax.Array, chunks: int, dim: int = 0) -> list[jax.Array] | _Pieces:
    return chunk(x, chunks, dim)


@operator("unbind")
def unbind(x: jax.Array, dim: int = 0) -> list[jax.Array] | _Pieces:
    parts = _Pieces(lambda i: select(x, dim, i))
    return [parts[i] for i in range(x.shape[dim])] if isinstance(x.shape[dim], int) else parts


@operator("diagonal")
def diagonal(x: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> jax.Array:
    return jnp.diagonal(x, offset, dim1, dim2)


@operator("unfold")
def unfold(x: jax.Array, dimension: int, size: int, step: int) -> jax.Array:
    dim = dimension % x.ndim
    starts = step * counted((x.shape[dim] - size) // step + 1)
    windows = jnp.take(x, jnp.asarray(starts[:, None] + counted(size)), dim)
    return jnp.moveaxis(windows, dim + 1, -1)


@operator("as_strided")
def as_strided(
    x: jax.Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> jax.Array:
    places: Any = storage_offset or 0
    for axis, (n, step) in enumerate(zip(size, stride, strict=True)):
        places = places + (counted(n) * step).reshape(
            [n if a == axis else 1 for a in range(len(size))]
        )
    return x.ravel()[jnp.asarray(places)]


# How to write through views that show other numbers than there are: from those before and the new ones.
_OTHER_NUMBERS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "real": lambda before, new: jax.lax.complex(new, before.imag),
    "imag": lambda before, new: jax.lax.complex(before.real, new),
    "view_as_real": lambda _, new: jax.lax.complex(new[..., 0], new[..., 1]),
    "view_as_complex": lambda _, new: jnp.stack([new.real, new.imag], -1),
    "view.dtype": lambda before, new: view_dtype(new, str(before.dtype)),
    "_conj": lambda _, new: jnp.conj(new),
    "_neg_view": lambda _, new: -new,
}
# The defaults of `slice_`.
_WHOLE: tuple[Any, ...] = (0, None, None, 1)


@operator("put_view")
def put_view(
    before: jax.Array,
    new: jax.Array,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    index: int | None,
) -> jax.Array:
    """Return `before` with `new` where the view operator takes its elements from."""
    if name in _OTHER_NUMBERS:
        if name == "real" and not jnp.iscomplexobj(before):
            return new
        return _OTHER_NUMBERS[name](before, new)
    if name == "slice" and index is None:
        return before.at[sliced(before, *args, *_WHOLE[len(args) :])].set(new)
    if name == "select":
        return before.at[chosen(before, *args)].set(new)
    if not isinstance(before.size, int):
        numbers = jnp.arange(before.size).reshape(before.shape)
        places = OPERATORS[name](numbers, *args, **kwargs)
        places = places if index is None else places[index]
        return before.ravel().at[places.ravel()].set(new.ravel()).reshape(before.shape)
    with jax.ensure_compile_time_eval():  # which elements these are is known
        numbers = jnp.arange(before.size, dtype=jnp.int32).reshape(before.shape)
        places = OPERATORS[name](numbers, *args, **kwargs)
        places = np.asarray(places if index is None else places[index]).ravel()
    if len(places) == before.size and (places == np.arange(before.size)).all():
        return new.reshape(before.shape)
    return before.ravel().at[places].set(new.ravel()).reshape(before.shape)


# --------------------------------------------------------------------------------------------------
# Joining and moving


def _joinable(tensors: Sequence[jax.Array]) -> list[jax.Array]:
    return promoted(*tensors)


@operator("cat", "concat", "concatenate")
def cat(tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    # torch leaves out empty tensors of one axis, whatever the others look like.
    kept = [x for x in tensors if x.shape != (0,)] or list(tensors)
    dtype = result_type(*tensors)
    return jnp.concatenate([x.astype(dtype) for x in kept], dim)


@operator("stack")
def stack(tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    return jnp.stack(_joinable(tensors), dim)


@operator("hstack")
def hstack(tensors: Sequence[jax.Array]) -> jax.Array:
    return jnp.hstack(_joinable(tensors))


@operator("vstack")
def vstack(tensors: Sequence[jax.Array]) -> jax.Array:
    return jnp.vstack(_joinable(tensors))


@operator("flip")
def flip(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.flip(x, tuple(dims))


@operator("roll")
def roll(x: jax.Array, shifts: Size, dims: Size = ()) -> jax.Array:
    if isinstance(dims, (list, tuple)) and not dims:
        shift = shifts[0] if isinstance(shifts, (list, tuple)) else shifts
        return jnp.roll(x, shift)
    return jnp.roll(x, shifts, dims)


@operator("repeat")
def repeat(x: jax.Array, repeats: Sequence[int]) -> jax.Array:
    return jnp.tile(x, tuple(repeats))


@operator("tile")
def tile(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.tile(x, tuple(dims))


@operator("repeat_interleave.self_int")
def repeat_interleave(
    x: jax.Array, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> jax.Array:
    return jnp.repeat(x, repeats, dim)


@operator("rot90")
def rot90(x: jax.Array, k: int = 1, dims: Sequence[int] = (0, 1)) -> jax.Array:
    return jnp.rot90(x, k, (dims[0], dims[1]))


@operator("meshgrid", "meshgrid.indexing")
def meshgrid(tensors: Sequence[jax.Array], *, indexing: str = "ij") -> list[jax.Array]:
    return jnp.meshgrid(*tensors, indexing=indexing)


@operator("tril")
def tril(x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.tril(x, diagonal)


@operator("triu")
def triu(x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.triu(x, diagonal)
