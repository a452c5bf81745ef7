"""How the functions of F are compiled, so that they take arrays of explicit meshes as well.

On a mesh with explicit axes, `jax.make_mesh`'s default, the layout of an array is part of its type, and JAX
raises where the layout of a result has several answers: in a gather, a reshape, a product over a split axis,
or in the derivative of one. Layers have one answer for all of them, so there XLA chooses inside of a
function of F, and the result is laid out as its first argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Layout = Callable[[tuple[int, ...], list[Any]], list[Any]]


def like_first(shape: tuple[int, ...], arguments: list[Any]) -> list[Any]:
    """Return the layout of an output: where it has the size of its first argument, it is split as that."""
    # Random words, which are unsigned, and keys come before it.
    words = lambda x: getattr(x.dtype, "kind", "u") == "u"
    first = next((x for x in arguments if not words(x)), arguments[0])
    spec = _spec_of(first)
    return [spec[i] if first.shape[i : i + 1] == (n,) else None for i, n in enumerate(shape)]


def with_features(shape: tuple[int, ...], arguments: list[Any]) -> list[Any]:
    """Return the layout of a product with a weight: its last axis is split as the first of the weight."""
    spec = like_first(shape, arguments)
    features = (_spec_of(arguments[1]) or [None])[0]
    if shape and not _axes(features) & set().union(*map(_axes, spec[:-1])):
        spec[-1] = features
    return spec


def _axes(entry: Any) -> set[str]:
    return set(entry) if isinstance(entry, tuple) else {entry} - {None}


def _spec_of(x: jax.Array) -> list[Any]:
    spec = jax.typeof(x).sharding.spec
    return [*spec, *[None] * (x.ndim - len(spec))]


def _is_split(x: object) -> bool:
    """Say whether the type of an array has a layout, on a mesh with explicit axes, that splits it."""
    return isinstance(x, jax.Array) and any(jax.typeof(x).sharding.spec)


def compiled(fun: Callable, *, layout: Layout = like_first, **options: Any) -> Any:
    """Compile a function as ``jax.jit`` does, and take arrays of explicit meshes.

    Args:
        fun: the function.
        layout: says of an output's shape, and of the arrays that were given, how each axis is split.
        options: of ``jax.jit``.
    """

    @functools.wraps(fun)
    def traced(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        first = next(filter(_is_split, leaves), None)
        if first is None:
            return fun(*args, **kwargs)
        mesh = jax.typeof(first).sharding.mesh
        arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
        given = [leaves[i] for i in arrays]
        explicit = [
            n
            for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if t == AxisType.Explicit
        ]
        with jax.sharding.use_abstract_mesh(
            mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
        ):
            for i in arrays:
                leaves[i] = jax.sharding.reshard(leaves[i], PartitionSpec())
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            out = fun(*args, **kwargs)
        return jax.tree.map(
            lambda x: jax.sharding.reshard(
                x, NamedSharding(mesh, PartitionSpec(*layout(x.shape, given)))
            ),
            out,
        )

    return jax.jit(traced, **options)
