"""What an object holds: reading, filling and copying it without running its code.

Terms
  container   a list, tuple, dict, set, frozenset or deque, or an instance of a class derived from one.
  attributes  what an object has in its ``__dict__`` and its slots; containers may have some too.
  layout      where the instances of one class keep both.
  value       an object that nobody changes in place: a class, a path, a function of JAX ...

The class of an object may be anybody's, and override ``__iter__``, ``__getattr__`` or ``__class__``. So
everything is read by the methods of builtin classes and by descriptors: ``dict.items(x)``, not ``x.items()``.
"""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import gc
import operator
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np


class Identity:
    """A key that is equal only for the same object; keeps the object alive."""

    __slots__ = ("__weakref__", "obj")

    def __init__(self, obj: object) -> None:
        self.obj = obj

    def __eq__(self, other: object) -> bool:
        return type(other) is Identity and other.obj is self.obj

    def __hash__(self) -> int:
        return id(self.obj)

    def __repr__(self) -> str:
        return repr(self.obj)


UNSET = Identity("not set")  # stands for what an empty slot or variable holds

CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
# Objects that are containers by another name.
NAMESPACES = (
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
)
# Classes written in C that Python classes derive from, special ones first.
_BASES = (collections.OrderedDict, collections.defaultdict, *CONTAINERS, types.SimpleNamespace)

# Classes of values that hold nothing else and are hashed by what they are.
ATOMS = frozenset(
    {str, bytes, bool, int, type(None), type(...), type(NotImplemented), range, type}
    | {jax.tree_util.PyTreeDef}
)
# Values, by the package of their class, by a base of their class.
_VALUE_PACKAGES = frozenset(
    "builtins jax jaxlib numpy ml_dtypes optax statefulnn typing enum re pathlib datetime decimal "
    "fractions uuid operator functools logging weakref inspect ipaddress zoneinfo".split()
)
_VALUE_BASES = (
    *(type, types.ModuleType, types.GenericAlias, types.UnionType, enum.Enum, pathlib.PurePath),
)

# Read around metaclasses, which may be anybody's too.
mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
class_dict: Callable[[type], types.MappingProxyType[str, Any]] = type.__dict__["__dict__"].__get__
_module_of: Callable[[type], object] = type.__dict__["__module__"].__get__
maxlen_of: Callable[[Any], int | None] = collections.deque.__dict__["maxlen"].__get__
code_of = operator.attrgetter("__code__")


def package_of(cls: type) -> str:
    """Return the name of the package that a class is from."""
    return str(_module_of(cls)).partition(".")[0]


def is_value(kind: type) -> bool:
    """Say whether nobody changes the instances of a class in place, if it is not one of those below."""
    if issubclass(kind, _VALUE_BASES):
        return True
    changing = hasattr(kind, "__dataclass_fields__") or hasattr(kind, "__next__")
    return package_of(kind) in _VALUE_PACKAGES and not changing


class Layout:
    """Where the instances of a class keep what they hold.

    Attributes:
        base: whose ``__new__`` makes one, None if Python may not do it, or not see all of it.
        container: the builtin container that they are, None if they are none.
        holder: the descriptor of ``__dict__``, None if there is none.
        slots: the other descriptors, by name.
        derived: names of cached properties, which follow from the other attributes.
        is_open: whether a module in one counts as in a dict.
        fields: those of a frozen dataclass, which promises to stay as it is.
        changes: whether members or attributes can be exchanged in place.
    """

    def __init__(self, cls: type) -> None:
        found: dict[str, Any] = {}
        for owner in mro_of(cls):
            found = {**class_dict(owner), **found}
        member = types.MemberDescriptorType
        self.slots = {n: v for n, v in found.items() if type(v) is member and n != "__dict__"}
        if cls is types.CellType:  # a variable that a function closes over: a slot by another name
            self.slots = {"cell_contents": found["cell_contents"]}
        self.derived = {n for n, v in found.items() if type(v) is functools.cached_property}
        dataclass = "__dataclass_fields__" in found
        frozen = dataclass and found["__dataclass_params__"].frozen
        self.fields = set(found["__dataclass_fields__"]) if frozen else None
        self.is_open = dataclass or issubclass(cls, NAMESPACES)
        self.holder: Any = found.get("__dict__")
        if type(self.holder) not in (member, types.GetSetDescriptorType):
            self.holder = None
        self.base: Any = next((b for b in _BASES if issubclass(cls, b)), object)
        self.container: Any = self.base if issubclass(self.base, CONTAINERS) else None
        fixed = self.container in (tuple, frozenset) and not self.slots and self.holder is None
        self.changes = self.fields is None and not fixed
        try:
            # A copy would be finalised as well; a property of that name hides the attributes.
            if "__del__" in found or (self.holder is None and "__dict__" in found):
                raise TypeError
            self.base.__new__(cls)
        except TypeError:  # which a class written in C raises
            self.base = None


layout_of: Callable[[type], Layout] = functools.lru_cache(256)(Layout)


