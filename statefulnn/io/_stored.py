"""Arrays in a file: seen through a map of the file, or read into memory.

Most of the time of loading a model goes into reading. So several threads read large parts, straight into the
memory where they stay, in a quarter of the time that copying out of a map of the file takes. The map is for
users who ask for arrays that stay in the file.
"""

from __future__ import annotations

import errno
import io
import math
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from statefulnn.core.arrays import host_array
from statefulnn.io._reading import Budget, broken

# JAX takes over memory as it is if it starts at a multiple of this.
ALIGNMENT = 64
_PIECE = 16 << 20  # bytes of one read
# Bytes of arrays that share one block of memory: large enough for large pages, and small enough for the C
# library to reuse freed blocks (from 32 MiB on each block is new, and the system clears it first).
_TOGETHER = 8 << 20


# numpy has no arrays with more dimensions, nor with sizes this large.
_MOST_DIMENSIONS, _TOO_LARGE = 64, 1 << 63
# A claimed length larger than this is compared with the file before memory is taken for it.
_SMALL = 1 << 16
_LONGEST_LINE = 1 << 20
_WASTE = 4  # at most this many times the wanted bytes are read where there are gaps between them
_MOST_BUFFERS = 256  # the most buffers that the system fills in one call


class Source:
    """An open file.

    Args:
        path: its name.
        budget: what may be built from it.

    Attributes:
        path: its name.
        size: its bytes.
        map: its contents. Writing to the map changes this process's copy of a page, never the file. If
            somebody shortens the file, pages vanish from the map, and a process that reads them is killed:
            so whatever `read` can read is not read from here.

    Raises:
        CheckpointError: for anything that is not a regular file, such as a pipe: reading it might never end.
        OSError: if it does not exist, or may not be read.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        self.path = path
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        self.descriptor = os.open(path, flags)
        status = os.fstat(self.descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise broken(path, 0, "a pipe, a socket or a device", "a file")
        self.size = status.st_size
        budget.opened(self.size)
        # An empty file cannot be mapped.
        self.map: Any = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY) if self.size else b""

    def read(self, start: int, count: int) -> bytes:
        """Return bytes of the file, fewer if it ends before."""
        count = min(count, self.size - start)
        if start < 0 or count <= 0:
            return b""
        if not hasattr(os, "pread"):  # Windows
            return self.map[start : start + count]
        parts = [os.pread(self.descriptor, count, start)]
        while parts[-1] and (count := count - len(parts[-1])):  # a call returns 2 GiB at most
            start += len(parts[-1])
            parts.append(os.pread(self.descriptor, count, start))
        return b"".join(parts)

    def reader(self) -> Reader:
        """Return a reader at the beginning of the file, with a position of its own."""
        return Reader(_Raw(self))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Raw(io.RawIOBase):
    """Reads the file of a `Source`, from a position of its own."""

    def __init__(self, source: Source) -> None:
        self.source, self.position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        found = self.source.read(self.position, len(buffer))
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.source.size}[whence]
        if begin + offset < 0:
            raise ValueError("a position before the file")
        self.position = begin + offset
        return self.position


class Reader(io.BufferedReader):
    """Reads a file, and takes no more memory than the file has bytes."""

    def __init__(self, raw: _Raw) -> None:
        super().__init__(raw)
        self._size = raw.source.size

    def read(self, size: int | None = -1, /) -> bytes:
        """Return this many bytes, fewer if the file ends before."""
        if size is None or not 0 <= size <= _SMALL:
            rest = max(0, self._size - self.tell())
            size = rest if size is None or size < 0 else min(size, rest)
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return the bytes up to the end of the line; of a very long line only the beginning."""
        return super().readline(_LONGEST_LINE)


def misshapen(shape: Sequence[Any], itemsize: int) -> str:
    """Say why no array can have a shape; an empty text if one can.

    There may be 64 sizes, integers from 0 to below 2**63. Zeros are left out of the product, as in numpy.
    """
    if len(shape) > _MOST_DIMENSIONS:
        return f"{len(shape)} dimensions"
    nbytes = itemsize
    for n in shape:
        if type(n) is not int or not 0 <= n < _TOO_LARGE:
            return "sizes that are none"
        nbytes *= n or 1
    return "more elements than there is memory anywhere" if nbytes >= _TOO_LARGE else ""


