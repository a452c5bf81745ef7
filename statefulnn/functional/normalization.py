"""Normalisation over the last axes, and over groups of channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import (
    array,
    require_same_or_wider,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._standardised import standardised


def _require_last_axes(
    function: str,
    x: jax.Array,
    shape: tuple[int, ...],
    weight: jax.Array | None,
    bias: jax.Array | None,
) -> None:
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
    require_same_or_wider(function, input=x, weight=weight, bias=bias)


def _sizes(normalized_shape: Sequence[int], function: str) -> tuple[int, ...]:
    if type(normalized_shape) is tuple:
        return normalized_shape
    try:
        return tuple(normalized_shape)
    except TypeError:
        raise TypeError(
            explain(
                f"{function} was given normalized_shape={normalized_shape!r}",
                "it is a tuple: the sizes of the last axes",
                f"{function}(input, ({normalized_shape},))",
            )
        ) from None


def _like(wide: jax.Array, factor: jax.Array | None, shape: tuple[int, ...]) -> Any:
    return None if factor is None else factor.astype(wide.dtype).reshape(shape)


@functools.partial(compiled, static_argnums=(3, 4))
@ruled(Rule.FLOAT32)
def _layer_norm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    shape: tuple[int, ...],
    eps: float,
) -> Any:
    _require_last_axes("F.layer_norm", x, shape, weight, bias)
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    if x.size == 0:
        return x
    wide = widened(x)
    each = (1,) * (x.ndim - len(shape)) + shape
    out, _, _ = standardised(wide, _like(wide, weight, each), _like(wide, bias, each), axes, eps)
    return out.astype(x.dtype)


def layer_norm(
    input: ArrayLike,
    normalized_shape: Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> jax.Array:
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
    return _layer_norm(x, w, b, _sizes(normalized_shape, "F.layer_norm"), eps)


@functools.partial(compiled, static_argnums=(2, 3))
@ruled(Rule.FLOAT32)
def _rms_norm(
    x: jax.Array, weight: jax.Array | None, shape: tuple[int, ...], eps: float | None
) -> Any:
    _require_last_axes("F.rms_norm", x, shape, weight, None)
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    wide = widened(x)
    if eps is None:
        eps = float(jnp.finfo(wide.dtype).eps)
    out = wide * lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + eps)
    if weight is not None:
        out = out * weight.astype(out.dtype).reshape((1,) * (x.ndim - len(shape)) + shape)
    return out.astype(x.dtype)


def rms_norm(
    input: ArrayLike,
    normalized_shape: Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
) -> jax.Array:
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
    return _rms_norm(x, w, _sizes(normalized_shape, "F.rms_norm"), eps)


def _require_groups(
    x: jax.Array, groups: int, weight: jax.Array | None, bias: jax.Array | None
) -> None:
    given = f"F.group_norm was given input of shape {x.shape} and num_groups={groups}"
    if x.ndim < 2:
        raise shape_error(
            given,
            "expected at least 2 dimensions: the second axis holds the channels, (N, C, *)",
            "add the batch axis: input[None]",
        )
    if groups <= 0 or x.shape[1] % groups:
        raise shape_error(
            given,
            f"the {x.shape[1]} channels (axis 1) are to be divided into groups of equal size",
            "a positive num_groups that divides the number of channels",
        )
    if x.shape[0] * x.shape[1] // groups * math.prod(x.shape[2:]) == 1:
        raise shape_error(
            given,
            "expected more than 1 value per group: the variance of one value is 0",
            "fewer groups",
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (x.shape[1],):
            raise shape_error(
                f"{given}, and {name} of shape {value.shape}",
                "there is one factor for each channel",
                f"a {name} of shape ({x.shape[1]},)",
            )
    require_same_or_wider("F.group_norm", input=x, weight=weight, bias=bias)


@functools.partial(compiled, static_argnums=(3, 4))
@ruled(Rule.FLOAT32)
def _group_norm(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, groups: int, eps: float
) -> Any:
    _require_groups(x, groups, weight, bias)
    if x.size == 0:
        return x
    batch, channels = x.shape[:2]
    wide = widened(x).reshape(batch, groups, channels // groups, -1)
    each = (1, groups, channels // groups, 1)
    out, _, _ = standardised(wide, _like(wide, weight, each), _like(wide, bias, each), (2, 3), eps)
    return out.reshape(x.shape).astype(x.dtype)


def group_norm(
    input: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalise each group of channels of each example to mean 0 and variance 1, then scale and shift.

    Args:
        input: ``(N, C, *)``; float16 and bfloat16 are computed in float32.
        num_groups: into how many groups the C channels are divided, in order.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the (biased) variance.

    Returns:
        An array of the input's shape and dtype.

    Raises:
        ShapeError: if the shapes do not fit, or there is one value in all.
        DtypeError: if the dtypes differ.

    Source: Wu and He 2018; ``torch.nn.functional.group_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), 2).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """
    x = array(input, "input", "F.group_norm")
    w = None if weight is None else array(weight, "weight", "F.group_norm")
    b = None if bias is None else array(bias, "bias", "F.group_norm")
    return _group_norm(x, w, b, num_groups, eps)
