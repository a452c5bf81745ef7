"""Files that torch.save wrote, read without torch: a pickle of containers, and the memory of storages.

The pickle may name few things: tensors, dtypes, sizes, ordered dicts. Whatever else it names is refused, and
none of what it names is ever called but the builders below, so that a file can run no code. Sizes are checked
against the file before memory is taken for them.

Source: torch/serialization.py of torch 2.13 (the zip format, and the one before it).
"""

from __future__ import annotations

import collections
import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._safetensors import LONGEST_HEADER, broken

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
_DTYPES = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "bool")},
    **{f"{u}int{bits}": np.dtype(f"{u}int{bits}") for u in ("", "u") for bits in (8, 16, 32, 64)},
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float8_e4m3fn": np.dtype(jnp.float8_e4m3fn),
    "float8_e5m2": np.dtype(jnp.float8_e5m2),
}
# An expanded tensor has more elements than its storage; up to this many bytes that is believed.
_EXPANDED = 1 << 26


def is_torch_file(head: bytes) -> bool:
    """Say whether a file that begins with these 9 bytes is for `load_torch`, and not safetensors."""
    # The length of a safetensors header may begin with the bytes of a pickle or an archive.
    if head[:4] == b"PK\x03\x04":
        return head[8:9] != b"{"
    return head[:1] == b"\x80" and int.from_bytes(head[:8], "little") > LONGEST_HEADER


def load_torch(path: Path, placed: Callable[[np.ndarray], Any]) -> Any:
    """Return what is in a file, with `placed` of a view of the file for each tensor.

    Args:
        path: what ``torch.save`` wrote.
        placed: makes an array of a view; it is called once for a tensor under several names.

    Raises:
        CheckpointError: for files that are damaged, or hold anything but data.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content, storages = (_zipped if mapped[:2] == b"PK" else _legacy)(path, mapped)
    return _with_arrays(path, content, storages, placed)


class _Storage:
    """Memory that tensors see, known by its key."""

    __slots__ = ("dtype", "first", "key", "numel")

    def __init__(self, dtype: np.dtype, key: str, numel: int, first: int = 0) -> None:
        self.dtype, self.key, self.numel, self.first = dtype, key, numel, first


class _Tensor:
    """What a tensor sees of a storage."""

    __slots__ = ("dtype", "offset", "size", "storage", "stride")
    __hash__ = None  # pyright: ignore[reportAssignmentType]  # no key and in no set: arrays are neither

    def __init__(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None
    ) -> None:
        sizes = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or not all(type(v) is int and v >= 0 for v in sizes):
            raise ValueError("a tensor of no storage, or of negative sizes")
        if len(size) != len(stride) or len(size) > 64:
            raise ValueError("a tensor whose size and stride differ in length")
        self.storage, self.offset, self.size, self.stride = (
            storage,
            offset,
            tuple(size),
            tuple(stride),
        )
        self.dtype = storage.dtype if dtype is None else dtype
        if not isinstance(self.dtype, np.dtype):
            raise ValueError("a tensor without a dtype")

    @property
    def identity(self) -> tuple:
        return (
            self.storage.key,
            self.storage.first,
            self.offset,
            self.size,
            self.stride,
            self.dtype,
        )


# --------------------------------------------------------------------------------------------------
# The pickle


class _Builder:
    """Stands for a function or class that the pickle names; it cannot be changed from there."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError("a state for what is not data")


