"""The posterior's Gaussian in the forms that the structures of a curvature give it.

With H the curvature over the noise's variance and D the diagonal of the prior precisions, the covariance is
``(H + D)⁻¹ = S Sᵀ``. A form knows how to multiply by a root S, and what the evidence needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# The eigenvectors of one parameter's factors: of the rows of the matrix that it is made into, and of its
# columns; None for unit vectors.
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Aligned:
    """Coordinates in which curvature and prior are diagonal.

    Attributes:
        curvature: the eigenvalues of H, (P,).
        prior: the prior precisions, (P,).
        vectors: None where the coordinates are the parameters; (P, P), in columns; or a pair for each
            parameter of a Kronecker-factored curvature.
        sizes: for pairs, the sizes of the parameters.
    """

    curvature: Any
    prior: Any
    vectors: Any
    sizes: Sequence[int]

    def log_ratio(self) -> Any:
        """Return log det D - log det (H + D)."""
        return jnp.sum(jnp.log(self.prior) - jnp.log(self.curvature + self.prior))

    def determined(self) -> Any:
        """Return how far the data determine each coordinate, (P,) numbers between 0 and 1."""
        return self.curvature / (self.curvature + self.prior)

    def variances(self) -> Any:
        """Return the variances of the coordinates, (P,)."""
        return 1 / (self.curvature + self.prior)

    def root(self, rows: jax.Array) -> Any:
        """Return rows (..., P) times S."""
        return self._turned(rows, False) * jnp.sqrt(self.variances())

    def moves(self, noise: jax.Array) -> Any:
        """Return S times noise (..., P): draws of changes of the parameters."""
        return self._turned(noise * jnp.sqrt(self.variances()), True)

    def _turned(self, rows: jax.Array, back: bool) -> Any:
        if self.vectors is None:
            return rows
        if not isinstance(self.vectors, tuple):
            return jnp.matmul(rows, self.vectors.T if back else self.vectors, precision="highest")
        parts = jnp.split(rows, np.cumsum(self.sizes)[:-1], axis=-1)
        pairs = zip(parts, self.vectors, strict=True)
        return jnp.concatenate([by_pair(part, pair, back) for part, pair in pairs], -1)


def by_pair(part: jax.Array, pair: Pair, back: bool) -> Any:
    """Return numbers (..., size) of one parameter in the coordinates of its eigenvectors, or back."""
    left, right = (q if q is None or back else q.T for q in pair)
    if right is None:
        return part
    matrix = part.reshape(*part.shape[:-1], -1, right.shape[0])
    matrix = jnp.einsum("ab,...kb->...ka", right, matrix, precision="highest")
    if left is not None:
        matrix = jnp.einsum("ab,...bk->...ak", left, matrix, precision="highest")
    return matrix.reshape(part.shape)


@dataclass(frozen=True)
class LowRank:
    """A curvature of some directions, with a prior that may differ along them.

    With ``W = D^-½ V √values`` the precision is ``D^½ (I + W Wᵀ) D^½``.

    Attributes:
        directions: W, (P, K).
        prior: the prior precisions, (P,).
    """

    directions: Any
    prior: Any

    def log_ratio(self) -> Any:
        """Return log det D - log det (H + D)."""
        return -jnp.linalg.slogdet(self._inner())[1]

    def determined(self) -> Any:
        """Return how far the data determine each parameter, (P,) numbers that sum to their number."""
        w = self.directions
        return jnp.sum(w * jnp.linalg.solve(self._inner(), w.T).T, 1)

    def root(self, rows: jax.Array) -> Any:
        """Return rows (..., P) times S."""
        return self._shrunk(rows / jnp.sqrt(self.prior))

    def moves(self, noise: jax.Array) -> Any:
        """Return S times noise (..., P): draws of changes of the parameters."""
        return self._shrunk(noise) / jnp.sqrt(self.prior)

    def _inner(self) -> Any:
        w = self.directions
        return jnp.eye(w.shape[1], dtype=w.dtype) + jnp.matmul(w.T, w, precision="highest")

    def _shrunk(self, rows: jax.Array) -> Any:
        # (I + W Wᵀ)^-½ = I - W f(Wᵀ W) Wᵀ, with f(m) = (1 - (1 + m)^-½) / m.
        values, vectors = jnp.linalg.eigh(self._inner())
        values = jnp.maximum(values, 1)
        w = jnp.matmul(self.directions, vectors, precision="highest")
        inside = jnp.matmul(rows, w, precision="highest") / (values + jnp.sqrt(values))
        return rows - jnp.matmul(inside, w.T, precision="highest")


def gaussian(
    values: jax.Array,
    vectors: Any,
    sizes: Sequence[int],
    noise: ArrayLike,
    prior: jax.Array,
    scalar: bool,
) -> Any:
    """Return the form for eigenvalues and eigenvectors of a curvature.

    Args:
        values: of the curvature of noise 1.
        vectors: see `Aligned`; or (P, K) for K directions.
        sizes: of the parameters.
        noise: its variance.
        prior: (P,).
        scalar: whether all entries of `prior` are the same.
    """
    whole = getattr(vectors, "ndim", 0) == 2
    if whole and not (scalar and vectors.shape[0] == vectors.shape[1]):
        root = jnp.sqrt(jnp.maximum(values, 0) / noise)
        return LowRank(vectors * root / jnp.sqrt(prior)[:, None], prior)
    return Aligned(values / noise, prior, vectors, sizes)
