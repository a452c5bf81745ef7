"""The largest eigenvalues of the generalised Gauss-Newton matrix, from products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from statefulnn.curvature._blocks import fold_blocks
from statefulnn.curvature._laplace_parts import Likelihood
from statefulnn.curvature._models import wide

# Steps of Lanczos for each eigenvalue, and for any number of them.
_STEPS, _MORE = 4, 40


def lowrank_curvature(
    outputs_of: Callable[[Any, tuple], Any],
    flat: jax.Array,
    data: tuple,
    likelihood: Likelihood,
    rank: int,
    batch_size: int | None,
) -> tuple[Any, Any, Any]:
    """Return the log-likelihood of the data, the largest eigenvalues (K,) and their vectors (P, K).

    Args:
        outputs_of: the outputs of one example as a function of the flat parameters and its inputs.
        flat: the parameters, (P,).
        data: inputs and targets.
        likelihood: of an example.
        rank: K, at most P.
        batch_size: how many examples are in memory at once; None for all.
    """
    dtype = wide(flat.dtype)
    rank = min(rank, flat.size)

    def times(vector: jax.Array, data: tuple) -> tuple[Any, Any]:
        def block(data: tuple) -> tuple[tuple[Any, Any], None]:
            of_all = lambda flat: jax.vmap(outputs_of, (None, 0))(flat, data[0])
            out, push = jax.linearize(of_all, flat)
            pushed = push(vector.astype(flat.dtype)).astype(dtype)
            scores, roots = jax.vmap(likelihood.of)(out.astype(dtype), data[1])
            inner = jnp.einsum("ncr,nc->nr", roots, pushed, precision="highest")
            outer = jnp.einsum("ncr,nr->nc", roots, inner, precision="highest")
            (pulled,) = jax.linear_transpose(push, flat)(outer.astype(out.dtype))
            return (scores.sum(), pulled.astype(dtype)), None

        add = lambda one, two: jax.tree.map(jnp.add, one, two)
        return fold_blocks(block, add, data, batch_size)[0]

    @jax.jit
    def compute(data: tuple) -> tuple[Any, Any, Any]:
        steps = min(flat.size, _STEPS * rank + _MORE)
        values, vectors = lanczos(lambda v: times(v, data)[1], flat.size, steps, dtype)
        score = times(jnp.zeros(flat.size, dtype), data)[0]
        return score, jnp.maximum(values[-rank:], 0), vectors[:, -rank:]

    return compute(data)


def lanczos(
    matvec: Callable[[Any], Any], size: int, steps: int, dtype: DTypeLike
) -> tuple[Any, Any]:
    """Return Ritz values (steps,), in rising order, and vectors (size, steps) of a symmetric matrix.

    Each vector is made orthogonal to all before it. Where the matrix leads nowhere new, the next one is
    random, so that a matrix of low rank, or an eigenvalue that occurs several times, does no harm.
    """
    starts = jax.random.normal(jax.random.key(0), (steps, size), dtype)

    def orthogonal(vector: jax.Array, basis: jax.Array) -> Any:
        for _ in range(2):  # once leaves what was rounded
            along = jnp.matmul(basis, vector, precision="highest")
            vector = vector - jnp.matmul(along, basis, precision="highest")
        return vector

    def unit(vector: jax.Array) -> Any:
        return vector / jnp.linalg.norm(vector)

    def step(carry: tuple, at: jax.Array) -> tuple[tuple, tuple]:
        basis, vector, largest = carry
        basis = basis.at[at].set(vector)
        product = matvec(vector)
        diagonal = jnp.vdot(vector, product, precision="highest")
        rest = orthogonal(product, basis)
        length = jnp.linalg.norm(rest)
        largest = jnp.maximum(largest, jnp.linalg.norm(product))
        leads_on = length > 10 * jnp.finfo(dtype).eps * largest
        fresh = orthogonal(unit(starts[at]), basis)
        vector = unit(jnp.where(leads_on, rest, fresh))
        return (basis, vector, largest), (diagonal, jnp.where(leads_on, length, 0))

    start = (jnp.zeros((steps, size), dtype), unit(starts[-1]), jnp.zeros((), dtype))
    (basis, _, _), (diagonal, beside) = jax.lax.scan(step, start, jnp.arange(steps))
    beside = beside[:-1]
    projected = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = jnp.linalg.eigh(projected)
    return values, jnp.matmul(basis.T, vectors, precision="highest")
