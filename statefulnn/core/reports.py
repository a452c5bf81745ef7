"""Saying on the host what happened in compiled code."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import Tracer, under_compilation
from statefulnn.core.errors import StatefulnnError
from statefulnn.core.failures import fail, note_check


class _Staging(threading.local):
    eager: bool = False  # what is staged now will be evaluated eagerly
    said: set[str] | None = None  # what a loop has said, once; None outside of one


_staging = _Staging()


@contextlib.contextmanager
def staging() -> Iterator[None]:
    """Around a function of JAX that stages what it is given, and runs it at once in eager code."""
    before = _staging.eager
    _staging.eager = before or not under_compilation()
    try:
        yield
    finally:
        _staging.eager = before


@contextlib.contextmanager
def said_once(said: set[str]) -> Iterator[None]:
    """While a loop is traced: of reports of one kind, the first one is said."""
    before, _staging.said = _staging.said, said
    try:
        yield
    finally:
        _staging.said = before


def report_unless(fine: Any, say: Callable[..., None], *values: Any) -> None:
    """Call ``say(fine, *values)`` on the host, with numpy arrays, if a traced condition does not hold.

    Under ``jax.vmap`` all lanes are told of in one call, and the arrays have a leading axis of lanes for each
    mapped axis, the outermost first.

    Compiled code goes on meanwhile. A call into Python costs a compiled function the fast path of its
    dispatch: about 0.1 ms a call on CPU, whether the condition holds or not.
    """
    if not isinstance(fine, Tracer):
        if not fine:
            say(*map(np.asarray, (fine, *values)))
        return

    said, what = _staging.said, getattr(getattr(say, "func", say), "__qualname__", "")

    def on_host(fine: Any, *values: Any) -> None:
        if np.all(fine) or (said is not None and what in said):
            return
        if said is not None:
            said.add(what)
        say(*map(np.asarray, (fine, *values)))

    def tell(*arrays: Any) -> None:
        jax.debug.callback(on_host, *arrays)

    # JAX compiles a condition, also in eager code, where the callback could raise its own error.
    direct = _staging.eager or not under_compilation()

    @jax.custom_batching.custom_vmap
    def check(fine: Any, *values: Any) -> tuple:
        if direct:
            tell(fine, *values)
        else:
            jax.lax.cond(jnp.all(fine), lambda *arrays: None, tell, fine, *values)
        return ()

    @check.def_vmap
    def _(lanes: int, mapped: list[bool], *arrays: Any) -> tuple:
        full = [
            a if own else jnp.broadcast_to(a, (lanes, *jnp.shape(a)))
            for a, own in zip(arrays, mapped, strict=True)
        ]
        return check(*full), ()

    check(*jax.lax.stop_gradient((fine, *values)))


def fail_unless(fine: Any, error: Callable[..., StatefulnnError], *values: Any) -> None:
    """Raise ``error(fine, *values)`` if a traced condition does not hold; see `report_unless`.

    From compiled code JAX raises it as an error of its own; `nn.jit` and its relatives raise this one.
    """
    note_check()

    def say(*arrays: Any) -> None:
        fail(error(*arrays))

    report_unless(fine, say, *values)


def lanes_of(fine: Any, noun: str = "task") -> str:
    """Say in which lanes of the mapped axes a condition does not hold: " in task 2 of 5"."""
    return f" in {named_lanes(fine, noun)}" if fine.ndim else ""


def named_lanes(fine: Any, noun: str) -> str:
    """Name the lanes in which a condition does not hold: "tasks 2, 4 of 5"."""
    bad = [i[0] if fine.ndim == 1 else tuple(i) for i in np.argwhere(~fine).tolist()]
    size = fine.shape[0] if fine.ndim == 1 else fine.shape
    shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    return f"{noun}{'s' * (len(bad) > 1)} {shown} of {size}"


def finite(tree: Any, lanes: int) -> Any:
    """Say for each lane, the first axis, whether all numbers of a tree are finite."""
    fine = jnp.ones(lanes, bool)
    for leaf in jax.tree_util.tree_leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            fine &= jnp.isfinite(leaf).reshape(lanes, -1).all(1)
    return fine


def warn(message: str, category: type[Warning]) -> None:
    """Warn from a callback, where no line of the user's is on the stack."""
    warnings.warn(message, category, stacklevel=2)
