"""Normalised exponentials along an axis."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import user_stack_level
from statefulnn.functional._checks import array, dimension, require_real_float, widened
from statefulnn.functional._compiled import compiled
from statefulnn.functional._random import drawing


def _exponentials(x: jax.Array, axis: int, log: bool) -> Any:
    if x.ndim == 0:
        return _exponentials(x[None], 0, log)[0]
    if x.shape[axis] == 0:
        return x
    return _log_normalised(x, axis) if log else _normalised(x, axis)


def _shifted(x: jax.Array, axis: int) -> Any:
    # The maximum only keeps exp in range; the result does not depend on it, nor do its derivatives.
    return x - lax.stop_gradient(jnp.max(x, axis, keepdims=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normalised(x: jax.Array, axis: int) -> Any:
    out = jnp.exp(_shifted(x, axis))
    return out / jnp.sum(out, axis, keepdims=True)


@_normalised.defjvp
def _normalised_jvp(axis: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # Of the result alone: the chain rule through the quotient would keep the exponentials as well.
    out = _normalised(*primals, axis)
    along = out * tangents[0]
    return out, along - out * jnp.sum(along, axis, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_normalised(x: jax.Array, axis: int) -> Any:
    shifted = _shifted(x, axis)
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis, keepdims=True))


@_log_normalised.defjvp
def _log_normalised_jvp(axis: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    out = _log_normalised(*primals, axis)
    (dx,) = tangents
    return out, dx - jnp.sum(jnp.exp(out) * dx, axis, keepdims=True)


@functools.partial(compiled, static_argnums=(1, 2, 3, 4, 5))
def _softmax(
    x: jax.Array, dim: int, dtype: DTypeLike | None, log: bool, negative: bool, function: str
) -> Any:
    axis = dimension(dim, x.ndim, function)
    if dtype is None:
        require_real_float(x, "input", function)
        dtype = x.dtype
    x = (-x if negative else x).astype(dtype)
    return _exponentials(widened(x), axis, log).astype(dtype)


def _implicit_dim(x: jax.Array, function: str) -> int:
    dim = 0 if x.ndim in (0, 1, 3) else 1
    warnings.warn(
        f"Implicit dimension choice for {function} has been deprecated: it took dim={dim}, as old "
        f"torch code expects; write it: dim={dim}, or dim=-1 for the last axis",
        UserWarning,
        stacklevel=user_stack_level(),
    )
    return dim


def softmax(
    input: ArrayLike, dim: int | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> jax.Array:
    """Return ``exp(x) / sum(exp(x))`` along one axis.

    Args:
        input: any shape, floating.
        dim: the axis that sums to one. Leaving it out is deprecated, as in torch.
        dtype: a dtype to cast to first.

    Returns:
        An array of the same shape. A slice that is all -inf gives NaN.

    Raises:
        IndexError: if there is no such axis.

    Source: ``torch.nn.functional.softmax``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.softmax(jnp.zeros((1, 4)), dim=-1).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    x = array(input, "input", "F.softmax")
    dim = _implicit_dim(x, "F.softmax") if dim is None else dim
    return _softmax(x, dim, dtype, False, False, "F.softmax")


def log_softmax(
    input: ArrayLike, dim: int | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> jax.Array:
    """Return ``log(softmax(x))`` along one axis, computed without overflow.

    Args:
        input: any shape, floating.
        dim: the axis to normalise. Leaving it out is deprecated, as in torch.
        dtype: a dtype to cast to first.

    Raises:
        IndexError: if there is no such axis.

    Source: ``torch.nn.functional.log_softmax``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.log_softmax(jnp.array([0.0, 1000.0]), dim=0).tolist()
        [-1000.0, 0.0]
    """
    x = array(input, "input", "F.log_softmax")
    dim = _implicit_dim(x, "F.log_softmax") if dim is None else dim
    return _softmax(x, dim, dtype, True, False, "F.log_softmax")


def softmin(
    input: ArrayLike, dim: int | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> jax.Array:
    """Return ``softmax(-x)`` along one axis.

    Args:
        input: any shape, floating.
        dim: the axis that sums to one. Leaving it out is deprecated, as in torch.
        dtype: a dtype to cast to first.

    Raises:
        IndexError: if there is no such axis.

    Source: ``torch.nn.functional.softmin``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.softmin(jnp.array([0.0, 1000.0]), dim=0).tolist()
        [1.0, 0.0]
    """
    x = array(input, "input", "F.softmin")
    dim = _implicit_dim(x, "F.softmin") if dim is None else dim
    return _softmax(x, dim, dtype, False, True, "F.softmin")


def _gumbel_kernel(key: jax.Array, logits: jax.Array, tau: ArrayLike, hard: bool, dim: int) -> Any:
    require_real_float(logits, "logits", "F.gumbel_softmax")
    axis = dimension(dim, logits.ndim, "F.gumbel_softmax")
    wide = widened(logits)
    noise = jax.random.gumbel(key, wide.shape, wide.dtype)
    soft = _exponentials((wide + noise) / jnp.asarray(tau, wide.dtype), axis, False)
    if hard and soft.size:
        chosen = jnp.argmax(soft, axis, keepdims=True) if soft.ndim else jnp.zeros((), jnp.int32)
        places = lax.broadcasted_iota(chosen.dtype, soft.shape, axis) if soft.ndim else chosen
        one_hot = (places == chosen).astype(soft.dtype)
        # Straight through: the value is one-hot, the derivative that of the soft sample.
        soft = one_hot - lax.stop_gradient(soft) + soft
    return soft.astype(logits.dtype)


_gumbel_softmax = drawing(_gumbel_kernel, static_argnums=(3, 4))


def gumbel_softmax(
    logits: ArrayLike,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Draw from the Gumbel-Softmax distribution: a differentiable sample of one category.

    Args:
        logits: ``(*, num_features)``, unnormalised log probabilities, floating.
        tau: the temperature; near 0 samples are nearly one-hot.
        hard: return one-hot samples, with the derivative of the soft ones.
        eps: has no effect, as in torch.
        dim: the axis of the categories.
        rng: a random key; without one the draw comes from the generator in force.

    Returns:
        Samples of the same shape, which sum to 1 along `dim`.

    Raises:
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Jang, Gu and Poole 2016; Maddison, Mnih and Teh 2016;
    ``torch.nn.functional.gumbel_softmax``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> F.gumbel_softmax(jnp.zeros((2, 3)), hard=True, rng=jax.random.key(0)).sum(-1).tolist()
        [1.0, 1.0]
    """
    if eps != 1e-10:
        warnings.warn(
            "`eps` parameter is deprecated and has no effect.",
            UserWarning,
            stacklevel=user_stack_level(),
        )
    return _gumbel_softmax(rng, array(logits, "logits", "F.gumbel_softmax"), tau, hard, dim)
