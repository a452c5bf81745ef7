"""How layers are stored: runs of equal ones as one module whose arrays have a leading axis.

Terms
  layer       one block as users know it. Its boxes are slices (`core.slices`), its stamp is that of the
              module it is stored in: a change of a layer is a change of what is stored.
  segment     neighbours whose arrays are stored together: as those of one module for each kind of them.
  tied        a box or module that several layers have in common. It is stored as it is.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from statefulnn.core.generator import Generator
from statefulnn.core.graph import bare, fill
from statefulnn.core.module import Module
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.ownership import Scope, real_dict, set_plan, set_stamp
from statefulnn.core.parameter import Parameter
from statefulnn.core.plan import Plan, build_plan
from statefulnn.core.registry import Registry
from statefulnn.core.slices import Slice, become_slice, gathered, slice_of, spec_of
from statefulnn.core.stamps import Stamp
from statefulnn.core.walk import set_homes
from statefulnn.layer_stack import _refusals as refusals


class Segment(NamedTuple):
    """Neighbours whose arrays are stored together.

    They differ in static attributes at most, such as the mode or hooks. There is a module for each kind of
    them, and all of these hold the same boxes.

    Attributes:
        start, stop: their numbers.
        runs: neighbours of one kind, as (first, stop, name of the module).
        ranks: the names of its stacked arrays, and how many axes a layer has of each.
        shared: the names of the modules that all layers have in common.
    """

    start: int
    stop: int
    runs: tuple[tuple[int, int, str], ...]
    ranks: tuple[tuple[str, int], ...]
    shared: tuple[str, ...]


class Layer:
    """What is known of one layer: its plan, its modules by node number, what tells it from others."""

    def __init__(self, module: Module) -> None:
        self.plan: Plan = build_plan((module,))
        self.moduledef: ModuleDef = self.plan.moduledef
        self.nodes = nodes_of(module, self.moduledef)
        self.specs = tuple(map(spec_of, self.plan.boxes))
        self.tied: tuple[int | None, ...] = ()
        self.slices: list[Slice] = []

    @property
    def key(self) -> tuple:
        """What layers have in common whose arrays are stored together."""
        return members(self.moduledef), self.moduledef.boxes, self.specs, self.tied


def nodes_of(root: Module, moduledef: ModuleDef) -> list[Any]:
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
    layers: Sequence[Layer], common: set[int], scope: Scope | None
) -> tuple[list[Segment], dict[str, Any]]:
    """Store layers: return the segments, and the modules by name. Their boxes are slices from here on."""
    groups = [list(group) for _, group in itertools.groupby(layers, lambda layer: layer.key)]
    segments: list[Segment] = []
    modules: dict[str, Any] = {}
    start = 0
    for group in groups:
        stop = start + len(group)
        name = "stack" if len(groups) == 1 else f"{start}-{stop - 1}"
        segments.append(_Storing(group, common, scope).segment(start, name, modules))
        start = stop
    return segments, modules


class _Storing:
    """Stores the layers of one segment."""

    def __init__(self, layers: list[Layer], common: set[int], scope: Scope | None) -> None:
        self._layers = layers
        self._scope = scope
        self._moduledef = layers[0].moduledef
        self._given = {k: m for k, m in enumerate(layers[0].nodes) if id(m) in common}
        self._ranks: list[tuple[str, int]] = []
        self._numbered = [
            self._whole(self._moduledef.order[number], cls, static)
            for number, (cls, static) in enumerate(self._moduledef.boxes)
        ]

    def _whole(self, position: int, cls: Any, static: Any) -> Any:
        """Return the box with the arrays of all layers; theirs are slices of it from here on."""
        column = [layer.plan.boxes[position] for layer in self._layers]
        name = self._moduledef.leaf_names[position]
        if self._layers[0].tied[position] is not None:
            return column[0]
        if cls is Generator:
            raise refusals.generator_in_a_block(name)
        whole, array = gathered(column)
        if whole is None:
            whole = cls.clone_of(static, array, self._scope, position)
        elif isinstance(whole, Parameter):
            whole.requires_grad_(static)
        rank = len(self._layers[0].specs[position][0])
        self._ranks.append((name, rank))
        # At once, so that what is stacked now is not held twice until the end.
        for index, (layer, box) in enumerate(zip(self._layers, column, strict=True)):
            layer.slices.append(Slice(whole, index, rank, layer.nodes[0]))
            become_slice(box, layer.slices[-1])
        return whole

    def segment(self, start: int, name: str, modules: dict[str, Any]) -> Segment:
        """Build a module for each kind of layer."""
        kinds: dict[int, str] = {}
        runs = []
        for kind, group in itertools.groupby(self._layers, lambda layer: id(layer.moduledef)):
            run = list(group)
            if kind not in kinds:
                kinds[kind] = f"{name}~{len(kinds)}" if kinds else name
                modules[kinds[kind]] = self._module(run[0].moduledef)
            self._attach(run, modules[kinds[kind]])
            first = runs[-1][1] if runs else start
            runs.append((first, first + len(run), kinds[kind]))
        shared = tuple(name_of(self._moduledef, k) for k in self._given)
        return Segment(start, start + len(self._layers), tuple(runs), tuple(self._ranks), shared)

    def _module(self, moduledef: ModuleDef) -> Any:
        return modules_around(moduledef, self._numbered, self._scope, self._given)[0]

    def _attach(self, run: list[Layer], stack: Module) -> None:
        for layer in run:
            for at in layer.slices:
                at.module = stack
            for k, module in enumerate(layer.nodes):
                if k not in self._given:
                    share_stamp(module, stack._nn_stamp)


def layer_of(
    segment: Segment, stack: Module, plan: Plan, index: int | slice, scope: Scope | None
) -> Any:
    """Build a layer that is stored, or a stack of several: a module whose boxes are slices."""
    moduledef, ranks = plan.moduledef, dict(segment.ranks)
    numbered = []
    for number, (cls, static) in enumerate(moduledef.boxes):
        position = moduledef.order[number]
        whole, name = plan.boxes[position], moduledef.leaf_names[position]
        if name in ranks:
            box = cls.clone_of(static, None, whole._scope, position)
            become_slice(box, Slice(whole, index, ranks[name], stack))
            numbered.append(box)
        else:
            numbered.append(whole)
    given = given_nodes(segment, stack, moduledef)
    if 0 in given:
        return stack
    modules = modules_around(moduledef, numbered, scope, given)
    for k, module in enumerate(modules):
        if k not in given:
            share_stamp(module, stack._nn_stamp)
    return modules[0]


def modules_around(
    moduledef: ModuleDef, numbered: Sequence[Any], scope: Scope | None, given: Mapping[int, Any]
) -> list[Any]:
    """Build the modules of a ModuleDef around boxes and some modules that exist."""
    modules = [
        given[k] if k in given else bare(object.__new__(d.cls), k, scope)
        for k, d in enumerate(moduledef.nodes)
    ]
    for k, d in enumerate(moduledef.nodes):
        if k not in given:
            fill(modules[k], d, modules, numbered)
    if 0 not in given:
        set_homes(modules[0], given.values())
    return modules


def given_nodes(segment: Segment, stack: Module, moduledef: ModuleDef) -> Mapping[int, Any]:
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
    for name, box, whole in zip(layer.moduledef.leaf_names, layer.boxes, stack.boxes, strict=True):
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


def share_stamp(module: Module, stamp: Stamp) -> None:
    """Let a change of a module be a change of another one."""
    set_stamp(module, stamp)
    set_plan(module, None)
    for value in real_dict(module).values():
        if isinstance(value, Registry):
            value.stamp = stamp
    for layer in real_dict(module).get("_views", {}).values():
        for part in layer.modules():
            share_stamp(part, stamp)


def own_stamps(modules: Sequence[Any], scope: Scope | None) -> None:
    """Give each module of a layer a stamp of its own again."""
    for part in modules:
        share_stamp(part, Stamp(scope))
        part._nn_stamp.touch()
