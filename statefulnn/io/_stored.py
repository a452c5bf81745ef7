"""Arrays that lie in a file: seen through a map of the file, or read into memory.

Reading is what loading a model costs, so large parts are read by several threads, straight into memory of
large pages: a quarter of the time that copying out of the map takes, and the file never counts as memory of
the process. A map is for whoever wants a part of an array, or none of its own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from statefulnn.core.box import host_array
from statefulnn.core.errors import CheckpointError, explain

# JAX takes memory over as it is if it starts at a multiple of this.
ALIGNMENT = 64
_PIECE = 16 << 20  # bytes of one read
_TOGETHER = 32 << 20  # bytes of arrays that share one block of memory


def broken(path: Path, offset: int, found: str, expected: str) -> CheckpointError:
    """Return the error for a file that is not as it should be, with the place."""
    return CheckpointError(
        explain(
            f"{path}, at byte {offset}: {found}",
            f"expected {expected}",
            "copy or download the file again, or load another checkpoint",
        )
    )


class Source:
    """An open file.

    Attributes:
        path: its name.
        size: its bytes.
        map: its contents. Writing to the map changes this process's copy of a page, never the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self.descriptor).st_size
        # An empty file cannot be mapped.
        self.map: Any = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY) if self.size else b""

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Stored:
    """An array in a file.

    Attributes:
        source: the file.
        start: its first byte.
        dtype, shape: what it is.
        strides: bytes from one element to the next, for each dimension.
    """

    __slots__ = ("dtype", "shape", "source", "start", "strides")

    def __init__(
        self,
        source: Source,
        start: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.source, self.start, self.dtype, self.shape = source, start, dtype, shape
        self.strides = _row_major(shape, dtype.itemsize) if strides is None else strides

    @property
    def size(self) -> int:
        """How many elements it has."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def nbytes(self) -> int:
        """The bytes of its elements, each counted once."""
        return self.size * self.dtype.itemsize

    @property
    def in_one_piece(self) -> bool:
        """Whether its elements lie behind one another as an array's in memory do."""
        steps = zip(
            self.shape, self.strides, _row_major(self.shape, self.dtype.itemsize), strict=True
        )
        return all(a == b for n, a, b in steps if n != 1)

    @property
    def view(self) -> np.ndarray:
        """The array where it lies, through the map."""
        if not self.size:
            return np.empty(self.shape, self.dtype)
        return np.ndarray(self.shape, self.dtype, self.source.map, self.start, self.strides)


def _row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def jax_has(dtype: np.dtype) -> bool:
    """Say whether JAX has a dtype, as it is set: those of 64 bits may be switched off."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def copied(view: np.ndarray) -> np.ndarray:
    """Return a copy in memory that JAX takes over as it is."""
    own = host_array(view.shape, view.dtype)
    own[...] = view
    return own


def read(stored: Iterable[Stored]) -> list[np.ndarray]:
    """Return arrays of a file, or several, each in memory of its own that JAX takes over as it is.

    Raises:
        CheckpointError: if a file became shorter since it was opened.
    """
    arrays: list[np.ndarray] = []
    pieces: list[tuple[Source, int, memoryview]] = []
    for group in _grouped(stored):
        room = sum(_padded(s.nbytes) for s in group if s.in_one_piece)
        block, at = host_memory(room), 0
        for s in group:
            if not s.in_one_piece or not s.nbytes:
                arrays.append(copied(s.view))
                continue
            own = block[at : at + s.nbytes]
            at += _padded(s.nbytes)
            arrays.append(own.view(s.dtype).reshape(s.shape))
            pieces += [
                (s.source, s.start + i, own[i : i + _PIECE].data)
                for i in range(0, s.nbytes, _PIECE)
            ]
    _fill(pieces)
    return arrays


def _grouped(stored: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Divide arrays into groups that share a block of memory, which is freed when the last of them is."""
    group: list[Stored] = []
    nbytes = 0
    for s in stored:
        group.append(s)
        nbytes += s.nbytes
        if nbytes >= _TOGETHER:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def host_memory(nbytes: int) -> np.ndarray:
    """Return bytes of memory, from large pages where the system has them, aligned for JAX."""
    if nbytes < _PIECE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return host_array((nbytes,), np.uint8)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8)


def _fill(pieces: list[tuple[Source, int, memoryview]]) -> None:
    """Read the pieces, by several threads if there is enough to read."""
    jobs: list[list[tuple[Source, int, memoryview]]] = [[]]
    room = _PIECE
    for piece in pieces:
        if room < len(piece[2]) and jobs[-1]:
            jobs.append([])
            room = _PIECE
        jobs[-1].append(piece)
        room -= len(piece[2])
    if len(jobs) == 1:
        _read_pieces(jobs[0])
        return
    with ThreadPoolExecutor(min(len(jobs), 4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(_read_pieces, jobs):
            pass


def _read_pieces(pieces: list[tuple[Source, int, memoryview]]) -> None:
    for source, at, memory in pieces:
        if not hasattr(os, "preadv"):  # Windows
            memory[:] = memoryview(source.map)[at : at + len(memory)]
            continue
        done = 0
        while done < len(memory):
            count = os.preadv(source.descriptor, [memory[done:]], at + done)
            if not count:
                wanted = f"{len(memory) - done} bytes more, as when it was opened"
                raise broken(source.path, at + done, "the file ends", wanted)
            done += count
