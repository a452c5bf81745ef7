"""What a checkpoint of a training run holds of an object, and the way back into the object.

An object is taken apart into arrays, which go to the file as arrays, and notes: plain data about everything
else. `compared` says what would not fit before anything is changed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.errors import CheckpointError, explain
from statefulnn.core.generator import Generator
from statefulnn.core.module import Module
from statefulnn.core.placement import is_meta
from statefulnn.core.state_dict import _dtype_kind as dtype_kind
from statefulnn.core.uninitialized import is_lazy
from statefulnn.io._plain import is_plain
from statefulnn.io._run_notes import stored_dtype


@dataclass
class Report:
    """How what was saved differs from the objects it is to go into, by ``object.name``.

    Attributes:
        missing: names of the objects that were not saved.
        unexpected: names that were saved, and the objects do not have.
        reshaped: names of another shape, with both shapes.
        retyped: names of another dtype, with both.
        retied: names of a parameter that is tied to another on one side only.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    retyped: list[str] = field(default_factory=list)
    retied: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        lines = []
        for kind, names in vars(self).items():
            # Names of a file may be as long as it likes.
            short = [name if len(name) <= 400 else f"{name[:200]} ..." for name in names[:8]]
            lines += [f"    {kind}: {name}" for name in short]
            if len(names) > 8:
                lines.append(f"    {kind}: {len(names) - 8} more")
        return "\n".join(lines) or "    nothing"


