"""Arrays as a compiled loop carries them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def strong_arrays(tree: Any) -> Any:
    """Return a tree of arrays of fixed dtypes: a loop over weakly typed ones is traced twice."""

    def one(v: object) -> Any:
        if isinstance(v, jax.Array) and not v.weak_type:
            return v
        return jnp.asarray(v, jnp.result_type(v))

    return jax.tree_util.tree_map(one, tree)
