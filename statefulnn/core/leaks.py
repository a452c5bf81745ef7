"""No traced value stays behind: what a trace left in Python objects is found when it ends (law 5).

Forward may put a value into a list that its module holds, a hook into a dict outside. While a trace runs,
that is its own affair: the next hook may take the value out again. When it ends, the value is dead. So
each object is noted before anything can write to it, and looked at once, at the end: of the transformed
function, or, where JAX runs the function and not this package, of the outermost call of a module.

What is reached from an attribute or a hook: containers, the attributes of objects, the variables a
function closes over and the globals that it names. Of very many objects the newest are looked at. No code
of the user's runs while looking, see `core.objects`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from statefulnn.core import compat
from statefulnn.core.class_keys import containers_of, forget_changes, unchanged_classes
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import TraceLeakError, explain
from statefulnn.core.objects import ATOMS, Content, content_of, layout_of, package_of, put
from statefulnn.core.ownership import ModuleBase, real_dict
from statefulnn.core.registry import Registry
from statefulnn.core.static_keys import traced_value

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
        self._notes: dict[int, tuple[Any, Content]] = {}
        self._roots: dict[int, tuple[Any, _Error, int]] = {}
        # What a function returns of what backward hooks kept is not lost: by identity.
        self._backward: set[int] = set()
        self._returned: dict[int, Any] = {}

    def note(self, root: object, error: _Error, deepest: int = DEEPEST) -> None:
        """Note what can be reached from an object in some steps, as it is now."""
        if id(root) not in self._roots:
            self._roots[id(root)] = root, error, deepest
            for thing, content in _reachable(root, deepest):
                self._notes.setdefault(id(thing), (thing, content))

    def note_attributes(self, module: ModuleBase, error: _Error | None) -> None:
        """Note the attributes of a module and its class, and what can be reached from each.

        Args:
            error: for the module's own; None if somebody else looks at these.
        """
        attributes, cls = real_dict(module), type(module)
        if id(attributes) in self._roots:
            return
        for name, value in containers_of(cls).items():
            self.note(value, lambda _, name=name: traced_value(f"'{cls.__name__}.{name}'"))
        if error is not None:
            self.note(attributes, error, 0)
            for name, value in attributes.items():
                if type(value) not in ATOMS:
                    self.note(value, lambda _, name=name: error(name))

    def end(self) -> TraceLeakError | None:
        """Put back what was there; return the error for the first traced value that was left."""
        found = None
        for root, error, deepest in self._roots.values():
            for thing, now in list(_reachable(root, deepest)):
                _, before = self._notes.get(id(thing), (None, now))
                left = [name for name, value in _new(now, before) if self._is_left(value)]
                if left:
                    values = [value for name, value in _new(now, before) if name in left]
                    _put_back(thing, before, left)
                    if not (id(root) in self._backward and self._all_returned(values)):
                        found = found or error(str(left[0]))
        return found

    def note_backward(self, hook: Callable) -> None:
        """Note that a hook is a backward hook, whose gradients a function may return."""
        self._backward.add(id(hook))

    def note_returned(self, leaves: Iterable[object]) -> None:
        """Note the leaves that the traced function returns."""
        self._returned.update((id(leaf), leaf) for leaf in leaves)

    def _all_returned(self, values: Iterable[object]) -> bool:
        leaves = jax.tree_util.tree_leaves(list(values))
        return all(id(v) in self._returned for v in leaves if isinstance(v, Tracer))

    def inherit(self, inner: Inventory) -> None:
        """Go on watching what a trace inside of this one has watched."""
        self._roots = {**inner._roots, **self._roots}
        self._notes = {**inner._notes, **self._notes}
        self._backward |= inner._backward

    def _is_left(self, value: object, depth: int = 0) -> bool:
        if issubclass(type(value), Tracer):
            return compat.trace_of(value) not in self._outer
        if id(value) in self._notes or depth > DEEPEST:
            return False
        # An object put there since: it goes as a whole.
        return any(self._is_left(part, depth + 1) for part in _looked_into(value)[1])


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
    leak, classes = None, unchanged_classes()
    try:
        yield inventory
    finally:
        _open.inventory, _open.path = around, path
        # Where JAX does not tell whose a value is, only the outermost trace is looked at.
        if around is None or compat.TELLS_OWNERS:
            leak = inventory.end()
        forget_changes(classes)
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
        if kind.startswith("backward"):
            _open.inventory.note_backward(hook)
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
        inventory.note_attributes(module, error)
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

_LIBRARIES = ("jax", "jaxlib", "numpy", "statefulnn")


class _Globals:
    """The globals that a function names; one object for each function."""

    of: weakref.WeakKeyDictionary[types.FunctionType, _Globals] = weakref.WeakKeyDictionary()

    def __init__(self, function: types.FunctionType) -> None:
        self.values = function.__globals__
        self.names = function.__code__.co_names

    def content(self) -> Content:
        """Return the names that are bound, and their values, as if they were attributes."""
        names = tuple(n for n in self.names if n in self.values)
        return Content(names=names, attributes=tuple(self.values[n] for n in names))


def _reachable(root: object, deepest: int) -> Iterator[tuple[Any, Content]]:
    """Yield each object that can be reached from one, and its content."""
    todo, seen = [(root, 0)], {}
    while todo and len(seen) < MOST:
        thing, depth = todo.pop()
        if issubclass(type(thing), ModuleBase):
            thing = real_dict(thing)
        if id(thing) in seen or type(thing) in ATOMS:
            continue
        seen[id(thing)] = thing
        try:
            content, parts = _looked_into(thing)
        except RuntimeError:  # another thread writes to it at the same time
            continue
        yield thing, content
        if depth < deepest:
            todo += [(part, depth + 1) for part in parts]


def _looked_into(thing: Any) -> tuple[Content, tuple]:
    """Return the content of an object, and the objects that are one step away from it."""
    kind = type(thing)
    if kind is _Globals:
        content = thing.content()
    elif kind is types.FunctionType:
        if str(thing.__module__).partition(".")[0] in _LIBRARIES:
            return Content(), ()
        named = _Globals.of.setdefault(thing, _Globals(thing))
        cells, defaults = thing.__closure__ or (), thing.__defaults__ or ()
        return Content(), (named, *cells, *defaults, thing.__dict__)
    elif issubclass(kind, (type, types.ModuleType, Registry)) or (
        package_of(kind) in _LIBRARIES and layout_of(kind).container is None
    ):
        return Content(), ()
    else:
        content = content_of(thing)
    return content, content.members + content.attributes


def _new(now: Content, before: Content) -> list[tuple[Any, Any]]:
    """Return what an object holds since, with its key or name if it has one."""
    old = set(map(id, before.members + before.attributes))
    items = itertools.zip_longest(now.keys + now.names, now.members + now.attributes)
    return [(name, value) for name, value in items if id(value) not in old]


def _put_back(thing: object, before: Content, left: list[Any]) -> None:
    if type(thing) is not _Globals:
        put(thing, before)
        return
    old = dict(zip(before.names, before.attributes, strict=True))
    for name in left:  # and nothing else: many programs share a module's globals
        thing.values.pop(name) if name not in old else thing.values.update({name: old[name]})
