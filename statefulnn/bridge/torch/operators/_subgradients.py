"""Functions whose slope torch and JAX choose differently where there is none: at ties and at zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from statefulnn.bridge.torch.operators._table import Axes


def _apart(x: jax.Array, function: Callable) -> jax.Array:
    """Return ``function(x)`` with 0 for 0, and the slope 0 there."""
    is_zero = x == 0
    return jnp.where(is_zero, jnp.zeros_like(x), function(jnp.where(is_zero, jnp.ones_like(x), x)))


def absolute(x: jax.Array) -> jax.Array:
    """Return ``|x|``: the slope at 0 is 0."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        is_zero = x == 0
        size = jnp.abs(jnp.where(is_zero, jnp.ones_like(x), x))
        return jnp.where(is_zero, jnp.zeros_like(size), size)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.abs(x)
    return x * lax.stop_gradient(jnp.sign(x))


def root(x: jax.Array) -> jax.Array:
    """Return the square root: the slope at 0 is 0, and not infinite."""
    return _apart(x, jnp.sqrt)


def length(x: jax.Array, power: float, axes: Axes, keepdims: bool = False) -> jax.Array:
    """Return ``sum(|x| ** power) ** (1 / power)``: where x is 0, and where all are, the slope is 0."""
    if power == 2:
        squares = jnp.square(jnp.abs(x)) if jnp.iscomplexobj(x) else jnp.square(x)
        return root(jnp.sum(squares, axes, keepdims=keepdims))
    sizes = absolute(x)
    if power == 1:
        return jnp.sum(sizes, axes, keepdims=keepdims)
    exponent = jnp.asarray(power, sizes.dtype)
    if power < 0:
        return jnp.sum(sizes**exponent, axes, keepdims=keepdims) ** (1 / exponent)
    powers = _apart(sizes, lambda s: s**exponent)
    return _apart(jnp.sum(powers, axes, keepdims=keepdims), lambda s: s ** (1 / exponent))


def clamp(x: jax.Array, low: jax.Array | None = None, high: jax.Array | None = None) -> jax.Array:
    """Return x within bounds of its dtype: on a bound the slope by x is 1."""
    for bound, beyond in ((low, jnp.less), (high, jnp.greater)):
        if bound is not None:
            x = jnp.where(beyond(x, bound) | (bound != bound), bound, x)
    return x


@jax.custom_jvp
def power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return ``x ** exponent``: the slope of ``x ** 0`` is 0 also for x of 0."""
    return jnp.power(x, exponent)


@power.defjvp
def _(
    values: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, exponent), (by_x, by_exponent) = values, tangents
    out, zero = power(x, exponent), jnp.zeros((), x.dtype)
    constant = exponent == 0
    slope = exponent * power(x, jnp.where(constant, jnp.ones_like(exponent), exponent) - 1)
    flat = (x == 0) & (exponent >= 0)
    growth = out * jnp.log(jnp.where(flat, jnp.ones_like(x), x))
    return out, by_x * jnp.where(constant, zero, slope) + by_exponent * jnp.where(
        flat, zero, growth
    )


def angle(y: jax.Array, x: jax.Array) -> jax.Array:
    """Return ``atan2(y, x)``: the slopes at the origin are 0."""
    origin = (y == 0) & (x == 0)
    out = jnp.arctan2(y, jnp.where(origin, jnp.ones_like(x), x))
    return jnp.where(origin, lax.stop_gradient(jnp.arctan2(y, x)), out)


def larger_first(better: Callable) -> Callable:
    """Return fmax or fmin: of equal numbers the first one gets the gradient."""
    return lambda a, b: jnp.where(better(a, b) | jnp.isnan(b), a, b)


def picked(values_and_places: Callable) -> Callable:
    """Return a function of values and their places that passes the gradient of each value to its place.

    Args:
        values_and_places: of an array, an axis, and whether it is kept.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
    def run(x: jax.Array, axis: int, keepdims: bool) -> tuple[jax.Array, jax.Array]:
        return values_and_places(x, axis, keepdims)

    @run.defjvp
    def _(axis: int, keepdims: bool, values: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
        (x,), (moved,) = values, tangents
        out, places = run(x, axis, keepdims)
        whole = places if places.ndim == x.ndim else jnp.expand_dims(places, axis)
        along = jnp.take_along_axis(moved, whole, axis)
        along = along if places.ndim == x.ndim else jnp.squeeze(along, axis)
        return (out, places), (along, jax.custom_derivatives.zero_from_primal(places))

    return run
