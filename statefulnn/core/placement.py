"""Devices and dtypes by the names users give them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from statefulnn.core.errors import DtypeError, explain


def resolve_device(device: Any) -> Any:
    """Return a Device or Sharding for a device, a sharding, a platform name ("cuda:1"), or None."""
    if device is None or not isinstance(device, str):
        return device
    platform, _, index = device.partition(":")
    return jax.devices("cuda" if platform == "cuda" else platform)[int(index or 0)]


def supported(dtype: np.dtype) -> np.dtype:
    """Return the dtype, or raise if it has 64 bits and JAX would silently give 32."""
    if dtype.itemsize == 8 * (1 + (dtype.kind == "c")) and dtype.kind in "fc":
        if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            raise DtypeError(
                explain(
                    f"asked for {dtype}",
                    "64-bit types are off in JAX, which would silently give 32 bits",
                    'jax.config.update("jax_enable_x64", True) at the start of the program',
                )
            )
    return dtype
