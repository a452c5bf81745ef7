"""nn.save and nn.load: whatever has a state dict, in one safetensors file or in several with an index."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box, from_numpy
from statefulnn.core.errors import CheckpointError, UnknownNameError, explain
from statefulnn.core.generator import Generator
from statefulnn.core.placement import META, is_meta, resolve_device
from statefulnn.io._atomic import replacing
from statefulnn.io._safetensors import DTYPES, NAMES, File, write
from statefulnn.io._stored import ALIGNMENT, Stored, broken, copied, jax_has, read
from statefulnn.io._torch_files import is_torch_file, load_torch

# What safetensors has no place for, as JSON in the metadata of the file.
OURS = "statefulnn"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def save(
    obj: Any,
    path: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a state dict, or whatever has one, to a safetensors file.

    The file is written beside the old one and takes its place at the end, so that a crash leaves one of
    the two. Tied parameters are stored once.

    Args:
        obj: a Module, Optimizer, Ensemble or Generator, or a dict of name -> array (numbers, texts and
            lists of these are kept as well).
        path: the file; with `max_shard_size` the folder of the files and their index.
        metadata: texts to keep in the file.
        max_shard_size: bytes, or a text such as ``"5GB"``: several files of at most this size, and an index
            as on the Hugging Face hub, ``model.safetensors.index.json``.

    Raises:
        CheckpointError: for what a file cannot hold; nothing is written.
        ImportError: if safetensors is not installed (extra ``io``).

    Source: github.com/huggingface/safetensors.

    Example:
        >>> import os, tempfile, statefulnn as nn
        >>> model, other = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nn.save(model, os.path.join(folder, "model.safetensors"))
        ...     state = nn.load(os.path.join(folder, "model.safetensors"))
        >>> other.load_state_dict(state)
        <All keys matched successfully>
        >>> bool((other.weight == model.weight).all())
        True
    """
    path = Path(path)
    arrays, notes = _taken_apart(_state_of(obj))
    texts = {str(k): v for k, v in (metadata or {}).items()}
    wrong = next((k for k, v in texts.items() if not isinstance(v, str) or k == OURS), None)
    if wrong is not None:
        raise CheckpointError(
            explain(
                f"called nn.save with metadata {wrong!r}: {texts[wrong]!r}",
                f"metadata of a safetensors file are texts, and {OURS!r} is taken",
                "metadata={'epoch': str(epoch)}; numbers may also be entries of the state dict",
            )
        )
    # Readers of the Hugging Face hub ask for the format: torch's names and layouts.
    texts = {"format": "pt", **texts, OURS: json.dumps(notes)}
    if max_shard_size is None:
        with replacing(path) as temporary:
            write(temporary, arrays, texts, OURS)
        return
    _save_shards(path, arrays, texts, _bytes(max_shard_size))


