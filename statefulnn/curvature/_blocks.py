"""Work on a batch in blocks of examples, so that only one block's intermediate arrays are in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.transforms.types import PyTree


def length(arrays: PyTree) -> int:
    """Return the number of examples, the length of the first axes."""
    return jax.tree.leaves(arrays)[0].shape[0]


def in_blocks(arrays: PyTree, size: int) -> tuple[Any, Any]:
    """Return full blocks ``(n, size, ...)``, and the examples left over or None."""
    n = length(arrays)
    full = n // size
    blocks = jax.tree.map(lambda a: a[: full * size].reshape(full, size, *a.shape[1:]), arrays)
    rest = jax.tree.map(lambda a: a[full * size :], arrays) if n % size else None
    return blocks, rest


def map_blocks(function: Callable, arrays: PyTree, size: int | None) -> Any:
    """Return ``function(block) -> (size, ...)`` of all blocks, put together again."""
    if size is None or size >= length(arrays):
        return function(arrays)
    blocks, rest = in_blocks(arrays, size)
    done = jax.lax.map(function, blocks)
    done = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), done)
    if rest is None:
        return done
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), done, function(rest))


def sum_blocks(function: Callable, arrays: PyTree, size: int) -> Any:
    """Return the sum of ``function(block)`` over all blocks.

    Of what `map_blocks` has read in blocks of this size, nothing is copied: both loops read the same arrays.
    """
    if size >= length(arrays):
        return function(arrays)
    blocks, rest = in_blocks(arrays, size)
    add = lambda one, two: jax.tree.map(jnp.add, one, two)
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], blocks))
    step = lambda total, block: (add(total, function(block)), None)
    total, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, shapes), blocks)
    return total if rest is None else add(total, function(rest))


def fold_blocks(
    function: Callable, combine: Callable, arrays: PyTree, size: int | None
) -> tuple[Any, Any]:
    """Combine ``function(block) -> (summary, per_example)`` over the blocks.

    Args:
        function: of a block of examples; `per_example` has a leading axis of examples.
        combine: ``(summary, summary) -> summary``.
        arrays: the examples.
        size: how many examples a block has, or None for all.

    Returns:
        the combined summary, and `per_example` of all examples.
    """
    if size is None or size >= length(arrays):
        return function(arrays)
    blocks, rest = in_blocks(arrays, size)
    total, first = function(jax.tree.map(lambda a: a[0], blocks))

    def step(total: PyTree, block: PyTree) -> tuple[Any, Any]:
        summary, each = function(block)
        return combine(total, summary), each

    total, others = jax.lax.scan(step, total, jax.tree.map(lambda a: a[1:], blocks))
    each = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b.reshape(-1, *b.shape[2:])]), first, others
    )
    if rest is not None:
        summary, last = function(rest)
        total = combine(total, summary)
        each = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), each, last)
    return total, each
