"""Losses with a margin: of one score against another, and of scores against classes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import (
    array,
    concrete_on_cpu,
    reduced,
    reduction_of,
    require_float,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._losses import hinge, together
from statefulnn.functional.cross_entropy import check_classes, picked


@functools.partial(compiled, static_argnums=(3, 4))
def _margin_ranking(
    input1: jax.Array, input2: jax.Array, target: jax.Array, margin: float, reduction: str
) -> Any:
    function = "F.margin_ranking_loss"
    if not input1.ndim == input2.ndim == target.ndim:
        raise shape_error(
            f"{function} was given inputs of shapes {input1.shape} and {input2.shape}, and target of "
            f"shape {target.shape}",
            "all three need the same number of dimensions",
            "jnp.atleast_2d(x) of each, or x[None] of one that has an axis less",
        )
    dtype, a, b, y = together(function, input1=input1, input2=input2, target=target)
    return reduced(hinge(-y * (a - b) + margin), reduction).astype(dtype)


def margin_ranking_loss(
    input1: ArrayLike,
    input2: ArrayLike,
    target: ArrayLike,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return ``max(0, -target · (input1 - input2) + margin)``.

    Args:
        input1: scores, any shape.
        input2: scores to compare with, of a shape that broadcasts with it.
        target: 1 where the first should be higher, -1 where the second should.
        margin: by how much.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the shape that all broadcast to.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.margin_ranking_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.margin_ranking_loss(jnp.zeros(2), jnp.ones(2), jnp.array([1.0, -1.0])))
        0.5
    """
    function = "F.margin_ranking_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    a = array(input1, "input1", function)
    b = array(input2, "input2", function)
    y = array(target, "target", function)
    return _margin_ranking(a, b, y, float(margin), reduction)


@functools.partial(compiled, static_argnums=(2, 3))
def _hinge_embedding(input: jax.Array, target: jax.Array, margin: float, reduction: str) -> Any:
    dtype, x, y = together("F.hinge_embedding_loss", input=input, target=target)
    # A target that is neither 1 nor -1 counts as both, as in torch.
    loss = jnp.where(y != 1, hinge(margin - x), 0) + jnp.where(y != -1, x, 0)
    return reduced(loss, reduction).astype(dtype)


def hinge_embedding_loss(
    input: ArrayLike,
    target: ArrayLike,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the distance where the target is 1, and ``max(0, margin - input)`` where it is -1.

    Args:
        input: distances, any shape.
        target: 1 for similar pairs and -1 for others, of a shape that broadcasts with it.
        margin: how far apart others should be.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the shape that both broadcast to.

    Raises:
        ShapeError: if the shapes do not broadcast.

    Source: ``torch.nn.functional.hinge_embedding_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> distances, target = jnp.array([0.5, 0.5]), jnp.array([1, -1])
        >>> F.hinge_embedding_loss(distances, target, margin=2.0, reduction="none").tolist()
        [0.5, 1.5]
    """
    function = "F.hinge_embedding_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    return _hinge_embedding(x, y, float(margin), reduction)


@functools.partial(compiled, static_argnums=(3, 4))
def _cosine_embedding(
    input1: jax.Array, input2: jax.Array, target: jax.Array, margin: float, reduction: str
) -> Any:
    function = "F.cosine_embedding_loss"
    rank = target.ndim + 1
    if target.ndim > 1 or input1.ndim != rank or input2.ndim != rank:
        raise shape_error(
            f"{function} was given inputs of shapes {input1.shape} and {input2.shape}, and target of "
            f"shape {target.shape}",
            "one target belongs to one pair of vectors: (N,) to (N, D), or () to (D,)",
            "drop other axes, or reshape the vectors to (-1, D)",
        )
    dtype, a, b = together(function, input1=input1, input2=input2)
    eps = 1e-12
    product = jnp.sum(a * b, -1)
    cosine = product / jnp.sqrt((jnp.sum(a * a, -1) + eps) * (jnp.sum(b * b, -1) + eps))
    if target.ndim and target.shape[0] not in (1, *cosine.shape) and cosine.shape[0] != 1:
        raise shape_error(
            f"{function} was given {cosine.shape[0]} pairs and target of shape {target.shape}",
            "one target belongs to one pair of vectors",
            f"a target of shape {cosine.shape}",
        )
    loss = jnp.where(target == 1, 1 - cosine, 0)
    loss = loss + jnp.where(target == -1, hinge(cosine - margin), 0)
    return reduced(loss, reduction).astype(dtype)


def cosine_embedding_loss(
    input1: ArrayLike,
    input2: ArrayLike,
    target: ArrayLike,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return ``1 - cos`` where the target is 1, and ``max(0, cos - margin)`` where it is -1.

    Args:
        input1: vectors, ``(N, D)`` or ``(D,)``.
        input2: the vectors to compare with, likewise.
        target: ``(N,)`` or ``()``: 1 for similar pairs and -1 for others.
        margin: the cosine up to which others cost nothing, from -1 to 1.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the target's shape.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.cosine_embedding_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> a, b = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> F.cosine_embedding_loss(a, b, jnp.array([1, -1]), reduction="none").tolist()
        [1.0, 1.0]
    """
    function = "F.cosine_embedding_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    a = array(input1, "input1", function)
    b = array(input2, "input2", function)
    y = array(target, "target", function)
    return _cosine_embedding(a, b, y, float(margin), reduction)


def _check_scores(x: jax.Array, function: str) -> None:
    require_float(x, "input", function)
    if x.ndim > 2 or (x.ndim and not x.shape[-1]):
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            "it holds the scores of at least one class, for one example or for several",
            "an input of shape (N, C) or (C,)",
        )