def load(
    path: str | os.PathLike,
    *,
    device: Any = None,
    names: Iterable[str] | Callable[[str], bool] | None = None,
    mmap: bool = False,
) -> OrderedDict[str, Any]:
    """Read a state dict from a safetensors file, from several with an index, or from a file of torch.save.

    What torch wrote is read without torch, and without running any code it may hold.

    Args:
        path: a file, an index (``*.index.json``), or the folder that holds ``model.safetensors`` or its
            index.
        device: where the arrays go: a device, its name, a ``Sharding``, or a function of name and shape
            that returns one; "meta" for shapes alone. Each device reads its own part of the file.
        names: which entries to read: names, or a function of the name; None for all.
        mmap: whether arrays on the CPU may stay in the file, which is read when they are first used. Then
            nobody may change it in place while they live (`save` does not: it makes a file of its own).

    Returns:
        a dict by name, in the order it was saved, for ``load_state_dict``; from a file of torch.save
        whatever it holds, with arrays for tensors. Where JAX's 64-bit types are off, 64-bit arrays are
        numpy's, so that nothing is cut off.

    Raises:
        CheckpointError: for a file that is damaged, or holds more than data, with the byte.
        FileNotFoundError: if there is none.
        UnknownNameError: for `names` that are not in it.

    Example: see `save`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (INDEX if (path / INDEX).exists() else SINGLE)
    with open(path, "rb") as file:
        if is_torch_file(file.read(512)):
            return _from_torch(path, device, names, mmap)
    files = _indexed(path) if path.name.endswith(".index.json") else [File(path)]
    stored = {name: s for file in files for name, s in file.arrays.items()}
    notes = _notes(path, files[0].metadata if files else {})
    for name, first in notes["ties"].items():
        if first in stored:
            stored[name] = stored[first]
    values = dict(notes["values"])
    order = [n for n in notes["order"] if n in stored or n in values]
    order = list(dict.fromkeys([*order, *stored]))
    wanted = _chosen(order, names, path)
    arrays = _placed({n: stored[n] for n in wanted if n not in values}, device, mmap)
    state = OrderedDict((n, values[n] if n in values else arrays[n]) for n in wanted)
    if notes["modules"]:
        state._metadata = OrderedDict(notes["modules"])  # pyright: ignore[reportAttributeAccessIssue]
    return state


def _from_torch(path: Path, device: Any, names: Any, mmap: bool) -> Any:
    if not callable(device) and names is None:
        return load_torch(path, lambda stored: _placed(stored, device, mmap))
    content = load_torch(path, lambda stored: stored)
    if not isinstance(content, dict) or not all(isinstance(n, str) for n in content):
        raise TypeError(
            explain(
                f"called nn.load({str(path)!r}) with names, or a device for each name",
                f"the file holds no dict by name, but {type(content).__name__}",
                "load it without them",
            )
        )
    chosen = _chosen(list(content), names, path)
    stored = {n: content[n] for n in chosen if isinstance(content[n], Stored)}
    arrays = _placed(stored, device, mmap)
    return OrderedDict((n, arrays.get(n, content[n])) for n in chosen)


# --------------------------------------------------------------------------------------------------
# What is saved


def _state_of(obj: Any) -> Mapping[str, Any]:
    if isinstance(obj, Generator):
        return {"state": obj.state}
    if isinstance(obj, Mapping):
        return obj
    if callable(getattr(obj, "state_dict", None)):
        return obj.state_dict()
    raise CheckpointError(
        explain(
            f"called nn.save with an object of type {type(obj).__name__}",
            "a file holds arrays by name",
            "pass a Module, an Optimizer, or a dict: nn.save({'weights': array}, path)",
        )
    )


def _taken_apart(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays to store, and the notes about what is no array."""
    arrays: dict[str, np.ndarray] = {}
    ties: dict[str, str] = {}
    values: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, value in state.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise _unsaved(name, "names are texts")
        value = value.value if isinstance(value, Box) else value
        if not hasattr(value, "dtype"):
            values[name] = _plain(name, value)
        elif id(value) in first:
            ties[name] = first[id(value)]
        else:
            first[id(value)] = name
            arrays[name] = _stored(name, value)
    notes = {"order": list(state), "ties": ties, "values": values}
    return arrays, {**notes, "modules": getattr(state, "_metadata", {})}


def _stored(name: str, value: Any) -> np.ndarray:
    """Return an array as the file holds it."""
    if is_meta(value):
        raise _unsaved(name, "it is on the meta device and has no numbers")
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise _unsaved(name, "it is a typed random key: keep jax.random.key_data(key)")
    array = np.asarray(value)
    counter = name.rpartition(".")[2] == "num_batches_tracked"
    if counter and array.dtype == np.int32:  # torch counts in 64 bits
        array = array.astype(np.int64)
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.newbyteorder("=") not in NAMES:
        raise _unsaved(name, f"safetensors has no dtype for {array.dtype}, but {', '.join(DTYPES)}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _plain(name: str, value: Any) -> Any:
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except (TypeError, ValueError):
        pass
    raise _unsaved(name, f"it is of type {type(value).__name__}, neither an array nor plain data")


def _unsaved(name: Any, why: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"called nn.save with an entry {name!r} that a file cannot hold",
            why,
            "save arrays, numbers, texts, and lists and dicts of these",
        )
    )


# --------------------------------------------------------------------------------------------------
# Several files


