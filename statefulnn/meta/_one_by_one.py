"""Tasks one after the other, in one compiled loop that takes the gradient of each task as it goes.

Side by side, tasks that adapt their kernels make convolutions with many kernels, which CPUs run badly, and
the numbers of all tasks are kept until the way back. A loop that is differentiated as a whole keeps them as
well. Here each turn of the loop runs a task and its gradient, so that only the gradients are kept.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from statefulnn.core.errors import NotDifferentiableError
from statefulnn.core.repeated import repeated


class _NoScalar(Exception):
    """The result of a task is not one number."""


class _Turn(threading.local):
    inside: bool = False


_turn = _Turn()


def in_turn() -> bool:
    """Say whether a task is traced that runs one after the other with its like."""
    return _turn.inside


def one_by_one(
    task: Callable, shared: Any, data: tuple, chunk: int | None, look: Callable | None
) -> tuple[Any, Any]:
    """Return the results of all tasks, and what each gave beside it.

    Args:
        task: ``task(shared, *one) -> (result, beside)``; no gradient goes through `beside`.
        shared: what all tasks share.
        data: what is one task's; each array has a leading task axis.
        chunk: how many tasks to run side by side in each turn, None for one.
        look: called as ``look(names, gradients, results)`` where gradients by `shared` are taken: the
            names of the arrays, the gradients of each task, and the results.
    """
    path_leaves, tree = jax.tree_util.tree_flatten_with_path(shared)
    names = [f"shared{jax.tree_util.keystr(path)}" for path, _ in path_leaves]
    own, (parts, tree_of_data) = [leaf for _, leaf in path_leaves], jax.tree_util.tree_flatten(data)

    def of_leaves(shared: Sequence[Any], one: Sequence[Any]) -> tuple[Any, Any]:
        before, _turn.inside = _turn.inside, True
        try:
            with repeated():
                return task(tree.unflatten(shared), *tree_of_data.unflatten(one))
        finally:
            _turn.inside = before

    # The task may close over what somebody differentiates by, a learning rate perhaps: that is shared too.
    converted, found = jax.closure_convert(of_leaves, own, [v[0] for v in parts])
    names += ["an array that the task closes over"] * len(found)

    def flat(shared: Sequence[Any], one: Sequence[Any]) -> tuple[Any, Any]:
        return converted([*shared[: len(own)]], [*one], *shared[len(own) :])

    @jax.custom_jvp
    def call(shared: list[Any], data: list[Any]) -> tuple[Any, Any]:
        return jax.lax.map(lambda one: flat(shared, one), data, batch_size=chunk)

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        # A number is linear in small changes with its gradient as the coefficients, whichever way JAX
        # goes from here.
        live = [[i for i, t in enumerate(ts) if not isinstance(t, SymbolicZero)] for ts in tangents]
        ways = [[ts[i] for i in at] for ts, at in zip(tangents, live, strict=True)]
        try:
            results, beside, slopes = _with_gradients(flat, primals, live, chunk)
        except (_NoScalar, NotDifferentiableError):  # forward mode may still be possible
            return _whole(flat, primals, live, ways, chunk)
        if look is not None and live[0]:
            look([names[i] for i in live[0]], slopes[0], results)
        changes = [jnp.tensordot(g, w, w.ndim) for g, w in zip(slopes[0], ways[0], strict=True)]
        for g, w in zip(slopes[1], ways[1], strict=True):
            changes.append((g * w).reshape(g.shape[0], -1).sum(1))
        change = functools.reduce(jnp.add, changes, jnp.zeros_like(results))
        return (results, beside), (change.astype(results.dtype), _no_change(beside))

    return call([*own, *found], parts)


def _with_gradients(
    flat: Callable, primals: tuple, live: list[list[int]], chunk: int | None
) -> tuple[Any, Any, Any]:
    """Return results, what is beside them, and the gradients by the live arrays, of each task."""
    shared, data = primals

    def one(own: list[Any]) -> tuple[Any, Any, Any]:
        def of_live(*chosen: list[Any]) -> tuple[Any, Any]:
            return flat(*(_put(*v) for v in zip((shared, own), live, chosen, strict=True)))

        chosen = ([v[i] for i in at] for v, at in zip((shared, own), live, strict=True))
        result, back, beside = jax.vjp(of_live, *chosen, has_aux=True)
        is_number = isinstance(result, jax.Array) and result.ndim == 0
        if not is_number or not jnp.issubdtype(result.dtype, jnp.floating):
            raise _NoScalar
        return result, beside, back(jnp.ones_like(result))

    return jax.lax.map(one, data, batch_size=chunk)


def _whole(
    flat: Callable, primals: tuple, live: list[list[int]], ways: list[list[Any]], chunk: int | None
) -> tuple[Any, Any]:
    """Differentiate the loop as a whole; each task runs again in the backward pass, to save memory."""
    shared, data = primals

    def of_live(own: list[Any], parts: list[Any]) -> tuple[Any, Any]:
        own, parts = _put(shared, live[0], own), _put(data, live[1], parts)
        one = jax.checkpoint(lambda one: flat(own, one), prevent_cse=False)
        return jax.lax.map(one, parts, batch_size=chunk)

    chosen = ([v[i] for i in at] for v, at in zip(primals, live, strict=True))
    results, changes, beside = jax.jvp(of_live, tuple(chosen), tuple(ways), has_aux=True)
    return (results, beside), (changes, _no_change(beside))


def _put(values: Sequence[Any], at: list[int], new: Sequence[Any]) -> list[Any]:
    values = list(values)
    for i, value in zip(at, new, strict=True):
        values[i] = value
    return values


def _no_change(tree: object) -> Any:
    def zero(v: jax.Array) -> Any:
        real = jnp.issubdtype(v.dtype, jnp.inexact)
        return jnp.zeros_like(v) if real else np.zeros(v.shape, jax.dtypes.float0)

    return jax.tree_util.tree_map(zero, tree)
