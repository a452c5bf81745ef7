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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from statefulnn.core.extras import import_extra
from statefulnn.io._stored import ALIGNMENT, Source, Stored, broken

# In the library's order: it writes arrays of the last dtype first.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: i for i, dtype in enumerate(DTYPES.values())}
# More than this is no header of a model: the format's own limit.
LONGEST_HEADER = 100_000_000


class File:
    """An open file, and what it holds.

    Attributes:
        metadata: the texts of the header.
        arrays: name -> `Stored`, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        source = Source(path)
        size, head = source.size, source.map[:8]
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
        header = source.map[8 : 8 + length]
        entries = _parsed(path, header)
        self.metadata = _metadata(path, header, entries.pop("__metadata__", {}))
        self.arrays: dict[str, Stored] = {}
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
            self.arrays[name] = Stored(source, begin + start, dtype, shape)
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


def write(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], note: str
) -> None:
    """Write a file.

    Args:
        arrays: contiguous, and of dtypes that `DTYPES` has.
        metadata: texts for the header.
        note: the name of one of them that may be followed by blanks, so that the first array begins at a
            multiple of `ALIGNMENT`, as a mapped array must.
    """
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
    blanks = -(8 + _header_length(arrays, metadata)) % ALIGNMENT
    metadata = {**metadata, note: metadata[note] + " " * blanks}
    safetensors.serialize_file(specs, str(path), metadata=metadata)


def _header_length(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> int:
    """Return the bytes of the header that the library makes: sorted by dtype, then by name."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, array in sorted(arrays.items(), key=lambda item: (-_RANK[item[1].dtype], item[0])):
        offsets = [at, at := at + array.nbytes]
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
    return len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
