"""Who listens to calls of modules: `nn.capture` and the like; and silent runs, which nobody hears."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from statefulnn.core.baked_in import BakedIn
from statefulnn.core.compat import current_trace
from statefulnn.core.ownership import ModuleBase


class _Active(threading.local):
    """Who listens to calls in this thread."""

    # Functions (module, output) -> output, see transforms.capture.
    listeners: tuple[Callable[[Any, Any], Any], ...] = ()
    # Functions (module, args, kwargs), shown each call before it begins.
    entering: tuple[Callable[[Any, tuple, dict], None], ...] = ()
    muted: bool = False  # a probe is running: no hook fires


active = _Active()


@contextlib.contextmanager
def listening(
    *listeners: Callable[[Any, Any], Any],
    entering: Callable[[Any, tuple, dict], None] | None = None,
    silently: bool = False,
) -> Iterator[None]:
    """Show every call of a module inside to listeners, which return its output or another one.

    What `entering` is shown, before a call begins, is the module and its arguments. With ``silently=True``
    no hook fires inside, and nobody else listens.
    """
    before = active.listeners, active.entering, active.muted
    active.listeners = listeners if silently else (*active.listeners, *listeners)
    added = () if entering is None else (entering,)
    active.entering = added if silently else (*active.entering, *added)
    active.muted = active.muted or silently
    # JAX remembers what inner functions (jit, scan, checkpoint) were traced to. In a context of its own
    # a silent run does not leave them behind without their hooks.
    context = set_xla_metadata(statefulnn="silent") if silently else contextlib.nullcontext()
    try:
        with context:
            yield
    finally:
        active.listeners, active.entering, active.muted = before


def heard(module: ModuleBase, out: Any) -> Any:
    """Show an output to the listeners; return it, or what they made of it."""
    for listener in active.listeners:
        out = listener(module, out)
    return out


def run_abstractly(function: Callable[[], Any]) -> None:
    """Run a function silently and without computing anything; no trace of it stays."""

    def run() -> None:
        try:
            function()
        finally:
            # Nothing will be compiled of this trace, so what it read may change without a warning.
            BakedIn.forget_all_of(current_trace())

    with listening(silently=True):
        jax.eval_shape(run)
