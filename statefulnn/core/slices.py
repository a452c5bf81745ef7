"""Boxes that share one array: each reads and writes its entry of an axis.

Terms
  whole       the box that holds the stacked array, ``(n, ...)``.
  slice       a box that stands for one entry of it, or several. It has no array of its own.

A slice that is given a value of another shape or dtype leaves the whole and holds that value itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core import refusals
from statefulnn.core.arrays import entry_of, stack_arrays
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, Tracer, current_trace, plain_evaluation
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.placement import is_meta, place_of_whole

# The slots that the properties below stand before.
_held = Box.__dict__["_value"]
_own_flag = Parameter.__dict__["_requires_grad"]


class _Pending:
    """An array of which some entries are about to be replaced: all at once, when somebody reads it."""

    __slots__ = ("base", "entries", "position")

    def __init__(self, base: Any, position: int) -> None:
        self.base = base
        self.position = position
        self.entries: dict[int, Any] = {}

    def joined(self) -> Any:
        base, entries, position = self.base, self.entries, self.position
        count = base.shape[position]
        if len(entries) < count and is_meta(base):
            return base
        if len(entries) < count:
            for index, value in entries.items():
                base = _replaced(base, index, position, value)
            return base
        parts = [entries[i] for i in range(count)]
        if all(map(is_meta, parts)):
            return jax.ShapeDtypeStruct(base.shape, base.dtype, sharding=base.sharding)
        new = jnp.stack(parts, position) if position else stack_arrays(parts)
        noted = base.sharding is not None if is_meta(base) else getattr(base, "committed", False)
        return jax.device_put(new, base.sharding) if noted else new


class _Whole:
    """What wholes share: written entries wait until somebody reads the array, so n writes copy it once."""

    __slots__ = ()

    clone_class: type

    @property
    def _value(self) -> Any:
        held = _held.__get__(self)
        if type(held) is _Pending:
            with plain_evaluation():  # also while somebody traces
                held = held.joined()
            if not is_meta(held):
                _held.__set__(self, held)
        return held

    @_value.setter
    def _value(self, new: object) -> None:
        _held.__set__(self, new)


class _WholeParameter(_Whole, Parameter):
    __slots__ = ()
    clone_class = Parameter


class _WholeBuffer(_Whole, Buffer):
    __slots__ = ()
    clone_class = Buffer


class Slice:
    """Which entry of which whole a box stands for.

    Attributes:
        whole: the box with the stacked array.
        index: the number of the entry; or a slice, for several of them.
        rank: the number of axes of an entry: the axis is counted from the end, so that arrays may have
            further axes in front, such as that of an ensemble.
        module: what the whole is stored in; a change of the box is one of this module.
        trainable: whether the entry is trained; None for what the whole says.
    """

    __slots__ = ("_part", "index", "module", "rank", "trainable", "whole")

    def __init__(self, whole: Box, index: int | slice, rank: int, module: ModuleBase) -> None:
        self.whole = whole
        self.index = index
        self.rank = rank
        self.module = module
        self.trainable: bool | None = None
        self._part: tuple[Any, Any] | None = None

    def position(self, array: Any) -> int:
        return array.ndim - self.rank - 1

    def read(self) -> Any:
        held = _held.__get__(self.whole) if isinstance(self.whole, _Whole) else self.whole._value
        if type(held) is _Pending:
            if isinstance(self.index, int) and self.index in held.entries:
                return held.entries[self.index]
            held = held.base if isinstance(self.index, int) else self.whole._value
        # The same object as long as the whole is the same: who compares by identity sees no change.
        if self._part is not None and self._part[0]() is held:
            part = self._part[1]()
            if part is not None:
                return part
        part = entry_of(held, self.index, self.position(held))
        if is_meta(part):
            self._part = (lambda: held), (lambda: part)
        elif not isinstance(part, Tracer):
            self._part = weakref.ref(held), weakref.ref(part)
        return part

    def spec(self) -> tuple[tuple[int, ...], Any]:
        """Return shape and dtype of the entry without reading it."""
        held = _held.__get__(self.whole) if isinstance(self.whole, _Whole) else self.whole._value
        held = held.base if type(held) is _Pending else held
        position = self.position(held)
        kept = ()
        if isinstance(self.index, slice):
            kept = (len(range(*self.index.indices(held.shape[position]))),)
        return (*held.shape[:position], *kept, *held.shape[position + 1 :]), held.dtype

    def note_place(self, place: Any) -> None:
        """Note where the whole belongs, if it has no numbers yet: where its entries are joined."""
        held = _held.__get__(self.whole)
        base = held.base if type(held) is _Pending else held
        if is_meta(base) and isinstance(place, jax.sharding.NamedSharding):
            base = jax.ShapeDtypeStruct(base.shape, base.dtype, sharding=place)
            if type(held) is _Pending:
                held.base = base
            else:
                _held.__set__(self.whole, base)

    def write(self, new: Any) -> None:
        whole: Any = self.whole
        if whole.baked_in is not None:
            whole.baked_in.warn_of_value(whole)
        plain = current_trace() is EAGER and whole._scope is None and not isinstance(new, Tracer)
        if plain and isinstance(self.index, int):
            if not isinstance(whole, (_Whole, _Sliced)):
                becomes: Any = _WholeParameter if isinstance(whole, Parameter) else _WholeBuffer
                whole.__class__ = becomes
            if isinstance(whole, _Whole):
                held = _held.__get__(whole)
                if type(held) is not _Pending:
                    held = _Pending(held, self.position(held))
                    _held.__set__(whole, held)
                held.entries[self.index] = new
                return
        array = whole._value
        whole._value = _replaced(array, self.index, self.position(array), new)


class _Sliced:
    """What slices share: value and `requires_grad` are those of an entry of the whole."""

    __slots__ = ()

    clone_class: type

    @property
    def _value(self) -> Any:
        return _held.__get__(self).read()

    @_value.setter
    def _value(self: Any, new: Any) -> None:
        at: Slice = _held.__get__(self)
        if (tuple(new.shape), new.dtype) == at.spec():
            at.write(new)
        else:
            separate(self, new)

    def _read_in_trace(self) -> None:
        _held.__get__(self).whole._read_in_trace()


class _SlicedParameter(_Sliced, Parameter):
    __slots__ = ()
    clone_class = Parameter

    @property
    def _requires_grad(self) -> bool:
        at: Slice = _held.__get__(self)
        whole: Any = at.whole
        return whole._requires_grad if at.trainable is None else at.trainable

    @_requires_grad.setter
    def _requires_grad(self, flag: bool) -> None:
        at: Slice = _held.__get__(self)
        at.trainable = flag
        at.module._nn_stamp.touch()


class _SlicedBuffer(_Sliced, Buffer):
    __slots__ = ()
    clone_class = Buffer


def slice_of(box: Any) -> Slice | None:
    """Return which entry a box stands for, None for a box with an array of its own."""
    return _held.__get__(box) if isinstance(box, _Sliced) else None


def whole_of(box: Any) -> tuple[Any, list[int]]:
    """Return what a box stands for an entry of, and how many axes entries have there, stack by stack."""
    ranks = []
    while (at := slice_of(box)) is not None:
        ranks.append(at.rank)
        box = at.whole
    return box, ranks


def entry_in(box: Any) -> tuple[Any, int, tuple[int, ...]]:
    """Return what a box stands for an entry of, its number of axes, and its index along those of layers."""
    rank, index = 0, ()
    while (at := slice_of(box)) is not None and isinstance(at.index, int):
        rank = rank if index else at.rank
        box, index = at.whole, (at.index, *index)
    return box, rank, index


def refuse_parts(boxes: Sequence[Any]) -> None:
    """Raise if a box stands for an entry of another one of them: both would be leaves."""
    slices: list[Any] = [box for box in boxes if isinstance(box, _Sliced)]
    known = {id(box) for box in boxes} if slices else set()
    for box in slices:
        whole = _held.__get__(box).whole
        if id(whole) in known:
            raise refusals.part_beside_the_whole(box.label(), whole.label())


def become_slice(box: Any, at: Slice) -> None:
    """Let a box stand for an entry of a whole."""
    becomes: Any = _SlicedParameter if isinstance(box, Parameter) else _SlicedBuffer
    box.__class__ = becomes
    _held.__set__(box, at)


def separate(box: Any, value: Any = None) -> None:
    """Let a slice hold an array of its own: a given one, or the present value."""
    at = slice_of(box)
    if at is None:
        return
    value = box._value if value is None else value
    flag = getattr(box, "_requires_grad", None)
    box.__class__ = box.clone_class
    _held.__set__(box, value)
    if flag is not None:
        _own_flag.__set__(box, flag)
    at.module._nn_stamp.touch()


def spec_of(box: Any) -> tuple[tuple[int, ...], Any]:
    """Return shape and dtype of what a box holds."""
    at = slice_of(box)
    if at is not None:
        return at.spec()
    value = box._value
    return tuple(value.shape), value.dtype


def gathered(boxes: Sequence[Any]) -> tuple[Box | None, Any]:
    """Return what the boxes hold, stacked, and the whole that has exactly that, if there is one."""
    places = [slice_of(box) for box in boxes]
    first = places[0]
    start: Any = None if first is None else first.index
    if first is not None and all(
        at is not None and at.whole is first.whole and at.index == start + i
        for i, at in enumerate(places)
    ):
        array = first.whole._value
        position = first.position(array)
        if array.shape[position] == len(boxes):
            return first.whole, array
        return None, entry_of(array, slice(start, start + len(boxes)), position)
    values = [box._value for box in boxes]
    if all(map(is_meta, values)):
        place = place_of_whole(values[0].sharding, 0)
        shape = (len(values), *values[0].shape)
        return None, jax.ShapeDtypeStruct(shape, values[0].dtype, sharding=place)
    return None, stack_arrays(values)


def _replaced(array: Any, index: int | slice, position: int, new: Any) -> Any:
    return array.at[(slice(None),) * position + (index,)].set(new)
