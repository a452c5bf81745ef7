"""Plan: what a root keeps so that it is not walked at every call.

A plan holds the ModuleDef of its roots, their boxes in leaf order and the stamps of their modules. It is
right as long as the stamps are the same and a `Watch` sees no change in what can change without a stamp:
lists, dicts, objects, closures, and the classes of the modules. It never refers to a module, so a model
dies by reference count.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.class_keys import ValueKeyMaker, class_key
from statefulnn.core.construction import settings
from statefulnn.core.errors import RetraceWarning, explain, user_stack_level
from statefulnn.core.generator import Generator
from statefulnn.core.moduledef import COPIED, HOOKS, SHARED, ModuleDef, NodeDef, rank
from statefulnn.core.objects import Identity, copied
from statefulnn.core.ownership import ModuleBase, set_plan
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import gathered, placements_of
from statefulnn.core.registry import GLOBAL_HOOKS, GLOBAL_STAMP, HookDict
from statefulnn.core.slices import refuse_parts
from statefulnn.core.stamps import Stamp, clock
from statefulnn.core.static_keys import BoundMethod, HookKeyMaker
from statefulnn.core.surprises import surprising
from statefulnn.core.uninitialized import is_lazy
from statefulnn.core.watch import Watch

# Attributes that live in a module's __dict__ but are not static attributes. Hooks of state_dict and
# friends never run inside compiled code, so they are no part of a ModuleDef.
NOT_STATIC = frozenset(
    "_parameters _buffers _modules _state_dict_hooks _state_dict_pre_hooks "
    "_load_state_dict_pre_hooks _load_state_dict_post_hooks".split()
)

RETRACE_LIMIT = 8  # changes of one attribute before a warning

_interned: weakref.WeakValueDictionary[Any, ModuleDef] = weakref.WeakValueDictionary()
_intern_lock = threading.Lock()


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False)
class Plan:
    """What is remembered of a set of roots: see the terms at the top of the file.

    Attributes:
        moduledef: the static half of the roots.
        fresh: whether no other live plan had this ModuleDef.
        boxes: in leaf order.
        stamps, numbers: of the modules.
        watch: what can change in place: in static attributes, in the classes of the modules.
        flags: `requires_grad` of the parameters.
        cached_leaves: the arrays in leaf order, None if one may have changed.
        placements: where the leaves lie, see `placements_of`.
        checked_at: the clock when the stamps were compared last.
        settings: what was in force when compiled code was found for it; None for plans without such code.
        changes: how often each attribute led to a ModuleDef not seen before.
        reference: a weak reference to the plan itself.
    """

    moduledef: ModuleDef
    fresh: bool
    boxes: list[Box]
    stamps: list[Stamp]
    numbers: list[int]
    watch: Watch
    parameters: list[Parameter] = dataclasses.field(init=False)
    generators: list[Generator] = dataclasses.field(init=False)
    flags: list[bool] = dataclasses.field(init=False)
    cached_leaves: list[Any] | None = None
    placements: tuple[Any, ...] | None = None
    checked_at: int = -1  # the first call compares the stamps once more
    changes: dict[str, int] = dataclasses.field(default_factory=dict)
    reference: Any = None
    settings: tuple | None = None

    def __post_init__(self) -> None:
        self.parameters = [b for b in self.boxes if isinstance(b, Parameter)]
        self.generators = [b for b in self.boxes if isinstance(b, Generator)]
        self.flags = [p._requires_grad for p in self.parameters]
        self.reference = weakref.ref(self)

    def valid(self) -> bool:
        """Say whether nothing structural or static has changed since the plan was made."""
        if self.checked_at != clock.structure:
            now = clock.structure
            if [s.number for s in self.stamps] != self.numbers:
                return False
            if [p._requires_grad for p in self.parameters] != self.flags:
                return False
            if self.settings is not None and self.settings != settings():
                return False
            if self.settings is None or not clock.blocks:
                self.checked_at = now
        return self.watch.unchanged()

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


class _Builder:
    """Walks roots once and makes their plan."""

    def __init__(self, untie: bool = False) -> None:
        self._untie = untie
        self._modules: list[Any] = []
        self._node_ids: dict[Hashable, int] = {}
        self._boxes: list[Box] = []
        self._box_ids: dict[Hashable, int] = {}
        self._nodes: list[NodeDef] = []
        self._attributes: list[list[tuple[str, Any]]] = []  # the static ones of each module

    def build(self, roots: Sequence[ModuleBase | Box]) -> Plan:
        numbered = tuple(
            ("box", self._box(r, id(r))) if isinstance(r, Box) else ("node", self._node(r))
            for r in roots
        )
        stamps, numbers = [], []
        for module in self._modules:  # the list grows while it is walked
            module._nn_settle()
            stamps.append(module._nn_stamp)
            numbers.append(module._nn_stamp.number)  # first: a change meanwhile is seen next time
            self._nodes.append(NodeDef(type(module)))
            self._attributes.append(self._walk(module, self._nodes[-1], len(self._nodes) - 1))
        stamps.append(GLOBAL_STAMP)
        numbers.append(GLOBAL_STAMP.number)

        for _ in range(4):
            statics = _Statics(self._node_ids)
            hooks = statics.of_all(self._modules, self._nodes, self._attributes)
            if statics.watch.unchanged():
                break  # else another thread changed something between its key and its copy

        refuse_parts(self._boxes)
        boxes = tuple((b.clone_class, b.static_part()) for b in self._boxes)
        ranks = [rank(cls, static) for cls, static in boxes]
        by_rank = sorted(range(len(ranks)), key=ranks.__getitem__)
        order = tuple(sorted(range(len(ranks)), key=by_rank.__getitem__))  # the inverse
        key = (numbered, tuple(d.key for d in self._nodes), boxes, hooks)
        with _intern_lock:
            moduledef = _interned.get(key)
            fresh = moduledef is None
            if moduledef is None:
                moduledef = ModuleDef(tuple(self._nodes), numbered, boxes, order, key)
                _interned[key] = moduledef
        in_order = [self._boxes[number] for number in by_rank]
        return Plan(moduledef, fresh, in_order, stamps, numbers, statics.watch)

    def _node(self, module: ModuleBase, where: Hashable = None) -> int:
        return _numbered(self._node_ids, id(module), self._modules, module)

    def _box(self, box: Box, where: Hashable) -> int:
        if is_lazy(box):
            _ = box.value  # raises: it has no shape to compile for
        return _numbered(self._box_ids, where if self._untie else id(box), self._boxes, box)

    def _walk(self, module: ModuleBase, d: NodeDef, index: int) -> list[tuple[str, Any]]:
        """Number the members of a module; return its static attributes."""
        attributes = module.__dict__

        def members(registry: str, number: Callable[[Any, Hashable], int]) -> tuple:
            items = attributes[registry].items()
            return tuple((k, None if v is None else number(v, (index, k))) for k, v in items)

        box, node = self._box, self._node
        d.members = members("_parameters", box), members("_buffers", box), members("_modules", node)
        rest, references = [], []
        hidden = NOT_STATIC.union(getattr(type(module), "_python_cache", ()))
        for name, value in attributes.items():
            if name in hidden:
                continue
            if isinstance(value, Box):
                references.append((name, "box", box(value, (index, name))))
            elif isinstance(value, ModuleBase):
                references.append((name, "node", node(value)))
            else:
                rest.append((name, value))
        d.references = tuple(references)
        return rest


def _numbered(numbers: dict[Hashable, int], key: Hashable, things: list, thing: object) -> int:
    """Return the number of a thing; put it at the end of the list if it has none yet."""
    if key not in numbers:
        numbers[key] = len(things)
        things.append(thing)
    return numbers[key]


class _Statics:
    """Makes the keys and copies of the static attributes of some modules, and what watches them."""

    def __init__(self, node_ids: dict[Hashable, int]) -> None:
        self._node_ids = node_ids
        self._classes: dict[type, Identity] = {}
        self.watch = Watch()

    def of_all(self, modules: list[Any], nodes: list[NodeDef], attributes: list[list]) -> Hashable:
        """Fill the nodes; return the key of the hooks that fire for every module."""
        hooks = NodeDef(ModuleBase)
        self._fill(hooks, [(name, table) for name, table in GLOBAL_HOOKS.items() if table], False)
        for module, d, own in zip(modules, nodes, attributes, strict=True):
            cls = type(module)
            if cls not in self._classes:
                self._classes[cls] = class_key(cls, self.watch)
            self._fill(d, own, module._nn_stamp.scope is not None)
            d.statics = (*d.statics, (f"class {cls.__name__}", self._classes[cls]))
        return hooks.statics

    def _fill(self, d: NodeDef, attributes: Iterable[tuple[str, Any]], of_clone: bool) -> None:
        statics, values = [], []
        promised = getattr(d.cls, "_unwatched", ())
        for name, value in sorted(attributes, key=operator.itemgetter(0)):
            where = functools.partial("'{}.{}'".format, d.cls.__name__, name)
            unwatched, copy = name in promised, SHARED
            if isinstance(value, HookDict):
                # Handles number the hooks: two equal models have other numbers.
                keys, stored, copy = HookKeyMaker(where, self._node_of), dict(value), HOOKS
                key = tuple(map(keys.of, value.values()))
            else:
                keys = ValueKeyMaker(where, self._node_of, unwatched, of_clone)
                stored = value
                key = keys.of(value)
                if keys.mutable or keys.rebinds:
                    copy = COPIED
            if not unwatched:
                self.watch.add(keys.watch)
                for kind, why in keys.unseen:
                    _warn_unseen(kind, why, where(), name)
            if copy:
                stored = copied(stored, self._unbind, keys.objects)
            statics.append((name, key))
            values.append((name, stored, copy))
        d.statics, d.values = tuple(statics), tuple(values)
        d.shadowing = tuple(item for item in values if hasattr(d.cls, item[0]))

    def _node_of(self, module: object) -> int | None:
        return self._node_ids.get(id(module))

    def _unbind(self, value: Any) -> Any:
        node = self._node_of(value.__self__) if type(value) is types.MethodType else None
        return value if node is None else BoundMethod(node, value.__func__)


_warned: weakref.WeakSet[type] = weakref.WeakSet()


def _warn_unseen(cls: type, why: str, where: str, name: str) -> None:
    """Warn, once for each class, that compiled code does not see what changes in its instances."""
    if cls in _warned:
        return
    _warned.add(cls)
    _warn(
        UserWarning,
        f"kept an object of type {cls.__name__} in {where}",
        f"{why}, so it compares by identity: what changes in it goes unseen by compiled code",
        "assign another object when it changes; or, if it does not matter to forward, say so in "
        f"the class: _unwatched = ({name!r},)",
    )


def _warn(category: type[Warning], what: str, why: str, instead: str) -> None:
    warnings.warn(explain(what, why, instead), category, stacklevel=user_stack_level())


def build_plan(roots: Sequence[ModuleBase | Box], untie: bool = False) -> Plan:
    """Walk modules and boxes together: what they share is one node, one leaf."""
    return _Builder(untie).build(roots)


def plan_of(module: ModuleBase) -> Plan:
    """Return the plan of a module, walking it only if something has changed."""
    plan = module._nn_plan
    if plan is None or not plan.valid():
        stale, plan = plan, build_plan((module,))
        if stale is not None:
            count_changes(stale, plan)
        set_plan(module, plan)
    return plan


def count_changes(before: Plan, after: Plan) -> None:
    """Count the attributes that led to a new ModuleDef, and warn of one that keeps doing so."""
    after.changes = before.changes
    for name, change in surprising(before.moduledef, after.moduledef) if after.fresh else ():
        after.changes[name] = count = after.changes.get(name, 0) + 1
        if count == RETRACE_LIMIT:
            _warn(
                RetraceWarning,
                f"{name!r} changed {count} times (last: {change})",
                "it is a static attribute, part of the compiled code, and every new value compiles "
                "the model again",
                f"make it a buffer: self.register_buffer({name.rpartition('.')[2]!r}, array, "
                "persistent=False)",
            )
