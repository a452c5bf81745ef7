"""Lanczos steps with full reorthogonalisation, on flat vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def extend(apply: Callable, basis: Any, matrix: Any, start: Any, key: Any) -> tuple[Any, Any, Any]:
    """Extend an orthonormal basis by Krylov vectors, up to its length.

    Where the Krylov space ends, it goes on with a random vector. So vectors of an eigenvalue that occurs
    several times are found, which the Krylov space of one vector does not have.

    Args:
        apply: ``v -> A v``, A symmetric, ``(P,)``.
        basis: ``(m + 1, P)``; rows up to and with `start` are orthonormal, the others zero.
        matrix: ``(m, m)``, the products ``qᵢ · A qⱼ`` of the rows before `start`; zero elsewhere.
        start: the number of the first row that A is applied to.
        key: for the random vectors.

    Returns:
        the full basis, the matrix, and the norm of what A makes of the last row beside those before.
    """
    m, size = matrix.shape[0], basis.shape[1]
    tiny = 10 * jnp.finfo(basis.dtype).eps

    def step(j: Any, state: tuple) -> tuple:
        basis, matrix, _ = state
        product = apply(basis[j])
        # Nearly all of it lies in the last two rows; without that, one more pass is mostly enough.
        last = jnp.maximum(j - 1, 0)
        rest, near = _without(jax.lax.dynamic_slice(basis, (last, 0), (2, size)), product)
        rest, column = _beside(basis, rest)
        column = jax.lax.dynamic_update_slice(
            column, near + jax.lax.dynamic_slice(column, (last,), (2,)), (last,)
        )
        norm = jnp.linalg.norm(rest)
        ends = norm <= tiny * jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.linalg.norm(product))
        rest, length = jax.lax.cond(
            ends,
            lambda: _random_beside(basis, jax.random.fold_in(key, j), size),
            lambda: (rest, norm),
        )
        norm = jnp.where(ends, 0, norm)
        column = column[:m]
        matrix = matrix.at[:, j].set(column).at[j].set(column)
        return basis.at[j + 1].set(rest / jnp.where(length > 0, length, 1)), matrix, norm

    return jax.lax.fori_loop(start, m, step, (basis, matrix, jnp.zeros((), basis.dtype)))


def _beside(basis: Any, vector: Any) -> tuple[Any, Any]:
    """Return what of a vector is orthogonal to the rows of a basis, and its products with them.

    Once is not enough where much of the vector is in the basis: rounding is relative to that.
    """
    rest, products = _without(basis, vector)

    def again() -> tuple[Any, Any]:
        better, more = _without(basis, rest)
        return better, products + more

    little = jnp.linalg.norm(rest) < 0.7 * jnp.linalg.norm(vector)
    return jax.lax.cond(little, again, lambda: (rest, products))


def _without(basis: Any, vector: Any) -> tuple[Any, Any]:
    products = jnp.matmul(basis, vector, precision="highest")
    return vector - jnp.matmul(products, basis, precision="highest"), products


def _random_beside(basis: Any, key: Any, size: int) -> tuple[Any, Any]:
    vector = jax.random.normal(key, (size,), basis.dtype)
    vector = _beside(basis, vector)[0]
    norm = jnp.linalg.norm(vector)
    # In a basis of the whole space what is left is rounding.
    exists = norm > 1e-3
    return jnp.where(exists, vector, 0), jnp.where(exists, norm, 0)


def random_start(basis: Any, key: Any) -> Any:
    """Return a random unit vector orthogonal to the rows of a basis."""
    vector, norm = _random_beside(basis, key, basis.shape[1])
    return vector / jnp.where(norm > 0, norm, 1)
