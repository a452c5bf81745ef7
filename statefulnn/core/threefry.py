"""The counter-mode generator threefry2x32, in numpy: random words without a compilation.

A block is two counter words in, two random words out. `block` hashes one, `words` many: word number p of
a stream is word ``p % 2`` of block ``p // 2``, so a draw of n words is the start of a longer draw.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; ``jax.random``'s default.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 14  # blocks worked on together: few calls of numpy, and arrays that stay in the cache
_SPLIT = 1 << 16  # words from which on the work goes to several threads; numpy lets them run


def _schedule(k0: int, k1: int) -> tuple[int, int, int]:
    return k0, k1, k0 ^ k1 ^ 0x1BD11BDA


def block(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Return the two random words of one block."""
    ks = _schedule(*key)
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
    ks = _schedule(*key)
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
    """Fill a flat array with random numbers.

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

    def work(first: int, last: int) -> None:
        a, b, spare = (np.empty(_CHUNK, np.uint32) for _ in range(3))
        both = np.empty((_CHUNK, 2), np.uint32)
        for start in range(first, last, _CHUNK):
            m = min(_CHUNK, last - start)
            _blocks(key, start, a[:m], b[:m], spare[:m])
            both[:m, 0], both[:m, 1] = a[:m], b[:m]
            part = out[2 * start // per_number : 2 * (start + m) // per_number]
            convert(both[:m].reshape(-1)[: part.size * per_number], part)

    blocks = (n + 1) // 2
    if n < _SPLIT:
        work(0, blocks)
        return out
    # Whole chunks for each thread; the result does not depend on how the blocks are dealt out.
    chunks = -(-blocks // _CHUNK)
    pool, workers = _pool()
    bounds = [min(blocks, _CHUNK * (chunks * i // workers)) for i in range(workers + 1)]
    list(pool.map(work, bounds[:-1], bounds[1:]))
    return out


def words(key: tuple[int, int], n: int) -> Any:
    """Return the first n random words of a key, uint32."""

    def copy(drawn: Any, part: Any) -> None:
        part[...] = drawn

    return fill(key, np.empty(n, np.uint32), copy)


@functools.cache
def _pool() -> tuple[concurrent.futures.ThreadPoolExecutor, int]:
    workers = min(16, os.cpu_count() or 1)
    return concurrent.futures.ThreadPoolExecutor(workers, "statefulnn-draw"), workers
