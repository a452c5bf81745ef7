"""Reads files of torch.save without torch: a pickle of containers, and the memory of storages.

There are three formats. The newest is a zip archive. Its predecessor is a series of pickles with the storages
behind them. Up to torch 0.1.9 it was a tar archive. Sizes are compared with the file's before memory is
taken for them.

Source: torch/serialization.py of torch 2.13.
"""

from __future__ import annotations

import struct
import zipfile
from typing import Any

import numpy as np

from statefulnn.io._contents import Contents
from statefulnn.io._formats import MAGIC, foreign_archive, named
from statefulnn.io._reading import OF_OBJECTS, Budget, broken, check_versions, shown
from statefulnn.io._stored import Source, Stored
from statefulnn.io._torch_pickle import (
    ALL_NAMES,
    TENSOR_NAMES,
    Dtype,
    NumpyArray,
    NumpyDtype,
    Storage,
    Tensor,
    is_count,
    storage_name,
    storage_of,
)
from statefulnn.io._unpickling import Machine, Named
from statefulnn.io.placeholder import Placeholder

_PROTOCOL = 1001
_BLOCK = 512  # bytes of a block of a tar archive
# Python's record of an entry of a zip archive takes about this many times the bytes of the entry.
_ENTRY = 20

# Key of a storage -> where its bytes are: the first, and how many.
Memory = dict[str, tuple[int, int]]


def load_torch(source: Source, budget: Budget, strict: bool) -> Any:
    """Return what is in a file, with a `Stored` for each tensor.

    Args:
        source: what ``torch.save`` wrote.
        budget: pays for what is built.
        strict: whether foreign classes are an error; otherwise they become a `Placeholder`.

    Raises:
        CheckpointError: if the file is damaged, or holds anything but data.
    """
    head = source.read(0, _BLOCK)
    names = TENSOR_NAMES if strict else ALL_NAMES
    machine = Machine(source.path, names, storage_of, budget, strict)
    read = _zipped if head[:2] == b"PK" else _tarred if is_tar(head) else _legacy
    root, memory = read(source, machine)
    contents = Contents(source.path, root, budget=budget)
    for versions in contents.versions.values():
        check_versions(source.path, versions)
    done: dict[int, Any] = {}
    once: dict[tuple[str, str], Stored] = {}  # a tensor under several names is one array
    for leaf in contents.leaves:
        if type(leaf) is Tensor:
            if leaf.identity not in once:
                once[leaf.identity] = _stored(source, leaf, memory)
            done[id(leaf)] = once[leaf.identity]
        elif type(leaf) in (Dtype, NumpyDtype):
            done[id(leaf)] = leaf.dtype
        elif type(leaf) in (Named, Storage):
            is_name = type(leaf) is Named
            if strict:
                what = "a function or class" if is_name else "a storage"
                expected = "tensors, numbers, texts and containers"
                raise broken(source.path, 0, f"{what} as data", expected)
            done[id(leaf)] = (
                Placeholder(leaf.name)
                if is_name
                else Placeholder("torch.UntypedStorage", (leaf.key, leaf.numel))
            )
    for part in contents.containers:
        if type(part) is NumpyArray and part.array is not None:
            done[id(part)] = part.array
    return contents.exchanged(done)


def is_tar(head: bytes) -> bool:
    """Say whether a file with this beginning is a tar archive."""
    return head[257:262] == b"ustar"


# --------------------------------------------------------------------------------------------------
# The formats


