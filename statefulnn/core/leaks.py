"""No traced value stays behind: what a trace left in Python objects is found when it ends (law 5).

Forward may put a value into a list that its module holds, a hook into a dict outside. While a trace runs,
that is its own affair: the next hook may take the value out again. When it ends, the value is dead. So
each object is noted before anything can write to it, and looked at once, at the end: of the transformed
function, or, where JAX runs the function and not this package, of the outermost call of a module.

What is reached from an attribute or a hook: containers, objects with a plain ``__dict__``, the variables a
function closes over and the globals that it names. Of a long container the newest members are looked at.
No code of the user's runs while looking: no ``__eq__``, ``__getattr__`` or ``__iter__``.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from statefulnn.core import compat
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import TraceLeakError, explain
from statefulnn.core.ownership import ModuleBase, real_dict
from statefulnn.core.registry import Registry

NEWEST = 1024  # members of a container that are looked at
DEEPEST = 6  # steps from an attribute or a hook
MOST = 2000  # objects that are noted for one module or hook


class Watch:
    """What is looked at when one trace ends.

    Args:
        outer: the traces that go on after it; their values may stay.
    """

    def __init__(self, outer: tuple[Any, ...] = ()) -> None:
        self._outer = outer
        # By identity: each object that was noted and its members, each root and its error.
        self._notes: dict[int, tuple[Any, Members]] = {}
        self._roots: dict[int, tuple[Any, Callable[[str], TraceLeakError], int]] = {}

    def note(self, root: Any, error: Callable[[str], TraceLeakError], deepest: int) -> None:
        """Note what can be reached from an object, as it is now.

        Args:
            root: the dict of a module's attributes, the value of one, or a hook.
            error: builds the error for a traced value that is left there; is given its name.
            deepest: how many steps from the object to look.
        """
        if id(root) not in self._roots:
            self._roots[id(root)] = root, error, deepest
            for thing, members in _reachable(root, deepest):
                self._notes.setdefault(id(thing), (thing, members))

    def note_attributes(
        self, attributes: dict[str, Any], error: Callable[[str], TraceLeakError]
    ) -> None:
        """Note the attributes of a module, and what can be reached from each that is no member."""
        if id(attributes) not in self._roots:
            self.note(attributes, error, 0)
            for name, value in attributes.items():
                if not isinstance(value, _OPAQUE):
                    self.note(value, lambda _, name=name: error(name), DEEPEST)

    def end(self) -> TraceLeakError | None:
        """Put back what was there; return the error for the first traced value that was left."""
        found = None
        for root, error, deepest in self._roots.values():
            for thing, _ in list(_reachable(root, deepest)):
                _, before = self._notes.get(id(thing), (None, None))
                left = [] if before is None else _put_back(thing, before, self._is_left)
                if left and found is None:
                    found = error(str(left[0]))
        return found

    def inherit(self, inner: Watch) -> None:
        """Go on watching what a trace inside of this one has watched."""
        self._roots = {**inner._roots, **self._roots}
        self._notes = {**inner._notes, **self._notes}

    def _is_left(self, value: Any, depth: int = 0) -> bool:
        if isinstance(value, Tracer):
            return compat.trace_of(value) not in self._outer
        if id(value) in self._notes or depth > DEEPEST:
            return False
        # An object put there since: it goes as a whole.
        return any(self._is_left(part, depth + 1) for part in _parts(value))


class _Open(threading.local):
    watch: Watch | None = None
    path: tuple[str, ...] = ()  # of the module whose call is running


_open = _Open()


class watching:
    """Watch while a trace runs: ``with watching(traces_outside):``; raises at its end if need be."""

    def __init__(self, outer: tuple[Any, ...] = ()) -> None:
        self._watch = Watch(outer)

    def __enter__(self) -> Watch:
        self._around = _open.watch, _open.path
        _open.watch, _open.path = self._watch, ()
        return self._watch

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        around, _open.path = self._around
        _open.watch = around
        # Where JAX does not tell whose a value is, only the outermost trace is looked at.
        leak = self._watch.end() if around is None or compat.TELLS_OWNERS else None
        if around is not None:
            around.inherit(self._watch)
        if leak is not None and kind is None:
            raise leak


def outer_traces() -> tuple[Any, ...]:
    """Return the traces around the current one, which go on after it."""
    return tuple(itertools.islice(compat.chain(current_trace()), 1, None))


def note_hook(hook: Callable, kind: str, module: Any) -> None:
    """Note what a hook reaches, before it runs in a trace."""
    watch = _open.watch
    if watch is not None:
        name = type(module).__name__
        watch.note(hook, lambda _: _kept_by_hook(hook, kind, name), DEEPEST)


def watching_hooks() -> Any:
    """Watch while backward hooks run: the call of their module may be over."""
    alone = _open.watch is None and current_trace() is not EAGER
    return watching() if alone else contextlib.nullcontext()


class traced_call:
    """Around a module's call under a trace: its attributes are watched, its operations carry its name.

    Args:
        module: the module that is called.
        path: the names that lead to it from the root of its tree.
        error: for a traced value in one of its attributes; None if somebody else looks at these.
    """

    def __init__(
        self,
        module: ModuleBase,
        path: tuple[str, ...],
        error: Callable[[str], TraceLeakError] | None,
    ) -> None:
        self._module, self._path, self._error = module, path, error

    def __enter__(self) -> None:
        self._alone = None
        if _open.watch is None:
            self._alone = watching()
            self._alone.__enter__()
        if self._error is not None:
            _open.watch.note_attributes(real_dict(self._module), self._error)  # pyright: ignore
        self._outside, path = _open.path, self._path
        relative = (
            path[len(self._outside) :] if path[: len(self._outside)] == self._outside else path
        )
        self._scope = None
        if relative and any(compat.kind(t) == "staged" for t in compat.chain(current_trace())):
            self._scope = jax.named_scope(".".join(relative))
            self._scope.__enter__()
        _open.path = path

    def __exit__(self, *error: Any) -> None:
        _open.path = self._outside
        if self._scope is not None:
            self._scope.__exit__(*error)
        if self._alone is not None:
            self._alone.__exit__(*error)


def _kept_by_hook(hook: Any, kind: str, module: str) -> TraceLeakError:
    name = getattr(hook, "__qualname__", None) or type(hook).__name__
    return TraceLeakError(
        explain(
            f"the {kind} {name!r} of a {module} kept a traced value in an object outside",
            "the value belongs to a traced call that has ended, and nothing is behind it any more; the "
            "hook ran once, while tracing, and does not run when the compiled code does",
            "out, outputs = nn.capture(model)(x) returns the outputs of submodules as arrays (with "
            "grads=True their gradients); what is used inside the traced function only must be taken "
            "out again before it returns",
        )
    )


# --------------------------------------------------------------------------------------------------
# Looking


Members = dict[Any, Any] | list[Any]

_ABSENT: Any = object()
_OPAQUE = (type, types.ModuleType, jax.Array, np.ndarray, Registry, str, bytes, int, float, complex)
_LIBRARIES = ("jax", "jaxlib", "numpy", "statefulnn")
_SLOT = (types.GetSetDescriptorType, types.MemberDescriptorType)


class _Globals:
    """The globals that a function names; one object for each function."""

    of: weakref.WeakKeyDictionary[types.FunctionType, _Globals] = weakref.WeakKeyDictionary()

    def __init__(self, function: types.FunctionType) -> None:
        self.values = function.__globals__
        self.names = function.__code__.co_names


def _reachable(root: Any, deepest: int) -> Iterator[tuple[Any, Members]]:
    """Yield each object that can be reached from one and be written to, and its members."""
    todo, seen = [(root, 0)], {}
    while todo and len(seen) < MOST:
        thing, depth = todo.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing
            members = _members(thing)
            if members is not None:
                yield thing, members
            if depth < deepest:
                todo += [(part, depth + 1) for part in _parts(thing)]


def _parts(thing: Any) -> list[Any]:
    """Return the objects one step away."""
    kind = type(thing)
    if kind is types.FunctionType and not _of_a_library(thing):
        named = _Globals.of.setdefault(thing, _Globals(thing))
        return [named, *(thing.__closure__ or ()), *(thing.__defaults__ or ()), thing.__dict__]
    if kind is types.MethodType:
        return [thing.__self__, thing.__func__]
    if kind is functools.partial:
        return [thing.func, *thing.args, thing.keywords]
    if isinstance(thing, (tuple, frozenset)):
        return (
            list(itertools.islice(thing, NEWEST))
            if kind in (tuple, frozenset)
            else [*tuple.__iter__(thing)]
        )
    members = _members(thing)
    return [*members.values()] if isinstance(members, dict) else members or []


def _members(thing: Any) -> Members | None:
    """Return what an object holds that can be written to, None for any other."""
    if thing is None or isinstance(thing, _OPAQUE):
        return None
    try:
        if isinstance(thing, dict):
            return dict(itertools.islice(reversed(dict.items(thing)), NEWEST))
        if isinstance(thing, list):
            return [*itertools.islice(list.__reversed__(thing), NEWEST)][::-1]
        if isinstance(thing, collections.deque):
            return [*itertools.islice(collections.deque.__reversed__(thing), NEWEST)][::-1]
        if isinstance(thing, set):
            return [*itertools.islice(set.__iter__(thing), NEWEST)]
    except RuntimeError:  # another thread writes to it at the same time
        return None
    if type(thing) is types.CellType:
        return {"cell_contents": thing.cell_contents} if thing != types.CellType() else {}
    if type(thing) is _Globals:
        return {n: thing.values[n] for n in thing.names if n in thing.values}
    if _of_a_library(type(thing)) and not isinstance(thing, ModuleBase):
        return None
    held, slots = _attributes(thing)
    if held is None and not slots:
        return None
    found = {
        name: value for name, value in (held or {}).items() if not isinstance(value, ModuleBase)
    }
    for name, slot in slots.items():
        with contextlib.suppress(AttributeError):  # it holds nothing
            found[name] = slot.__get__(thing)
    return found


def _attributes(thing: Any) -> tuple[Any, dict[str, Any]]:
    """Return the dict of an object's attributes (or None) and its slots, without asking the object."""
    held, slots = None, {}
    for cls in type(thing).__mro__:
        for name, slot in vars(cls).items():
            if type(slot) in _SLOT and name == "__dict__":
                held = slot.__get__(thing)
            elif type(slot) is types.MemberDescriptorType and not _of_a_library(cls):
                slots[name] = slot
    return held, slots


