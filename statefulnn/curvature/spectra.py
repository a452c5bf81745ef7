"""Eigenpairs and spectral densities of symmetric operators, by Lanczos."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike

from statefulnn.core.errors import ConvergenceError, explain
from statefulnn.core.generator import as_key, next_key
from statefulnn.core.reports import fail_unless, lanes_of
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._lanczos import Basis, extend
from statefulnn.curvature._models import check_choice
from statefulnn.curvature.operators import (
    LinearOperator,
    check_count,
    checked_jit,
    flat_product,
    not_positive_definite,
    require_symmetric,
)

WHICH = ("largest", "smallest", "magnitude")
_GRAM = "(A.T @ A), whose eigenvalues are squared singular values"


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of a symmetric operator.

    Attributes:
        values: ``(k,)``, in the order that was asked for.
        vectors: a tree like the operator's vectors, with one more axis of length k, the first; of norm 1.
        residuals: ``(k,)``, ``|A v - λ v|``, as Lanczos knows it. An eigenvalue of A lies within that of λ.
        products: how many products with A were made.
    """

    values: Any
    vectors: Any
    residuals: Any
    products: Any


class Estimate(NamedTuple):
    """An average over random vectors.

    Attributes:
        value: the average.
        error: its standard error, from the spread between the random vectors; infinite for one vector.
    """

    value: Any
    error: Any


@shortened
def eigenpairs(
    A: LinearOperator,
    k: int = 1,
    *,
    which: str = "largest",
    tol: float | None = 1e-5,
    basis_size: int | None = None,
    max_restarts: int = 100,
    rng: jax.Array | None = None,
) -> Eigenpairs:
    """Return k eigenpairs at an end of the spectrum, by Lanczos with thick restarts.

    Once all have converged, it looks beside the eigenvectors from a random vector: the Krylov space of one
    vector holds only one eigenvector of an eigenvalue that occurs several times. That check costs
    ``basis_size - k`` products and is repeated where it finds something.

    Args:
        A: a symmetric operator, ``(P, P)``.
        k: how many, at most P.
        which: "largest", "smallest", or "magnitude" for those largest in size.
        tol: how small the residuals ``|A v - λ v|`` are to be, relative to the largest eigenvalue in size;
            None takes what `max_restarts` give.
        basis_size: how many vectors ``(P,)`` are kept; None for ``max(20, 4 k)``. More of them need fewer
            restarts.
        max_restarts: at most as many, one of which the check takes.
        rng: a random key, for the start; None for the generator in force.

    Returns:
        `Eigenpairs`.

    Raises:
        TypeError: if the operator is not symmetric.
        ValueError: for bad numbers.
        ConvergenceError: if `tol` is not reached, or the operator is not finite; from compiled code as
            `LinearOperator.inverse`.

    Source: Wu and Simon 2000, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems".

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x, y = jnp.eye(3), jnp.arange(3) % 2
        >>> A = nn.curvature.hessian(model, F.cross_entropy, (x, y))
        >>> top = nn.curvature.eigenpairs(A, 2, rng=jax.random.key(0))
        >>> top.vectors["0.weight"].shape
        (2, 8, 3)
        >>> bool(jnp.isclose(top.values[0], jnp.linalg.eigvalsh(A.to_dense())[-1], rtol=1e-4))
        True
    """
    function = "eigenpairs"
    require_symmetric(A, function, _GRAM)
    check_choice(which, WHICH, "which", function)
    check_count(k, 1, "k", function)
    check_count(max_restarts, 1, "max_restarts", function)
    size = A.source.size
    if k > size:
        raise ValueError(
            explain(
                f"eigenpairs was given k={k} for an operator of shape {A.shape}",
                "it has no more eigenpairs than rows",
                f"k={size} or less",
            )
        )
    m = max(20, 4 * k) if basis_size is None else basis_size
    check_count(m, k + 1, "basis_size", function)
    key = next_key() if rng is None else as_key(rng)
    end = _eigenpairs(A, key, tol or 0.0, k, which, min(m, size), max_restarts)
    fine = jnp.isfinite(end.scale) if tol is None else end.done
    error = functools.partial(_unconverged, k, tol, m)
    fail_unless(fine, error, end.residuals, end.scale, end.products)
    vectors = jax.vmap(A.source.unflatten)(end.basis.first(k))
    return Eigenpairs(end.values, vectors, end.residuals, end.products)


class _State(NamedTuple):
    """Where restarted Lanczos is: a basis of m + 1 rows, its matrix (m, m), and what was found."""

    basis: Basis
    matrix: Any
    start: Any  # the first row of the basis that A is to be applied to
    fresh: Any  # whether that row is a random vector
    values: Any
    residuals: Any
    scale: Any
    done: Any
    cycles: Any
    products: Any


