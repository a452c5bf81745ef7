"""Cross entropy and negative log likelihood."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import DtypeError, ShapeError, explain
from statefulnn.core.refusals import to_shape
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
from statefulnn.functional._losses import together

# --------------------------------------------------------------------------------------------------
# What class numbers and class weights have in common


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def log_sum_exp(x: jax.Array, shift: jax.Array, axis: int) -> jax.Array:
    """Return ``log Σ exp(x - shift)`` along an axis, with the softmax as its derivative.

    The rule computes the softmax from `x` again: the exponentials need not be kept for it, which for a
    language model's logits is the larger part of the memory.
    """
    return jnp.log(jnp.sum(jnp.exp(x - shift), axis))


@log_sum_exp.defjvp
def _log_sum_exp_jvp(axis: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    x, shift = primals
    out = log_sum_exp(x, shift, axis)
    share = jnp.exp(x - shift - jnp.expand_dims(out, axis))
    # The shift is a constant: the maximum, with no derivative.
    return out, jnp.sum(share * tangents[0], axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def picked(x: jax.Array, label: jax.Array, axis: int) -> jax.Array:
    """Return the entry at each label along an axis, NaN where there is none.

    The derivative is a choice between the cotangent and 0 at each entry, which fuses with what comes
    next; that of a gather is a scatter into an array of zeros as large as the input.
    """
    values = jnp.take_along_axis(
        x, jnp.expand_dims(label, axis), axis, mode="fill", fill_value=jnp.nan
    )
    return jnp.squeeze(values, axis)


@picked.defjvp
def _picked_jvp(axis: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    x, label = primals
    classes = lax.broadcasted_iota(label.dtype, x.shape, axis % x.ndim)
    here = classes == jnp.expand_dims(label, axis)
    return picked(x, label, axis), jnp.sum(jnp.where(here, tangents[0], 0), axis)


def labels_of(target: jax.Array, ignore_index: int, classes: int) -> tuple[Any, Any]:
    """Return class numbers to look up, and where they are ignored.

    A class that does not exist makes the loss NaN; a negative one must not count from the end.
    """
    ignored = target == ignore_index
    label = jnp.where(ignored, 0, target.astype(jnp.int32))
    return jnp.where(label < 0, classes, label), ignored


def shares_of(
    label: jax.Array, ignored: jax.Array, weight: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
    """Return the weight of each label, 0 where it is ignored."""
    share = jnp.ones((), dtype)
    if weight is not None:
        share = jnp.take(weight.astype(dtype), label, mode="fill", fill_value=jnp.nan)
    return jnp.where(ignored, jnp.zeros((), dtype), share)


def weighted(loss: jax.Array, share: jax.Array, reduction: str) -> jax.Array:
    """Reduce losses that are weighted already; the mean is over the weights."""
    if reduction == "mean":
        return jnp.sum(loss) / jnp.sum(share)
    return jnp.sum(loss) if reduction == "sum" else loss


def _class_weights(weight: jax.Array, logits: jax.Array, axis: int) -> Any:
    shape = [1] * logits.ndim
    shape[axis] = -1
    return weight.astype(logits.dtype).reshape(shape)


def _class_axis(x: jax.Array) -> int:
    return 0 if x.ndim == 1 else 1


def _target_shape(x: jax.Array) -> tuple[int, ...]:
    return () if x.ndim == 1 else (x.shape[0], *x.shape[2:])


def _check_logits_and_weight(x: jax.Array, w: jax.Array | None, function: str) -> None:
    require_float(x, "input", function)
    if x.ndim == 0:
        raise shape_error(
            f"{function} was given input of shape ()",
            "there is one entry for each class",
            "an input of shape (C,), (N, C) or (N, C, d1, ..., dK)",
        )
    classes = x.shape[_class_axis(x)]
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


def _check_order(x: jax.Array, y: jax.Array, function: str) -> None:
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.issubdtype(y.dtype, jnp.floating):
        raise DtypeError(
            explain(
                f"{function} was given input of dtype {x.dtype} and target of dtype {y.dtype}",
                "the input holds the model's outputs, and the target what they should be",
                f"{function}(logits, targets)",
            )
        )


def _check_target(x: jax.Array, y: jax.Array, function: str) -> None:
    if y.shape != _target_shape(x):
        raise _target_of_other_shape(x, y, function)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"{function} was given input of shape {x.shape} and target of shape {y.shape} and "
                f"dtype {y.dtype}",
                "a target of that shape holds class numbers, which are integers",
                f"target.astype(jnp.int32); or probabilities of shape {x.shape}",
            )
        )


def _target_of_other_shape(x: jax.Array, y: jax.Array, function: str) -> ShapeError:
    shape, both = _target_shape(x), function == "F.cross_entropy"
    probabilities = f", and probabilities {x.shape}" if both else ""
    instead = f"a target of shape {shape}, with the classes on axis 1 of the input"
    if y.shape == x.shape:
        instead = f"target.argmax({_class_axis(x)}) of one-hot targets"
    elif y.ndim > 1 and y.shape == x.shape[:-1]:
        instead = f"{function}(jnp.moveaxis(input, -1, 1), target)"
    elif (code := to_shape("target", y.shape, shape)) is not None:
        instead = code
    return shape_error(
        f"{function} was given input of shape {x.shape} and target of shape {y.shape}",
        f"class numbers for that input have shape {shape}{probabilities}",
        instead,
    )


def check_classes(
    x: jax.Array,
    target: jax.Array,
    ignore_index: int | None,
    function: str,
    error: type[Exception] = IndexError,
    classes: int | None = None,
) -> None:
    """Raise if a target is no class, where looking at the values costs no transfer.

    Called before the computation starts: beside it the look would have to wait for the processor. What
    has not the shape or the dtype of class numbers is left to the checks of the kernel.
    """
    values = concrete_on_cpu(target)
    if values is None or not values.size or values.dtype.kind not in "iu" or not x.ndim:
        return
    classes = x.shape[_class_axis(x)] if classes is None else classes
    if values.min() >= 0 and values.max() < classes:
        return
    wrong = values[((values < 0) | (values >= classes)) & (values != ignore_index)]
    if wrong.size:
        raise error(
            explain(
                f"{function} was given target {int(wrong.flat[0])}",
                f"Target {int(wrong.flat[0])} is out of bounds: there are {classes} classes, "
                "numbered from 0",
                "one entry of the input for each class"
                + ("" if ignore_index is None else "; or ignore_index for targets to leave out"),
            )
        )


# --------------------------------------------------------------------------------------------------
# Cross entropy


@functools.partial(compiled, static_argnums=(3, 4, 5))
def _cross_entropy_indices(
    input: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> Any:
    function = "F.cross_entropy"
    _check_logits_and_weight(input, weight, function)
    _check_target(input, target, function)
    axis = _class_axis(input)
    logits = widened(input)
    loss, share = losses_of_classes(logits, target, weight, ignore_index, smoothing, axis)
    return weighted(loss, share, reduction).astype(input.dtype)


def losses_of_classes(
    logits: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    ignore_index: int,
    smoothing: float,
    axis: int,
) -> tuple[Any, Any]:
    """Return the weighted cross entropy of each target, and its weight."""
    classes = logits.shape[axis]
    label, ignored = labels_of(target, ignore_index, classes)
    share = shares_of(label, ignored, weight, logits.dtype)
    shift = lax.stop_gradient(jnp.max(logits, axis, keepdims=True, initial=-jnp.inf))
    normaliser = log_sum_exp(logits, shift, axis)
    # Relative to the maximum, as the sum is: the difference of two large numbers would lose digits.
    loss = (normaliser - (picked(logits, label, axis) - jnp.squeeze(shift, axis))) * share
    zero = jnp.zeros((), logits.dtype)
    loss = jnp.where(ignored, zero, loss)
    if smoothing:
        below = logits - shift
        total = classes
        if weight is not None:
            below = below * _class_weights(weight, logits, axis)
            total = jnp.sum(weight.astype(logits.dtype))
        smooth = (normaliser * total - jnp.sum(below, axis)) / classes
        loss = (1 - smoothing) * loss + smoothing * jnp.where(ignored, zero, smooth)
    return loss, jnp.broadcast_to(share, loss.shape)


@functools.partial(compiled, static_argnums=(3, 4))
def _cross_entropy_probabilities(
    input: jax.Array, target: jax.Array, weight: jax.Array | None, reduction: str, smoothing: float
) -> Any:
    function = "F.cross_entropy"
    _check_logits_and_weight(input, weight, function)
    dtype, logits, target = together(function, input=input, target=target)
    axis = _class_axis(input)
    shift = lax.stop_gradient(jnp.max(logits, axis, keepdims=True, initial=-jnp.inf))
    normaliser = jnp.expand_dims(log_sum_exp(logits, shift, axis), axis)
    log_probs = logits - shift - normaliser
    if smoothing:
        target = target * (1 - smoothing) + smoothing / logits.shape[axis]
    terms = log_probs * target
    if weight is not None:
        terms = terms * _class_weights(weight, logits, axis)
    loss = -jnp.sum(terms, axis)
    return reduced(loss, reduction).astype(dtype)


def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> jax.Array:
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
    _check_order(x, y, function)
    w = None if weight is None else array(weight, "weight", function)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(
            explain(
                f"{function} was given label_smoothing={label_smoothing}",
                "label_smoothing must be between 0.0 and 1.0",
                "label_smoothing=0.1",
            )
        )
    smoothing = float(label_smoothing)
    if y.shape == x.shape and x.ndim:
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise DtypeError(
                explain(
                    f"{function} was given input and target of shape {x.shape}, the target of "
                    f"dtype {y.dtype}",
                    "a target of the input's shape holds class probabilities, which are floating",
                    f"target.astype(input.dtype); or class numbers, target.argmax({_class_axis(x)})",
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
        return _cross_entropy_probabilities(x, y, w, reduction, smoothing)
    check_classes(x, y, ignore_index, function)
    return _cross_entropy_indices(x, y, w, ignore_index, reduction, smoothing)


# --------------------------------------------------------------------------------------------------
# Negative log likelihood


@functools.partial(compiled, static_argnums=(3, 4))
def _nll(
    input: jax.Array, target: jax.Array, weight: jax.Array | None, ignore_index: int, reduction: str
) -> Any:
    function = "F.nll_loss"
    _check_logits_and_weight(input, weight, function)
    _check_target(input, target, function)
    axis = _class_axis(input)
    x = widened(input)
    label, ignored = labels_of(target, ignore_index, x.shape[axis])
    share = shares_of(label, ignored, weight, x.dtype)
    zero = jnp.zeros((), x.dtype)
    loss = jnp.where(ignored, zero, -picked(x, label, axis) * share)
    return weighted(loss, jnp.broadcast_to(share, loss.shape), reduction).astype(input.dtype)


def nll_loss(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return the negative log likelihood of classes, given log-probabilities.

    Args:
        input: log-probabilities, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``.
        target: class numbers, ``()``, ``(N,)`` or ``(N, d1, ..., dK)``.
        weight: a factor for each class, ``(C,)``.
        size_average: deprecated, as in torch; use `reduction`.
        ignore_index: a target that is left out.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (weighted by `weight`), "sum" or "none".

    Returns:
        A scalar, or one loss for each target. The mean over no targets is NaN. Inside compiled code,
        and on devices where looking would stall, a class that does not exist gives NaN.

    Raises:
        IndexError: for a class that does not exist, where the values are at hand.
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes do not fit.

    Source: ``torch.nn.functional.nll_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.nll_loss(jnp.array([[-0.5, -1.0], [-2.0, -0.25]]), jnp.array([0, 1])))
        0.375
    """
    function = "F.nll_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    _check_order(x, y, function)
    w = None if weight is None else array(weight, "weight", function)
    check_classes(x, y, ignore_index, function)
    return _nll(x, y, w, ignore_index, reduction)
