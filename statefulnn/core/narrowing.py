"""Finds integers that a narrower dtype cannot hold: a cast would wrap them silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core import refusals
from statefulnn.core.compat import Tracer

IntegerArray: TypeAlias = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def numbers_beyond(value: IntegerArray, dtype: DTypeLike) -> tuple[int, int] | None:
    """Return the lowest and the highest of some integers if a dtype cannot hold both, else None.

    The values are read only if the dtype is narrower than theirs, and if they are known.
    """
    if not (jnp.issubdtype(value.dtype, jnp.integer) and jnp.issubdtype(dtype, jnp.integer)):
        return None
    own, limits = jnp.iinfo(value.dtype), jnp.iinfo(dtype)
    if limits.min <= own.min and own.max <= limits.max:
        return None
    if isinstance(value, (jax.ShapeDtypeStruct, Tracer)) or value.size == 0:
        return None
    # Where JAX's 64-bit types are off, it cannot reduce such integers; numpy always can.
    numbers = np.asarray(value) if getattr(value, "is_fully_addressable", True) else value
    low, high = int(numbers.min()), int(numbers.max())
    return None if limits.min <= low and high <= limits.max else (low, high)


def span(numbers: tuple[int, int]) -> str:
    """Describe integers by the lowest and the highest."""
    low, high = numbers
    return f"is {low}" if low == high else f"has integers from {low} to {high}"


def check_jax_holds(value: np.ndarray | np.generic, subject: Callable[[], str]) -> None:
    """Raise if JAX, under its current settings, cannot hold the integers of a numpy array.

    Args:
        value: of any dtype; only 64-bit integers, which JAX may make 32-bit ones, are checked.
        subject: says what the array is for.

    Raises:
        DtypeError: if an integer would wrap.
    """
    if value.dtype.itemsize < 8 or value.dtype.kind not in "iu":
        return
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    beyond = numbers_beyond(value, dtype)
    if beyond is not None:
        limits = jnp.iinfo(dtype)
        what = f"{subject()} {span(beyond)}"
        raise refusals.integers_would_wrap(what, dtype, limits.min, limits.max)
