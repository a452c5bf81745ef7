"""Losses of yes-or-no answers: binary cross entropy, and the logistic losses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.functional._checks import (
    array,
    concrete_on_cpu,
    reduced,
    reduction_of,
    require_float,
    shape_advice,
    shape_error,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._losses import broadcast_shape, together


@jax.custom_jvp
def _entropy(x: jax.Array, y: jax.Array) -> Any:
    # Logarithms are cut at -100, so that a sure and wrong answer costs much and not infinitely much.
    yes = jnp.maximum(jnp.log(x), -100)
    no = jnp.maximum(jnp.log1p(-x), -100)
    return (y - 1) * no - y * yes


def _entropy_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    x, y = primals
    # Not the derivative of the cut logarithms: it still points back from 0 and from 1.
    of_x = (x - y) / jnp.maximum((1 - x) * x, 1e-12)
    out = _entropy(x, y)
    return out, _along(out, tangents, (of_x, jnp.log1p(-x) - jnp.log(x)))


def _along(out: jax.Array, tangents: tuple, slopes: Sequence[jax.Array]) -> Any:
    """Return the tangent of an output; a slope that is not finite may not meet a tangent of zeros."""
    moved = [
        s * t for s, t in zip(slopes, tangents, strict=True) if not isinstance(t, SymbolicZero)
    ]
    return sum(moved, jnp.zeros(out.shape, out.dtype))


_entropy.defjvp(_entropy_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _entropy_of_logits(x: jax.Array, y: jax.Array, positive: jax.Array) -> Any:
    return (1 - y) * x - ((positive - 1) * y + 1) * jax.nn.log_sigmoid(x)


def _entropy_of_logits_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # As torch has them: the chain rule's subtract infinities.
    x, y, positive = primals
    yes, no = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    of_x = (positive * y + 1 - y) * jax.nn.sigmoid(x) - positive * y
    out = _entropy_of_logits(x, y, positive)
    return out, _along(out, tangents, (of_x, no - positive * yes, -y * yes))


_entropy_of_logits.defjvp(_entropy_of_logits_jvp, symbolic_zeros=True)


@functools.partial(compiled, static_argnums=3)
def _binary_cross_entropy(
    input: jax.Array, target: jax.Array, weight: jax.Array | None, reduction: str
) -> Any:
    function = "F.binary_cross_entropy"
    _check_same_shape(input, target, weight, function)
    dtype, x, y, w = together(function, input=input, target=target, weight=weight)
    loss = _entropy(x, y)
    return reduced(loss if w is None else loss * w, reduction).astype(dtype)


def _check_same_shape(x: jax.Array, y: jax.Array, w: jax.Array | None, function: str) -> None:
    require_float(x, "input", function)
    if x.shape != y.shape:
        raise shape_error(
            f"{function} was given input of shape {x.shape} and target of shape {y.shape}",
            "each answer has one target: broadcasting them is never meant",
            shape_advice(y, "target", x.shape),
        )
    if w is not None and broadcast_shape(function, target=y, weight=w) != y.shape:
        raise shape_error(
            f"{function} was given target of shape {y.shape} and weight of shape {w.shape}",
            "the weight is broadcast to the target, not the other way round",
            f"a weight of shape {y.shape}",
        )


def binary_cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the cross entropy between probabilities and targets from 0 to 1.

    ``-(target · log input + (1 - target) · log(1 - input))``, each logarithm at least -100.

    Args:
        input: probabilities, any shape.
        target: the same shape.
        weight: a factor for each element, of a shape that broadcasts to the target's.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (over the elements, also with weights), "sum" or "none".

    Returns:
        A scalar, or the input's shape.

    Raises:
        RuntimeError: for an input outside 0 to 1, where the values are at hand.
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.binary_cross_entropy``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> round(float(F.binary_cross_entropy(jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0]))), 4)
        0.6931
    """
    function = "F.binary_cross_entropy"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    values = concrete_on_cpu(x) if x.shape == y.shape else None
    # Asked so that NaN, which is neither, is refused as well.
    if values is not None and not ((values >= 0) & (values <= 1)).all():
        raise RuntimeError(
            explain(
                f"{function} was given an input outside 0 to 1",
                "all elements of input should be between 0 and 1: they are probabilities",
                "F.binary_cross_entropy_with_logits(logits, target), or F.sigmoid(logits)",
            )
        )
    return _binary_cross_entropy(x, y, w, reduction)


