"""torch's rules for the dtype of a result, with JAX's implicit promotion switched off.

Numbers, tensors without axes and tensors with axes count in this order: one with axes decides the dtype,
unless another is of a higher category (truth value < integer < floating < complex).

Source: ``torch.result_type``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from statefulnn.core.placement import supported

if TYPE_CHECKING:
    from typing import TypeGuard

    from jax.typing import ArrayLike, DTypeLike

_CATEGORY = {"b": 0, "u": 1, "i": 1, "f": 2, "V": 2, "c": 3}
_NARROW = ("float16", "bfloat16")


def dtype_of(name: str | None, default: np.dtype | None = None) -> Any:
    """Return JAX's dtype for torch's name of one; integers of 64 bits have 32 where JAX has no others.

    Raises:
        DtypeError: for floating types of 64 bits where JAX has none.
    """
    if name is None:
        return default
    dtype = np.dtype(jnp.dtype({"bool": "bool_"}.get(name, name)))
    return jax.dtypes.canonicalize_dtype(supported(dtype))


def category(dtype: DTypeLike) -> int:
    """Return 0 for truth values, 1 for integers, 2 for floating, 3 for complex numbers."""
    dtype = jnp.dtype(dtype)
    return 2 if jnp.issubdtype(dtype, jnp.floating) else _CATEGORY[dtype.kind]


def is_array(x: object) -> TypeGuard[jax.Array]:
    """Say whether an argument is an array, and not a number."""
    return hasattr(x, "dtype") and hasattr(x, "shape")


def is_size(x: Any) -> bool:
    """Say whether an argument is an integer, perhaps one that has a name instead of a number."""
    return isinstance(x, int) or jax.export.is_symbolic_dim(x)


def counted(n: int) -> np.ndarray | jax.Array:
    """Return 0, 1, ... below a size: numbers of numpy's, if it is a number."""
    return np.arange(n) if isinstance(n, int) else jnp.arange(n)


def default_float() -> np.dtype:
    """Return the dtype of floating numbers of Python: torch's default is float32."""
    return jnp.dtype("float32")


def wide(dtype: np.dtype) -> np.dtype:
    """Return the dtype that torch adds numbers of a dtype in: half precision in single."""
    return jnp.dtype("float32") if str(dtype) in _NARROW else dtype


def integer() -> np.dtype:
    """Return the dtype that stands for int64."""
    return jax.dtypes.canonicalize_dtype(np.int64)


def _of_number(x: Any) -> np.dtype:
    if isinstance(x, bool):
        return jnp.dtype(bool)
    if is_size(x):
        return integer()
    return jnp.dtype("complex64") if isinstance(x, complex) else default_float()


def _joined(one: np.dtype | None, other: np.dtype | None) -> np.dtype | None:
    """Return the smallest dtype of two on one level: bfloat16 and float16 give float32."""
    if one is None or other is None or one == other:
        return one if other is None else other
    if category(one) != category(other):
        low, high = sorted((one, other), key=category)
        if category(high) == 3 and low == jnp.float64:
            return jnp.dtype("complex128")
        return high
    if {str(one), str(other)} == set(_NARROW):
        return jnp.dtype("float32")
    if category(one) > 1:
        return max(one, other, key=lambda d: d.itemsize)
    return jax.dtypes.canonicalize_dtype(np.promote_types(one, other))


def result_type(*args: Any) -> Any:
    """Return the dtype of a result of arrays and numbers."""
    levels: list[Any] = [None, None, None]
    for x in args:
        if x is None:
            continue
        level = (0 if len(x.shape) else 1) if is_array(x) else 2
        levels[level] = _joined(levels[level], jnp.dtype(x.dtype) if level < 2 else _of_number(x))
    dtype = None
    for found in levels:
        if dtype is None:
            dtype = found
        elif found is not None and category(found) > category(dtype):
            if category(found) == 3 and dtype == jnp.float64:
                found = jnp.dtype("complex128")
            dtype = found
    return dtype


def cast(x: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Return an array or number as an array of a dtype."""
    if is_array(x):
        return x if x.dtype == dtype else jnp.asarray(x).astype(dtype)
    return jnp.asarray(x, dtype)


def promoted(*args: ArrayLike) -> list[jax.Array]:
    """Return arrays of the dtype of the result."""
    dtype = result_type(*args)
    return [cast(x, dtype) for x in args]


def floating(*args: ArrayLike) -> list[jax.Array]:
    """Return arrays of the dtype of the result, which is floating also for integers."""
    dtype = result_type(*args)
    dtype = default_float() if category(dtype) < 2 else dtype
    return [cast(x, dtype) for x in args]
