"""How layers are stored: runs of equal ones as one module whose arrays have a leading axis.

Terms
  layer       one block as users know it. Its boxes are slices (`core.slices`), its stamp is that of the
              module it is stored in: a change of a layer is a change of what is stored.
  segment     layers from `start` to `stop` that are stored as one module.
  tied        a box or module that several layers have in common. It is stored as it is.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from statefulnn.core.generator import Generator
from statefulnn.core.graph import modules_around, set_homes
from statefulnn.core.module import Module
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.ownership import Scope, real_dict, set_plan, set_stamp
from statefulnn.core.plan import Plan, build_plan
from statefulnn.core.registry import Registry
from statefulnn.core.slices import Slice, become_slice, gathered, slice_of, spec_of
from statefulnn.core.stamps import Stamp
from statefulnn.layer_stack import _refusals as refusals


class Segment(NamedTuple):
    """Layers that are stored as one module.

    Attributes:
        start, stop: their numbers.
        ranks: the names of its stacked arrays, and how many axes a layer has of each.
        shared: the names of the modules that all layers have in common.
    """

    start: int
    stop: int
    ranks: tuple[tuple[str, int], ...]
    shared: tuple[str, ...]


class Layer:
    """What is known of one layer: its plan, its modules by node number, what tells it from others."""

    def __init__(self, module: Any) -> None:
        self.plan: Plan = build_plan((module,))
        self.moduledef: ModuleDef = self.plan.moduledef
        self.nodes = nodes_of(module, self.moduledef)
        self.specs = tuple(map(spec_of, self.plan.boxes))
        self.tied: tuple[int | None, ...] = ()

    @property
    def key(self) -> tuple:
        return self.moduledef, self.specs, self.tied


def nodes_of(root: Any, moduledef: ModuleDef) -> list[Any]:
    """Return the modules of a tree in node order."""
    nodes = []
    for path in moduledef.paths:
        module = root
        for name in (path or ("",))[1:]:
            held = module.__dict__
            module = held["_modules"][name] if name in held["_modules"] else held[name]
        nodes.append(module)
    return nodes


def taken_apart(modules: Sequence[Any]) -> tuple[list[Layer], set[int]]:
    """Return what is known of each layer, and the ids of the modules that several of them have."""
    layers = [Layer(module) for module in modules]
    boxes = collections.Counter(id(b) for layer in layers for b in layer.plan.boxes)
    counted = collections.Counter(id(m) for layer in layers for m in layer.nodes)
    for layer in layers:
        layer.tied = tuple(id(b) if boxes[id(b)] > 1 else None for b in layer.plan.boxes)
    return layers, {number for number, count in counted.items() if count > 1}


def stored(
    modules: Sequence[Any], layers: Sequence[Layer], common: set[int], scope: Scope | None
) -> list[tuple[Segment, Any]]:
    """Store layers, equal neighbours together; from here on their boxes are slices."""
    found = []
    start = 0
    for _, group in itertools.groupby(layers, lambda layer: layer.key):
        run = list(group)
        found.append(_stored_together(run, start, common, scope))
        start += len(run)
    return found


def _stored_together(
    run: list[Layer], start: int, common: set[int], scope: Scope | None
) -> tuple[Segment, Any]:
    first = run[0]
    moduledef = first.moduledef
    given = {k: m for k, m in enumerate(first.nodes) if id(m) in common}
    numbered: list[Any] = []
    wholes: list[tuple[Any, list[Any], int]] = []
    ranks = []
    for number, (cls, static) in enumerate(moduledef.boxes):
        position = moduledef.order[number]
        column = [layer.plan.boxes[position] for layer in run]
        if first.tied[position] is not None:
            numbered.append(column[0])
            continue
        if cls is Generator:
            raise refusals.generator_in_a_block(moduledef.leaf_names[position])
        whole, array = gathered(column)
        if whole is None:
            whole = cls.clone_of(static, array, scope, position)
        elif static is not None and whole._requires_grad != static:
            whole.requires_grad_(static)
        rank = len(first.specs[position][0])
        ranks.append((moduledef.leaf_names[position], rank))
        numbered.append(whole)
        # At once, so that what is stacked now is not held twice until the end.
        stamp = Stamp()
        for index, box in enumerate(column):
            become_slice(box, Slice(whole, index, rank, stamp))
        wholes.append((whole, column, rank))
    modules = modules_around(moduledef, numbered, scope, given=given)
    stack = modules[0]
    if 0 not in given:
        set_homes(stack, given=given.values())
    for _, column, _ in wholes:
        for box in column:
            at = slice_of(box)
            assert at is not None
            at.stamp = stack._nn_stamp
    for layer in run:
        for k, module in enumerate(layer.nodes):
            if k not in given:
                share_stamp(module, stack._nn_stamp)
    shared = tuple(name_of(moduledef, k) for k in given)
    return Segment(start, start + len(run), tuple(ranks), shared), stack


def layer_of(
    segment: Segment, stack: Any, plan: Plan, index: int, scope: Scope | None
) -> Any:
    """Build a layer that is stored: a module whose boxes are slices."""
    moduledef, ranks = plan.moduledef, dict(segment.ranks)
    numbered = []
    for number, (cls, static) in enumerate(moduledef.boxes):
        position = moduledef.order[number]
        whole, name = plan.boxes[position], moduledef.leaf_names[position]
        if name in ranks:
            box = cls.clone_of(static, None, whole._scope, position)
            become_slice(box, Slice(whole, index, ranks[name], stack._nn_stamp))
            numbered.append(box)
        else:
            numbered.append(whole)
    given = given_nodes(segment, stack, moduledef)
    if 0 in given:
        return stack
    modules = modules_around(moduledef, numbered, scope, given=given)
    set_homes(modules[0], given=given.values())
    for k, module in enumerate(modules):
        if k not in given:
            share_stamp(module, stack._nn_stamp)
    return modules[0]


def given_nodes(segment: Segment, stack: Any, moduledef: ModuleDef) -> Mapping[int, Any]:
    """Return the modules of a stack that are those of the layers too, by node number."""
    if not segment.shared:
        return {}
    nodes = nodes_of(stack, moduledef)
    return {k: m for k, m in enumerate(nodes) if name_of(moduledef, k) in segment.shared}


def name_of(moduledef: ModuleDef, node: int) -> str:
    """Return the dotted name of a module in its layer."""
    return ".".join((moduledef.paths[node] or ("",))[1:])


def is_stored(layer: Plan, index: int, segment: Segment, stack: Plan) -> bool:
    """Say whether a layer has the boxes that it was stored with: slices of those of the stack."""
    ranks = dict(segment.ranks)
    for name, box, whole in zip(
        layer.moduledef.leaf_names, layer.boxes, stack.boxes, strict=True
    ):
        at = slice_of(box)
        if name not in ranks:
            if box is not whole:
                return False
        elif at is None or at.whole is not whole or at.index != index:
            return False
    return True


def members(moduledef: ModuleDef) -> tuple:
    """Return what a structure is but for its static attributes and flags."""
    return tuple((d.cls, d.members, d.references) for d in moduledef.nodes)


def share_stamp(module: Any, stamp: Stamp) -> None:
    """Let a change of a module be a change of another one."""
    set_stamp(module, stamp)
    set_plan(module, None)
    for value in real_dict(module).values():
        if isinstance(value, Registry):
            value.stamp = stamp


def own_stamps(module: Module, modules: Sequence[Any], scope: Scope | None) -> None:
    """Give each module of a layer a stamp of its own again."""
    for part in modules:
        share_stamp(part, Stamp(scope))
        part._nn_stamp.touch()
