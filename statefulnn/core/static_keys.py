"""Keys of static attributes: how they are compared, and what has to be watched for that.

A `KeyMaker` turns any Python value into a hashable key such that equal keys mean "compiled code may be
shared": 1, True and 1.0 differ, 0.0 and -0.0 differ; functions compare by code, globals, defaults and
closure; containers, numpy arrays and plain objects by content. What nobody changes in place compares by
identity, and so does what cannot be looked into, which is reported.

No code of the user's runs, see `core.objects`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import refusals
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import (
    RegistrationError,
    TraceLeakError,
    UntrainedLeavesWarning,
    explain,
    user_stack_level,
)
from statefulnn.core.objects import (
    ATOMS,
    CONTAINERS,
    UNSET,
    Identity,
    View,
    behind,
    class_dict,
    code_of,
    content_of,
    elements_of,
    is_value,
    layout_of,
    maxlen_of,
    mro_of,
    package_of,
    state_of,
    views_of,
)
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.watch import Watch

# A plain object that holds more than this is a program's, not a model's: it compares by identity.
_MEMBERS, _DEPTH, _BYTES = 1000, 8, 1 << 20

_cell_content = operator.attrgetter("cell_contents")


def _array_key(value: np.ndarray) -> tuple:
    mask = (
        np.ma.getmaskarray(value).tobytes() if issubclass(type(value), np.ma.MaskedArray) else None
    )
    value = value.view(np.ndarray)  # a class that derives from it may hide a part
    return (value.shape, value.dtype, value.tobytes(), mask)


class _SharedState:
    """A key for an object that a function refers to, and for its content.

    What changes while somebody traces is the same content still: functions may count their traces, or
    collect shapes. What changes between two calls is another one.
    """

    __slots__ = ("__weakref__", "content", "obj")

    def __init__(self, obj: object, content: Hashable) -> None:
        self.obj, self.content = obj, content


_states: weakref.WeakValueDictionary[int, _SharedState] = weakref.WeakValueDictionary()


class _NotByValue(Exception):
    """Raised inside of an object that has to compare by identity; says why."""


@dataclasses.dataclass(eq=False)
class KeyMaker:
    """Makes the key of one static attribute; collects what has to be watched.

    Attributes:
        where: gives the name of the attribute, for messages.
        node_of: gives the number of a module of the same tree, None for any other: a bound method of
            such a module is followed to its clone.
        unwatched: whether somebody promises that nothing in it changes: all of it compares by value.
        of_clone: whether the module is a clone.
        of_class: gives the key of the class of an object that compares by value, whose attributes count as
            the object's own.
        watch: what can change in place.
        mutable: whether clones need a copy.
        rebinds: whether a bound method of a module of the tree is inside.
        objects: plain objects that compare by value, by identity: clones get copies.
        unseen: the classes of objects that may change unseen, and why.
    """

    where: Callable[[], str] = lambda: "an attribute"
    node_of: Callable[[Any], int | None] = lambda module: None
    unwatched: bool = False
    of_clone: bool = False
    of_class: Callable[[type, Watch], Hashable] = lambda cls, watch: cls
    watch: Watch = dataclasses.field(default_factory=Watch)
    mutable: bool = False
    rebinds: bool = False
    objects: dict[int, object] = dataclasses.field(default_factory=dict)
    unseen: list[tuple[type, str]] = dataclasses.field(default_factory=list)
    _visiting: list[object] = dataclasses.field(default_factory=list)
    _deepest: float = math.inf  # while by value is only a try: how deep it may go
    _room: float = math.inf  # and how many more members there may be
    _in_key: bool = False

    def of(self, value: object) -> Hashable:
        """Return the key of a value."""
        kind = type(value)
        return (kind, value) if kind in ATOMS else getattr(self, _method_for(kind))(value)

    # ----------------------------------------------------------------------------------------------
    # Values

    def _number(self, value: complex) -> Hashable:
        return (type(value), repr(value))  # which tells 0.0 from -0.0

    def _scalar(self, value: np.generic) -> Hashable:
        return (type(value), value.dtype, value.tobytes())

    def _slice(self, value: slice) -> Hashable:
        return (slice, *map(self.of, (value.start, value.stop, value.step)))

    def _jax_array(self, value: jax.Array) -> Hashable:
        # By value, so that a rebuilt equal model shares compiled code; such arrays become constants.
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.extended)
        with jax.ensure_compile_time_eval():  # also while somebody traces
            data = jax.random.key_data(value) if is_key else value
        self._charge(data.nbytes * _MEMBERS // _BYTES)
        host = np.asarray(data)
        weak = not is_key and value.weak_type
        return (jax.Array, str(value.dtype), weak, host.shape, host.tobytes())

    def _value(self, value: object) -> Hashable:
        if self.unwatched and package_of(type(value)) == "optax":
            return self._object(value)
        # A compiled function calls what it was made of, and goes on with the old values of that.
        for name in ("owner", "__wrapped__"):
            with contextlib.suppress(AttributeError):
                inner = object.__getattribute__(value, name)
                if issubclass(type(inner), (ModuleBase, *_FUNCTIONS)):
                    self._refuse_compiled(inner)
        return Identity(value)

    def _refuse_compiled(self, function: object) -> None:
        try:
            KeyMaker(self.where, unwatched=True).of(function)
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

    def _member(self, value: object) -> Hashable:
        raise hidden_member(self.where(), value)

    def _tracer(self, value: object) -> Hashable:
        raise traced_value(self.where())

    # ----------------------------------------------------------------------------------------------
    # What holds other objects

    def _nested(self, value: object, tag: tuple, members: tuple, key: Any = None) -> Hashable:
        # A container that holds itself is named by its depth instead of being entered again.
        for depth, outer in enumerate(self._visiting):
            if outer is value:
                return ("cycle", depth)
        self._charge(len(members))
        self._visiting.append(value)
        try:
            return (*tag, *map(key or self.of, members))
        finally:
            self._visiting.pop()

    def _charge(self, members: int) -> None:
        self._room -= members
        if self._room < 0:
            raise _NotByValue(f"it holds more than {_MEMBERS} objects, or large arrays")
        if len(self._visiting) > self._deepest:
            raise _NotByValue(f"it is nested deeper than {_DEPTH} levels")

    def _keys(self, keys: tuple) -> tuple[Hashable, ...]:
        # Clones share the keys of dicts and the members of sets: there an object is its identity.
        before, self._in_key = self._in_key, True
        try:
            return tuple(map(self.of, keys))
        finally:
            self._in_key = before

    def _content(self, value: object) -> Hashable:
        """Return the key by value of a container, or of an object with attributes."""
        layout = layout_of(type(value))
        base, content = layout.container, content_of(value)
        if layout.changes:
            self.watch.note_members(id(value), *views_of(value, content))
        kind = type(value) if self.unwatched else self.of_class(type(value), self.watch)
        if base is None:
            if not content.names and not layout.is_open:
                return (Identity(value), kind)  # what has no content stands for itself: a marker
            if not self.unwatched:
                self.objects[id(value)] = value
        copied = not self.unwatched and base not in (tuple, frozenset)
        self.mutable = self.mutable or (copied and layout.changes)

        keys, members, names, attributes = content
        tag: tuple = (type(value), kind, maxlen_of(value) if base is collections.deque else None)
        if base in (set, frozenset):
            tag, members = (*tag, frozenset(self._keys(members))), ()
        kept = {n: v for n, v in zip(names, attributes, strict=True) if n not in layout.derived}
        if layout.fields is not None:
            kept = {n: v for n, v in kept.items() if n in layout.fields}
        tag = (*tag, len(kept), *self._keys((*keys, *kept)))
        return self._nested(value, tag, (*members, *kept.values()))

    def _proxy(self, value: types.MappingProxyType) -> Hashable:
        return (types.MappingProxyType, self.of(behind(value)))

    def _ndarray(self, value: np.ndarray) -> Hashable:
        self.mutable = True
        self._charge(value.nbytes * _MEMBERS // _BYTES)
        if value.dtype.hasobject:
            elements = tuple(elements_of(value))
            self.watch.note_members(id(value), [View(elements_of, value)], elements)
            return self._nested(value, (np.ndarray, value.shape), elements)
        key, content = _array_key(value), content_of(value)
        self.watch.note(lambda array: _array_key(array) == key, value, True, id(value))
        # What a masked array has beside data and mask are notes of its own, which reading changes.
        if type(value) is np.ndarray or issubclass(type(value), np.ma.MaskedArray):
            return (type(value), key)
        self.watch.note_members(("of", id(value)), *views_of(value, content))
        return self._nested(value, (type(value), key, *content.names), content.attributes)

    def _object(self, value: object) -> Hashable:
        layout = layout_of(type(value))
        if layout.base is None:
            return self._unseen(value, "Python cannot read all that it holds")
        if self._in_key and layout.fields is None:
            return Identity(value)
        if layout.is_open or self._deepest < math.inf:
            return self._content(value)
        # Plain objects may be anything, a trainer with the model in it: then all of it is left alone.
        return self.tried(value, KeyMaker._content)

    def tried(self, value: object, by_value: Callable[[KeyMaker, Any], Hashable]) -> Hashable:
        """Return the key by value if it may have one, and else its identity."""
        trial = dataclasses.replace(
            self,
            watch=Watch(),
            objects=dict(self.objects),
            _deepest=len(self._visiting) + _DEPTH,
            _room=_MEMBERS,
        )
        try:
            key = by_value(trial, value)
        except _NotByValue as error:
            return self._unseen(value, str(error))
        except RegistrationError:
            return self._unseen(value, "it refers to a module or parameter")
        self.watch.add(trial.watch)
        self.objects, self.mutable, self.rebinds = trial.objects, trial.mutable, trial.rebinds
        return key

    def _unseen(self, value: object, why: str) -> Hashable:
        if self._deepest < math.inf:
            raise _NotByValue(f"it holds an object of type {type(value).__name__}")
        self.unseen.append((type(value), why))
        return Identity(value)

    # ----------------------------------------------------------------------------------------------
    # Functions, and what they refer to

    def _function(self, value: types.FunctionType) -> Hashable:
        cells = value.__closure__ or ()
        contents = [state_of(cell)[-1] for cell in cells]
        for cell, held in zip(cells, contents, strict=True):
            if held is not UNSET:
                self.watch.note(_cell_content, cell, held)
        code = value.__code__
        self.watch.note(code_of, value, code)  # tools that reload a file put another one in
        keywords = value.__kwdefaults__ or {}
        # Its attributes too, but for what it wraps, which its closure holds.
        own = {n: v for n, v in value.__dict__.items() if n != "__wrapped__"}
        if own:
            held = value.__dict__
            views = (dict.keys(held), dict.values(held))
            self.watch.note_members(("of", id(value)), views, (*views[0], *views[1]))
        captured = (*contents, *(value.__defaults__ or ()), *keywords.values(), *own.values())
        names = (*keywords, *own)
        tag = (types.FunctionType, code, Identity(value.__globals__), len(contents), *names)
        return self._nested(value, tag, captured, self.of_captured)

    def of_captured(self, value: Any) -> Hashable:
        """Return the key of something that a function refers to."""
        kind = type(value)
        if kind in ATOMS:
            return (kind, value)
        # A module or parameter here would be invisible to everything that walks the tree. Clones have the
        # function itself, so a method of a module would be the original's.
        hidden = find_hidden(value.__self__ if kind is types.MethodType else value)
        if hidden is not None:
            self._refuse_captured(hidden)
            return Identity(value)
        by_value = kind in _FUNCTIONS or issubclass(kind, tuple)
        return self.of(value) if by_value else self._shared(value)

    def _refuse_captured(self, member: object) -> None:
        raise refusals.captured_member(self.where(), type(member).__name__)

    def _shared(self, value: object) -> Hashable:
        # Clones use the function, and what it refers to, of the original: what can change there is
        # this one object. Where nobody changes it, its content is enough.
        before, self.mutable = self.mutable, False
        key = self.of(value)
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

    def _partial(self, value: functools.partial) -> Hashable:
        parts = (value.func, *value.args, *value.keywords.values())
        return (type(value), len(value.args), *value.keywords, *map(self.of_captured, parts))

    def _method(self, value: types.MethodType) -> Hashable:
        owner = value.__self__
        node = self.node_of(owner) if issubclass(type(owner), ModuleBase) else None
        self.rebinds = self.rebinds or node is not None
        key = self.of_captured(owner) if node is None else node
        return (types.MethodType, self.of(value.__func__), key)

    def _builtin(self, value: types.BuiltinFunctionType) -> Hashable:
        owner = value.__self__
        if owner is None or _method_for(type(owner)) == "_value":
            return Identity(value)
        return (type(value), value.__name__, self.of_captured(owner))  # such as the `get` of a dict


class ClassKeyMaker(KeyMaker):
    """Makes the keys of what a class holds: containers compare by content, objects by identity."""

    def _refuse_captured(self, member: object) -> None:
        pass

    def _value(self, value: object) -> Hashable:
        return Identity(value)

    _tracer = _value

    def _object(self, value: object) -> Hashable:
        frozen = layout_of(type(value)).fields is not None  # and so promises to stay as it is
        return self._content(value) if frozen else Identity(value)


class HookKeyMaker(ClassKeyMaker):
    """Makes the keys of hooks, which close over modules and collect things: both are their identity."""

    def _shared(self, value: object) -> Hashable:
        return Identity(value)


_PLAIN = ATOMS | {float, complex, types.FunctionType}
_FUNCTIONS = (float, complex, types.FunctionType, types.MethodType, functools.partial)

_METHODS: dict[type, str] = {
    float: "_number",
    complex: "_number",
    slice: "_slice",
    types.MappingProxyType: "_proxy",
    types.FunctionType: "_function",
    types.MethodType: "_method",
    types.BuiltinFunctionType: "_builtin",
    types.MethodWrapperType: "_builtin",
}
_METHODS_BY_BASE: dict[type, str] = {
    Tracer: "_tracer",
    jax.Array: "_jax_array",
    np.memmap: "_value",  # a file, which may be larger than memory
    np.ndarray: "_ndarray",
    Box: "_member",
    ModuleBase: "_member",
    np.generic: "_scalar",
    functools.partial: "_partial",
    **dict.fromkeys(CONTAINERS, "_content"),
}


@functools.lru_cache(256)
def _method_for(kind: type) -> str:
    # Asked of the class throughout: isinstance() would run a property __class__ of the user's.
    bases = (name for base, name in _METHODS_BY_BASE.items() if issubclass(kind, base))
    return _METHODS.get(kind) or next(bases, "_value" if is_value(kind) else "_object")


class BoundMethod:
    """Stands for a bound method of a module of the tree in stored attributes."""

    __slots__ = ("function", "node")

    def __init__(self, node: int, function: Callable) -> None:
        self.node, self.function = node, function


# --------------------------------------------------------------------------------------------------
# Members where nothing looks for them


def refuse_hidden(where: Callable[[], str], value: object) -> None:
    """Raise if a module or parameter sits in a value that is about to be a static attribute.

    Containers and namespaces are looked into, partial and compiled functions. What other objects and
    functions refer to is found when the module is split: they may be large, and take their members later.
    """
    kind = type(value)
    if kind in _PLAIN:
        return
    if issubclass(kind, functools.partial) or (callable(value) and _method_for(kind) == "_value"):
        KeyMaker(where).of(value)
    if find_hidden(value, _is_suspect) is None:  # one walk for what nearly all values are: plain
        return
    hidden = find_hidden(value)
    if hidden is not None:
        raise hidden_member(where(), hidden)
    stranger = find_hidden(value, foreign_library)
    if _has_numbers(stranger):
        does, kind = "is" if stranger is value else "holds", type(stranger)
        text = refusals.foreign_layer(where(), does, _name_of(kind), foreign_library(kind))
        warnings.warn(text, UntrainedLeavesWarning, stacklevel=user_stack_level())


def _is_member(kind: type) -> bool:
    return issubclass(kind, (ModuleBase, Box))


def _is_suspect(kind: type) -> bool:
    return _is_member(kind) or bool(foreign_library(kind))


def find_hidden(
    value: object, sought: Callable[[type], object] = _is_member, depth: int = 0
) -> Any:
    """Return a module or box that sits inside containers, None if there is none.

    Args:
        value: what is looked into.
        sought: says of a class whether its instances are what is looked for.
        depth: how many containers are around.
    """
    kind = type(value)
    if sought(kind):
        return value
    layout = layout_of(kind)
    if depth < _DEPTH and (layout.container is not None or layout.is_open):
        content = content_of(value)
        for item in (*content.keys, *content.members, *content.attributes):
            found = None if type(item) in _PLAIN else find_hidden(item, sought, depth + 1)
            if found is not None:
                return found
    return None


_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__
# The classes whose instances hold what these libraries train, and the bridge of each.
_FOREIGN = {
    ("torch.nn", "Module"): "torch",
    ("torch.nn", "Parameter"): "torch",
    ("flax.nnx", "Module"): "flax",
    ("flax.nnx", "Variable"): "flax",
    ("equinox._module", "Module"): "equinox",
}


@functools.lru_cache(256)
def foreign_library(kind: type) -> str:
    """Return the bridge of the library whose layer or parameter a class is; "" if it is neither."""
    # By name: a library that the user has not imported is not imported here.
    names = (
        (".".join(str(class_dict(c).get("__module__")).split(".")[:2]), _name_of(c))
        for c in mro_of(kind)
    )
    return next((_FOREIGN[name] for name in names if name in _FOREIGN), "")


def _has_numbers(stranger: Any) -> bool:
    library = foreign_library(type(stranger))
    if library == "torch" and hasattr(stranger, "parameters"):
        return any(True for _ in stranger.parameters())
    # Models of Equinox are trees; those of NNX are graphs, which may have cycles.
    leaves = jax.tree_util.tree_leaves(stranger) if library == "equinox" else ()
    return library != "equinox" or any(hasattr(leaf, "dtype") for leaf in leaves)


def hidden_member(where: str, value: object) -> RegistrationError:
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


def traced_value(where: str) -> TraceLeakError:
    """Build the error for a traced value that sits where it would stay."""
    return TraceLeakError(
        explain(
            f"kept a traced value in {where}",
            "it would outlive the function being traced",
            "register it: self.register_buffer(name, array, persistent=False); or collect outputs with "
            "nn.capture",
        )
    )