def _save_shards(
    folder: Path, arrays: Mapping[str, np.ndarray], texts: dict[str, str], size: int
) -> None:
    """Write files of a limited size, then their index; what the old index named goes last."""
    shards: list[dict[str, np.ndarray]] = [{}]
    room = size
    for name, array in arrays.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = size
        shards[-1][name] = array
        room -= array.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    old = _shard_names(folder / INDEX) if (folder / INDEX).exists() else set()
    # Names of their own: until the new index is there, the old one finds its files untouched.
    run = uuid.uuid4().hex[:8]
    total = len(shards)
    files = [f"model-{run}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    try:
        for file, shard in zip(files, shards, strict=True):
            with replacing(folder / file) as temporary:
                write(temporary, shard, texts, OURS)
        index = {
            "metadata": {"total_size": sum(a.nbytes for a in arrays.values())},
            "weight_map": {n: f for f, shard in zip(files, shards, strict=True) for n in shard},
        }
        with replacing(folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n")
    except BaseException:
        for file in files:
            (folder / file).unlink(missing_ok=True)
        raise
    for file in old - set(files):
        (folder / file).unlink(missing_ok=True)


def _indexed(path: Path) -> list[File]:
    """Return the files of an index, each of which holds what the index says."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise broken(path, 0, "an index that cannot be read", "JSON with a weight_map") from None
    for name, file in places.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:]+\.safetensors", file):
            raise broken(path, 0, f"{name!r} in the file {file!r}", "a file in the same folder")
    files = []
    for file in dict.fromkeys(places.values()):
        if not (path.parent / file).exists():
            raise broken(path, 0, f"no file {file!r}", "every file of the index beside it")
        opened = File(path.parent / file)
        missing = [n for n, f in places.items() if f == file and n not in opened.arrays]
        if missing:
            raise broken(path, 0, f"{missing[0]!r} in {file!r}", "an array that the file holds")
        opened.arrays = {n: v for n, v in opened.arrays.items() if places.get(n) == file}
        files.append(opened)
    return files


def _shard_names(index: Path) -> set[str]:
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {
        f for f in files if isinstance(f, str) and re.fullmatch(r"model-[-\w]+\.safetensors", f)
    }


def _bytes(size: int | str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]+)", size.upper()) if isinstance(size, str) else None
    )
    if found and found[2] in units:
        return max(1, int(float(found[1]) * units[found[2]]))
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    raise ValueError(f"nn.save: max_shard_size must be a number of bytes or '5GB', got {size!r}")


# --------------------------------------------------------------------------------------------------
# What is read


def _notes(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return what `save` noted beside the arrays; files of others have nothing."""
    kinds = {"order": list, "ties": dict, "values": dict, "modules": dict}
    try:
        found = json.loads(texts[OURS]) if OURS in texts else {}
        notes = {key: kind(found.get(key, kind())) for key, kind in kinds.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise broken(
            path, 8, f"metadata {OURS!r} that cannot be read", "what nn.save wrote"
        ) from None
    if not all(isinstance(n, str) for n in (*notes["order"], *notes["ties"].values())):
        raise broken(path, 8, f"metadata {OURS!r} that cannot be read", "what nn.save wrote")
    return notes


def _chosen(order: list[str], names: Any, path: Path) -> list[str]:
    if names is None:
        return order
    if callable(names):
        return [n for n in order if names(n)]
    wanted = {names} if isinstance(names, str) else set(names)
    unknown = sorted(wanted - set(order))
    if unknown:
        raise UnknownNameError(
            explain(
                f"asked {path} for {', '.join(map(repr, unknown))}",
                f"it holds {', '.join(order[:8])}{' ...' if len(order) > 8 else ''}",
                "pass names it holds, or names=lambda name: name.startswith('encoder.')",
            )
        )
    return [n for n in order if n in wanted]


def _placed(stored: Mapping[Any, Stored], device: Any, mmap: bool) -> dict[Any, Any]:
    """Return arrays of files at their places; what is stored once is one array under all its names."""
    places: dict[int, Any] = {}
    for name, s in stored.items():
        place = device(name, s.shape) if callable(device) else device
        places.setdefault(id(s), resolve_device(place))
    once = {id(s): s for s in stored.values()}
    done: dict[int, Any] = {}
    to_read: list[Stored] = []
    for key, s in once.items():
        place = places[key]
        if place == META:
            done[key] = jax.ShapeDtypeStruct(s.shape, s.dtype)
        elif isinstance(place, jax.sharding.Sharding) and jax_has(s.dtype):
            part = lambda index, view=s.view: copied(view[index])
            done[key] = jax.make_array_from_callback(s.shape, place, part)
        elif jax_has(s.dtype) and not _on_host(place):
            done[key] = s.view
        elif mmap and s.in_one_piece and s.start % ALIGNMENT == 0:
            done[key] = s.view
        else:
            to_read.append(s)
    done.update(zip(map(id, to_read), read(to_read), strict=True))
    for place in set(places.values()):  # one call for all arrays of a place
        keys = [
            k
            for k, s in once.items()
            if places[k] == place and jax_has(s.dtype) and _is_host(done[k])
        ]
        done.update(zip(keys, from_numpy([done[k] for k in keys], place, copy=False), strict=True))
    return {name: done[id(s)] for name, s in stored.items()}


def _is_host(array: Any) -> bool:
    return isinstance(array, np.ndarray)


def _on_host(place: Any) -> bool:
    """Say whether JAX takes an array of the host for one at this place, without a copy."""
    if place is None:
        chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        place = chosen or jax.default_backend()
    return (place if isinstance(place, str) else place.platform) == "cpu"
