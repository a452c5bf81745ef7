"""Losses."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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

# --------------------------------------------------------------------------------------------------
# Cross entropy


def _log_probabilities(logits: Any, axis: int) -> Any:
    shifted = logits - lax.stop_gradient(jnp.max(logits, axis, keepdims=True))
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis, keepdims=True))


def _class_weights(weight: Any, logits: Any, axis: int) -> Any:
    shape = [1] * logits.ndim
    shape[axis] = -1
    return weight.astype(logits.dtype).reshape(shape)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _cross_entropy_indices(
    logits: Any,
    target: Any,
    weight: Any,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> Any:
    dtype = logits.dtype
    axis = 0 if logits.ndim == 1 else 1
    logits = widened(logits)
    log_probs = _log_probabilities(logits, axis)
    ignored = target == ignore_index
    classes = logits.shape[axis]
    # A class that does not exist makes the loss NaN; a negative one must not count from the end.
    label = jnp.where(ignored, 0, target.astype(jnp.int32))
    label = jnp.where(label < 0, classes, label)
    picked = jnp.take_along_axis(
        log_probs, jnp.expand_dims(label, axis), axis, mode="fill", fill_value=jnp.nan
    )
    zero = jnp.zeros((), logits.dtype)
    loss = -jnp.squeeze(picked, axis)
    share = jnp.ones((), logits.dtype)
    if weight is not None:
        share = jnp.take(weight.astype(logits.dtype), label, mode="fill", fill_value=jnp.nan)
    share = jnp.where(ignored, zero, share)
    loss = jnp.where(ignored, zero, loss * share)
    if smoothing:
        weighted = log_probs if weight is None else log_probs * _class_weights(weight, logits, axis)
        smooth = jnp.where(ignored, zero, -jnp.sum(weighted, axis) / classes)
        loss = (1 - smoothing) * loss + smoothing * smooth
    if reduction == "mean":
        return (jnp.sum(loss) / jnp.sum(share)).astype(dtype)
    return (jnp.sum(loss) if reduction == "sum" else loss).astype(dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _cross_entropy_probabilities(
    logits: Any, target: Any, weight: Any, reduction: str, smoothing: float
) -> Any:
    axis = 0 if logits.ndim == 1 else 1
    dtype = logits.dtype
    logits = widened(logits)
    log_probs = _log_probabilities(logits, axis)
    target = target.astype(logits.dtype)
    if smoothing:
        target = target * (1 - smoothing) + smoothing / logits.shape[axis]
    terms = log_probs * target
    if weight is not None:
        terms = terms * _class_weights(weight, logits, axis)
    loss = -jnp.sum(terms, axis)
    return reduced(loss, reduction).astype(dtype)


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Return the cross entropy between logits and classes or class probabilities.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``.
        target: class numbers, ``()``, ``(N,)`` or ``(N, d1, ..., dK)``; or probabilities, floating and
            of the input's shape.
        weight: a factor for each class, ``(C,)``.
        size_average: deprecated, as in torch; use `reduction`.
        ignore_index: a target that is left out, for class numbers.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (for class numbers, weighted by `weight`), "sum" or "none".
        label_smoothing: the share of the target that is spread evenly over all classes.

    Returns:
        A scalar, or one loss for each target. The mean over no targets is NaN. Inside compiled code,
        and on devices where looking would stall, a class that does not exist gives NaN.

    Raises:
        IndexError: for a class that does not exist, where the values are at hand.
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes do not fit.

    Source: ``torch.nn.functional.cross_entropy``; smoothing from Szegedy et al. 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0]])
        >>> round(float(F.cross_entropy(logits, jnp.array([0, 1]))), 4)
        0.1269
    """
    function = "F.cross_entropy"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    w = None if weight is None else array(weight, "weight", function)
    require_float(x, "input", function)
    if x.ndim == 0:
        raise shape_error(
            f"{function} was given input of shape ()",
            "there is one logit for each class",
            "logits of shape (C,), (N, C) or (N, C, d1, ..., dK)",
        )
    classes = x.shape[0 if x.ndim == 1 else 1]
    if w is not None and w.shape != (classes,):
        raise shape_error(
            f"{function} was given input of shape {x.shape} and weight of shape {w.shape}",
            f"there are {classes} classes, and each needs a weight",
            f"a weight of shape ({classes},)",
        )
    if w is not None and w.dtype != x.dtype:
        raise DtypeError(
            explain(
                f"{function} was given input of dtype {x.dtype} and weight of dtype {w.dtype}",
                "mixed dtypes are not promoted",
                "cast one of them: weight.astype(input.dtype)",
            )
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(
            explain(
                f"{function} was given label_smoothing={label_smoothing}",
                "label_smoothing must be between 0.0 and 1.0",
                "label_smoothing=0.1",
            )
        )
    if y.shape == x.shape:
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise DtypeError(
                explain(
                    f"{function} was given input and target of shape {x.shape}, the target of "
                    f"dtype {y.dtype}",
                    "a target of the input's shape holds class probabilities, which are floating",
                    f"target.astype(input.dtype); or class numbers of shape {_target_shape(x)}",
                )
            )
        if ignore_index >= 0:
            raise RuntimeError(
                explain(
                    f"{function} was given class probabilities and ignore_index={ignore_index}",
                    "a class can be ignored only where the target holds class numbers",
                    "leave ignore_index out",
                )
            )
        dtype = jnp.promote_types(x.dtype, y.dtype)
        return _cross_entropy_probabilities(
            x.astype(dtype), y, w, reduction, float(label_smoothing)
        )
    if y.shape != _target_shape(x):
        raise shape_error(
            f"{function} was given input of shape {x.shape} and target of shape {y.shape}",
            f"class numbers for that input have shape {_target_shape(x)}, and probabilities "
            f"{x.shape}",
            "put the classes on axis 1 of the input, and drop other axes of the target",
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"{function} was given input of shape {x.shape} and target of shape {y.shape} and "
                f"dtype {y.dtype}",
                "a target of that shape holds class numbers, which are integers",
                f"target.astype(jnp.int32); or probabilities of shape {x.shape}",
            )
        )
    _check_classes(y, classes, ignore_index)
    return _cross_entropy_indices(x, y, w, ignore_index, reduction, float(label_smoothing))


