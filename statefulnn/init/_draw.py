"""Random numbers for initial values: the same ones wherever they are drawn, mostly without a compilation.

Number p of a draw depends on the key and on p alone: it is made of word p of the key's stream, and word p is
``threefry2x32(key, p // 2)[p % 2]``. So numpy draws small arrays on the host, where nothing is compiled; a
traced, a sharded or a large draw on an accelerator is made by XLA in the shape and place where it is
wanted; and all give the same values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core import threefry
from statefulnn.core.arrays import host_array
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.generator import Generator, drawing_generator
from statefulnn.core.placement import Value, is_meta

# From this size on an accelerator draws for itself, at one compilation a shape.
_LARGE = 1 << 24
# Normal numbers are made of words by XLA, in arrays of these two sizes only.
_CHUNKS = (1 << 12, 1 << 16)

_F32 = np.dtype(np.float32)
_F64 = np.dtype(np.float64)


# --------------------------------------------------------------------------------------------------
# Words


def _traced_words(key: jax.Array, shape: Sequence[int], per_number: int) -> list[Any]:
    """Return the random words of each position of an array, as arrays of its shape."""
    size = math.prod(shape)
    if size > threefry.PART:
        raise ShapeError(
            explain(
                f"drew {size} initial values of shape {tuple(shape)} at once",
                "positions are counted in 32 bits in compiled code",
                "split the parameter into several",
            )
        )
    return threefry.traced_words(key, shape, per_number)


# --------------------------------------------------------------------------------------------------
# From words to numbers; `xp` is numpy or jax.numpy


def _signed_unit(words: Sequence[Any], xp: ModuleType) -> Any:
    """Return numbers of a lattice in [-1, 1) that floats represent exactly, from one or two words."""
    if len(words) == 1:
        bits = (words[0] >> np.uint32(9)) | np.uint32(0x40000000)  # in [2, 4)
        return _bitcast(bits, _F32, xp) - np.float32(3)
    high, low = (w.astype(np.uint64) for w in words)
    bits = (((high << np.uint64(32)) | low) >> np.uint64(12)) | np.uint64(0x4000000000000000)
    return _bitcast(bits, _F64, xp) - np.float64(3)


def _bitcast(bits: Any, dtype: np.dtype, xp: Any) -> Any:
    return bits.view(dtype) if xp is np else jax.lax.bitcast_convert_type(bits, dtype)


def _traced_uniform(
    words: Sequence[Any],
    centre: ArrayLike,
    half: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    dtype: np.dtype,
) -> Any:
    # Where the numbers are constants XLA would rearrange the arithmetic around them, and round
    # differently from code in which they are arguments.
    centre, half, low, high = jax.lax.optimization_barrier(
        tuple(jnp.asarray(v, dtype) for v in (centre, half, low, high))
    )
    return jnp.clip(_signed_unit(words, jnp) * half + centre, low, high)


def _traced_normal(
    words: Sequence[Any],
    centre: ArrayLike,
    half: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    dtype: np.dtype,
) -> Any:
    """Return N(mean, std²) between low and high: the inverse of the distribution function."""
    centre, half, mean, std, low, high = jax.lax.optimization_barrier(
        tuple(jnp.asarray(v, dtype) for v in (centre, half, mean, std, low, high))
    )
    # The barrier keeps XLA from folding the two constants into one, which rounds the half step away.
    unit = jax.lax.optimization_barrier(_signed_unit(words, jnp))
    # Half a step to the right: symmetric, and never ±1, where the inverse is infinite.
    unit = unit + np.asarray(2.0**-23 if dtype == _F32 else 2.0**-52, dtype)
    z = jax.lax.erf_inv(unit * half + centre) * np.asarray(math.sqrt(2), dtype)
    return jnp.clip(z * std + mean, low, high)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _compiled(
    draw: Callable[..., jax.Array],
    key: jax.Array,
    numbers: tuple,
    shape: Sequence[int],
    dtype: np.dtype,
) -> Any:
    words = _traced_words(key, shape, 2 if dtype == _F64 else 1)
    return draw(words, *numbers, dtype)


@functools.partial(jax.jit, static_argnums=2)
def _normal_of_words(words: Sequence[jax.Array], numbers: tuple, dtype: np.dtype) -> Any:
    return _traced_normal(words, *numbers, dtype=dtype)


# --------------------------------------------------------------------------------------------------
# Where to draw


def _wide(dtype: DTypeLike) -> np.dtype:
    """Return the dtype of the draw: half-precision values are rounded float32 draws."""
    return _F64 if dtype == _F64 else _F32


def _on_host(generator: Generator, like: Like | Value) -> bool:
    """Say whether a draw for an array (its shape, and where it is) is made by numpy."""
    if current_trace() is not EAGER or not generator.is_concrete():
        return False
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return True
    devices = sharding.device_set
    if len(devices) > 1 and not sharding.is_fully_replicated:
        return False
    return like.size < _LARGE or next(iter(devices)).platform == "cpu"


class Like(NamedTuple):
    """A shape and dtype to draw for, where there is no array yet."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def _placed(draw: Callable[..., jax.Array], generator: Generator, numbers: tuple, like: Any) -> Any:
    """Draw by XLA: inside a trace, or right where the array is."""
    key = generator.next_key()
    shape, dtype = tuple(like.shape), _wide(like.dtype)
    if current_trace() is not EAGER:
        return _compiled(draw, key, numbers, shape, dtype).astype(like.dtype)
    make = jax.jit(
        lambda key: _compiled(draw, key, numbers, shape, dtype).astype(like.dtype),
        out_shardings=like.sharding,
    )
    return make(jax.random.key_data(key))


