"""What compiled code took in as constants (law 6).

A module that traced code finds through a closure becomes part of the compiled code, as it was then. That
is legal, so reading does not raise; a later change warns once, since compiled code goes on as before.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from statefulnn.core import compat
from statefulnn.core.compat import current_trace
from statefulnn.core.errors import StaleCaptureWarning, caller, explain, name_of, user_stack_level
from statefulnn.core.stamps import clock


class _Probes(threading.local):
    running: bool = False


_probes = _Probes()


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """Trace for the shapes alone: nothing is compiled of it, so what is read becomes no constant."""
    before, _probes.running = _probes.running, True
    try:
        yield
    finally:
        _probes.running = before


class Capture:
    """That traced code took a box or module of the user's in as a constant: where, and in which trace.

    Law 6: that is legal, but the compiled code goes on with what it saw, so a later change warns once.
    """

    __slots__ = ("things", "warned", "where")

    _of_trace: weakref.WeakKeyDictionary[Any, Capture] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.where = caller()
        self.things: list[Any] = []
        self.warned = False

    @classmethod
    def note(cls, thing: Any) -> None:
        """Take note of a box or cell that is read where a staged trace may make it a constant."""
        if _probes.running:
            return
        staged = next(
            (t for t in compat.chain(current_trace()) if compat.kind(t) == "staged"), None
        )
        if staged is None:
            return
        capture = cls._of_trace.get(staged)
        if capture is None:
            capture = cls._of_trace[staged] = cls()
        thing.captured = capture
        capture.things.append(weakref.ref(thing))
        clock.captured += 1

    @classmethod
    def forget(cls, thing: Any) -> None:
        """The thing has changed, and that was said."""
        thing.captured = None
        clock.captured -= 1

    @classmethod
    def trace_failed(cls) -> None:
        """Forget what the current trace has captured: nothing will be compiled of it."""
        for trace in compat.chain(current_trace()):
            capture = cls._of_trace.pop(trace, None)
            for reference in () if capture is None else capture.things:
                thing = reference()
                if thing is not None and thing.captured is capture:
                    cls.forget(thing)

    def warn_of_value(self, box: Any) -> None:
        """Warn that a captured box was written."""
        Capture.forget(box)
        warnings.warn(
            explain(
                f"wrote to {box.label()}",
                f"compiled code took its old value as a constant at {self.where}, and will go on "
                "using it",
                "pass the module to the compiled function as an argument",
            ),
            StaleCaptureWarning,
            stacklevel=user_stack_level(),
        )

    def warn_of_structure(self, subject: Any) -> None:
        """Warn that a captured module was changed; once for all modules of one compiled function."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                explain(
                    f"changed {name_of(subject)}",
                    f"compiled code took the module in as it was at {self.where}, and will go on "
                    "using that",
                    "pass the module to the compiled function as an argument",
                ),
                StaleCaptureWarning,
                stacklevel=user_stack_level(),
            )
