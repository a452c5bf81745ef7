"""Traces and diagonals of operators, from products with random vectors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._models import check_choice
from statefulnn.curvature.operators import (
    LinearOperator,
    check_count,
    checked_jit,
    flat_product,
)
from statefulnn.curvature.spectra import Estimate, average, random_signs

TRACES = ("hutchinson", "hutch++", "xtrace")
DIAGONALS = ("hutchinson", "xdiag")


@shortened
def trace(
    A: LinearOperator, *, method: str = "xtrace", samples: int = 30, rng: jax.Array | None = None
) -> Estimate:
    """Return an unbiased estimate of the trace.

    "hutchinson" averages ``z · A z`` over vectors z of random signs. "hutch++" takes the trace over the range
    of a third of the products exactly and that of the rest by Hutchinson; "xtrace" does so with each random
    vector once left out of the range. Both are exact for a matrix of low rank, and much better than
    Hutchinson where few eigenvalues make up most of the trace, as for networks. They keep `samples` vectors
    ``(P,)`` in memory.

    Args:
        A: a square operator, ``(P, P)``; it need not be symmetric.
        method: "hutchinson", "hutch++" or "xtrace".
        samples: how many products with A are made: at least 1, 3 and 4. With P or more, products with the
            unit vectors give the exact trace.
        rng: a random key; None for the generator in force.

    Returns:
        an `Estimate`.

    Raises:
        ShapeError: if the operator does not return the structure that it takes.
        ValueError: for an unknown method, or too few samples.

    Source: Hutchinson 1989; Meyer, Musco, Musco, Woodruff 2021, "Hutch++",
    https://arxiv.org/abs/2010.09649; Epperly, Tropp, Webber 2024, "XTrace", https://arxiv.org/abs/2301.07825.

    Example:
        >>> model, x = nn.Linear(50, 1), jax.random.normal(jax.random.key(0), (4, 50))
        >>> A = nn.curvature.fisher(model, x, likelihood="gaussian")  # of rank 4
        >>> estimate = nn.curvature.trace(A, samples=12, rng=jax.random.key(1))
        >>> bool(jnp.isclose(estimate.value, 1 + jnp.sum(x**2) / 4, rtol=1e-4))
        True
    """
    function = "trace"
    check_choice(method, TRACES, "method", function)
    _require_square(A, function)
    check_count(samples, {"hutchinson": 1, "hutch++": 3, "xtrace": 4}[method], "samples", function)
    if samples >= A.source.size:
        return exactly(jnp.trace(A.to_dense()))
    count = {"hutchinson": samples, "hutch++": 2 * (samples // 3), "xtrace": samples // 2}[method]
    probes = random_signs(A, count, rng, function)[1]
    if method == "hutch++":
        return hutch_plus_plus(A, probes[: count // 2], probes[count // 2 :])
    return {"hutchinson": hutchinson, "xtrace": xtrace}[method](A, probes)


@shortened
def diagonal(
    A: LinearOperator, *, method: str = "xdiag", samples: int = 30, rng: jax.Array | None = None
) -> Estimate:
    """Return an unbiased estimate of the diagonal.

    "hutchinson" averages ``z ∘ A z`` over vectors z of random signs; "xdiag" takes what lies in the range of
    half of the products exactly, and is exact for a matrix of low rank.

    Args:
        A: a square operator, ``(P, P)``; it need not be symmetric.
        method: "hutchinson" or "xdiag".
        samples: how many products with A, and its transpose, are made: at least 1 and 4; so many vectors
            ``(P,)`` are in memory. With P or more, products with the unit vectors give the exact diagonal.
        rng: a random key; None for the generator in force.

    Returns:
        an `Estimate`, whose value and error are trees like the operator's vectors.

    Raises:
        ShapeError: if the operator does not return the structure that it takes.
        ValueError: for an unknown method, or too few samples.

    Source: Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a matrix"; Epperly, Tropp,
    Webber 2024, "XTrace", https://arxiv.org/abs/2301.07825, section 5.

    Example:
        >>> model, x, y = nn.Linear(2, 1), jnp.array([[1.0, 3.0]]), jnp.ones((1, 1))
        >>> A = nn.curvature.ggn(model, F.mse_loss, (x, y))
        >>> estimate = nn.curvature.diagonal(A, samples=8, rng=jax.random.key(0))
        >>> estimate.value["weight"].round(4).tolist()  # the unit vectors: exact
        [[2.0, 18.0]]
    """
    function = "diagonal"
    check_choice(method, DIAGONALS, "method", function)
    _require_square(A, function)
    check_count(samples, {"hutchinson": 1, "xdiag": 4}[method], "samples", function)
    if samples >= A.source.size:
        found = exactly(jnp.diagonal(A.to_dense()))
    elif method == "hutchinson":
        found = hutchinson_diagonal(A, random_signs(A, samples, rng, function)[1])
    else:
        found = xdiag(A, random_signs(A, samples // 2, rng, function)[1])
    return Estimate(*map(A.source.unflatten, found))


# --------------------------------------------------------------------------------------------------
# The methods, for given vectors of signs (k, P)


def _products(A: LinearOperator, vectors: jax.Array) -> Any:
    """Return the products with vectors (k, P), one after the other."""
    return jax.lax.map(flat_product(A), vectors)


_dot = functools.partial(jnp.matmul, precision="highest")


@checked_jit
def hutchinson(A: LinearOperator, probes: jax.Array) -> Estimate:
    """Return the estimate of the trace by Hutchinson."""
    product = flat_product(A)
    return average(jax.lax.map(lambda z: _dot(z, product(z)), probes))


@checked_jit
def hutch_plus_plus(A: LinearOperator, sketch: jax.Array, probes: jax.Array) -> Estimate:
    """Return the estimate of the trace by Hutch++."""
    range_of = jnp.linalg.qr(_products(A, sketch).T)[0].T  # (k, P)
    inside = jnp.sum(range_of * _products(A, range_of))
    rest = hutchinson(A, probes - _dot(_dot(probes, range_of.T), range_of))
    return Estimate(inside + rest.value, rest.error)


@checked_jit
def xtrace(A: LinearOperator, probes: jax.Array) -> Estimate:
    """Return the estimate of the trace by XTrace."""
    products = _products(A, probes)
    basis, _, out = _ranges(products)
    of_basis = _products(A, basis)
    inside = _dot(basis, of_basis.T)  # (k, k): q · A q
    # What is beside the range of the others' products, of each vector and of its product.
    within = _dot(probes, basis.T)
    within = within - out * jnp.sum(out * within, 1, keepdims=True)
    beside = probes - _dot(within, basis)
    of_beside = products - _dot(within, of_basis)
    lost = jnp.sum(_dot(out, inside) * out, 1)
    return average(jnp.trace(inside) - lost + jnp.sum(beside * of_beside, 1))


@checked_jit
def hutchinson_diagonal(A: LinearOperator, probes: jax.Array) -> Estimate:
    """Return the estimate of the diagonal by Hutchinson, (P,)."""
    return average(probes * _products(A, probes))


@checked_jit
def xdiag(A: LinearOperator, probes: jax.Array) -> Estimate:
    """Return the estimate of the diagonal by XDiag, (P,)."""
    basis, coordinates, out = _ranges(_products(A, probes))
    of_basis = _products(A.T, basis)
    directions = _dot(out, basis)  # of each range, what only the one product adds to it
    inside = jnp.sum(basis * of_basis, 0) - directions * _dot(out, of_basis)
    beside = directions * jnp.sum(out * coordinates, 1, keepdims=True)
    return average(inside + probes * beside)


def _ranges(products: jax.Array) -> tuple[Any, Any, Any]:
    """Return an orthonormal basis of k vectors (k, P), and what each vector alone adds to their span.

    Returns:
        the basis ``(k, P)``; the coordinates of the vectors in it ``(k, k)``; and for each vector the unit
        vector in these coordinates that is orthogonal to all other vectors, ``(k, k)``.
    """
    basis, triangle = jnp.linalg.qr(products.T)
    # Products of a matrix of low rank depend on each other; any direction beside them will do.
    entries = jnp.abs(jnp.diagonal(triangle))
    floor = jnp.finfo(products.dtype).eps * jnp.max(entries)
    floor = jnp.where(floor > 0, floor, 1)
    filled = triangle + jnp.diag(jnp.where(entries <= floor, floor, 0))
    k = len(products)
    out = jax.scipy.linalg.solve_triangular(filled, jnp.eye(k, dtype=products.dtype), trans="T").T
    out = out / jnp.linalg.norm(out, axis=1, keepdims=True)
    return basis.T, triangle.T, out


def exactly(value: jax.Array) -> Estimate:
    """Return an estimate without error."""
    return Estimate(value, jnp.zeros_like(value))


def _require_square(A: object, function: str) -> None:
    if not isinstance(A, LinearOperator) or A.source != A.target:
        what = f"shape {A.shape}" if isinstance(A, LinearOperator) else f"type {type(A).__name__}"
        raise ShapeError(
            explain(
                f"{function} was given an operator of {what}",
                "it takes a square operator, which returns vectors of the structure that it takes",
                "nn.curvature.hessian(model, loss, data), ggn, fisher, or A.T @ A",
            )
        )
