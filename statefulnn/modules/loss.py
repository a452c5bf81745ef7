"""Losses of regression as layers."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.errors import DtypeError, explain
from statefulnn.modules._loss import _Loss


class L1Loss(_Loss):
    """The absolute difference of two arrays, averaged, summed or elementwise.

    Args:
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - input, target: any, the same; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> float(nn.L1Loss()(jnp.array([1.0, 4.0]), jnp.array([1.0, 1.0])))
        1.5
    """

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.l1_loss(input, target, reduction=self.reduction)


class MSELoss(_Loss):
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

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.mse_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(_Loss):
    """A loss that is quadratic for differences below `beta`, and linear above with slope 1.

    Args:
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".
        beta: where the two meet, at least 0; 0 gives `L1Loss`.

    Shape:
        - input, target: any, the same; output: a scalar, or the same.

    Source: Girshick 2015 (Fast R-CNN).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.SmoothL1Loss(reduction="none")(jnp.array([0.5, 3.0]), jnp.zeros(2)).tolist()
        [0.125, 2.5]
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.beta = beta

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(_Loss):
    """A loss that is quadratic for differences up to `delta`, and linear above with slope `delta`.

    Args:
        reduction: "mean", "sum" or "none".
        delta: where the two meet, above 0.

    Shape:
        - input, target: any, the same; output: a scalar, or the same.

    Source: Huber 1964.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.HuberLoss("none", delta=2.0)(jnp.array([1.0, 3.0]), jnp.zeros(2)).tolist()
        [0.5, 4.0]
    """

    def __init__(self, reduction: str = "mean", delta: float = 1.0) -> None:
        if not isinstance(delta, (float, int)):
            raise DtypeError(
                explain(
                    f"made nn.HuberLoss with delta={delta!r}",
                    "delta must be a float or an int",
                    "nn.HuberLoss(delta=1.0)",
                )
            )
        super().__init__(reduction=reduction)
        self.delta = delta

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class PoissonNLLLoss(_Loss):
    """The negative log likelihood of counts under Poisson distributions.

    Args:
        log_input: whether the input holds the logarithms of the rates.
        full: whether Stirling's approximation of ``log(target!)`` is added, for targets above 1.
        size_average: deprecated, as in torch; use `reduction`.
        eps: keeps the logarithm of a rate of 0 finite.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Shape:
        - log_input, target: any, the same; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> float(nn.PoissonNLLLoss()(jnp.zeros(3), jnp.array([1.0, 2.0, 3.0])))
        1.0
    """

    def __init__(
        self,
        log_input: bool = True,
        full: bool = False,
        size_average: bool | None = None,
        eps: float = 1e-8,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.log_input = log_input
        self.full = full
        self.eps = eps

    def forward(self, log_input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.poisson_nll_loss(
            log_input,
            target,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
        )


class GaussianNLLLoss(_Loss):
    """The negative log likelihood of reals under normal distributions.

    Args:
        full: whether ``log(2 π) / 2`` is added.
        eps: the smallest variance.
        reduction: "mean", "sum" or "none".

    Shape:
        - input: means, any; target: of a shape that broadcasts with it.
        - var: variances: the same, or without the last axis, or with one axis of size 1, or a number.
        - output: a scalar, or the shape of input and target.

    Source: Nix and Weigend 1994.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> float(nn.GaussianNLLLoss()(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.ones(2)))
        1.0
    """

    def __init__(self, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.full = full
        self.eps = eps

    def forward(self, input: ArrayLike, target: ArrayLike, var: ArrayLike) -> jax.Array:
        return F.gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction
        )
