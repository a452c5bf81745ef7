"""split and merge: a module tree as a static half and a list of arrays, and back.

Terms
  leaves      the arrays of a module, each once: trainable parameters, frozen parameters, buffers,
              generators. A tied parameter is one leaf.
  ModuleDef   the static rest: classes, names, which box sits where (ties, shared modules, cycles),
              static attributes. Immutable, compared by structure; equal ones are one object.
  Plan        what a root keeps so that it is not walked at every call: its ModuleDef, its boxes in
              leaf order, the stamps of its modules. It never refers to a module, so a model dies by
              reference count.
  clone       a module that `merge` builds. Transformed code runs on clones.
  shell       a module that came out of a JAX transformation and has not been looked at: it keeps its
              ModuleDef and leaves, and becomes a module at the first access to an attribute.

Every transform of the package, and the registration as a pytree, is built on `plan_of`, `merge` and
`ModuleDef`. Limitation: writing into ``module.__dict__`` by hand goes unseen.
"""

from __future__ import annotations

import threading
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from statefulnn.core.box import (
    LOST_IN_RAW_TRANSFORM,
    Box,
    Buffer,
    Cell,
    ModuleBase,
    Parameter,
    Scope,
    clock,
    set_cell,
    set_home,
    set_plan,
    set_shell,
    user_stack_level,
)
from statefulnn.core.compat import EAGER, current_trace, kind
from statefulnn.core.errors import RetraceWarning, ShapeError, UnknownNameError, explain
from statefulnn.core.freeze import BoundMethod, Freezer, HookFreezer, copied
from statefulnn.core.generator import Generator

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


class NodeDef:
    """One module of a ModuleDef.

    Attributes:
        cls: its class.
        members: per registry (`_parameters`, `_buffers`, `_modules`), the names and the number of the
            box or node under each, None for a name that holds None.
        references: attributes that refer to a box or module without registering it.
        statics: the static attributes (name, frozen key).
        values: the same attributes (name, stored value, whether it must be copied for each clone).
    """

    __slots__ = ("cls", "members", "references", "shadowing", "statics", "values")

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.members: tuple = ()
        self.references: tuple = ()
        self.statics: tuple = ()
        self.values: tuple = ()
        self.shadowing: tuple = ()

    @property
    def key(self) -> tuple:
        return (self.cls, self.members, self.references, self.statics)


