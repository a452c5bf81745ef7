"""The dtype of new parameters and buffers that are given none: float32, as in torch, until it is set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from jax.typing import DTypeLike

from statefulnn.core.construction import (
    current_dtype,
    dtype_in_force,
    in_force,
    set_session_dtype,
)
from statefulnn.core.placement import as_dtype, floating, supported


def _floating(function: str, dtype: DTypeLike) -> np.dtype:
    return floating(dtype, f"nn.{function}({{}})", "the weights of layers are floating numbers")


def set_default_dtype(dtype: DTypeLike) -> None:
    """Set the dtype of parameters and buffers that are built from now on and are given none.

    It is float32 at first, also where JAX has 64 bits enabled. `default_dtype` sets it for a block.

    Args:
        dtype: a floating dtype.

    Raises:
        DtypeError: for another dtype, and for float64 unless 64-bit types are enabled,
            ``jax.config.update("jax_enable_x64", True)``.

    Source: ``torch.set_default_dtype``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.set_default_dtype(jnp.bfloat16)
        >>> str(nn.Linear(2, 3).weight.dtype)
        'bfloat16'
        >>> nn.set_default_dtype(jnp.float32)
    """
    set_session_dtype(_floating("set_default_dtype", dtype))


def get_default_dtype() -> np.dtype:
    """Return the dtype that new parameters and buffers have if they are given none.

    Returns:
        a floating dtype.

    Source: ``torch.get_default_dtype``.

    Example:
        >>> import statefulnn as nn
        >>> nn.get_default_dtype()
        dtype('float32')
    """
    return current_dtype()


@contextlib.contextmanager
def default_dtype(dtype: DTypeLike) -> Iterator[None]:
    """Set the dtype of new parameters and buffers within a block, and in this thread only.

    Args:
        dtype: a floating dtype.

    Raises:
        DtypeError: as `set_default_dtype`.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> with nn.default_dtype(jnp.bfloat16):
        ...     layer = nn.Linear(2, 3)
        >>> str(layer.weight.dtype), str(nn.Linear(2, 3).weight.dtype)
        ('bfloat16', 'float32')
    """
    with in_force(dtype_in_force, _floating("default_dtype", dtype)):
        yield


def dtype_of_new(dtype: DTypeLike | None) -> np.dtype:
    """Return the dtype of something new: what was asked for, or the default."""
    return supported(current_dtype() if dtype is None else as_dtype(dtype))
