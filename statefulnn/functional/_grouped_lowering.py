"""How rows are multiplied by the matrices of their groups: the one place where that is chosen.

JAX's ``ragged_dot`` has no kernel on CPUs: there it multiplies every row by every matrix, with zeros for all
groups but one. It has no second derivative by the matrices, and takes no sizes that have names. Here each
group is cut into blocks of a fixed number of rows, and a loop multiplies one block after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from statefulnn.functional._conv_lowering import for_cpu

# How many rows a block has: the groups' mean, between these.
FEWEST, MOST = 16, 128
# The same where it is not known how many rows there are.
USUAL = 32


def rows_by_group(a: jax.Array, w: jax.Array, ends: jax.Array, transposed: bool = False) -> Any:
    """Multiply runs of rows by one matrix each.

    Args:
        a: ``(M, K)``.
        w: ``(G, K, N)``.
        ends: ``(G,)``, int32, increasing: where each run ends.
        transposed: whether `w` is best read as the transpose of ``(G, N, K)``, since that is what it was
            made from: then it is not copied.

    Returns:
        ``(M, N)``, with zeros past the last end.
    """
    if not for_cpu():
        return lax.ragged_dot(a, w, jnp.diff(ends, prepend=jnp.zeros(1, ends.dtype)))
    if 0 in (*a.shape, *w.shape):
        return jnp.zeros((a.shape[0], w.shape[2]), a.dtype)
    rows = a.shape[0]
    known = not jax.export.is_symbolic_dim(rows)
    size = _block_of(rows, w.shape[0]) if known else USUAL
    # A block has to fit; where nobody knows whether it does, more rows are put after the last.
    a = a if known else jnp.pad(a, ((0, size), (0, 0)))
    out = _by_blocks(a, w.swapaxes(1, 2) if transposed else w, ends, size, transposed)
    return out if known else out[:rows]


def _block_of(rows: int, groups: int) -> int:
    size = FEWEST
    while size < MOST and size * groups < rows:
        size *= 2
    return min(size, rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _by_blocks(a: jax.Array, w: jax.Array, ends: jax.Array, size: int, transposed: bool) -> Any:
    table, count = _blocks(a, w, ends, size)
    step = lambda i, out: _with_block(out, a, w, [x[i] for x in table], size, transposed)
    return lax.fori_loop(0, _largest(count), step, _empty(a, w, transposed))


# It is linear in the rows and linear in the matrices. The loop of a derivative has a fixed length, so that it
# can be run backwards.
@functools.partial(_by_blocks.defjvp, symbolic_zeros=True)
def _(size: int, transposed: bool, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    (a, w, ends), (da, dw, _) = primals, tangents
    terms = []
    if not isinstance(da, SymbolicZero):
        terms.append(_linear(da, w, ends, size, transposed))
    if not isinstance(dw, SymbolicZero):
        terms.append(_linear(a, dw, ends, size, transposed))
    out = _by_blocks(a, w, ends, size, transposed)
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


def _linear(a: jax.Array, w: jax.Array, ends: jax.Array, size: int, transposed: bool) -> Any:
    table, _ = _blocks(a, w, ends, size)

    # What a block reads is read again on the way back: a copy of a matrix for each block is large.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(out: jax.Array, a: jax.Array, w: jax.Array, block: Sequence[jax.Array]) -> Any:
        return _with_block(out, a, w, block, size, transposed)

    step = lambda out, block: (product(out, a, w, block), None)
    return lax.scan(step, _empty(a, w, transposed), table)[0]


def _empty(a: jax.Array, w: jax.Array, transposed: bool) -> Any:
    return jnp.zeros((a.shape[0], w.shape[1 if transposed else 2]), a.dtype)


def _blocks(
    a: jax.Array, w: jax.Array, ends: jax.Array, size: int
) -> tuple[tuple[Any, Any, Any], Any]:
    """Return for each block its group, its first row and the row that ends it, and how many there are."""
    rows, groups = a.shape[0], w.shape[0]
    ends = jnp.clip(ends, 0, rows)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    number = jnp.maximum(ends - starts + (size - 1), 0) // size
    before = jnp.cumsum(number, dtype=number.dtype)
    most = rows // size + groups
    most = most if jax.export.is_symbolic_dim(rows) else min(rows, most)
    at = jnp.arange(most, dtype=ends.dtype)
    group = jnp.searchsorted(before, at, side="right", method="compare_all")
    group = jnp.minimum(group, groups - 1)  # blocks past the last one begin behind its end
    first = starts[group] + (at - before[group] + number[group]) * size
    return (group, first, ends[group]), before[-1]


def _with_block(
    out: jax.Array,
    a: jax.Array,
    w: jax.Array,
    block: Sequence[jax.Array],
    size: int,
    transposed: bool,
) -> Any:
    """Put the product of one block into the output."""
    group, first, end = block
    at = jnp.minimum(first, a.shape[0] - size)
    place = at + jnp.arange(size, dtype=first.dtype)
    inside = ((place >= first) & (place < end))[:, None]
    # Rows of other groups are left out before the product too: its derivative has 0 * inf otherwise.
    rows = jnp.where(inside, lax.dynamic_slice_in_dim(a, at, size), 0)
    one = lax.dynamic_index_in_dim(w, group, keepdims=False)
    new = lax.dot_general(rows, one, (((1,), (1 if transposed else 0,)), ((), ())))
    old = lax.dynamic_slice_in_dim(out, at, size)
    return lax.dynamic_update_slice_in_dim(out, jnp.where(inside, new, old), at, 0)


@jax.custom_batching.custom_vmap
def _largest(count: jax.Array) -> Any:
    """Return a number that is the same in all lanes of ``jax.vmap``: a loop of so many steps is one loop."""
    return count


@_largest.def_vmap
def _(lanes: int, mapped: list[bool], count: jax.Array) -> tuple[Any, bool]:
    return _largest(jnp.max(count, 0)), False
