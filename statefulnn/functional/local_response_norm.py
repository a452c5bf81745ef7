"""Normalisation by the neighbouring channels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.functional._checks import array, require_real_float, shape_error, widened
from statefulnn.functional._compiled import compiled

# Up to this many neighbours a sum of shifted arrays, which XLA fuses, beats a moving window.
_UNROLLED = 16


def _sum_of_neighbours(x: jax.Array, before: int, after: int) -> Any:
    """Return for each channel (axis 1) the sum over the channels around it, zeros outside."""
    channels = x.shape[1]
    before, after = min(before, channels - 1), min(after, channels - 1)
    size = before + after + 1
    padding = [(0, 0, 0)] * x.ndim
    padding[1] = (before, after, 0)
    padded = lax.pad(x, jnp.zeros((), x.dtype), padding)
    if size > _UNROLLED:
        window = (1, size, *(1,) * (x.ndim - 2))
        # A start that is no traced value: otherwise it counts as a reduction without a derivative.
        zero = np.zeros((), x.dtype)
        return lax.reduce_window(padded, zero, lax.add, window, (1,) * x.ndim, "VALID")
    shifted = [lax.slice_in_dim(padded, i, i + channels, axis=1) for i in range(size)]
    return functools.reduce(lax.add, shifted)


def _powered(scale: jax.Array, beta: float) -> Any:
    return lax.pow(scale, jnp.asarray(beta, scale.dtype))


@functools.partial(compiled, static_argnums=(1, 2, 3, 4))
def _local_response_norm(x: jax.Array, size: int, alpha: float, beta: float, k: float) -> Any:
    if x.ndim < 3:
        raise shape_error(
            f"F.local_response_norm was given input of shape {x.shape}",
            f"expected 3D or higher dimensionality input (got {x.ndim} dimensions): (N, C, *)",
            "add the missing axes: input[None]",
        )
    require_real_float(x, "input", "F.local_response_norm")
    if x.size == 0:
        return x
    wide = widened(x)
    total = _sum_of_neighbours(wide * wide, size // 2, (size - 1) // 2)
    return (wide / _powered(total * (alpha / size) + k, beta)).astype(x.dtype)


def local_response_norm(
    input: ArrayLike, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
    """Divide each channel by ``(k + alpha · mean of squares over `size` channels around it) ** beta``.

    Channels that do not exist count as zeros.

    Args:
        input: ``(N, C, *)`` with at least one spatial axis.
        size: the number of channels in the mean.
        alpha: its factor.
        beta: the exponent.
        k: what is added to the mean.

    Returns:
        An array of the input's shape and dtype.

    Raises:
        ShapeError: if there are fewer than three axes, or `size` is not positive.

    Source: Krizhevsky, Sutskever and Hinton 2012; ``torch.nn.functional.local_response_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.local_response_norm(jnp.ones((1, 2, 1)), 2, alpha=2.0, beta=1.0).ravel().tolist()
        [0.5, 0.333...]
    """
    if size < 1:
        raise shape_error(
            f"F.local_response_norm was given size={size}",
            "the number of channels in the mean should be greater than zero",
            "F.local_response_norm(input, 5)",
        )
    x = array(input, "input", "F.local_response_norm")
    return _local_response_norm(x, size, alpha, beta, k)


@functools.partial(compiled, static_argnums=(1, 2, 3, 4))
def _cross_map_lrn2d(x: jax.Array, size: int, alpha: float, beta: float, k: float) -> Any:
    if x.ndim != 4:
        raise shape_error(
            f"CrossMapLRN2d was given input of shape {x.shape}",
            f"expected input to be 4D, got {x.ndim}D instead: (N, C, H, W)",
            "add the missing axes: input[None]",
        )
    require_real_float(x, "input", "CrossMapLRN2d")
    if x.size == 0:
        return x
    wide = widened(x)
    squares = wide * wide
    reach = int((size - 1) / 2)
    total = _sum_of_neighbours(squares, reach, reach)
    # Torch's running sum never drops channel 0 once the window has left it behind, and checkpoints
    # were trained with that.
    left_behind = jnp.arange(x.shape[1]) > reach
    total = total + jnp.where(left_behind[:, None, None], squares[:, :1], 0)
    return (wide * _powered(total * (alpha / size) + k, -beta)).astype(x.dtype)


def cross_map_lrn2d(input: ArrayLike, size: int, alpha: float, beta: float, k: float) -> jax.Array:
    """Compute what `nn.CrossMapLRN2d` does.

    Args:
        input: ``(N, C, H, W)``.
        size: the number of channels in the mean.
        alpha: its factor.
        beta: the exponent.
        k: what is added to the mean.
    """
    return _cross_map_lrn2d(array(input, "input", "CrossMapLRN2d"), size, alpha, beta, k)