class ModuleDef:
    """The static half of one or several modules; hashable, and equal ones are the same object.

    Attributes:
        nodes: the modules, each once, in the order they were met.
        roots: for each root, ("node", number) or ("box", number).
        boxes: the class and static part of each box, in the order they were met.
        order: the leaf position of each box.
    """

    __slots__ = (
        "__weakref__",
        "_hash",
        "_names",
        "_paths",
        "boxes",
        "key",
        "nodes",
        "order",
        "roots",
    )

    def __init__(self, nodes: tuple, roots: tuple, boxes: tuple, order: tuple, key: Any) -> None:
        self.nodes = nodes
        self.roots = roots
        self.boxes = boxes
        self.order = order
        self.key = key
        self._hash = hash(key)
        self._names: Any = None
        self._paths: Any = None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(other) is ModuleDef and self._hash == other._hash and self.key == other.key

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ModuleDef refers to live classes and functions: pickle the module instead"
        )

    def __repr__(self) -> str:
        names = ", ".join(self.nodes[i].cls.__name__ for k, i in self.roots if k == "node")
        return f"ModuleDef({names}: {len(self.nodes)} modules, {len(self.boxes)} leaves)"

    @property
    def num_leaves(self) -> int:
        """How many leaves `merge` takes."""
        return len(self.boxes)

    def kind_of(self, position: int) -> str:
        """Return "trainable", "frozen", "buffer" or "generator" for a leaf position."""
        return _KINDS[self._ranks[position]]

    @property
    def _ranks(self) -> list[int]:
        ranks = [0] * len(self.boxes)
        for number, (cls, static) in enumerate(self.boxes):
            ranks[self.order[number]] = _rank(cls, static)
        return ranks

    def count(self, kind: str) -> int:
        """Return how many leaves are of a kind."""
        rank = _KINDS.index(kind)
        return sum(r == rank for r in self._ranks)

    @property
    def paths(self) -> list[tuple[str, ...] | None]:
        """For each node, the names that lead to it from its root, the root's number first."""
        if self._paths is None:
            self._name_everything()
        return self._paths

    @property
    def names(self) -> dict[str, int]:
        """Every dotted name of every box under the first root (ties have several): its leaf position."""
        if self._names is None:
            self._name_everything()
        return self._names[0]

    @property
    def leaf_names(self) -> list[str]:
        """For each leaf, its first name; a leaf that is only referred to is named by the reference."""
        if self._names is None:
            self._name_everything()
        return self._names[1]

    def _name_everything(self) -> None:
        names: dict[str, int] = {}
        first: list[str | None] = [None] * len(self.boxes)
        paths: list[tuple | None] = [None] * len(self.nodes)
        several = len(self.roots) > 1

        def visit(node: int, prefix: str, path: tuple, active: frozenset, registered: bool) -> None:
            if node in active:
                return
            if paths[node] is None:
                paths[node] = path
            d = self.nodes[node]
            for registry in d.members[:2]:
                for name, box in registry:
                    if box is not None:
                        label(prefix + name, box, registered)
            active = active | {node}
            for name, child in d.members[2]:
                if child is not None:
                    visit(child, f"{prefix}{name}.", (*path, name), active, registered)

        def refer(node: int, prefix: str, path: tuple, done: set) -> None:
            if node in done:
                return
            done.add(node)
            d = self.nodes[node]
            for name, what, number in d.references:
                if what == "box":
                    label(prefix + name, number, False)
                else:
                    visit(number, f"{prefix}{name}.", (*path, name), frozenset(), False)
                    refer(number, f"{prefix}{name}.", (*path, name), done)
            for name, child in d.members[2]:
                if child is not None:
                    refer(child, f"{prefix}{name}.", (*path, name), done)

        def label(name: str, box: int, registered: bool) -> None:
            position = self.order[box]
            if registered:
                names.setdefault(name, position)
            if first[position] is None:
                first[position] = name

        for number, (what, index) in enumerate(self.roots):
            prefix = f"[{number}]." if several else ""
            if what == "box":
                label(f"[{number}]", index, False)
            else:
                visit(index, prefix, (number,), frozenset(), number == 0 or several)
        for number, (what, index) in enumerate(self.roots):
            if what == "node":
                refer(index, f"[{number}]." if several else "", (number,), set())
        self._paths = paths
        self._names = (names, [n if n is not None else "?" for n in first])


RETRACE_LIMIT = 8  # changes of one attribute before a warning

# How a clone gets a static attribute: the same object, a copy, a copy as a dict of hooks.
SHARED, COPIED, HOOKS = 0, 1, 2

_KINDS = ("trainable", "frozen", "buffer", "generator")


