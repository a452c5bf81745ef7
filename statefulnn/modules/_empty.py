"""Arrays to hold parameters before they are initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from statefulnn.core import arrays
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import elsewhere, place_in_force, resolve_device, supported


def filled(shape: int | Sequence[int], value: float, device: Any = None, dtype: Any = None) -> Any:
    """Return an array of one value.

    Args:
        shape: its shape.
        value: the value.
        device: a device, a sharding or a platform's name; None leaves the choice to JAX.
        dtype: its dtype; None for JAX's default float (float64 where 64 bits are enabled).
    """
    dtype = supported(jnp.dtype(jnp.result_type(float) if dtype is None else dtype))
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    place = place_in_force() if device is None else resolve_device(device)
    return arrays.filled(shape, dtype, place, value)


def parameter(shape: int | Sequence[int], device: Any = None, dtype: Any = None) -> Parameter:
    """Return a Parameter of zeros, to be initialised by ``reset_parameters``."""
    value = filled(shape, 0, device, dtype)
    if device is None:
        return Parameter(value)
    with elsewhere():  # what the caller says wins over the block around
        return Parameter(value)