def _check_integers(y: jax.Array, function: str) -> None:
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"{function} was given target of dtype {y.dtype}",
                "it holds class numbers, which are integers",
                "cast it first: target.astype(jnp.int32)",
            )
        )


@functools.partial(compiled, static_argnums=(2, 3, 5))
def _multi_margin(
    input: jax.Array,
    target: jax.Array,
    p: int,
    margin: float,
    weight: jax.Array | None,
    reduction: str,
) -> Any:
    function = "F.multi_margin_loss"
    _check_scores(input, function)
    x = widened(input.reshape(-1, input.shape[-1] if input.ndim else 1))  # (N, C)
    examples, classes = x.shape
    if target.ndim > 1 or target.size != examples:
        raise shape_error(
            f"{function} was given input of shape {input.shape} and target of shape {target.shape}",
            f"each of {examples} examples has one class",
            f"a target of shape {input.shape[:-1]}",
        )
    _check_integers(target, function)
    if weight is not None and weight.shape != (classes,):
        raise shape_error(
            f"{function} was given input of shape {input.shape} and weight of shape {weight.shape}",
            f"there are {classes} classes, and each needs a weight",
            f"a weight of shape ({classes},)",
        )
    # A class that does not exist makes the loss NaN; a negative one must not count from the end.
    label = target.reshape(-1).astype(jnp.int32)
    label = jnp.where(label < 0, classes, label)
    score = picked(x, label, 1)
    gap = margin - score[:, None] + x
    others = jnp.arange(classes, dtype=jnp.int32) != label[:, None]
    # Derivative 0 at the corner, and what is not a number leaves the sum: both as in torch.
    gap = jnp.where((gap > 0) & others, gap, 0)
    loss = jnp.sum(gap if p == 1 else gap * gap, 1) / classes
    if weight is not None:
        loss = loss * jnp.take(weight.astype(x.dtype), label, mode="fill", fill_value=jnp.nan)
    loss = jnp.where(label < classes, loss, jnp.nan)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return reduced(loss, reduction).astype(input.dtype)


