"""Sums over parameters of products of Jacobians, given as such or as patches and cotangents."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.curvature._models import wide

# For Jacobians (N, C, P) and (M, C, P).
_JACOBIANS = {"full": "acp,bdp->abcd", "diagonal": "acp,bcp->abc", "trace": "acp,bcp->ab"}
# For products of cotangents at positions t and s, and then with those of patches (N, M, T, S).
_COTANGENTS = {
    "full": ("ncto,mdso->nmcdts", "nmcdts,nmts->nmcd"),
    "diagonal": ("ncto,mcso->nmcts", "nmcts,nmts->nmc"),
    "trace": ("ncto,mcso->nmts", "nmts,nmts->nm"),
}


@functools.partial(jax.jit, static_argnames="outputs")
def contract(first: list[tuple], second: list[tuple], outputs: str) -> Any:
    """Return the kernel (N, M, ...) from the factors of each parameter on both sides."""
    total: Any = None
    for a, b in zip(first, second, strict=True):
        dtype = wide(a[0].dtype)
        if len(a) == 1:
            part = jnp.einsum(_JACOBIANS[outputs], a[0], b[0], preferred_element_type=dtype)
        else:
            of_cotangents, of_both = _COTANGENTS[outputs]
            inner = jnp.einsum("ntk,msk->nmts", a[0], b[0], preferred_element_type=dtype)
            outer = jnp.einsum(of_cotangents, a[1], b[1], preferred_element_type=dtype)
            part = jnp.einsum(of_both, outer, inner)
        total = part if total is None else _add(total, part)
    return total


def _add(a: jax.Array, b: jax.Array) -> Any:
    dtype = wide(a.dtype, b.dtype)
    return a.astype(dtype) + b.astype(dtype)


def jacobian_is_cheaper(
    patches: tuple[int, ...], cotangents: tuple[int, ...], pairs: tuple[int, int], outputs: str
) -> bool:
    """Compare the multiplications of the two ways to contract a layer, for all pairs of examples.

    Args:
        patches: the shape (T, K) for one example.
        cotangents: the shape (C, T, out) for one example.
        pairs: how many examples there are on each side.
        outputs: which of the C x C products are wanted.
    """
    (t, k), (c, _, o), (n, m) = patches, cotangents, pairs
    wanted = c * c if outputs == "full" else c
    by_positions = n * m * t * t * (k + wanted * (o + 1))
    by_jacobians = (n + m) * c * t * o * k + n * m * wanted * o * k
    return by_jacobians < by_positions
