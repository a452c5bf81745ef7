"""Losses as layers."""

from __future__ import annotations

from typing import Any

from statefulnn import functional as F
from statefulnn.core.module import Module
from statefulnn.functional._checks import array, reduction_of


class CrossEntropyLoss(Module):
    """The cross entropy between logits and classes or class probabilities.

    Args:
        weight: a factor for each class, ``(C,)``; kept as a buffer.
        size_average: deprecated, as in torch; use `reduction`.
        ignore_index: a target that is left out, for class numbers.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (for class numbers, weighted by `weight`), "sum" or "none".
        label_smoothing: the share of the target that is spread evenly over all classes.

    Shape:
        - input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``.
        - target: class numbers, ``()``, ``(N,)`` or ``(N, d1, ..., dK)``; or probabilities of the
          input's shape.
        - output: a scalar, or the shape of class numbers.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> loss = nn.CrossEntropyLoss(reduction="sum")
        >>> round(float(loss(jnp.zeros((2, 4)), jnp.array([1, 3]))), 3)
        2.773
    """

    def __init__(
        self,
        weight: Any = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None:
            weight = array(weight, "weight", "nn.CrossEntropyLoss")
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction_of(reduction, size_average, reduce, "nn.CrossEntropyLoss")
        self.label_smoothing = label_smoothing

    def forward(self, input: Any, target: Any) -> Any:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(Module):
    """The squared difference of two arrays, averaged, summed or elementwise.

    Args:
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - input, target: any, the same; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> float(nn.MSELoss()(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])))
        2.0
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.reduction = reduction_of(reduction, size_average, reduce, "nn.MSELoss")

    def forward(self, input: Any, target: Any) -> Any:
        return F.mse_loss(input, target, reduction=self.reduction)
