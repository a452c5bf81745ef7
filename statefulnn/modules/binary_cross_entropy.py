"""Losses of yes-or-no answers as layers."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.modules._loss import _Loss, _WeightedLoss


class BCELoss(_WeightedLoss):
    """The cross entropy between probabilities and targets from 0 to 1.

    Args:
        weight: a factor for each element, of a shape that broadcasts to the target's; kept as a buffer.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (over the elements, also with weights), "sum" or "none".

    Shape:
        - input, target: any, the same; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> round(float(nn.BCELoss()(jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0]))), 4)
        0.6931
    """

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(_Loss):
    """The binary cross entropy of ``sigmoid(input)``, without losing digits.

    Args:
        weight: a factor for each element, of a shape that broadcasts; kept as a buffer.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (over the elements, also with weights), "sum" or "none".
        pos_weight: a factor for the positive part of the loss, of a shape that broadcasts; kept as a
            buffer.

    Shape:
        - input: logits, any; target: the same; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> round(float(nn.BCEWithLogitsLoss()(jnp.zeros(2), jnp.array([0.0, 1.0]))), 4)
        0.6931
    """

    def __init__(
        self,
        weight: ArrayLike | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: ArrayLike | None = None,
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self._register_weight("weight", weight)
        self._register_weight("pos_weight", pos_weight)

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
        )


class MultiLabelSoftMarginLoss(_WeightedLoss):
    """The binary cross entropy of logits, averaged over the last axis.

    Args:
        weight: a factor for each label, ``(C,)``; kept as a buffer.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none": over the axes before the last.

    Shape:
        - input: logits, ``(N, C)``; target: the same, 0 or 1; output: a scalar, or ``(N,)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> round(float(nn.MultiLabelSoftMarginLoss()(jnp.zeros((2, 3)), jnp.ones((2, 3)))), 4)
        0.6931
    """

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.multilabel_soft_margin_loss(
            input, target, weight=self.weight, reduction=self.reduction
        )


class SoftMarginLoss(_Loss):
    """The logistic loss ``log(1 + exp(-target · input))``.

    Args:
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - input: scores, any; target: the same, 1 or -1; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> round(float(nn.SoftMarginLoss()(jnp.array([2.0]), jnp.array([1.0]))), 4)
        0.1269
    """

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.soft_margin_loss(input, target, reduction=self.reduction)
