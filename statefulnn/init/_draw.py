"""Random numbers for initial values, without one compilation a shape.

A draw of n numbers is the start of a longer draw with the same key: position i depends on the key and on
i alone (`jax_threefry_partitionable`, JAX's default). So eager draws are made flat in a few fixed sizes,
each compiled once, and cut to shape; inside a trace the shape is drawn directly, and the values are the
same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import EAGER, Tracer, current_trace

_SMALLEST = 1 << 12


def _bucket(size: int) -> int:
    """Return the size that is drawn for `size` numbers: a power of two, few below 2**20."""
    bucket = _SMALLEST
    while bucket < size:
        bucket <<= 4 if bucket == _SMALLEST else 2 if bucket < (1 << 20) else 1
    return bucket


def _opaque(a: Any, b: Any, dtype: Any) -> tuple[Any, Any]:
    # Where the two numbers are constants XLA would rearrange the arithmetic around them, and round
    # differently from code in which they are arguments.
    return jax.lax.optimization_barrier((jnp.asarray(a, dtype), jnp.asarray(b, dtype)))


def _uniform(key: Any, low: Any, high: Any, shape: Sequence[int], dtype: Any) -> Any:
    low, high = _opaque(low, high, dtype)
    return jax.random.uniform(key, tuple(shape), dtype, low, high)


def _normal(key: Any, mean: Any, std: Any, shape: Sequence[int], dtype: Any) -> Any:
    mean, std = _opaque(mean, std, dtype)
    return jax.random.normal(key, tuple(shape), dtype) * std + mean


def _truncated(key: Any, low: Any, high: Any, shape: Sequence[int], dtype: Any) -> Any:
    return jax.random.truncated_normal(key, low, high, tuple(shape), dtype)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _flat(draw: Callable, key: Any, a: Any, b: Any, size: int, dtype: Any) -> Any:
    return draw(key, a, b, (size,), dtype)


def _drawn(draw: Callable, key: Any, a: float, b: float, shape: Sequence[int], dtype: Any) -> Any:
    # Half-precision values are rounded float32 draws: the generators' own would be coarser.
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    size = math.prod(shape)
    if current_trace() is EAGER and not isinstance(key, Tracer):
        flat = np.asarray(_flat(draw, key, a, b, _bucket(size), wide))
        return flat[:size].reshape(shape).astype(dtype)
    return _shaped(draw, key, a, b, tuple(shape), wide).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _shaped(draw: Callable, key: Any, a: Any, b: Any, shape: Sequence[int], dtype: Any) -> Any:
    return draw(key, a, b, shape, dtype)


def uniform(key: Any, low: float, high: float, shape: Sequence[int], dtype: Any) -> Any:
    """Draw from U(low, high): a numpy array in eager code, a traced one inside a trace."""
    return _drawn(_uniform, key, low, high, shape, dtype)


def normal(key: Any, mean: float, std: float, shape: Sequence[int], dtype: Any) -> Any:
    """Draw from N(mean, std²): a numpy array in eager code, a traced one inside a trace."""
    return _drawn(_normal, key, mean, std, shape, dtype)


def truncated_normal(key: Any, low: float, high: float, shape: Sequence[int], dtype: Any) -> Any:
    """Draw from N(0, 1) cut off at low and high."""
    return _drawn(_truncated, key, low, high, shape, dtype)
