"""Arrays as boxes hold them: made without compiling anything, checked, never weakly typed."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core import refusals
from statefulnn.core.compat import EAGER, Tracer, current_trace, plain_evaluation
from statefulnn.core.errors import name_of
from statefulnn.core.narrowing import check_jax_holds
from statefulnn.core.placement import META, Place, Value, is_meta, place_of_entry
from statefulnn.core.refusals import Subject


def host_array(
    shape: Sequence[int], dtype: DTypeLike, empty: Callable[..., np.ndarray] = np.empty
) -> np.ndarray:
    """Return an uninitialised numpy array (with ``np.zeros``: of zeros) that JAX need not copy.

    The CPU backend takes memory over as it is if it starts at a multiple of 64 bytes.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def from_numpy(
    values: np.ndarray | np.generic | list[np.ndarray], device: Place = None, copy: bool = True
) -> Any:
    """Return a numpy array, or a list of them, on a device, without compiling anything for its shape.

    With ``copy=False`` the array may share memory with the numpy array, which nobody may write again.
    """
    if current_trace() is not EAGER:
        return jax.tree.map(jnp.asarray, values)
    return jax.device_put(jax.tree.map(np.array, values) if copy else values, device)


def filled(shape: Sequence[int], dtype: DTypeLike, place: Place = None, value: float = 0) -> Any:
    """Return an array of one value at a place (what `resolve_device` gives), compiling nothing for it.

    On the meta device that is its shape alone. What lies on several devices is made there, at one
    compilation a shape, and is never whole on the host.
    """
    shape = tuple(shape)
    if place == META:
        return jax.ShapeDtypeStruct(shape, dtype)
    if isinstance(place, jax.sharding.Sharding) and len(place.device_set) > 1:
        return jnp.full(shape, value, dtype, device=place)
    # Zeros of numpy's cost nothing until somebody reads them.
    values = host_array(shape, dtype, np.zeros)
    if value:
        values[...] = value
    return from_numpy(values, place, copy=False)


class _OfABox:
    """Stands on the class of arrays for an attribute that boxes have: setting it is an error.

    Buffers and computed weights read as plain arrays, on which Python keeps any attribute: without this,
    ``norm.running_mean.value = new`` would be lost, and nothing could tell.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, array: object, cls: type) -> Any:
        raise AttributeError(f"{cls.__name__!r} object has no attribute {self.name!r}")

    def __set__(self, array: object, new: object) -> None:
        raise refusals.attribute_of_a_box(self.name)


@functools.lru_cache(8)
def _refuse_lost_writes(cls: type) -> None:
    if not issubclass(cls, jax.Array) or issubclass(cls, Tracer):  # whose others take no attributes
        return
    for name in ("value", "data", "requires_grad"):
        if not hasattr(cls, name):
            with contextlib.suppress(TypeError):  # of a class that takes none either
                setattr(cls, name, _OfABox(name))


def as_array(value: object, subject: Subject = "a box") -> Any:
    """Return `value`, which is no box, as a JAX array; raise if it is none."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        _refuse_lost_writes(type(value))
        check_not_deleted(value, subject)
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        check_jax_holds(value, lambda: f"what was written to {name_of(subject)}")
        return from_numpy(value)
    if isinstance(value, (bool, int, float, complex)):
        return jnp.asarray(value)
    convert = getattr(value, "__jax_array__", None)
    if convert is not None:
        return convert()
    if isinstance(value, (list, tuple)):
        raise refusals.sequence_for_an_array(type(value).__name__, subject)
    raise refusals.no_array(value, subject)


def check_not_deleted(value: Value, subject: Subject) -> None:
    """Raise if the memory of an array was given away."""
    if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted():
        raise refusals.deleted_array(subject)


def check_usable(value: Value, subject: Callable[[], str]) -> None:
    """Raise if compiled code cannot use the value of a box: it has no numbers, or its memory is gone."""
    if is_meta(value):
        raise refusals.no_numbers(subject()) from None
    check_not_deleted(value, subject)


def strong(value: Any) -> Any:
    """Return an array that is not weakly typed: compiled code for a weak one is another one."""
    if getattr(value, "weak_type", False):
        return jax.lax.convert_element_type(value, value.dtype)
    return value


def stack_arrays(values: Sequence[Any]) -> Any:
    """Stack arrays along a new first axis; on the host, where XLA would compile it for their number."""
    if all(map(_on_host, values)):
        return from_numpy(np.stack([np.asarray(v) for v in values]), copy=False)
    return jnp.stack([jnp.asarray(v) for v in values])


def unstack(stacked: Any) -> list[Any]:
    """Return the entries of the first axis as arrays."""
    if not _on_host(stacked):
        return list(stacked)
    whole = np.asarray(stacked)
    return [from_numpy(part) for part in whole]


def entry_of(array: Any, index: int | slice, position: int) -> Any:
    """Return an entry of an axis, or several: numbers if the array has some, also while somebody traces."""
    at = (slice(None),) * position + (index,)
    if isinstance(array, jax.ShapeDtypeStruct):
        place = array.sharding
        if isinstance(index, int):
            place = place_of_entry(place, position)
        shape = np.broadcast_to(np.zeros((), bool), array.shape)[at].shape  # without the memory
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=place)
    if isinstance(array, Tracer):
        return array[at]
    with plain_evaluation():
        return from_numpy(np.asarray(array)[at]) if _on_host(array) else array[at]


def _on_host(value: object) -> bool:
    """Say whether an array's numbers are where numpy can read them and JAX would put them."""
    if isinstance(value, Tracer):
        return False
    here = jax.local_devices()[0]
    return here.platform == "cpu" and (
        not isinstance(value, jax.Array) or value.devices() == {here}
    )