def _zipped(source: Source, machine: Machine) -> tuple[Any, Memory]:
    path, reader = source.path, _Counted(source, machine.budget)
    try:
        with zipfile.ZipFile(reader) as archive:  # pyright: ignore[reportArgumentType]
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        what = shown(str(error))[1:-1]
        raise broken(path, 0, what, "a whole zip archive, as torch.save writes it") from None
    found = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    foreign = foreign_archive(path, members)
    if foreign is not None:
        raise foreign
    if len(found) != 1:
        raise broken(path, 0, f"an archive with {len(found)} entries data.pkl", "one of them")
    root = found[0][: -len("data.pkl")]

    def place(name: str) -> tuple[int, int]:
        info = members[name]
        at = info.header_offset
        header = source.read(at, 30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise broken(path, at, f"no entry {shown(name)}", "the entry that the archive lists")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise named(
                path,
                f"an archive in which {shown(name)} is compressed, as torch.save does not do",
                "in torch: torch.save(torch.load(path), other_path)",
            )
        start = at + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > source.size:
            raise broken(
                path, at, f"{shown(name)} of {info.file_size} bytes", "no more than the file has"
            )
        return start, info.file_size

    order = f"{root}byteorder"
    if order in members and source.read(*place(order)) != b"little":
        raise broken(
            path, members[order].header_offset, "a file of a big-endian machine", "little-endian"
        )
    at, nbytes = place(found[0])
    machine.budget.spend(nbytes)
    state = machine.run(source.read(at, nbytes), at)
    prefix = f"{root}data/"
    return state, {n[len(prefix) :]: place(n) for n in members if n.startswith(prefix)}


class _Counted:
    """The file from which ``zipfile`` reads the list of an archive; what that becomes is paid for first."""

    def __init__(self, source: Source, budget: Budget) -> None:
        self._reader, self._budget = source.reader(), budget
        self.seek, self.tell, self.seekable = (
            self._reader.seek,
            self._reader.tell,
            self._reader.seekable,
        )

    def read(self, size: int = -1) -> bytes:
        found = self._reader.read(size)
        self._budget.allow(OF_OBJECTS * len(found))
        self._budget.spend(_ENTRY * len(found))
        return found


def _legacy(source: Source, machine: Machine) -> tuple[Any, Memory]:
    path, file = source.path, source.reader()
    for number in (MAGIC, _PROTOCOL):
        found = machine.run(file)
        if type(found) is not int or found != number:
            raise broken(path, 0, "a pickle of something else", "what torch.save wrote")
    system = machine.run(file)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise broken(path, 0, "a file of a big-endian machine", "a little-endian one")
    dtypes: dict[str, np.dtype] = {}

    def storage(key: Any) -> Any:
        found = storage_of(key)
        if type(found) is Storage:
            dtypes[found.key] = found.dtype
        return found

    machine.persistent = storage
    state = machine.run(file)
    keys = machine.run(file)
    if type(keys) is not list or not all(type(k) is str for k in keys):
        raise broken(path, file.tell(), "no list of storages", "the keys of the storages")
    at, memory = file.tell(), {}
    for key in keys:
        memory[key] = _behind(source, at, dtypes.get(key, np.dtype(np.uint8)), source.size)
        at = sum(memory[key])
    return state, memory


def _behind(source: Source, at: int, dtype: np.dtype, end: int) -> tuple[int, int]:
    """Return where a storage is whose length is written at byte `at` of the file."""
    numel = int.from_bytes(source.read(at, 8), "little", signed=True)
    nbytes = numel * dtype.itemsize
    if numel < 0 or at + 8 + nbytes > end:
        raise broken(source.path, at, f"a storage of {numel} elements", "no more than the file has")
    return at + 8, nbytes


def _tarred(source: Source, machine: Machine) -> tuple[Any, Memory]:
    members = _members(source, machine.budget)
    if not {"storages", "tensors", "pickle"} <= members.keys():
        what = "a tar archive that torch.save did not write"
        raise named(source.path, what, "unpack it: tar -xf")
    tables = _TarTables(source, machine)
    tables.read_storages(*members["storages"])
    tensors = tables.read_tensors(members["tensors"][0])

    def tensor(key: object) -> Tensor:
        return tensors[key if type(key) is int else int(key) if type(key) is str else -1]

    machine.persistent = tensor
    start, size = members["pickle"]
    machine.budget.spend(size)
    return machine.run(source.read(start, size), start), tables.memory


class _TarTables:
    """The two tables of a tar archive: where each storage is, and which part of one each tensor is.

    Attributes:
        memory: where storages are, views of them too.
    """

    def __init__(self, source: Source, machine: Machine) -> None:
        self.source, self.machine = source, machine
        self.path, self.file = source.path, source.reader()
        self.memory: Memory = {}
        self.dtypes: dict[str, np.dtype] = {}

    def next_object(self, kind: type, length: int | None = None) -> Any:
        at = self.file.tell()
        found = self.machine.run(self.file)
        if type(found) is not kind or (length is not None and len(found) != length):
            what = f"{type(found).__name__} in the pickle"
            raise broken(self.path, at, what, f"{kind.__name__}")
        return found

    def name_of(self, key: Any) -> str:
        try:
            return storage_name(key)
        except ValueError as error:
            raise broken(self.path, self.file.tell(), str(error), "a text or a number") from None

    def read_storages(self, start: int, size: int) -> None:
        path, file, memory, dtypes = self.path, self.file, self.memory, self.dtypes
        file.seek(start)
        for _ in range(self.next_object(int)):
            key, _, kind = self.next_object(tuple, 3)
            if type(kind) is not Dtype:
                raise broken(
                    path, file.tell(), "a storage of no type", "such as torch.FloatStorage"
                )
            key = self.name_of(key)
            dtypes[key] = kind.dtype
            memory[key] = _behind(self.source, file.tell(), kind.dtype, start + size)
            file.seek(sum(memory[key]))
        for view in self.next_object(list):
            target, root, offset, numel = (
                view if type(view) is tuple and len(view) == 4 else [0] * 4
            )
            root = self.name_of(root)
            first, nbytes = memory.get(root, (0, 0))
            width = dtypes.get(root, np.dtype(np.uint8)).itemsize
            fits = root in memory and is_count(offset) and is_count(numel)
            if not fits or (offset + numel) * width > nbytes:
                raise broken(path, file.tell(), f"a view {shown(view)}", "a part of a storage")
            target = self.name_of(target)
            dtypes[target] = dtypes[root]
            memory[target] = first + offset * width, numel * width

    def read_tensors(self, start: int) -> dict[int, Tensor]:
        path, file, source, memory = self.path, self.file, self.source, self.memory
        file.seek(start)
        tensors: dict[int, Tensor] = {}
        for _ in range(self.next_object(int)):
            key, storage, _ = self.next_object(tuple, 3)
            storage, at = self.name_of(storage), file.tell()
            ndim = int.from_bytes(source.read(at, 4), "little")
            numbers = source.read(at + 8, 8 * (2 * ndim + 1)) if ndim <= 64 else b""
            whole = len(numbers) == 8 * (2 * ndim + 1)
            if not is_count(key) or storage not in memory or not whole:
                what = f"tensor {shown(key)} of {ndim} dimensions"
                raise broken(path, at, what, "one of a storage")
            *sizes, offset = struct.unpack(f"<{2 * ndim + 1}q", numbers)
            file.seek(at + 8 + len(numbers))
            all_of_it = Storage(self.dtypes[storage], storage, memory[storage][1])
            self.machine.budget.spend(len(numbers) * 8)
            try:
                tensors[key] = Tensor(all_of_it, offset, sizes[:ndim], sizes[ndim:])
            except ValueError as error:
                raise broken(path, at, str(error), "sizes and strides") from None
        return tensors


def _members(source: Source, budget: Budget) -> dict[str, tuple[int, int]]:
    """Return where the files in a tar archive are, by name: the first byte, and how many."""
    members: dict[str, tuple[int, int]] = {}
    at = 0
    while (header := source.read(at, _BLOCK)) and header[:1] != b"\0":
        try:
            # The sum of the header's bytes, with blanks instead of the checksum itself.
            checksum = int(header[148:156].strip(b" \0"), 8)
            size = int(header[124:136].strip(b" \0"), 8)
        except ValueError:
            checksum, size = -1, -1
        if checksum != sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") or size < 0:
            raise broken(source.path, at, "a header that is damaged", "one of a tar archive")
        start = at + _BLOCK
        if start + size > source.size:
            raise broken(source.path, at, f"{size} bytes", "no more than the file has")
        if header[156:157] in (b"0", b"\0"):  # a file, not an extra header for one
            budget.spend(_BLOCK)
            members[header[:100].rstrip(b"\0").decode("latin1")] = start, size
        at = start + -(-size // _BLOCK) * _BLOCK
    return members


# --------------------------------------------------------------------------------------------------
# Arrays


def _stored(source: Source, tensor: Tensor, memory: Memory) -> Stored:
    storage = tensor.storage
    if storage.key not in memory:
        raise broken(
            source.path, 0, f"no storage {shown(storage.key)}", "every storage that a tensor names"
        )
    (first, nbytes), itemsize = memory[storage.key], tensor.dtype.itemsize
    have = nbytes // itemsize
    # If a tensor has another dtype than its storage, the storage counts bytes.
    offset = storage.first * storage.dtype.itemsize // itemsize + tensor.offset
    last = offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    if 0 not in tensor.size and last >= have:
        raise broken(
            source.path,
            first,
            f"a tensor of shape {shown(tensor.size)} and stride {shown(tensor.stride)} from {offset} on",
            f"one that fits into the {have} elements of its storage {shown(storage.key)}",
        )
    return Stored(
        source,
        first + offset * itemsize,
        tensor.dtype,
        tensor.size,
        tuple(s * itemsize for s in tensor.stride),
        tensor.conjugated,
        tensor.negated,
    )