def multi_margin_loss(
    input: ArrayLike,
    target: ArrayLike,
    p: int = 1,
    margin: float = 1.0,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the hinge loss of several classes.

    With y the target: the sum over ``i != y`` of ``max(0, margin - input[y] + input[i])^p``, over C.

    Args:
        input: scores, ``(N, C)`` or ``(C,)``.
        target: class numbers, ``(N,)`` or ``()``.
        p: 1 or 2.
        margin: by how much the target's score should be higher.
        weight: a factor for each class of target, ``(C,)``.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (over the examples, also with weights), "sum" or "none".

    Returns:
        A scalar, or the target's shape. Inside compiled code, and on devices where looking would
        stall, a class that does not exist gives NaN.

    Raises:
        ValueError: for another `p`.
        RuntimeError: for a class that does not exist, where the values are at hand.
        ShapeError: if the shapes do not fit.

    Source: Crammer and Singer 2001; ``torch.nn.functional.multi_margin_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.multi_margin_loss(jnp.array([[0.5, 0.0]]), jnp.array([0])))
        0.25
    """
    function = "F.multi_margin_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    check_p(p, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    if w is not None and w.ndim != 1:
        raise shape_error(
            f"{function} was given weight of shape {w.shape}",
            "weight must be one-dimensional: one factor for each class",
            "weight.reshape(-1)",
        )
    check_classes(x, y, None, function, RuntimeError)
    return _multi_margin(x, y, int(p), float(margin), w, reduction)


def check_p(p: float, function: str) -> None:
    """Raise unless p is 1 or 2."""
    if p != 1 and p != 2:
        raise ValueError(
            explain(f"{function} was given p={p}", "only p == 1 and p == 2 are supported", "p=1")
        )


@functools.partial(compiled, static_argnums=2)
def _multilabel_margin(input: jax.Array, target: jax.Array, reduction: str) -> Any:
    function = "F.multilabel_margin_loss"
    _check_scores(input, function)
    if target.shape != input.shape:
        raise shape_error(
            f"{function} was given input of shape {input.shape} and target of shape {target.shape}",
            "the target lists the labels of each example, filled up with -1 to the number of classes",
            f"a target of shape {input.shape}",
        )
    _check_integers(target, function)
    x = widened(input.reshape(-1, input.shape[-1] if input.ndim else 1))  # (N, C)
    label = target.reshape(x.shape).astype(jnp.int32)
    classes = x.shape[1]
    listed = jnp.cumsum(label < 0, 1, dtype=jnp.int32) == 0  # before the first -1: (N, T)
    label = jnp.where(listed, label, classes)
    # (N, T, C) is compared and summed in one go, and not kept.
    belongs = jnp.any(label[:, :, None] == jnp.arange(classes, dtype=jnp.int32), 1)  # (N, C)
    score = jnp.take_along_axis(x, jnp.minimum(label, classes - 1), 1)  # (N, T)
    gap = 1 - score[:, :, None] + x[:, None, :]
    counted = listed[:, :, None] & ~belongs[:, None, :] & (gap > 0)
    loss = jnp.sum(jnp.where(counted, gap, 0), (1, 2)) / classes
    wrong = jnp.any(listed & (label >= classes), 1)
    loss = jnp.where(wrong, jnp.nan, loss)
    if reduction == "none":
        loss = loss.reshape(input.shape[:-1])
    return reduced(loss, reduction).astype(input.dtype)


def multilabel_margin_loss(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the hinge loss between each label of an example and each class that is none.

    The sum over labels j and other classes i of ``max(0, 1 - input[j] + input[i])``, over C.

    Args:
        input: scores, ``(N, C)`` or ``(C,)``.
        target: the labels of each example and then -1, of the input's shape; what comes after the
            first -1 is not read.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none": over the examples.

    Returns:
        A scalar, or ``(N,)``. Inside compiled code, and on devices where looking would stall, a class
        that does not exist gives NaN.

    Raises:
        RuntimeError: for a class that does not exist, where the values are at hand.
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.multilabel_margin_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> scores, labels = jnp.array([0.5, 0.0, 1.0, 0.0]), jnp.array([2, 0, -1, 0])
        >>> float(F.multilabel_margin_loss(scores, labels))
        0.25
    """
    function = "F.multilabel_margin_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    values = concrete_on_cpu(y) if y.shape == x.shape else None
    classes = x.shape[-1] if x.ndim else 1
    if values is not None and values.size and not -1 <= values.min() <= values.max() < classes:
        raise RuntimeError(
            explain(
                f"{function} was given a target from {values.min()} to {values.max()}",
                f"there are {classes} classes, numbered from 0, and -1 ends the list of labels",
                "one score for each class",
            )
        )
    return _multilabel_margin(x, y, reduction)
