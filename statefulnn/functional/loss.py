"""Losses of regression: distances between a prediction and a target, and likelihoods of counts and reals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.functional._checks import (
    array,
    concrete_on_cpu,
    reduced,
    reduction_of,
    shape_error,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._losses import absolute, require_shape, together, warn_of_broadcast


@functools.partial(compiled, static_argnums=(0, 1, 5, 6))
def _of_difference(
    function: str,
    loss_of: Callable[[Any], Any],
    input: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    reduction: str,
    divide_by_weight: bool = True,
) -> Any:
    require_shape(weight, input.shape, "weight", "element of the input", function)
    dtype, x, y, w = together(function, input=input, target=target, weight=weight)
    loss = loss_of(x - y)
    if w is not None:
        loss = loss * w
        if reduction == "mean" and divide_by_weight:
            return (jnp.sum(loss) / jnp.sum(w)).astype(dtype)
    return reduced(loss, reduction).astype(dtype)


def _square(difference: jax.Array) -> Any:
    return difference * difference


@functools.lru_cache  # one function for each number: it is part of what is compiled
def _smooth_l1_of(beta: float) -> Callable[[Any], Any]:
    def loss_of(difference: jax.Array) -> Any:
        # Inside, near is the difference and the loss is difference² / 2 beta; outside it is ±beta and the
        # loss goes on as a straight line, also in infinity.
        near = jnp.where(jnp.abs(difference) < beta, difference, beta * jnp.sign(difference))
        return near * (difference - 0.5 * near) / beta

    return loss_of


@functools.lru_cache
def _huber_of(delta: float) -> Callable[[Any], Any]:
    def loss_of(difference: jax.Array) -> Any:
        near = jnp.where(jnp.abs(difference) < delta, difference, delta * jnp.sign(difference))
        return near * (difference - 0.5 * near)

    return loss_of


def l1_loss(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: ArrayLike | None = None,
) -> jax.Array:
    """Return the absolute difference of two arrays, averaged, summed or elementwise.

    Args:
        input: any shape, floating.
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (divided by the sum of the weights, if given), "sum" or "none".
        weight: a factor for each element, of the input's shape.

    Returns:
        A scalar, or the input's shape. The derivative where both are equal is 0.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.l1_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.l1_loss(jnp.array([1.0, 4.0]), jnp.array([1.0, 1.0])))
        1.5
    """
    function = "F.l1_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    warn_of_broadcast(x, y, function)
    return _of_difference(function, absolute, x, y, w, reduction)


def mse_loss(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: ArrayLike | None = None,
) -> jax.Array:
    """Return the squared difference of two arrays, averaged, summed or elementwise.

    Args:
        input: any shape, floating.
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (divided by the sum of the weights, if given), "sum" or "none".
        weight: a factor for each element, of the input's shape.

    Returns:
        A scalar, or the input's shape.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.mse_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.mse_loss(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])))
        2.0
    """
    function = "F.mse_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    warn_of_broadcast(x, y, function)
    return _of_difference(function, _square, x, y, w, reduction)


def smooth_l1_loss(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> jax.Array:
    """Return a loss that is quadratic for differences below `beta` and linear above.

    With d the difference: ``d² / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``.

    Args:
        input: any shape, floating.
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".
        beta: where the two meet, at least 0; 0 gives `l1_loss`.

    Returns:
        A scalar, or the input's shape.

    Raises:
        RuntimeError: if `beta` is negative.
        ShapeError: if the shapes do not fit.

    Source: Girshick 2015 (Fast R-CNN); ``torch.nn.functional.smooth_l1_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.smooth_l1_loss(jnp.array([0.5, 3.0]), jnp.zeros(2), reduction="none").tolist()
        [0.125, 2.5]
    """
    function = "F.smooth_l1_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    if beta < 0:
        raise RuntimeError(
            explain(
                f"{function} was given beta={beta}",
                "beta is a distance from 0, and cannot be negative",
                "beta=1.0, or beta=0.0 for the absolute difference",
            )
        )
    x = array(input, "input", function)
    y = array(target, "target", function)
    warn_of_broadcast(x, y, function)
    loss_of = _smooth_l1_of(float(beta)) if beta else absolute
    return _of_difference(function, loss_of, x, y, None, reduction)


def huber_loss(
    input: ArrayLike,
    target: ArrayLike,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: ArrayLike | None = None,
) -> jax.Array:
    """Return a loss that is quadratic for differences up to `delta` and linear above.

    With d the difference: ``d² / 2`` where ``|d| < delta``, else ``delta (|d| - delta / 2)``.

    Args:
        input: any shape, floating.
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        reduction: "mean" (over the elements, also with weights), "sum" or "none".
        delta: where the two meet, above 0.
        weight: a factor for each element, of the input's shape.

    Returns:
        A scalar, or the input's shape.

    Raises:
        RuntimeError: if `delta` is not positive.
        ShapeError: if the shapes do not fit.

    Source: Huber 1964; ``torch.nn.functional.huber_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.huber_loss(jnp.array([1.0, 3.0]), jnp.zeros(2), reduction="none", delta=2.0).tolist()
        [0.5, 4.0]
    """
    function = "F.huber_loss"
    reduction = reduction_of(reduction, None, None, function)
    if delta <= 0:
        raise RuntimeError(
            explain(
                f"{function} was given delta={delta}",
                "delta is the distance up to which the loss is quadratic, and must be positive",
                "delta=1.0",
            )
        )
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    warn_of_broadcast(x, y, function)
    return _of_difference(function, _huber_of(float(delta)), x, y, w, reduction, False)


@functools.partial(compiled, static_argnums=(2, 3, 4, 5))
def _poisson_nll(
    input: jax.Array, target: jax.Array, log_input: bool, full: bool, eps: float, reduction: str
) -> Any:
    dtype, x, y = together("F.poisson_nll_loss", input=input, target=target)
    loss = jnp.exp(x) - y * x if log_input else x - y * jnp.log(x + eps)
    if full:
        counts = jnp.where(y <= 1, 2, y)  # a number whose logarithm has a derivative
        stirling = counts * jnp.log(counts) - counts + 0.5 * jnp.log(2 * math.pi * counts)
        loss = loss + jnp.where(y <= 1, 0, stirling)
    return reduced(loss, reduction).astype(dtype)


def poisson_nll_loss(
    input: ArrayLike,
    target: ArrayLike,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the negative log likelihood of counts under Poisson distributions.

    ``exp(input) - target · input``, or for rates ``input - target · log(input + eps)``.

    Args:
        input: the logarithms of the rates, or the rates; any shape, floating.
        target: counts, of a shape that broadcasts with it.
        log_input: whether `input` holds logarithms.
        full: whether Stirling's approximation of ``log(target!)`` is added, for targets above 1.
        size_average: deprecated, as in torch; use `reduction`.
        eps: keeps the logarithm of a rate of 0 finite.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the shape that both broadcast to.

    Raises:
        ShapeError: if the shapes do not broadcast.

    Source: ``torch.nn.functional.poisson_nll_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.poisson_nll_loss(jnp.zeros(3), jnp.array([1.0, 2.0, 3.0])))
        1.0
    """
    function = "F.poisson_nll_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    return _poisson_nll(x, y, bool(log_input), bool(full), float(eps), reduction)


