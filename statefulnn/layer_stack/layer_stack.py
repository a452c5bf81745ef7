"""LayerStack: a list of equal blocks, stored as one block with a leading axis and run by one loop."""

from __future__ import annotations

import contextlib
import operator
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, SupportsIndex

import jax
import jax.numpy as jnp

from statefulnn.core import compat
from statefulnn.core.errors import StructureChangeError, UninitializedParameterError
from statefulnn.core.graph import fill
from statefulnn.core.listeners import active
from statefulnn.core.module import Module
from statefulnn.core.module import _locate as locate
from statefulnn.core.moduledef import differences
from statefulnn.core.ownership import Scope, real_dict, set_home
from statefulnn.core.placement import split_by_first_axis
from statefulnn.core.plan import Plan, plan_of
from statefulnn.core.pytree import flatten_collecting, unflatten_with
from statefulnn.core.registry import GLOBAL_HOOKS
from statefulnn.core.slices import separate, slice_of
from statefulnn.core.tracebacks import shortened
from statefulnn.layer_stack import _refusals as refusals
from statefulnn.layer_stack._storing import (
    Layer,
    Segment,
    given_nodes,
    is_stored,
    layer_of,
    members,
    nodes_of,
    own_stamps,
    share_stamp,
    stored,
    taken_apart,
)
from statefulnn.modules.containers import ModuleList, Sequential, grouped
from statefulnn.transforms.jit import jit
from statefulnn.transforms.remat import remat as rematerialized
from statefulnn.transforms.scan import looped
from statefulnn.transforms.types import PyTree

# What may differ from layer to layer: layers that have it alike are stored together.
_PER_LAYER = frozenset({"training", "_hooked", *GLOBAL_HOOKS})


# What a loop says of a step that returns something else than it was given.
_CARRIED = re.compile(r"carry\[0\]|carry of another structure")


