"""The outer loop: many meta-steps in few compiled calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import DivergenceWarning, ShapeError, explain
from statefulnn.core.extras import import_extra
from statefulnn.core.failures import typed_failures
from statefulnn.core.repeated import body_of_loop
from statefulnn.core.reports import said_once, warn
from statefulnn.core.tracebacks import shortened
from statefulnn.meta._arrays import strong_arrays

Carry = TypeVar("Carry")


@shortened
def loop(
    step: Callable,
    init: Carry,
    xs: object = None,
    length: int | None = None,
    *,
    chunk: int = 100,
    progress: str | bool = False,
    on_chunk: Callable | None = None,
    report: bool = True,
) -> tuple[Carry, Any]:
    """Run ``carry, out = step(carry, x)`` many times, as ``jax.lax.scan``, in compiled chunks.

    One call of compiled code does `chunk` steps. Between calls the results come to the host: for a
    progress bar, for `on_chunk`, and to notice numbers that are no longer finite. Each call of `loop`
    compiles `step` (twice, if `chunk` does not divide the number of steps).

    Args:
        step: a pure function of the carry (parameters, optimizer slots) and one row of `xs`.
        init: the first carry, a pytree of arrays.
        xs: arrays with a leading axis of steps, such as ``jax.random.split(key, steps)``.
        length: the number of steps, if there are no `xs`.
        chunk: how many steps one compiled call does.
        progress: a label for a progress bar (needs tqdm, the extra ``examples``); False for none.
        on_chunk: is called as ``on_chunk(carry, outs, steps_done)`` after each chunk; if it returns True
            the loop stops.
        report: whether to warn when a carry is no longer finite.

    Returns:
        ``(carry, outs)``; `outs` as numpy arrays with a leading axis of steps.

    Raises:
        ShapeError: if `xs` and `length` disagree.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> halve = lambda carry, x: (carry / 2, carry)
        >>> carry, outs = nn.meta.loop(halve, jnp.asarray(8.0), length=3)
        >>> float(carry), outs.tolist()
        (1.0, [8.0, 4.0, 2.0])
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"loop: chunk must be a positive integer, got {chunk!r}")
    steps, step = _length(xs, length), body_of_loop(step)

    @functools.partial(jax.jit, static_argnums=2)
    def many(carry: Any, xs: Any, count: int) -> tuple[Any, Any, Any]:
        carry, outs = jax.lax.scan(step, carry, xs, length=count)
        fine = [jnp.isfinite(v).all() for v in jax.tree_util.tree_leaves(carry) if _real(v)]
        return carry, outs, fine

    carry = strong_arrays(init)
    parts, told, said = [], not report, set()
    with _bar(steps, progress) as advance:
        for start in range(0, steps, chunk):
            stop = min(start + chunk, steps)
            part = jax.tree_util.tree_map(lambda v: v[start:stop], xs)  # noqa: B023
            with typed_failures(), said_once(said):
                carry, outs, fine = jax.block_until_ready(many(carry, part, stop - start))
            parts.append(jax.tree_util.tree_map(np.asarray, outs))
            advance(stop - start, parts[-1])
            if not told and not all(map(bool, fine)):
                told = True
                _say_diverged(carry, start, stop)
            if on_chunk is not None and on_chunk(carry, parts[-1], stop):
                break
    if not parts:
        shapes = jax.eval_shape(lambda c, x: jax.lax.scan(step, c, x, length=0)[1], carry, xs)
        return carry, jax.tree_util.tree_map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    return carry, jax.tree_util.tree_map(lambda *v: np.concatenate(v), *parts)


def _real(v: Any) -> bool:
    return jnp.issubdtype(v.dtype, jnp.inexact)


def _length(xs: object, length: int | None) -> int:
    sizes = {jnp.shape(v)[:1] for v in jax.tree_util.tree_leaves(xs)}
    sizes |= set() if length is None else {(length,)}
    if len(sizes) != 1 or () in sizes:
        raise ShapeError(
            explain(
                f"loop was given xs with first axes {sorted(sizes)} and length={length}",
                "they tell the number of steps",
                "pass xs whose arrays have one leading axis of steps, or length=steps",
            )
        )
    return next(iter(sizes))[0]


def _say_diverged(carry: object, start: int, stop: int) -> None:
    names = [
        jax.tree_util.keystr(path)
        for path, v in jax.tree_util.tree_leaves_with_path(carry)
        if _real(v) and not bool(jnp.isfinite(v).all())
    ]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    warn(
        explain(
            f"the carry of loop is no longer finite after steps {start} to {stop}: {shown}",
            "a step of the outer loop was too large, or a task diverged",
            "a smaller learning rate, optax.clip_by_global_norm in front of the optimizer, or a smaller "
            "chunk= to find the step",
        ),
        DivergenceWarning,
    )


@contextlib.contextmanager
def _bar(steps: int, progress: str | bool) -> Iterator[Callable]:
    if not progress:
        yield lambda count, outs: None
        return
    tqdm = import_extra("tqdm", "tqdm", "called loop(progress=...)", "draws the bar").tqdm
    label = progress if isinstance(progress, str) else None
    with tqdm(total=steps, desc=label, unit="step", unit_scale=True) as bar:

        def advance(count: int, outs: object) -> None:
            leaves = jax.tree_util.tree_leaves(outs)
            if leaves and leaves[0].ndim == 1:  # a number each step: a loss
                bar.set_postfix(mean=f"{float(leaves[0].mean()):.4g}")
            bar.update(count)

        yield advance