def _of_a_library(part: Any) -> bool:
    return str(getattr(part, "__module__", "")).partition(".")[0] in _LIBRARIES


def _put_back(thing: Any, before: Members, is_left: Callable[[Any], bool]) -> list[Any]:
    """Take out what was left in an object since it was noted; return the keys of it, or numbers."""
    now = _members(thing)
    if isinstance(now, dict) and isinstance(before, dict):
        left = [k for k, v in now.items() if before.get(k) is not v and is_left(v)]
        for key in left:
            _put(thing, key, before.get(key, _ABSENT))
        return left
    old = set(map(id, before))
    gone = {id(v) for v in now or () if id(v) not in old and is_left(v)}
    if not gone:
        return []
    kind: Any = next(k for k in (list, collections.deque, set) if isinstance(thing, k))
    # A member that was replaced, and none added: the old ones come back. Else the new ones go.
    kept = [v for v in kind.__iter__(thing) if id(v) not in gone]
    if kind is not set and len(before) == kind.__len__(thing):
        kept = before
    kind.clear(thing)
    (kind.update if kind is set else kind.extend)(thing, kept)
    return [*gone]


def _put(thing: Any, key: Any, value: Any) -> None:
    """Give an object back what it held under a key, or nothing."""
    if type(thing) is types.CellType:
        thing.cell_contents = None if value is _ABSENT else value
        return
    held, slots = thing, {}
    if type(thing) is _Globals:
        held = thing.values
    elif not isinstance(thing, dict):
        held, slots = _attributes(thing)
    if key in slots:
        slots[key].__delete__(thing) if value is _ABSENT else slots[key].__set__(thing, value)
        return
    kind: Any = collections.OrderedDict if isinstance(held, collections.OrderedDict) else dict
    kind.__delitem__(held, key) if value is _ABSENT else kind.__setitem__(held, key, value)
