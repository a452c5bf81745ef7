"""The formulas: arrays to codes and constants, and back.

Terms
  codes       integers that say for each number which of a few values it is.
  constants   what turns codes into numbers: scales of rows or blocks. They have the weight's dtype, so that
              casting a model casts what is computed from them; all arithmetic is in float32 or wider.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.functional._checks import widened
from statefulnn.functional._compiled import compiled

# The values of NormalFloat 4: quantiles of a normal distribution, 0 and both ends among them. Dettmers et al.
# 2023, arXiv:2305.14314, appendix E; the digits are those of bitsandbytes.
NF4_VALUES = np.array(
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0".split(),
    np.float32,
)
BLOCK = 64  # numbers with one constant
CONSTANTS = 256  # constants that are stored in 8 bits with one step

_MIDDLES = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
# A byte holds two codes, the first one above: one look-up gives both values.
_PAIRS = np.stack([np.repeat(NF4_VALUES, 16), np.tile(NF4_VALUES, 16)], axis=1)


@compiled
def int8_codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ``round(x / scale)`` in int8 and the scales ``absmax / 127``, one for each row of `x`."""
    wide = widened(x)
    absmax = jnp.max(jnp.abs(wide), axis=tuple(range(1, x.ndim)), keepdims=True)
    scale = (absmax / 127).astype(x.dtype)  # rounded first, so that codes fit what is stored
    steps = jnp.round(wide / _not_zero(widened(scale)))
    return jnp.clip(steps, -127, 127).astype(jnp.int8), scale


@compiled
def int8_values(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Return ``codes * scale``."""
    return (codes.astype(widened(scale).dtype) * widened(scale)).astype(scale.dtype)


@compiled
def nf4_codes(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the codes of an array, two in a byte, and its constants, quantised themselves.

    Blocks of 64 numbers, in the order in which they lie, are divided by their largest size, and each number
    becomes the nearest of the 16 values. Of the sizes their mean is taken off, and the rest is stored in int8
    by blocks of 256.

    Returns:
        ``(bytes, constants, steps, mean)`` of shapes ``(32 B,)``, ``(B,)``, ``(ceil(B / 256), 1)`` and ``()``
        for B blocks. Where no block is filled up and the last axis is even, the bytes have the shape of `x`
        with half of that axis.
    """
    blocks = _rows(widened(x), BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    normed = blocks / _not_zero(absmax)[:, None]
    codes = jnp.zeros(normed.shape, jnp.uint8)
    for middle in _MIDDLES:
        codes += (normed > middle).astype(jnp.uint8)
    pairs = codes.reshape(-1, 2)
    whole = x.size % BLOCK == 0 and x.shape[-1] % 2 == 0
    shape = (*x.shape[:-1], x.shape[-1] // 2) if whole else (-1,)
    mean = jnp.mean(absmax).astype(x.dtype)
    constants, steps = int8_codes(_rows(absmax - widened(mean), CONSTANTS))
    constants = constants.reshape(-1)[: len(absmax)]
    return (pairs[:, 0] * 16 + pairs[:, 1]).reshape(shape), constants, steps.astype(x.dtype), mean


def _nf4_values(
    codes: jax.Array, constants: jax.Array, steps: jax.Array, mean: jax.Array, shape: tuple
) -> jax.Array:
    """Return the array of a shape that `nf4_codes` was given, but for what it lost."""
    wide = widened(mean)
    per_constant = jnp.repeat(widened(steps)[:, 0], CONSTANTS)[: len(constants)]
    # Beside a much larger one a constant may come out below 0, which would turn signs round.
    absmax = jnp.maximum(constants.astype(wide.dtype) * per_constant + wide, 0)
    pairs = jnp.asarray(_PAIRS, wide.dtype)[codes.reshape(-1).astype(jnp.int32)]
    values = (pairs.reshape(-1, BLOCK) * absmax[:, None]).reshape(-1)
    return values[: math.prod(shape)].reshape(shape).astype(mean.dtype)


nf4_values = compiled(_nf4_values, static_argnames="shape")


def _rows(x: jax.Array, length: int) -> jax.Array:
    """Return the numbers in rows of a length, the last one filled up with zeros."""
    return jnp.pad(x.reshape(-1), (0, -x.size % length)).reshape(-1, length)


def _not_zero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1, scale)


@compiled
def relative_error(x: jax.Array, other: jax.Array) -> jax.Array:
    """Return the norm of the difference over that of `x`."""
    x, other = widened(x), widened(other)
    norm = lambda x: jnp.sqrt(jnp.sum(x * x))
    return norm(x - other) / _not_zero(norm(x))
