"""Elementwise non-linearities, and softmax."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.functional._checks import array, dimension, require_float, widened


@jax.jit
def _relu(x: Any) -> Any:
    # Written as a choice so that the derivative at 0 is 0; NaN is not <= 0 and passes through.
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


def relu(input: Any, inplace: bool = False) -> Any:
    """Return ``max(x, 0)`` elementwise; the derivative at 0 is 0.

    Args:
        input: any shape.
        inplace: accepted for torch's sake; arrays are immutable.

    Source: ``torch.nn.functional.relu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.relu(jnp.array([-1.0, 0.0, 2.0])).tolist()
        [0.0, 0.0, 2.0]
    """
    return _relu(array(input, "input", "F.relu"))


@functools.partial(jax.jit, static_argnums=1)
def _gelu(x: Any, approximate: str) -> Any:
    dtype = x.dtype
    x = widened(x)
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
        out = 0.5 * x * (1 + jnp.tanh(inner))
    else:
        out = 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))
    return out.astype(dtype)


def gelu(input: Any, approximate: str = "none") -> Any:
    """Return ``x Φ(x)`` elementwise, Φ the distribution function of the normal distribution.

    Args:
        input: any shape, floating.
        approximate: "none" for the exact function, "tanh" for the usual approximation. The default
            is the exact one; ``jax.nn.gelu`` approximates by default (difference up to 4e-4).

    Source: Hendrycks and Gimpel 2016; ``torch.nn.functional.gelu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> round(float(F.gelu(jnp.array(1.0))), 4)
        0.8413
    """
    x = array(input, "input", "F.gelu")
    if x.dtype.kind in "iub":
        require_float(x, "input", "F.gelu")
    if approximate not in ("none", "tanh"):
        raise RuntimeError(
            f"F.gelu was given approximate={approximate!r}\n"
            '  Why: there are two forms, "none" (exact) and "tanh"\n'
            '  Instead: F.gelu(input, approximate="tanh")'
        )
    return _gelu(x, approximate)


@jax.jit
def _silu(x: Any) -> Any:
    wide = widened(x)
    return (wide * lax.logistic(wide)).astype(x.dtype)


def silu(input: Any, inplace: bool = False) -> Any:
    """Return ``x σ(x)`` elementwise, also called swish.

    Args:
        input: any shape, floating.
        inplace: accepted for torch's sake; arrays are immutable.

    Source: ``torch.nn.functional.silu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.silu(jnp.array(0.0)))
        0.0
    """
    x = array(input, "input", "F.silu")
    if x.dtype.kind in "iub":
        require_float(x, "input", "F.silu")
    return _silu(x)


def _as_float(x: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


@jax.jit
def _tanh(x: Any) -> Any:
    return jnp.tanh(_as_float(x))


def tanh(input: Any) -> Any:
    """Return the hyperbolic tangent elementwise; integers become floats.

    Source: ``torch.nn.functional.tanh``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.tanh(jnp.array(0.0)))
        0.0
    """
    return _tanh(array(input, "input", "F.tanh"))


@jax.jit
def _sigmoid(x: Any) -> Any:
    return lax.logistic(_as_float(x))


def sigmoid(input: Any) -> Any:
    """Return ``1 / (1 + exp(-x))`` elementwise; integers become floats.

    Source: ``torch.nn.functional.sigmoid``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> float(F.sigmoid(jnp.array(0.0)))
        0.5
    """
    return _sigmoid(array(input, "input", "F.sigmoid"))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _softmax(x: Any, axis: int, dtype: Any, log: bool) -> Any:
    x = x.astype(dtype)
    if x.ndim == 0:
        return _softmax(x[None], 0, dtype, log)[0]
    if x.shape[axis] == 0:
        return x
    wide = widened(x)
    # The maximum only keeps exp in range; the result does not depend on it, nor do its derivatives.
    shifted = wide - lax.stop_gradient(jnp.max(wide, axis, keepdims=True))
    if log:
        out = shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis, keepdims=True))
    else:
        out = jnp.exp(shifted)
        out = out / jnp.sum(out, axis, keepdims=True)
    return out.astype(dtype)


def _normalised_exponential(
    input: Any, dim: int | None, dtype: Any, function: str, log: bool
) -> Any:
    x = array(input, "input", function)
    if dim is None:
        warnings.warn(
            f"{function} was called without dim, and took "
            f"{0 if x.ndim in (0, 1, 3) else 1} as old torch code expects; write it: dim=-1",
            UserWarning,
            stacklevel=3,
        )
        dim = 0 if x.ndim in (0, 1, 3) else 1
    axis = dimension(dim, x.ndim, function)
    if dtype is None:
        require_float(x, "input", function)
        dtype = x.dtype
    return _softmax(x, axis, jnp.dtype(dtype), log)


def softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """Return ``exp(x) / sum(exp(x))`` along one axis.

    Args:
        input: any shape, floating.
        dim: the axis that sums to one. Leaving it out is deprecated, as in torch.
        dtype: a dtype to cast to first.

    Returns:
        An array of the same shape. A slice that is all -inf gives NaN.

    Source: ``torch.nn.functional.softmax``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.softmax(jnp.zeros((1, 4)), dim=-1).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    return _normalised_exponential(input, dim, dtype, "F.softmax", False)


def log_softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """Return ``log(softmax(x))`` along one axis, computed without overflow.

    Args:
        input: any shape, floating.
        dim: the axis to normalise. Leaving it out is deprecated, as in torch.
        dtype: a dtype to cast to first.

    Source: ``torch.nn.functional.log_softmax``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.log_softmax(jnp.array([0.0, 1000.0]), dim=0).tolist()
        [-1000.0, 0.0]
    """
    return _normalised_exponential(input, dim, dtype, "F.log_softmax", True)
