"""Powers of two that bring arrays near 1, where their squares neither over- nor underflow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def exponent_of(tree: Any) -> Any:
    """Return e with the largest entry of a tree of arrays near 2^e; the lowest there is for zeros."""
    exponent, bound = jnp.full((), np.iinfo(np.int32).min), 2**15
    for v in jax.tree_util.tree_leaves(tree):
        largest = jnp.abs(v).max(initial=0)
        own = jnp.frexp(largest)[1].astype(jnp.int32)
        known = (largest > 0) & jnp.isfinite(largest)
        exponent = jnp.maximum(exponent, jnp.where(known, own, exponent))
        bound = min(bound, -int(jnp.finfo(jnp.result_type(v)).minexp))
    return jax.lax.stop_gradient(jnp.clip(exponent, -bound, bound))


def shifted(tree: Any, exponent: Any) -> Any:
    """Return ``2^exponent`` times a tree of arrays, which rounds nothing."""

    def one(v: Any) -> Any:
        real = jnp.finfo(jnp.result_type(v)).dtype
        return v * jnp.ldexp(jnp.ones((), real), exponent).astype(jnp.result_type(v))

    return jax.tree_util.tree_map(one, tree)
