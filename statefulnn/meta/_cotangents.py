"""Looking at gradients on their way back, and which tasks they come from.

What all tasks share has one gradient, the sum over them. So the tasks are told apart further inside, where
the numbers of a task are its own: each place that looks has a way back to a tally, a number for each task,
whose "gradient" counts what was not finite.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from statefulnn.core.box import Box
from statefulnn.core.compat import Tracer, current_trace
from statefulnn.core.module import Module
from statefulnn.core.reports import report_unless, staging


class _Task(threading.local):
    tally: Any = None  # of the task that is traced, a scalar; None if nobody looks
    trace: Any = None
    losses: Any = None  # of the inner loops, each an array (steps,)


_task = _Task()


@contextlib.contextmanager
def watched_task(tally: Any) -> Iterator[list[Any]]:
    """While a task is traced: give the losses of its inner loops, as far as they belong to its trace."""
    before = _task.tally, _task.trace, _task.losses
    losses: list[Any] = []
    _task.tally, _task.trace, _task.losses = tally, current_trace(), losses
    try:
        yield losses
    finally:
        _task.tally, _task.trace, _task.losses = before


def note_losses(losses: Any) -> None:
    """Note the losses of an inner loop, if it belongs to the trace of a task."""
    if _task.losses is not None and _task.trace is current_trace():
        _task.losses.append(losses)


def counted(values: Any) -> Any:
    """Return values of a task whose gradients are counted if they are not finite."""
    if _task.tally is None:
        return values

    def back(_: Callable, cotangents: tuple) -> tuple:
        own, tally = cotangents
        fine = [jnp.isfinite(c).all() for c in jax.tree_util.tree_leaves(own)]
        return own, tally + (~jnp.stack(fine).all()).astype(tally.dtype)

    return (
        _identity((values, _task.tally), back)[0] if jax.tree_util.tree_leaves(values) else values
    )


def results_counted(results: Any, fine: Any, tally: Any) -> Any:
    """Return the results of all tasks; where one is not finite, that is told, and no gradient is."""
    if tally is None:
        return results
    fine = jax.lax.stop_gradient(fine)

    def back(_: Callable, cotangents: tuple) -> tuple:
        own, tally = cotangents
        return own, jnp.where(fine, tally, jnp.nan)

    return _of_numbers(results, lambda values: _identity((values, tally), back)[0])


def not_backwards(values: Any, refuse: Callable[[], NoReturn]) -> Any:
    """Return values through which reverse mode does not go: there ``refuse()`` raises, in any transform."""

    def asked(*_: Any, **__: Any) -> NoReturn:
        # What to keep for the way back JAX asks where there will be one, and only there.
        refuse()

    @functools.partial(jax.checkpoint, policy=asked)
    def same(numbers: list[Any]) -> list[Any]:
        # The derivative needs what was compared, which could be kept.
        return [jnp.where(v == v, v, v) for v in numbers]

    return _of_numbers(values, same)


def _of_numbers(tree: object, change: Callable[[list[Any]], list[Any]]) -> Any:
    """Return a tree of which the arrays that have derivatives are changed."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    at = [i for i, v in enumerate(leaves) if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]
    if at:
        for i, value in zip(at, change([leaves[i] for i in at]), strict=True):
            leaves[i] = value
    return treedef.unflatten(leaves)


def looked_at(shared: Any, tasks: int, say: Callable[..., None]) -> tuple[Any, Any]:
    """Return what tasks share, and the tally of each task, ``(tasks,)``, or None.

    Where a gradient by it is not finite, ``say(names, fine, each, tasks)`` is called on the host: the names
    of the arrays that are differentiated, whether all their gradients are finite, whether each is, and the
    tasks whose own were, as far as somebody looked.
    """
    whole = (Module, Box)
    flat, treedef = jax.tree_util.tree_flatten_with_path(shared, lambda x: isinstance(x, whole))
    names = [f"shared{jax.tree_util.keystr(path)}" for path, _ in flat]
    leaves = [leaf for _, leaf in flat]
    # Without a tracer nothing is differentiated; and a module is more than its arrays.
    if not any(isinstance(v, Tracer) for v in leaves) or any(isinstance(v, whole) for v in leaves):
        return shared, None
    numbers = [i for i, v in enumerate(leaves) if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]
    same = _looking([names[i] for i in numbers], tasks, say)
    *values, tally = same(*(leaves[i] for i in numbers))
    for i, value in zip(numbers, values, strict=True):
        leaves[i] = value
    return treedef.unflatten(leaves), tally


def _looking(names: list[str], tasks: int, say: Callable[..., None]) -> Callable:
    @jax.custom_jvp
    def same(*values: Any) -> tuple:
        # Made like a value, it is each device's own where these are.
        like = values[0] if values else jnp.float32(0)
        return (*values, jnp.zeros_like(like, jnp.float32, (tasks,)))

    @functools.partial(same.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
        # What is not differentiated has no gradient that could be looked at.
        live = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]
        out = same(*primals)
        ways = [*tangents, jnp.zeros_like(out[-1])]
        if live:
            *seen, ways[-1] = _identity(
                [ways[i] for i in (*live, -1)], look([names[i] for i in live])
            )
            for i, way in zip(live, seen, strict=True):
                ways[i] = way
        return out, tuple(ways)

    def look(names: list[str]) -> Callable:
        def back(_: Callable, cotangents: list[Any]) -> list[Any]:
            *own, tally = cotangents
            each = jnp.stack([jnp.isfinite(c).all() for c in own])
            fine = each.all() | jnp.isnan(tally).any()
            report_unless(fine, functools.partial(say, names), each, tally == 0)
            return cotangents

        return back

    return same


def _identity(values: object, back: Callable) -> Any:
    # As a linear system it has derivatives of all orders, in both modes, and a way back of its own.
    with staging():
        return _together(
            jax.lax.custom_linear_solve(
                lambda v: v, _together(values), lambda _, b: b, transpose_solve=back
            )
        )


def _together(values: object) -> Any:
    """Return values that depend on each other: JAX goes back by all of them or by none."""
    nothing = sum(
        v.ravel()[:0].sum().astype(jnp.float32) for v in jax.tree_util.tree_leaves(values)
    )
    return jax.tree_util.tree_map(lambda v: v + jnp.asarray(nothing, v.dtype), values)
