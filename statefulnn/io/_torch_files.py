"""Files that torch.save wrote, read without torch: a pickle of containers, and the memory of storages.

There are three formats: a zip archive; before it a row of pickles with the storages behind them; and before
that, up to torch 0.1.9, a tar archive. Sizes are checked against the file before memory is taken for them.

Source: torch/serialization.py of torch 2.13.
"""

from __future__ import annotations

import collections
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._safetensors import LONGEST_HEADER
from statefulnn.io._stored import Source, Stored, broken
from statefulnn.io._torch_pickle import Builder, Storage, Tensor, Unpickler

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# An expanded tensor has more elements than its storage; up to this many bytes that is believed.
_EXPANDED = 1 << 26
_BLOCK = 512  # of a tar archive

# Where the bytes of a storage are, by its key: the first, and how many.
Memory = dict[str, tuple[int, int]]


def is_torch_file(head: bytes) -> bool:
    """Say whether a file that begins with these 512 bytes is for `load_torch`, and not safetensors."""
    # The length of a safetensors header may begin with the bytes of a pickle or an archive.
    if head[:4] == b"PK\x03\x04":
        return head[8:9] != b"{"
    old = head[:1] == b"\x80" or _is_tar(head)
    return old and int.from_bytes(head[:8], "little") > LONGEST_HEADER


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def load_torch(path: Path, placed: Callable[[dict[Any, Stored]], Mapping[Any, Any]]) -> Any:
    """Return what is in a file, with arrays for tensors.

    Args:
        path: what ``torch.save`` wrote.
        placed: makes arrays of what is stored, by the same keys; it is called once, for all tensors.

    Raises:
        CheckpointError: for files that are damaged, or hold anything but data.
    """
    source = Source(path)
    head = source.map[:_BLOCK]
    read = _zipped if head[:2] == b"PK" else _tarred if _is_tar(head) else _legacy
    content, memory = read(source)
    parts = list(_inside_out(path, content))
    tensors = [part for part in parts if isinstance(part, Tensor)]
    stored: dict[tuple, Stored] = {}
    for tensor in tensors:
        if tensor.identity not in stored:  # a tensor under several names is one array
            stored[tensor.identity] = _stored(source, tensor, memory)
    arrays = placed(stored)
    return _rebuilt(content, parts, {id(t): arrays[t.identity] for t in tensors})


# --------------------------------------------------------------------------------------------------
# The formats


