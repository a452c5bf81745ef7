"""One file in the safetensors format: its header checked, its arrays seen where they lie.

A file is the length of the header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, begin
and end), and the arrays, one behind the other without gaps. The library `safetensors` writes it. It is
read here, because an error should say where in the file it is, and arrays should go from the file to
their device without a copy in between.

Source: github.com/huggingface/safetensors, the section on the format.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.core.extras import import_extra

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# More than this is no header of a model: the format's own limit.
LONGEST_HEADER = 100_000_000


def broken(path: Path, offset: int, found: str, expected: str) -> CheckpointError:
    """Return the error for a file that is not as it should be, with the place."""
    return CheckpointError(
        explain(
            f"{path}, at byte {offset}: {found}",
            f"expected {expected}",
            "copy or download the file again, or load another checkpoint",
        )
    )


class File:
    """An open file: what it holds, and its arrays as views of the mapped file.

    Attributes:
        metadata: the texts of the header.
        arrays: name -> read-only numpy view, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            if len(head) < 8:
                raise broken(
                    path, 0, f"the file ends after {size} bytes", "8 bytes, the header's length"
                )
            length = int.from_bytes(head, "little")
            if length > min(LONGEST_HEADER, size - 8):
                raise broken(
                    path,
                    0,
                    f"a header of {length} bytes",
                    f"at most {min(LONGEST_HEADER, size - 8)}, in a file of {size} bytes",
                )
            header = file.read(length)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries = _parsed(path, header)
        self.metadata = _metadata(path, header, entries.pop("__metadata__", {}))
        self.arrays = {}
        begin = 8 + length
        position = 0
        for name, (dtype, shape, start, stop) in _in_order(path, header, entries):
            if start != position:
                what = "overlaps the array before it" if start < position else "comes after a gap"
                raise broken(
                    path, begin + start, f"{name!r} {what}", f"its start at {begin + position}"
                )
            position = stop
            if begin + stop > size:
                raise broken(
                    path,
                    size,
                    f"the file ends inside of {name!r}",
                    f"{begin + stop} bytes at least",
                )
            count = math.prod(shape)
            view = (
                np.frombuffer(mapped, dtype, count, begin + start) if count else np.empty(0, dtype)
            )
            self.arrays[name] = view.reshape(shape)
        if begin + position != size:
            raise broken(
                path,
                begin + position,
                f"{size - begin - position} bytes of no array",
                "the end of the file",
            )


def _parsed(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(n for n in names if names.count(n) > 1)
            raise broken(
                path, _place(header, twice), f"the name {twice!r} comes twice", "each name once"
            )
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise broken(path, 8 + error.start, "bytes that are no text", "a header in UTF-8") from None
    except json.JSONDecodeError as error:
        raise broken(path, 8 + error.pos, error.msg, "a header in JSON") from None
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        raise broken(path, 8, "a header that cannot be read", "a header in JSON") from None
    if not isinstance(entries, dict):
        raise broken(path, 8, f"a header of type {type(entries).__name__}", "a dict by name")
    return entries


def _metadata(path: Path, header: bytes, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        place = _place(header, "__metadata__")
        raise broken(path, place, "metadata that are no texts", "a dict of text -> text")
    return found


def _in_order(path: Path, header: bytes, entries: dict[str, Any]) -> list[tuple[str, tuple]]:
    checked = []
    for name, entry in entries.items():
        place = _place(header, name)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise broken(path, place, f"the entry {name!r}", "a dtype, a shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise broken(path, place, f"{name!r} of dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise broken(path, place, f"{name!r} with {shape=} and {offsets=}", "lists of sizes")
        bytes_needed = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != bytes_needed:
            raise broken(
                path,
                place,
                f"{name!r} of {dtype} and shape {shape} in {offsets[1] - offsets[0]} bytes",
                f"{bytes_needed} bytes",
            )
        checked.append((name, (DTYPES[dtype], tuple(shape), *offsets)))
    return sorted(checked, key=lambda item: item[1][2:])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _place(header: bytes, name: str) -> int:
    return 8 + max(0, header.find(json.dumps(name).encode()))


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file; the arrays are contiguous, and of dtypes that `DTYPES` has."""
    safetensors = import_extra("safetensors", "io", "called nn.save", "writes the file")
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    safetensors.serialize_file(specs, str(path), metadata=dict(metadata))