def _rank(cls: type, static: Any) -> int:
    if issubclass(cls, Parameter):
        return 0 if static else 1
    return 3 if issubclass(cls, Generator) else 2


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
        "reference",
        "stamps",
        "watched",
    )

    moduledef: ModuleDef
    boxes: list[Box]  # in leaf order
    parameters: list[Parameter]
    reference: Any  # a weak reference to the plan itself
    generators: list[Generator]
    flags: list[bool]  # requires_grad of the parameters
    cells: list[Cell]
    stamps: list[int]
    watched: list[tuple[Any, Any, type]]  # (value that can change in place, its key, its freezer)
    closures: list[tuple[Any, Any]]
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
            for value, key, freezer in self.watched:
                if freezer(node_of=self._node_of).freeze(value) != key:
                    return False
        if self.closures:
            for cell, content in self.closures:
                if cell.cell_contents is not content:
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
                    b._value = jax.numpy.asarray(b._value)
            leaves = [b._value for b in self.boxes]
            self.keep(leaves, before)
        return leaves

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
        ranks = [_rank(cls, static) for cls, static in boxes]
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
        plan.watched, plan.closures = watched, closures
        plan.node_ids = self.node_ids if watched else {}
        plan.checked_at = -1  # the first call compares the stamps once more
        plan.cached_leaves = None
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
        for name, value in sorted(rest):
            hook = isinstance(value, HookDict)
            make = HookFreezer if hook else Freezer
            freezer = make(lambda name=name: f"'{cls.__name__}.{name}'", self.node_ids_get)
            if hook:
                # Handles number the hooks: two equal models have other numbers.
                key = tuple(freezer.freeze(h) for h in value.values())
                stored, copy = dict(value), HOOKS
            else:
                key = freezer.freeze(value)
                copy = COPIED if freezer.mutable or freezer.rebinds else SHARED
                stored = value
                if freezer.mutable:
                    watched.append((value, key, make))
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


# --------------------------------------------------------------------------------------------------
# merge


def build_clones(
    moduledef: ModuleDef,
    leaves: Sequence[Any],
    scope: Scope | None,
    buffer_scope: Scope | None = None,
    into: Any = None,
) -> tuple[list[Any], list[Box], list[Any]]:
    """Build the modules of a ModuleDef around arrays.

    Args:
        moduledef: the static half.
        leaves: one array per leaf, in leaf order.
        scope: the owner of the clones.
        buffer_scope: another owner for buffers and generators.
        into: a bare module to use as the first root.

    Returns:
        the roots, the boxes in leaf order, all modules in node order.
    """
    if buffer_scope is None:
        buffer_scope = scope
    numbered: list[Any] = [None] * len(leaves)
    boxes: list[Any] = [None] * len(leaves)
    stop = scope is not None and scope.stop_gradients
    for number, (cls, static) in enumerate(moduledef.boxes):
        position = moduledef.order[number]
        value = leaves[position]
        rank = _rank(cls, static)
        if stop and rank and isinstance(value, jax.Array):
            value = _stopped(value)
        box = cls.clone_of(static, value, scope if rank < 2 else buffer_scope, position)
        numbered[number] = boxes[position] = box

    modules = []
    for index, d in enumerate(moduledef.nodes):
        if into is not None and ("node", index) == moduledef.roots[0]:
            module = into
        else:
            module = object.__new__(d.cls)
        set_shell(module, None)
        set_plan(module, None)
        set_home(module, index)
        set_cell(module, Cell(scope))
        modules.append(module)
    for module, d in zip(modules, moduledef.nodes, strict=True):
        fill(module, d, modules, numbered)
    roots = [modules[i] if what == "node" else numbered[i] for what, i in moduledef.roots]
    return roots, boxes, modules


def _stopped(value: Any) -> Any:
    if jax.numpy.issubdtype(value.dtype, jax.numpy.inexact):
        return jax.lax.stop_gradient(value)
    return value


class Registry(dict):
    """The dict of a module's parameters, buffers or children; every change stamps the module."""

    __slots__ = ("__weakref__", "cell")

    def __init__(self, cell: Cell, items: Any = ()) -> None:
        super().__init__(items)
        self.cell = cell

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict) -> dict:
        import copy

        return {k: copy.deepcopy(v, memo) for k, v in self.items()}


