"""The arrays that pure calls are given by name: checked, and put together where they are those of layers.

A module may store the arrays of many layers as one (`nn.LayerStack`). Pure calls know what is stored; they
take arrays by the names of single layers as well, as `state_dict` has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.module import Module
from statefulnn.core.narrowing import check_jax_holds
from statefulnn.core.plan import plan_of
from statefulnn.core.slices import entry_in
from statefulnn.core.state_dict import _dtype_kind as dtype_kind
from statefulnn.transforms import refusals


def merged(dicts: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several dicts as one, or raise if they have names in common."""
    if isinstance(dicts, Mapping):
        return dict(dicts)
    if not isinstance(dicts, Sequence) or not all(isinstance(d, Mapping) for d in dicts):
        raise refusals.no_dicts(type(dicts).__name__)
    result: dict[str, Any] = {}
    for d in dicts:
        twice = result.keys() & d.keys()
        if twice:
            raise ValueError(f"{sorted(twice)} appear in multiple dictionaries")
        result.update(d)
    return result


def checked(name: str, value: object, own: Any, function: str) -> Any:
    """Return the array to use under a name, or raise if it does not fit the module's own."""
    if value is None:
        return None
    if isinstance(value, Box):
        value = value.value
    if isinstance(value, (np.ndarray, np.generic)):
        check_jax_holds(value, lambda: f"{name!r}, which was given to {function},")
    if isinstance(value, (np.ndarray, np.generic, float, int)):
        value = jnp.asarray(value)
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise refusals.no_array(function, name, type(value).__name__)
    if shape != own.shape:
        raise refusals.other_shape(function, name, shape, own.shape)
    # Of one kind, not of one width: parameters may be cast for mixed precision.
    if dtype_kind(dtype) != dtype_kind(own.dtype):
        raise refusals.other_dtype(function, name, dtype, own.dtype)
    return value


@dataclasses.dataclass
class Stored:
    """What is stored for many layers, and which entries of it somebody names.

    Attributes:
        name: its name.
        position: its leaf position.
        rank: how many axes the array of one layer has.
        entries: an index, with a number for each stack around the layer, by the name of the layer's array.
    """

    name: str
    position: int
    rank: int
    entries: dict[str, tuple[int, ...]]

    def joined(self, whole: Any, given: Mapping[str, Any], function: str, partly: bool) -> Any:
        """Return what is stored with the given entries."""
        first, counts = self._layers(whole)
        shape = (*whole.shape[:first], *whole.shape[first + len(counts) :])
        own = jax.ShapeDtypeStruct(shape, whole.dtype)
        values = {}
        for name, index in self.entries.items():
            values[index] = checked(name, given[name], own, function)
            if values[index] is None:
                raise refusals.no_array(function, name, "NoneType")
        if self.complete(whole):
            stacked = jnp.stack([values[index] for index in sorted(values)], first)
            return stacked.reshape(*shape[:first], *counts, *shape[first:])
        if not partly:
            raise refusals.not_for_all_layers(function, self.name, len(values), math.prod(counts))
        whole = whole.astype(jnp.result_type(whole, *values.values()))
        for index, value in values.items():
            whole = whole.at[self._at(index)].set(value)
        return whole

    def apart(self, whole: Any) -> dict[str, Any]:
        """Return the entries by name."""
        return {name: whole[self._at(index)] for name, index in self.entries.items()}

    def complete(self, whole: Any) -> bool:
        """Say whether all entries are named."""
        return len(self.entries) == math.prod(self._layers(whole)[1])

    def _layers(self, whole: Any) -> tuple[int, tuple[int, ...]]:
        """Return the first axis of layers and the sizes of these; an ensemble has axes in front of them."""
        depth = len(next(iter(self.entries.values())))
        first = whole.ndim - self.rank - depth
        return first, whole.shape[first : first + depth]

    def _at(self, index: tuple[int, ...]) -> tuple[Any, ...]:
        return (..., *index, *[slice(None)] * self.rank)


def layers_given(
    given: Mapping[str, Any], names: Mapping[str, int], module: Callable[[], Module]
) -> list[Stored]:
    """Return what is stored that arrays are given for by the names of layers.

    Args:
        given: arrays by name.
        names: those of what is stored.
        module: returns the module that has them.
    """
    unknown = [name for name in given if name not in names]
    if not unknown:
        return []
    root = module()
    plan = plan_of(root)
    positions = {id(box): i for i, box in enumerate(plan.boxes)}
    found: dict[int, Stored] = {}
    for name in unknown:
        whole, rank, index = entry_in(_box_at(root, name))
        if index and id(whole) in positions:
            stored = plan.moduledef.leaf_names[positions[id(whole)]]
            position = names[stored]
            found.setdefault(position, Stored(stored, position, rank, {})).entries[name] = index
    return list(found.values())


def _box_at(root: Module, name: str) -> Any:
    path, _, last = str(name).rpartition(".")
    try:
        owner = root.get_submodule(path)
    except AttributeError:
        return None
    return owner._parameters.get(last, owner._buffers.get(last))


def joined(
    given: Mapping[str, Any],
    layers: Sequence[Stored],
    leaves: Sequence[Any],
    function: str,
    needed: Collection[str],
) -> Mapping[str, Any]:
    """Return the given arrays by the names of what is stored.

    Args:
        given: arrays, some by the names of layers.
        layers: what these names stand for.
        leaves: what is stored now.
        function: the caller, for messages.
        needed: what has to be given for all layers. Of anything else, the others keep what is stored now.

    Raises:
        UnknownNameError: if some are missing that have to be given.
        ValueError: for what is stored beside an entry of it.
        ShapeError, DtypeError, ArgumentError: for arrays that do not fit.
    """
    if not layers:
        return given
    result = dict(given)
    for stored in layers:
        if stored.name in given:
            raise refusals.entry_beside_all(function, next(iter(stored.entries)), stored.name)
        whole = leaves[stored.position]
        result[stored.name] = stored.joined(whole, given, function, stored.name not in needed)
        for name in stored.entries:
            del result[name]
    return result


def named_by_layer(result: dict[str, Any], layers: Sequence[Stored]) -> dict[str, Any]:
    """Return arrays by the names of layers, where all of these were given so."""
    for stored in layers:
        if stored.name in result and stored.complete(result[stored.name]):
            result |= stored.apart(result.pop(stored.name))
    return result
