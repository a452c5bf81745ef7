"""Records what plain Python containers held before traced code ran, to undo storing a traced value there.

A list, a dict or an object of the user's accepts anything, so the line that stores a traced value cannot be
stopped. The value is found afterwards: the containers get back what they held, and the error says so.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from statefulnn.core.compat import Tracer
from statefulnn.core.scope import ModuleBase

# How deeply nested containers, and how many of them, are searched: nobody keeps features beyond that.
_DEEPEST, _MOST = 8, 10_000


class Kept:
    """The contents of containers at one moment.

    Args:
        values: by name; each may be a container, or hold some.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self._contents = [(c, _content(c)) for value in values.values() for c in _containers(value)]

    def traced(self) -> str | None:
        """Return the name of a value that is or contains a traced value; None if there is none."""
        return next((name for name, value in self.values.items() if holds_tracer(value)), None)

    def put_back(self) -> None:
        """Give every container back what it held."""
        for container, content in self._contents:
            _fill(container, content)


def holds_tracer(value: Any) -> bool:
    """Say whether a value is traced, or a container with a traced value in it."""
    if isinstance(value, Tracer):
        return True
    return any(isinstance(v, Tracer) for c in _containers(value) for v in _members(c))


def outside_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the values in which a function can reach containers besides its arguments, by name.

    These are the variables it closes over, the globals it names, the arguments of a ``functools.partial``,
    and the object whose method it is.
    """
    if isinstance(function, functools.partial):
        arguments = {f"argument {i}": v for i, v in enumerate(function.args)}
        return {**outside_of(function.func), **arguments, **function.keywords}
    if isinstance(function, types.MethodType):
        owner = function.__self__
        own = {} if isinstance(owner, (ModuleBase, type)) else {type(owner).__name__: owner}
        return {**outside_of(function.__func__), **own}
    if not isinstance(function, types.FunctionType):
        return {}
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if _is_container(value):
            found[name] = value
    return found


def _is_container(value: Any) -> bool:
    if isinstance(value, (ModuleBase, type, types.ModuleType)):
        return False
    containers = (list, dict, set, collections.deque)
    return isinstance(value, containers) or isinstance(value, tuple) or _is_record(value)


def _is_record(value: Any) -> bool:
    """Say whether a value is a plain object, which holds everything in its ``__dict__``."""
    kind = type(value)
    if dataclasses.is_dataclass(kind) or kind is types.SimpleNamespace:
        return hasattr(value, "__dict__")
    plain = kind.__setattr__ is object.__setattr__ and not isinstance(value, types.FunctionType)
    return (
        plain and type(getattr(value, "__dict__", None)) is dict and kind.__module__ != "builtins"
    )


def _members(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        yield from list(container.values())
    elif isinstance(container, (list, tuple, set, collections.deque)):
        yield from list(container)
    else:
        yield from list(vars(container).values())


def _containers(value: Any) -> Iterator[Any]:
    """Yield a container and those inside it, each once."""
    seen: set[int] = set()
    todo = [(value, 0)]
    while todo and len(seen) < _MOST:
        part, depth = todo.pop()
        if id(part) in seen or not _is_container(part):
            continue
        seen.add(id(part))
        yield part
        if depth < _DEEPEST:
            todo += [(v, depth + 1) for v in _members(part) if not isinstance(v, Tracer)]


def _content(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    if isinstance(container, (list, tuple, set, collections.deque)):
        return list(container)
    return dict(vars(container))


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, tuple):
        return
    if isinstance(container, (dict, set)):
        container.clear()
        container.update(content)
    elif isinstance(container, (list, collections.deque)):
        container.clear()
        container.extend(content)
    else:
        vars(container).clear()
        vars(container).update(content)
