"""Layers that compare vectors."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module


class PairwiseDistance(Module):
    """Return the p-norm of ``x1 - x2 + eps``, vector by vector.

    Args:
        p: the degree of the norm; it may be infinite or negative.
        eps: added to each difference, so that the norm has a derivative between equal vectors.
        keepdim: whether the vectors' axis stays, with size 1.

    Shape:
        - x1, x2: ``(N, D)`` or ``(D,)``; output: ``(N,)`` or ``()``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.PairwiseDistance(p=1)(jnp.zeros((2, 3)), jnp.ones((2, 3))).round(3).tolist()
        [3.0..., 3.0...]
    """

    def __init__(self, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> None:
        super().__init__()
        self.norm = p
        self.eps = eps
        self.keepdim = keepdim

    def forward(self, x1: ArrayLike, x2: ArrayLike) -> jax.Array:
        return F.pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)


class CosineSimilarity(Module):
    """Return the cosine of the angle between vectors.

    Args:
        dim: the vectors' axis.
        eps: the smallest length that is divided by.

    Shape:
        - x1, x2: ``(*, D, *)`` that broadcast, D at `dim`; output: ``(*, *)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.CosineSimilarity()(jnp.eye(2), jnp.ones((2, 2))).round(3).tolist()
        [0.707..., 0.707...]
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x1: ArrayLike, x2: ArrayLike) -> jax.Array:
        return F.cosine_similarity(x1, x2, self.dim, self.eps)
