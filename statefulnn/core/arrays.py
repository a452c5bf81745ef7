"""Arrays as boxes hold them: made without compiling anything, checked, never weakly typed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import RegistrationError, explain, name_of
from statefulnn.core.narrowing import check_jax_holds
from statefulnn.core.placement import META, is_meta, no_numbers


def host_array(shape: Any, dtype: Any, empty: Any = np.empty) -> np.ndarray:
    """Return an uninitialised numpy array (with ``np.zeros``: of zeros) that JAX need not copy.

    The CPU backend takes memory over as it is if it starts at a multiple of 64 bytes.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def from_numpy(values: Any, device: Any = None, copy: bool = True) -> Any:
    """Return a numpy array, or a list of them, on a device, without compiling anything for its shape.

    With ``copy=False`` the array may share memory with the numpy array, which nobody may write again.
    """
    if current_trace() is not EAGER:
        return jax.tree.map(jnp.asarray, values)
    return jax.device_put(jax.tree.map(np.array, values) if copy else values, device)


def filled(shape: Any, dtype: Any, place: Any = None, value: float = 0) -> Any:
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


def as_array(value: Any, subject: Any = "a box") -> Any:
    """Return `value`, which is no box, as a JAX array; raise if it is none."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        check_not_deleted(value, subject)
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        check_jax_holds(value, lambda: f"what was written to {name_of(subject)}")
        return from_numpy(value)
    if isinstance(value, (bool, int, float, complex)):
        return jnp.asarray(value)
    if hasattr(value, "__jax_array__"):
        return value.__jax_array__()
    if isinstance(value, (list, tuple)):
        raise RegistrationError(
            explain(
                f"wrote a {type(value).__name__} to {name_of(subject)}",
                "only arrays can be held",
                "convert it first: jnp.asarray(value)",
            )
        )
    raise RegistrationError(
        explain(
            f"wrote an object of type {type(value).__name__} to {name_of(subject)}",
            "only arrays can be held",
            "pass a jax.Array or a numpy array",
        )
    )


def check_not_deleted(value: Any, subject: Any) -> None:
    if not isinstance(value, (Tracer, jax.ShapeDtypeStruct)) and value.is_deleted():
        raise RuntimeError(
            explain(
                f"used an array that has been deleted as the value of {name_of(subject)}",
                "its memory was given away, by a call with donate= or donate_argnums=",
                "keep what outlives donation: module.state_dict(), copy.deepcopy(module), or a copy, "
                "jnp.array(parameter.value)",
            )
        )


def check_usable(value: Any, subject: Callable[[], str]) -> None:
    """Raise if compiled code cannot use the value of a box: it has no numbers, or its memory is gone."""
    if is_meta(value):
        raise no_numbers(subject()) from None
    if isinstance(value, jax.Array):
        check_not_deleted(value, subject)


def strong(value: Any) -> Any:
    """Return an array that is not weakly typed: compiled code for a weak one is another one."""
    if getattr(value, "weak_type", False):
        return jax.lax.convert_element_type(value, value.dtype)
    return value
