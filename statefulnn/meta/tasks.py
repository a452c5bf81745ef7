"""Many tasks at once: a function of one task becomes a function of a batch of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import DivergenceWarning, MissingRngError, ShapeError, explain
from statefulnn.core.generator import as_key
from statefulnn.meta._report import finite, named_lanes, report_unless, warn

RANDOMNESS = ("different", "same")


def over_tasks(
    one_task: Callable,
    *,
    reduce: str | None = "mean",
    has_aux: bool = False,
    randomness: str = "different",
    report: bool = True,
) -> Callable:
    """Return a function that runs all tasks of a batch in one vectorised computation.

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
        report: whether to warn, naming the tasks, when a result is not finite. In compiled code that
            costs about 0.1 ms a call on CPU; nothing inside `nn.meta.loop`.

    Returns:
        ``function(shared, *data, rng=None)``, where every array of `data` has a leading task axis; it
        returns the reduced result, with `has_aux` a pair of it and aux.

    Raises:
        ShapeError: if the data disagree about the number of tasks.

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

    def function(shared: Any, *data: Any, rng: Any = None) -> Any:
        tasks = _count(data)
        if rng is None:
            results = jax.vmap(lambda *data: one_task(shared, *data))(*data)
        else:
            key = as_key(rng)
            keys = jax.random.split(key, tasks) if randomness == "different" else key
            results = jax.vmap(
                lambda key, *data: one_task(shared, *data, rng=key),
                in_axes=(0 if randomness == "different" else None, *(0 for _ in data)),
            )(keys, *data)
        if has_aux and (not isinstance(results, tuple) or len(results) != 2):
            raise TypeError(
                explain(
                    f"a task returned {type(results).__name__} to over_tasks(has_aux=True)",
                    "the result and the auxiliary output are needed",
                    "return a pair: return loss, aux",
                )
            )
        value, aux = results if has_aux else (results, None)
        if report and tasks:
            fine = finite(value, tasks)
            report_unless(fine.all(), say_which_diverged("task"), fine)
        if reduce == "mean":
            value = jax.tree_util.tree_map(lambda v: v.mean(0), value)
        return (value, aux) if has_aux else value

    return function


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
    """Return a function that warns, naming the lanes whose result is not finite."""

    def say(_: Any, fine: Any) -> None:
        warn(
            explain(
                f"{named_lanes(fine, noun)} diverged: the result is not finite",
                "an inner loop left the region where its steps descend, or the data are not finite",
                "a smaller inner learning rate, fewer steps, or clipped inner gradients",
            ),
            DivergenceWarning,
        )

    return say


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
