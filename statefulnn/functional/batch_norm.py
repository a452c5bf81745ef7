"""Normalisation by statistics of each channel: over the batch, or over each example by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.box import Box
from statefulnn.core.errors import StateWriteError, explain
from statefulnn.functional._checks import (
    array,
    channels_advice,
    require_same_or_wider,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._standardised import axis_size, standardised

# --------------------------------------------------------------------------------------------------
# What is checked where the compiled code is made: an eager call like an earlier one pays nothing.


def _require_fit(
    function: str,
    x: jax.Array,
    running_mean: jax.Array | None,
    running_var: jax.Array | None,
    weight: jax.Array | None,
    bias: jax.Array | None,
    tracked: jax.Array | None = None,
) -> None:
    given = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    if x.ndim < 2:
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            "the second axis holds the channels: (N, C, *)",
            "add the batch axis: input[None]",
        )
    channels = (x.shape[1],)
    for name, value in given.items():
        if value is not None and value.shape != channels:
            advice = channels_advice(x, value.size, x.ndim - 2, _layer_of(x, function))
            if any(v is not None and v.shape == channels for v in given.values()):
                advice = f"a {name} of shape {channels}, which the other arrays have"
                if name.startswith("running"):
                    fill = "zeros" if name == "running_mean" else "ones"
                    advice = f"layer.{name} = jnp.{fill}({channels}), the shape of the other arrays"
            raise shape_error(
                f"{function} was given input of shape {x.shape} and {name} of shape {value.shape}",
                f"the input has {x.shape[1]} channels (axis 1), so {name} must be {channels}",
                advice,
            )
    if (running_mean is None) != (running_var is None):
        raise shape_error(
            f"{function} was given only one of running_mean and running_var",
            "they are kept together",
            "pass both, or None for both",
        )
    require_same_or_wider(function, input=x, **given)


def _layer_of(x: jax.Array, function: str) -> str:
    kind = "InstanceNorm" if "instance" in function else "BatchNorm"
    return f"nn.{kind}{max(x.ndim - 2, 1)}d({x.shape[1]})"


def _require_eps(function: str, eps: float, training: bool) -> None:
    if eps < 0 or (training and eps == 0):
        raise ValueError(
            explain(
                f"{function} was given eps={eps}",
                "a variance may be 0, and the output is divided by its square root: in training eps "
                "must be positive, and elsewhere non-negative",
                f"{function}(..., eps=1e-5)",
            )
        )


def _require_statistics(function: str, mean: jax.Array | None) -> None:
    if mean is None:
        raise shape_error(
            f"{function} was given no running statistics, and is not to use the input's",
            "there is nothing to normalise by",
            "training=True (use_input_stats=True for an instance norm) for the input's own "
            "statistics, or pass running_mean and running_var",
        )


def _require_boxes(
    function: str, running_mean: ArrayLike | None, running_var: ArrayLike | None
) -> tuple[Any, Any]:
    if running_mean is None or (isinstance(running_mean, Box) and isinstance(running_var, Box)):
        return running_mean, running_var
    raise StateWriteError(
        explain(
            f"{function} was given plain arrays as running statistics, and is to update them",
            "arrays are immutable, so the updated statistics would be lost",
            f"out, mean, var = {function}_with_stats(input, mean, var, ...); or pass nn.Buffer "
            "boxes; or None and None to keep no statistics",
        )
    )


def _or_none(value: ArrayLike | None, name: str, function: str) -> Any:
    return None if value is None else array(value, name, function)


# --------------------------------------------------------------------------------------------------
# Kernels


def _per_channel(v: jax.Array | None, like: jax.Array) -> Any:
    return None if v is None else v.astype(like.dtype).reshape(1, -1, *(1,) * (like.ndim - 2))


@functools.partial(compiled, static_argnums=(5, 6))
def _by_running_statistics(
    x: jax.Array,
    mean: jax.Array | None,
    var: Any,
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
    function: str,
) -> Any:
    _require_fit(function, x, mean, var, weight, bias)
    _require_statistics(function, mean)
    wide = widened(x)
    # Per channel first: multiplying the batch by the product saves a pass.
    factor = lax.rsqrt(var.astype(wide.dtype) + eps)
    if weight is not None:
        factor = factor * weight.astype(wide.dtype)
    out = (wide - _per_channel(mean, wide)) * _per_channel(factor, wide)
    out = out if bias is None else out + _per_channel(bias, wide)
    return out.astype(x.dtype)


def _moved(running: jax.Array, batch: jax.Array, factor: ArrayLike) -> Any:
    batch = lax.stop_gradient(batch)
    wide = running.astype(batch.dtype)
    return ((1 - factor) * wide + factor * batch).astype(running.dtype)


def _counted(tracked: jax.Array) -> Any:
    """Return a count with one more batch; it stays at the largest number that its dtype has."""
    one = jnp.ones((), tracked.dtype)
    if not jnp.issubdtype(tracked.dtype, jnp.integer):
        return tracked + one
    last = jnp.array(jnp.iinfo(tracked.dtype).max - 1, tracked.dtype)
    return jnp.minimum(tracked, last) + one


@functools.partial(compiled, static_argnums=(6, 7, 8, 9))
def _by_batch_statistics(
    x: jax.Array,
    mean: jax.Array | None,
    var: Any,
    tracked: jax.Array | None,
    weight: jax.Array | None,
    bias: jax.Array | None,
    momentum: float | None,
    eps: float,
    function: str,
    axis_name: Hashable = None,
) -> tuple[Any, Any, Any, Any]:
    _require_fit(function, x, mean, var, weight, bias)
    _require_eps(function, eps, True)
    wide = widened(x)
    axes = (0, *range(2, x.ndim))
    count = math.prod(x.shape[a] for a in axes) * axis_size(axis_name)
    if count == 1:
        raise shape_error(
            f"{function} was given input of shape {x.shape} in training mode",
            "expected more than 1 value per channel: the variance of one value is 0, and so the "
            "output would be",
            "a batch of more than one example, drop_last in the data loader, or model.eval()",
        )
    if tracked is not None:
        tracked = _counted(tracked)
    if count == 0:
        return x, mean, var, tracked

    factors = _per_channel(weight, wide), _per_channel(bias, wide)
    out, batch_mean, biased = standardised(wide, *factors, axes, eps, axis_name)
    if mean is not None:
        # The batch is normalised with the biased variance; the running one is unbiased.
        batch_mean, biased = batch_mean.reshape(-1), biased.reshape(-1)
        unbiased = biased * (count / (count - 1))
        if momentum is None:  # the average over all batches so far
            assert tracked is not None
            factor = 1 / tracked.astype(wide.dtype)
        else:
            factor = jnp.asarray(momentum, wide.dtype)
        mean = _moved(mean, batch_mean, factor)
        var = _moved(var, unbiased, factor)
    return out.astype(x.dtype), mean, var, tracked


@functools.partial(compiled, static_argnums=(5, 6, 7))
def _by_own_statistics(
    x: jax.Array,
    mean: jax.Array | None,
    var: Any,
    weight: jax.Array | None,
    bias: jax.Array | None,
    momentum: float,
    eps: float,
    function: str,
) -> tuple[Any, Any, Any]:
    _require_fit(function, x, mean, var, weight, bias)
    count = math.prod(x.shape[2:])
    if count == 1:
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            "expected more than 1 spatial element when training: the variance of one value is 0",
            "an input with larger spatial axes, or running statistics: use_input_stats=False",
        )
    if x.size == 0:
        return x, mean, var
    wide = widened(x)
    axes = tuple(range(2, x.ndim))
    factors = _per_channel(weight, wide), _per_channel(bias, wide)
    out, own_mean, biased = standardised(wide, *factors, axes, eps)
    if mean is not None:
        # Every example moves the statistics; what is kept is the average over the examples.
        share = jnp.asarray(momentum, wide.dtype)
        mean = _moved(mean, jnp.mean(own_mean, (0, *axes)), share)
        var = _moved(var, jnp.mean(biased, (0, *axes)) * (count / (count - 1)), share)
    return out.astype(x.dtype), mean, var


# --------------------------------------------------------------------------------------------------
# Functions


def batch_norm(
    input: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalise each channel over the batch, or by running statistics.

    In training mode running statistics that are given as `nn.Buffer` boxes are updated in place, as
    torch does with its tensors. Plain arrays cannot be updated: `batch_norm_with_stats` returns the
    new ones, and this function raises rather than drop them.

    Args:
        input: ``(N, C, *)``.
        running_mean: ``(C,)`` or None.
        running_var: ``(C,)`` or None.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        training: normalise by the batch's own mean and (biased) variance.
        momentum: the share of this batch in the running statistics (variance unbiased).
        eps: added to the variance.

    Returns:
        An array of the input's shape and dtype.

    Raises:
        StateWriteError: in training mode with running statistics that are plain arrays.
        ShapeError: if the shapes do not fit, or training with one value per channel.
        ValueError: if `eps` is negative, or 0 in training mode.

    Source: Ioffe and Szegedy 2015; ``torch.nn.functional.batch_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn, statefulnn.functional as F
        >>> mean, var = nn.Buffer(jnp.zeros(2)), nn.Buffer(jnp.ones(2))
        >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
        >>> F.batch_norm(x, mean, var, training=True, momentum=0.5).round(2).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
        >>> mean.value.tolist()
        [1.0, 2.0]
    """
    function = "F.batch_norm"
    x = array(input, "input", function)
    mean = _or_none(running_mean, "running_mean", function)
    var = _or_none(running_var, "running_var", function)
    w = _or_none(weight, "weight", function)
    b = _or_none(bias, "bias", function)
    if not training:
        if eps < 0:
            _require_eps(function, eps, False)
        return _by_running_statistics(x, mean, var, w, b, eps, function)
    boxes = _require_boxes(function, running_mean, running_var)
    out, new_mean, new_var, _ = _by_batch_statistics(
        x, mean, var, None, w, b, momentum, eps, function
    )
    if mean is not None:
        boxes[0].value, boxes[1].value = new_mean, new_var
    return out


