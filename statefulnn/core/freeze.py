"""Static attributes: how they are compared, watched and copied.

`freeze` turns any Python value into a hashable key such that equal keys mean "compiled code may be
shared": 1, True and 1.0 differ, 0.0 and -0.0 differ, functions compare by code, globals, defaults and
closure; containers, numpy arrays and plain objects by content. What nobody changes in place (types,
objects of JAX and numpy) compares by identity, and so does what cannot be looked into, which is reported.

What can change in place is noted in a `Watch`, which is compared before each compiled call. Objects are
read through the descriptors of their classes: no code of the user's runs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import gc
import itertools
import operator
import pathlib
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.compat import Tracer
from statefulnn.core.errors import RegistrationError, TraceLeakError, explain
from statefulnn.core.scope import ModuleBase


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
# The same with the classes whose copies need their own methods, special ones first.
_BASES = (collections.OrderedDict, collections.defaultdict, *CONTAINERS)
# Objects that are containers by another name: a member in one of them is refused as well.
_NAMESPACES = (
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
)

_ATOMS = frozenset(
    {str, bytes, bool, int, type(None), type(...), type(NotImplemented), range, type}
    | {jax.tree_util.PyTreeDef}
)

# What nobody changes in place, by the package of its class, by its class, by a base of its class.
_VALUE_PACKAGES = frozenset(
    "jax jaxlib numpy ml_dtypes optax statefulnn typing enum re pathlib datetime decimal fractions uuid "
    "operator functools logging weakref inspect ipaddress zoneinfo".split()
)
_VALUE_TYPES = frozenset(
    {object, property, staticmethod, classmethod, types.CodeType, types.GenericAlias}
    | {types.UnionType, types.BuiltinFunctionType, types.WrapperDescriptorType}
    | {types.MethodDescriptorType, types.ClassMethodDescriptorType, types.MethodWrapperType}
    | {types.GetSetDescriptorType, types.MemberDescriptorType}
)
_VALUE_BASES = (type, types.ModuleType, enum.Enum, pathlib.PurePath)

# A plain object that holds more than this is a program's, not a model's: it compares by identity.
_MEMBERS, _DEPTH, _BYTES = 1000, 8, 1 << 20

# Read around metaclasses, which may be the user's.
mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
class_dict: Callable[[type], types.MappingProxyType[str, Any]] = type.__dict__["__dict__"].__get__
_module_of: Callable[[type], object] = type.__dict__["__module__"].__get__
code_of = operator.attrgetter("__code__")
_content = operator.attrgetter("cell_contents")


def package_of(cls: type) -> str:
    """Return the name of the package that a class is from."""
    return str(_module_of(cls)).partition(".")[0]


class Watch:
    """What can change in place without a stamp, each once, and what was in it when it was frozen.

    Members are compared by identity, at the speed of C; whoever finds another one freezes again and
    compares by value.
    """

    __slots__ = ("_notes", "_sealed")

    # Between what several containers hold, so that no member can move from one to the next unseen.
    _END = (object(),)

    def __init__(self) -> None:
        self._notes: dict[tuple[str, Callable, int], tuple[Any, Any]] = {}
        self._sealed: list[tuple[str, Callable, tuple, tuple]] | None = None

    def __bool__(self) -> bool:
        return bool(self._notes)

    def note(self, what: str, read: Callable, subject: Any, held: Any, key: Any = None) -> None:
        """Note a subject; the first note counts, since something was frozen by then.

        Args:
            what: what `read` gives: "members" (an iterable of them), "one" member, or "bytes".
            read: reads the subject.
            subject: a container, a function, a closure cell ...
            held: what was read.
            key: the object by which the subject is known, if not itself.
        """
        self._sealed = None
        self._notes.setdefault((what, read, id(subject if key is None else key)), (subject, held))

    def add(self, other: Watch) -> None:
        """Take over the notes of another watch."""
        self._sealed = None
        for key, note in other._notes.items():
            self._notes.setdefault(key, note)

    def unchanged(self) -> bool:
        """Say whether everything still holds what it held."""
        sealed = self._sealed
        if sealed is None:
            sealed = self._seal()
        try:
            for what, read, subjects, held in sealed:
                now = map(read, subjects)
                if what == "members":
                    now = itertools.chain.from_iterable(
                        itertools.chain.from_iterable(zip(now, itertools.repeat(self._END)))
                    )
                if not all(map(operator.eq if what == "bytes" else operator.is_, now, held)):
                    return False
        except (RuntimeError, ValueError):  # another thread adds members; a cell was emptied
            return False
        return True

    def _seal(self) -> list[tuple[str, Callable, tuple, tuple]]:
        groups: dict[tuple[str, Callable], list[tuple[Any, Any]]] = {}
        for (what, read, _), note in self._notes.items():
            groups.setdefault((what, read), []).append(note)
        sealed = []
        for (what, read), notes in groups.items():
            subjects, held = zip(*notes, strict=True)
            if what == "members":
                held = tuple(itertools.chain(*((*members, *self._END) for members in held)))
            sealed.append((what, read, subjects, held))
        self._sealed = sealed
        return sealed


class _Layout(NamedTuple):
    """Where the instances of a class keep their attributes."""

    base: (
        type | None
    )  # whose __new__ makes a plain one; None if Python cannot see all that they hold
    holder: Any  # the descriptor of __dict__, None if they have none
    slots: tuple[tuple[str, types.MemberDescriptorType], ...]
    derived: frozenset[str]  # names of cached properties, which follow from the others
    is_open: bool  # whether a member in them counts as one in a dict
    fields: frozenset[str] | None  # of a frozen dataclass, which promises to stay as it is


def _layout(cls: type) -> _Layout:
    found: dict[str, Any] = {}
    slots = []
    for owner in mro_of(cls):
        for name, value in class_dict(owner).items():
            found.setdefault(name, value)
            if type(value) is types.MemberDescriptorType and name != "__dict__":
                slots.append((name, value))
    dataclass = "__dataclass_fields__" in found
    frozen = dataclass and found["__dataclass_params__"].frozen
    holder = found.get("__dict__")
    kinds = (types.GetSetDescriptorType, types.MemberDescriptorType)
    readable = holder is None or type(holder) in kinds
    return _Layout(
        _plain_base(cls, len(slots)) if readable and "__del__" not in found else None,
        holder if readable else None,
        tuple(slots),
        frozenset(n for n, v in found.items() if type(v) is functools.cached_property),
        dataclass or issubclass(cls, _NAMESPACES),
        frozenset(found["__dataclass_fields__"]) if frozen else None,
    )


def _plain_base(cls: type, slots: int) -> type | None:
    base = types.SimpleNamespace if issubclass(cls, types.SimpleNamespace) else object
    try:
        base.__new__(cls)
    except TypeError:  # a class written in C
        return None
    # What is larger than its slots, __dict__ and __weakref__ has fields that only C can read.
    word = object.__basicsize__ // 2
    return None if cls.__basicsize__ > base.__basicsize__ + word * (slots + 2) else base


_UNSET = Identity("not set")


def _slots(value: Any) -> tuple[Any, ...]:
    return tuple(_slot(value, member) for _, member in _layout(type(value)).slots)


def _slot(value: Any, member: types.MemberDescriptorType) -> Any:
    try:
        return member.__get__(value)
    except AttributeError:
        return _UNSET


def _closure(function: types.FunctionType) -> Iterator[tuple[types.CellType, Any]]:
    for cell in function.__closure__ or ():
        try:
            yield cell, cell.cell_contents
        except ValueError:  # a name that is not bound yet
            yield cell, _UNSET


def _flat(value: np.ndarray) -> list[Any]:
    return value.ravel().tolist()


def _array_key(value: np.ndarray) -> tuple:
    return (value.shape, value.dtype, value.tobytes())


def _is_value(kind: type) -> bool:
    return (
        kind in _VALUE_TYPES
        or issubclass(kind, _VALUE_BASES)
        or package_of(kind) in _VALUE_PACKAGES
    )


class _CannotFreeze(Exception):
    """Raised inside of a plain object that cannot be frozen by value; says why."""


class Freezer:
    """Freezes one attribute of a module; collects what has to be watched.

    Args:
        where: gives the name of the attribute being frozen, for messages.
        node_of: gives the number of a module of the same tree, None for any other: a bound method of
            such a module is followed to its clone.
        unwatched: whether somebody promises that nothing in it changes: all of it compares by value.
    """

    def __init__(
        self,
        where: Callable[[], str] | None = None,
        node_of: Callable[[Any], int | None] | None = None,
        unwatched: bool = False,
    ) -> None:
        self.where = where or (lambda: "an attribute")
        self.node_of = node_of
        self.unwatched = unwatched
        self.watch = Watch()
        self.mutable = False
        self.rebinds = False  # a bound method of a module of the tree is inside
        self.objects: dict[int, Any] = {}  # plain objects that compare by value: clones get copies
        self.unseen: list[
            tuple[type, str]
        ] = []  # classes whose instances may change unseen, and why
        self._visiting: list[Any] = []
        self._deepest: int | None = None  # inside of a plain object: how deep it may go
        self._room = 0  # and how many more members it may have
        self._in_key = False

    def freeze(self, value: Any) -> Hashable:
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

    def _other(self, value: Any) -> Hashable:
        # Asked of the class throughout: isinstance() would run a property __class__ of the user's.
        kind = type(value)
        if issubclass(kind, Tracer):
            raise TraceLeakError(
                explain(
                    f"kept a traced value in {self.where()}",
                    "it would outlive the function being traced",
                    "register it: self.register_buffer(name, array, persistent=False); or collect "
                    "outputs with nn.capture",
                )
            )
        if issubclass(kind, jax.Array):
            return self._jax_array(value)
        if issubclass(kind, (Box, ModuleBase)):
            raise hidden_member(self.where(), value)
        if issubclass(kind, np.generic):
            return (kind, value.tobytes())
        if issubclass(kind, functools.partial):
            return (kind, self._partial(value))
        if issubclass(kind, CONTAINERS):
            return self._container(value)
        if package_of(kind) == "optax" and self.unwatched:
            return self._object(value)
        if _is_value(kind):
            return self._identity(value)
        return self._object(value)

    def _container(self, value: Any) -> Hashable:
        # Subclasses (namedtuple, OrderedDict, defaultdict ...) keep their type in the key.
        kind = type(value)
        base = next(b for b in CONTAINERS if issubclass(kind, b))
        key = _HANDLERS[base](self, value)
        if issubclass(kind, collections.OrderedDict):  # it has an order of its own
            order = tuple(collections.OrderedDict.keys(value))
            self._changes("members", collections.OrderedDict.keys, value, order)
            key = (key, tuple(map(self._key, order)))
        return (kind, key, self._attributes(value, _layout(kind), ()))

    def _identity(self, value: Any) -> Hashable:
        hidden = _in_callable(value)
        if hidden is not None:
            raise RegistrationError(
                explain(
                    f"kept a compiled function of a {type(hidden).__name__} in {self.where()}",
                    "what it calls is not registered there: parameters(), state_dict() and compiled "
                    "calls would miss it, and the function would go on with old values",
                    "assign the layer, self.layer = layer, and compile the whole model, nn.jit(model); "
                    "or call nn.jit(self.layer) outside",
                )
            )
        return Identity(value)

    def _nested(self, value: Any, tag: tuple, members: tuple) -> Hashable:
        # A container that holds itself is named by its depth instead of being entered again.
        for depth, outer in enumerate(self._visiting):
            if outer is value:
                return ("cycle", depth)
        self._charge(len(members))
        self._visiting.append(value)
        try:
            return (*tag, *map(self.freeze, members))
        finally:
            self._visiting.pop()

    def _charge(self, members: int) -> None:
        self._room -= members
        if self._deepest is not None:
            if self._room < 0:
                raise _CannotFreeze(f"it holds more than {_MEMBERS} objects, or large arrays")
            if len(self._visiting) > self._deepest:
                raise _CannotFreeze(f"it is nested deeper than {_DEPTH} levels")

    def _key(self, key: Any) -> Hashable:
        # Clones share the keys of dicts and the members of sets: there an object is its identity.
        before, self._in_key = self._in_key, True
        try:
            return self.freeze(key)
        finally:
            self._in_key = before

    def _changes(self, what: str, read: Callable, subject: Any, held: Any) -> None:
        if not self.unwatched:
            self.watch.note(what, read, subject, held)

    def _sequence(self, value: Any) -> Hashable:
        base = next(b for b in (list, tuple, collections.deque) if issubclass(type(value), b))
        members = tuple(base.__iter__(value))
        if base is not tuple:
            self.mutable = True
            self._changes("members", base.__iter__, value, members)
        limit = (_maxlen(value),) if base is collections.deque else ()
        return self._nested(value, (base, *limit), members)

    def _dict(self, value: dict) -> Hashable:
        self.mutable = True
        items = tuple(dict.items(value))
        self._changes("members", dict.keys, value, tuple(k for k, _ in items))
        self._changes("members", dict.values, value, tuple(v for _, v in items))
        keys = (self._key(k) for k, _ in items)
        return self._nested(value, (dict, *keys), tuple(v for _, v in items))

    def _set(self, value: Any) -> Hashable:
        base = set if issubclass(type(value), set) else frozenset
        members = tuple(base.__iter__(value))
        if base is set:
            self.mutable = True
            self._changes("members", base.__iter__, value, members)
        self._charge(len(members))
        return (set, base is frozenset, frozenset(map(self._key, members)))

    def _mapping_proxy(self, value: types.MappingProxyType) -> Hashable:
        return (types.MappingProxyType, self.freeze(_behind(value)))

    def _bytearray(self, value: bytearray) -> Hashable:
        self.mutable = True
        content = bytes(value)
        self._changes("bytes", bytes, value, content)
        return (bytearray, content)

    def _slice(self, value: slice) -> Hashable:
        return (slice, *map(self.freeze, (value.start, value.stop, value.step)))

    def _ndarray(self, value: np.ndarray) -> Hashable:
        self.mutable = True
        self._charge(value.nbytes * _MEMBERS // _BYTES)
        if value.dtype.hasobject:
            members = tuple(_flat(value))
            self._changes("members", _flat, value, members)
            return self._nested(value, (np.ndarray, value.shape), members)
        key = _array_key(value)
        self._changes("bytes", _array_key, value, key)
        return (np.ndarray, key)

    def _jax_array(self, value: jax.Array) -> Hashable:
        # By value, so that a rebuilt equal model shares compiled code; such arrays become constants.
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.extended)
        data = jax.random.key_data(value) if is_key else value
        self._charge(data.nbytes * _MEMBERS // _BYTES)
        host = np.asarray(data)
        weak = not is_key and value.weak_type
        return (jax.Array, str(value.dtype), weak, host.shape, host.tobytes())

    def _object(self, value: Any) -> Hashable:
        kind = type(value)
        layout = _layout(kind)
        if layout.base is None:
            return self._unseen(value, "Python cannot read all that it holds")
        if self._in_key and layout.fields is None:
            return Identity(value)
        if layout.is_open or self._deepest is not None:
            return self._members(value, layout)
        # Plain objects may be anything, a trainer with the model in it: then all of it is left alone.
        before = self.watch, self.objects, self.mutable, self.rebinds
        self.watch, self.objects = Watch(), dict(self.objects)
        self._deepest, self._room = len(self._visiting) + _DEPTH, _MEMBERS
        why = ""
        try:
            key = self._members(value, layout)
        except _CannotFreeze as error:
            why = str(error)
        except RegistrationError:
            why = "it refers to a module or parameter"
        self._deepest = None
        if why:
            self.watch, self.objects, self.mutable, self.rebinds = before
            return self._unseen(value, why)
        before[0].add(self.watch)
        self.watch = before[0]
        return key

    def _members(self, value: Any, layout: _Layout) -> Hashable:
        kind = type(value)
        if layout.fields is None:
            self._changes("one", type, value, kind)
        key = self._attributes(value, layout, (kind,))
        if key == (kind, ()) and not layout.is_open:
            return Identity(value)  # what has no content stands for itself: a marker
        if not self.unwatched:
            self.objects[id(value)] = value
            self.mutable = self.mutable or layout.fields is None
        return key

    def _attributes(self, value: Any, layout: _Layout, tag: tuple) -> Hashable:
        members: list[tuple[Any, Any]] = []
        note = self._changes if layout.fields is None else lambda *_: None
        if layout.holder is not None:
            read = layout.holder.__get__
            held = read(value)
            if held is not value:  # a dict may be its own __dict__
                note("one", read, value, held)
                members += dict.items(held)
                note("members", dict.keys, held, tuple(n for n, _ in members))
                note("members", dict.values, held, tuple(v for _, v in members))
        if layout.slots:
            slots = _slots(value)
            note("members", _slots, value, slots)
            members += [(n, v) for (n, _), v in zip(layout.slots, slots, strict=True)]
        members = [
            (n, v)
            for n, v in members
            if n not in layout.derived and (layout.fields is None or n in layout.fields)
        ]
        names = tuple(self._key(n) for n, _ in members)
        # A container is visited already; its attributes are known by another object.
        return self._nested(value if tag else members, (*tag, names), tuple(v for _, v in members))

    def _unseen(self, value: Any, why: str) -> Hashable:
        if self._deepest is not None:
            raise _CannotFreeze(f"it holds an object of type {type(value).__name__}")
        self.unseen.append((type(value), why))
        return Identity(value)

    def _function(self, value: types.FunctionType) -> Hashable:
        for depth, outer in enumerate(self._visiting):
            if outer is value:
                return ("cycle", depth)
        self._visiting.append(value)
        try:
            return self._function_key(value)
        finally:
            self._visiting.pop()

    def _function_key(self, value: types.FunctionType) -> Hashable:
        contents = []
        for cell, content in _closure(value):
            if content is not _UNSET:
                self._changes("one", _content, cell, content)
            contents.append(self._captured(content))
        code = value.__code__
        if str(value.__globals__.get("__name__")).partition(".")[0] not in _VALUE_PACKAGES:
            self._changes(
                "one", code_of, value, code
            )  # tools that reload a file put another one in
        return (
            types.FunctionType,
            code,
            Identity(value.__globals__),
            tuple(map(self._captured, value.__defaults__ or ())),
            tuple((k, self._captured(v)) for k, v in (value.__kwdefaults__ or {}).items()),
            tuple(contents),
        )

    def _captured(self, content: Any) -> Hashable:
        # A module or parameter here would be invisible to everything that walks the tree.
        kind = type(content)
        if (
            kind in _ATOMS or kind in _FUNCTIONS or issubclass(kind, tuple)
        ):  # named tuples of functions
            return self.freeze(content)
        hidden = find_hidden(content)
        if hidden is not None:
            self._refuse_captured(hidden)
            return Identity(content)
        return self._shared(content)

    def _shared(self, content: Any) -> Hashable:
        # Clones use the function, and what it refers to, of the original: what can change there is
        # this one object. Where nobody changes it, its content is enough.
        before, self.mutable = self.mutable, False
        key = self.freeze(content)
        changes, self.mutable = self.mutable, before
        if self.unwatched or not changes:
            return key
        self.mutable = True
        return (Identity(content), key)

    def _refuse_captured(self, member: Any) -> None:
        raise hidden_member(f"the closure of the function {self.where()}", member)

    def _partial(self, value: functools.partial) -> Hashable:
        function, args, keywords = _parts(value)
        return (
            functools.partial,
            self.freeze(function),
            tuple(map(self._captured, args)),
            tuple((k, self._captured(v)) for k, v in keywords.items()),
        )

    def _method(self, value: types.MethodType) -> Hashable:
        owner, function = value.__self__, value.__func__
        if issubclass(type(owner), ModuleBase):
            node = None if self.node_of is None else self.node_of(owner)
            if node is not None:
                self.rebinds = True
                return (types.MethodType, self.freeze(function), node)
        return (types.MethodType, self.freeze(function), self._captured(owner))

    def _builtin(self, value: types.BuiltinFunctionType) -> Hashable:
        owner = value.__self__
        if owner is None or _is_value(type(owner)):
            return Identity(value)
        return (type(value), value.__name__, self._captured(owner))  # such as the `get` of a dict


class HookFreezer(Freezer):
    """Freezes hooks, which close over modules and collect things: both compare by identity."""

    def _refuse_captured(self, member: Any) -> None:
        pass

    def _shared(self, content: Any) -> Hashable:
        return Identity(content)

    _object = _identity = _shared


_FUNCTIONS = (float, complex, types.FunctionType, types.MethodType, functools.partial)

_HANDLERS: dict[type, Callable[[Freezer, Any], Hashable]] = {
    list: Freezer._sequence,
    tuple: Freezer._sequence,
    dict: Freezer._dict,
    set: Freezer._set,
    frozenset: Freezer._set,
    slice: Freezer._slice,
    bytearray: Freezer._bytearray,
    collections.deque: Freezer._sequence,
    types.MappingProxyType: Freezer._mapping_proxy,
    np.ndarray: Freezer._ndarray,
    types.FunctionType: Freezer._function,
    types.MethodType: Freezer._method,
    types.BuiltinFunctionType: Freezer._builtin,
    types.MethodWrapperType: Freezer._builtin,
    functools.partial: Freezer._partial,
}

_maxlen = collections.deque.__dict__["maxlen"].__get__


def _behind(proxy: types.MappingProxyType) -> Any:
    return gc.get_referents(proxy)[0]


def _parts(value: functools.partial) -> tuple[Any, tuple, dict[str, Any]]:
    # A subclass may have a property of that name.
    read = functools.partial.__dict__
    return tuple(read[name].__get__(value) for name in ("func", "args", "keywords"))  # pyright: ignore


def _elements(container: Any) -> Iterator[Any]:
    base = next(b for b in CONTAINERS if issubclass(type(container), b))
    if base is dict:
        return itertools.chain(dict.keys(container), dict.values(container))
    return base.__iter__(container)


def find_hidden(value: Any, depth: int = 0) -> Any:
    """Return a module or box that sits inside plain containers, None if there is none."""
    if issubclass(type(value), (ModuleBase, Box)):
        return value
    if depth < 8 and issubclass(type(value), CONTAINERS):
        for item in _elements(value):
            found = find_hidden(item, depth + 1)
            if found is not None:
                return found
    return None


def _in_callable(value: Any, depth: int = 0) -> Any:
    """Return a module or box that a compiled function calls, None if there is none."""
    kind = type(value)
    if depth == 8 or issubclass(kind, (ModuleBase, Box)):
        return None if depth == 8 else value
    parts: list[Any] = []
    if kind is types.FunctionType:
        parts = [*(content for _, content in _closure(value)), *(value.__defaults__ or ())]
    elif kind is types.MethodType:
        parts = [value.__self__, value.__func__]
    elif issubclass(kind, functools.partial):
        function, args, keywords = _parts(value)
        parts = [function, *args, *keywords.values()]
    elif issubclass(kind, CONTAINERS):
        return find_hidden(value, depth)
    elif package_of(kind) in _VALUE_PACKAGES and not issubclass(kind, type):
        for name in ("_owner", "__wrapped__"):
            try:
                parts.append(object.__getattribute__(value, name))
            except AttributeError:
                continue
    return next((f for f in (_in_callable(p, depth + 1) for p in parts) if f is not None), None)


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


def copied(
    value: Any,
    leaf: Callable[[Any], Any],
    objects: dict[int, Any] | None = None,
    memo: dict[int, Any] | None = None,
) -> Any:
    """Copy the containers, plain objects and numpy arrays in a static attribute.

    Args:
        value: the attribute.
        leaf: what to do with everything else; bound methods are exchanged there.
        objects: for the copy that is stored, the plain objects that compare by value. Others are put
            into an `Identity` there, and come out of it when the stored copy is copied.
        memo: what has been copied so far.
    """
    memo = {} if memo is None else memo
    kind = type(value)
    if kind in _ATOMS or id(value) in memo:
        return memo.get(id(value), value)
    if kind is Identity:
        return value.obj
    again = functools.partial(copied, leaf=leaf, objects=objects, memo=memo)
    if issubclass(kind, CONTAINERS):
        return _copied_container(value, again, leaf, memo)
    if kind is types.MappingProxyType:
        return types.MappingProxyType(again(_behind(value)))
    if kind is bytearray or kind is np.ndarray:
        memo[id(value)] = new = value.copy()
        if kind is np.ndarray and value.dtype.hasobject:
            for i, element in enumerate(_flat(value)):
                new.reshape(-1)[i] = again(element)
        return new
    layout = None if _is_value(kind) else _layout(kind)
    if layout is None or layout.base is None:
        return leaf(value)
    if objects is not None and id(value) not in objects:
        return Identity(value)
    memo[id(value)] = new = layout.base.__new__(kind)
    _copy_attributes(value, new, layout, again)
    return new


def _copied_container(
    value: Any, again: Callable[[Any], Any], leaf: Callable[[Any], Any], memo: dict[int, Any]
) -> Any:
    # By the methods of the base class, since a subclass may have others of that name.
    kind = type(value)
    base = next(b for b in _BASES if issubclass(kind, b))
    if base is frozenset:
        return leaf(value)
    if base is tuple:
        new = tuple.__new__(kind, [again(v) for v in tuple.__iter__(value)])
    else:
        memo[id(value)] = new = base.__new__(kind)
        if issubclass(base, dict):
            for key in base.keys(value):
                base.__setitem__(new, key, again(dict.__getitem__(value, key)))
        elif base is set:
            members = [leaf(v) for v in set.__iter__(value)]
            same = all(map(operator.is_, members, set.__iter__(value)))
            set.update(new, value if same else members)  # the former hashes nothing again
        else:
            if base is collections.deque:
                base.__init__(new, (), _maxlen(value))
            base.extend(new, [again(v) for v in base.__iter__(value)])
    if kind not in CONTAINERS:
        _copy_attributes(value, new, _layout(kind), again)
    return new


def _copy_attributes(value: Any, new: Any, layout: _Layout, again: Callable[[Any], Any]) -> None:
    if layout.holder is not None:
        held = layout.holder.__get__(value)
        if held is value:
            layout.holder.__set__(new, new)
        else:
            layout.holder.__get__(new).update(
                {n: again(v) for n, v in dict.items(held) if n not in layout.derived}
            )
    for _, member in layout.slots:
        content = _slot(value, member)
        if content is not _UNSET:
            member.__set__(new, again(content))
