"""No traced value stays behind: what a trace left in Python objects is found when it ends (law 5).

Forward may put a value into a list that its module holds, a hook into a dict outside. While a trace runs,
that is its own affair: the next hook may take the value out again. When it ends, the value is dead. So
each object is noted before anything can write to it, and looked at once, at the end: of the transformed
function, or, where JAX runs the function and not this package, of the outermost call of a module.

What is reached from an attribute or a hook: containers, the attributes of objects, the variables a
function closes over and the globals that it names. Of a long container the newest members are looked at.
No code of the user's runs while looking, see `core.objects`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from statefulnn.core import compat
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import TraceLeakError, explain
from statefulnn.core.objects import ATOMS, UNSET, fill, layout_of, package_of, state_of
from statefulnn.core.ownership import ModuleBase, real_dict
from statefulnn.core.registry import Registry

NEWEST = 1024  # members of a container that are looked at
DEEPEST = 6  # steps from an attribute or a hook
MOST = 2000  # objects that are noted for one module or hook

# Builds the error for a traced value that was left under a name.
_Error = Callable[[str], TraceLeakError]


class Inventory:
    """What objects held before a trace, to be compared when it ends.

    Args:
        outer: the traces that go on after it; their values may stay.
    """

    def __init__(self, outer: tuple[Any, ...] = ()) -> None:
        self._outer = outer
        # By identity: each object that was noted and what it held, each root, its error and how far to look.
        self._notes: dict[int, tuple[Any, Held]] = {}
        self._roots: dict[int, tuple[Any, _Error, int]] = {}

    def note(self, root: object, error: _Error, deepest: int = DEEPEST) -> None:
        """Note what can be reached from an object in some steps, as it is now."""
        if id(root) not in self._roots:
            self._roots[id(root)] = root, error, deepest
            for thing, held in _reachable(root, deepest):
                self._notes.setdefault(id(thing), (thing, held))

    def note_attributes(self, attributes: dict[str, Any], error: _Error) -> None:
        """Note the attributes of a module, and what can be reached from each that is no member."""
        if id(attributes) not in self._roots:
            self.note(attributes, error, 0)
            for name, value in attributes.items():
                if type(value) not in ATOMS:
                    self.note(value, lambda _, name=name: error(name))

    def end(self) -> TraceLeakError | None:
        """Put back what was there; return the error for the first traced value that was left."""
        found = None
        for root, error, deepest in self._roots.values():
            for thing, now in list(_reachable(root, deepest)):
                _, before = self._notes.get(id(thing), (None, None))
                left = None if before is None else self._put_back(thing, before, now)
                if left is not None and found is None:
                    found = error(left)
        return found

    def inherit(self, inner: Inventory) -> None:
        """Go on watching what a trace inside of this one has watched."""
        self._roots = {**inner._roots, **self._roots}
        self._notes = {**inner._notes, **self._notes}

    def _put_back(self, thing: Any, before: Held, now: Held) -> str | None:
        """Take out what was left in an object since it was noted; return a name of it."""
        if isinstance(now, dict) and isinstance(before, dict):
            left = [k for k, v in now.items() if before.get(k) is not v and self._is_left(v)]
            for name in left:
                _put(thing, name, before.get(name, UNSET))
            return str(left[0]) if left else None
        old = set(map(id, before))
        gone = {id(v) for v in now if id(v) not in old and self._is_left(v)}
        if not gone:
            return None
        # A member that was replaced, and none added: the old ones come back. Else the new ones go.
        base = layout_of(type(thing)).container
        kept = [v for v in base.__iter__(thing) if id(v) not in gone]
        if base is not set and len(before) == base.__len__(thing):
            kept = before
        base.clear(thing)
        fill(thing, base, (), kept)
        return "a member"

    def _is_left(self, value: object, depth: int = 0) -> bool:
        if issubclass(type(value), Tracer):
            return compat.trace_of(value) not in self._outer
        if id(value) in self._notes or depth > DEEPEST:
            return False
        # An object put there since: it goes as a whole.
        return any(self._is_left(part, depth + 1) for part in _parts(value))


# --------------------------------------------------------------------------------------------------
# When


class _Open(threading.local):
    inventory: Inventory | None = None
    path: tuple[str, ...] = ()  # of the module whose call is running


_open = _Open()


@contextlib.contextmanager
def watching(outer: tuple[Any, ...] = ()) -> Iterator[Inventory]:
    """Watch while a trace runs: ``with watching(traces_outside):``; raises at its end if need be."""
    around, path = _open.inventory, _open.path
    inventory = Inventory(outer)
    _open.inventory, _open.path = inventory, ()
    leak = None
    try:
        yield inventory
    finally:
        _open.inventory, _open.path = around, path
        # Where JAX does not tell whose a value is, only the outermost trace is looked at.
        if around is None or compat.TELLS_OWNERS:
            leak = inventory.end()
        if around is not None:
            around.inherit(inventory)
    if leak is not None:  # after an error of the function's own, that one is raised
        raise leak


def outer_traces() -> tuple[Any, ...]:
    """Return the traces around the current one, which go on after it."""
    return tuple(itertools.islice(compat.chain(current_trace()), 1, None))


def note_hook(hook: Callable, kind: str, module: ModuleBase) -> None:
    """Note what a hook reaches, before it runs in a trace."""
    if _open.inventory is not None:
        owner = type(module).__name__
        _open.inventory.note(hook, lambda _: _kept_by_hook(hook, kind, owner))


def watching_hooks() -> contextlib.AbstractContextManager:
    """Watch while backward hooks run: the call of their module may be over."""
    alone = _open.inventory is None and current_trace() is not EAGER
    return watching() if alone else contextlib.nullcontext()


@contextlib.contextmanager
def traced_call(module: ModuleBase, path: tuple[str, ...], error: _Error | None) -> Iterator[None]:
    """Around a module's call under a trace: its attributes are watched, its operations carry its name.

    Args:
        module: the module that is called.
        path: the names that lead to it from the root of its tree.
        error: for a traced value in one of its attributes; None if somebody else looks at these.
    """
    with contextlib.ExitStack() as stack:
        inventory = _open.inventory or stack.enter_context(watching())
        if error is not None:
            inventory.note_attributes(real_dict(module), error)
        outside = _open.path
        inner = path[len(outside) :] if path[: len(outside)] == outside else path
        if inner and any(compat.kind(t) == "staged" for t in compat.chain(current_trace())):
            stack.enter_context(jax.named_scope(".".join(inner)))
        _open.path = path
        try:
            yield
        finally:
            _open.path = outside


def _kept_by_hook(hook: object, kind: str, module: str) -> TraceLeakError:
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

# What can be written to in an object: by name, or the members of a list, deque or set.
Held = dict[Any, Any] | list[Any]

_LIBRARIES = ("jax", "jaxlib", "numpy", "statefulnn")


class _Globals:
    """The globals that a function names; one object for each function."""

    of: weakref.WeakKeyDictionary[types.FunctionType, _Globals] = weakref.WeakKeyDictionary()

    def __init__(self, function: types.FunctionType) -> None:
        self.values = function.__globals__
        self.names = function.__code__.co_names


def _reachable(root: object, deepest: int) -> Iterator[tuple[Any, Held]]:
    """Yield each object that can be reached from one, and what it holds."""
    todo, seen = [(root, 0)], {}
    while todo and len(seen) < MOST:
        thing, depth = todo.pop()
        if id(thing) not in seen and type(thing) not in ATOMS:
            seen[id(thing)] = thing
            yield thing, _held(thing)
            if depth < deepest:
                todo += [(part, depth + 1) for part in _parts(thing)]


def _parts(thing: object) -> list[Any]:
    """Return the objects one step away."""
    if type(thing) is types.FunctionType:
        if str(thing.__module__).partition(".")[0] in _LIBRARIES:
            return []
        named = _Globals.of.setdefault(thing, _Globals(thing))
        return [named, *(thing.__closure__ or ()), *(thing.__defaults__ or ()), thing.__dict__]
    held = _held(thing)
    if _is_closed(type(thing)):
        return []
    attributes = None if type(thing) is _Globals else state_of(thing)[1]
    return [*(held.values() if isinstance(held, dict) else held), attributes]


def _is_closed(kind: type) -> bool:
    if issubclass(kind, (ModuleBase, tuple)) or kind is _Globals:
        return False
    return package_of(kind) in _LIBRARIES or issubclass(kind, (type, types.ModuleType, Registry))


def _held(thing: Any) -> Held:
    kind = type(thing)
    if kind is _Globals:
        return {n: thing.values[n] for n in thing.names if n in thing.values}
    if kind in ATOMS or _is_closed(kind):
        return []
    layout = layout_of(kind)
    base = layout.container
    if base is None:
        slots = {} if issubclass(kind, ModuleBase) else layout.slots
        members = zip(slots, state_of(thing)[2:], strict=False)
        return {name: value for name, value in members if value is not UNSET}
    try:
        if issubclass(base, dict):
            return dict(itertools.islice(reversed(base.items(thing)), NEWEST))
        newest = base.__iter__ if base in (tuple, set, frozenset) else base.__reversed__
        return [*itertools.islice(newest(thing), NEWEST)][::-1]
    except RuntimeError:  # another thread writes to it at the same time
        return []


def _put(thing: Any, name: Any, value: object) -> None:
    """Give an object back what it held under a name, or nothing."""
    if type(thing) is _Globals:
        thing = thing.values
    layout = layout_of(type(thing))
    if layout.container is None:
        slot = layout.slots[name]
        slot.__delete__(thing) if value is UNSET else slot.__set__(thing, value)
    elif value is UNSET:
        layout.container.__delitem__(thing, name)
    else:
        layout.container.__setitem__(thing, name, value)