@functools.partial(checked_jit, static_argnums=(3, 4, 5, 6))
def _eigenpairs(
    A: LinearOperator, key: jax.Array, tol: ArrayLike, k: int, which: str, m: int, restarts: int
) -> _State:
    apply, size = flat_product(A), A.source.size
    # More than those wanted are kept in a restart: what is near them would else be found again.
    keep = k + (m - k) // 3
    rank = {"largest": lambda v: -v, "smallest": lambda v: v, "magnitude": lambda v: -jnp.abs(v)}

    def cycle(state: _State) -> _State:
        """Fill the basis, take Ritz pairs, best first, and start again from these."""
        here = jax.random.fold_in(key, state.cycles)
        basis, matrix, norm = extend(apply, state.basis, state.matrix, state.start, here)
        ritz, turn = jnp.linalg.eigh(matrix)
        best = jnp.argsort(rank[which](ritz))
        ritz, turn = ritz[best], turn[:, best]
        # A fresh start drops what A makes of the rows kept beside them: their residuals are still there.
        dropped = jnp.where(state.fresh, jnp.abs(turn[:k]).T @ state.residuals, 0)
        residuals = (jnp.abs(norm * turn[-1]) + dropped)[:k]
        scale = jnp.max(jnp.abs(ritz))
        converged = jnp.all(residuals <= tol * scale)
        start = jnp.where(converged, k, keep).astype(int)
        kept = jnp.arange(m) < start
        restarted, last = basis.turned(turn[:, :keep].T), basis.row(m)
        following = jax.lax.cond(
            converged,
            lambda: restarted.random_beside(jax.random.fold_in(here, m), k)[0],
            lambda: last,
        )
        return _State(
            restarted.with_row(start, following),
            jnp.diag(jnp.where(kept, ritz, 0)),
            start,
            converged,
            ritz[:k],
            residuals,
            scale,
            converged & (state.fresh | (m == size)),
            state.cycles + 1,
            state.products + m - state.start,
        )

    def unfinished(state: _State) -> Any:
        return ~state.done & (state.cycles <= restarts) & jnp.isfinite(state.scale)

    first = jax.random.normal(key, (size,), A.dtype)
    number, no, values = jnp.zeros((), int), jnp.asarray(False), jnp.zeros(k, A.dtype)
    return jax.lax.while_loop(
        unfinished,
        cycle,
        _State(
            Basis.of(first / jnp.linalg.norm(first), m + 1),
            jnp.zeros((m, m), A.dtype),
            number,
            no,
            values,
            values,
            values[0],
            no,
            number,
            number,
        ),
    )


def _unconverged(
    k: int,
    tol: float | None,
    m: int,
    fine: np.ndarray,
    residuals: np.ndarray,
    scale: np.ndarray,
    products: np.ndarray,
) -> ConvergenceError:
    worst = (residuals / scale[..., None])[~fine].max()
    return ConvergenceError(
        explain(
            f"eigenpairs(k={k}, tol={tol}) made {products[~fine].max()} products and was left with a "
            f"residual of {worst:.1e}, relative to the largest eigenvalue{lanes_of(fine, 'operator')}",
            "the eigenvalues are close to each other, or the operator is not finite",
            f"basis_size={2 * m}, a larger tol, or tol=None to take what it found",
        )
    )


