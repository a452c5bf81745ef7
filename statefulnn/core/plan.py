"""Plan: what a root keeps so that it is not walked at every call.

A plan holds the ModuleDef of its roots, their boxes in leaf order and the stamps of their modules. It is
right as long as the stamps are the same and a `Watch` sees no change in what can change without a stamp:
lists, dicts, objects, closures, and the classes of the modules. It never refers to a module, so a model
dies by reference count.
"""

from __future__ import annotations

import functools
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.errors import RetraceWarning, explain, user_stack_level
from statefulnn.core.freeze import (
    BoundMethod,
    Freezer,
    HookFreezer,
    Identity,
    Watch,
    class_dict,
    code_of,
    copied,
    find_hidden,
    mro_of,
    package_of,
)
from statefulnn.core.generator import Generator
from statefulnn.core.moduledef import COPIED, HOOKS, SHARED, ModuleDef, NodeDef, differences, rank
from statefulnn.core.ownership import ModuleBase, set_plan
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import gathered, placements_of
from statefulnn.core.registry import GLOBAL_CELL, GLOBAL_HOOKS, HookDict
from statefulnn.core.stamps import Cell, clock
from statefulnn.core.uninitialized import is_lazy

# Attributes that live in a module's __dict__ but are not static attributes.
_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules"})
# Hooks of state_dict and friends: they never run inside compiled code, so they are no part of a ModuleDef.
_OUTSIDE_FORWARD = frozenset(
    {
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)

_forward = operator.attrgetter("forward")

RETRACE_LIMIT = 8  # changes of one attribute before a warning

_interned: weakref.WeakValueDictionary[Any, ModuleDef] = weakref.WeakValueDictionary()
_intern_lock = threading.Lock()


class Plan:
    """What is remembered of a set of roots: see the terms at the top of the file."""

    __slots__ = (
        "__weakref__",
        "boxes",
        "cached_leaves",
        "changes",
        "cells",
        "checked_at",
        "classes",
        "flags",
        "fresh",
        "generators",
        "moduledef",
        "parameters",
        "placements",
        "reference",
        "stamps",
        "watch",
        "watched",
    )

    moduledef: ModuleDef
    boxes: list[Box]  # in leaf order
    parameters: list[Parameter]
    placements: tuple[Any, ...] | None  # where the leaves lie, see `placements_of`
    reference: Any  # a weak reference to the plan itself
    generators: list[Generator]
    flags: list[bool]  # requires_grad of the parameters
    cells: list[Cell]
    stamps: list[int]
    watched: list[_Watched]  # what the watch looks at; with `classes`, what is frozen again
    classes: dict[type, Identity]
    watch: Watch
    checked_at: int
    cached_leaves: list[Any] | None
    fresh: bool  # whether no other live plan had this ModuleDef
    changes: dict[str, int]  # how often each attribute led to a ModuleDef not seen before

    def valid(self) -> bool:
        """Say whether nothing structural or static has changed since the plan was made."""
        if self.checked_at != clock.structure:
            now = clock.structure
            if [c.stamp for c in self.cells] != self.stamps:
                return False
            if [p._requires_grad for p in self.parameters] != self.flags:
                return False
            self.checked_at = now
        return self.watch.unchanged() or self._equal()

    def _equal(self) -> bool:
        """Freeze again, and say whether all is equal to what it was; then that is watched."""
        watch = Watch()
        for again, key in self.watched:
            freezer, new = again()
            if new != key:
                return False
            watch.add(freezer.watch)
        if any(_content_of(cls, watch) != content for cls, content in self.classes.items()):
            return False
        self.watch = watch
        return True

    def leaves(self) -> list[Any]:
        """Return the arrays in leaf order; the list is shared, do not change it."""
        leaves = self.cached_leaves
        if leaves is None:
            before = clock.values
            for b in self.generators:
                if type(b._value) is np.ndarray:  # seeded on the host: put it on the device once
                    with jax.ensure_compile_time_eval():  # also while somebody traces
                        b._value = jax.numpy.asarray(b._value)
            leaves = [b._value for b in self.boxes]
            generators = range(len(leaves) - len(self.generators), len(leaves))  # they come last
            for i, value in gathered(leaves, generators):
                leaves[i] = self.boxes[i]._value = value
            placements = placements_of(leaves)
            if placements != self.placements:
                self.placements = placements
            self.keep(leaves, before)
        return leaves

    def given_out(self) -> list[Any]:
        """Return the arrays in leaf order to somebody who keeps them, as reading each box would."""
        return [box.lend() for box in self.boxes] if self.leaves() else []

    def note_read(self) -> None:
        """Take note that traced code reads the boxes, as reading each of them would."""
        for box in self.boxes:
            box._read_in_trace()

    def keep(self, leaves: list[Any], as_of: int) -> None:
        """Cache the list of leaves, which is right if no value has changed since a stamp."""
        self.cached_leaves = leaves
        clock.gathered.append(self.reference)
        if clock.values != as_of:  # another thread wrote meanwhile
            self.cached_leaves = None


# A static attribute that can change in place: what freezes it again, and its key.
_Watched = tuple[Callable[[], tuple[Freezer, Hashable]], Hashable]


def _number(node_ids: dict[int, int], module: Any) -> int | None:
    return node_ids.get(id(module))


def _frozen(
    value: Any,
    where: Callable[[], str],
    node_of: Callable[[Any], int | None],
    unwatched: bool,
    of_clone: bool,
) -> tuple[Freezer, Hashable]:
    if not isinstance(value, HookDict):
        freezer = Freezer(where, node_of, unwatched, of_clone)
        return freezer, freezer.freeze(value)
    # Handles number the hooks: two equal models have other numbers.
    freezer = HookFreezer(where, node_of)
    return freezer, tuple(map(freezer.freeze, value.values()))


# What forward may use of a class, one key for equal ones; and what each class was seen to hold. Classes
# live as long as JAX's registry of pytrees, which has each class of modules.
_contents: weakref.WeakValueDictionary[Hashable, Identity] = weakref.WeakValueDictionary()
_seen: dict[type, tuple[Identity, Watch]] = {}


def _content_of(cls: Any, watch: Watch) -> Identity:
    """Return a key for the methods and attributes of a class: of this package's classes, `forward`."""
    known = _seen.get(cls)
    if known is None or not known[1].unchanged():
        freezer = HookFreezer()
        hidden = {*cls._python_cache, *cls._unwatched, "_abc_impl", "__init__"}
        found: list[tuple[str, Any]] = []
        for base in mro_of(cls):
            if base is not object and package_of(base) != "statefulnn":
                content = class_dict(base)
                members = dict(content)
                freezer.watch.note(dict, content, members, base)
                found += members.items()
                for name, value in members.items():
                    if name[:2] != "__" and type(value) not in _EQUAL_IS_SAME:
                        freezer.watch.note(operator.itemgetter(name), content, value, (base, name))
        if not any(name == "forward" for name, _ in found):
            found.append(("forward", _forward(cls)))
            freezer.watch.note(_forward, cls, found[-1][1])
        key = []
        for name, value in found:
            # Of the names that Python itself writes, only methods change what a module does.
            if name not in hidden and (name[:2] != "__" or type(value) is types.FunctionType):
                parts = _WRAPPERS.get(type(value), lambda v: (v,))(value)
                key.append((name, type(value), *(_of_class(part, freezer) for part in parts)))
        content = Identity(tuple(key))
        known = _seen[cls] = _contents.setdefault(content.obj, content), freezer.watch
    watch.add(known[1])
    return known[0]


def _of_class(value: Any, freezer: Freezer) -> Hashable:
    if type(value) is not types.FunctionType:
        return Identity(value) if find_hidden(value) is not None else freezer.captured(value)
    # Not what a method closes over: a test that counts traces in a variable is no other class.
    if not str(value.__globals__.get("__name__")).startswith("statefulnn."):
        freezer.watch.note(code_of, value, value.__code__)  # tools that reload put another one in
    defaults = (value.__defaults__, *(value.__kwdefaults__ or {}).items())
    return (Identity(value), value.__code__, freezer.captured(defaults))


# Members of classes that are the same for us where they are equal: of numbers 1, 1.0 and True are.
_EQUAL_IS_SAME = {str, type(None), types.FunctionType, staticmethod, classmethod, property, type}
_WRAPPERS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    staticmethod: lambda v: (v.__func__,),
    classmethod: lambda v: (v.__func__,),
    property: lambda v: (v.fget, v.fset),
}