def _stamping(name: str) -> Callable:
    original = getattr(dict, name)

    def method(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        finally:
            self.cell.touch()

    method.__name__ = name
    method.__doc__ = original.__doc__
    return method


for _name in "__setitem__ __delitem__ pop popitem clear update setdefault __ior__".split():
    setattr(Registry, _name, _stamping(_name))


class HookDict(Registry):
    """The hooks of one kind, by number: (function, with_kwargs, always_call)."""

    __slots__ = ()


# Hooks that fire for every module. They are part of each ModuleDef: compiled code contains them.
GLOBAL_CELL = Cell()
GLOBAL_HOOKS: dict[str, HookDict] = {
    name: HookDict(GLOBAL_CELL)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
}


def fill(module: Any, d: NodeDef, modules: list[Any], boxes: list[Any]) -> None:
    """Give a bare module the attributes of its node."""
    cell = module._cell
    attributes = module.__dict__
    parameters, buffers, children = d.members
    attributes["_parameters"] = Registry(
        cell, [(k, None if i is None else boxes[i]) for k, i in parameters]
    )
    attributes["_buffers"] = Registry(
        cell, [(k, None if i is None else boxes[i]) for k, i in buffers]
    )
    attributes["_modules"] = Registry(
        cell, [(k, None if i is None else modules[i]) for k, i in children]
    )
    for name, what, i in d.references:
        attributes[name] = boxes[i] if what == "box" else modules[i]
    for name, value, copy in d.values:
        if copy:
            value = copied(value, lambda v: _rebind(v, modules))
            if copy == HOOKS:
                value = HookDict(cell, value)
        attributes[name] = value


def _rebind(value: Any, modules: list[Any]) -> Any:
    if type(value) is BoundMethod:
        return types.MethodType(value.function, modules[value.node])
    return value


# --------------------------------------------------------------------------------------------------
# The pytree registration


class Token(int):
    """Stands for a collected module or box in a treedef: its number."""

    __slots__ = ()


_tokens = [Token(i) for i in range(64)]


class _Collecting(threading.local):
    found: list[Any] | None = None  # while flattening: collect modules and boxes instead of leaves
    table: Sequence[Any] = ()  # while unflattening: what tokens stand for


_collecting = _Collecting()


def flatten_collecting(tree: Any) -> tuple[list[Any], Any, list[Any]]:
    """Flatten a pytree; modules and boxes are not entered but returned beside the leaves."""
    before, _collecting.found = _collecting.found, []
    try:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        return leaves, treedef, _collecting.found
    finally:
        _collecting.found = before


def unflatten_with(treedef: Any, leaves: Any, table: Sequence[Any]) -> Any:
    """Undo `flatten_collecting`, with other modules and boxes in the place of the collected ones."""
    before, _collecting.table = _collecting.table, table
    try:
        return jax.tree_util.tree_unflatten(treedef, leaves)
    finally:
        _collecting.table = before


def _collect(obj: Any, found: list[Any]) -> tuple[tuple, Token]:
    index = len(found)
    found.append(obj)
    return (), _tokens[index] if index < 64 else Token(index)


def flatten_module(module: Any) -> tuple[Any, Any]:
    found = _collecting.found
    if found is not None:
        return _collect(module, found)
    shell = module._shell
    if shell is not None:
        return shell[1], shell[0]
    plan = module._plan
    if plan is None or not plan.valid():
        plan = plan_of(module)
    scope = module._cell.scope
    if scope is not None:
        scope.read = True
    return plan.cached_leaves or plan.leaves(), plan.moduledef


def flatten_module_with_keys(module: Any) -> tuple[Any, Any]:
    leaves, aux = flatten_module(module)
    if type(aux) is Token:
        return (), aux
    names = aux.leaf_names
    return [(jax.tree_util.GetAttrKey(n), v) for n, v in zip(names, leaves, strict=True)], aux


def unflatten_module(aux: Any, leaves: Any) -> Any:
    if type(aux) is Token:
        return _collecting.table[aux]
    root = aux.nodes[aux.roots[0][1]]
    module = object.__new__(root.cls)
    set_shell(module, (aux, leaves, raw_scope(aux)))
    if root.shadowing:
        # A class attribute of that name would answer in the shell's place.
        for name, value, copy in root.shadowing:
            object.__setattr__(module, name, copied(value, lambda v: v) if copy else value)
    return module


def raw_scope(moduledef: ModuleDef) -> Scope | None:
    """Return the owner of what JAX itself rebuilds: nobody under a trace, the user outside."""
    trace = current_trace()
    if trace is EAGER:
        return None
    scope = Scope(False, LOST_IN_RAW_TRANSFORM, moduledef)
    # jax.grad differentiates every leaf it is given; buffers and frozen parameters are constants.
    scope.stop_gradients = kind(trace) == "autodiff"
    return scope


def materialise(module: Any) -> None:
    """Turn a shell into a module."""
    shell = module._shell
    if shell is None:
        return
    moduledef, leaves, scope = shell
    build_clones(moduledef, leaves, scope, into=module)


def flatten_box(box: Box) -> tuple[tuple, Any]:
    found = _collecting.found
    if found is not None:
        return _collect(box, found)
    return (box._value,), (type(box), box.static_part())


def unflatten_box(aux: Any, children: Any) -> Any:
    if type(aux) is Token:
        return _collecting.table[aux]
    cls, static = aux
    scope = None
    trace = current_trace()
    if trace is not EAGER:
        scope = Scope(False, LOST_IN_RAW_TRANSFORM)
    box = cls.clone_of(static, children[0], scope, 0)
    if scope is None:
        box._home = None
    return box


for _cls in (Parameter, Buffer, Generator):
    jax.tree_util.register_pytree_node(_cls, flatten_box, unflatten_box)


# --------------------------------------------------------------------------------------------------
# The public pair


def split(module: Any) -> tuple[ModuleDef, list[Any]]:
    """Return the static half of a module and its arrays.

    Args:
        module: a Module.

    Returns:
        ``(moduledef, leaves)``: trainable parameters first, then frozen ones, buffers, generators;
        a tied parameter is one leaf.

    Example:
        >>> import statefulnn as nn
        >>> moduledef, leaves = nn.split(nn.Linear(3, 4))
        >>> [leaf.shape for leaf in leaves]
        [(4, 3), (4,)]
        >>> nn.merge(moduledef, leaves)
        Linear(in_features=3, out_features=4, bias=True)
    """
    require_module(module, "nn.split")
    plan = plan_of(module)
    return plan.moduledef, list(plan.leaves())


def merge(moduledef: ModuleDef, leaves: Sequence[Any]) -> Any:
    """Build a module from what `split` gave; inside a traced function it may be written.

    Args:
        moduledef: the static half.
        leaves: one array per leaf, with the shapes that `split` gave or others.

    Returns:
        a new Module that shares nothing with the one that was split.

    Raises:
        ShapeError: for a wrong number of leaves.
    """
    leaves = list(leaves)
    if len(leaves) != moduledef.num_leaves:
        raise ShapeError(
            explain(
                f"merged {moduledef!r} with {len(leaves)} leaves",
                f"it has {moduledef.num_leaves} leaves",
                "pass the list that nn.split gave, changed in place or mapped one to one",
            )
        )
    return build_clones(moduledef, leaves, own_scope(moduledef))[0][0]


def own_scope(moduledef: ModuleDef) -> Scope | None:
    """Return the scope of clones that somebody collects: None outside every trace."""
    if current_trace() is EAGER:
        return None
    return Scope(moduledef=moduledef)


def mutable(module: Any) -> Any:
    """Return a copy of a module that may be written, for code that returns the updated module.

    Args:
        module: a Module, mostly one that a plain JAX transformation passed in.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> @jax.jit
        ... def double(model):
        ...     model = nn.mutable(model)
        ...     model.weight.value = model.weight * 2
        ...     return model
        >>> model = nn.Linear(2, 2)
        >>> bool((double(model).weight == 2 * model.weight).all())
        True
    """
    require_module(module, "nn.mutable")
    shell = module._shell
    if shell is not None:
        moduledef, leaves = shell[:2]
        if shell[2] is not None and shell[2].stop_gradients:
            materialise(module)
            moduledef, leaves = split(module)
    else:
        moduledef, leaves = split(module)
    return merge(moduledef, list(leaves))


def require_module(module: Any, function: str) -> None:
    """Raise unless the argument is a Module."""
    if not isinstance(module, ModuleBase):
        hint = f"{module.__name__}(...)" if isinstance(module, type) else "an instance of nn.Module"
        raise TypeError(
            explain(
                f"called {function} with an object of type {type(module).__name__}",
                "it works on modules",
                f"pass {hint}",
            )
        )


def positions_of(moduledef: ModuleDef, names: Any, function: str) -> list[int]:
    """Return the leaf position of each name, or raise with the names that are near."""
    import difflib

    known = moduledef.names
    unknown = [n for n in names if n not in known]
    if unknown:
        near = {n: difflib.get_close_matches(str(n), known, 1) for n in unknown}
        shown = ", ".join(
            f"{n!r}" + (f" (did you mean {near[n][0]!r}?)" if near[n] else "") for n in unknown
        )
        some = ", ".join(list(known)[:8]) + (", ..." if len(known) > 8 else "")
        raise UnknownNameError(
            explain(
                f"{function} was given unknown names: {shown}",
                f"{moduledef!r} has {some or 'no parameters or buffers'}",
                "use the names of named_parameters() and named_buffers()",
            )
        )
    return [known[n] for n in names]


# --------------------------------------------------------------------------------------------------
# Telling two ModuleDefs apart


def differences(before: ModuleDef, after: ModuleDef) -> list[tuple[str, str]]:
    """List what differs between two ModuleDefs as (attribute, description)."""
    found: list[tuple[str, str]] = []
    by_path = {p: i for i, p in enumerate(after.paths)}
    for index, path in enumerate(before.paths):
        if path is None or path not in by_path:
            if path is not None:
                found.append((_dotted(path, "", before), "module removed"))
            continue
        old, new = before.nodes[index], after.nodes[by_path[path]]
        if old.cls is not new.cls:
            found.append(
                (_dotted(path, "", before), f"class {old.cls.__name__} became {new.cls.__name__}")
            )
        for registry, noun in zip((0, 1, 2), ("parameter", "buffer", "module"), strict=True):
            a, b = dict(old.members[registry]), dict(new.members[registry])
            for name in a.keys() - b.keys():
                found.append((_dotted(path, name, before), f"{noun} removed"))
            for name in b.keys() - a.keys():
                found.append((_dotted(path, name, before), f"{noun} added"))
            for name in a.keys() & b.keys():
                if (a[name] is None) != (b[name] is None):
                    found.append((_dotted(path, name, before), f"{noun} set to or from None"))
                elif registry == 2 and a[name] is not None:
                    continue
                elif a[name] is not None and before.boxes[a[name]] != after.boxes[b[name]]:
                    found.append(
                        (_dotted(path, name, before), "requires_grad or persistence changed")
                    )
        a, b = dict(old.statics), dict(new.statics)
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                found.append(
                    (_dotted(path, name, before), f"{_shown(old, name)} became {_shown(new, name)}")
                )
        if old.references != new.references:
            found.append((_dotted(path, "", before), "a reference changed"))
    if not found:
        found.append(("", "which box or module sits where has changed (a tie was made or broken)"))
    return found


def _dotted(path: tuple, name: str, moduledef: ModuleDef) -> str:
    # The first element of a path is the number of its root.
    head = () if len(moduledef.roots) == 1 or path[0] == 0 else (f"[{path[0]}]",)
    return ".".join((*head, *path[1:], *((name,) if name else ()))) or "the module itself"


def _shown(d: NodeDef, name: str) -> str:
    for n, value, _ in d.values:
        if n == name:
            text = repr(value)
            return text if len(text) <= 60 else text[:57] + "..."
    return "(absent)"


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
