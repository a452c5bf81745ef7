"""Several files with an index: replacing the index replaces the old files with the new ones.

A save writes files that carry its own name, eight random digits, and then replaces the index. A marker with
that name is locked all the while. So a later save knows which files are live: those that the index names, and
those of a save that is still running. It removes all others. The order of these checks matters. A save that
has ended cannot replace the index any more. So if the index is read after that, it either names the files of
that save, or no index ever will.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from statefulnn.core.errors import CheckpointError
from statefulnn.io._atomic import content_of, flushed, naming, replacing
from statefulnn.io._locks import marked, removed, sweep
from statefulnn.io._reading import Budget, parsed_json
from statefulnn.io._safetensors import NOTE, write

INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"model-([0-9a-f]{8})-\d{5,}-of-\d{5,}\.safetensors")
_HIDDEN = re.compile(r"\.model-([0-9a-f]{8})\.(?:saving|tmp)")
# Other libraries' names for such files. When an index is replaced, the files it named with them go too.
_REPLACED = re.compile(r"model-[-\w]+\.safetensors")


def save_shards(
    folder: Path, arrays: Mapping[str, np.ndarray], texts: dict[str, str], size: int
) -> None:
    """Write files of a limited size, then their index; then remove the files that the old index named.

    Args:
        folder: where they go; it is made if it does not exist.
        arrays: as for `write`.
        texts: the metadata of each file, `NOTE` among them.
        size: the most bytes of one file, unless a single array has more.

    Raises:
        OSError: with the folder, if it may not be written, or the disk is full. What was there is unchanged.
    """
    shards = _divided(arrays, size)
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder, folder):
        _sweep(folder)
        run, lock = marked(lambda run: _marker(folder, run))
        names = [
            f"model-{run}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
        ]
        room = folder / f".model-{run}.tmp"
        replaced = b""
        try:
            room.mkdir()
            for name, shard in zip(names, shards, strict=True):
                write(room / name, shard, texts, NOTE)
                flushed(room / name)
                os.chmod(room / name, lock.mode)
            for name in names:
                os.replace(room / name, folder / name)
            flushed(folder)
            places = {n: f for f, shard in zip(names, shards, strict=True) for n in shard}
            nbytes = sum(a.nbytes for a in arrays.values())
            index = {"metadata": {"total_size": nbytes}, "weight_map": places}
            with replacing(folder / INDEX) as temporary:
                temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
                # If this process is killed now, the next save knows what else to remove.
                replaced = json.dumps(sorted(shard_names(folder / INDEX) or ())).encode()
                lock.file.write(replaced)
        finally:
            for name in _rubbish(folder, [], replaced):
                removed(folder / name)
            # From here on the files of this save are treated like any others: the index decides.
            # If several saves end at once, the last one finds no other marker and cleans up after all.
            lock.close(remove=True)
            _sweep(folder)


def shard_names(index: Path) -> set[str] | None:
    """Return the names of the files that an index names; an empty set if there is no index.

    None means that the index cannot be read, so nothing is known about any file.
    """
    try:
        content = content_of(index)
        budget = Budget(index)
        budget.opened(len(content))
        names = set(parsed_json(index, 0, content, budget)["weight_map"].values())
    except FileNotFoundError:
        return set()
    except (OSError, CheckpointError, AttributeError, KeyError, TypeError, MemoryError):
        return None
    return names if all(isinstance(n, str) for n in names) else None


def _divided(arrays: Mapping[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    shards: list[dict[str, np.ndarray]] = [{}]
    room = size
    for name, array in arrays.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = size
        shards[-1][name] = array
        room -= array.nbytes
    return shards


def _marker(folder: Path, run: str) -> Path:
    return folder / f".model-{run}.saving"


def _run_of(name: str) -> str | None:
    match = _SHARD.fullmatch(name) or _HIDDEN.fullmatch(name)
    return match[1] if match else None


def _sweep(folder: Path) -> None:
    """Remove the files of saves that have ended, except those that the index names."""
    sweep(
        folder,
        _run_of,
        lambda run: _marker(folder, run),
        lambda names, replaced: _rubbish(folder, names, replaced),
    )


def _rubbish(folder: Path, names: list[str], replaced: bytes) -> list[str]:
    """Return which files of a save that has ended are to be removed.

    Args:
        folder: where they are.
        names: the files it wrote.
        replaced: as JSON, the files of the index that it replaced, or was about to replace.
    """
    hidden = [n for n in names if _HIDDEN.fullmatch(n)]
    live = shard_names(folder / INDEX)
    if live is None:
        return hidden
    try:
        noted = json.loads(replaced or b"[]")
    except (ValueError, RecursionError):  # it was killed while writing them
        noted = []
    old = [n for n in noted if isinstance(n, str) and _REPLACED.fullmatch(n)]
    return [n for n in {*names, *old} if n not in live]
