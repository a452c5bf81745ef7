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
import contextlib
import enum
import functools
import gc
import itertools
import operator
import pathlib
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import RegistrationError, TraceLeakError, explain
from statefulnn.core.ownership import ModuleBase


class Identity:
    """A key that is equal only for the same object; keeps the object alive."""

    __slots__ = ("__weakref__", "obj")

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
    "jax jaxlib numpy ml_dtypes optax statefulnn typing enum re pathlib datetime decimal fractions "
    "uuid operator functools logging weakref inspect ipaddress zoneinfo".split()
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
_maxlen: Callable[[Any], int | None] = collections.deque.__dict__["maxlen"].__get__
code_of = operator.attrgetter("__code__")
_content = operator.attrgetter("cell_contents")


def package_of(cls: type) -> str:
    """Return the name of the package that a class is from."""
    return str(_module_of(cls)).partition(".")[0]


def _is_value(kind: type) -> bool:
    if kind in _VALUE_TYPES or issubclass(kind, _VALUE_BASES):
        return True
    return package_of(kind) in _VALUE_PACKAGES and not hasattr(kind, "__dataclass_fields__")


class Watch:
    """What can change in place without a stamp, each once, and what was in it when it was frozen.

    Members are compared by identity, at the speed of C; whoever finds another one freezes again and
    compares by value.
    """

    __slots__ = ("_notes", "_sealed")

    # Between what several containers hold, so that no member can move from one to the next unseen.
    _END = (object(),)

    def __init__(self) -> None:
        self._notes: dict[tuple[Any, Hashable], tuple[Any, Any]] = {}
        self._sealed: tuple[list, list, list, list, list] | None = None

    def __bool__(self) -> bool:
        return bool(self._notes)

    def note(self, read: Callable | None, subject: Any, held: Any, key: Hashable = None) -> None:
        """Note a subject; the first note counts, since something was frozen by then.

        Args:
            read: reads the one object in the subject. None: the subject is a tuple of iterables;
                `dict`: it is a mapping of names to things whose equality is good enough.
            subject: views of a container, a function, a closure cell ...
            held: what was read; a `_Copy` compares by equality, everything else by identity.
            key: by what the subject is known, if not by its own identity.
        """
        self._sealed = None
        self._notes.setdefault((read, id(subject) if key is None else key), (subject, held))

    def add(self, other: Watch) -> None:
        """Take over the notes of another watch."""
        self._sealed = None
        for key, note in other._notes.items():
            self._notes.setdefault(key, note)

    def unchanged(self) -> bool:
        """Say whether everything still holds what it held."""
        singles, subjects, copies, views, held = self._sealed or self._seal()
        try:
            for read, subject, was in singles:
                now = read(subject)
                if now is not was and (type(was) is not _Copy or was.content != now):
                    return False
            if subjects != copies:
                return False
            return not views or all(map(operator.is_, itertools.chain.from_iterable(views), held))
        except Exception:  # a thread adds members, a cell was emptied, a new value will not compare
            return False

    def _seal(self) -> tuple[list, list, list, list, list]:
        self._sealed = singles, subjects, copies, views, held = [], [], [], [], []
        for (read, _), (subject, was) in self._notes.items():
            if read is dict:
                subjects.append(subject)
                copies.append(was)
            elif read is not None:
                singles.append((read, subject, was))
            else:
                for view, members in zip(subject, was, strict=True):
                    views += (view, self._END)
                    held += (*members, *self._END)
        return self._sealed


class _Copy:
    """What was in memory that Python does not see as objects: compared by its content."""

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


class _View:
    """What is read of an object, as an iterable."""

    __slots__ = ("read", "subject")

    def __init__(self, read: Callable[[Any], Any], subject: Any) -> None:
        self.read, self.subject = read, subject

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read(self.subject))