class _Builder:
    """Walks roots once and makes their plan."""

    def __init__(self, untie: bool = False) -> None:
        self.untie = untie
        self.modules: list[Any] = []
        self.node_ids: dict[int, int] = {}
        self.boxes: list[Box] = []
        self.box_ids: dict[Any, int] = {}

    def node(self, module: Any) -> int:
        number = self.node_ids.get(id(module))
        if number is None:
            number = self.node_ids[id(module)] = len(self.modules)
            self.modules.append(module)
        return number

    def box(self, box: Box, where: Any) -> int:
        key = where if self.untie else id(box)
        number = self.box_ids.get(key)
        if number is None:
            number = self.box_ids[key] = len(self.boxes)
            if is_lazy(box):
                _ = box.value  # raises: it has no shape to compile for
            self.boxes.append(box)
        return number

    def build(self, roots: Sequence[Any]) -> Plan:
        numbered = tuple(
            ("box", self.box(r, id(r))) if isinstance(r, Box) else ("node", self.node(r))
            for r in roots
        )
        nodes, stamps, cells, todo = [], [], [], 0
        attributes = []
        while todo < len(self.modules):  # the list grows while it is walked
            module = self.modules[todo]
            cell = module._cell
            cells.append(cell)
            stamps.append(cell.stamp)  # before reading: a change meanwhile is seen next time
            d = NodeDef(type(module))
            attributes.append(self._members(module, d, todo))
            nodes.append(d)
            todo += 1

        for _ in range(4):
            hooks, watched, classes, watch = self._watch_all(nodes, attributes)
            if not watched or watch.unchanged():
                break  # else another thread changed something between its key and its copy

        boxes = tuple((type(b), b.static_part()) for b in self.boxes)
        ranks = [rank(cls, static) for cls, static in boxes]
        by_rank = sorted(range(len(ranks)), key=ranks.__getitem__)
        order = [0] * len(ranks)
        for position, number in enumerate(by_rank):
            order[number] = position

        key = (numbered, tuple(d.key for d in nodes), boxes, hooks)
        cells.append(GLOBAL_CELL)
        stamps.append(GLOBAL_CELL.stamp)
        with _intern_lock:
            moduledef = _interned.get(key)
            fresh = moduledef is None
            if moduledef is None:
                moduledef = ModuleDef(tuple(nodes), numbered, boxes, tuple(order), key)
                _interned[key] = moduledef

        plan = Plan()
        plan.reference = weakref.ref(plan)
        plan.moduledef = moduledef
        plan.boxes = [self.boxes[number] for number in by_rank]
        plan.parameters = [b for b in plan.boxes if isinstance(b, Parameter)]
        plan.generators = [b for b in plan.boxes if isinstance(b, Generator)]
        plan.flags = [p._requires_grad for p in plan.parameters]
        plan.cells, plan.stamps = cells, stamps
        plan.watched = watched
        plan.classes, plan.watch = classes, watch
        plan.checked_at = -1  # the first call compares the stamps once more
        plan.cached_leaves = plan.placements = None
        plan.fresh, plan.changes = fresh, {}
        return plan

    def _members(self, module: Any, d: NodeDef, index: int) -> list[tuple[str, Any]]:
        attributes = module.__dict__
        number, box = self.node, self.box
        d.members = (
            tuple(
                (k, None if p is None else box(p, (index, k)))
                for k, p in attributes["_parameters"].items()
            ),
            tuple(
                (k, None if b is None else box(b, (index, k)))
                for k, b in attributes["_buffers"].items()
            ),
            tuple((k, None if m is None else number(m)) for k, m in attributes["_modules"].items()),
        )
        rest, references = [], []
        hidden = type(module)._python_cache
        for name, value in attributes.items():
            if name in _STRUCTURE or name in _OUTSIDE_FORWARD or name in hidden:
                continue
            if isinstance(value, Box):
                references.append((name, "box", box(value, (index, name))))
            elif isinstance(value, ModuleBase):
                references.append((name, "node", number(value)))
            else:
                rest.append((name, value))
        d.references = tuple(references)
        return rest

    def _watch_all(
        self, nodes: list[NodeDef], attributes: list[list[tuple[str, Any]]]
    ) -> tuple[Hashable, list[_Watched], dict[type, Identity], Watch]:
        watched: dict[int, _Watched] = {}  # by the identity of the value: some are shared by many
        classes: dict[type, Identity] = {}
        watch = Watch()
        hooks = NodeDef(ModuleBase)
        tables = [(name, table) for name, table in GLOBAL_HOOKS.items() if table]
        self._statics(hooks, tables, watched, watch, False)
        for module, d, rest in zip(self.modules, nodes, attributes, strict=True):
            cls = type(module)
            if cls not in classes:
                classes[cls] = _content_of(cls, watch)
            self._statics(d, rest, watched, watch, module._cell.scope is not None)
            d.statics = (*d.statics, (f"class {cls.__name__}", classes[cls]))
        return hooks.statics, [*watched.values()], classes, watch

    def _statics(
        self,
        d: NodeDef,
        rest: list[tuple[str, Any]],
        watched: dict[int, _Watched],
        watch: Watch,
        of_clone: bool,
    ) -> None:
        statics, values, shadowing = [], [], []
        cls = d.cls
        promised = getattr(cls, "_unwatched", ())
        node_of = functools.partial(_number, self.node_ids)
        for name, value in sorted(rest, key=operator.itemgetter(0)):
            unwatched = name in promised
            where = functools.partial("'{}.{}'".format, cls.__name__, name)
            again = functools.partial(_frozen, value, where, node_of, unwatched, of_clone)
            freezer, key = again()
            if freezer.watch:
                watched.setdefault(id(value), (again, key))
                watch.add(freezer.watch)
            for kind, why in () if unwatched else freezer.unseen:
                _warn_unseen(kind, why, where(), name)
            stored, copy = value, SHARED
            if isinstance(value, HookDict):
                stored, copy = dict(value), HOOKS
            elif freezer.mutable or freezer.rebinds:
                copy = COPIED
            if copy:
                stored = copied(stored, self._unbind, freezer.objects)
            statics.append((name, key))
            values.append((name, stored, copy))
            if hasattr(cls, name):
                shadowing.append((name, stored, copy))
        d.statics, d.values, d.shadowing = tuple(statics), tuple(values), tuple(shadowing)

    def _unbind(self, value: Any) -> Any:
        if type(value) is types.MethodType:
            node = self.node_ids.get(id(value.__self__))
            if node is not None:
                return BoundMethod(node, value.__func__)
        return value