def _target_shape(x: Any) -> tuple[int, ...]:
    return () if x.ndim == 1 else (x.shape[0], *x.shape[2:])


def _check_classes(target: Any, classes: int, ignore_index: int) -> None:
    values = concrete_on_cpu(target)
    if values is None or not values.size:
        return
    if values.min() >= 0 and values.max() < classes:
        return
    wrong = values[((values < 0) | (values >= classes)) & (values != ignore_index)]
    if wrong.size:
        raise IndexError(
            explain(
                f"F.cross_entropy was given target {int(wrong.flat[0])}",
                f"Target {int(wrong.flat[0])} is out of bounds: there are {classes} classes, "
                "numbered from 0",
                "one logit for each class; or ignore_index for targets to leave out",
            )
        )


# --------------------------------------------------------------------------------------------------
# Mean squared error


@functools.partial(jax.jit, static_argnums=3)
def _mse_loss(x: Any, y: Any, weight: Any, reduction: str) -> Any:
    dtype = jnp.promote_types(x.dtype, y.dtype)
    difference = widened(x.astype(dtype)) - widened(y.astype(dtype))
    loss = difference * difference
    if weight is not None:
        weight = weight.astype(loss.dtype)
        loss = loss * weight
        if reduction == "mean":
            return (jnp.sum(loss) / jnp.sum(weight)).astype(dtype)
    return reduced(loss, reduction).astype(dtype)


def mse_loss(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    """Return the squared difference of two arrays, averaged, summed or elementwise.

    Args:
        input: any shape, floating.
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (divided by the sum of the weights, if given), "sum" or "none".
        weight: a factor for each element, of the input's shape.

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
    if not jnp.issubdtype(jnp.promote_types(x.dtype, y.dtype), jnp.inexact):
        require_float(x, "input", function)
    if x.shape != y.shape:
        try:
            shape = jnp.broadcast_shapes(x.shape, y.shape)
        except ValueError:
            raise shape_error(
                f"{function} was given input of shape {x.shape} and target of shape {y.shape}",
                "they are subtracted element by element",
                "reshape one of them to the shape of the other",
            ) from None
        warnings.warn(
            f"{function} was given input of shape {x.shape} and target of shape {y.shape}, and "
            f"broadcasts both to {shape}: every element meets several others, which is seldom meant; "
            "reshape one of them to the shape of the other",
            UserWarning,
            stacklevel=2,
        )
    if w is not None and w.shape != x.shape:
        raise shape_error(
            f"{function} was given input of shape {x.shape} and weight of shape {w.shape}",
            "there is one weight for each element",
            "jnp.broadcast_to(weight, input.shape)",
        )
    return _mse_loss(x, y, w, reduction)
