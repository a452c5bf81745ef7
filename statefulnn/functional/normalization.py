"""Batch, layer and root-mean-square normalisation."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.core.box import Box
from statefulnn.core.errors import StateWriteError, explain
from statefulnn.functional._checks import (
    array,
    require_same_or_wider,
    shape_error,
    widened,
)

# --------------------------------------------------------------------------------------------------
# Batch normalisation


def _per_channel(v: Any, like: Any) -> Any:
    return v.astype(like.dtype).reshape(1, -1, *(1,) * (like.ndim - 2))


def _scaled(centred: Any, variance: Any, weight: Any, bias: Any, eps: float) -> Any:
    # `variance` is per channel: multiplying it by the weight first saves one pass over the batch.
    factor = lax.rsqrt(variance + eps)
    if weight is not None:
        factor = factor * weight.astype(factor.dtype)
    out = centred * _per_channel(factor, centred)
    return out if bias is None else out + _per_channel(bias, out)


@functools.partial(jax.jit, static_argnums=(5,))
def _batch_norm_eval(x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Any:
    wide = widened(x)
    var = var.astype(wide.dtype)
    return _scaled(wide - _per_channel(mean, wide), var, weight, bias, eps).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _batch_norm_train(
    x: Any,
    mean: Any,
    var: Any,
    tracked: Any,
    weight: Any,
    bias: Any,
    momentum: float | None,
    eps: float,
) -> tuple[Any, Any, Any, Any]:
    wide = widened(x)
    axes = (0, *range(2, x.ndim))
    count = math.prod(x.shape[a] for a in axes)
    if tracked is not None:
        tracked = tracked + jnp.ones((), tracked.dtype)
    if count == 0:
        return x, mean, var, tracked
    batch_mean = jnp.mean(wide, axes)
    centred = wide - _per_channel(batch_mean, wide)
    biased = jnp.mean(centred * centred, axes)
    out = _scaled(centred, biased, weight, bias, eps).astype(x.dtype)
    if mean is not None:
        # The batch is normalised with the biased variance; the running one is unbiased.
        unbiased = biased * (count / max(count - 1, 1))
        if momentum is None:  # the average over all batches so far
            assert tracked is not None
            factor = 1 / tracked.astype(wide.dtype)
        else:
            factor = jnp.asarray(momentum, wide.dtype)
        mean = _moved(mean, batch_mean, factor)
        var = _moved(var, unbiased, factor)
    return out, mean, var, tracked


def _moved(running: Any, batch: Any, factor: Any) -> Any:
    batch = lax.stop_gradient(batch)
    wide = running.astype(batch.dtype)
    return ((1 - factor) * wide + factor * batch).astype(running.dtype)


def _checked(
    function: str,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
) -> tuple[Any, ...]:
    x = array(input, "input", function)
    names = ("running_mean", "running_var", "weight", "bias")
    given = (running_mean, running_var, weight, bias)
    arrays = [
        None if v is None else array(v, n, function) for n, v in zip(names, given, strict=True)
    ]
    if x.ndim < 2:
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            "the second axis holds the channels: (N, C, *)",
            "add the batch axis: input[None]",
        )
    channels = (x.shape[1],)
    for name, value in zip(names, arrays, strict=True):
        if value is not None and value.shape != channels:
            raise shape_error(
                f"{function} was given input of shape {x.shape} and {name} of shape {value.shape}",
                f"the input has {x.shape[1]} channels (axis 1), so {name} must be {channels}",
                f"a normalisation over {x.shape[1]} features, such as nn.BatchNorm2d({x.shape[1]}), "
                "or an input with its channels on axis 1",
            )
    if (running_mean is None) != (running_var is None):
        raise shape_error(
            f"{function} was given only one of running_mean and running_var",
            "they are kept together",
            "pass both, or None for both",
        )
    require_same_or_wider(function, input=x, **dict(zip(names, arrays, strict=True)))
    return x, *arrays


def _require_several_values(x: Any, function: str) -> None:
    if x.size == x.shape[1]:
        raise shape_error(
            f"{function} was given input of shape {x.shape} in training mode",
            "there is one value per channel, so its variance is 0 and the output would be 0",
            "a batch of more than one example, drop_last in the data loader, or model.eval()",
        )


def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
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
    x, mean, var, w, b = _checked("F.batch_norm", input, running_mean, running_var, weight, bias)
    if not training:
        if mean is None:
            raise shape_error(
                "F.batch_norm was given no running statistics and training=False",
                "there is nothing to normalise by",
                "training=True for the batch's own statistics, or pass running_mean and running_var",
            )
        return _batch_norm_eval(x, mean, var, w, b, eps)
    _require_several_values(x, "F.batch_norm")
    if mean is not None and not (isinstance(running_mean, Box) and isinstance(running_var, Box)):
        raise StateWriteError(
            explain(
                "F.batch_norm was given plain arrays as running statistics, with training=True",
                "arrays are immutable, so the updated statistics would be lost",
                "out, mean, var = F.batch_norm_with_stats(input, mean, var, ...); or pass nn.Buffer "
                "boxes; or None and None to keep no statistics",
            )
        )
    out, new_mean, new_var, _ = _batch_norm_train(x, mean, var, None, w, b, momentum, eps)
    if mean is not None:
        running_mean.value, running_var.value = new_mean, new_var
    return out


def batch_norm_with_stats(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Any = None,
) -> tuple[Any, ...]:
    """Normalise each channel over the batch and return the new running statistics as well.

    Args:
        input: ``(N, C, *)``.
        running_mean: ``(C,)``.
        running_var: ``(C,)``.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        momentum: the share of this batch in the running statistics; None for the plain average over
            all batches, which needs `num_batches_tracked`.
        eps: added to the variance.
        num_batches_tracked: the number of batches before this one, an integer array, or None.

    Returns:
        ``(output, new_mean, new_var)``, and the new count as a fourth if one was given. No gradient
        flows through the statistics. An empty batch leaves them as they are, and counts.

    Raises:
        ShapeError: if the shapes do not fit, or there is one value per channel.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.array([[1.0], [3.0]])
        >>> out, mean, var = F.batch_norm_with_stats(x, jnp.zeros(1), jnp.ones(1), momentum=0.5)
        >>> mean.tolist(), var.tolist()
        ([1.0], [1.5])
    """
    function = "F.batch_norm_with_stats"
    x, mean, var, w, b = _checked(function, input, running_mean, running_var, weight, bias)
    _require_several_values(x, function)
    if num_batches_tracked is None:
        if momentum is None:
            raise ValueError(
                explain(
                    f"{function} was given momentum=None without num_batches_tracked",
                    "the average over all batches needs their number",
                    "pass num_batches_tracked, or a momentum such as 0.1",
                )
            )
        return _batch_norm_train(x, mean, var, None, w, b, momentum, eps)[:3]
    tracked = array(num_batches_tracked, "num_batches_tracked", function)
    return _batch_norm_train(x, mean, var, tracked, w, b, momentum, eps)


# --------------------------------------------------------------------------------------------------
# Normalisation over the last axes


def _last_axes(
    x: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, function: str
) -> tuple[int, ...]:
    shape = tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise shape_error(
            f"{function} was given input of shape {x.shape} and normalized_shape={shape}",
            "the normalised axes are the last ones of the input, at least one, and their sizes "
            "must agree",
            f"normalized_shape={x.shape[-max(len(shape), 1) :]}",
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != shape:
            raise shape_error(
                f"{function} was given {name} of shape {value.shape} and normalized_shape={shape}",
                "there is one factor for each normalised position",
                f"a {name} of shape {shape}",
            )
    return shape


@functools.partial(jax.jit, static_argnums=(3, 4))
def _layer_norm(x: Any, weight: Any, bias: Any, axes_count: int, eps: float) -> Any:
    axes = tuple(range(x.ndim - axes_count, x.ndim))
    leading = (1,) * (x.ndim - axes_count)
    wide = widened(x)
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    out = centred * lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + eps)
    if weight is not None:
        out = out * weight.astype(out.dtype).reshape(leading + weight.shape)
    if bias is not None:
        out = out + bias.astype(out.dtype).reshape(leading + bias.shape)
    return out.astype(x.dtype)


def layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    """Normalise the last axes to mean 0 and variance 1, then scale and shift.

    Args:
        input: ``(*, *normalized_shape)``; float16 and bfloat16 are computed in float32.
        normalized_shape: the sizes of the last axes, which are normalised together.
        weight: ``normalized_shape`` or None.
        bias: ``normalized_shape`` or None.
        eps: added to the (biased) variance.

    Returns:
        An array of the input's shape and dtype.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: Ba, Kiros and Hinton 2016; ``torch.nn.functional.layer_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.layer_norm(jnp.array([[1.0, 3.0]]), (2,)).round(3).tolist()
        [[-1.0, 1.0]]
    """
    x = array(input, "input", "F.layer_norm")
    w = None if weight is None else array(weight, "weight", "F.layer_norm")
    b = None if bias is None else array(bias, "bias", "F.layer_norm")
    shape = _last_axes(x, normalized_shape, w, b, "F.layer_norm")
    require_same_or_wider("F.layer_norm", input=x, weight=w, bias=b)
    return _layer_norm(x, w, b, len(shape), eps)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rms_norm(x: Any, weight: Any, axes_count: int, eps: float) -> Any:
    axes = tuple(range(x.ndim - axes_count, x.ndim))
    wide = widened(x)
    out = wide * lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + eps)
    if weight is not None:
        out = out * weight.astype(out.dtype).reshape((1,) * (x.ndim - axes_count) + weight.shape)
    return out.astype(x.dtype)


def rms_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    """Divide the last axes by their root mean square, then scale.

    Args:
        input: ``(*, *normalized_shape)``; float16 and bfloat16 are computed in float32.
        normalized_shape: the sizes of the last axes, which are normalised together.
        weight: ``normalized_shape`` or None.
        eps: added to the mean square; None for the machine epsilon of the dtype computed in.

    Returns:
        An array of the input's shape and dtype.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: Zhang and Sennrich 2019; ``torch.nn.functional.rms_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.rms_norm(jnp.array([[3.0, 3.0]]), (2,)).round(3).tolist()
        [[1.0, 1.0]]
    """
    x = array(input, "input", "F.rms_norm")
    w = None if weight is None else array(weight, "weight", "F.rms_norm")
    shape = _last_axes(x, normalized_shape, w, None, "F.rms_norm")
    require_same_or_wider("F.rms_norm", input=x, weight=w)
    if eps is None:
        eps = float(jnp.finfo(jnp.float64 if x.dtype == jnp.float64 else jnp.float32).eps)
    return _rms_norm(x, w, len(shape), eps)