def _bytes_of(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how protocol 2 writes bytes
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


_BUILDERS = {
    "_codecs.encode": _bytes_of,
    "collections.OrderedDict": lambda *pairs: collections.OrderedDict(*pairs),
    "__builtin__.set": lambda *items: set(*items),
    "builtins.set": lambda *items: set(*items),
    "torch.Size": lambda *sizes: tuple(*sizes),
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "torch._utils._rebuild_tensor": lambda s, o, n, t: _Tensor(s, o, n, t),
    "torch._utils._rebuild_tensor_v2": lambda s, o, n, t, *_: _Tensor(s, o, n, t),
    "torch._utils._rebuild_tensor_v3": lambda s, o, n, t, _g, _h, dtype, *_: _Tensor(
        s, o, n, t, dtype
    ),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
}


# Python's own implementation of pickle: the one in C takes memory for an index of the memo before it looks.
class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    dispatch = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]
    for _code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch.pop(_code[0])

    def __init__(self, path: Path, file: Any, at: int = 0) -> None:
        # Texts of Python 2 are UTF-8 in old files.
        super().__init__(file, encoding="utf-8")
        self.path, self.file, self.at = path, file, at

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _BUILDERS:
            return _Builder(_BUILDERS[full])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise CheckpointError(
            explain(
                f"{self.path}, at byte {self.at + self.file.tell()}: the file names {full!r}",
                "only tensors, numbers, texts and containers of these are built; anything else could run "
                "code",
                "save data only, torch.save(model.state_dict(), path)",
            )
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        first = 0
        if kind not in ("storage", b"storage") or not isinstance(dtype, np.dtype):
            raise ValueError("a reference to what is no storage")
        if view and view[0] is not None:
            _, first, numel = view[0]
        if not all(type(v) is int and v >= 0 for v in (first, numel)):
            raise ValueError("a storage of a negative size")
        return _Storage(dtype, str(key), numel, first)

    def read_object(self) -> Any:
        """Return the next object, or raise for what is no pickle of data."""
        try:
            return self.load()
        except CheckpointError:
            raise
        except MemoryError:
            raise
        except Exception as error:
            at = self.at + self.file.tell()
            found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise broken(self.path, at, found, "a pickle of tensors and containers") from None


# --------------------------------------------------------------------------------------------------
# The two formats

Memory = dict[str, np.ndarray]  # the bytes of a storage by its key


def _zipped(path: Path, mapped: mmap.mmap) -> tuple[Any, Memory]:
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

    def content(name: str) -> np.ndarray:
        info = members[name]
        at = info.header_offset
        header = mapped[at : at + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise broken(path, at, f"no entry {name!r}", "the entry that the archive lists")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise broken(path, at, f"{name!r}, compressed", "an entry as torch.save stores it")
        start = at + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > len(mapped):
            raise broken(
                path, at, f"{name!r} of {info.file_size} bytes", "no more than the file has"
            )
        return np.frombuffer(mapped, np.uint8, info.file_size, start)

    order = f"{root}byteorder"
    if order in members and content(order).tobytes() != b"little":
        raise broken(
            path, members[order].header_offset, "a file of a big-endian machine", "little-endian"
        )
    pickled = content(found[0])
    at = pickled.__array_interface__["data"][0] - _address(mapped)
    state = _Unpickler(path, io.BytesIO(pickled.tobytes()), at).read_object()
    prefix = f"{root}data/"
    memory = {n[len(prefix) :]: n for n in members if n.startswith(prefix)}
    return state, {key: content(name) for key, name in memory.items()}


def _address(mapped: mmap.mmap) -> int:
    return np.frombuffer(mapped, np.uint8, 1).__array_interface__["data"][0]


def _legacy(path: Path, mapped: mmap.mmap) -> tuple[Any, Memory]:
    # Read through the map: a file would take memory for any length that the pickle claims.
    state, keys, dtypes, at = _legacy_pickles(path, mapped)
    memory: Memory = {}
    for key in keys:
        numel = int.from_bytes(mapped[at : at + 8], "little", signed=True)
        nbytes = numel * dtypes.get(key, np.dtype(np.uint8)).itemsize
        if numel < 0 or at + 8 + nbytes > len(mapped):
            raise broken(path, at, f"a storage of {numel} elements", "no more than the file has")
        memory[key] = np.frombuffer(mapped, np.uint8, nbytes, at + 8)
        at += 8 + nbytes
    return state, memory


def _legacy_pickles(path: Path, file: Any) -> tuple[Any, list[str], dict[str, np.dtype], int]:
    """Return the content, the keys of the storages, their dtypes, and where they begin."""
    for number in (_MAGIC, _PROTOCOL):
        if _Unpickler(path, file).read_object() != number:
            raise broken(path, 0, "a pickle of something else", "what torch.save wrote")
    machine = _Unpickler(path, file).read_object()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise broken(path, 0, "a file of a big-endian machine", "a little-endian one")
    unpickler = _Unpickler(path, file)
    dtypes: dict[str, np.dtype] = {}
    made = unpickler.persistent_load

    def remembered(pid: Any) -> _Storage:
        storage = made(pid)
        dtypes[storage.key] = storage.dtype
        return storage

    unpickler.persistent_load = remembered
    state = unpickler.read_object()
    keys = _Unpickler(path, file).read_object()
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise broken(path, file.tell(), "no list of storages", "the keys of the storages")
    return state, keys, dtypes, file.tell()


# --------------------------------------------------------------------------------------------------
# Arrays


def _with_arrays(path: Path, content: Any, memory: Memory, placed: Callable) -> Any:
    arrays: dict[tuple, Any] = {}

    def array(tensor: _Tensor) -> Any:
        if tensor.identity not in arrays:
            arrays[tensor.identity] = placed(_view(path, tensor, memory))
        return arrays[tensor.identity]

    # Without recursion, which a file could make as deep as it likes.
    done: dict[int, Any] = {}
    for part in _inside_out(path, content):
        if isinstance(part, _Tensor):
            done[id(part)] = array(part)
        elif isinstance(part, dict):
            new = type(part)((k, done.get(id(v), v)) for k, v in part.items())
            if isinstance(part, collections.OrderedDict) and hasattr(part, "_metadata"):
                new._metadata = part._metadata  # pyright: ignore[reportAttributeAccessIssue]
            done[id(part)] = new
        else:
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
        elif isinstance(part, (_Storage, _Builder)):
            what = "a storage" if isinstance(part, _Storage) else "a function or class"
            raise broken(path, 0, f"{what} as data", "tensors, numbers, texts and containers")
        elif id(part) in open_now:
            raise broken(path, 0, "a container that holds itself", "data without circles")
        elif id(part) not in seen and isinstance(part, (_Tensor, dict, list, tuple)):
            seen.add(id(part))
            if not isinstance(part, _Tensor):
                open_now.add(id(part))
            stack.append((part, True))
            if not isinstance(part, _Tensor):
                inside = part.values() if isinstance(part, dict) else part
                stack += [(v, False) for v in inside]


def _view(path: Path, tensor: _Tensor, memory: Memory) -> np.ndarray:
    storage = tensor.storage
    if storage.key not in memory:
        raise broken(path, 0, f"no storage {storage.key!r}", "every storage that a tensor names")
    data, itemsize = memory[storage.key], tensor.dtype.itemsize
    have = len(data) // itemsize
    count = math.prod(tensor.size)
    offset = storage.first + tensor.offset
    last = offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    wrong = count and last >= have
    if wrong or count * itemsize > max(len(data), _EXPANDED):
        raise broken(
            path,
            0,
            f"a tensor of shape {tensor.size} and stride {tensor.stride} from {offset} on",
            f"one that fits into the {have} elements of its storage {storage.key!r}",
        )
    if not count:
        return np.empty(tensor.size, tensor.dtype)
    strides = tuple(s * itemsize for s in tensor.stride)
    return np.ndarray(tensor.size, tensor.dtype, data, offset * itemsize, strides)
