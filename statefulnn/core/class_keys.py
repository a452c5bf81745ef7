"""Keys of classes: what compiled code may use of a class of modules, and whether it is still the same.

Of the classes of this package that is `forward`. Of the user's, it is every method and attribute, except
for what the class declares as ``_python_cache`` or ``_unwatched``.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.objects import CONTAINERS, Identity, class_dict, code_of, mro_of, package_of
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.static_keys import ClassKeyMaker, HookKeyMaker, KeyMaker, find_hidden
from statefulnn.core.watch import Watch

# One key for classes of equal content; and what each class was seen to hold. Classes live as long as
# JAX's registry of pytrees, which has each class of modules.
_keys: weakref.WeakValueDictionary[Hashable, Identity] = weakref.WeakValueDictionary()
_seen: dict[type, tuple[Identity, Watch]] = {}

# Members of classes that are the same for us where they are equal: of numbers 1, 1.0 and True are.
_EQUAL_IS_SAME = {str, type(None), types.FunctionType, staticmethod, classmethod, property, type}
_WRAPPERS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    staticmethod: lambda v: (v.__func__,),
    classmethod: lambda v: (v.__func__,),
    property: lambda v: (v.fget, v.fset),
}
# Nobody changes the classes of these packages.
_NOT_OWN = {*sys.stdlib_module_names, "statefulnn", "numpy", "jax", "jaxlib"}
_forward = operator.attrgetter("forward")


def class_key(cls: Any, watch: Watch) -> Identity:
    """Return the key of a class, and add to a watch what may change in it."""
    known = _seen.get(cls)
    if known is None or not known[1].unchanged():
        own = Watch()
        found = _members(cls, own)
        declared = (getattr(cls, name, ()) for name in ("_python_cache", "_unwatched"))
        hidden = {"_abc_impl", "__init__", *itertools.chain(*declared)}
        parts = []
        for name, value in found:
            # Of the names that Python itself writes, only methods change what a module does.
            if name not in hidden and (name[:2] != "__" or type(value) is types.FunctionType):
                inner = _WRAPPERS.get(type(value), lambda v: (v,))(value)
                parts.append((name, type(value), *(_part(v, own) for v in inner)))
        key = Identity(tuple(parts))
        known = _seen[cls] = _keys.setdefault(key.obj, key), own
    watch.add(known[1])
    return known[0]


def _key_of_own(cls: type, watch: Watch) -> Hashable:
    return class_key(cls, watch) if _own_bases(cls) else cls


# For attributes and static arguments: the class of a configuration counts as much as what is in it.
ValueKeyMaker = functools.partial(KeyMaker, of_class=_key_of_own)


def containers_of(cls: type) -> dict[str, Any]:
    """Return the containers among the attributes of a class of the user's, by name."""
    return {
        name: value
        for base in _own_bases(cls)
        for name, value in class_dict(base).items()
        if name[:2] != "__" and issubclass(type(value), CONTAINERS)
    }


def _own_bases(cls: type) -> list[type]:
    return [b for b in mro_of(cls) if package_of(b) not in _NOT_OWN]


def unchanged_classes() -> list[type]:
    """Return the classes that hold what they held when somebody looked."""
    return [cls for cls, (_, watch) in [*_seen.items()] if watch.unchanged()]


def forget_changes(classes: list[type]) -> None:
    """Take what has changed inside of the containers of classes while somebody traced as no change."""
    for cls in classes:
        class_key(cls, Watch())  # in a trace, see `KeyMaker.of_clone`


def _members(cls: type, watch: Watch) -> list[tuple[str, object]]:
    """Return the names and members of a class and its bases; note them."""
    found: list[tuple[str, object]] = []
    for base in _own_bases(cls):
        content = class_dict(base)
        members = dict(content)
        watch.note_mapping(base, content, members)
        found += members.items()
        for name, value in members.items():
            if name[:2] != "__" and type(value) not in _EQUAL_IS_SAME:
                watch.note(operator.itemgetter(name), content, value, (base, name))
    if issubclass(cls, ModuleBase) and not any(name == "forward" for name, _ in found):
        found.append(("forward", _forward(cls)))
        watch.note(_forward, cls, found[-1][1])
    return found


def _part(value: object, watch: Watch) -> Hashable:
    if find_hidden(value) is not None:
        return Identity(value)
    keys = HookKeyMaker()
    if type(value) is types.FunctionType:
        # Not what a method closes over: a test that counts traces in a variable is no other class.
        if not str(value.__globals__.get("__name__")).startswith("statefulnn."):
            watch.note(code_of, value, value.__code__)  # tools that reload put another one in
        defaults = (value.__defaults__, *(value.__kwdefaults__ or {}).items())
        key = (Identity(value), value.__code__, keys.of_captured(defaults))
    elif issubclass(type(value), (*CONTAINERS, np.ndarray)):
        keys = ClassKeyMaker(of_clone=current_trace() is not EAGER)
        key = keys.tried(value, KeyMaker.of_captured)
    else:
        key = keys.of_captured(value)
    watch.add(keys.watch)
    return key
