"""Data as stacks of equal batches, over which a scan runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import ShapeError, explain
from statefulnn.curvature._blocks import in_blocks, length
from statefulnn.curvature._models import (
    at_least_one,
    check_batch_size,
    inputs_of,
    number_of_examples,
    wide,
)
from statefulnn.transforms.types import PyTree

# Each a tree of arrays (batches, examples, ...).
Stacks = tuple[Any, ...]


def stacked(data: PyTree, batch_size: int | None, targets: bool, function: str) -> Stacks:
    """Return data as stacks of batches ``(inputs, targets)``; consecutive equal ones are one stack.

    Args:
        data: one batch, an array or a tuple; or a list or another iterable of batches.
        batch_size: how many examples the batches get; None leaves them as they are.
        targets: whether a batch is a pair of inputs and targets, and not inputs alone.
        function: for messages.
    """
    check_batch_size(batch_size, function)
    whole = hasattr(data, "shape") or isinstance(data, (tuple, Mapping))
    batches = [_batch(b, targets, function) for b in ([data] if whole else data)]
    if not batches:
        raise ShapeError(
            explain(
                f"{function} was given no batches",
                "there is nothing to compute it from",
                "pass at least one: a tuple (x, y), or a list of these; an iterator may be used up",
            )
        )
    stacks: list[list[Any]] = []
    for batch in batches:
        n = number_of_examples(batch, function)
        at_least_one(n, function)
        blocks, rest = in_blocks(batch, min(n, batch_size or n))
        for one in (blocks, *([] if rest is None else [jax.tree.map(lambda a: a[None], rest)])):
            if stacks and _kind(stacks[-1][0]) == _kind(one):
                stacks[-1].append(one)
            else:
                stacks.append([one])
    return tuple(
        s[0] if len(s) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *s)
        for s in stacks
    )


def _batch(batch: Any, targets: bool, function: str) -> Any:
    if targets and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        what = f"{type(batch).__name__}"
        what += f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ShapeError(
            explain(
                f"{function} was given a batch that is a {what}",
                "a batch is a pair of inputs and targets, for loss(model(inputs), targets)",
                "pass (x, y), ((x1, x2), y) for a model of two inputs, or a list of such pairs",
            )
        )
    inputs, y = batch if targets else (batch, None)
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    return jax.tree.map(jnp.asarray, (inputs_of(inputs), y))


def _kind(stack: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(stack)
    return treedef, [(a.shape[1:], a.dtype) for a in leaves]


def examples_in(stack: PyTree) -> int:
    """Return the number of examples of each batch of a stack."""
    return jax.tree.leaves(stack)[0].shape[1]


def number_of(stacks: Stacks) -> int:
    """Return the number of all examples."""
    return sum(length(s) * examples_in(s) for s in stacks)


def joined(stacks: Stacks) -> Any:
    """Return all examples, (N, ...); they have one shape."""
    rows = lambda a: a.reshape(-1, *a.shape[2:])
    return jax.tree.map(lambda *parts: jnp.concatenate([rows(a) for a in parts]), *stacks)


def summed(function: Callable, stacks: Stacks, mean: bool) -> Any:
    """Return the sum over the batches of a tree, or their mean, weighted by their examples.

    Sums are taken in float32 at least.

    Args:
        function: of a batch, and of a part of `stacks` that belongs to it.
        stacks: arrays ``(batches, examples, ...)``.
        mean: whether what the function returns is an average over the examples of its batch.
    """
    total: Any = None

    def widened(batch: PyTree) -> Any:
        return jax.tree.map(lambda a: a.astype(wide(a.dtype)), function(batch))

    for stack in stacks:
        weight = examples_in(stack) / number_of(stacks) if mean else 1.0
        part = _sum(widened, stack)
        part = jax.tree.map(lambda a, w=weight: w * a, part)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def _sum(function: Callable, stack: PyTree) -> Any:
    first = jax.tree.map(lambda a: a[0], stack)
    if length(stack) == 1:
        return function(first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, first))

    def step(total: PyTree, batch: PyTree) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(batch)), None

    return jax.lax.scan(step, zeros, stack)[0]


def mapped(function: Callable, stacks: Stacks) -> Any:
    """Return what a function gives for each example, ``(N, ...)``, batch by batch."""

    def of_stack(stack: PyTree) -> Any:
        if length(stack) == 1:
            return function(jax.tree.map(lambda a: a[0], stack))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), jax.lax.map(function, stack))

    return jax.tree.map(lambda *a: jnp.concatenate(a), *map(of_stack, stacks))


def like_stacks(array: jax.Array, stacks: Stacks) -> list[Any]:
    """Cut an array ``(N, ...)`` into the batches of stacks."""
    parts, start = [], 0
    for stack in stacks:
        shape = (length(stack), examples_in(stack))
        stop = start + shape[0] * shape[1]
        parts.append(array[start:stop].reshape(*shape, *array.shape[1:]))
        start = stop
    return parts
