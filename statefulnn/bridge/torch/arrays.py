"""Tensors of torch as arrays of JAX, and the way back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from statefulnn.core.arrays import from_numpy, host_array
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.narrowing import numbers_beyond

# What numpy has no type for: read as integers of the same width, and named by JAX.
_SAME_WIDTH = {
    torch.bfloat16: (torch.int16, jnp.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, jnp.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, jnp.float8_e5m2),
}
_BACK = {np.dtype(ours): (integer, theirs) for theirs, (integer, ours) in _SAME_WIDTH.items()}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a numpy array that shares its memory where it is on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in _SAME_WIDTH:
        integer, ours = _SAME_WIDTH[tensor.dtype]
        return tensor.contiguous().view(integer).numpy().view(ours)
    return tensor.resolve_conj().resolve_neg().numpy()


def to_jax(tensor: torch.Tensor, copy: bool, name: str = "a tensor") -> Any:
    """Return a tensor as an array.

    Args:
        tensor: dense, of a dtype that JAX has.
        copy: whether the array has its own memory; otherwise it may be the tensor's.
        name: for messages.

    Raises:
        DtypeError: for 64-bit numbers that JAX would cut, with 64-bit types off.
    """
    values = as_numpy(tensor)
    if values.dtype.kind in "iu":
        values = _narrowed(values, name)
    elif values.dtype.itemsize > jax.dtypes.canonicalize_dtype(values.dtype).itemsize:
        raise DtypeError(
            explain(
                f"converted {name}, of {values.dtype}",
                "64-bit types are off in JAX, which would silently give 32 bits",
                'jax.config.update("jax_enable_x64", True) at the start of the program; or make it float32',
            )
        )
    if not copy:
        return from_numpy(values, copy=False)
    own = host_array(values.shape, values.dtype)
    np.copyto(own, values)
    return from_numpy(own, copy=False)


def _narrowed(values: np.ndarray, name: str) -> np.ndarray:
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    if dtype == values.dtype:
        return values
    if numbers_beyond(values, dtype) is not None:
        raise DtypeError(
            explain(
                f"converted {name}, of {values.dtype}",
                f"64-bit types are off in JAX, and it holds numbers that {dtype} has not",
                'jax.config.update("jax_enable_x64", True) at the start of the program',
            )
        )
    return values.astype(dtype)


def to_tensor(array: Any, copy: bool = True) -> torch.Tensor:
    """Return an array as a tensor on the CPU; with ``copy=False`` it may share memory: do not write to it."""
    values = np.asarray(array)
    integer_and_type = _BACK.get(values.dtype)
    if integer_and_type is not None:
        integer, theirs = integer_and_type
        width = np.int16 if integer == torch.int16 else np.uint8
        return torch.from_numpy(np.array(values).view(width)).view(theirs)
    return torch.from_numpy(np.array(values) if copy else values)
