"""Connectionist temporal classification."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import (
    array,
    concrete_on_cpu,
    reduced,
    reduction_of,
    require_float,
    require_rank,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled

# The logarithm of 0, finite so that differences of two of them and their derivatives are numbers.
NEVER = -1e30


@functools.partial(compiled, static_argnums=(4, 5, 6, 7))
def _ctc(
    log_probs: jax.Array,
    targets: jax.Array,
    input_lengths: jax.Array,
    target_lengths: jax.Array,
    blank: int,
    width: int,
    reduction: str,
    zero_infinity: bool,
) -> Any:
    dtype = log_probs.dtype
    given = widened(log_probs)  # (T, N, C)
    steps = given.shape[0]
    lengths = target_lengths.astype(jnp.int32)
    place = jnp.arange(width, dtype=jnp.int32)
    if targets.ndim == 1:  # concatenated
        start = jnp.cumsum(lengths, dtype=jnp.int32) - lengths
        labels = jnp.take(targets, start[:, None] + place, mode="clip") if width else targets[None]
        labels = jnp.broadcast_to(labels, (given.shape[1], width))
    else:
        labels = targets
    labels = jnp.where(place < lengths[:, None], labels.astype(jnp.int32), blank)  # (N, S)

    clipped = jnp.maximum(given, NEVER)
    blanks = clipped[:, :, blank, None]  # (T, N, 1)
    emitted = _emissions(clipped, labels)  # (T, N, S)
    # From one label to the next without a blank between them, unless they are the same.
    skips = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (min(1, width), 0)))

    def step(alpha: tuple[Any, Any], now: tuple[Any, Any, Any]) -> tuple[tuple[Any, Any], None]:
        # at_blank[s]: the paths that have seen s labels and rest on a blank; at_label[s]: those that
        # rest on label s.
        at_blank, at_label = alpha  # (N, S + 1), (N, S)
        log_blank, log_label, running = now
        before = jnp.pad(at_label, ((0, 0), (1, 0)), constant_values=NEVER)
        next_blank = log_blank + jnp.logaddexp(at_blank, before)
        next_label = log_label + _log_add_three(
            at_label, at_blank[:, :width], jnp.where(skips, before[:, :width], NEVER)
        )
        running = running[:, None]
        return (
            jnp.where(running, next_blank, at_blank),
            jnp.where(running, next_label, at_label),
        ), None

    running = jnp.arange(steps, dtype=jnp.int32)[:, None] < input_lengths  # (T, N)
    first = jnp.where(jnp.arange(width + 1, dtype=jnp.int32) == 0, 0.0, NEVER).astype(given.dtype)
    nothing = jnp.full(labels.shape, NEVER, given.dtype)
    start_of = (jnp.broadcast_to(first, (labels.shape[0], width + 1)), nothing)
    (at_blank, at_label), _ = lax.scan(step, start_of, (blanks, emitted, running))

    last = lengths[:, None]
    ended = jnp.sum(jnp.where(jnp.arange(width + 1, dtype=jnp.int32) == last, at_blank, 0), 1)
    on_label = jnp.sum(jnp.where(place == last - 1, at_label, 0), 1)
    on_label = jnp.where(lengths > 0, on_label, NEVER)
    loss = -jnp.logaddexp(ended, on_label)  # (N,)

    impossible = loss > -NEVER / 10
    if zero_infinity:
        loss, running = jnp.where(impossible, 0, loss), running & ~impossible
    else:
        loss = jnp.where(impossible, jnp.inf, loss)
    loss = _after_log_softmax(loss, given, running[:, :, None])
    if reduction == "mean":
        loss = loss / jnp.maximum(lengths, 1).astype(loss.dtype)
    return reduced(loss, reduction).astype(dtype)


@jax.custom_jvp
def _after_log_softmax(loss: jax.Array, log_probs: jax.Array, running: jax.Array) -> Any:
    """Return the losses, with torch's derivative, which is that of losses after a log_softmax.

    With respect to log-probabilities it has their exponentials in addition, which a log_softmax before them
    takes out again. Where a loss is no number or infinite, all its derivatives are NaN.
    """
    return loss


@_after_log_softmax.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    loss, log_probs, running = primals
    extra = jnp.where(running, jnp.exp(log_probs) + (loss * 0)[:, None], 0)
    return loss, tangents[0] + jnp.sum(extra * tangents[1], (0, 2))


def _emissions(log_probs: jax.Array, labels: jax.Array) -> Any:
    # The time axis last: what is gathered, and scattered in the derivative, are rows then.
    rows = jnp.take_along_axis(log_probs.transpose(1, 2, 0), labels[:, :, None], 1, mode="fill")
    return rows.transpose(2, 0, 1)


def _log_add_three(a: jax.Array, b: jax.Array, c: jax.Array) -> Any:
    top = lax.stop_gradient(jnp.maximum(jnp.maximum(a, b), c))
    return top + jnp.log(jnp.exp(a - top) + jnp.exp(b - top) + jnp.exp(c - top))


def ctc_loss(
    log_probs: ArrayLike,
    targets: ArrayLike,
    input_lengths: ArrayLike,
    target_lengths: ArrayLike,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> jax.Array:
    """Return the negative log likelihood of label sequences, over all their alignments.

    Args:
        log_probs: ``(T, N, C)`` or ``(T, C)``: log-probabilities of C classes, one of them the blank.
        targets: ``(N, S)``, or one after the other in one axis; class numbers other than the blank.
            ``(S,)`` for one example.
        input_lengths: ``(N,)``, an array or a tuple of numbers: the steps to use of each example.
        target_lengths: ``(N,)`` likewise: the labels to use.
        blank: the number of the blank class.
        reduction: "mean" (of the losses over their target's length), "sum" or "none".
        zero_infinity: whether a target that does not fit into its input costs 0, instead of an
            infinite loss with a derivative that is not a number.

    Returns:
        A scalar, or ``(N,)``. The derivative is torch's: that of ``ctc_loss(log_softmax(logits))``
        with respect to the logits.

    Raises:
        RuntimeError: for shapes that do not fit, and for lengths out of range where the values are at
            hand.

    Source: Graves et al. 2006; ``torch.nn.functional.ctc_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> log_probs = jnp.log(jnp.full((4, 1, 3), 1 / 3))
        >>> loss = F.ctc_loss(log_probs, jnp.array([[1, 2]]), (4,), (2,), reduction="sum")
        >>> round(float(jnp.exp(-loss) * 3**4))  # alignments
        15
    """
    function = "F.ctc_loss"
    reduction = reduction_of(reduction, None, None, function)
    x = array(log_probs, "log_probs", function)
    y = array(targets, "targets", function)
    steps_of = _lengths(input_lengths, "input_lengths", function)
    labels_of = _lengths(target_lengths, "target_lengths", function)
    require_float(x, "log_probs", function)
    require_rank(x, (2, 3), "log_probs", function, "(T, N, C) or (T, C)")
    batched = x.ndim == 3
    if not batched:
        x, y = x[:, None], y[None]
    width = _checked_width(x, y, steps_of, labels_of, blank, function)
    out = _ctc(x, y, steps_of, labels_of, blank, width, reduction, bool(zero_infinity))
    return out if batched or reduction != "none" else out[0]


def _lengths(lengths: Any, name: str, function: str) -> Any:
    if isinstance(lengths, (tuple, list)):
        if any(isinstance(n, jax.Array) for n in lengths):  # as they are inside compiled code
            lengths = jnp.stack([jnp.asarray(n, jnp.int32) for n in lengths])
        else:
            lengths = np.asarray(lengths, np.int32)
    elif not isinstance(lengths, np.ndarray):
        lengths = array(lengths, name, function)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"{function} was given {name} of dtype {lengths.dtype}",
                "lengths are integers",
                f"{name}.astype(jnp.int32)",
            )
        )
    return lengths.reshape(1) if lengths.ndim == 0 else lengths.astype(np.int32)


def _checked_width(
    x: jax.Array,
    y: jax.Array,
    steps_of: jax.Array | np.ndarray,
    labels_of: jax.Array | np.ndarray,
    blank: int,
    function: str,
) -> int:
    steps, examples, classes = x.shape
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"{function} was given targets of dtype {y.dtype}",
                "they are class numbers, which are integers",
                "targets.astype(jnp.int32)",
            )
        )
    if not x.size:
        raise shape_error(
            f"{function} was given log_probs of shape {x.shape}",
            "it must not be empty",
            "at least one step, one example and one class",
        )
    if not 0 <= blank < classes:
        raise RuntimeError(
            explain(
                f"{function} was given blank={blank}",
                f"blank must be in label range: there are {classes} classes, numbered from 0",
                "blank=0, with log_probs of one class more than there are labels",
            )
        )
    for name, lengths in (("input_lengths", steps_of), ("target_lengths", labels_of)):
        if lengths.shape != (examples,):
            raise shape_error(
                f"{function} was given log_probs of shape {x.shape} and {name} of shape "
                f"{lengths.shape}",
                f"there are {examples} examples on axis 1, and each has a length",
                f"{name} of shape ({examples},)",
            )
    if y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[0] != examples):
        raise shape_error(
            f"{function} was given log_probs of shape {x.shape} and targets of shape {y.shape}",
            f"targets are ({examples}, S), or all of them one after the other in one axis",
            "pad the targets to one length, or concatenate them",
        )
    values = concrete_on_cpu(steps_of)
    if values is not None:
        _require_between(values, steps, "input_lengths", "steps on axis 0", function)
    values = concrete_on_cpu(labels_of)
    if y.ndim == 2:
        if values is not None:
            _require_between(values, y.shape[1], "target_lengths", "labels on axis 1", function)
        return y.shape[1]
    if values is None:
        return y.shape[0]
    _require_between(values, y.shape[0], "target_lengths", "labels", function)
    if values.sum() != y.shape[0]:
        raise shape_error(
            f"{function} was given {y.shape[0]} targets in one axis, and target_lengths that sum to "
            f"{values.sum()}",
            "targets in one axis follow one another without gaps",
            "targets of shape (N, S) if they are padded",
        )
    return int(values.max(initial=0))


def _require_between(values: np.ndarray, most: int, name: str, what: str, function: str) -> None:
    if (values < 0).any() or (values > most).any():
        raise shape_error(
            f"{function} was given {name} from {values.min()} to {values.max()}",
            f"a length is at least 0, and there are {most} {what}",
            f"{name} from 0 to {most}",
        )
