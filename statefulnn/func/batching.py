"""vmap with torch.func's names of the axes, and in chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.errors import explain
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.types import PyTree, TreeDef
from statefulnn.transforms.vmap import vmap as mapped


def vmap(
    func: Callable | None = None,
    in_dims: PyTree = 0,
    out_dims: PyTree = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
    in_axes: PyTree = None,
    out_axes: PyTree = None,
    axis_size: int | None = None,
    axis_name: Hashable = None,
) -> Any:
    """Return a function that maps over an axis of its arguments, modules included.

    `nn.vmap` with torch's names, torch's default for random numbers, and chunks.

    Args:
        func: the function of one lane; for a Module or a method of one, all lanes share the module.
        in_dims: the axis to map of each argument, None for none; or `in_axes`.
        out_dims: the axis of each output; or `out_axes`.
        randomness: "error" forbids random numbers, "different" draws others in each lane, "same" the
            same.
        chunk_size: how many lanes to compute at once, which bounds the memory; None for all.
        in_axes: JAX's name of `in_dims`.
        out_axes: JAX's name of `out_dims`.
        axis_size: how many lanes, if no argument tells.
        axis_name: a name for collectives.

    Returns:
        the mapped function.

    Raises:
        MissingRngError: for random numbers with ``randomness="error"``.
        StateWriteError: if lanes write different values to a shared module.

    Source: ``torch.func.vmap``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Linear(2, 1)
        >>> nn.func.vmap(model, chunk_size=2)(jnp.ones((5, 2))).shape
        (5, 1)
    """
    settings = {"randomness": randomness, "axis_name": axis_name}
    in_dims = _one_of(in_dims, in_axes, "in_dims", "in_axes")
    out_dims = _one_of(out_dims, out_axes, "out_dims", "out_axes")
    if func is None:
        return functools.partial(
            vmap,
            in_dims=in_dims,
            out_dims=out_dims,
            chunk_size=chunk_size,
            axis_size=axis_size,
            **settings,
        )
    if chunk_size is None:
        return mapped(func, in_dims, out_dims, axis_size=axis_size, **settings)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"vmap: chunk_size must be a positive integer or None, got {chunk_size}")

    @shortened
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=_is_object)
        axes = _axes_of(leaves, treedef, in_dims, len(args))
        sizes = {np.shape(v)[a] for v, a in zip(leaves, axes, strict=True) if a is not None}
        size = axis_size if axis_size is not None else max(sizes, default=0)
        results = []
        for start in range(0, max(size, 1), chunk_size):
            stop = min(start + chunk_size, size)
            part = [
                v if a is None else jax.lax.slice_in_dim(jnp.asarray(v), start, stop, axis=a)
                for v, a in zip(leaves, axes, strict=True)
            ]
            part_args, part_kwargs = jax.tree_util.tree_unflatten(treedef, part)
            one = mapped(func, in_dims, out_dims, axis_size=stop - start, **settings)
            results.append(one(*part_args, **part_kwargs))
        none_too = {"is_leaf": lambda x: x is None}
        return jax.tree_util.tree_map(
            lambda a, *parts: parts[0] if a is None else jnp.concatenate(parts, axis=a),
            jax.tree.broadcast(out_dims, results[0], **none_too),
            *results,
            **none_too,
        )

    return wrapper


def _is_object(x: object) -> bool:
    return isinstance(x, (ModuleBase, Box))


def _one_of(dims: PyTree, axes: PyTree, torch_name: str, jax_name: str) -> Any:
    """Return an option that has two names."""
    if axes is None:
        return dims
    if dims != 0:
        raise TypeError(f"vmap: {torch_name} and {jax_name} are two names of one option; pass one")
    return axes


def _axes_of(leaves: list, treedef: TreeDef, in_dims: PyTree, count: int) -> list:
    """Return the axis of each leaf of ``(args, kwargs)``; a module or a box is one leaf."""
    args, kwargs = jax.tree_util.tree_unflatten(treedef, range(len(leaves)))
    given = tuple(in_dims) if isinstance(in_dims, (tuple, list)) else (in_dims,) * count
    if len(given) != count:
        raise ValueError(
            explain(
                f"vmap was given in_dims of length {len(given)} for {count} arguments",
                "there must be one entry per positional argument",
                "pass an integer for all of them, or one entry for each",
            )
        )
    none_too = {"is_leaf": lambda x: x is None}
    spread = jax.tree.broadcast((given, 0), (args, kwargs), **none_too)
    axes = jax.tree_util.tree_leaves(spread, **none_too)
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is not None and _is_object(leaf):
            raise TypeError(
                explain(
                    f"vmap(chunk_size=...) was asked to map axis {axis} of a {type(leaf).__name__}",
                    "a stack of modules is not taken apart in chunks",
                    "share the module, in_dims=(None, 0), or map over the arrays of functionalize",
                )
            )
    return axes