def taken(label: str, obj: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of an object by name, and the notes about it, as JSON.

    Args:
        label: its name in the checkpoint.
        obj: a Generator, something with a state dict, a dict of arrays and plain data, or plain data.

    Raises:
        CheckpointError: for what cannot be saved.
    """
    if isinstance(obj, Generator):
        return {}, {"kind": "generator", "state": _words(obj)}
    if has_state(obj):
        state, kind = obj.state_dict(), "state"
    elif isinstance(obj, Mapping) and all(isinstance(n, str) for n in obj):
        state, kind = obj, "dict"
    else:
        return {}, {"kind": "plain", "value": _plain(label, obj)}
    beside = dict(_beside(obj))
    arrays: dict[str, Any] = {}
    notes: dict[str, Any] = {
        "kind": kind,
        "order": list(state),
        "specs": {},
        "ties": {},  # names of one array, which is stored once
        "tied": _tied(obj),  # names of one box
        "keys": {},
        "values": {},
        "modules": dict(getattr(state, "_metadata", {})),
        "generators": {n: _words(b) for n, b in beside.items() if isinstance(b, Generator)},
        "buffers": [n for n, b in beside.items() if not isinstance(b, Generator)],
    }
    first: dict[int, str] = {}
    boxes = {n: b for n, b in beside.items() if not isinstance(b, Generator)}
    for name, value in {**state, **boxes}.items():
        if not isinstance(name, str):
            raise _unsaved(f"{label}[{name!r}]", "names are texts")
        if is_lazy(value):
            raise _unsaved(f"{label}.{name}", "it has no shape yet: call the model once before")
        value = value.value if isinstance(value, Box) else value
        if not hasattr(value, "dtype"):
            notes["values"][name] = _plain(f"{label}.{name}", value)
        elif id(value) in first:
            notes["ties"][name] = first[id(value)]
        else:
            first[id(value)] = name
            notes["specs"][name] = [str(value.dtype), list(value.shape)]
            array = _storable(f"{label}.{name}", value, name, notes["keys"])
            if array.size:  # orbax has no place for those without elements
                arrays[name] = array
    return arrays, notes


def has_state(obj: Any) -> bool:
    """Say whether an object gives and takes a state dict."""
    return all(callable(getattr(obj, m, None)) for m in ("state_dict", "load_state_dict"))


def compared(label: str, obj: Any, notes: Mapping[str, Any], report: Report) -> None:
    """Add to a report how the notes about an object differ from the object.

    Raises:
        CheckpointError: if one is a generator, or plain data, and the other is not.
    """
    kind = "state" if has_state(obj) else "plain"
    if isinstance(obj, Generator):
        kind = "generator"
    if kind == "plain" or kind != notes["kind"]:
        saved = {"generator": "a generator", "state": "a state dict"}.get(notes["kind"], "data")
        raise CheckpointError(
            explain(
                f"restored {label!r} into an object of type {type(obj).__name__}",
                f"{saved} was saved under that name",
                f"pass what has a state dict, or a generator, as it was saved; data come back in the "
                f"result: restore(...).data[{label!r}]",
            )
        )
    if isinstance(obj, Generator):
        return
    saved = notes["order"]
    for path, module in obj.named_modules() if isinstance(obj, Module) else ():
        if hasattr(
            type(module), "_expect_state"
        ):  # an optimizer, whose slots may be those of another time
            prefix = f"{path}." if path else ""
            module._expect_state([n[len(prefix) :] for n in saved if n.startswith(prefix)])
    have: Mapping[str, Any] = obj.state_dict()
    report.missing += [f"{label}.{n}" for n in have if n not in set(saved)]
    report.unexpected += [f"{label}.{n}" for n in saved if n not in have]
    for name in saved:
        spec, value = _spec(notes, name), have.get(name)
        if value is None or is_lazy(value):
            continue
        value = value.value if isinstance(value, Box) else value
        array = hasattr(value, "dtype")
        if array != (spec is not None):
            what = ("data", "an array") if array else ("an array", "data")
            report.retyped.append(f"{label}.{name}: {what[0]} -> {what[1]}")
        elif spec is not None:
            if tuple(spec[1]) != tuple(value.shape):
                report.reshaped.append(f"{label}.{name}: {tuple(spec[1])} -> {tuple(value.shape)}")
            if spec[0] != str(value.dtype):
                report.retyped.append(f"{label}.{name}: {spec[0]} -> {value.dtype}")

    now, then = _tied(obj), notes["tied"]
    for name in (n for n in saved if n in have):
        first, before = now.get(name, name), then.get(name, name)
        if then.get(first, first) != before:
            report.retied.append(f"{label}.{name}: of its own -> tied to {first}")
        elif now.get(before, before) != first:
            report.retied.append(f"{label}.{name}: tied to {before} -> of its own")


def wanted(label: str, obj: Any, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays to read: name -> the array that is in its place, None if there is none."""
    if notes["kind"] == "dict":
        return dict.fromkeys(notes["specs"])
    if notes["kind"] != "state" or obj is None:
        return {}
    have = {**obj.state_dict(), **{n: b for n, b in _beside(obj) if not isinstance(b, Generator)}}
    found: dict[str, Any] = {}
    for name, value in have.items():
        spec = _spec(notes, name)
        value = value.value if isinstance(value, Box) and not is_lazy(value) else value
        if spec is not None and (is_lazy(value) or _fits(spec, value)):
            found.setdefault(notes["ties"].get(name, name), None if is_lazy(value) else value)
    return found


def put_back(obj: Any, notes: Mapping[str, Any], arrays: Mapping[str, Any]) -> Callable[[], None]:
    """Write what was saved into an object; return a function that undoes it.

    Args:
        arrays: what `wanted` asked for, in their places.
    """
    if isinstance(obj, Generator):
        before = obj.get_state()
        obj.set_state(np.array(notes["state"], np.uint32))

        def as_before() -> None:
            obj.set_state(before)

        return as_before
    return _put_state(obj, notes, arrays)


def _put_state(obj: Any, notes: Mapping[str, Any], arrays: Mapping[str, Any]) -> Callable[[], None]:
    current = obj.state_dict()
    beside = dict(_beside(obj))
    kept = {n: b.value for n, b in beside.items()}

    def undo() -> None:
        _load(obj, current)
        for name, box in beside.items():
            box.write(kept[name])

    state: OrderedDict[str, Any] = OrderedDict(current)
    for name in current:
        first = notes["ties"].get(name, name)
        if first in arrays:
            state[name] = arrays[first]
        elif name in notes["values"] and not hasattr(current[name], "dtype"):
            state[name] = notes["values"][name]
    if notes["modules"]:
        state._metadata = OrderedDict(notes["modules"])  # pyright: ignore[reportAttributeAccessIssue]
    try:
        _load(obj, state)
        for name, box in beside.items():
            if isinstance(box, Generator) and name in notes["generators"]:
                box.write(np.array(notes["generators"][name], np.uint32))
            elif name in notes["buffers"] and name in arrays:
                box.write(jnp.asarray(arrays[name]))
    except BaseException:
        undo()
        raise
    return undo


def data_of(notes: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """Return what was saved as data."""
    if notes["kind"] == "plain":
        return notes["value"]
    found = {}
    for name in notes["order"]:
        first = notes["ties"].get(name, name)
        found[name] = arrays[first] if first in arrays else notes["values"][name]
    return found


# --------------------------------------------------------------------------------------------------
# Parts


def _beside(obj: object) -> Iterator[tuple[str, Box]]:
    """Yield the boxes of a module that its state dict leaves out, and a step may change."""
    if not isinstance(obj, Module):
        return
    for path, module in obj.named_modules():
        prefix = f"{path}." if path else ""
        for name in sorted(module._non_persistent_buffers_set):
            box = module._buffers.get(name)
            if box is not None:
                yield prefix + name, box
        for name, value in sorted(module.__dict__.items()):
            if isinstance(value, Generator):
                yield prefix + name, value


def _tied(obj: object) -> dict[str, str]:
    """Return for each further name of a tied parameter its first name."""
    ties: dict[str, str] = {}
    if isinstance(obj, Module):
        first: dict[int, str] = {}
        for name, box in obj.state_dict(keep_vars=True).items():
            if isinstance(box, Box) and first.setdefault(id(box), name) != name:
                ties[name] = first[id(box)]
    return ties


def _fits(spec: Any, value: Any) -> bool:
    """Say whether an array can take the place of another: of its shape, and of its kind of numbers."""
    if not hasattr(value, "dtype") or spec[1] != list(value.shape):
        return False
    return spec[0] == str(value.dtype) or (
        not spec[0].startswith("key") and dtype_kind(np.dtype(spec[0])) == dtype_kind(value.dtype)
    )


def _load(obj: Any, state: Mapping[str, Any]) -> None:
    if isinstance(obj, Module):
        obj.load_state_dict(state, assign=True)  # the arrays are where they belong
    else:
        obj.load_state_dict(state)


def _spec(notes: Mapping[str, Any], name: str) -> Any:
    return notes["specs"].get(notes["ties"].get(name, name))


def _words(generator: Generator) -> list[int]:
    return [int(word) for word in np.asarray(generator.state)]


def _storable(label: str, value: Any, name: str, keys: dict[str, str]) -> Any:
    if is_meta(value):
        raise _unsaved(label, "it is on the meta device and has no numbers")
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        if not value.size:
            raise _unsaved(label, "it is an array of no random keys")
        keys[name] = str(jax.random.key_impl(value))
        return jax.random.key_data(value)
    if stored_dtype(str(value.dtype)) is None:
        raise _unsaved(label, f"it is of dtype {value.dtype}")
    # What is not JAX's may change after this: a copy.
    return value if isinstance(value, jax.Array) else np.array(value)


def _plain(label: str, value: object) -> Any:
    if is_plain(value):
        return json.loads(json.dumps(value))  # a copy: the value may change before it is written
    raise _unsaved(label, f"it is of type {type(value).__name__}")


def _unsaved(label: str, why: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"saved {label!r}, which a checkpoint cannot hold",
            why,
            "save modules, optimizers and whatever has state_dict and load_state_dict; generators; "
            "dicts of arrays by name; numbers, texts, and lists and dicts with texts as keys of these",
        )
    )
