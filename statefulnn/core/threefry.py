"""The counter-mode generator threefry2x32: random words that depend on a key and a position alone.

A block is two counter words in, two random words out. Word number p of a stream is word ``p % 2`` of block
``p // 2``, so a draw of n words is the start of a longer draw. They are computed by numpy, which compiles
nothing (`fill`), or by XLA, inside the code that uses them (`traced_words`).

Written out, rather than taken from ``jax.random``: for two million words on two CPU cores JAX 0.10.2 takes
0.4 s to compile and 10 ms to run, this 0.1 s and 3 ms, and XLA fuses it with what uses the words.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; ``jax.random``'s default.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from statefulnn.core.errors import explain

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_MASK = 0xFFFFFFFF
# Blocks worked on together. One thread is fastest with arrays that stay in its cache; several spend their
# time handing over Python's lock unless each call of numpy is long.
_CHUNK = 1 << 14
_CHUNK_OF_THREADS = 1 << 17
# As many elements of an array are counted by one word.
PART = 1 << 32


# --------------------------------------------------------------------------------------------------
# In Python and numpy


def block(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Return the two random words of one block, of integers."""
    ks = (*key, key[0] ^ key[1] ^ _PARITY)
    a, b = (counter[0] + ks[0]) & _MASK, (counter[1] + ks[1]) & _MASK
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            a = (a + b) & _MASK
            b = (((b << r) & _MASK) | (b >> (32 - r))) ^ a
        a = (a + ks[(group + 1) % 3]) & _MASK
        b = (b + ks[(group + 2) % 3] + group + 1) & _MASK
    return a, b


def _blocks(key: tuple[int, int], start: int, a: Any, b: Any, spare: Any) -> None:
    """Fill `a` and `b` with the words of the blocks from number `start` on."""
    ks = (*key, key[0] ^ key[1] ^ _PARITY)
    first = np.arange(start, start + a.size, dtype=np.uint64)
    a[...] = first >> np.uint64(32)
    a += np.uint32(ks[0])
    b[...] = first & np.uint64(_MASK)
    b += np.uint32(ks[1])
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            np.add(a, b, out=a)
            np.left_shift(b, np.uint32(r), out=spare)
            np.right_shift(b, np.uint32(32 - r), out=b)
            np.bitwise_or(b, spare, out=b)
            np.bitwise_xor(b, a, out=b)
        np.add(a, np.uint32(ks[(group + 1) % 3]), out=a)
        np.add(b, np.uint32((ks[(group + 2) % 3] + group + 1) & _MASK), out=b)


