"""Static attributes: how they are compared, watched and copied.

`freeze` turns any Python value into a hashable key such that equal keys mean "compiled code may be
shared": 1, True and 1.0 differ, 0.0 and -0.0 differ, functions compare by code, globals, defaults and
closure, containers and numpy arrays by content, unknown objects by identity (they are not looked into).

What can change in place (lists, dicts, sets, arrays, dataclasses, closures) is reported, so that it can
be frozen again before each compiled call.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.compat import Tracer
from statefulnn.core.errors import RegistrationError, TraceLeakError, explain
from statefulnn.core.ownership import ModuleBase


class Identity:
    """A key that is equal only for the same object; keeps the object alive."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __eq__(self, other: object) -> bool:
        return type(other) is Identity and other.obj is self.obj

    def __hash__(self) -> int:
        return id(self.obj)

    def __repr__(self) -> str:
        return repr(self.obj)


# What plain containers are: a member in one of them would not be found.
CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)

_ATOMS = frozenset(
    {str, bytes, bool, int, type(None), type(...), type(NotImplemented), range, type}
    | {jax.tree_util.PyTreeDef}
)


class Freezer:
    """Freezes the attributes of one module; collects what has to be watched.

    Args:
        where: gives the name of the attribute being frozen, for messages.
        node_of: gives the number of a module of the same tree, None for any other: a bound method of
            such a module is followed to its clone.
    """

    def __init__(self, where: Any = None, node_of: Any = None) -> None:
        self.where = where or (lambda: "an attribute")
        self.node_of = node_of
        self.mutable = False
        self.rebinds = False  # a bound method of a module of the tree is inside
        self.closures: list[tuple[Any, Any]] = []  # (closure cell, its content)
        self._visiting: list[Any] = []

    def freeze(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return (kind, value)
        if kind is float:
            return (kind, value.hex())
        if kind is complex:
            return (kind, value.real.hex(), value.imag.hex())
        handler = _HANDLERS.get(kind)
        if handler is not None:
            return handler(self, value)
        return self._other(value)

    def _other(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tracer):
            raise TraceLeakError(
                explain(
                    f"kept a traced value in {self.where()}",
                    "it would outlive the function being traced",
                    "register it: self.register_buffer(name, array, persistent=False); or collect "
                    "outputs with nn.capture",
                )
            )
        if isinstance(value, jax.Array):
            return _freeze_jax_array(value)
        if isinstance(value, (Box, ModuleBase)):
            raise hidden_member(self.where(), value)
        if isinstance(value, np.generic):
            return (kind, value.tobytes())
        if isinstance(value, (enum.Enum, type)):
            return Identity(value)
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            # Subclasses (namedtuple, OrderedDict, defaultdict ...) keep their type in the key.
            base = next(t for t in (list, tuple, dict, set, frozenset) if isinstance(value, t))
            extra = (getattr(value, "default_factory", None),)
            return (kind, extra, _HANDLERS[base](self, value))
        if dataclasses.is_dataclass(value):
            if not kind.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
                self.mutable = True
            return self._nested(
                value,
                lambda: (
                    kind,
                    *(
                        (f.name, self.freeze(getattr(value, f.name, None)))
                        for f in dataclasses.fields(value)
                    ),
                ),
            )
        return Identity(value)

    def _nested(self, value: Any, body: Any) -> Any:
        # A container that holds itself is named by its depth instead of being entered again.
        for depth, outer in enumerate(self._visiting):
            if outer is value:
                return ("cycle", depth)
        self._visiting.append(value)
        try:
            return body()
        finally:
            self._visiting.pop()

    def _sequence(self, value: Any) -> Any:
        if isinstance(value, list):
            self.mutable = True
        tag = list if isinstance(value, list) else tuple
        return self._nested(value, lambda: (tag, *map(self.freeze, value)))

    def _dict(self, value: dict) -> Any:
        self.mutable = True
        return self._nested(
            value, lambda: (dict, *((self.freeze(k), self.freeze(v)) for k, v in value.items()))
        )

    def _set(self, value: Any) -> Any:
        if isinstance(value, set):
            self.mutable = True
        return (set, isinstance(value, frozenset), frozenset(map(self.freeze, value)))

    def _deque(self, value: collections.deque) -> Any:
        self.mutable = True
        return self._nested(
            value, lambda: (collections.deque, value.maxlen, *map(self.freeze, value))
        )

    def _bytearray(self, value: bytearray) -> Any:
        self.mutable = True
        return (bytearray, bytes(value))

    def _slice(self, value: slice) -> Any:
        return (slice, *map(self.freeze, (value.start, value.stop, value.step)))

    def _ndarray(self, value: np.ndarray) -> Any:
        self.mutable = True
        if value.dtype.hasobject:
            return (np.ndarray, value.shape, *map(self.freeze, value.ravel().tolist()))
        return (np.ndarray, value.shape, value.dtype.str, value.tobytes())

    def _function(self, value: types.FunctionType) -> Any:
        return self._nested(value, lambda: self._function_key(value))

    def _function_key(self, value: types.FunctionType) -> Any:
        contents = []
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a name that is not bound yet
                contents.append(("unbound",))
                continue
            self.closures.append((cell, content))
            contents.append(self._captured(content))
        return (
            types.FunctionType,
            value.__code__,
            Identity(value.__globals__),
            tuple(map(self._captured, value.__defaults__ or ())),
            tuple((k, self._captured(v)) for k, v in (value.__kwdefaults__ or {}).items()),
            tuple(contents),
        )

    def _captured(self, content: Any) -> Any:
        # What a function closes over is shared with the outside, so containers count by identity;
        # a module or parameter there would be invisible to everything that walks the tree.
        kind = type(content)
        if kind in _ATOMS or kind in (float, complex, types.FunctionType, functools.partial):
            return self.freeze(content)
        if kind is types.MethodType or isinstance(content, tuple):  # named tuples of functions too
            return self.freeze(content)
        hidden = find_hidden(content)
        if hidden is not None:
            self._refuse_captured(hidden)
        if isinstance(content, jax.Array) and not isinstance(content, Tracer):
            return _freeze_jax_array(content)
        return Identity(content)

    def _refuse_captured(self, member: Any) -> None:
        raise hidden_member(f"the closure of the function {self.where()}", member)

    def _partial(self, value: functools.partial) -> Any:
        return (
            functools.partial,
            self.freeze(value.func),
            tuple(map(self._captured, value.args)),
            tuple((k, self._captured(v)) for k, v in value.keywords.items()),
        )

    def _method(self, value: types.MethodType) -> Any:
        owner = value.__self__
        if isinstance(owner, ModuleBase):
            node = None if self.node_of is None else self.node_of(owner)
            if node is not None:
                self.rebinds = True
                return (types.MethodType, self.freeze(value.__func__), node)
            self._refuse_captured(owner)
        return (types.MethodType, self.freeze(value.__func__), Identity(owner))


class HookFreezer(Freezer):
    """Freezes hooks, which may close over modules: those compare by identity, as other objects do."""

    def _refuse_captured(self, member: Any) -> None:
        pass


_HANDLERS: dict[type, Any] = {
    list: Freezer._sequence,
    tuple: Freezer._sequence,
    dict: Freezer._dict,
    set: Freezer._set,
    frozenset: Freezer._set,
    slice: Freezer._slice,
    bytearray: Freezer._bytearray,
    collections.deque: Freezer._deque,
    np.ndarray: Freezer._ndarray,
    types.FunctionType: Freezer._function,
    types.MethodType: Freezer._method,
    functools.partial: Freezer._partial,
}


def _freeze_jax_array(value: jax.Array) -> Any:
    # By value, so that a rebuilt equal model shares compiled code; such arrays become constants.
    data = value
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        data = jax.random.key_data(value)
    host = np.asarray(data)
    return (jax.Array, str(value.dtype), value.weak_type, host.shape, host.tobytes())


def find_hidden(value: Any, depth: int = 0) -> Any:
    """Return a module or box that sits inside plain containers, None if there is none."""
    if isinstance(value, (ModuleBase, Box)):
        return value
    if depth < 8 and isinstance(value, CONTAINERS):
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        for item in items:
            found = find_hidden(item, depth + 1)
            if found is not None:
                return found
    return None


def hidden_member(where: str, value: Any) -> RegistrationError:
    """Build the error for a module or parameter that sits where nothing looks for it."""
    noun = "Module" if isinstance(value, ModuleBase) else type(value).__name__
    container = "nn.ModuleList or nn.ModuleDict" if noun == "Module" else "nn.ParameterList"
    return RegistrationError(
        explain(
            f"kept a {noun} in {where}",
            "it is not registered there: parameters(), state_dict() and compiled calls would miss it",
            f"use {container}, or assign it to an attribute of its own; if it belongs to another "
            "module and is only referred to, self.name = nn.Ref(value)",
        )
    )


class BoundMethod:
    """Stands for a bound method of a module of the tree in stored attributes."""

    __slots__ = ("function", "node")

    def __init__(self, node: int, function: Any) -> None:
        self.node = node
        self.function = function


def copied(value: Any, leaf: Any) -> Any:
    """Copy the containers and numpy arrays in a static attribute.

    Args:
        value: the attribute.
        leaf: what to do with everything that is no container; bound methods are exchanged there.
    """
    kind = type(value)
    if kind in (list, set, tuple):
        return kind(copied(v, leaf) for v in value)
    if kind is dict:
        return {k: copied(v, leaf) for k, v in value.items()}
    if kind is np.ndarray or kind is bytearray:
        return value.copy()
    if kind is collections.deque:
        return collections.deque((copied(v, leaf) for v in value), value.maxlen)
    if isinstance(value, (list, dict, set)):
        new = copy.copy(value)
        if isinstance(new, list):
            new[:] = (copied(v, leaf) for v in new)
        elif isinstance(new, dict):
            for k in list(new):
                new[k] = copied(new[k], leaf)
        return new
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for f in dataclasses.fields(new):
            if hasattr(new, f.name):
                object.__setattr__(new, f.name, copied(getattr(new, f.name), leaf))
        return new
    return leaf(value)
