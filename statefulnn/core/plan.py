"""Plan: what a root keeps so that it is not walked at every call.

A plan holds the ModuleDef of its roots, their boxes in leaf order and the stamps of their modules. It is
right as long as the stamps are the same; whatever can change without a stamp (lists, dicts, closures) is
frozen again and compared. It never refers to a module, so a model dies by reference count.
"""

from __future__ import annotations

import functools
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from statefulnn.core.box import Box, Parameter
from statefulnn.core.errors import RetraceWarning, explain, user_stack_level
from statefulnn.core.freeze import BoundMethod, Freezer, HookFreezer, copied
from statefulnn.core.generator import Generator
from statefulnn.core.moduledef import COPIED, HOOKS, SHARED, ModuleDef, NodeDef, differences, rank
from statefulnn.core.ownership import ModuleBase, set_plan
from statefulnn.core.placement import placements_of, spread
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

_content = operator.attrgetter("cell_contents")

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
        "closures",
        "flags",
        "fresh",
        "generators",
        "moduledef",
        "node_ids",
        "parameters",
        "placements",
        "reference",
        "stamps",
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
    watched: list[tuple[Any, Any, Any]]  # (value that can change in place, its key, its name)
    closures: Any  # None, or the cells of closures and what was in them
    node_ids: dict[int, int]
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
        if self.watched:
            for value, key, where in self.watched:
                if Freezer(where, self._node_of).freeze(value) != key:
                    return False
        if self.closures:
            cells, contents = self.closures
            if not all(map(operator.is_, map(_content, cells), contents)):
                return False
        return True

    def _node_of(self, module: Any) -> int | None:
        return self.node_ids.get(id(module))

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
            placements = placements_of(leaves)
            if placements is not None:
                for i, value in spread(leaves, placements):
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

        watched: list[Any] = []
        closures: list[Any] = []
        for module, d, rest in zip(self.modules, nodes, attributes, strict=True):
            self._statics(module, d, rest, watched, closures)

        boxes = tuple((type(b), b.static_part()) for b in self.boxes)
        ranks = [rank(cls, static) for cls, static in boxes]
        by_rank = sorted(range(len(ranks)), key=ranks.__getitem__)
        order = [0] * len(ranks)
        for position, number in enumerate(by_rank):
            order[number] = position

        key = (numbered, tuple(d.key for d in nodes), boxes, _global_hooks(closures))
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
        plan.closures = tuple(zip(*closures, strict=True)) if closures else None
        plan.node_ids = self.node_ids if watched else {}
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

    def _statics(self, module: Any, d: NodeDef, rest: list, watched: list, closures: list) -> None:
        statics, values, shadowing = [], [], []
        cls = type(module)
        unwatched = cls._unwatched
        for name, value in sorted(rest):
            hook = isinstance(value, HookDict)
            make = HookFreezer if hook else Freezer
            where = functools.partial("'{}.{}'".format, cls.__name__, name)
            freezer = make(where, self.node_ids_get)
            if hook:
                # Handles number the hooks: two equal models have other numbers.
                key = tuple(freezer.freeze(h) for h in value.values())
                stored, copy = dict(value), HOOKS
            else:
                key = freezer.freeze(value)
                copy = COPIED if freezer.mutable or freezer.rebinds else SHARED
                stored = value
                if freezer.mutable and name not in unwatched:
                    watched.append((value, key, where))
            if name not in unwatched:
                closures.extend(freezer.closures)
            if copy:
                stored = copied(stored, self._unbind)
            statics.append((name, key))
            values.append((name, stored, copy))
            if hasattr(cls, name):
                shadowing.append((name, stored, copy))
        d.statics, d.values, d.shadowing = tuple(statics), tuple(values), tuple(shadowing)

    def node_ids_get(self, module: Any) -> int | None:
        return self.node_ids.get(id(module))

    def _unbind(self, value: Any) -> Any:
        if type(value) is types.MethodType:
            node = self.node_ids.get(id(value.__self__))
            if node is not None:
                return BoundMethod(node, value.__func__)
        return value


def _global_hooks(closures: list[Any]) -> Any:
    freezer = HookFreezer(lambda: "a global hook")
    key = tuple(
        (name, tuple(freezer.freeze(h) for h in hooks.values()))
        for name, hooks in GLOBAL_HOOKS.items()
        if hooks
    )
    closures.extend(freezer.closures)
    return key


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