def fill(
    key: tuple[int, int], out: Any, convert: Callable[[Any, Any], None], per_number: int = 1
) -> Any:
    """Fill a flat array with random numbers, by numpy.

    Args:
        key: two words.
        out: ``(n,)``, of any dtype.
        convert: called with random words, uint32 ``(m · per_number,)``, and the m numbers of `out` that
            are to be made of them; it writes those.
        per_number: how many words make a number, 1 or 2.

    Returns:
        `out`.
    """
    n = out.size * per_number  # words

    def work(first: int, last: int, chunk: int) -> None:
        a, b, spare = (np.empty(min(chunk, last - first), np.uint32) for _ in range(3))
        both = np.empty((a.size, 2), np.uint32)
        for start in range(first, last, chunk):
            m = min(chunk, last - start)
            _blocks(key, start, a[:m], b[:m], spare[:m])
            both[:m, 0], both[:m, 1] = a[:m], b[:m]
            part = out[2 * start // per_number : 2 * (start + m) // per_number]
            convert(both[:m].reshape(-1)[: part.size * per_number], part)

    blocks = (n + 1) // 2
    chunks = -(-blocks // _CHUNK_OF_THREADS)
    if chunks < 2:
        work(0, blocks, _CHUNK)
        return out
    # Whole chunks for each thread; the result does not depend on how the blocks are dealt out.
    pool, workers = _pool()
    bounds = [min(blocks, _CHUNK_OF_THREADS * (chunks * i // workers)) for i in range(workers + 1)]
    list(pool.map(functools.partial(work, chunk=_CHUNK_OF_THREADS), bounds[:-1], bounds[1:]))
    return out


def words(key: tuple[int, int], n: int) -> Any:
    """Return the first n random words of a key, uint32, by numpy."""

    def copy(drawn: Any, part: Any) -> None:
        part[...] = drawn

    return fill(key, np.empty(n, np.uint32), copy)


@functools.cache
def _pool() -> tuple[concurrent.futures.ThreadPoolExecutor, int]:
    workers = min(16, os.cpu_count() or 1)
    return concurrent.futures.ThreadPoolExecutor(workers, "statefulnn-draw"), workers


# --------------------------------------------------------------------------------------------------
# In compiled code


def key_words(key: Any) -> Any:
    """Return the two words of a random key, typed or raw, of any implementation: uint32 ``(2,)``.

    Raises:
        TypeError: for anything else.
    """
    data = (jax.random.key_data(key) if require_key(key) else key).reshape(-1).astype(jnp.uint32)
    if data.size == 2:
        return data
    # Implementations differ in the number of words: they are folded to the two that threefry takes.
    data = jnp.concatenate([data, jnp.zeros((-data.size) % 2, jnp.uint32)]).reshape(-1, 2)
    folded = data[0]
    for pair in data[1:]:
        folded = folded ^ pair
    return folded


def require_key(key: Any) -> bool:
    """Raise unless an array is one random key; return whether it is a typed one."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and (key.dtype != jnp.uint32 or key.ndim != 1):
        raise no_key(f"an array of dtype {key.dtype} and shape {key.shape}")
    if typed and key.ndim != 0:
        raise no_key(f"an array of {key.shape} keys")
    return typed


def no_key(given: str) -> TypeError:
    """Return the error for what is no random key."""
    return TypeError(
        explain(
            f"took {given} as a random key or seed",
            "a stream starts at one key or one integer",
            "jax.random.key(0), or an integer; for a key per lane call it under jax.vmap",
        )
    )


def hashed(key: Any, high: Any, low: Any) -> tuple[Any, Any]:
    """Return the two random words of each block.

    Args:
        key: uint32 ``(2,)``.
        high: the first counter word of the blocks, uint32.
        low: the second, of the same shape.
    """
    ks = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    a, b = high + ks[0], low + ks[1]
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            a = a + b
            b = ((b << np.uint32(r)) | (b >> np.uint32(32 - r))) ^ a
        a = a + ks[(group + 1) % 3]
        b = b + ks[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def traced_words(key: Any, shape: Sequence[int], per_number: int = 1) -> list[Any]:
    """Return the random words of each position of an array: `per_number` arrays of its shape.

    Args:
        key: a random key, typed or raw.
        shape: the array's.
        per_number: how many words each position takes, 1 or 2.
    """
    high, position = _positions(tuple(shape))
    counter = position if per_number == 2 else position >> np.uint32(1)
    a, b = hashed(key_words(key), high, counter)
    # Half of the words are computed in vain; interleaving two halves would go through memory.
    return [a, b] if per_number == 2 else [jnp.where(position & np.uint32(1) == 0, a, b)]


def _positions(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the part of an array each element is in, and its number there, as uint32.

    An array of up to `PART` elements is one part; a larger one is divided along its first axes.
    """
    part = number = jnp.zeros(shape, jnp.uint32)
    stride, parts = 1, 0
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        if not parts and stride * shape[axis] <= PART:
            number += index * np.uint32(stride & _MASK)
            stride *= shape[axis]
        else:
            parts = parts or 1
            part += index * np.uint32(parts)
            parts *= shape[axis]
    return part, number


def traced_unit(key: Any, shape: Sequence[int]) -> Any:
    """Return float32 numbers of U[0, 1), all multiples of 2⁻²³."""
    (drawn,) = traced_words(key, shape)
    bits = (drawn >> np.uint32(9)) | np.uint32(0x3F800000)  # in [1, 2)
    return lax.bitcast_convert_type(bits, jnp.float32) - np.float32(1)
