"""Smooth non-linearities, their piecewise linear stand-ins, and gating."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.functional._checks import (
    array,
    dimension,
    require_float,
    require_real_float,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled


def _as_float(x: jax.Array) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


@compiled
def _sigmoid(x: jax.Array) -> Any:
    return lax.logistic(_as_float(x))


def sigmoid(input: ArrayLike) -> jax.Array:
    """Return ``1 / (1 + exp(-x))`` elementwise; integers become floats.

    Args:
        input: any shape.

    Source: ``torch.nn.functional.sigmoid``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.sigmoid(jnp.array(0.0)))
        0.5
    """
    return _sigmoid(array(input, "input", "F.sigmoid"))


@jax.custom_jvp
def _log_sigmoid(x: jax.Array) -> Any:
    return jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


# Written out, because the corners of min and abs at 0 would enter the second derivative.
_log_sigmoid.defjvps(lambda tangent, out, x: tangent * lax.logistic(-x))


@compiled
def _logsigmoid(x: jax.Array) -> Any:
    require_real_float(x, "input", "F.logsigmoid")
    return _log_sigmoid(widened(x)).astype(x.dtype)


def logsigmoid(input: ArrayLike) -> jax.Array:
    """Return ``log(sigmoid(x))`` elementwise, computed without overflow.

    Args:
        input: any shape, floating.

    Source: ``torch.nn.functional.logsigmoid``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.logsigmoid(jnp.array([-1000.0, 0.0])).round(4).tolist()
        [-1000.0, -0.693...]
    """
    return _logsigmoid(array(input, "input", "F.logsigmoid"))


@compiled
def _tanh(x: jax.Array) -> Any:
    return jnp.tanh(_as_float(x))


def tanh(input: ArrayLike) -> jax.Array:
    """Return the hyperbolic tangent elementwise; integers become floats.

    Args:
        input: any shape.

    Source: ``torch.nn.functional.tanh``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.tanh(jnp.array(0.0)))
        0.0
    """
    return _tanh(array(input, "input", "F.tanh"))


@compiled
def _tanhshrink(x: jax.Array) -> Any:
    if x.dtype == jnp.bool_:
        require_float(x, "input", "F.tanhshrink")
    x = _as_float(x)
    return x - jnp.tanh(x)


def tanhshrink(input: ArrayLike) -> jax.Array:
    """Return ``x - tanh(x)`` elementwise; integers become floats.

    Args:
        input: any shape.

    Source: ``torch.nn.functional.tanhshrink``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.tanhshrink(jnp.array([0.0, 100.0])).tolist()
        [0.0, 99.0]
    """
    return _tanhshrink(array(input, "input", "F.tanhshrink"))


@compiled
def _softsign(x: jax.Array) -> Any:
    if x.dtype == jnp.bool_:
        require_float(x, "input", "F.softsign")
    x = _as_float(x)
    return x / (1 + jnp.abs(x)).astype(x.dtype)


def softsign(input: ArrayLike) -> jax.Array:
    """Return ``x / (1 + |x|)`` elementwise; integers become floats.

    Args:
        input: any shape.

    Source: ``torch.nn.functional.softsign``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.softsign(jnp.array([-3.0, 0.0, 1.0])).tolist()
        [-0.75, 0.0, 0.5]
    """
    return _softsign(array(input, "input", "F.softsign"))


@functools.partial(compiled, static_argnums=(1, 2))
def _softplus(x: jax.Array, beta: float, threshold: float) -> Any:
    require_real_float(x, "input", "F.softplus")
    wide = widened(x)
    linear = wide * beta > threshold
    soft = -_log_sigmoid(wide * -beta) / jnp.asarray(beta, wide.dtype)
    return jnp.where(linear, wide, soft).astype(x.dtype)


def softplus(input: ArrayLike, beta: float = 1.0, threshold: float = 20.0) -> jax.Array:
    """Return ``log(1 + exp(beta · x)) / beta`` elementwise, a smooth relu.

    Args:
        input: any shape, floating.
        beta: how sharp the bend is.
        threshold: where ``beta · x`` is above it, x itself is returned.

    Source: ``torch.nn.functional.softplus``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.softplus(jnp.array([0.0, 30.0])).round(4).tolist()
        [0.693..., 30.0]
    """
    return _softplus(array(input, "input", "F.softplus"), beta, threshold)


@functools.partial(compiled, static_argnums=1)
def _gelu(x: jax.Array, approximate: str) -> Any:
    if approximate not in ("none", "tanh"):
        raise RuntimeError(
            explain(
                f"F.gelu was given approximate={approximate!r}",
                'there are two forms, "none" (exact) and "tanh"',
                'F.gelu(input, approximate="tanh")',
            )
        )
    require_real_float(x, "input", "F.gelu")
    wide = widened(x)
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * (wide * wide * wide))
        out = 0.5 * wide * (1 + jnp.tanh(inner))
    else:
        out = 0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))
    return out.astype(x.dtype)


def gelu(input: ArrayLike, approximate: str = "none") -> jax.Array:
    """Return ``x Φ(x)`` elementwise, Φ the distribution function of the normal distribution.

    Args:
        input: any shape, floating.
        approximate: "none" for the exact function, "tanh" for the usual approximation. The default
            is the exact one; ``jax.nn.gelu`` approximates by default (difference up to 4e-4).

    Raises:
        RuntimeError: if there is no such form.

    Source: Hendrycks and Gimpel 2016; ``torch.nn.functional.gelu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> round(float(F.gelu(jnp.array(1.0))), 4)
        0.8413
    """
    return _gelu(array(input, "input", "F.gelu"), approximate)


@compiled
def _silu(x: jax.Array) -> Any:
    require_float(x, "input", "F.silu")
    wide = widened(x)
    return (wide * lax.logistic(wide)).astype(x.dtype)


def silu(input: ArrayLike, inplace: bool = False) -> jax.Array:
    """Return ``x σ(x)`` elementwise, also called swish.

    Args:
        input: any shape, floating.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: Hendrycks and Gimpel 2016; Elfwing, Uchibe and Doya 2017; ``torch.nn.functional.silu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.silu(jnp.array(0.0)))
        0.0
    """
    return _silu(array(input, "input", "F.silu"))


def _mish_parts(x: jax.Array) -> tuple[Any, Any, Any]:
    # tanh(log(1 + n)) = (n² + 2n) / (n² + 2n + 2) for n = exp(x). From x = 20 on it is 1 in float64,
    # too, and n² would overflow further on.
    flat = x > 20
    n = jnp.exp(jnp.where(flat, jnp.asarray(20, x.dtype), x))
    a = n * (n + 2)
    return n, a, flat


@jax.custom_jvp
def _mish_of(x: jax.Array) -> Any:
    _, a, _ = _mish_parts(x)
    return x * (a / (a + 2))


@_mish_of.defjvp
def _mish_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # The quotient rule would subtract nearly equal numbers.
    (x,), (dx,) = primals, tangents
    n, a, flat = _mish_parts(x)
    inverse = 1 / (a + 2)
    bend = jnp.where(flat, jnp.zeros((), x.dtype), 4 * (a + 1) * inverse * inverse)
    slope = a * inverse + x * (n / (1 + n)) * bend
    return _mish_of(x), slope * dx


@compiled
def _mish(x: jax.Array) -> Any:
    require_real_float(x, "input", "F.mish")
    return _mish_of(widened(x)).astype(x.dtype)


def mish(input: ArrayLike, inplace: bool = False) -> jax.Array:
    """Return ``x · tanh(softplus(x))`` elementwise.

    Args:
        input: any shape, floating.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: Misra 2019; ``torch.nn.functional.mish``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.mish(jnp.array([0.0, 1.0])).round(4).tolist()
        [0.0, 0.865...]
    """
    return _mish(array(input, "input", "F.mish"))


@compiled
def _hardsigmoid(x: jax.Array) -> Any:
    require_real_float(x, "input", "F.hardsigmoid")
    wide = widened(x)
    limited = lax.stop_gradient(lax.clamp(jnp.zeros((), wide.dtype), wide + 3, _six(wide)))
    inside = (wide > -3) & (wide < 3)
    return (jnp.where(inside, wide + 3, limited) / 6).astype(x.dtype)


def _six(like: jax.Array) -> Any:
    return jnp.asarray(6, like.dtype)


def hardsigmoid(input: ArrayLike, inplace: bool = False) -> jax.Array:
    """Return ``relu6(x + 3) / 6`` elementwise; the derivative at -3 and 3 is 0.

    Args:
        input: any shape, floating.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: Courbariaux, Bengio and David 2015; ``torch.nn.functional.hardsigmoid``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.hardsigmoid(jnp.array([-4.0, 0.0, 4.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return _hardsigmoid(array(input, "input", "F.hardsigmoid"))


@compiled
def _hardswish(x: jax.Array) -> Any:
    require_real_float(x, "input", "F.hardswish")
    wide = widened(x)
    low, high = wide <= -3, wide >= 3
    # Bounded where another branch is taken: an infinity there would spoil the derivative.
    middle = jnp.where(low | high, jnp.zeros((), wide.dtype), wide)
    bent = middle * (middle + 3) / 6
    # The product keeps what is not a number: minus infinity gives NaN, as in torch.
    out = jnp.where(low, lax.stop_gradient(wide) * 0, jnp.where(high, wide, bent))
    return out.astype(x.dtype)


def hardswish(input: ArrayLike, inplace: bool = False) -> jax.Array:
    """Return ``x · relu6(x + 3) / 6`` elementwise; the derivative is 0 at -3 and 1 at 3.

    Args:
        input: any shape, floating.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: Howard et al. 2019; ``torch.nn.functional.hardswish``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.hardswish(jnp.array([-4.0, 0.0, 4.0])).tolist()
        [-0.0, 0.0, 4.0]
    """
    return _hardswish(array(input, "input", "F.hardswish"))


@functools.partial(compiled, static_argnums=(1, 2, 3))
def _shrunk(x: jax.Array, lambd: float, shift: float, function: str) -> Any:
    require_real_float(x, "input", function)
    rest = jnp.where(x == x, jnp.zeros((), x.dtype), lax.stop_gradient(x))  # NaN stays NaN
    return jnp.where(x > lambd, x - shift, jnp.where(x < -lambd, x + shift, rest))


def hardshrink(input: ArrayLike, lambd: float = 0.5) -> jax.Array:
    """Return x where ``|x| > lambd``, and 0 elsewhere.

    Args:
        input: any shape, floating.
        lambd: half the width of the band that becomes 0.

    Source: ``torch.nn.functional.hardshrink``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.hardshrink(jnp.array([-1.0, 0.5, 1.0])).tolist()
        [-1.0, 0.0, 1.0]
    """
    return _shrunk(array(input, "input", "F.hardshrink"), lambd, 0.0, "F.hardshrink")


def softshrink(input: ArrayLike, lambd: float = 0.5) -> jax.Array:
    """Move x towards 0 by `lambd`, and no further than 0.

    Args:
        input: any shape, floating.
        lambd: how far, not negative.

    Raises:
        RuntimeError: if `lambd` is negative.

    Source: ``torch.nn.functional.softshrink``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.softshrink(jnp.array([-1.0, 0.5, 1.0])).tolist()
        [-0.5, 0.0, 0.5]
    """
    if not lambd >= 0:
        raise RuntimeError(
            explain(
                f"F.softshrink was given lambd={lambd}",
                "it moves towards 0 by lambd, which is not negative",
                f"F.softshrink(input, {abs(lambd)})",
            )
        )
    return _shrunk(array(input, "input", "F.softshrink"), lambd, lambd, "F.softshrink")


@functools.partial(compiled, static_argnums=1)
def _glu(x: jax.Array, dim: int) -> Any:
    require_real_float(x, "input", "F.glu")
    if x.ndim == 0:
        raise shape_error(
            "F.glu was given input of shape ()",
            "it does not support scalars: one axis is halved",
            "an input with an axis of an even size",
        )
    axis = dimension(dim, x.ndim, "F.glu")
    if x.shape[axis] % 2:
        raise shape_error(
            f"F.glu was given input of shape {x.shape} and dim={dim}",
            f"that axis is halved, so its size must be even, and it is {x.shape[axis]}",
            "an input with twice as many features as the output is to have",
        )
    first, second = jnp.split(widened(x), 2, axis)
    return (first * lax.logistic(second)).astype(x.dtype)


def glu(input: ArrayLike, dim: int = -1) -> jax.Array:
    """Return ``a σ(b)``, a and b the halves of the input along an axis.

    Args:
        input: any shape with an axis of size 2n, floating.
        dim: that axis.

    Returns:
        The same shape with n in place of 2n.

    Raises:
        ShapeError: if the size is odd.

    Source: Dauphin et al. 2016; ``torch.nn.functional.glu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.glu(jnp.array([4.0, 0.0])).tolist()
        [2.0]
    """
    return _glu(array(input, "input", "F.glu"), dim)
