"""Arrays brought to mean 0 and variance 1: what the normalisations share."""

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


def _average(x: Any, axes: tuple[int, ...], axis_name: Hashable) -> Any:
    sharers = axis_size(axis_name)
    total = jnp.sum(x, axes, keepdims=True)
    if sharers > 1:
        total = lax.psum(total, axis_name)
    return total / (math.prod(x.shape[a] for a in axes) * sharers)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def standardised(
    x: Any, axes: tuple[int, ...], eps: float, axis_name: Hashable = None
) -> tuple[Any, Any, Any]:
    """Return ``(x - mean) / sqrt(var + eps)``, the mean, and the biased variance, of kept axes.

    Args:
        x: floating, not of low precision.
        axes: what mean and variance are taken over.
        eps: added to the variance.
        axis_name: mapped axes that the numbers are spread over as well.
    """
    mean = _average(x, axes, axis_name)
    centred = x - mean
    # Of the centred numbers: a difference of two large sums would lose most digits.
    var = _average(centred * centred, axes, axis_name)
    return centred * lax.rsqrt(var + eps), mean, var


@standardised.defjvp
def _standardised_jvp(
    axes: tuple[int, ...], eps: float, axis_name: Hashable, primals: tuple, tangents: tuple
) -> tuple[Any, Any]:
    # In terms of the output: two sums and one pass in both directions. The chain rule through mean,
    # variance and root takes more of each, and rounds worse where the variance is small.
    (x,), (dx,) = primals, tangents
    out, mean, var = standardised(x, axes, eps, axis_name)
    scale = lax.rsqrt(var + eps)
    along = _average(out * dx, axes, axis_name)
    moved = _average(dx, axes, axis_name)
    return (out, mean, var), (scale * (dx - moved - out * along), moved, 2 * along / scale)