def batch_norm_with_stats(
    input: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: ArrayLike | None = None,
    axis_name: Hashable = None,
) -> tuple[jax.Array, ...]:
    """Normalise each channel over the batch and return the new running statistics as well.

    Args:
        input: ``(N, C, *)``.
        running_mean: ``(C,)`` or None.
        running_var: ``(C,)`` or None.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        momentum: the share of this batch in the running statistics; None for the plain average over
            all batches, which needs `num_batches_tracked`.
        eps: added to the variance.
        num_batches_tracked: the number of batches before this one, an integer array, or None.
        axis_name: the name, or names, of mapped axes (of ``jax.shard_map``, ``jax.vmap`` or
            ``jax.pmap``) that the batch is spread over: the statistics are those of all of it. A name
            that is not bound counts as no name.

    Returns:
        ``(output, new_mean, new_var)``, and the new count as a fourth if one was given, which stays at
        the largest number of its dtype. No gradient flows through the statistics. An empty batch leaves
        them as they are, and counts.

    Raises:
        ShapeError: if the shapes do not fit, or there is one value per channel.
        ValueError: if `eps` is not positive.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.array([[1.0], [3.0]])
        >>> out, mean, var = F.batch_norm_with_stats(x, jnp.zeros(1), jnp.ones(1), momentum=0.5)
        >>> mean.tolist(), var.tolist()
        ([1.0], [1.5])
    """
    function = "F.batch_norm_with_stats"
    x = array(input, "input", function)
    mean = _or_none(running_mean, "running_mean", function)
    var = _or_none(running_var, "running_var", function)
    w = _or_none(weight, "weight", function)
    b = _or_none(bias, "bias", function)
    tracked = _or_none(num_batches_tracked, "num_batches_tracked", function)
    if tracked is None and momentum is None and mean is not None:
        raise ValueError(
            explain(
                f"{function} was given momentum=None without num_batches_tracked",
                "the average over all batches needs their number",
                "pass num_batches_tracked, or a momentum such as 0.1",
            )
        )
    outs = _by_batch_statistics(x, mean, var, tracked, w, b, momentum, eps, function, axis_name)
    return outs[:3] if tracked is None else outs


