"""The arrays of optax's states as buffers with names: whose each is, and what it is called."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import habits
from statefulnn.core.arrays import strong
from statefulnn.core.box import Box, unwrap
from statefulnn.core.compat import Tracer
from statefulnn.core.module import Module
from statefulnn.optim import _refusals as refusals

# Their dicts are of settings by name, not of parameters.
_SETTINGS = {".hyperparams", ".hyperparams_states"}


class Slots(Module):
    """The slots of one kind, and the settings of ``optax.inject_hyperparams``: their names are fixed."""

    scheduled: tuple[str, ...] = ()  # the settings that a schedule sets

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in self._buffers or name in self._modules or name in self.__dict__):
            habits.refuse_slot(
                ".".join(self._path()), name, [*self._buffers, *self._modules], value
            )
        if name in self.scheduled:
            raise refusals.set_by_a_schedule(name)
        super().__setattr__(name, as_setting(self._buffers.get(name), value))

    def note_schedules(self, names: Collection[str]) -> None:
        """Remember which of the settings schedules set."""
        super().__setattr__("scheduled", tuple(names))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __setitem__(self, name: str, value: object) -> None:
        setattr(self, name, value)


def as_setting(box: Box | None, value: object) -> Any:
    """Return a number, or an array, as one like that in a box, so that nothing is compiled for it."""
    if box is None:
        return strong(value)
    old, new = box.value, unwrap(value)
    if isinstance(new, jax.Array) and (new.shape, new.dtype) == (old.shape, old.dtype):
        return strong(new)
    kinds = (int, float, np.number, np.ndarray, jax.Array)
    real = isinstance(new, kinds) and not isinstance(new, bool)
    kind = jnp.result_type(new) if real else jnp.dtype(bool)
    if not any(jnp.issubdtype(kind, k) for k in (jnp.integer, jnp.floating)):
        raise refusals.setting_of_no_number(box.label(), new)
    if np.shape(new) not in ((), old.shape):
        raise refusals.setting_of_other_shape(box.label(), np.shape(new), old.shape)
    # A rate that was given as 1 can become 0.5.
    whole = jnp.issubdtype(old.dtype, jnp.integer) and not jnp.issubdtype(kind, jnp.integer)
    dtype = jnp.result_type(float) if whole else old.dtype
    array = jnp.broadcast_to(jnp.asarray(new, dtype), old.shape)
    moved = not isinstance(array, Tracer) and getattr(old, "committed", False)
    return jax.device_put(array, old.sharding) if moved else array


class Leaf(NamedTuple):
    """An array in the states of the groups.

    Attributes:
        slot: the path of its buffer.
        key: where it is in the states, whatever the name of its parameter.
        group: the number of its group.
        owner: the name of its parameter; None for a number that belongs to all.
        counts: whether it is such a number beside slots of parameters, as Adam's count of steps. It begins
            with them: parameters that come later have one of their own. Any other, such as the count of a
            schedule, is the optimizer's.
    """

    slot: tuple[str, ...]
    key: str
    group: int
    owner: str | None
    counts: bool


def is_array(leaf: object) -> bool:
    """Say whether a leaf of a state is an array."""
    # Python numbers count as arrays, as they do for jax.jit: a step counter must not be a constant.
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))


def leaves_of(paths: Sequence[Any], names: Collection[str], several: bool) -> list[Leaf]:
    """Return what the arrays are whose paths in the list of the groups' states are given.

    Args:
        paths: those of ``jax.tree_util``; the first key is the number of the group.
        names: those of the parameters.
        several: whether there are groups, so that names of slots tell which.
    """
    places = [_owner(path, names) for path in paths]
    beside = {path[: i - 1] for path, i in zip(paths, places, strict=True) if i == len(path) - 1}
    owners = [path[i].key if i > 0 else None for path, i in zip(paths, places, strict=True)]
    slots = _slot_names(
        [path[1:] for path in paths],
        [
            (f"group{path[0].idx}",) if several and owner is None else ()
            for path, owner in zip(paths, owners, strict=True)
        ],
    )
    return [
        Leaf(
            slot,
            "".join("[]" if j == i > 0 else str(key) for j, key in enumerate(path)),
            path[0].idx,
            owner,
            owner is None and path[:-1] in beside,
        )
        for slot, path, i, owner in zip(slots, paths, places, owners, strict=True)
    ]


def _owner(path: Sequence[Any], names: Collection[str]) -> int:
    """Return which key of a path is the name of a parameter; 0 if none is."""
    for i in range(len(path) - 1, 0, -1):
        key = path[i]
        if isinstance(key, jax.tree_util.DictKey) and key.key in names:
            return 0 if str(path[i - 1]) in _SETTINGS else i
    return 0


def _slot_names(paths: list[Any], prefixes: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Turn optax's paths into dotted names, as short as they can be.

    The positions in a chain are left out, ``mu.fc1.weight`` for ``[0].mu['fc1.weight']``, unless two
    names would then be one, or one the beginning of another.
    """
    full, short = (
        [
            prefix + tuple(part for key in path if keep(key) for part in _parts(key))
            for path, prefix in zip(paths, prefixes, strict=True)
        ]
        for keep in (lambda _: True, lambda key: not isinstance(key, jax.tree_util.SequenceKey))
    )
    uses = collections.Counter(short)
    inner = {parts[:i] for parts in short for i in range(len(parts))}
    for parts, long, prefix in zip(short, full, prefixes, strict=True):
        clear = uses[parts] == 1 and parts not in inner and parts != prefix
        found = parts if clear else long
        yield found if found != prefix else (*prefix, "slot")


def _parts(key: object) -> list[str]:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute)).split(".")
    return [str(key)]
