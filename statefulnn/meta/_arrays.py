"""Arrays as a compiled loop carries them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def strong_arrays(tree: Any) -> Any:
    """Return a tree of arrays of fixed dtypes: a loop over weakly typed ones is traced twice."""

    def one(v: Any) -> Any:
        if isinstance(v, jax.Array) and not v.weak_type:
            return v
        return jnp.asarray(v, jnp.result_type(v))

    return jax.tree_util.tree_map(one, tree)


def dot(a: Any, b: Any) -> Any:
    """Return the inner product of two trees of arrays."""
    products = jax.tree_util.tree_map(lambda a, b: jnp.vdot(a, b).real, a, b)
    return sum(jax.tree_util.tree_leaves(products))


def norm(tree: Any) -> Any:
    """Return the Euclidean norm of a tree of arrays."""
    return jnp.sqrt(dot(tree, tree))


def difference(a: Any, b: Any) -> Any:
    """Return ``a - b`` of two trees of arrays."""
    return jax.tree_util.tree_map(jnp.subtract, a, b)