def instance_norm(
    input: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalise each channel of each example by itself, or by running statistics.

    Running statistics are updated where the input's own are used, as in `batch_norm`: give them as
    `nn.Buffer` boxes, or call `instance_norm_with_stats`.

    Args:
        input: ``(N, C, *)`` with at least one spatial axis.
        running_mean: ``(C,)`` or None.
        running_var: ``(C,)`` or None.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        use_input_stats: False normalises by the running statistics.
        momentum: the share of this batch in the running statistics (variance unbiased).
        eps: added to the variance.

    Returns:
        An array of the input's shape and dtype.

    Raises:
        StateWriteError: if running statistics that are plain arrays would be updated.
        ShapeError: if the shapes do not fit, or there is one value per channel.

    Source: Ulyanov, Vedaldi and Lempitsky 2016; ``torch.nn.functional.instance_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.instance_norm(jnp.array([[[1.0, 3.0], [10.0, 30.0]]])).round(3).tolist()
        [[[-1.0, 1.0], [-1.0, 1.0]]]
    """
    function = "F.instance_norm"
    x = array(input, "input", function)
    mean = _or_none(running_mean, "running_mean", function)
    var = _or_none(running_var, "running_var", function)
    w = _or_none(weight, "weight", function)
    b = _or_none(bias, "bias", function)
    if not use_input_stats:
        return _by_running_statistics(x, mean, var, w, b, eps, function)
    boxes = _require_boxes(function, running_mean, running_var)
    out, new_mean, new_var = _by_own_statistics(x, mean, var, w, b, momentum, eps, function)
    if mean is not None:
        boxes[0].value, boxes[1].value = new_mean, new_var
    return out


def instance_norm_with_stats(
    input: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise each channel of each example and return the new running statistics as well.

    Args:
        input: ``(N, C, *)`` with at least one spatial axis.
        running_mean: ``(C,)`` or None.
        running_var: ``(C,)`` or None.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        momentum: the share of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        ``(output, new_mean, new_var)``; the statistics move towards the average over the examples of
        their means and unbiased variances. No gradient flows through them.

    Raises:
        ShapeError: if the shapes do not fit, or there is one value per channel.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.array([[[1.0, 3.0]]])
        >>> out, mean, var = F.instance_norm_with_stats(x, jnp.zeros(1), jnp.ones(1), momentum=0.5)
        >>> mean.tolist(), var.tolist()
        ([1.0], [1.5])
    """
    function = "F.instance_norm_with_stats"
    x = array(input, "input", function)
    mean = _or_none(running_mean, "running_mean", function)
    var = _or_none(running_var, "running_var", function)
    w = _or_none(weight, "weight", function)
    b = _or_none(bias, "bias", function)
    return _by_own_statistics(x, mean, var, w, b, momentum, eps, function)