@register_dataclass
@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of an operator's eigenvalues, as weighted nodes for each random vector.

    Made by `spectral_density`; a pytree.

    Attributes:
        nodes: ``(samples, steps)``, places on the axis of eigenvalues.
        weights: ``(samples, steps)``, not negative, of sum 1 for each random vector.
        size: the number of eigenvalues, P.

    Example:
        >>> A = nn.curvature.LinearOperator.of(
        ...     lambda d, v: d * v, jnp.ones(4), jnp.array([1.0, 1, 2, 4]), symmetric=True
        ... )
        >>> density = nn.curvature.spectral_density(A, samples=1, steps=4, rng=jax.random.key(0))
        >>> float(density.integral(jnp.log2).value.round(4))  # signs are exact for a diagonal
        3.0
    """

    nodes: Any
    weights: Any
    size: int = field(metadata={"static": True})

    def integral(self, function: Callable[[jax.Array], ArrayLike]) -> Estimate:
        """Return an estimate of the trace of ``f(A)``, the sum of f over the eigenvalues.

        Args:
            function: of an array of eigenvalues.
        """
        each = self.size * jnp.sum(self.weights * function(self.nodes), axis=1)
        return average(each)

    def density(self, x: ArrayLike, width: ArrayLike) -> jax.Array:
        """Return the density of eigenvalues at places, smoothed by a Gaussian.

        Args:
            x: places, of any shape.
            width: the standard deviation of the Gaussian.

        Returns:
            the shape of x; its integral is 1.
        """
        x = jnp.asarray(x, self.nodes.dtype)
        bumps = jax.scipy.stats.norm.pdf(x[..., None, None], self.nodes, width)
        return jnp.mean(jnp.sum(bumps * self.weights, axis=-1), axis=-1)


@shortened
def spectral_density(
    A: LinearOperator, *, samples: int = 10, steps: int = 30, rng: jax.Array | None = None
) -> SpectralDensity:
    """Return the distribution of the eigenvalues, by stochastic Lanczos quadrature.

    For each of a few vectors of random signs, Lanczos gives the Gaussian quadrature of the distribution that
    the vector sees; in the mean over vectors that is the distribution of the eigenvalues. It integrates
    polynomials of degree ``2 steps - 1`` exactly for each vector. One random vector at a time is worked on.

    Args:
        A: a symmetric operator, ``(P, P)``.
        samples: how many random vectors.
        steps: how many products with A for each, and vectors ``(P,)`` in memory.
        rng: a random key; None for the generator in force.

    Returns:
        a `SpectralDensity`.

    Raises:
        TypeError: if the operator is not symmetric.
        ValueError: for bad numbers.

    Source: Ubaru, Chen, Saad 2017, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature"; for
    networks Ghorbani, Krishnan, Xiao 2019, https://arxiv.org/abs/1901.10159.

    Example:
        >>> model, x = nn.Linear(5, 3), jax.random.normal(jax.random.key(0), (20, 5))
        >>> A = nn.curvature.fisher(model, x)
        >>> spectrum = nn.curvature.spectral_density(A, samples=4, steps=10, rng=jax.random.key(1))
        >>> spectrum.density(jnp.linspace(0.0, 1.0, 50), width=0.05).shape
        (50,)
    """
    function = "spectral_density"
    require_symmetric(A, function, _GRAM)
    check_count(steps, 1, "steps", function)
    key, probes = random_signs(A, samples, rng, function)
    return quadrature(A, probes, key, steps)


@functools.partial(checked_jit, static_argnums=3)
def quadrature(A: LinearOperator, probes: jax.Array, key: jax.Array, steps: int) -> SpectralDensity:
    """Return nodes and weights for vectors ``(samples, P)``."""
    m, size = min(steps, A.source.size), A.source.size

    def one(probe: jax.Array) -> tuple[Any, Any]:
        basis = Basis.of(probe / jnp.linalg.norm(probe), m + 1)
        _, matrix, _ = extend(flat_product(A), basis, jnp.zeros((m, m), A.dtype), 0, key)
        nodes, turn = jnp.linalg.eigh(matrix)
        return nodes, jnp.square(turn[0])

    nodes, weights = jax.lax.map(one, probes)
    return SpectralDensity(nodes, weights, size)


@shortened
def logdet(
    A: LinearOperator, *, samples: int = 10, steps: int = 30, rng: jax.Array | None = None
) -> Estimate:
    """Return an estimate of the logarithm of the determinant, by stochastic Lanczos quadrature.

    Args:
        A: a symmetric positive definite operator, such as ``ggn(...).damped(1.0)``.
        samples, steps, rng: as in `spectral_density`.

    Returns:
        an `Estimate`.

    Raises:
        TypeError: if the operator is not symmetric.
        ConvergenceError: if it is found to be not positive definite; from compiled code as
            `LinearOperator.inverse`.

    Source: Ubaru, Chen, Saad 2017, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature".

    Example:
        >>> A = nn.curvature.LinearOperator.of(
        ...     lambda d, v: d * v, jnp.ones(3), jnp.array([1.0, 2, 4]), symmetric=True
        ... )
        >>> estimate = nn.curvature.logdet(A, rng=jax.random.key(0))
        >>> bool(jnp.isclose(estimate.value, jnp.log(8.0)))
        True
    """
    spectrum = spectral_density(A, samples=samples, steps=steps, rng=rng)
    smallest = jnp.min(spectrum.nodes)
    fail_unless(smallest > 0, functools.partial(not_positive_definite, "logdet"), smallest)
    return spectrum.integral(jnp.log)


def random_signs(
    A: LinearOperator, samples: int, rng: int | jax.Array | None, function: str
) -> tuple[Any, Any]:
    """Return a key, and vectors of random signs (samples, P)."""
    check_count(samples, 1, "samples", function)
    key, other = jax.random.split(next_key() if rng is None else as_key(rng))
    return other, jax.random.rademacher(key, (samples, A.source.size), A.dtype)


def average(each: jax.Array) -> Estimate:
    """Return the mean over the first axis and its standard error."""
    n = each.shape[0]
    spread = jnp.std(each, axis=0, ddof=1) / n**0.5 if n > 1 else jnp.full(each.shape[1:], jnp.inf)
    return Estimate(jnp.mean(each, axis=0), spread.astype(each.dtype))