_warned: weakref.WeakSet[type] = weakref.WeakSet()


def _warn_unseen(cls: type, why: str, where: str, name: str) -> None:
    """Warn, once for each class, that compiled code does not see what changes in its instances."""
    if cls in _warned:
        return
    _warned.add(cls)
    warnings.warn(
        explain(
            f"kept an object of type {cls.__name__} in {where}",
            f"{why}, so it compares by identity: what changes in it goes unseen by compiled code",
            "assign another object when it changes; or, if it does not matter to forward, say so in "
            f"the class: _unwatched = ({name!r},)",
        ),
        UserWarning,
        stacklevel=user_stack_level(),
    )


def build_plan(roots: Sequence[Any], untie: bool = False) -> Plan:
    """Walk modules and boxes together: what they share is one node, one leaf."""
    return _Builder(untie).build(roots)


def plan_of(module: Any) -> Plan:
    """Return the plan of a module, walking it only if something has changed."""
    plan = module._plan
    if plan is None or not plan.valid():
        stale, plan = plan, build_plan((module,))
        if stale is not None:
            count_changes(stale, plan)
        set_plan(module, plan)
    return plan


def count_changes(before: Plan, after: Plan) -> None:
    """Count the attributes that led to a new ModuleDef, and warn of one that keeps doing so."""
    after.changes = before.changes
    if not after.fresh or before.moduledef is after.moduledef:
        return
    for name, change in differences(before.moduledef, after.moduledef):
        after.changes[name] = count = after.changes.get(name, 0) + 1
        if count == RETRACE_LIMIT:
            warnings.warn(
                explain(
                    f"{name!r} changed {count} times (last: {change})",
                    "it is a static attribute, part of the compiled code, and every new value "
                    "compiles the model again",
                    f"make it a buffer: self.register_buffer({name.rpartition('.')[2]!r}, array, "
                    "persistent=False)",
                ),
                RetraceWarning,
                stacklevel=user_stack_level(),
            )