def _zipped(source: Source) -> tuple[Any, Memory]:
    path, mapped = source.path, source.map
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise broken(path, 0, str(error), "a whole zip archive, as torch.save writes it") from None
    found = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
        raise broken(path, 0, f"an archive with {len(found)} entries data.pkl", "one of them")
    root = found[0][: -len("data.pkl")]
    if f"{root}constants.pkl" in members:
        raise CheckpointError(
            explain(
                f"{path} is a TorchScript archive",
                "it holds code, which only torch runs",
                "in torch: torch.save(torch.jit.load(path).state_dict(), other_path)",
            )
        )

    def place(name: str) -> tuple[int, int]:
        info = members[name]
        at = info.header_offset
        header = mapped[at : at + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise broken(path, at, f"no entry {name!r}", "the entry that the archive lists")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise broken(path, at, f"{name!r}, compressed", "an entry as torch.save stores it")
        start = at + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > source.size:
            raise broken(
                path, at, f"{name!r} of {info.file_size} bytes", "no more than the file has"
            )
        return start, info.file_size

    def content(name: str) -> bytes:
        start, nbytes = place(name)
        return bytes(mapped[start : start + nbytes])

    order = f"{root}byteorder"
    if order in members and content(order) != b"little":
        raise broken(
            path, members[order].header_offset, "a file of a big-endian machine", "little-endian"
        )
    pickled = content(found[0])
    state = Unpickler(path, io.BytesIO(pickled), place(found[0])[0]).read_object()
    prefix = f"{root}data/"
    return state, {n[len(prefix) :]: place(n) for n in members if n.startswith(prefix)}


def _legacy(source: Source) -> tuple[Any, Memory]:
    # Read through the map: a file would take memory for any length that the pickle claims.
    path, file = source.path, source.map
    for number in (_MAGIC, _PROTOCOL):
        if Unpickler(path, file).read_object() != number:
            raise broken(path, 0, "a pickle of something else", "what torch.save wrote")
    machine = Unpickler(path, file).read_object()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise broken(path, 0, "a file of a big-endian machine", "a little-endian one")
    unpickler = Unpickler(path, file)
    state = unpickler.read_object()
    keys = Unpickler(path, file).read_object()
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise broken(path, file.tell(), "no list of storages", "the keys of the storages")
    dtypes = unpickler.dtypes
    return state, {k: _behind(source, dtypes.get(k, np.dtype(np.uint8)), source.size) for k in keys}


def _behind(source: Source, dtype: np.dtype, end: int) -> tuple[int, int]:
    """Return where a storage is whose length comes next in the file, and go behind it."""
    file, at = source.map, source.map.tell()
    numel = int.from_bytes(file[at : at + 8], "little", signed=True)
    nbytes = numel * dtype.itemsize
    if numel < 0 or at + 8 + nbytes > end:
        raise broken(source.path, at, f"a storage of {numel} elements", "no more than the file has")
    file.seek(at + 8 + nbytes)
    return at + 8, nbytes


def _tarred(source: Source) -> tuple[Any, Memory]:
    path, file = source.path, source.map
    members = _members(source)
    missing = [name for name in ("storages", "tensors", "pickle") if name not in members]
    if missing:
        raise broken(path, 0, f"an archive without {missing[0]!r}", "what torch.save wrote")

    def next_object(kind: type, length: int | None = None) -> Any:
        at = file.tell()
        found = Unpickler(path, file).read_object()
        if type(found) is not kind or length is not None and len(found) != length:
            raise broken(path, at, f"{type(found).__name__} in the pickle", f"{kind.__name__}")
        return found

    start, size = members["storages"]
    file.seek(start)
    memory: Memory = {}
    dtypes: dict[str, np.dtype] = {}
    for _ in range(next_object(int)):
        key, _, dtype = next_object(tuple, 3)
        if not isinstance(dtype, np.dtype):
            raise broken(path, file.tell(), "a storage of no type", "such as torch.FloatStorage")
        dtypes[str(key)] = dtype
        memory[str(key)] = _behind(source, dtype, start + size)
    for view in next_object(list):
        target, root, offset, numel = (
            view if isinstance(view, tuple) and len(view) == 4 else [0] * 4
        )
        first, nbytes = memory.get(str(root), (0, 0))
        width = dtypes.get(str(root), np.dtype(np.uint8)).itemsize
        if not _counts(offset, numel) or (offset + numel) * width > nbytes:
            raise broken(path, file.tell(), f"a view {view!r}", "a part of a storage")
        dtypes[str(target)] = dtypes[str(root)]
        memory[str(target)] = first + offset * width, numel * width

    start, size = members["tensors"]
    file.seek(start)
    tensors: dict[int, Tensor] = {}
    for _ in range(next_object(int)):
        key, storage, _ = next_object(tuple, 3)
        at = file.tell()
        ndim = int.from_bytes(file[at : at + 4], "little")
        numbers = file[at + 8 : at + 8 + 8 * (2 * ndim + 1)] if ndim <= 64 else b""
        if type(key) is not int or str(storage) not in memory or len(numbers) != 8 * (2 * ndim + 1):
            raise broken(path, at, f"tensor {key!r} of {ndim} dimensions", "one of a storage")
        *sizes, offset = struct.unpack(f"<{2 * ndim + 1}q", numbers)
        file.seek(at + 8 + len(numbers))
        whole = Storage(dtypes[str(storage)], str(storage), memory[str(storage)][1])
        if not _counts(*sizes, offset):
            raise broken(path, at, f"tensor {key!r} of negative sizes", "sizes and strides")
        tensors[key] = Tensor(whole, offset, sizes[:ndim], sizes[ndim:])

    start, size = members["pickle"]
    pickled = io.BytesIO(file[start : start + size])
    return Unpickler(path, pickled, start, tensors).read_object(), memory


def _counts(*values: Any) -> bool:
    return all(type(v) is int and v >= 0 for v in values)


def _members(source: Source) -> dict[str, tuple[int, int]]:
    """Return where the files of a tar archive are, by name: the first byte, and how many."""
    members: dict[str, tuple[int, int]] = {}
    at = 0
    while (header := source.map[at : at + _BLOCK]) and header[:1] != b"\0":
        try:
            # The sum of the header's bytes, with blanks for itself.
            checksum = int(header[148:156].strip(b" \0"), 8)
            size = int(header[124:136].strip(b" \0"), 8)
        except ValueError:
            checksum, size = -1, -1
        if checksum != sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") or size < 0:
            raise broken(source.path, at, "a header that is damaged", "one of a tar archive")
        start = at + _BLOCK
        if start + size > source.size:
            raise broken(source.path, at, f"{size} bytes", "no more than the file has")
        if header[156:157] in (b"0", b"\0"):  # a file, and not a note about one
            members[header[:100].rstrip(b"\0").decode("latin1")] = start, size
        at = start + -(-size // _BLOCK) * _BLOCK
    return members


# --------------------------------------------------------------------------------------------------
# Arrays


def _stored(source: Source, tensor: Tensor, memory: Memory) -> Stored:
    storage = tensor.storage
    if storage.key not in memory:
        raise broken(
            source.path, 0, f"no storage {storage.key!r}", "every storage that a tensor names"
        )
    (first, nbytes), itemsize = memory[storage.key], tensor.dtype.itemsize
    have = nbytes // itemsize
    count = math.prod(tensor.size)
    offset = storage.first + tensor.offset
    last = offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    wrong = count and last >= have
    if wrong or count * itemsize > max(nbytes, _EXPANDED):
        raise broken(
            source.path,
            first,
            f"a tensor of shape {tensor.size} and stride {tensor.stride} from {offset} on",
            f"one that fits into the {have} elements of its storage {storage.key!r}",
        )
    strides = tuple(s * itemsize for s in tensor.stride)
    return Stored(source, first + offset * itemsize, tensor.dtype, tensor.size, strides)


def _rebuilt(content: Any, parts: list[Any], done: dict[int, Any]) -> Any:
    """Return the content with what is in `done` in its place; without recursion, which a file could make
    as deep as it likes."""
    for part in parts:
        if isinstance(part, dict):
            new = type(part)((k, done.get(id(v), v)) for k, v in part.items())
            if isinstance(part, collections.OrderedDict) and hasattr(part, "_metadata"):
                new._metadata = part._metadata  # pyright: ignore[reportAttributeAccessIssue]
            done[id(part)] = new
        elif not isinstance(part, Tensor):
            done[id(part)] = type(part)(done.get(id(v), v) for v in part)
    return done.get(id(content), content)


def _inside_out(path: Path, content: Any) -> Iterator[Any]:
    """Yield tensors and containers, what is inside before what it is in."""
    seen: set[int] = set()
    open_now: set[int] = set()
    stack = [(content, False)]
    while stack:
        part, after = stack.pop()
        if after:
            open_now.discard(id(part))
            yield part
        elif isinstance(part, (Storage, Builder)):
            what = "a storage" if isinstance(part, Storage) else "a function or class"
            raise broken(path, 0, f"{what} as data", "tensors, numbers, texts and containers")
        elif id(part) in open_now:
            raise broken(path, 0, "a container that holds itself", "data without circles")
        elif id(part) not in seen and isinstance(part, (Tensor, dict, list, tuple)):
            seen.add(id(part))
            if not isinstance(part, Tensor):
                open_now.add(id(part))
            stack.append((part, True))
            if not isinstance(part, Tensor):
                inside = part.values() if isinstance(part, dict) else part
                stack += [(v, False) for v in inside]
