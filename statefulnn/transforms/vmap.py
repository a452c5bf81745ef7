"""nn.vmap: run a function over a batch of arguments, modules included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import varies
from statefulnn.core.errors import MissingRngError, ShapeError, StateWriteError, explain
from statefulnn.core.generator import Forbidden, advance, use_generator
from statefulnn.transforms.lift import (
    SplitCall,
    Writes,
    leaves_below,
    template,
    unbound,
)

_RANDOMNESS = ("different", "same", "error")
_FORBIDDEN = Forbidden(
    "drew random numbers under nn.vmap(randomness='error')",
    "the call forbids it",
    "pass randomness='different' or randomness='same'",
)


def vmap(
    fun: Callable | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    axis_size: int | None = None,
    axis_name: Any = None,
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

    one_lane, owner = unbound(fun)

    @functools.wraps(one_lane)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        axes_given = in_axes
        if owner is not None:  # the module whose call or method this is: all lanes share it
            several = isinstance(in_axes, (tuple, list))
            axes_given = (None, *(in_axes if several else (in_axes,) * len(args)))
            args = (owner, *args)
        call = SplitCall((args, kwargs))
        moduledef, leaves = call.moduledef, call.leaves
        leaf_axes, dynamic_axes = _axes(call, axes_given, args, kwargs)
        size = _lanes(call, leaf_axes, dynamic_axes, axis_size)
        shared = {
            i: leaf
            for i, leaf in enumerate(leaves)
            if moduledef.kind_of(i) == "generator" and leaf_axes[i] is None
        }
        if randomness == "different":
            for i, state in shared.items():
                leaves[i], leaf_axes[i] = _per_lane(state, size), 0
        found: dict[str, Any] = {}

        def lane(leaves: list, dynamic: list, number: Any) -> tuple[Any, list, list]:
            out, written = call.run(function, leaves, dynamic)
            differs = varies(written.values, number)
            found.update(indices=written.indices, differs=differs, out=written.out)
            by_lane = [v for v, d in zip(written.values, differs, strict=True) if d]
            common = [v for v, d in zip(written.values, differs, strict=True) if not d]
            return out, by_lane, common

        function = _without_randomness(one_lane) if randomness == "error" else one_lane
        out, by_lane, common = jax.vmap(
            lane,
            in_axes=(leaf_axes, dynamic_axes, 0),
            out_axes=(out_axes, 0, None),
            axis_size=size,
            axis_name=axis_name,
        )(leaves, call.dynamic, np.arange(size, dtype=np.int32))

        mapped, same = iter(by_lane), iter(common)
        values = []
        for i, differs in zip(found["indices"], found["differs"], strict=True):
            value, axis = next(mapped if differs else same), leaf_axes[i]
            if i in shared:
                if randomness == "error":
                    raise MissingRngError(explain(*_FORBIDDEN.parts))
                value = advance(shared[i])[1]
            elif axis is None and differs:
                raise _lanes_disagree(call, i)
            elif axis is not None:
                value = jnp.moveaxis(value, 0, axis) if differs else _repeat(value, size, axis)
            values.append(value)
        return call.finish(out, Writes(found["indices"], values, found["out"]))

    return wrapper


def _without_randomness(fun: Callable) -> Callable:
    @functools.wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with use_generator(_FORBIDDEN):
            return fun(*args, **kwargs)

    return wrapper


def _axes(call: SplitCall, in_axes: Any, args: tuple, kwargs: dict) -> tuple[list, list]:
    """Return the mapped axis of each leaf of the modules, and of each other leaf."""
    if isinstance(in_axes, (tuple, list)) and len(in_axes) != len(args):
        raise ValueError(
            explain(
                f"nn.vmap was given in_axes of length {len(in_axes)} for {len(args)} arguments",
                "there must be one entry per positional argument",
                "pass an integer for all of them, or one entry for each",
            )
        )
    shape_args, shape_kwargs = template(call.signature.treedef)
    axes = tuple(in_axes) if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
    none_too = {"is_leaf": lambda x: x is None}
    marks, chosen = [], []
    for axis, shape in [
        *zip(axes, shape_args, strict=True),
        *((0, v) for v in shape_kwargs.values()),
    ]:
        marks += jax.tree_util.tree_leaves(shape, **none_too)
        chosen += jax.tree_util.tree_leaves(jax.tree.broadcast(axis, shape, **none_too), **none_too)
    moduledef = call.moduledef
    leaf_axes: list[Any] = [None] * moduledef.num_leaves
    dynamic_axes: list[Any] = [None] * len(call.dynamic)
    given: dict[int, Any] = {}
    for mark, axis in zip(marks, chosen, strict=True):
        if mark is None:  # an argument, or a part of one, that is None
            continue
        if mark.is_leaf:
            dynamic_axes[mark.number] = axis
            continue
        for i in leaves_below(moduledef, [mark.number]):
            if given.setdefault(i, axis) != axis:
                raise ValueError(
                    explain(
                        f"nn.vmap was given the axes {given[i]} and {axis} for "
                        f"{moduledef.leaf_names[i]!r}",
                        "two of the arguments share it, so it has one axis",
                        "map both arguments over the same axis",
                    )
                )
            stacked = moduledef.kind_of(i) != "generator" or jnp.ndim(call.plan.leaves()[i]) > 1
            leaf_axes[i] = axis if stacked else None
    return leaf_axes, dynamic_axes


def _lanes(call: SplitCall, leaf_axes: list, dynamic_axes: list, axis_size: int | None) -> int:
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
            raise ShapeError(
                explain(
                    f"nn.vmap was asked to map axis {axis} of {name} of shape {shape}",
                    "it has no such axis",
                    "pass in_axes=None for a module that all lanes share: "
                    "nn.vmap(f, in_axes=(None, 0))(model, xs)",
                )
            )
        sizes.setdefault(shape[axis], f"{name} of shape {shape}")
    if len(sizes) != 1:
        listed = ", ".join(f"{n} ({who})" for n, who in sizes.items()) or "none"
        raise ShapeError(
            explain(
                f"nn.vmap found these numbers of lanes: {listed}",
                "all mapped axes have one size",
                "choose the axes with in_axes (None for what all lanes share), or pass axis_size",
            )
        )
    return next(iter(sizes))


def _per_lane(state: Any, size: int) -> Any:
    """Return a generator state of its own for each lane, (size, 4)."""
    key, _ = advance(state)
    words = jax.vmap(lambda k: jax.random.key_data(k))(jax.random.split(key, size))
    return jnp.concatenate([words, jnp.zeros((size, 2), jnp.uint32)], axis=1)


def _repeat(value: Any, size: int, axis: int) -> Any:
    value = jnp.expand_dims(value, axis)
    shape = list(value.shape)
    shape[axis] = size
    return jnp.broadcast_to(value, shape)


def _lanes_disagree(call: SplitCall, position: int) -> StateWriteError:
    return StateWriteError(
        explain(
            f"wrote to {call.moduledef.leaf_names[position]!r} under nn.vmap",
            "all lanes share the module, and each has another value for it",
            "map the module too (in_axes=0, a stack of modules); or call the layer outside nn.vmap, "
            "on the whole batch; or put it into eval mode",
        )
    )
