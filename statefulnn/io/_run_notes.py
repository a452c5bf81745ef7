"""The notes of a step: JSON about everything but arrays, checked before it is used.

Anybody who can write to the folder can write anything into them. So the notes are compared once, when they
are read, with what `_snapshot.taken` writes. Code that uses them after that can rely on their form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from statefulnn.core.errors import CheckpointError
from statefulnn.io._atomic import content_of
from statefulnn.io._reading import Budget, broken, parsed_json, reading, shown
from statefulnn.io._stored import misshapen

FORMAT = 1

# Notes that `json.dumps` wrote take at most this many times their size in memory.
_MULTIPLE, _FLOOR = 32, 1 << 30
_OF_STATE = {
    *("kind", "order", "specs", "ties", "tied"),
    *("keys", "values", "modules", "generators", "buffers"),
}


def read_notes(path: Path) -> dict[str, Any] | None:
    """Return the notes in a file, as `nn.Checkpointer` wrote them; None for another format.

    Raises:
        CheckpointError: if they are not as it writes them.
        OSError: if the file cannot be read.
    """
    with reading(path):
        text = content_of(path)
        content = parsed_json(path, 0, text, Budget(path, _FLOOR + _MULTIPLE * len(text)))
        if not isinstance(content, dict) or type(content.get("format")) is not int:
            return None
        if content["format"] != FORMAT:
            return None
        _Notes(path).check(content)
        content["metrics"] = {n: float(v) for n, v in content["metrics"].items()}
        return content


def stored_dtype(text: Any) -> np.dtype | None:
    """Return the dtype with this name if arrays of it can be stored, else None."""
    if not isinstance(text, str) or not re.fullmatch(r"[a-z]\w{2,30}|[<>][iufc]\d{1,2}", text):
        return None
    try:
        dtype = np.dtype(text)
    except TypeError:
        return None
    longest = 16 if dtype.kind == "c" else 8
    fits = dtype.kind in "biufcV" and 0 < dtype.itemsize <= longest and dtype.fields is None
    return dtype if fits and str(dtype) == text else None


def is_number(value: Any) -> TypeGuard[float]:
    """Say whether a value from JSON is a number that a float can hold."""
    return type(value) is float or (type(value) is int and value.bit_length() <= 1023)


class _Notes:
    """Compares notes with what they must be.

    Args:
        path: their file, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, content: Mapping[str, Any]) -> None:
        """Raise if any part of the notes is not as it must be."""
        self._fields("the notes", content, {"format", "objects", "metrics"})
        self._by_name("metrics", content["metrics"], is_number, "a number")
        self._by_name("objects", content["objects"], lambda v: isinstance(v, dict), "a dict")
        for label, note in content["objects"].items():
            if not label.isidentifier():
                raise self._wrong(f"an object named {shown(label)}", "a name without dots")
            kind = note.get("kind")
            label = label if len(label) <= 80 else f"{label[:60]} ..."
            if kind == "generator":
                self._fields(label, note, {"kind", "state"})
                self._need(_is_state(note["state"]), f"{label}.state", note["state"], _WORDS)
            elif kind == "plain":
                self._fields(label, note, {"kind", "value"})
            elif kind in ("state", "dict"):
                self._fields(label, note, _OF_STATE)
                self._check_state(label, note)
            else:
                raise self._wrong(
                    f"{label!r} of kind {shown(kind)}", "state, dict, generator or plain"
                )

    def _check_state(self, label: str, note: Mapping[str, Any]) -> None:
        for part in ("order", "buffers"):
            names = note[part]
            texts = isinstance(names, list) and all(isinstance(n, str) for n in names)
            self._need(
                texts and len(set(names)) == len(names), f"{label}.{part}", names, "a list of names"
            )
        specs, ties, values = note["specs"], note["ties"], note["values"]
        self._by_name(f"{label}.specs", specs, _is_spec, "[dtype, shape]")
        self._by_name(f"{label}.values", values, lambda v: True, "")
        self._by_name(
            f"{label}.ties",
            ties,
            lambda v: isinstance(v, str) and v in specs,
            "the name of an array",
        )
        self._by_name(f"{label}.tied", note["tied"], lambda v: isinstance(v, str), "a name")
        self._by_name(
            f"{label}.keys",
            note["keys"],
            lambda v: isinstance(v, str) and len(v) < 80,
            "a kind of key",
        )
        self._by_name(f"{label}.generators", note["generators"], _is_state, _WORDS)
        self._by_name(f"{label}.modules", note["modules"], _is_metadata, "a dict with a version")
        named = [*specs, *ties, *values]
        if len(set(named)) < len(named) or set(named) != {*note["order"], *note["buffers"]}:
            raise self._wrong(
                f"other names in {label}.order than arrays and values", "each name once"
            )
        if set(note["keys"]) != {n for n, spec in specs.items() if _is_key(spec[0])}:
            raise self._wrong(f"other names in {label}.keys than random keys", "each of them")

    def _fields(self, where: str, found: Mapping[str, Any], fields: set[str]) -> None:
        self._need(set(found) == fields, where, list(found), ", ".join(sorted(fields)))

    def _by_name(self, where: str, found: Any, fits: Callable[[Any], bool], expected: str) -> None:
        self._need(isinstance(found, dict), where, found, "a dict by name")
        for name, value in found.items():
            self._need(fits(value), f"{where}[{shown(name)}]", value, expected)

    def _need(self, fits: bool, where: str, found: object, expected: str) -> None:
        if not fits:
            raise self._wrong(f"{where} is {shown(found)}", expected)

    def _wrong(self, found: str, expected: str) -> CheckpointError:
        return broken(self.path, 0, found, expected)


_WORDS = "four words of 32 bits"


def _is_state(value: Any) -> bool:
    words = isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 32 for v in value)
    return words and len(value) == 4


def _is_metadata(value: object) -> bool:
    return isinstance(value, dict) and type(value.get("version")) in (int, type(None))


def _is_key(dtype: str) -> bool:
    return re.fullmatch(r"key<\w{1,60}>", dtype) is not None


def _is_spec(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        return False
    dtype, shape = stored_dtype(value[0]), value[1]
    if not isinstance(shape, list) or misshapen(shape, 16 if dtype is None else dtype.itemsize):
        return False
    return dtype is not None or (_is_key(value[0]) and 0 not in shape)