@functools.partial(compiled, static_argnums=4)
def _binary_cross_entropy_with_logits(
    input: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    pos_weight: jax.Array | None,
    reduction: str,
) -> Any:
    function = "F.binary_cross_entropy_with_logits"
    _check_same_shape(input, target, None, function)
    dtype, x, y, w, positive = together(
        function, input=input, target=target, weight=weight, pos_weight=pos_weight
    )
    if positive is None:
        loss = (1 - y) * x - jax.nn.log_sigmoid(x)
    else:
        loss = _entropy_of_logits(x, y, positive)
    return reduced(loss if w is None else loss * w, reduction).astype(dtype)


def binary_cross_entropy_with_logits(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: ArrayLike | None = None,
) -> jax.Array:
    """Return the binary cross entropy of ``sigmoid(input)``, without losing digits.

    Args:
        input: logits, any shape.
        target: the same shape, from 0 to 1.
        weight: a factor for each element, of a shape that broadcasts.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (over the elements, also with weights), "sum" or "none".
        pos_weight: a factor for the positive part of the loss, of a shape that broadcasts.

    Returns:
        A scalar, or the input's shape.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> loss = F.binary_cross_entropy_with_logits(jnp.zeros(2), jnp.array([0.0, 1.0]))
        >>> round(float(loss), 4)
        0.6931
    """
    function = "F.binary_cross_entropy_with_logits"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    p = None if pos_weight is None else array(pos_weight, "pos_weight", function)
    return _binary_cross_entropy_with_logits(x, y, w, p, reduction)


@functools.partial(compiled, static_argnums=3)
def _multilabel_soft_margin(
    input: jax.Array, target: jax.Array, weight: jax.Array | None, reduction: str
) -> Any:
    function = "F.multilabel_soft_margin_loss"
    if not input.ndim:
        raise shape_error(
            f"{function} was given input of shape ()",
            "the last axis holds the labels",
            "an input of shape (N, C) or (C,)",
        )
    dtype, x, y, w = together(function, input=input, target=target, weight=weight)
    loss = -(y * jax.nn.log_sigmoid(x) + (1 - y) * jax.nn.log_sigmoid(-x))
    loss = loss if w is None else loss * w
    return reduced(jnp.sum(loss, -1) / input.shape[-1], reduction).astype(dtype)


def multilabel_soft_margin_loss(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the binary cross entropy of logits, averaged over the last axis.

    Args:
        input: logits, ``(N, C)`` or any shape with an axis of labels at the end.
        target: 0 or 1 for each label, of a shape that broadcasts with it.
        weight: a factor for each label, ``(C,)``, or of a shape that broadcasts.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none": over the axes before the last.

    Returns:
        A scalar, or the input's shape without its last axis.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.multilabel_soft_margin_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> loss = F.multilabel_soft_margin_loss(jnp.zeros((2, 3)), jnp.ones((2, 3)))
        >>> round(float(loss), 4)
        0.6931
    """
    function = "F.multilabel_soft_margin_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    return _multilabel_soft_margin(x, y, w, reduction)


@functools.partial(compiled, static_argnums=2)
def _soft_margin(input: jax.Array, target: jax.Array, reduction: str) -> Any:
    dtype, x, y = together("F.soft_margin_loss", input=input, target=target)
    return reduced(-jax.nn.log_sigmoid(x * y), reduction).astype(dtype)


def soft_margin_loss(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the logistic loss ``log(1 + exp(-target · input))``.

    Computed so that it does not overflow: torch's is infinite from 89 on in float32.

    Args:
        input: scores, any shape.
        target: 1 or -1, of a shape that broadcasts with it.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the shape that both broadcast to.

    Raises:
        ShapeError: if the shapes do not broadcast.

    Source: ``torch.nn.functional.soft_margin_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> round(float(F.soft_margin_loss(jnp.array([2.0]), jnp.array([1.0]))), 4)
        0.1269
    """
    function = "F.soft_margin_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    return _soft_margin(x, y, reduction)
