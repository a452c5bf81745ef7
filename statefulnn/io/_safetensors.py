"""One file in the safetensors format: checks its header, and finds where its arrays lie.

A file consists of the length of the header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
begin and end), and the arrays, one after the other without gaps. The library `safetensors` writes it. It is
read here, because the library's ``safe_open`` does not tell where an array lies. Without that, several
threads could not read an array into memory that JAX takes over, and an error could not give the place.

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

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.core.extras import import_extra
from statefulnn.io._formats import LONGEST_HEADER
from statefulnn.io._reading import Budget, broken, parsed_json, shown
from statefulnn.io._stored import ALIGNMENT, Source, Stored, misshapen

# In the library's order: it writes arrays of the last dtype first.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(jnp.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(jnp.float8_e5m2fnuz),
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
# `nn.save` writes what the format has no place for as JSON into the metadata, under this name.
NOTE = "statefulnn"
_ENTRY = {"dtype", "shape", "data_offsets"}


class File:
    """An open file, and what it holds.

    Attributes:
        metadata: the texts of the header.
        arrays: name -> `Stored`, in the order of the file.
    """

    def __init__(self, source: Source, budget: Budget) -> None:
        path, size, head = source.path, source.size, source.read(0, 8)
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
        header = source.read(8, length)
        entries = _parsed(path, header, budget)
        self.metadata = _metadata(path, header, entries.pop("__metadata__", {}))
        self.arrays: dict[str, Stored] = {}
        begin = 8 + length
        position = 0
        for start, stop, name, dtype, shape in _in_order(path, header, entries):
            if start != position:
                what = "overlaps the array before it" if start < position else "comes after a gap"
                raise broken(
                    path, begin + start, f"{shown(name)} {what}", f"its start at {begin + position}"
                )
            position = stop
            if begin + stop > size:
                raise broken(
                    path,
                    size,
                    f"the file ends inside of {shown(name)}",
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


def _parsed(path: Path, header: bytes, budget: Budget) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(n for n, _ in pairs if n in seen or seen.add(n))
            raise broken(
                path,
                _place(header, twice),
                f"the name {shown(twice)} comes twice",
                "each name once",
            )
        return found

    entries = parsed_json(path, 8, header, budget, unique)
    if b"\\u" in header:
        try:
            json.dumps(entries, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise broken(path, 8, "half of a surrogate pair", "a header in UTF-8") from None
    if not isinstance(entries, dict):
        raise broken(path, 8, f"a header of type {type(entries).__name__}", "a dict by name")
    return entries


def _metadata(path: Path, header: bytes, found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        place = _place(header, "__metadata__")
        raise broken(path, place, "metadata that are no texts", "a dict of text -> text")
    return found


def _in_order(
    path: Path, header: bytes, entries: dict[str, Any]
) -> list[tuple[int, int, str, np.dtype, tuple[int, ...]]]:
    """Return begin, end, name, dtype and shape of each array, in the order of the file."""
    checked = []
    for name, entry in entries.items():
        wrong = _wrong(name, entry)
        if wrong:  # the place is only searched for when needed
            found, expected = wrong
            raise broken(path, _place(header, name), found, expected)
        start, stop = entry["data_offsets"]
        checked.append((start, stop, name, DTYPES[entry["dtype"]], tuple(entry["shape"])))
    return sorted(checked)  # names differ, so dtypes are never compared


def _wrong(name: str, entry: object) -> tuple[str, str] | None:
    """Return what an entry of the header has and what it should have; None if nothing is wrong."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        return f"the entry {shown(name)}", "a dtype, a shape and data_offsets"
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        return f"{shown(name)} of dtype {shown(code)}", f"one of {', '.join(DTYPES)}"
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or misshapen(offsets, 0):
        return (
            f"{shown(name)} with shape={shown(shape)} and offsets={shown(offsets)}",
            "lists of sizes",
        )
    wrong = misshapen(shape, dtype.itemsize)
    if wrong:
        return f"{shown(name)} of {code} with shape={shown(shape)}: {wrong}", "sizes of an array"
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        held = f"in {offsets[1] - offsets[0]} bytes"
        return f"{shown(name)} of {code} and shape {shown(shape)} {held}", f"{nbytes} bytes"
    return None


def _place(header: bytes, name: str) -> int:
    return 8 + max(0, header.find(json.dumps(name).encode()))


def write(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], note: str
) -> None:
    """Write a file.

    Args:
        arrays: contiguous, and of dtypes that `DTYPES` has.
        metadata: texts for the header.
        note: the name of the text that may be padded with blanks, so that the first array begins at a
            multiple of `ALIGNMENT`, as a mapped array must.
    """
    safetensors = import_extra("safetensors", "safetensors", "called nn.save", "writes the file")
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
    try:
        safetensors.serialize_file(specs, str(path), metadata=metadata)
    except safetensors.SafetensorError as error:
        if "os error" in str(error):
            raise
        raise CheckpointError(
            explain(
                f"called nn.save with {len(arrays)} arrays",
                f"safetensors cannot write them: {error}",
                "names and metadata of less than 100 MB; fewer arrays in a file: max_shard_size='5GB'",
            )
        ) from None


def _header_length(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> int:
    """Return the length of the header that the library makes, sorted by dtype, then by name."""
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