class _Layout:
    """Where the instances of a class keep their attributes.

    Attributes:
        base: whose ``__new__`` makes one, None if Python may not do it, or not see all of it.
        holder: the descriptor of ``__dict__``, None if there is none.
        slots: the other descriptors, by name.
        derived: names of cached properties, which follow from the other attributes.
        is_open: whether a module in one counts as in a dict.
        fields: those of a frozen dataclass, which promises to stay as it is.
    """

    def __init__(self, cls: type) -> None:
        found: dict[str, Any] = {}
        for owner in mro_of(cls):
            found = {**class_dict(owner), **found}
        member = types.MemberDescriptorType
        self.slots = {n: v for n, v in found.items() if type(v) is member and n != "__dict__"}
        self.derived = {n for n, v in found.items() if type(v) is functools.cached_property}
        dataclass = "__dataclass_fields__" in found
        frozen = dataclass and found["__dataclass_params__"].frozen
        self.fields = set(found["__dataclass_fields__"]) if frozen else None
        self.is_open = dataclass or issubclass(cls, _NAMESPACES)
        self.holder: Any = found.get("__dict__")
        if type(self.holder) not in (member, types.GetSetDescriptorType):
            self.holder = None
        self.base: Any = types.SimpleNamespace if issubclass(cls, types.SimpleNamespace) else object
        try:
            # A copy would be finalised as well; a property of that name hides the attributes.
            if "__del__" in found or (self.holder is None and "__dict__" in found):
                raise TypeError
            self.base.__new__(cls)
        except TypeError:  # which a class written in C raises
            self.base = None


_layout: Callable[[type], _Layout] = functools.lru_cache(256)(_Layout)
_UNSET = Identity("not set")


def _state(value: Any) -> tuple[Any, ...]:
    """Return the class of an object, its ``__dict__`` and what is in its slots."""
    layout = _layout(type(value))
    held = None if layout.holder is None else layout.holder.__get__(value)
    return (type(value), held, *(_slot(value, s) for s in layout.slots.values()))


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


class _SharedState:
    """A key for an object that a function refers to, and for its content.

    What changes while somebody traces is the same content still: functions may count their traces, or
    collect shapes. What changes between two calls is another one.
    """

    __slots__ = ("__weakref__", "content", "obj")

    def __init__(self, obj: Any, content: Hashable) -> None:
        self.obj = obj
        self.content = content


_states: weakref.WeakValueDictionary[int, _SharedState] = weakref.WeakValueDictionary()


class _CannotFreeze(Exception):
    """Raised inside of a plain object that cannot be frozen by value; says why."""