def uniform(generator: Generator | None, low: float, high: float, like: Like | Value) -> Any:
    """Draw from U(low, high).

    Args:
        generator: where to draw from; None for the generator in force.
        low: the lower bound.
        high: the upper bound.
        like: the array that the draw is to replace; what is on the meta device stays as it is.

    Returns:
        A numpy array, or a JAX array where `like` is.
    """
    if is_meta(like):
        return like
    generator = drawing_generator(generator)
    dtype = _wide(like.dtype)
    centre, half = np.asarray((low + high) / 2, dtype), np.asarray((high - low) / 2, dtype)
    bottom = np.asarray(low, dtype)
    top = np.nextafter(np.asarray(high, dtype), bottom)  # the upper bound is open
    if not _on_host(generator, like):
        return _placed(_traced_uniform, generator, (centre, half, bottom, top), like)
    out = host_array((like.size,), dtype)

    def convert(words: np.ndarray, part: np.ndarray) -> None:
        unit = _signed_unit([words] if dtype == _F32 else [words[::2], words[1::2]], np)
        if not centre:
            np.multiply(unit, half, out=part)  # one rounding
        elif dtype == _F32:
            # XLA multiplies and adds with one rounding; in double precision the product is exact.
            part[...] = unit.astype(np.float64) * half.astype(np.float64) + centre.astype(
                np.float64
            )
        else:
            part[...] = unit * half + centre
        np.clip(part, bottom, top, out=part)

    threefry.fill(generator.next_words(), out, convert, 2 if dtype == _F64 else 1)
    return out.reshape(like.shape).astype(like.dtype, copy=False)


def normal(
    generator: Generator | None,
    mean: float,
    std: float,
    like: Like | Value,
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """Draw from N(mean, std²), cut off at low and high.

    Args:
        generator: where to draw from; None for the generator in force.
        mean: the mean before cutting.
        std: the standard deviation before cutting, positive unless nothing is cut.
        like: the array that the draw is to replace; what is on the meta device stays as it is.
        low: the lower bound.
        high: the upper bound.

    Returns:
        A numpy array, or a JAX array where `like` is.
    """
    if is_meta(like):
        return like
    generator = drawing_generator(generator)
    dtype = _wide(like.dtype)
    # The distribution function at the bounds, scaled to [-1, 1]: what is drawn lies between.
    first = math.erf((low - mean) / (std * math.sqrt(2))) if low > -math.inf else -1.0
    last = math.erf((high - mean) / (std * math.sqrt(2))) if high < math.inf else 1.0
    numbers = ((first + last) / 2, (last - first) / 2, mean, std, low, high)
    numbers = tuple(np.asarray(v, dtype) for v in numbers)
    if not _on_host(generator, like):
        return _placed(_traced_normal, generator, numbers, like)
    size, per_number = like.size, 2 if dtype == _F64 else 1
    drawn = threefry.words(generator.next_words(), size * per_number)
    out = host_array((size,), dtype)
    chunk = _CHUNKS[size > _CHUNKS[0]]
    for start in range(0, size, chunk):
        part = drawn[start * per_number : (start + chunk) * per_number]
        count = part.size // per_number
        if count < chunk:
            part = np.concatenate([part, np.zeros((chunk - count) * per_number, np.uint32)])
        words = [part[i::per_number] for i in range(per_number)]
        out[start : start + count] = np.asarray(_normal_of_words(words, numbers, dtype))[:count]
    return out.reshape(like.shape).astype(like.dtype, copy=False)