class Stored:
    """An array in a file.

    Attributes:
        source: the file.
        start: its first byte.
        dtype, shape: as of an array; `misshapen` has found nothing wrong.
        strides: bytes from one element to the next, for each dimension.
        conjugated, negated: what is to be done to the numbers after reading them.
        nbytes: the bytes of its elements, each counted once.
        as_it_lies: whether the bytes in the file are those of a contiguous array in memory.
    """

    __slots__ = (
        "as_it_lies",
        "conjugated",
        "dtype",
        "nbytes",
        "negated",
        "shape",
        "source",
        "start",
        "strides",
    )

    def __init__(
        self,
        source: Source,
        start: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        conjugated: bool = False,
        negated: bool = False,
    ) -> None:
        self.source, self.start, self.dtype, self.shape = source, start, dtype, shape
        self.strides, self.conjugated, self.negated = strides, conjugated, negated
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.as_it_lies = not (conjugated or negated) and (
            strides is None or _lie_together(shape, strides, dtype.itemsize)
        )

    @property
    def view(self) -> np.ndarray:
        """The array as a view of the map; a copy if it is conjugated or negated."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        strides = self._steps()
        return self._as_meant(
            np.ndarray(self.shape, self.dtype, self.source.map, self.start, strides)
        )

    def part(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return the array, or a part of it, in new memory that JAX can take over as it is.

        Args:
            index: a slice for each dimension, with steps of 1; None for all of it.

        Raises:
            CheckpointError: if the file has become shorter since it was opened.
        """
        steps, start, shape = self._steps(), self.start, list(self.shape)
        for i, piece in enumerate(index or ()):
            first, stop, _ = piece.indices(shape[i])
            start, shape[i] = start + first * steps[i], max(0, stop - first)
        own = host_array(tuple(shape), self.dtype)
        if own.size:
            # Dimensions with larger steps come first; the order of the dimensions in memory does not matter.
            order = sorted(range(len(shape)), key=lambda i: -steps[i])
            _read_strided(
                self.source,
                start,
                own.transpose(order),
                [shape[i] for i in order],
                [steps[i] for i in order],
            )
        return self._as_meant(own)

    def _steps(self) -> tuple[int, ...]:
        if self.strides is not None:
            return self.strides
        steps, step = [], self.dtype.itemsize
        for n in reversed(self.shape):
            steps.append(step)
            step *= n
        return tuple(reversed(steps))

    def _as_meant(self, lying: np.ndarray) -> np.ndarray:
        lying = np.conjugate(lying) if self.conjugated else lying
        return np.negative(lying) if self.negated else lying


def _read_strided(
    source: Source, start: int, into: np.ndarray, shape: list[int], steps: list[int]
) -> None:
    """Read elements that are steps apart, with the largest steps first.

    Elements with small gaps between them are read with the gaps, in one call. Wide gaps are left out.
    """
    wanted = span = into.itemsize
    inner = len(shape)
    while (
        inner
        and span + (shape[inner - 1] - 1) * steps[inner - 1] <= _WASTE * wanted * shape[inner - 1]
    ):
        inner -= 1
        span += (shape[inner] - 1) * steps[inner]
        wanted *= shape[inner]
    for index in np.ndindex(*shape[:inner]):
        at = start + sum(i * step for i, step in zip(index, steps, strict=False))
        content = source.read(at, span)
        if len(content) < span:
            wanted_bytes = f"{span - len(content)} bytes more, as when it was opened"
            raise broken(source.path, at + len(content), "the file ends", wanted_bytes)
        into[index] = np.ndarray(
            tuple(shape[inner:]), into.dtype, content, strides=tuple(steps[inner:])
        )


def check_booleans(array: np.ndarray) -> None:
    """Raise for booleans whose byte is neither 0 nor 1, since libraries differ in what they count as.

    Raises:
        ValueError: if there is one.
    """
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("a boolean that is neither 0 nor 1")


def _lie_together(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    step = itemsize
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


# A file, the byte where a part of it starts, and the memory the part goes to.
Piece = tuple[Source, int, np.ndarray]


def jax_has(dtype: np.dtype) -> bool:
    """Say whether JAX has a dtype under its current settings: 64-bit types may be off."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def read(stored: Iterable[Stored]) -> list[np.ndarray]:
    """Return arrays of one or several files, in new memory that JAX can take over as it is.

    Raises:
        CheckpointError: if a file has become shorter since it was opened.
    """
    arrays: list[np.ndarray] = []
    pieces: list[Piece] = []
    for group in _grouped(stored):
        room = sum(_padded(s.nbytes) for s in group if s.as_it_lies)
        block, at = host_array((room,), np.uint8), 0
        for s in group:
            if not s.as_it_lies or not s.nbytes:
                arrays.append(s.part())
                continue
            end = at + s.nbytes
            # One call instead of three (slice, view, reshape): there may be many small arrays.
            arrays.append(np.ndarray(s.shape, s.dtype, block, at))
            pieces += [
                (s.source, s.start + i, block[at + i : min(at + i + _PIECE, end)])
                for i in range(0, s.nbytes, _PIECE)
            ]
            at += _padded(s.nbytes)
    _fill(pieces)
    return arrays


def _grouped(stored: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Divide arrays into groups. Each shares a block of memory, which is freed with its last array."""
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


def _fill(pieces: list[Piece]) -> None:
    """Read the pieces, with several threads if there is enough to read."""
    jobs: list[list[Piece]] = [[]]
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


def _read_pieces(pieces: list[Piece]) -> None:
    for source, at, memory in _in_runs(pieces):
        if not hasattr(os, "preadv"):  # Windows
            for part in memory:
                part[:] = memoryview(source.map)[at : at + len(part)]
                at += len(part)
            continue
        while memory:
            count = os.preadv(source.descriptor, memory, at)
            if not count:
                wanted = f"{sum(map(len, memory))} bytes more, as when it was opened"
                raise broken(source.path, at, "the file ends", wanted)
            at += count
            while memory and count >= len(memory[0]):
                count -= len(memory.pop(0))
            if memory:  # a call may stop in the middle
                memory[0] = memory[0][count:]


def _in_runs(pieces: list[Piece]) -> Iterator[tuple[Source, int, list[Any]]]:
    """Join pieces that follow one another in a file, so that one system call reads them."""
    run: list[Any] = []
    begin = end = 0
    last: Source | None = None
    for source, at, memory in pieces:
        if run and (source is not last or at != end or len(run) == _MOST_BUFFERS):
            assert last is not None
            yield last, begin, run
            run = []
        if not run:
            begin = end = at
        run.append(memory)
        last, end = source, end + len(memory)
    if run and last is not None:
        yield last, begin, run
