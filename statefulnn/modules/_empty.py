"""Arrays to hold parameters before they are initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Parameter, from_numpy
from statefulnn.core.placement import resolve_device, supported


def filled(shape: int | Sequence[int], value: float, device: Any = None, dtype: Any = None) -> Any:
    """Return an array of one value.

    Args:
        shape: its shape.
        value: the value.
        device: a device, a sharding or a platform's name; None leaves the choice to JAX.
        dtype: its dtype; None for JAX's default float (float64 where 64 bits are enabled).
    """
    dtype = supported(jnp.dtype(jnp.result_type(float) if dtype is None else dtype))
    values = np.full(shape, value, dtype)  # numpy: JAX would compile a fill for each shape
    return from_numpy(values, resolve_device(device))


def parameter(shape: int | Sequence[int], device: Any = None, dtype: Any = None) -> Parameter:
    """Return a Parameter of zeros, to be initialised by ``reset_parameters``."""
    return Parameter(filled(shape, 0, device, dtype))
