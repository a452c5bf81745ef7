"""nn.save and nn.load: anything with a state dict, in one safetensors file or in several with an index."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.ma import MaskedArray

from statefulnn.core.box import Box
from statefulnn.core.errors import ArgumentError, CheckpointError, explain
from statefulnn.core.generator import Generator
from statefulnn.core.names import Filter, chosen
from statefulnn.core.placement import is_meta
from statefulnn.core.tracebacks import shortened
from statefulnn.io._atomic import replacing
from statefulnn.io._folders import opened
from statefulnn.io._placing import Device, placed
from statefulnn.io._plain import is_plain
from statefulnn.io._reading import Budget, check_versions, collector, number_of_bytes, reading
from statefulnn.io._safetensors import DTYPES, NAMES, NOTE, write
from statefulnn.io._sharded import save_shards

# Endings that stand for other formats.
_OTHERS = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), "torch.load"),
    **dict.fromkeys((".npz", ".npy"), "np.load"),
    **dict.fromkeys((".h5", ".hdf5", ".onnx", ".gguf", ".msgpack"), "others' readers"),
}


def _path(path: Any, function: str, example: str) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise ArgumentError(
            explain(
                f"{function} was given an object of type {type(path).__name__} as the path",
                "a path is a text or a pathlib.Path",
                example,
            )
        ) from None


@shortened
def save(
    obj: object,
    path: str | PathLike[str],
    *,
    names: Filter = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a state dict, or anything that has one, to a safetensors file.

    The file is written beside the old one and replaces it at the end, so a crash leaves one of the two. A
    link is followed: what it points to is replaced. Tied parameters are stored once.

    Args:
        obj: a Module, Optimizer, Ensemble or Generator, or a dict of name -> array (numbers, texts and
            lists of these are kept as well).
        path: the file; with `max_shard_size` the folder for the files and their index. The format is
            safetensors whatever the file is called; there is a warning for the endings of other formats.
        names: which entries to save: names and patterns such as ``"lora_*"`` (compared with each part of a
            dotted name) or ``"head.*"`` (with the whole name); or a function of the name; None for all.
        metadata: texts to keep in the file.
        max_shard_size: bytes, or a text such as ``"5GB"``. It makes several files of at most this size, and
            an index as on the Hugging Face hub, ``model.safetensors.index.json``.

    Raises:
        CheckpointError: if a file cannot hold an entry; nothing is written.
        UnknownNameError: for `names` that match nothing.
        OSError: if the disk is full, or the folder is missing or may not be written; what was there before
            stays as it was.
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
    path = _path(path, "nn.save", 'nn.save(model, "model.safetensors")')
    arrays, notes = _taken_apart(_part(_state_of(obj), names))
    texts = {str(k): v for k, v in (metadata or {}).items()}
    texts_only = lambda k, v: is_plain(k) and isinstance(v, str) and is_plain(v)
    wrong = next((k for k, v in texts.items() if not texts_only(k, v) or k == NOTE), None)
    if wrong is not None:
        raise CheckpointError(
            explain(
                f"called nn.save with metadata {wrong!r}: {texts[wrong]!r}",
                f"metadata of a safetensors file are texts, and {NOTE!r} is taken",
                "metadata={'epoch': str(epoch)}; numbers may also be entries of the state dict",
            )
        )
    # Libraries of the Hugging Face hub ask for this format: torch's names and layouts.
    texts = {"format": "pt", **texts, NOTE: json.dumps(notes)}
    if max_shard_size is not None:
        save_shards(path, arrays, texts, number_of_bytes(max_shard_size, "nn.save: max_shard_size"))
        return
    if path.suffix in _OTHERS:
        warnings.warn(
            explain(
                f"nn.save wrote {str(path)!r} in the format of safetensors",
                f"files that end in {path.suffix} are mostly for {_OTHERS[path.suffix]}, in another format",
                f"nn.save(obj, {str(path.with_suffix('.safetensors'))!r}); nn.load reads it by any name",
            ),
            stacklevel=2,
        )
    with replacing(path) as temporary:
        write(temporary, arrays, texts, NOTE)


@shortened
def load(
    path: str | PathLike[str],
    *,
    device: Device | Callable[[str, tuple[int, ...]], Device] = None,
    names: Filter = None,
    mmap: bool = False,
    strict: bool = False,
    max_bytes: int | str | None = None,
) -> Any:
    """Read a state dict from a safetensors file, from several with an index, or from a file of torch.save.

    A file of torch.save is read without torch, and without running any code in it.

    Args:
        path: a file, an index (``*.index.json``), or a folder with a file named as on the Hugging Face hub,
            such as ``model.safetensors`` or ``pytorch_model.bin``, or an index of these.
        device: where the arrays go: a device, its name, a ``Sharding``, or a function of name and shape
            that returns one; "meta" for shapes alone. Each device reads its own part of the file.
        names: which entries to read, as for `save`; None for all.
        mmap: whether arrays on the CPU may stay in the file, which is read when they are first used. Then
            nobody may change it in place while they live (`save` does not: it makes a new file).
        strict: whether a file of torch.save that names anything but tensors, numbers, texts and containers
            of these is an error. Otherwise numpy arrays and numbers, paths, counters and the like are
            built, and a `Placeholder` stands for an object of another class.
        max_bytes: how much memory the file may turn into, a number or a text such as ``"8GB"``; None for 64
            MiB plus four times its size (more for the parts that describe objects).

    Returns:
        a dict by name, in the order it was saved, for ``load_state_dict``; from a file of torch.save
        whatever it holds, with arrays for tensors. Where JAX's 64-bit types are off, 64-bit arrays are
        numpy arrays, so no digits are lost.

    Raises:
        CheckpointError: if the file is damaged, is of another format, would take more than `max_bytes`,
            or with ``strict=True`` holds more than data. The message gives the byte.
        OSError: if it cannot be opened or read, with the path; FileNotFoundError if it does not exist.
        UnknownNameError: for `names` that match nothing.
        TypeError: for `names` if the file does not hold a dict by name.
        ValueError: for a `max_bytes` that is not a number of bytes.

    Example: see `save`.
    """
    path = _path(path, "nn.load", 'model.load_state_dict(nn.load("model.safetensors"))')
    limit = None if max_bytes is None else number_of_bytes(max_bytes, "nn.load: max_bytes")
    budget = Budget(path, limit)
    with reading(path), collector.paused():
        root = opened(path, budget, strict)
    if names is not None:
        if not isinstance(root, dict) or not all(isinstance(n, str) for n in root):
            raise TypeError(
                explain(
                    f"called nn.load({str(path)!r}) with names",
                    f"the file holds no dict by name, but {type(root).__name__}",
                    "load it without them",
                )
            )
        root = _part(root, names, f"nn.load({str(path)!r})")
    return placed(path, root, device, mmap, budget)


def _part(state: Mapping[str, Any], names: Filter, where: str = "nn.save") -> Mapping[str, Any]:
    """Return the entries that `names` chooses, with the versions of all modules."""
    if names is None:
        return state
    part = OrderedDict((n, state[n]) for n in chosen(state, names, where))
    if hasattr(state, "_metadata"):
        part._metadata = state._metadata  # pyright: ignore[reportAttributeAccessIssue]
    return part


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
    """Return the arrays to store, and the notes about everything else."""
    arrays: dict[str, np.ndarray] = {}
    ties: dict[str, str] = {}
    values: dict[str, Any] = {}
    first: dict[int, str] = {}
    items = list(
        state.items()
    )  # kept: a mapping may make new values each time, and ids would repeat
    for name, value in items:
        if not is_plain(name) or not isinstance(name, str) or name == "__metadata__":
            raise _unsaved(name, "names are texts")
        value = value.value if isinstance(value, Box) else value
        if not hasattr(value, "dtype"):
            values[name] = _plain(name, value)
        elif id(value) in first:
            ties[name] = first[id(value)]
        else:
            first[id(value)] = name
            arrays[name] = _stored(name, value)
    versions = getattr(state, "_metadata", {})
    try:
        check_versions(Path(), versions)
    except CheckpointError:
        raise _unsaved("_metadata", "the versions of modules in it are no numbers") from None
    notes = {"order": [name for name, _ in items], "ties": ties, "values": values}
    return arrays, {**notes, "modules": versions}


def _stored(name: str, value: Any) -> np.ndarray:
    """Return an array in the dtype and layout that the file holds."""
    if is_meta(value):
        raise _unsaved(name, "it is on the meta device and has no numbers")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise _unsaved(name, "it is a typed random key: keep jax.random.key_data(key)")
    if not isinstance(value.dtype, np.dtype) or isinstance(value, MaskedArray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise _unsaved(
            name, f"it is a {kind}, and no array of JAX or numpy: convert it, np.asarray(...)"
        )
    if isinstance(value, jax.Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        raise CheckpointError(
            explain(
                f"called nn.save with {name!r}, of which other processes hold parts",
                "one process writes a file, and has its own part of the array only",
                "in every process: with nn.Checkpointer(folder) as saver: saver.save(step, model=model)",
            )
        )
    array = np.asarray(value)
    counter = name.rpartition(".")[2] == "num_batches_tracked"
    if counter and array.dtype == np.int32:  # torch counts in 64 bits
        array = array.astype(np.int64)
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.newbyteorder("=") not in NAMES:
        raise _unsaved(name, f"safetensors has no dtype for {array.dtype}, but {', '.join(DTYPES)}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _plain(name: str, value: object) -> Any:
    if isinstance(value, Mapping) and any(hasattr(v, "dtype") for v in value.values()):
        raise _unsaved(
            name,
            "it is a dict with arrays in it, and the arrays of a file have names of one level",
            "a file for each, nn.save(model, path); or nn.Checkpointer, which saves a model, its "
            "optimizer and numbers together",
        )
    if not is_plain(value):
        what = f"it is of type {type(value).__name__}, neither an array nor plain data"
        raise _unsaved(name, what)
    return value


_SAVED = "save arrays, numbers, texts, and lists and dicts of numbers and texts (not tuples)"


def _unsaved(name: object, why: str, instead: str = _SAVED) -> CheckpointError:
    return CheckpointError(
        explain(
            f"called nn.save with an entry {name!r} that a file cannot hold",
            why,
            instead,
        )
    )
