"""Many tasks at once: a function of one task becomes a function of a batch of tasks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import current_trace, kind, own_on_devices, trace_of
from statefulnn.core.errors import (
    DivergenceWarning,
    MissingRngError,
    ShapeError,
    UntrainedLeavesWarning,
    explain,
    user_stack_level,
)
from statefulnn.core.generator import as_key
from statefulnn.core.repeated import HasRepeatedForm, repeated, straight_code_only
from statefulnn.core.reports import finite, named_lanes, report_unless, warn
from statefulnn.core.tracebacks import shortened
from statefulnn.meta._cotangents import looked_at, results_counted, watched_task
from statefulnn.meta._one_by_one import one_by_one

RANDOMNESS = ("different", "same")
VECTORIZE = ("auto", "vmap", "loop")
NEVER = np.array(-1)  # the step in which a loss is no longer finite


@shortened
def over_tasks(
    one_task: Callable,
    *,
    reduce: str | None = "mean",
    has_aux: bool = False,
    randomness: str = "different",
    report: bool = True,
    vectorize: str | int = "auto",
) -> Callable:
    """Return a function that runs all tasks of a batch in one compiled computation.

    Over several devices, place the data with the task axis sharded
    (``jax.device_put(data, NamedSharding(mesh, P("tasks")))``) and compile: each device then adapts its
    own tasks.

    Args:
        one_task: ``one_task(shared, *data) -> result``: `shared` (the meta-parameters) is the same for all
            tasks, `data` is one task's. With random numbers it takes ``rng=`` as well.
        reduce: "mean" returns the mean of the results over tasks, None all of them.
        has_aux: whether `one_task` returns ``(result, aux)``; aux is returned for all tasks.
        randomness: "different" gives each task its own part of the key, so other dropout masks; "same"
            gives all tasks one key.
        report: whether to warn, naming the tasks, when a result is not finite, or a gradient by `shared`,
            which is named as well. In compiled code that costs about 0.1 ms a call on CPU; nothing
            inside `nn.meta.loop`.
        vectorize: "vmap" runs the tasks side by side; "loop" one after the other, and takes the gradient of
            each as it goes, which needs the memory of one task; a number runs that many side by side, in
            a loop. "auto" takes the loop for tasks that convolve, on a single CPU, and vmap otherwise.

    Returns:
        ``function(shared, *data, rng=None)``, where every array of `data` has a leading task axis; it
        returns the reduced result, with `has_aux` a pair of it and aux.

    Raises:
        ShapeError: if the data disagree about the number of tasks, or a mean is taken over none.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> loss = nn.meta.over_tasks(lambda w, x, y: ((w * x - y) ** 2).mean())
        >>> float(loss(2.0, jnp.ones((25, 10)), jnp.zeros((25, 10))))
        4.0
    """
    if reduce not in ("mean", None):
        raise ValueError(f"over_tasks: reduce must be 'mean' or None, got {reduce!r}")
    if randomness not in RANDOMNESS:
        raise ValueError(f"over_tasks: randomness must be one of {RANDOMNESS}, got {randomness!r}")

    if vectorize not in VECTORIZE and (not isinstance(vectorize, int) or vectorize < 1):
        raise ValueError(
            f"over_tasks: vectorize must be one of {VECTORIZE} or a number of tasks, got {vectorize!r}"
        )

    @shortened
    def function(shared: object, *data: Any, rng: object = None) -> Any:
        tasks = _count(data)
        if reduce == "mean" and not tasks:
            raise ShapeError(
                explain(
                    "over_tasks was given a batch of 0 tasks",
                    "the first axis of every array counts the tasks, and the mean over none is NaN",
                    "a batch with a task in it, or reduce=None, which returns empty arrays",
                )
            )
        key = None if rng is None else as_key(rng)
        if key is not None and randomness == "different":
            batch = _Batch(one_task, tasks, jax.random.split(key, tasks), None, data, report)
        else:
            batch = _Batch(one_task, tasks, None, key, data, report)
        results, losses, tally = batch.run(own_on_devices(shared, data), vectorize)
        if has_aux and (not isinstance(results, tuple) or len(results) != 2):
            raise TypeError(
                explain(
                    f"a task returned {type(results).__name__} to over_tasks(has_aux=True)",
                    "the result and the auxiliary output are needed",
                    "return a pair: return loss, aux",
                )
            )
        value, aux = results if has_aux else (results, None)
        _warn_of_unused(shared, value)
        if report and tasks:
            fine = finite(value, tasks)
            report_unless(fine.all(), say_which_diverged("task"), fine, _first_step(losses))
            value = results_counted(value, fine, tally)
        if reduce == "mean":
            value = jax.tree_util.tree_map(lambda v: v.mean(0), value)
        return (value, aux) if has_aux else value

    return function


def _warn_of_unused(shared: object, value: object) -> None:
    """Warn if somebody differentiates by the shared parameters and no task has used one."""
    traces = {id(trace_of(leaf)) for leaf in jax.tree_util.tree_leaves(shared)}
    trace = current_trace()
    if id(trace) not in traces or kind(trace) != "autodiff":
        return
    if not any(trace_of(leaf) is trace for leaf in jax.tree_util.tree_leaves(value)):
        warnings.warn(
            explain(
                "the result of over_tasks depends on none of the parameters it is differentiated by",
                "every gradient is zero: tasks may call the model, and not the function of its parameters",
                "fn, params = nn.functionalize(model), and fn(params, x) in the task",
            ),
            UntrainedLeavesWarning,
            stacklevel=user_stack_level(),
        )


class _Batch(NamedTuple):
    """The tasks of one call, and the ways to run them: each gives results, inner losses and a tally.

    Attributes:
        keys: a random key for each task, or None.
        key: one for all, or None.
    """

    one_task: Callable
    tasks: int
    keys: Any
    key: Any
    data: tuple
    report: bool

    def run(self, shared: Any, vectorize: str | int) -> tuple[Any, list[Any], Any]:
        if vectorize == "auto" and self.tasks and jax.device_count() == 1:
            try:
                # Stopped at the first convolution, which is early: hardly anything is traced twice.
                return self._side_by_side(shared, straight_code_only())
            except HasRepeatedForm:
                return self._in_a_loop(shared, None)
        if vectorize in ("auto", "vmap") or not self.tasks:
            return self._side_by_side(shared, repeated())
        return self._in_a_loop(shared, None if isinstance(vectorize, str) else vectorize)

    def _one(
        self, shared: object, tally: object, key: object, data: tuple
    ) -> tuple[Any, list[Any]]:
        key = self.key if key is None else key
        random = {} if key is None else {"rng": key}
        with watched_task(tally) as losses:
            result = self.one_task(shared, *data, **random)
        return result, losses if self.report else []

    def _side_by_side(self, shared: Any, context: Any) -> tuple[Any, list[Any], Any]:
        look = functools.partial(looked_at, shared, self.tasks, _say_which_gradients)
        own, tally = look() if self.report else (shared, None)
        with context:
            results, losses = jax.vmap(
                lambda tally, key, *data: self._one(own, tally, key, data),
                in_axes=tuple(None if v is None else 0 for v in (tally, self.keys, *self.data)),
            )(tally, self.keys, *self.data)
        return results, losses, tally

    def _in_a_loop(self, shared: object, chunk: int | None) -> tuple[Any, list[Any], Any]:
        def task(shared: object, key: object, *data: Any) -> tuple[Any, list[Any]]:
            return self._one(shared, None, key, data)

        def look(names: list[str], gradients: list[Any], results: Any) -> None:
            each = [jnp.isfinite(g).reshape(self.tasks, -1).all(1) for g in gradients]
            each = jnp.stack(each)  # (arrays, tasks)
            # Of a result that is not finite another warning tells.
            fine = each.all() | ~jnp.isfinite(results).all()
            say = functools.partial(_say_which_gradients, names)
            report_unless(fine, say, each.all(1), each.all(0))

        parts = (self.keys, *self.data)
        looking = look if self.report else None
        return *one_by_one(task, shared, parts, chunk, looking), None


def _count(data: tuple) -> int:
    shapes = [
        (f"argument {i + 1}{jax.tree_util.keystr(path)}", jnp.shape(leaf))
        for i, part in enumerate(data)
        for path, leaf in jax.tree_util.tree_leaves_with_path(part)
    ]
    sizes = {shape[:1] for _, shape in shapes}
    if len(sizes) == 1 and () not in sizes:
        return shapes[0][1][0]
    listed = ", ".join(f"{name} of shape {shape}" for name, shape in shapes) or "no data"
    raise ShapeError(
        explain(
            f"over_tasks was given {listed}",
            "the first axis of every array counts the tasks",
            "give all arrays the same number of tasks; what all tasks share goes into the first "
            "argument",
        )
    )


def say_which_diverged(noun: str) -> Callable[..., None]:
    """Return a function that warns, naming the lanes whose result is not finite.

    It takes the step of an inner loop in which the loss was the first time not finite, -1 if it always was.
    """

    def say(_: Any, fine: Any, step: Any = NEVER) -> None:
        known = step[step >= 0]
        since = f", nor is its inner loss from step {known.min()} on" if known.size else ""
        warn(
            explain(
                f"{named_lanes(fine, noun)} diverged: the result is not finite{since}",
                "an inner loop left the region where its steps descend, or the data are not finite",
                "a smaller inner learning rate, fewer steps, or clipped inner gradients",
            ),
            DivergenceWarning,
        )

    return say


def _first_step(losses: list[Any]) -> Any:
    """Return the first step in which the loss of a task, ``(tasks, steps)``, is not finite, or -1."""
    first = jnp.full((), jnp.iinfo(jnp.int32).max)
    for each in losses:
        fine = jnp.isfinite(each).all(0)
        first = jnp.minimum(first, jnp.where(fine.all(), first, fine.argmin().astype(jnp.int32)))
    return jnp.where(first == jnp.iinfo(jnp.int32).max, -1, first)


def _say_which_gradients(names: list[str], fine: Any, each: Any, own: Any) -> None:
    bad = np.flatnonzero(~each.reshape(-1, len(names)).all(0))
    shown = ", ".join(names[i] for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
    # Side by side, what all tasks share has one gradient, their sum; a copy of it for each task would tell
    # which, and makes the tasks up to four times slower. `adapt` looks at what each task has of its own.
    unknown = own.all()
    tasks = f"one of {own.shape[-1]} tasks" if unknown else named_lanes(own, "task")
    which = "over_tasks(..., vectorize='loop') once, to be told which task; " if unknown else ""
    warn(
        explain(
            f"{tasks} diverged: the gradient by {shown} is not finite",
            "a step on the way has no finite derivative, such as a square root at zero (Adam without "
            "eps_root where a gradient is zero), or the inner loop overflowed",
            f"{which}nn.meta.adam or optax.adam(..., eps_root=1e-8) inside; first_order=True; a smaller "
            "inner learning rate, or fewer steps",
        ),
        DivergenceWarning,
    )


def require_rng(rng: Any, function: str) -> Any:
    """Return a key, or raise if there is none."""
    if rng is None:
        raise MissingRngError(
            explain(
                f"called {function} without a random key",
                "its result is a random estimate",
                f"{function}(..., key=jax.random.key(0)), another key at each call",
            )
        )
    return as_key(rng)
