"""The adaptive softmax: frequent classes in one small layer, rare ones in clusters behind it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import require_same_dtype, widened
from statefulnn.functional._compiled import compiled
from statefulnn.functional.cross_entropy import losses_of_classes


def _logits(x: jax.Array, *weights: Any) -> Any:
    for weight in weights:
        x = lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
    return widened(x)


def _head_logits(x: jax.Array, head: tuple[Any, Any]) -> Any:
    weight, bias = head
    require_same_dtype("nn.AdaptiveLogSoftmaxWithLoss", input=x, weight=weight)
    logits = _logits(x, weight)
    return logits if bias is None else logits + bias.astype(logits.dtype)


@functools.partial(compiled, static_argnums=4)
@ruled(Rule.FLOAT32)
def log_prob_of_targets(
    x: jax.Array,
    target: jax.Array,
    head: tuple[jax.Array, jax.Array | None],
    tail: Sequence[tuple[jax.Array, jax.Array]],
    cutoffs: tuple[int, ...],
) -> tuple[Any, Any]:
    """Return the log-probability of each target, and the negative of their mean.

    Every cluster computes every row, and a mask keeps what belongs: the shapes do not depend on values.

    Args:
        x: ``(N, in_features)`` or ``(in_features,)``.
        target: ``(N,)`` or ``()``, below the last cutoff; another one gives NaN.
        head: weight and bias of the layer of frequent classes and clusters.
        tail: for each cluster its two weights.
        cutoffs: where each cluster starts, and the number of classes.
    """
    rows = x.reshape(-1, x.shape[-1])
    target_of = target.reshape(-1).astype(jnp.int32)
    none = -1  # a target that is not of this layer
    first = cutoffs[0]
    entry = jnp.where((target_of >= 0) & (target_of < first), target_of, none)
    total = jnp.zeros(target_of.shape, widened(x).dtype)
    for i, weights in enumerate(tail):
        low, high = cutoffs[i], cutoffs[i + 1]
        inside = (target_of >= low) & (target_of < high)
        entry = jnp.where(inside, first + i, entry)
        local = jnp.where(inside, target_of - low, none)
        loss, _ = losses_of_classes(_logits(rows, *weights), local, None, none, 0.0, 1)
        total = total - loss
    loss, _ = losses_of_classes(_head_logits(rows, head), entry, None, none, 0.0, 1)
    total = jnp.where(entry == none, jnp.nan, total - loss)
    mean = jnp.sum(-total) / jnp.asarray(total.size, total.dtype)
    return total.reshape(target.shape).astype(x.dtype), mean.astype(x.dtype)


def _all_log_probs(
    x: jax.Array,
    head: tuple[jax.Array, jax.Array | None],
    tail: Sequence[tuple[jax.Array, jax.Array]],
    first: int,
) -> Any:
    of_head = jax.nn.log_softmax(_head_logits(x, head), 1)
    parts = [of_head[:, :first]]
    for i, weights in enumerate(tail):
        inner = jax.nn.log_softmax(_logits(x, *weights), 1)
        parts.append(inner + of_head[:, first + i, None])
    return jnp.concatenate(parts, 1)


@functools.partial(compiled, static_argnums=3)
@ruled(Rule.FLOAT32)
def log_prob(
    x: jax.Array,
    head: tuple[jax.Array, jax.Array | None],
    tail: Sequence[tuple[jax.Array, jax.Array]],
    first: int,
) -> jax.Array:
    """Return the log-probabilities of all classes, ``(N, n_classes)``; arguments as above."""
    return _all_log_probs(x, head, tail, first).astype(x.dtype)


@functools.partial(compiled, static_argnums=3)
@ruled(Rule.FLOAT32)
def predict(
    x: jax.Array,
    head: tuple[jax.Array, jax.Array | None],
    tail: Sequence[tuple[jax.Array, jax.Array]],
    first: int,
) -> jax.Array:
    """Return the most probable class of each row, ``(N,)``; arguments as above."""
    best = jnp.argmax(_all_log_probs(x, head, tail, first), 1)
    return best.astype(jax.dtypes.canonicalize_dtype(jnp.int64))
