"""Finds the file of a folder that holds the model, and opens the files that an index names."""

from __future__ import annotations

import errno
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._formats import is_torch
from statefulnn.io._reading import Budget, broken, check_versions, parsed_json, shown
from statefulnn.io._safetensors import NOTE, File
from statefulnn.io._stored import Source, Stored
from statefulnn.io._torch_files import load_torch

INDEX_ENDS = ".index.json"
_INDEX = re.compile(r".*\.index(\.\w+)?\.json")  # also for variants: .index.fp16.json
# The names of a model's file on the Hugging Face hub, in the order in which they are tried.
_NAMES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "adapter_model.bin",
)
_SHARD = re.compile(r"[^/\\:\0]+\.(safetensors|bin|pt|pth)")
# The system's errors for a name in an index that is not the name of a file.
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_LISTED = 12


def opened(path: Path, budget: Budget, strict: bool) -> Any:
    """Return what a file, or the files of an index, hold, with a `Stored` for each array.

    Args:
        path: a file, an index, or a folder.
        budget: pays for what is built.
        strict: whether foreign classes in a file of torch.save are an error.
    """
    if path.is_dir():
        path = _file_in(path)
    source = Source(path, budget)
    if not _INDEX.fullmatch(path.name):
        return load_torch(source, budget, strict) if is_torch(source) else _state(source, budget)
    text = source.read(0, source.size)
    try:
        return _indexed(path, text, budget, strict)
    except CheckpointError:
        # Somebody may have saved meanwhile: then the files belong to the next index.
        source = Source(path, budget)
        again = source.read(0, source.size)
        if again == text:
            raise
    return _indexed(path, again, budget, strict)


def _file_in(folder: Path) -> Path:
    for name in _NAMES:
        for file in (folder / f"{name}{INDEX_ENDS}", folder / name):
            if file.exists():
                return file
    entries = sorted(folder.iterdir())
    inside = [e.name for e in entries if e.is_dir() and _has_model(e)]
    names = [e.name + "/" * e.is_dir() for e in entries]
    there = ", ".join(names[:_LISTED]) + (
        f" and {len(names) - _LISTED} more" * (len(names) > _LISTED)
    )
    if inside:
        instead = f"one of the folders in it: nn.load({str(folder / inside[0])!r})"
    elif any(e.name.isdecimal() and (e / "statefulnn").exists() for e in entries):
        instead = f"nn.Checkpointer({str(folder)!r}).restore(...), which wrote it"
    else:
        instead = "name the file: nn.load(folder / name)"
    text = explain(
        f"found no model in the folder {folder}",
        f"it holds {there or 'nothing'}; looked for {', '.join(_NAMES)}, and an index of these",
        instead,
    )
    raise FileNotFoundError(errno.ENOENT, text, str(folder))


def _has_model(folder: Path) -> bool:
    return any((folder / f"{n}{end}").exists() for n in _NAMES for end in ("", INDEX_ENDS))


def _indexed(path: Path, text: bytes, budget: Budget, strict: bool) -> OrderedDict[str, Any]:
    """Return what the files of an index hold: from each file, the names the index assigns to it."""
    index = parsed_json(path, 0, text, budget)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise broken(path, 0, "an index that cannot be read", "JSON with a weight_map")
    named: dict[str, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            what = f"{shown(name)} in the file {shown(file)}"
            raise broken(path, 0, what, "a file in the same folder")
        named.setdefault(file, []).append(name)
    stored: dict[str, Any] = {}
    metadata: Mapping[str, str] = {}
    versions: Any = None
    for file, names in named.items():
        content, texts = _shard(path, file, budget, strict)
        missing = next((n for n in names if n not in content), None)
        if missing is not None:
            what = f"{shown(missing)} in {shown(file)}"
            raise broken(path, 0, what, "an array that the file holds")
        stored.update((n, content[n]) for n in content if places.get(n) == file)
        metadata = metadata or texts
        versions = versions or getattr(content, "_metadata", None)
    state = _with_notes(path, stored, metadata, budget)
    if versions and not hasattr(state, "_metadata"):
        state._metadata = versions  # pyright: ignore[reportAttributeAccessIssue]
    return state


def _shard(path: Path, file: str, budget: Budget, strict: bool) -> tuple[Any, Mapping[str, str]]:
    """Return what one file of an index holds, by name, and its metadata."""
    try:
        source = Source(path.parent / file, budget)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        expected = "every file of the index beside it"
        raise broken(path, 0, f"no file {shown(file)}", expected) from None
    if not is_torch(source):
        opened = File(source, budget)
        return opened.arrays, opened.metadata
    content = load_torch(source, budget, strict)
    if not isinstance(content, dict) or not all(isinstance(n, str) for n in content):
        what = f"{shown(file)} holds {type(content).__name__}"
        raise broken(path, 0, what, "a dict by name in each file of an index")
    return content, {}


def _state(source: Source, budget: Budget) -> OrderedDict[str, Any]:
    file = File(source, budget)
    return _with_notes(source.path, file.arrays, file.metadata, budget)


def _with_notes(
    path: Path, stored: Mapping[str, Stored], texts: Mapping[str, str], budget: Budget
) -> OrderedDict[str, Any]:
    """Return arrays by name, with the notes of `nn.save` applied: order, ties, plain data, versions."""
    notes = _notes(path, texts, budget)
    twice = next((n for n in notes["values"] if n in stored), None)
    if twice is not None:
        what = f"{shown(twice)} as an array, and as a value of metadata {NOTE!r}"
        raise broken(path, 8, what, "one of them")
    values = {**stored, **notes["values"]}
    for name, first in notes["ties"].items():
        if first in stored:
            values.setdefault(name, stored[first])
    order = dict.fromkeys([*(n for n in notes["order"] if n in values), *values])
    state = OrderedDict((n, values[n]) for n in order)
    if notes["modules"]:
        state._metadata = OrderedDict(notes["modules"])  # pyright: ignore[reportAttributeAccessIssue]
    return state


def _notes(path: Path, texts: Mapping[str, str], budget: Budget) -> dict[str, Any]:
    """Return the notes of `nn.save`; empty ones for other writers' files."""
    kinds = {"order": list, "ties": dict, "values": dict, "modules": dict}
    notes = {key: kind() for key, kind in kinds.items()}
    if NOTE not in texts:
        return notes
    unread = broken(path, 8, f"metadata {NOTE!r} that cannot be read", "what nn.save wrote")
    try:
        found = parsed_json(path, 8, texts[NOTE].encode(), budget)
    except (CheckpointError, UnicodeEncodeError):
        raise unread from None
    if not isinstance(found, dict):
        raise unread
    for key, kind in kinds.items():
        notes[key] = found.get(key, notes[key])
        if not isinstance(notes[key], kind):
            raise unread
    if not all(isinstance(n, str) for n in (*notes["order"], *notes["ties"].values())):
        raise unread
    check_versions(path, notes["modules"])
    return notes
