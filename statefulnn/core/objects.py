"""What an object holds: reading, filling and copying it without running its code.

Terms
  container   a list, tuple, dict, set, frozenset, deque or bytearray, or what derives from one.
  attributes  what an object has in its slots and its ``__dict__``; containers may have some too.
  content     the keys and members of a container, and the attributes, by name.
  layout      where the instances of one class keep their content.
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
from typing import Any, NamedTuple

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


UNSET: Any = object()  # stands for what an empty slot or variable holds

CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque, bytearray)
# Objects that are containers by another name.
NAMESPACES = (
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
)
# Classes written in C that Python classes derive from, special ones first.
_BASES: tuple[Any, ...] = (
    *(collections.OrderedDict, collections.defaultdict, *CONTAINERS, types.SimpleNamespace),
)

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
        self.base: Any = next(b for b in (*_BASES, object) if issubclass(cls, b))
        self.container: Any = self.base if issubclass(self.base, CONTAINERS) else None
        fixed = self.container in (tuple, frozenset) and not self.slots and self.holder is None
        self.changes = self.fields is None and not fixed
        try:
            # A copy would be finalised as well; a property of that name hides the attributes.
            if "__del__" in found or (self.holder is None and "__dict__" in found):
                raise TypeError
            _ = self.base.__new__(cls)  # pyright: ignore[reportArgumentType]
        except TypeError:  # which a class written in C raises
            self.base = None


layout_of: Callable[[type], Layout] = functools.lru_cache(256)(Layout)


class Content(NamedTuple):
    """What an object holds at one moment: see the terms at the top of the file; slots come first."""

    keys: tuple = ()
    members: tuple = ()
    names: tuple = ()
    attributes: tuple = ()


def content_of(value: object) -> Content:
    """Return what an object holds."""
    layout, held = layout_of(type(value)), _dict_of(value)
    base = layout.container
    keys = members = names = attributes = ()
    if base is not None and issubclass(base, dict):
        keys, members = _items(value, base)
    elif base is not None:
        members = tuple(base.__iter__(value))
    if held is not None:
        names, attributes = _items(held, dict)
    return Content(keys, members, (*layout.slots, *names), state_of(value)[2:] + attributes)


def _items(mapping: object, base: Any) -> tuple[tuple, tuple]:
    items = tuple(base.items(mapping))  # read once, so that keys and members agree
    return tuple(k for k, _ in items), tuple(v for _, v in items)


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


def _dict_of(value: object) -> dict[str, Any] | None:
    held = state_of(value)[1]
    return None if held is value else held  # a dict may be its own __dict__


def views_of(value: Any, content: Content) -> tuple[list[Iterable], tuple]:
    """Return iterables that read an object again, and what all of them give while the content is this."""
    layout, held = layout_of(type(value)), _dict_of(value)
    base, first = layout.container, len(layout.slots)
    views: list[Iterable] = []
    if base is not None and issubclass(base, dict):
        views += (base.keys(value), base.values(value))
    elif base is not None:
        views.append(value if type(value) is base else View(base.__iter__, value))
    seen = content.keys + content.members
    if layout.slots or layout.holder is not None:
        views.append(View(state_of, value))
        seen += (*state_of(value)[:2], *content.attributes[:first])
    if held is not None:
        views += (dict.keys(held), dict.values(held))
        seen += content.names[first:] + content.attributes[first:]
    return views, seen


def put(value: object, content: Content) -> None:
    """Give an object another content, without a moment at which what stays is missing."""
    layout, held = layout_of(type(value)), _dict_of(value)
    base, first = layout.container, len(layout.slots)
    if base is not None and issubclass(base, dict):
        _put_items(value, base, content.keys, content.members)
    elif base not in (None, tuple, frozenset):
        base.clear(value)
        (base.extend if hasattr(base, "extend") else base.update)(value, content.members)
    now = state_of(value)[2:]
    for slot, old, new in zip(layout.slots.values(), now, content.attributes, strict=False):
        if new is not old:
            slot.__delete__(value) if new is UNSET else slot.__set__(value, new)
    if held is not None:
        _put_items(held, dict, content.names[first:], content.attributes[first:])


def _put_items(mapping: object, base: Any, keys: tuple, members: tuple) -> None:
    items = dict(zip(keys, members, strict=True))
    for key in [k for k in base.keys(mapping) if k not in items]:
        base.__delitem__(mapping, key)
    for key, member in items.items():
        base.__setitem__(mapping, key, member)


class View:
    """What is read of an object, as an iterable."""

    __slots__ = ("read", "subject")

    def __init__(self, read: Callable[[Any], Iterable], subject: object) -> None:
        self.read, self.subject = read, subject

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read(self.subject))


def elements_of(array: np.ndarray) -> list[Any]:
    """Return the elements of an array as a list."""
    return array.ravel().tolist()


def behind(proxy: types.MappingProxyType) -> Any:
    """Return the mapping that a read-only proxy shows."""
    return gc.get_referents(proxy)[0]


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
    layout = layout_of(kind)
    if issubclass(kind, np.ndarray) and not issubclass(kind, np.memmap):
        memo[id(value)] = new = value.copy()
        for i, element in enumerate(elements_of(value) if value.dtype.hasobject else ()):
            new.reshape(-1)[i] = again(element)
        if layout.holder is not None and not issubclass(kind, np.ma.MaskedArray):
            own = {n: again(v) for n, v in layout.holder.__get__(value).items()}
            layout.holder.__get__(new).update(own)
        return new
    base = layout.container
    if base is frozenset or layout.base is None or (base is None and is_value(kind)):
        return leaf(value)
    if base is None and objects is not None and id(value) not in objects:
        return Identity(value)
    keys, members, names, attributes = content_of(value)
    if base is tuple:
        new, members = tuple.__new__(kind, map(again, members)), ()  # pyright: ignore[reportArgumentType]
    else:
        memo[id(value)] = new = layout.base.__new__(kind)
    if base is collections.deque:
        base.__init__(new, (), maxlen_of(value))
    if layout.holder is not None and layout.holder.__get__(value) is value:
        layout.holder.__set__(new, new)
    kept = {n: again(v) for n, v in zip(names, attributes, strict=True) if n not in layout.derived}
    put(new, Content(keys, tuple(map(again, members)), tuple(kept), tuple(kept.values())))
    return new