@functools.partial(compiled, static_argnums=(3, 4, 5))
def _gaussian_nll(
    input: jax.Array, target: jax.Array, var: jax.Array, full: bool, eps: float, reduction: str
) -> Any:
    function = "F.gaussian_nll_loss"
    dtype, x, y = together(function, input=input, target=target)
    variance = _fitting_variance(input, var).astype(x.dtype)
    # Clamped in value only: the derivative with respect to the variance is that of a larger one.
    still = lax.stop_gradient(variance)
    variance = jnp.where(variance < eps, eps + (variance - still), variance)
    loss = 0.5 * (jnp.log(variance) + (x - y) ** 2 / variance)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return reduced(loss, reduction).astype(dtype)


def _fitting_variance(x: jax.Array, var: jax.Array) -> Any:
    if var.shape == x.shape or var.shape == ():
        return var
    if var.shape == x.shape[:-1]:
        return var[..., None]
    differing = [v for n, v in zip(x.shape, var.shape, strict=False) if n != v]
    if var.ndim == x.ndim and differing == [1]:
        return var
    raise shape_error(
        f"F.gaussian_nll_loss was given input of shape {x.shape} and var of shape {var.shape}",
        "there is one variance for each element, or one for all elements of one axis",
        f"var of shape {x.shape}, {x.shape[:-1]} or {(*x.shape[:-1], 1)}",
    )


def gaussian_nll_loss(
    input: ArrayLike,
    target: ArrayLike,
    var: ArrayLike,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> jax.Array:
    """Return the negative log likelihood of reals under normal distributions.

    ``(log v + (input - target)² / v) / 2`` with ``v = max(var, eps)``.

    Args:
        input: means, any shape, floating.
        target: of a shape that broadcasts with it.
        var: variances: of the input's shape, or without its last axis, or with one axis of size 1, or
            a number. The derivative passes the maximum as if it were not there.
        full: whether ``log(2 π) / 2`` is added.
        eps: the smallest variance.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the shape that input and target broadcast to.

    Raises:
        ValueError: if a variance is negative, where the values are at hand.
        ShapeError: if the shapes do not fit.

    Source: Nix and Weigend 1994; ``torch.nn.functional.gaussian_nll_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.gaussian_nll_loss(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.ones(2)))
        1.0
    """
    function = "F.gaussian_nll_loss"
    reduction = reduction_of(reduction, None, None, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    v = array(var, "var", function)
    values = concrete_on_cpu(v)
    if values is not None and (values < 0).any():
        raise ValueError(
            explain(
                f"{function} was given var with a negative element",
                "a variance is at least 0",
                "var=F.softplus(raw), or jnp.exp(log_var)",
            )
        )
    return _gaussian_nll(x, y, v, bool(full), float(eps), reduction)
