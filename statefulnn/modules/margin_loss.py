"""Losses with a margin, and of triplets, as layers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.functional._checks import shape_error
from statefulnn.functional.margin_loss import check_p
from statefulnn.functional.triplet_loss import check_margin
from statefulnn.modules._loss import _Loss, _WeightedLoss
from statefulnn.modules.distance import PairwiseDistance


class MarginRankingLoss(_Loss):
    """``max(0, -target · (input1 - input2) + margin)``: which of two scores should be higher.

    Args:
        margin: by how much.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - input1, input2: scores, any, the same; target: the same, 1 or -1.
        - output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> loss = nn.MarginRankingLoss()
        >>> float(loss(jnp.zeros(2), jnp.ones(2), jnp.array([1.0, -1.0])))
        0.5
    """

    def __init__(
        self,
        margin: float = 0.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.margin = margin

    def forward(self, input1: ArrayLike, input2: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.margin_ranking_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


class HingeEmbeddingLoss(_Loss):
    """The distance where the target is 1, and ``max(0, margin - input)`` where it is -1.

    Args:
        margin: how far apart dissimilar pairs should be.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - input: distances, any; target: the same, 1 or -1; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> loss = nn.HingeEmbeddingLoss(margin=2.0, reduction="none")
        >>> loss(jnp.array([0.5, 0.5]), jnp.array([1, -1])).tolist()
        [0.5, 1.5]
    """

    def __init__(
        self,
        margin: float = 1.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.margin = margin

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)


class CosineEmbeddingLoss(_Loss):
    """``1 - cos`` of two vectors where the target is 1, ``max(0, cos - margin)`` where it is -1.

    Args:
        margin: the cosine up to which dissimilar pairs cost nothing, from -1 to 1.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - input1, input2: ``(N, D)`` or ``(D,)``; target: ``(N,)`` or ``()``, 1 or -1.
        - output: a scalar, or the target's shape.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> a, b = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> nn.CosineEmbeddingLoss(reduction="none")(a, b, jnp.array([1, -1])).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        margin: float = 0.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.margin = margin

    def forward(self, input1: ArrayLike, input2: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


class MultiMarginLoss(_WeightedLoss):
    """The hinge loss of several classes.

    Args:
        p: 1 or 2: the power of each term.
        margin: by how much the target's score should be higher than the others.
        weight: a factor for each class of target, ``(C,)``; kept as a buffer.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (over the examples, also with weights), "sum" or "none".

    Shape:
        - input: scores, ``(N, C)`` or ``(C,)``; target: class numbers, ``(N,)`` or ``()``.
        - output: a scalar, or the target's shape.

    Source: Crammer and Singer 2001.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> float(nn.MultiMarginLoss()(jnp.array([[0.5, 0.0]]), jnp.array([0])))
        0.25
    """

    _by_class = True

    def __init__(
        self,
        p: int = 1,
        margin: float = 1.0,
        weight: ArrayLike | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        shape = None if weight is None else jnp.shape(weight)
        if shape is not None and len(shape) != 1:
            raise shape_error(
                f"made nn.MultiMarginLoss with weight of shape {shape}",
                "there is one factor for each class",
                "weight.reshape(-1)",
            )
        super().__init__(weight, size_average, reduce, reduction)
        check_p(p, "nn.MultiMarginLoss")
        self.p = p
        self.margin = margin

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.multi_margin_loss(
            input,
            target,
            p=self.p,
            margin=self.margin,
            weight=self.weight,
            reduction=self.reduction,
        )


class MultiLabelMarginLoss(_Loss):
    """The hinge loss between each label of an example and each class that is none.

    Args:
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none": over the examples.

    Shape:
        - input: scores, ``(N, C)`` or ``(C,)``.
        - target: the same: the labels of each example, then -1.
        - output: a scalar, or ``(N,)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> scores, labels = jnp.array([0.5, 0.0, 1.0, 0.0]), jnp.array([2, 0, -1, 0])
        >>> float(nn.MultiLabelMarginLoss()(scores, labels))
        0.25
    """

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.multilabel_margin_loss(input, target, reduction=self.reduction)


class TripletMarginLoss(_Loss):
    """``max(0, d(anchor, positive) - d(anchor, negative) + margin)``.

    Args:
        margin: by how much farther the negative should be; above 0.
        p: the distance is the p-norm of the difference plus `eps`.
        eps: keeps the norm away from 0.
        swap: whether the negative's distance is the smaller one of those to anchor and positive.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - anchor, positive, negative: ``(N, D)`` or ``(D,)``; output: a scalar, or ``(N,)``.

    Source: Balntas et al. 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> a, p, n = jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]), jnp.array([[1.5, 0.0]])
        >>> round(float(nn.TripletMarginLoss()(a, p, n)), 3)
        0.5
    """

    def __init__(
        self,
        margin: float = 1.0,
        p: float = 2.0,
        eps: float = 1e-6,
        swap: bool = False,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        check_margin(margin, "nn.TripletMarginLoss")
        self.margin = margin
        self.p = p
        self.eps = eps
        self.swap = swap

    def forward(self, anchor: ArrayLike, positive: ArrayLike, negative: ArrayLike) -> jax.Array:
        return F.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


class TripletMarginWithDistanceLoss(_Loss):
    """``max(0, d(anchor, positive) - d(anchor, negative) + margin)`` for any distance.

    Args:
        distance_function: d, a function or module from two arrays to one; None for
            `PairwiseDistance`, the Euclidean distance over the last axis.
        margin: by how much farther the negative should be; above 0.
        swap: whether the negative's distance is the smaller one of those to anchor and positive.
        reduction: "mean", "sum" or "none".

    Shape:
        - anchor, positive, negative: what the distance takes; output: a scalar, or what it gives.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> l1 = lambda x, y: abs(x - y).sum(-1)
        >>> loss = nn.TripletMarginWithDistanceLoss(distance_function=l1, margin=4.0)
        >>> float(loss(jnp.zeros((1, 2)), jnp.ones((1, 2)), 2.25 * jnp.ones((1, 2))))
        1.5
    """

    def __init__(
        self,
        *,
        distance_function: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        margin: float = 1.0,
        swap: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        check_margin(margin, "nn.TripletMarginWithDistanceLoss")
        self.distance_function = (
            PairwiseDistance() if distance_function is None else distance_function
        )
        self.margin = margin
        self.swap = swap

    def forward(self, anchor: ArrayLike, positive: ArrayLike, negative: ArrayLike) -> jax.Array:
        return F.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )
