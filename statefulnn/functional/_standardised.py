"""Arrays brought to mean 0 and variance 1, then scaled: what the normalisations share."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def axis_size(axis_name: Hashable) -> int:
    """Return how many devices or lanes share an axis, 1 if none of that name is bound."""
    if axis_name is None:
        return 1
    try:
        return lax.axis_size(axis_name)
    except NameError:
        return 1


def _average(x: jax.Array, axes: tuple[int, ...], axis_name: Hashable) -> Any:
    sharers = axis_size(axis_name)
    total = jnp.sum(x, axes, keepdims=True)
    if sharers > 1:
        total = lax.psum(total, axis_name)
    return total / (math.prod(x.shape[a] for a in axes) * sharers)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def standardised(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    axes: tuple[int, ...],
    eps: float,
    axis_name: Hashable = None,
) -> tuple[Any, Any, Any]:
    """Return ``(x - mean) / sqrt(var + eps) * weight + bias``, the mean, and the biased variance.

    Args:
        x: floating, not of low precision.
        weight: of x's dtype and number of axes, some of size 1; or None.
        bias: likewise.
        axes: what mean and variance are taken over; they keep them, with size 1.
        eps: added to the variance.
        axis_name: mapped axes that the numbers are spread over as well.
    """
    out, mean, var = _standard(x, axes, eps, axis_name)
    return _scaled(out, weight, bias), mean, var


def _standard(
    x: jax.Array, axes: tuple[int, ...], eps: float, axis_name: Hashable
) -> tuple[Any, Any, Any]:
    mean = _average(x, axes, axis_name)
    centred = x - mean
    # Of the centred numbers: a difference of two large sums would lose most digits.
    var = _average(centred * centred, axes, axis_name)
    shift, scale = lax.optimization_barrier((mean, lax.rsqrt(var + eps)))
    return (x - shift) * scale, mean, var


def _scaled(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> Any:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


@standardised.defjvp
def _standardised_jvp(
    axes: tuple[int, ...], eps: float, axis_name: Hashable, primals: tuple, tangents: tuple
) -> tuple[Any, Any]:
    # In terms of the standardised numbers: the chain rule through mean, variance and root takes more
    # sums and passes, and rounds worse where the variance is small.
    (x, weight, bias), (dx, dweight, dbias) = primals, tangents
    unit, mean, var = _standard(x, axes, eps, axis_name)
    scale = lax.rsqrt(var + eps)
    along = _average(unit * dx, axes, axis_name)
    moved = _average(dx, axes, axis_name)

    # The small factors are hidden from what the value has in common with the derivative: XLA would keep
    # them spread out to the size of x, and that memory costs more than it saves.
    again, weight_again = lax.optimization_barrier((scale, weight))
    both = again if weight is None else again * weight_again
    if both.size < x.size:
        # Two factors and an addend, each smaller than x: in the backward pass the sums over x give the
        # gradients of weight and bias, and those what x needs of them.
        slope, shift = -both * along, -both * moved
        slope = slope if dweight is None else slope + dweight
        shift = shift if dbias is None else shift + dbias
        tangent = both * dx + unit * slope + shift
    else:
        tangent = again * dx - again * moved - unit * (again * along)
        tangent = _scaled(tangent, weight_again, None if dweight is None else unit * dweight)
        tangent = tangent if dbias is None else tangent + dbias
    return (
        (_scaled(unit, weight, bias), mean, var),
        (tangent, moved, 2 * along / scale),
    )
