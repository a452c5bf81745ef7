"""The arrays of a step: read from the file to the places where they belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.arrays import from_numpy
from statefulnn.core.errors import CheckpointError, StateDictError, explain
from statefulnn.core.narrowing import numbers_beyond, span
from statefulnn.core.placement import META, resolve_device
from statefulnn.io._reading import shown
from statefulnn.io._snapshot import wanted
from statefulnn.io._stored import jax_has


def arrays_of(
    notes: Mapping[str, Any],
    objects: Mapping[str, Any],
    device: Any,
    orbax: Any,
    read: Callable[[Any], Any],
) -> dict[str, dict[str, Any]]:
    """Return the arrays to restore: object -> name -> array, each at its place.

    Args:
        notes: what was saved, by object.
        objects: what it is restored into.
        device: where arrays go, as for ``Checkpointer.restore``.
        orbax: the library.
        read: reads a tree of ``orbax.RestoreArgs`` from the file.
    """
    have = {label: wanted(label, objects.get(label), note) for label, note in notes.items()}
    places: dict[tuple[str, str], Any] = {}
    tree: dict[str, dict[str, Any]] = {}
    for label, values in have.items():
        for name, value in values.items():
            dtype, shape = notes[label]["specs"][name]
            place = places[label, name] = _place(device, f"{label}.{name}", tuple(shape), value)
            if 0 in shape:
                continue
            # Each device its own part; what JAX has no dtype for, or is no plain array, by way of numpy.
            direct = (
                place is not None and name not in notes[label]["keys"] and jax_has(np.dtype(dtype))
            )
            tree.setdefault(label, {})[name] = (
                orbax.ArrayRestoreArgs(sharding=place)
                if direct
                else orbax.RestoreArgs(restore_type=np.ndarray)
            )
    found = read(tree) if tree else {}
    arrays: dict[str, dict[str, Any]] = {label: {} for label in have}
    for label, values in have.items():
        for name, value in values.items():
            array = _as_noted(f"{label}.{name}", found.get(label, {}).get(name), notes[label], name)
            if value is not None and not isinstance(value, np.ndarray):
                _check_narrowing(f"{label}.{name}", array, value.dtype)
            arrays[label][name] = _placed_like(array, places[label, name], value)
    return arrays


_MOST_WORDS = 16  # of a random key


def check_shapes(notes: Mapping[str, Any], wanted: Mapping[str, Any], held: Any) -> None:
    """Raise if the file has other shapes than the notes say, before memory is taken for them.

    Args:
        notes: what was saved, by object.
        wanted: object -> name -> anything: what is about to be read.
        held: object -> name -> what orbax says of an array, with its shape.

    Raises:
        CheckpointError: with the name and both shapes.
    """
    for label, names in wanted.items():
        for name in names:
            shape = tuple(getattr(held[label][name], "shape", ()))
            storage = getattr(held[label][name], "storage", None)
            chunk = tuple(getattr(storage, "chunk_shape", None) or shape)
            words = int(
                name in notes[label]["keys"]
            )  # a random key has one dimension more, its words
            saved = tuple(notes[label]["specs"][name][1])
            fits = len(shape) == len(saved) + words and shape[: len(saved)] == saved
            fits = fits and all(n <= _MOST_WORDS for n in shape[len(saved) :])
            if (
                not fits
                or len(chunk) != len(shape)
                or any(c > max(1, n) for c, n in zip(chunk, shape, strict=True))
            ):
                found = f"an array of shape {shape} in pieces of {chunk}"
                raise _not_as_noted(f"{label}.{name}", found, notes[label], name)


def _not_as_noted(label: str, held: str, notes: Mapping[str, Any], name: str) -> CheckpointError:
    dtype, shape = notes["specs"][name]
    return CheckpointError(
        explain(
            f"read {shown(label)} from a checkpoint",
            f"the file holds {held}, and the notes beside it say {dtype} of shape {tuple(shape)}",
            "another step of the run",
        )
    )


def _as_noted(label: str, array: Any, notes: Mapping[str, Any], name: str) -> Any:
    """Return an array of the file as what the notes say it is.

    Raises:
        CheckpointError: if it is something else.
    """
    dtype, shape = notes["specs"][name]
    impl = notes["keys"].get(name)
    if 0 in shape:
        return np.zeros(shape, np.dtype(dtype))
    text = None
    if impl is not None:
        try:
            array = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
            text = str(array.dtype)
        except (TypeError, ValueError):
            text = f"no random keys of {impl!r}"
    elif hasattr(array, "dtype"):
        text = str(np.dtype(array.dtype).newbyteorder("="))
        dtype = str(np.dtype(dtype).newbyteorder("="))
    if text != dtype or list(array.shape) != shape:
        held = f"{text or 'no array'} of shape {getattr(array, 'shape', None)}"
        raise _not_as_noted(label, held, notes, name)
    return array


def _check_narrowing(label: str, array: Any, dtype: Any) -> None:
    """Raise if integers would be cut off.

    Raises:
        StateDictError: with the name and the values.
    """
    beyond = numbers_beyond(array, dtype)
    if beyond is not None:
        room = jnp.iinfo(dtype)
        raise StateDictError(
            explain(
                f"restored {label!r} of {array.dtype} into an array of {jnp.dtype(dtype)}",
                f"it {span(beyond)}, and there is room for {room.min} to {room.max}",
                'build the object with the saved dtype; jax.config.update("jax_enable_x64", True) '
                "allows 64 bits",
            )
        )


def _place(device: object, label: str, shape: tuple[int, ...], value: object) -> Any:
    """Return the sharding an array goes to, None where JAX chooses."""
    if device is not None:
        place = resolve_device(device(label, shape) if callable(device) else device)
        if place == META:
            raise ValueError(
                explain(
                    "restored to the device 'meta'",
                    "there are no numbers there",
                    "restore(..., device=jax.devices()[0])",
                )
            )
        if isinstance(place, jax.Device):
            return jax.sharding.SingleDeviceSharding(place)
        if place is not None:
            return place
    committed = getattr(value, "committed", isinstance(value, jax.ShapeDtypeStruct))
    return getattr(value, "sharding", None) if committed else None


def _placed_like(array: Any, place: Any, value: Any) -> Any:
    """Return an array with the dtype of what it replaces, at its place."""
    numpy = isinstance(array, np.ndarray)
    if isinstance(value, np.ndarray) or (value is None and numpy and not jax_has(array.dtype)):
        return np.asarray(array)
    if value is not None and array.dtype != value.dtype:
        array = array.astype(value.dtype)
    if isinstance(array, np.ndarray):
        array = from_numpy(array) if place is None else jax.device_put(array, place)
    elif place is not None and array.sharding != place:
        array = jax.device_put(array, place)
    return array