class Freezer:
    """Freezes one attribute of a module; collects what has to be watched.

    Args:
        where: gives the name of the attribute being frozen, for messages.
        node_of: gives the number of a module of the same tree, None for any other: a bound method of
            such a module is followed to its clone.
        unwatched: whether somebody promises that nothing in it changes: all of it compares by value.
        of_clone: whether the module is a clone.
    """

    def __init__(
        self,
        where: Callable[[], str] | None = None,
        node_of: Callable[[Any], int | None] | None = None,
        unwatched: bool = False,
        of_clone: bool = False,
    ) -> None:
        self.where = where or (lambda: "an attribute")
        self.node_of = node_of
        self.unwatched = unwatched
        self.of_clone = of_clone
        self.watch = Watch()
        self.mutable = False
        self.rebinds = False  # a bound method of a module of the tree is inside
        self.objects: dict[int, Any] = {}  # plain objects that compare by value: clones get copies
        self.unseen: list[tuple[type, str]] = []  # whose instances may change unseen, and why
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
            return (kind, value.dtype, value.tobytes())
        if issubclass(kind, functools.partial):
            return (kind, self._partial(value))
        if issubclass(kind, CONTAINERS):
            return self._container(value)
        if _is_value(kind) and not (self.unwatched and package_of(kind) == "optax"):
            return self._identity(value)
        return self._object(value)

    def _identity(self, value: Any) -> Hashable:
        # A compiled function calls what it was made of, and goes on with the old values of that.
        for name in ("owner", "__wrapped__"):
            with contextlib.suppress(AttributeError):
                self._compiled(object.__getattribute__(value, name))
        return Identity(value)

    def _compiled(self, inner: Any) -> None:
        try:
            if issubclass(type(inner), ModuleBase):
                raise hidden_member(self.where(), inner)
            if type(inner) in _FUNCTIONS:
                Freezer(self.where, None, True).freeze(inner)
        except RegistrationError:
            raise RegistrationError(
                explain(
                    f"kept a compiled function of a module in {self.where()}",
                    "the module is not registered there: parameters(), state_dict() and compiled "
                    "calls would miss it, and the function may go on with old values",
                    "assign the layer, self.layer = layer, and compile the whole model, "
                    "nn.jit(model); or call nn.jit(self.layer) outside",
                )
            ) from None

    def _nested(self, value: Any, tag: tuple, members: tuple, freeze: Any = None) -> Hashable:
        # A container that holds itself is named by its depth instead of being entered again.
        for depth, outer in enumerate(self._visiting):
            if outer is value:
                return ("cycle", depth)
        self._charge(len(members))
        self._visiting.append(value)
        try:
            return (*tag, *map(freeze or self.freeze, members))
        finally:
            self._visiting.pop()

    def _charge(self, members: int) -> None:
        self._room -= members
        if self._deepest is not None:
            if self._room < 0:
                raise _CannotFreeze(f"it holds more than {_MEMBERS} objects, or large arrays")
            if len(self._visiting) > self._deepest:
                raise _CannotFreeze(f"it is nested deeper than {_DEPTH} levels")

    def _keys(self, keys: tuple) -> tuple[Hashable, ...]:
        # Clones share the keys of dicts and the members of sets: there an object is its identity.
        before, self._in_key = self._in_key, True
        try:
            return tuple(map(self.freeze, keys))
        finally:
            self._in_key = before

    def _note(self, read: Callable | None, subject: Any, held: Any, key: Hashable = None) -> None:
        if not self.unwatched:
            self.watch.note(read, subject, held, key)

    def _container(self, value: Any) -> Hashable:
        # Read by the methods of the base class, since a subclass may have others of that name.
        kind = type(value)
        base = next(b for b in CONTAINERS if issubclass(kind, b))
        keys, members, extra = (), (), ()
        if base is dict:
            items = tuple(dict.items(value))  # read once, so that the key and the watch agree
            keys, members = tuple(k for k, _ in items), tuple(v for _, v in items)
            views, held = (dict.keys(value), dict.values(value)), (keys, members)
            if issubclass(kind, collections.OrderedDict):  # it has an order of its own
                views = (collections.OrderedDict.keys(value), views[1])
                keys, by_key = tuple(views[0]), {id(k): v for k, v in items}
                held, members = (keys, members), tuple(by_key.get(id(k)) for k in keys)
        else:
            members = tuple(base.__iter__(value))
            views, held = (value if kind is base else _View(base.__iter__, value),), (members,)
            if base in (set, frozenset):
                keys, members = members, ()
        if base not in (tuple, frozenset):
            self.mutable = True
            self._note(None, views, held, id(value))
        if base is collections.deque:
            extra = (_maxlen(value),)
        names: Any = self._keys(keys)
        if base in (set, frozenset):
            names = (frozenset(names),)
        if kind is not base:
            # Known by a list, since the container itself is not to be met again in its attributes.
            extra = (*extra, self._attributes(value, [], _layout(kind)))
        return self._nested(value, (kind, *extra, *names), members)

    def _bytearray(self, value: bytearray) -> Hashable:
        self.mutable = True
        content = bytes(value)
        self._note(bytes, value, _Copy(content))
        return (bytearray, content)

    def _slice(self, value: slice) -> Hashable:
        return (slice, *map(self.freeze, (value.start, value.stop, value.step)))

    def _ndarray(self, value: np.ndarray) -> Hashable:
        self.mutable = True
        self._charge(value.nbytes * _MEMBERS // _BYTES)
        if value.dtype.hasobject:
            members = tuple(_flat(value))
            self._note(None, (_View(_flat, value),), (members,), id(value))
            return self._nested(value, (np.ndarray, value.shape), members)
        key = _array_key(value)
        self._note(_array_key, value, _Copy(key))
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
        layout = _layout(type(value))
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
        key, why = None, "it refers to a module or parameter"
        try:
            key = self._members(value, layout)
        except _CannotFreeze as error:
            why = str(error)
        except RegistrationError:
            pass
        self._deepest = None
        if key is None:
            self.watch, self.objects, self.mutable, self.rebinds = before
            return self._unseen(value, why)
        before[0].add(self.watch)
        self.watch = before[0]
        return key

    def _members(self, value: Any, layout: _Layout) -> Hashable:
        key = self._attributes(value, value, layout)
        if key == (type(value), 0) and not layout.is_open:
            return Identity(value)  # what has no content stands for itself: a marker
        if not self.unwatched:
            self.objects[id(value)] = value
            self.mutable = self.mutable or layout.fields is None
        return key

    def _attributes(self, value: Any, visited: Any, layout: _Layout) -> Hashable:
        kind, held, *slots = state = _state(value)
        members = dict(zip(layout.slots, slots, strict=True))
        views: list[Any] = [_View(_state, value)]
        seen: list[tuple] = [state]
        if held is not None and held is not value:  # a dict may be its own __dict__
            items = tuple(dict.items(held))
            members.update(items)
            views += (dict.keys(held), dict.values(held))
            seen += (tuple(k for k, _ in items), tuple(v for _, v in items))
        if layout.fields is None:
            self._note(None, views, seen, (_state, id(value)))
        else:
            members = {n: v for n, v in members.items() if n in layout.fields}
        names = [n for n in members if n not in layout.derived]
        tag = (kind, len(names), *self._keys(tuple(names)))
        return self._nested(visited, tag, tuple(members[n] for n in names))

    def _unseen(self, value: Any, why: str) -> Hashable:
        if self._deepest is not None:
            raise _CannotFreeze(f"it holds an object of type {type(value).__name__}")
        self.unseen.append((type(value), why))
        return Identity(value)

    def _function(self, value: types.FunctionType) -> Hashable:
        contents = []
        for cell, content in _closure(value):
            if content is not _UNSET:
                self._note(_content, cell, content)
            contents.append(content)
        code = value.__code__
        self._note(code_of, value, code)  # tools that reload a file put another one in
        keywords = value.__kwdefaults__ or {}
        captured = (*contents, *(value.__defaults__ or ()), *keywords.values())
        tag = (types.FunctionType, code, Identity(value.__globals__), len(contents), *keywords)
        return self._nested(value, tag, captured, self.captured)

    def captured(self, content: Any) -> Hashable:
        # A module or parameter here would be invisible to everything that walks the tree.
        kind = type(content)
        if kind in _ATOMS or kind in _FUNCTIONS or issubclass(kind, tuple):  # named tuples too
            return self.freeze(content)
        hidden = find_hidden(content)
        if hidden is not None:
            self._refuse_captured(hidden)
            return Identity(content)
        return self._shared(content)

    def _shared(self, value: Any) -> Hashable:
        # Clones use the function, and what it refers to, of the original: what can change there is
        # this one object. Where nobody changes it, its content is enough.
        before, self.mutable = self.mutable, False
        key = self.freeze(value)
        changes, self.mutable = self.mutable and not self.unwatched, before
        if not changes:
            return key
        self.mutable = True
        state = _states.get(id(value))
        eager = current_trace() is EAGER
        if state is None or (eager and state.content != key):
            state = _states[id(value)] = _SharedState(value, key)
        elif self.of_clone and not eager:
            state.content = key
        return state

    def _refuse_captured(self, member: Any) -> None:
        raise hidden_member(f"the closure of the function {self.where()}", member)

    def _partial(self, value: functools.partial) -> Hashable:
        function, *rest = (value.func, *value.args, *value.keywords.values())
        tag = (functools.partial, self.freeze(function), len(value.args), *value.keywords)
        return (*tag, *map(self.captured, rest))

    def _method(self, value: types.MethodType) -> Hashable:
        owner, function = value.__self__, value.__func__
        if issubclass(type(owner), ModuleBase):
            node = None if self.node_of is None else self.node_of(owner)
            if node is not None:
                self.rebinds = True
                return (types.MethodType, self.freeze(function), node)
        return (types.MethodType, self.freeze(function), self.captured(owner))

    def _builtin(self, value: types.BuiltinFunctionType) -> Hashable:
        owner = value.__self__
        if owner is None or _is_value(type(owner)):
            return Identity(value)
        return (type(value), value.__name__, self.captured(owner))  # such as the `get` of a dict


class HookFreezer(Freezer):
    """Freezes hooks, which close over modules and collect things: both compare by identity."""

    def _refuse_captured(self, member: Any) -> None:
        pass

    def _shared(self, value: Any) -> Hashable:
        return Identity(value)

    _object = _identity = _shared


_FUNCTIONS = (float, complex, types.FunctionType, types.MethodType, functools.partial)

_HANDLERS: dict[type, Callable[[Any, Any], Hashable]] = {
    **dict.fromkeys(CONTAINERS, Freezer._container),
    slice: Freezer._slice,
    bytearray: Freezer._bytearray,
    types.MappingProxyType: lambda f, v: (types.MappingProxyType, f.freeze(_behind(v))),
    np.ndarray: Freezer._ndarray,
    types.FunctionType: Freezer._function,
    types.MethodType: Freezer._method,
    types.BuiltinFunctionType: Freezer._builtin,
    types.MethodWrapperType: Freezer._builtin,
    functools.partial: Freezer._partial,
}


def _behind(proxy: types.MappingProxyType) -> Any:
    return gc.get_referents(proxy)[0]


def find_hidden(value: Any, depth: int = 0) -> Any:
    """Return a module or box that sits inside plain containers, None if there is none."""
    kind = type(value)
    if issubclass(kind, (ModuleBase, Box)):
        return value
    if depth < 8 and issubclass(kind, CONTAINERS):
        base = next(b for b in CONTAINERS if issubclass(kind, b))
        items = (*dict.keys(value), *dict.values(value)) if base is dict else base.__iter__(value)
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
    if kind is types.MappingProxyType:
        return types.MappingProxyType(again(_behind(value)))
    if kind is bytearray or kind is np.ndarray:
        memo[id(value)] = new = value.copy()
        if kind is np.ndarray and value.dtype.hasobject:
            for i, element in enumerate(_flat(value)):
                new.reshape(-1)[i] = again(element)
        return new
    base: Any = next((b for b in _BASES if issubclass(kind, b)), None)
    if base is frozenset:
        return leaf(value)
    if base is tuple:
        new = tuple.__new__(kind, map(again, tuple.__iter__(value)))  # pyright: ignore[reportArgumentType]
    elif base is not None:
        memo[id(value)] = new = base.__new__(kind)
        _fill(new, value, base, again)
    elif _is_value(kind) or _layout(kind).base is None:
        return leaf(value)
    elif objects is not None and id(value) not in objects:
        return Identity(value)
    else:
        memo[id(value)] = new = _layout(kind).base.__new__(kind)
    if kind not in CONTAINERS:
        _fill_attributes(new, value, _layout(kind), again)
    return new


def _fill(new: Any, value: Any, base: Any, again: Callable[[Any], Any]) -> None:
    if issubclass(base, dict):
        for key in base.keys(value):
            base.__setitem__(new, key, again(dict.__getitem__(value, key)))
    elif base is set:
        set.update(new, value)  # hashes nothing again
    else:
        if base is collections.deque:
            base.__init__(new, (), _maxlen(value))
        base.extend(new, [again(v) for v in base.__iter__(value)])


def _fill_attributes(new: Any, value: Any, layout: _Layout, again: Callable[[Any], Any]) -> None:
    _, held, *slots = _state(value)
    if held is value:
        layout.holder.__set__(new, new)
    elif held is not None:
        kept = {n: again(v) for n, v in dict.items(held) if n not in layout.derived}
        layout.holder.__get__(new).update(kept)
    for member, content in zip(layout.slots.values(), slots, strict=True):
        if content is not _UNSET:
            member.__set__(new, again(content))
