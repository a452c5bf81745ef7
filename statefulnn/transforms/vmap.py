"""nn.vmap: run a function over a batch of arguments, modules included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.box import Box
from statefulnn.core.compat import varies
from statefulnn.core.errors import MissingRngError, explain
from statefulnn.core.generator import Forbidden, advance, use_generator
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.repeated import repeated
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.lift import SplitCall, Writes, leaves_below, template, unbound
from statefulnn.transforms.types import P, PyTree, R

_RANDOMNESS = ("different", "same", "error")
_FORBIDDEN = Forbidden(*refusals.NO_RANDOMNESS)


@overload
def vmap(
    fun: Callable[P, R],
    in_axes: int | Sequence[PyTree] | None = 0,
    out_axes: PyTree = 0,
    *,
    axis_size: int | None = None,
    axis_name: Hashable = None,
    randomness: str = "different",
) -> Callable[P, R]: ...
@overload
def vmap(
    fun: None = None,
    in_axes: int | Sequence[PyTree] | None = 0,
    out_axes: PyTree = 0,
    *,
    axis_size: int | None = None,
    axis_name: Hashable = None,
    randomness: str = "different",
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def vmap(
    fun: Callable | None = None,
    in_axes: int | Sequence[PyTree] | None = 0,
    out_axes: PyTree = 0,
    *,
    axis_size: int | None = None,
    axis_name: Hashable = None,
    randomness: str = "different",
) -> Any:
    """Return a function that maps over an axis of its arguments, as ``jax.vmap``, with state.

    A module whose axis is an integer is a stack of modules: each array has that axis. A module whose
    axis is None is shared by all lanes; what a lane writes to it must be the same in all lanes.

    Args:
        fun: the function of one lane; for a Module or a method of one, all lanes share the module.
        in_axes: the axis to map of each argument, None for none; an integer or a tuple with one entry
            per positional argument. Keyword arguments are mapped over axis 0.
        out_axes: the axis of each output.
        axis_size: how many lanes, if no argument tells.
        axis_name: a name for collectives.
        randomness: "different" draws other numbers in each lane, "same" the same, "error" forbids.

    Returns:
        the mapped function.

    Raises:
        StateWriteError: if lanes write different values to a shared module.

    Source: ``jax.vmap``; `randomness` from ``torch.func.vmap``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Linear(2, 1)
        >>> nn.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, jnp.ones((5, 2))).shape
        (5, 1)
    """
    if fun is None:
        return functools.partial(
            vmap,
            in_axes=in_axes,
            out_axes=out_axes,
            axis_size=axis_size,
            axis_name=axis_name,
            randomness=randomness,
        )
    if randomness not in _RANDOMNESS:
        raise ValueError(f"randomness must be one of {_RANDOMNESS}, got {randomness!r}")
    if isinstance(in_axes, (ModuleBase, Box, jax.Array)):
        raise refusals.argument_for_axes(type(in_axes).__name__)

    one_lane, owner = unbound(fun)
    function = _without_randomness(one_lane) if randomness == "error" else one_lane

    @shortened
    @functools.wraps(one_lane)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        axes = in_axes
        if owner is not None:  # the module whose call or method this is: all lanes share it
            axes = (None, *(axes if isinstance(axes, (tuple, list)) else (axes,) * len(args)))
            args = (owner, *args)
        call = SplitCall((args, kwargs))
        leaf_axes, dynamic_axes = _axes(call, axes, args, kwargs)
        size = _number_of_lanes(call, leaf_axes, dynamic_axes, axis_size)
        lanes = _Lanes(call, function, leaf_axes, size, randomness)
        out, by_lane, common = jax.vmap(
            lanes.one,
            in_axes=(lanes.leaf_axes, dynamic_axes, 0),
            out_axes=(out_axes, 0, None),
            axis_size=size,
            axis_name=axis_name,
        )(lanes.leaves, call.dynamic, np.arange(size, dtype=np.int32))
        return lanes.finish(out, by_lane, common)

    return wrapper


class _Lanes:
    """One call under vmap: the leaves that the lanes get, and what becomes of those that they write.

    Args:
        call: the arguments, taken apart.
        function: the user's function.
        leaf_axes: the mapped axis of each leaf, None for what all lanes share.
        size: how many lanes.
        randomness: as in `vmap`.

    Attributes:
        leaves: the leaves that are mapped; a generator that all lanes share may be one state for each.
        leaf_axes: their axes.
    """

    def __init__(
        self,
        call: SplitCall,
        function: Callable,
        leaf_axes: Sequence[int | None],
        size: int,
        randomness: str,
    ) -> None:
        self.call, self.function, self.size, self.randomness = call, function, size, randomness
        self.leaves, self.leaf_axes = call.leaves, list(leaf_axes)
        self._generators = {
            i: leaf
            for i, leaf in enumerate(self.leaves)
            if call.moduledef.kind_of(i) == "generator" and leaf_axes[i] is None
        }
        self._weights_differ = any(
            axis is not None and call.moduledef.kind_of(i) != "generator"
            for i, axis in enumerate(leaf_axes)
        )
        if randomness == "different":
            for i, state in self._generators.items():
                self.leaves[i], self.leaf_axes[i] = _per_lane(state, size), 0
        # What the trace of a lane finds out: which leaves it writes, and which of these by lane.
        self._indices: tuple[int, ...] = ()
        self._differs: list[bool] = []
        self._out: Any = None

    def one(
        self, leaves: list[jax.Array], dynamic: list[ArrayLike], number: ArrayLike
    ) -> tuple[PyTree, list[jax.Array], list[jax.Array]]:
        """Run one lane: return its output, and what it wrote, by lane and in common."""
        with repeated(self._weights_differ):
            out, written = self.call.run(self.function, leaves, dynamic)
        # A value of vmap's own trace has another number in each lane; any other value is computed once, and
        # is the same in all of them. So a counter of calls stays one number, and only what lanes disagree
        # about needs an axis. The lane's number is a value that surely differs, to compare with.
        self._differs = varies(written.values, number)
        self._indices, self._out = written.indices, written.out
        told_apart = list(zip(written.values, self._differs, strict=True))
        by_lane = [value for value, differs in told_apart if differs]
        return out, by_lane, [value for value, differs in told_apart if not differs]

    def finish(
        self, out: PyTree, by_lane: Sequence[jax.Array], common: Sequence[jax.Array]
    ) -> PyTree:
        """Write back what the lanes wrote, and return their outputs.

        Raises:
            StateWriteError: if lanes wrote different values to what they share.
        """
        mapped, same = iter(by_lane), iter(common)
        values = []
        for i, differs in zip(self._indices, self._differs, strict=True):
            value, axis = next(mapped if differs else same), self.leaf_axes[i]
            if i in self._generators and self.randomness == "error":
                raise MissingRngError(explain(*refusals.NO_RANDOMNESS))
            if i in self._generators and self.randomness == "different":
                # The lanes have drawn from streams of their own, all made from one key: that is what the
                # stream outside has given. Where all draw the same, it goes on where they stopped.
                value = advance(self._generators[i])[1]
            elif axis is None and differs:
                raise refusals.lanes_disagree(self.call.moduledef.leaf_names[i])
            elif axis is not None:
                value = jnp.moveaxis(value, 0, axis) if differs else _repeat(value, self.size, axis)
            values.append(value)
        return self.call.finish(out, Writes(self._indices, values, self._out))


def _without_randomness(fun: Callable) -> Callable:
    @functools.wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with use_generator(_FORBIDDEN):
            return fun(*args, **kwargs)

    return wrapper


def _axes(
    call: SplitCall, in_axes: int | Sequence[PyTree] | None, args: tuple, kwargs: dict
) -> tuple[list[int | None], list[int | None]]:
    """Return the mapped axis of each leaf of the modules, and of each other leaf."""
    if isinstance(in_axes, (tuple, list)) and len(in_axes) != len(args):
        raise refusals.other_number_of_axes(len(in_axes), len(args))
    shape_args, shape_kwargs = template(call.signature.treedef)
    axes = tuple(in_axes) if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
    # An axis of None is an answer, and an argument of None takes one: neither is to be lost by flattening.
    none_too = {"is_leaf": lambda x: x is None}
    marks, chosen = [], []
    for axis, shape in [
        *zip(axes, shape_args, strict=True),
        *((0, v) for v in shape_kwargs.values()),
    ]:
        marks += jax.tree_util.tree_leaves(shape, **none_too)
        chosen += jax.tree_util.tree_leaves(jax.tree.broadcast(axis, shape, **none_too), **none_too)
    moduledef = call.moduledef
    leaf_axes: list[int | None] = [None] * moduledef.num_leaves
    dynamic_axes: list[int | None] = [None] * len(call.dynamic)
    given: dict[int, int | None] = {}
    for mark, axis in zip(marks, chosen, strict=True):
        if mark is None:  # an argument, or a part of one, that is None
            continue
        if mark.is_leaf:
            dynamic_axes[mark.number] = axis
            continue
        for i in leaves_below(moduledef, [mark.number]):
            if given.setdefault(i, axis) != axis:
                raise refusals.two_axes(moduledef.leaf_names[i], given[i], axis)
            # A generator in a stack of modules may be one that they all share: its state has no axis.
            stacked = moduledef.kind_of(i) != "generator" or jnp.ndim(call.plan.leaves()[i]) > 1
            leaf_axes[i] = axis if stacked else None
    return leaf_axes, dynamic_axes


def _number_of_lanes(
    call: SplitCall, leaf_axes: list, dynamic_axes: list, axis_size: int | None
) -> int:
    sizes: dict[int, str] = {}
    if axis_size is not None:
        sizes[axis_size] = "axis_size"
    named = [
        *zip(call.plan.leaves(), leaf_axes, call.moduledef.leaf_names, strict=True),
        *((v, a, "an argument") for v, a in zip(call.dynamic, dynamic_axes, strict=True)),
    ]
    for value, axis, name in named:
        if axis is None:
            continue
        shape = jnp.shape(value)
        if not -len(shape) <= axis < len(shape):
            raise refusals.no_such_axis(name, axis, shape)
        sizes.setdefault(shape[axis], f"{name} of shape {shape}")
    if len(sizes) != 1:
        raise refusals.other_numbers_of_lanes(sizes)
    return next(iter(sizes))


def _per_lane(state: ArrayLike, size: int) -> jax.Array:
    """Return a generator state of its own for each lane, (size, 4)."""
    key, _ = advance(state)
    words = jax.vmap(lambda k: jax.random.key_data(k))(jax.random.split(key, size))
    return jnp.concatenate([words, jnp.zeros((size, 2), jnp.uint32)], axis=1)


def _repeat(value: jax.Array, size: int, axis: int) -> jax.Array:
    value = jnp.expand_dims(value, axis)
    shape = list(value.shape)
    shape[axis] = size
    return jnp.broadcast_to(value, shape)
