"""Who owns what, and who may write it.

Terms
  Scope       who owns a set of boxes and modules: the trace they were built in, and whether anybody
              will keep what is written to them. The user's own objects have no scope.
  Cell        the version stamp of one module. Caches compare stamps instead of walking the modules.
  Clock       the two counters that stamps are taken from: structural changes, changes of values.

Writes go through `check_write`, which is where laws 4 and 5 live: nothing is written that would be lost,
and no traced value is written where it would outlive its trace.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from statefulnn.core import compat
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import StaleCaptureWarning, StateWriteError, TraceLeakError, explain

tick = itertools.count(1).__next__
value_tick = itertools.count(1).__next__


class Clock:
    """The two global counters, and what hangs on them.

    Attributes:
        structure: the stamp of the last structural or static change.
        values: the stamp of the last change of a value.
        gathered: weak references to the plans whose list of leaves is cached; the next change of a
            value drops the lists.
        captured: how many boxes were taken as constants by traced code and not written since.
    """

    __slots__ = ("captured", "gathered", "structure", "values")

    def __init__(self) -> None:
        self.structure = 0
        self.values = 0
        self.gathered: list[Any] = []
        self.captured = 0


clock = Clock()


def value_changed() -> None:
    """Drop every cached list of leaves; call after a box took another value."""
    clock.values = value_tick()
    if clock.gathered:
        plans, clock.gathered = clock.gathered, []
        for reference in plans:
            plan = reference()
            if plan is not None:
                plan.cached_leaves = None


class Cell:
    """The stamp of one module, and the scope that owns the module (None: the user)."""

    __slots__ = ("__weakref__", "captured", "scope", "stamp")

    def __init__(self, scope: Scope | None = None) -> None:
        self.stamp = 0
        self.scope = scope
        self.captured: Capture | None = None

    def touch(self, subject: Any = "a module") -> None:
        """Record a change that has just been made to the structure or to a static attribute."""
        self.stamp = clock.structure = tick()
        if self.captured is not None:
            self.captured.warn_of_structure(subject)


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


# Modules of Python's that call back into this package for the user.
_BETWEEN = {"copy", "copyreg", "pickle"}


def _frames() -> Any:
    frame, level = sys._getframe(1), 1
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("statefulnn.", "jax.")) and name not in _BETWEEN:
            yield frame, level - 1
        frame, level = frame.f_back, level + 1


def caller() -> str:
    """Return file:line of the nearest frame outside this package and JAX."""
    for frame, _ in _frames():
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "an unknown place"


def user_stack_level() -> int:
    """Return the `stacklevel` that points a warning of the calling function at the user's line."""
    for _, level in _frames():
        return level
    return 2


class Scope:
    """The owner of clones: the trace they live in, and what may be written to them.

    Args:
        writable: whether somebody will collect what is written.
        lost: for read-only scopes, the reason and the remedy, as the two last parts of a message.
        moduledef: the static half of the clones; it knows their names.
        birth: whether this is the trace that user code built a box or module in. Should they outlive
            it, they are the user's.
    """

    __slots__ = (
        "__weakref__",
        "_trace",
        "birth",
        "lost",
        "moduledef",
        "read",
        "stop_gradients",
        "writable",
    )

    def __init__(
        self,
        writable: bool = True,
        lost: tuple[str, str] | None = None,
        moduledef: Any = None,
        birth: bool = False,
    ) -> None:
        self._trace = weakref.ref(current_trace())
        self.birth = birth
        self.writable = writable
        self.lost = lost
        self.moduledef = moduledef
        self.read = False  # whether any parameter of the scope was read
        self.stop_gradients = False

    @property
    def trace(self) -> Any:
        """The trace the scope was opened in, or None once it has ended."""
        return self._trace()

    def name_of(self, position: int) -> str | None:
        """Return the dotted name of the box at a leaf position."""
        return None if self.moduledef is None else self.moduledef.leaf_names[position]


class ModuleBase:
    """The slots of a Module, apart from its attributes; `core.module.Module` is the class to use."""

    __slots__ = ("__dict__", "__weakref__", "_cell", "_home", "_plan", "_shell")

    _cell: Cell
    _home: Any  # a node number, or (weak reference to the parent, name); for messages only
    _plan: Any
    _shell: Any


# Module intercepts assignment, so the slots are written through their descriptors.
set_cell = ModuleBase.__dict__["_cell"].__set__
set_home = ModuleBase.__dict__["_home"].__set__
set_plan = ModuleBase.__dict__["_plan"].__set__
set_shell = ModuleBase.__dict__["_shell"].__set__
real_dict = ModuleBase.__dict__["__dict__"].__get__


def birth_scope() -> Scope | None:
    """Return the owner of what is built here: the current trace, or the user outside every trace."""
    return None if current_trace() is EAGER else Scope(birth=True)


# What a clone that JAX built, and not this package, answers to a write.
LOST_IN_RAW_TRANSFORM = (
    "this module was rebuilt by a plain JAX transformation (jax.jit, jax.grad, jax.vmap, "
    "jax.tree.map ...), which never looks at it again, so the write would be lost",
    "use nn.jit, nn.value_and_grad or nn.vmap, which write back; or a pure call, "
    "functionalize(module, mutable=True); or return the updated module: "
    "module = nn.mutable(module) first, write, and return it. "
    "Call train() and eval() outside the transformation",
)


def check_write(scope: Scope | None, value: Any, subject: Any) -> None:
    """Raise unless a box or module of `scope` may take `value` at this point of the program.

    Args:
        scope: the owner, None for the user's own objects.
        value: what is about to be written; None for a structural or static change.
        subject: what is written to, for the message: a name, or a function that gives it.
    """
    trace = current_trace()
    if scope is None:
        if trace is EAGER and not isinstance(value, Tracer):
            return
        owner = EAGER
    else:
        if not scope.writable:
            why, instead = scope.lost or LOST_IN_RAW_TRANSFORM
            raise StateWriteError(explain(f"wrote to {name_of(subject)}", why, instead))
        owner = scope.trace
        if owner is None and scope.birth:
            owner = EAGER

    between = []
    for around in compat.chain(trace):
        if around is owner:
            break
        between.append(around)
    else:
        raise TraceLeakError(
            explain(
                f"wrote to {name_of(subject)}",
                "it belongs to a traced call that has ended, or to one that is not around this line",
                "return values from the traced function instead of keeping its modules",
            )
        )
    if any(compat.kind(t) == "staged" for t in between):
        raise TraceLeakError(
            explain(
                f"wrote to {name_of(subject)} inside a function that JAX traces "
                "(jax.jit, lax.scan, lax.cond, jax.checkpoint, checkify ...)",
                "the module is not an argument of that function: the write would happen once, while "
                "tracing, and leave a dead tracer or a stale value behind",
                "pass the module as an argument to nn.jit (nn.scan, nn.remat, nn.checkify), which writes "
                "back; or return the new value and write it outside",
            )
        )
    if isinstance(value, Tracer):
        home = compat.trace_of(value)
        if home in between or home not in compat.chain(owner):
            raise TraceLeakError(
                explain(
                    f"wrote a traced value to {name_of(subject)}",
                    "the module lives outside the transformation that made the value, so the value "
                    "would outlive its trace",
                    "pass the module as an argument to nn.value_and_grad, nn.vmap or nn.jit, which "
                    "write back; or return the value (has_aux=True) and write it outside",
                )
            )


def name_of(subject: Any) -> str:
    return str(subject() if callable(subject) else subject)
