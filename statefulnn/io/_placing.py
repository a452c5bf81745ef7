"""Brings the arrays of a file to the devices where they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from statefulnn.core.arrays import from_numpy
from statefulnn.core.placement import META, resolve_device
from statefulnn.io._contents import Contents
from statefulnn.io._reading import Budget, broken, collector, reading
from statefulnn.io._stored import ALIGNMENT, Stored, check_booleans, jax_has, read

_ARRAY = 1024  # bytes that JAX takes for an array besides its numbers

Device = str | jax.Device | jax.sharding.Sharding | None


def placed(
    path: Path,
    root: Any,
    device: Device | Callable[[str, tuple[int, ...]], Device],
    mmap: bool,
    budget: Budget,
) -> Any:
    """Return what a file holds, with one array for each `Stored`, even if it has several names.

    Args:
        path: what the user asked for.
        root: containers with `Stored` in them.
        device: where arrays go, or a function of name and shape that returns this.
        mmap: whether arrays on the CPU may stay in the file.
        budget: pays for what is read.
    """
    with reading(path):
        contents = Contents(path, root, named=callable(device))
    stored = [leaf for leaf in contents.leaves if type(leaf) is Stored]
    if callable(device):
        places = [resolve_device(device(contents.name(s), s.shape)) for s in stored]
    else:
        places = [resolve_device(device)] * len(stored)
    with reading(path), collector.paused():
        arrays = _on_the_host(stored, places, mmap, budget)
    groups: dict[Any, list[int]] = {}
    for i, place in enumerate(places):
        if isinstance(arrays[i], np.ndarray) and jax_has(arrays[i].dtype):
            groups.setdefault(place, []).append(i)
        elif arrays[i] is None:
            arrays[i] = _spread(path, stored[i], place)
    with collector.paused():
        for place, mine in groups.items():  # one call for all arrays of a place
            moved = from_numpy([arrays[i] for i in mine], place, copy=False)
            for i, array in zip(mine, moved, strict=True):
                arrays[i] = array
        return contents.exchanged(dict(zip(map(id, stored), arrays, strict=True)))


def _on_the_host(stored: list[Stored], places: list[Any], mmap: bool, budget: Budget) -> list[Any]:
    """Return a numpy array for each, in memory or mapped from the file; on the meta device a shape.

    None stands for arrays of which each device reads its own part.
    """
    arrays: list[Any] = [None] * len(stored)
    to_read: list[int] = []
    hosts: dict[Any, bool] = {}
    for i, (s, place) in enumerate(zip(stored, places, strict=True)):
        budget.spend(_ARRAY)
        if place == META:
            arrays[i] = jax.ShapeDtypeStruct(s.shape, s.dtype)
            continue
        known = jax_has(s.dtype)
        if mmap and s.as_it_lies and s.start % ALIGNMENT == 0 and not _is_spread(place, known):
            arrays[i] = s.view
            continue
        budget.spend(s.nbytes)
        if _is_spread(place, known):
            continue
        if place not in hosts:
            hosts[place] = _is_host(place)
        if known and not hosts[place]:
            arrays[i] = s.view  # the other device copies it from there
        else:
            to_read.append(i)
    for i, array in zip(to_read, read([stored[i] for i in to_read]), strict=True):
        arrays[i] = array
    for s, array in zip(stored, arrays, strict=True):
        if isinstance(array, np.ndarray):
            _check(s, array)
    return arrays


def _is_spread(place: object, known: bool) -> bool:
    return known and isinstance(place, jax.sharding.Sharding)


def _check(stored: Stored, array: np.ndarray) -> np.ndarray:
    try:
        check_booleans(array)
    except ValueError as error:
        raise broken(stored.source.path, stored.start, str(error), "booleans") from None
    return array


def _spread(path: Path, stored: Stored, place: jax.sharding.Sharding) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        with reading(path):
            return _check(stored, stored.part(index))

    return jax.make_array_from_callback(stored.shape, place, part)


def _is_host(place: Any) -> bool:
    """Say whether JAX can use an array in host memory at this place without a copy."""
    if isinstance(place, jax.sharding.Sharding):
        return True  # an array whose dtype JAX lacks stays a numpy array
    if place is None:
        chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        place = chosen or jax.default_backend()
    return (place if isinstance(place, str) else place.platform) == "cpu"
