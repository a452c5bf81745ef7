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
from typing import TYPE_CHECKING, Any

from statefulnn.core import compat, refusals
from statefulnn.core.compat import current_trace
from statefulnn.core.errors import StaleCaptureWarning, caller, user_stack_level
from statefulnn.core.refusals import Subject
from statefulnn.core.stamps import Stamp, clock

if TYPE_CHECKING:
    from statefulnn.core.box import Box


# For each thread: while one probes, another may compile.
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


class BakedIn:
    """That traced code took a box or module of the user's in as a constant: where, and in which trace.

    Law 6: that is legal, but the compiled code goes on with what it saw, so a later change warns once.
    """

    __slots__ = ("things", "warned", "where")

    # By trace, and not by the thing that is read: all that one compiled function took in shares the line
    # that is named, and is forgotten together if the trace fails.
    _of_trace: weakref.WeakKeyDictionary[Any, BakedIn] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.where = caller()
        self.things: list[weakref.ref[Box | Stamp]] = []
        self.warned = False

    @classmethod
    def note(cls, thing: Box | Stamp) -> None:
        """Take note of a box or stamp that is read where a staged trace may make it a constant."""
        if _probes.running:
            return
        # Under autodiff or vmap alone nothing outlives the call.
        traces = compat.chain(current_trace())
        staged = next((t for t in traces if compat.kind(t) == "staged"), None)
        if staged is None:
            return
        capture = cls._of_trace.get(staged)
        if capture is None:
            capture = cls._of_trace[staged] = cls()
        thing.baked_in = capture
        capture.things.append(weakref.ref(thing))
        clock.baked_in += 1

    @classmethod
    def forget(cls, thing: Box | Stamp) -> None:
        """The thing has changed, and that was said."""
        thing.baked_in = None
        clock.baked_in -= 1

    @classmethod
    def forget_all_of(cls, trace: object) -> None:
        """Forget what a trace has captured: nothing will be compiled of it."""
        capture = cls._of_trace.pop(trace, None)
        for reference in () if capture is None else capture.things:
            thing = reference()
            # It may have been captured again since, by a trace that does not fail.
            if thing is not None and thing.baked_in is capture:
                cls.forget(thing)

    @classmethod
    def trace_failed(cls) -> None:
        """Forget what the current trace, and those around it, have captured."""
        for trace in compat.chain(current_trace()):
            cls.forget_all_of(trace)

    def warn_of_value(self, box: Box) -> None:
        """Warn that a captured box was written."""
        BakedIn.forget(box)
        text = refusals.stale_value(box.label(), self.where)
        warnings.warn(text, StaleCaptureWarning, stacklevel=user_stack_level())

    def warn_of_structure(self, subject: Subject) -> None:
        """Warn that a captured module was changed; once for all modules of one compiled function."""
        if not self.warned:
            self.warned = True
            text = refusals.stale_structure(subject, self.where)
            warnings.warn(text, StaleCaptureWarning, stacklevel=user_stack_level())