class LayerStack(Module):
    """Equal blocks one after the other, compiled once whatever their number.

    The parameters and buffers of all blocks are stored as those of one block, with a leading axis, and the
    forward pass is one ``nn.scan`` over it. From outside it reads like an ``nn.ModuleList``: ``state_dict``
    has a name for each layer, ``blocks.17.attn.weight``; ``blocks[17]`` is a module that reads and writes
    its part of the stored arrays; `named_modules`, hooks and ``nn.capture`` know each layer. Gradients,
    optimizers and `named_parameters` have the stored arrays, ``blocks.stack.attn.weight`` of shape
    ``(layers, ...)``.

    Args:
        blocks: the blocks, modules of one structure; or a function without arguments that builds one. The
            blocks become the layers, and are not copied.
        n: how often the function is called.
        remat: whether the backward pass computes a layer again instead of keeping what is inside; or what
            is to be kept, a policy of ``jax.checkpoint_policies``.
        unroll: how many layers are compiled into one step of the loop.

    Shape:
        - input: whatever a block takes, of the same shape and dtype as what it returns.
        - output: that of the last block.

    Attributes:
        stack: all layers as one module, as long as they are stored as one.
        batch_axis: the axis of a mesh over which the first axis of what goes from layer to layer is split;
            None leaves its layout to XLA. `nn.parallel.fully_shard` sets it: in a loop, XLA would else rather
            split what the layers compute as their weights are.

    Layers that are frozen, in another mode or with a hook are stored in a segment of their own, so
    ``for block in blocks[:4]: block.requires_grad_(False)`` leaves the optimizer only what is trained; build
    it afterwards. Layers with hooks, and all layers while ``nn.capture`` listens, run one by one as a list
    would, and compile as long.

    Raises:
        StructureChangeError: for blocks that differ in anything but mode, hooks and ``requires_grad``.
        ShapeError, DtypeError: for blocks whose arrays differ in shape or dtype.
        UninitializedParameterError: for lazy blocks.
        ValueError: for no blocks.
        TypeError: if a block is not a module.

    Limitations: a list or dict in an attribute of a layer that is changed in place goes unseen; assign
    another one.

    Source: ``torch.nn.ModuleList``; ``jax.lax.scan``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> blocks = nn.LayerStack([nn.Linear(4, 4) for _ in range(12)])
        >>> blocks(jnp.ones((2, 4))).shape
        (2, 4)
        >>> [(name, p.shape) for name, p in blocks.named_parameters()]
        [('stack.weight', (12, 4, 4)), ('stack.bias', (12, 4))]
        >>> list(blocks.state_dict())[:3], blocks[11].weight.shape
        (['0.weight', '0.bias', '1.weight'], (4, 4))
    """

    batch_axis: str | None = None
    _python_cache = ("_views", "_noted", "_seen")

    @shortened
    def __init__(
        self,
        blocks: Iterable[Module] | Callable[[], Module],
        n: int | None = None,
        *,
        remat: bool | Callable[..., Any] = False,
        unroll: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(remat, bool) and not callable(remat):
            raise refusals.wrong_option("remat", remat, ("a bool", "a checkpoint policy"))
        if isinstance(unroll, bool) or not isinstance(unroll, int) or unroll < 1:
            raise refusals.wrong_option("unroll", unroll, ("a positive integer",))
        self.remat = remat
        self.unroll = unroll
        self._segments: tuple[Segment, ...] = ()
        modules = _built(blocks, n)
        for number, module in enumerate(modules):
            if not isinstance(module, Module):
                raise refusals.no_block(f"a {type(module).__name__} as block {number}")
        self._put(modules)

    @classmethod
    @shortened
    def of(
        cls,
        model: Module,
        path: str,
        *,
        remat: bool | Callable[..., Any] = False,
        unroll: int = 1,
    ) -> Self:
        """Replace a ``ModuleList`` or ``Sequential`` of equal blocks by a stack, and return the stack.

        Args:
            model: the model; it is changed in place, and keeps the names of its ``state_dict``.
            path: the dotted name of the list.
            remat, unroll: see the class.

        Raises:
            AttributeError: if there is nothing of this name.
            TypeError: if something else is there.
            StructureChangeError: for a list that has hooks itself.
            StructureChangeError, ShapeError, DtypeError: for blocks that differ.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> model = nn.Sequential(
            ...     nn.Linear(2, 4), nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
            ... )
            >>> names = list(model.state_dict())
            >>> blocks = nn.LayerStack.of(model, "1")
            >>> model(jnp.ones(2)).shape, names == list(model.state_dict())
            ((4,), True)
        """
        found = model.get_submodule(path)
        plain = type(found).forward in (Module.forward, Sequential.forward)
        if not path or not isinstance(found, (ModuleList, Sequential)) or not plain:
            raise refusals.no_list(path, type(found).__name__)
        if _hooked(found):
            raise refusals.hooked_list(path, type(found).__name__)
        stack = cls(list(found), remat=remat, unroll=unroll)
        stack.training = found.training
        model.set_submodule(path, stack)
        return stack

    @shortened
    def unstack(self) -> ModuleList:
        """Return the layers as an ``nn.ModuleList`` with arrays of their own; the stack is empty then.

        Example:
            >>> import statefulnn as nn
            >>> model = nn.ModuleDict(
            ...     {"blocks": nn.LayerStack([nn.Linear(2, 2) for _ in range(3)])}
            ... )
            >>> model.blocks = model.blocks.unstack()
            >>> [name for name, _ in model.named_parameters()][:2]
            ['blocks.0.weight', 'blocks.0.bias']
        """
        self._check_static_write("_segments", None)
        modules = list(self)
        common = taken_apart(modules)[1]
        _take_out(modules, common, self._nn_stamp.scope)
        self._modules.clear()
        self._segments = ()
        real_dict(self).update(_views={}, _noted={}, _seen=0)
        return ModuleList(modules)

    # ----------------------------------------------------------------------------------------------
    # Calls

    def forward(self, x: PyTree, *args: object, **kwargs: object) -> Any:
        """Call the layers one after the other.

        Args:
            x: the input of the first layer. Each one takes what the one before returned.
            args: further arguments, the same for all layers.
            kwargs: keyword arguments, the same for all layers.

        Returns:
            What the last layer returned. Where layers return tuples, the first entry goes to the next layer,
            and the others come back stacked, ``(layers, ...)``, behind that of the last layer.

        Raises:
            StructureChangeError: if a layer returns another shape or dtype than it was given.
        """
        self._nn_settle()
        if not self._segments:
            raise refusals.empty()
        call = _Call(args, kwargs, self.remat)
        outputs = []
        for segment in self._segments:
            for start, stop, name in segment.runs:
                if stop - start > 1 and not _observed(self._modules[name]):
                    x, ys = self._in_a_loop(segment, start, stop, name, call, x)
                else:
                    x, ys = self._one_by_one(start, stop, call, x)
                outputs.append(ys)
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
        return (x, *joined) if joined else x

    def _in_a_loop(
        self, segment: Segment, start: int, stop: int, name: str, call: _Call, x: PyTree
    ) -> tuple[Any, tuple]:
        stack: Any = self._modules[name]
        if (start, stop) != segment[:2]:
            part = slice(start - segment.start, stop - segment.start)
            stack = layer_of(segment, stack, plan_of(stack), part, self._nn_stamp.scope)
        static = call.static, segment.ranks, stop - start, self.unroll, self.batch_axis
        trace = compat.current_trace()
        staged = any(compat.kind(around) == "staged" for around in compat.chain(trace))
        run = _run if staged else _compiled  # eager code would compile the loop at each call
        try:
            return run(stack, x, call.modules, call.arrays, static)
        except Exception as error:
            if isinstance(error, StructureChangeError) and _CARRIED.search(str(error)):
                error.add_note(refusals.CHANGED_BY_A_LAYER)
            _name_layers(error, self, "*" if stop - start == len(self) else f"{start}-{stop - 1}")
            raise

    def _one_by_one(self, start: int, stop: int, call: _Call, x: PyTree) -> tuple[Any, tuple]:
        outputs = []
        for number in range(start, stop):
            layer = self._layer(number)
            try:
                x, *ys = call.on(layer, x, call.modules, not _observed(layer), in_loop=False)
            except Exception as error:
                _name_layers(error, self, str(number))
                raise
            outputs.append(tuple(ys))
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

    # ----------------------------------------------------------------------------------------------
    # The list

    def __len__(self) -> int:
        return self._segments[-1].stop if self._segments else 0

    def __iter__(self) -> Iterator[Any]:
        self._nn_settle()
        return iter([self._layer(i) for i in range(len(self))])

    def __getitem__(self, index: int | slice) -> Any:
        self._nn_settle()
        if isinstance(index, slice):
            return ModuleList(self._layer(i) for i in range(len(self))[index])
        return self._layer(self._index(index))

    def __setitem__(self, index: int, module: Module) -> None:
        number = self._index(index)
        if not isinstance(module, Module):
            raise refusals.no_block(f"a {type(module).__name__} as block {number}")
        modules = list(self)
        if module is not modules[number]:
            _take_out([modules[number]], set(), self._nn_stamp.scope)
            self._put([*modules[:number], module, *modules[number + 1 :]])

    def __contains__(self, module: object) -> bool:
        return any(module is layer for layer in real_dict(self).get("_views", {}).values())

    def _index(self, index: SupportsIndex) -> int:
        number, count = operator.index(index), len(self)
        if not -count <= number < count:
            raise refusals.no_layer(number, count)
        return number % count

    def __getattr__(self, name: str) -> Any:
        if name.isdecimal() and "_modules" in self.__dict__ and int(name) < len(self):
            return self[int(name)]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.isdecimal() and isinstance(value, Module):
            self[int(name)] = value
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Self:
        """Set training mode here and in all layers, and return the stack."""
        if isinstance(mode, bool):
            self.training = mode
        for module in (*self._modules.values(), *real_dict(self).get("_views", {}).values()):
            module.train(mode)
        return self

    def __repr__(self) -> str:
        self._nn_settle()
        runs = [run for segment in self._segments for run in segment.runs]
        shown = [(start, stop - 1, repr(self._modules[name])) for start, stop, name in runs]
        return grouped(self._get_name(), shown)

    def __getstate__(self) -> dict[str, Any]:
        self._nn_settle()
        state = super().__getstate__()
        return {name: v for name, v in state.items() if name not in self._python_cache}

    # ----------------------------------------------------------------------------------------------
    # What is stored

    def _nn_shown(self) -> dict[str, Any]:
        return {str(i): layer for i, layer in enumerate(self)}

    def _nn_child(self, name: str) -> Any:
        layer = real_dict(self).get("_views", {}).get(name)
        return super()._nn_child(name) if layer is None else layer

    def _nn_settle(self) -> None:
        attributes = real_dict(self)
        views = attributes.get("_views")
        if not views:
            return
        plans = {name: plan_of(stack) for name, stack in self._modules.items()}
        noted, number = attributes["_noted"], self._nn_stamp.number
        if attributes["_seen"] == number and all(plans[n] is plan for n, plan in noted.items()):
            return
        # First: whoever asks meanwhile finds what is stored.
        attributes.update(_noted=plans, _seen=number)
        changed = _may_be_joined(self._segments, plans)
        for segment in self._segments:
            for start, stop, name in segment.runs:
                for number in range(start, stop):
                    view = views.get(str(number))
                    if view is not None and view is not self._modules[name]:
                        changed |= self._changed(view, number, segment, name, noted[name])
        if changed:
            # The user's own stack is stored anew with numbers, also if a trace is the first to look. What
            # was to be told of the change was told when it was made.
            stamp = self._nn_stamp
            captured, stamp.baked_in = stamp.baked_in, None
            with compat.plain_evaluation() if stamp.scope is None else contextlib.nullcontext():
                self._put([self._layer(i) for i in range(len(self))])
            stamp.baked_in = captured

    def _changed(
        self, view: Module, number: int, segment: Segment, name: str, before: Plan
    ) -> bool:
        """Say whether a layer is no longer as it is stored; let it follow a change of what is stored."""
        stack: Any = self._modules[name]
        own, now, index = plan_of(view), plan_of(stack), number - segment.start
        if own.moduledef is now.moduledef:
            return not is_stored(own, index, segment, now)
        if own.moduledef is not before.moduledef or not is_stored(own, index, segment, before):
            return True
        if members(own.moduledef) != members(now.moduledef):
            del real_dict(self)["_views"][str(number)]
            return False
        nodes = nodes_of(view, own.moduledef)
        numbered = [own.boxes[position] for position in own.moduledef.order]
        given = given_nodes(segment, stack, now.moduledef)
        for k, (node, d) in enumerate(zip(nodes, now.moduledef.nodes, strict=True)):
            if k not in given:
                real_dict(node).clear()
                fill(node, d, nodes, numbered)
                share_stamp(node, stack._nn_stamp)
        return False

    def _layer(self, number: int) -> Any:
        attributes = real_dict(self)
        views = attributes.setdefault("_views", {})
        view = views.get(str(number))
        if view is None:
            if not views:
                self._note()
            segment = next(s for s in self._segments if number < s.stop)
            name = next(name for _, stop, name in segment.runs if number < stop)
            stack, plan = self._modules[name], attributes["_noted"][name]
            index = number - segment.start
            view = layer_of(segment, stack, plan, index, self._nn_stamp.scope)
            self._adopt_layer(number, view)
        return view

    def _adopt_layer(self, number: int, layer: Module) -> None:
        real_dict(self).setdefault("_views", {})[str(number)] = layer
        home = layer._nn_home
        if not isinstance(home, tuple) or home[0]() is None:
            set_home(layer, (weakref.ref(self), str(number)))

    def _put(self, modules: list[Any]) -> None:
        """Store modules as the layers."""
        try:
            layers, common = taken_apart(modules)
        except UninitializedParameterError as error:
            raise refusals.without_shape(error) from None
        views = real_dict(self).get("_views")
        if views is None:
            _check_alike(layers)
        known = set(map(id, (views or {}).values()))
        for number, (module, layer) in enumerate(zip(modules, layers, strict=True)):
            if id(module) not in known and any(map(slice_of, layer.plan.boxes)):
                raise refusals.in_another_stack(number)
        segments, built = stored(layers, common, self._nn_stamp.scope)
        self._modules.clear()
        for name, stack in built.items():
            self._modules[name] = stack
            if not any(stack is module for module in modules):
                set_home(stack, (weakref.ref(self), name))
        self._segments = tuple(segments)
        real_dict(self)["_views"] = {}
        for number, module in enumerate(modules):
            self._adopt_layer(number, module)
        self._note()

    def _note(self) -> None:
        """Note what is stored, for the next `_nn_settle`."""
        plans = {name: plan_of(stack) for name, stack in self._modules.items()}
        real_dict(self).update(_noted=plans, _seen=self._nn_stamp.number)


class _Call:
    """What the layers of one call are called with beside what goes from one to the next.

    Attributes:
        modules: those among the arguments; they are carried, since a layer may write to them.
        arrays: those among the arguments.
        static: the rest, and what is to be computed again.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], remat: bool | Callable) -> None:
        leaves, treedef, found = flatten_collecting((args, kwargs))
        is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
        self.modules = tuple(found)
        self.arrays = [v for v, own in zip(leaves, is_array, strict=True) if own]
        rest = [(None if own else v, own) for v, own in zip(leaves, is_array, strict=True)]
        self.static = treedef, tuple(rest), remat

    @classmethod
    def of(cls, static: tuple, arrays: Sequence[Any]) -> Self:
        """Return the call with other arrays; its modules are those of the carry."""
        self = cls.__new__(cls)
        self.static, self.arrays, self.modules = static, list(arrays), ()
        return self

    def step(self, carry: tuple, layer: Module) -> tuple[tuple, tuple]:
        x, *modules = carry
        x, *ys = self.on(layer, x, modules, True, in_loop=True)
        return (x, *modules), tuple(ys)

    def on(
        self, layer: Module, x: PyTree, modules: Sequence[Module], may_remat: bool, in_loop: bool
    ) -> tuple:
        """Call a layer: return what the next one takes, and its other outputs."""
        treedef, rest, remat = self.static

        def call(layer: Module, x: PyTree, modules: Sequence[Module]) -> Any:
            arrays = iter(self.arrays)
            leaves = [next(arrays) if own else value for value, own in rest]
            args, kwargs = unflatten_with(treedef, leaves, modules)
            return layer(x, *args, **kwargs)

        if remat and may_remat:
            # In a loop XLA cannot take the second computation for the first.
            options: dict[str, Any] = {"prevent_cse": not in_loop}
            if remat is not True:
                options["policy"] = remat
            call = rematerialized(call, **options)
        out = call(layer, x, tuple(modules))
        return out if isinstance(out, tuple) else (out,)


def _run(
    stack: Module, x: PyTree, modules: tuple, arrays: Sequence[Any], static: tuple
) -> tuple[Any, tuple]:
    """Run layers that are stored together in a loop."""
    static, ranks, count, unroll, axis = static
    call, plan, stacked = _Call.of(static, arrays), plan_of(stack), dict(ranks)
    names = zip(plan.moduledef.leaf_names, plan.boxes, strict=True)
    whole = [box for name, box in names if name not in stacked]

    def step(carry: tuple, layer: Module) -> tuple[tuple, tuple]:
        x, *modules = carry
        return call.step((x if axis is None else split_by_first_axis(x, axis), *modules), layer)

    carry = x, *modules
    (x, *_), ys = looped(step, carry, stack, count, unroll=unroll, whole=whole)
    return x, ys


_compiled = jit(_run, static_argnums=4)


def _name_layers(error: Exception, stack: LayerStack, layers: str) -> None:
    """Let the path of an error inside of a layer go on with the layer, or those of a loop."""
    if hasattr(error, "_statefulnn_where"):
        locate(error, stack, layers)


def _observed(module: Module) -> bool:
    """Say whether somebody is to see the calls of a module or below: hooks, or nn.capture."""
    if active.listeners or active.entering or any(GLOBAL_HOOKS.values()):
        return True
    stored = module._walk_modules(None, "", True, lambda m: m._modules)
    return any(map(_hooked, (m for _, m in stored)))


def _hooked(module: Module) -> bool:
    return any(module.__dict__.get(name) for name in GLOBAL_HOOKS)


def _take_out(modules: list[Any], common: set[int], scope: Scope | None) -> None:
    """Give layers arrays and stamps of their own."""
    for module in modules:
        plan = plan_of(module)
        nodes = [m for m in nodes_of(module, plan.moduledef) if id(m) not in common]
        for box in plan.boxes:
            separate(box)
        own_stamps(nodes, scope)
        set_home(module, None)


def _may_be_joined(segments: Sequence[Segment], plans: Mapping[str, Plan]) -> bool:
    """Say whether neighbours that are stored apart are alike by now."""
    names = [name for segment in segments for _, _, name in segment.runs]
    return any(
        plans[a].moduledef is plans[b].moduledef for a, b in zip(names, names[1:], strict=False)
    )


def _built(blocks: object, n: int | None) -> list[Any]:
    if n is None:
        if isinstance(blocks, Module) and not isinstance(blocks, ModuleList):
            raise refusals.no_block(f"one {type(blocks).__name__}")
        if not isinstance(blocks, Iterable):
            raise refusals.no_block(f"a {type(blocks).__name__} without a number")
        found = list(blocks)
        if not found:
            raise refusals.no_blocks("no")
        return found
    if isinstance(blocks, Module) or not callable(blocks):
        raise refusals.no_block(f"a {type(blocks).__name__} and a number")
    n = operator.index(n)
    if n < 1:
        raise refusals.no_blocks(n)
    # One after the other: nearly all the time goes into the draws, which a compiled call for all of them
    # makes no faster, and compiling it takes several times as long (24 encoder layers: 0.5 s and 2.3 s).
    return [blocks() for _ in range(n)]


def _check_alike(layers: list[Layer]) -> None:
    """Raise for the first difference that a loop cannot serve."""
    for number, (a, b) in enumerate(zip(layers, layers[1:], strict=False), 1):
        if a.moduledef is not b.moduledef:
            for name, change in differences(a.moduledef, b.moduledef):
                flag = change.startswith("requires_grad")
                if not flag and name.rpartition(".")[2] not in _PER_LAYER:
                    raise refusals.other_structure(number, name, change)
            continue
        names = a.moduledef.leaf_names
        for name, before, after in zip(names, a.specs, b.specs, strict=True):
            if before != after:
                raise refusals.other_arrays(number, name, before, after)
        for name, one, other in zip(names, a.tied, b.tied, strict=True):
            if one != other:
                raise refusals.other_ties(number, name)
