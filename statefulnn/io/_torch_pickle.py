"""The pickle in a file of torch.save, read without torch: tensors, numbers, texts and containers of these.

A pickle is a program that builds objects. It may name few things here: tensors, dtypes, sizes, ordered dicts.
Whatever else it names is refused, and none of what it names is ever called but the builders below, so that a
file can run no code.

Source: torch/_utils.py and torch/storage.py of torch 2.13.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._stored import broken

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

# The classes of tensors in the tar format, which say what their storages say.
_TENSORS = {name.replace("Storage", "Tensor"): dtype for name, dtype in _STORAGES.items()}


class Storage:
    """Memory that tensors see, known by its key."""

    __slots__ = ("dtype", "first", "key", "numel")

    def __init__(self, dtype: np.dtype, key: str, numel: int, first: int = 0) -> None:
        self.dtype, self.key, self.numel, self.first = dtype, key, numel, first


class Tensor:
    """What a tensor sees of a storage."""

    __slots__ = ("dtype", "offset", "size", "storage", "stride")
    __hash__ = None  # pyright: ignore[reportAssignmentType]  # no key and in no set: arrays are neither

    def __init__(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None
    ) -> None:
        sizes = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(type(v) is int and v >= 0 for v in sizes):
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


class Builder:
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
    "torch._utils._rebuild_tensor": lambda s, o, n, t: Tensor(s, o, n, t),
    "torch._utils._rebuild_tensor_v2": lambda s, o, n, t, *_: Tensor(s, o, n, t),
    "torch._utils._rebuild_tensor_v3": lambda s, o, n, t, _g, _h, dtype, *_: Tensor(
        s, o, n, t, dtype
    ),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
}


# Python's own implementation of pickle: the one in C takes memory for an index of the memo before it looks.
class Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    dispatch = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]
    for _code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch.pop(_code[0])

    def __init__(self, path: Path, file: Any, at: int = 0, tensors: Any = None) -> None:
        # Texts of Python 2 are UTF-8 in old files.
        super().__init__(file, encoding="utf-8")
        self.path, self.file, self.at = path, file, at
        self.tensors = tensors  # by number, in the tar format
        self.dtypes: dict[str, np.dtype] = {}  # of the storages that the pickle refers to

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _BUILDERS:
            return Builder(_BUILDERS[full])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in (names := {**_DTYPES, **_TENSORS}):
            return names[name]
        raise CheckpointError(
            explain(
                f"{self.path}, at byte {self.at + self.file.tell()}: the file names {full!r}",
                "only tensors, numbers, texts and containers of these are built; anything else could run "
                "code",
                "save data only, torch.save(model.state_dict(), path)",
            )
        )

    def persistent_load(self, pid: Any) -> Storage | Tensor:
        if self.tensors is not None:
            return self.tensors[int(pid)]
        kind, dtype, key, _, numel, *view = pid
        first = 0
        if kind not in ("storage", b"storage") or not isinstance(dtype, np.dtype):
            raise ValueError("a reference to what is no storage")
        if view and view[0] is not None:
            _, first, numel = view[0]
        if not all(type(v) is int and v >= 0 for v in (first, numel)):
            raise ValueError("a storage of a negative size")
        self.dtypes[str(key)] = dtype
        return Storage(dtype, str(key), numel, first)

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