def state_of(value: object) -> tuple[Any, ...]:
    """Return the class of an object, its ``__dict__`` (or None) and what is in its slots."""
    layout = layout_of(type(value))
    held = None if layout.holder is None else layout.holder.__get__(value)
    return (type(value), held, *(_in_slot(value, slot) for slot in layout.slots.values()))


def _in_slot(value: object, slot: types.MemberDescriptorType) -> object:
    try:
        return slot.__get__(value)
    except (AttributeError, ValueError):
        return UNSET


def content(value: Any, base: Any) -> tuple[tuple, tuple]:
    """Return the keys and the members of a container; only dicts have keys.

    Args:
        value: the container.
        base: the builtin class that it is of, `Layout.container`.
    """
    if not issubclass(base, dict):
        return (), tuple(base.__iter__(value))
    items = tuple(base.items(value))  # read once, so that keys and members agree
    return tuple(k for k, _ in items), tuple(v for _, v in items)


def read(value: Any) -> tuple[tuple, tuple, tuple, tuple]:
    """Return what an object holds: keys and names, members and attributes, and what to watch.

    Returns:
        the keys of a dict and the names of attributes; the members of a container and the attributes;
        iterables that read the object again; what these gave.
    """
    layout = layout_of(type(value))
    base = layout.container
    keys = members = looked = seen = ()
    if base is not None:
        keys, members = seen = content(value, base)
        if issubclass(base, dict):
            looked = base.keys(value), base.values(value)
        else:
            looked = (value if type(value) is base else View(base.__iter__, value),)
    if base in (set, frozenset):
        members = (frozenset(value),)  # what compares without an order is one member
    if type(value) in CONTAINERS:
        return keys, members, looked, seen
    _, held, *slots = state = state_of(value)
    attributes = dict(zip(layout.slots, slots, strict=True))
    looked, seen = (*looked, View(state_of, value)), (*seen, state)
    if held is not None and held is not value:  # a dict may be its own __dict__
        own = content(held, dict)
        attributes.update(zip(*own, strict=True))
        looked, seen = (*looked, dict.keys(held), dict.values(held)), (*seen, *own)
    names = [n for n in attributes if n not in layout.derived]
    if layout.fields is not None:
        names = [n for n in names if n in layout.fields]
    return (*keys, *names), (*members, *(attributes[n] for n in names)), looked, seen


class View:
    """What is read of an object, as an iterable."""

    __slots__ = ("read", "subject")

    def __init__(self, read: Callable[[Any], Iterable], subject: object) -> None:
        self.read, self.subject = read, subject

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read(self.subject))


def fill(value: Any, base: Any, keys: Iterable, members: Iterable) -> None:
    """Put members into an empty container that can be changed."""
    if issubclass(base, dict):
        for key, member in zip(keys, members, strict=True):
            base.__setitem__(value, key, member)
    else:
        (base.update if base is set else base.extend)(value, members)


def behind(proxy: types.MappingProxyType) -> Any:
    """Return the mapping that a read-only proxy shows."""
    return gc.get_referents(proxy)[0]


def flat(array: np.ndarray) -> list[Any]:
    """Return the elements of an array as a list."""
    return array.ravel().tolist()


def copied(
    value: Any,
    leaf: Callable[[Any], Any],
    objects: dict[int, object] | None = None,
    memo: dict[int, object] | None = None,
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
    if kind in ATOMS or id(value) in memo:
        return memo.get(id(value), value)
    if kind is Identity:
        return value.obj
    again = functools.partial(copied, leaf=leaf, objects=objects, memo=memo)
    if kind is types.MappingProxyType:
        return types.MappingProxyType(again(behind(value)))
    if kind is bytearray or kind is np.ndarray:
        memo[id(value)] = new = value.copy()
        for i, element in enumerate(
            flat(value) if kind is np.ndarray and value.dtype.hasobject else ()
        ):
            new.reshape(-1)[i] = again(element)
        return new
    layout = layout_of(kind)
    base = layout.container
    if base is frozenset or layout.base is None or (base is None and is_value(kind)):
        return leaf(value)
    if base is None and objects is not None and id(value) not in objects:
        return Identity(value)
    if base is tuple:
        new = tuple.__new__(kind, map(again, tuple.__iter__(value)))  # pyright: ignore[reportArgumentType]
    else:
        memo[id(value)] = new = layout.base.__new__(kind)
        if base is collections.deque:
            base.__init__(new, (), maxlen_of(value))
        if base is not None:
            keys, members = content(value, base)
            fill(new, base, keys, map(again, members))
    if kind not in CONTAINERS:
        _fill_attributes(new, value, layout, again)
    return new


def _fill_attributes(
    new: object, value: object, layout: Layout, again: Callable[[object], object]
) -> None:
    _, held, *slots = state_of(value)
    if held is value:  # a dict may be its own __dict__
        layout.holder.__set__(new, new)
    elif held is not None:
        kept = {n: again(v) for n, v in dict.items(held) if n not in layout.derived}
        layout.holder.__get__(new).update(kept)
    for slot, member in zip(layout.slots.values(), slots, strict=True):
        if member is not UNSET:
            slot.__set__(new, again(member))
