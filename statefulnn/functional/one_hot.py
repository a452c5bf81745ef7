"""Classes as vectors of zeros and one 1."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import array, concrete_on_cpu, shape_error
from statefulnn.functional._compiled import compiled


@functools.partial(compiled, static_argnums=1)
def _one_hot(x: jax.Array, num_classes: int) -> Any:
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    return (x[..., None] == jnp.arange(num_classes, dtype=x.dtype)).astype(dtype)


def one_hot(tensor: ArrayLike, num_classes: int = -1) -> jax.Array:
    """Return vectors that are 1 at a class and 0 elsewhere.

    Args:
        tensor: ``(*)``, int32 or int64, the classes from 0.
        num_classes: their number; -1 takes the largest class and one more, and needs concrete values.

    Returns:
        ``(*, num_classes)``, of JAX's default integers. In compiled code, and away from the CPU, a class
        outside the range gives zeros.

    Raises:
        DtypeError: if the dtype is not int32 or int64.
        ShapeError: if a class is negative or too large, where the values can be seen, or the number of
            classes cannot be.

    Source: ``torch.nn.functional.one_hot``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.one_hot(jnp.array([0, 2]), 3).tolist()
        [[1, 0, 0], [0, 0, 1]]
    """
    x = array(tensor, "tensor", "F.one_hot")
    if x.dtype not in (np.int32, np.int64):
        raise DtypeError(
            explain(
                f"F.one_hot was given a tensor of dtype {x.dtype}",
                "it is only applicable to int32 and int64 classes",
                "tensor.astype(jnp.int32)",
            )
        )
    if x.size == 0 and num_classes < 1:
        raise shape_error(
            f"F.one_hot was given a tensor of shape {x.shape} and num_classes={num_classes}",
            "the number of classes cannot be told from no classes",
            "F.one_hot(tensor, num_classes=10)",
        )
    if num_classes == -1 and isinstance(x, Tracer):
        raise shape_error(
            "F.one_hot was given num_classes=-1 in compiled or transformed code",
            "the size of the result would depend on traced values",
            "F.one_hot(tensor, num_classes=10)",
        )
    values = np.asarray(x) if num_classes == -1 else concrete_on_cpu(x)
    if values is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0:
            raise shape_error(
                f"F.one_hot was given the class {low}", "classes are non-negative", "classes from 0"
            )
        if num_classes == -1:
            num_classes = high + 1
        if high >= num_classes:
            raise shape_error(
                f"F.one_hot was given the class {high} and num_classes={num_classes}",
                "classes must be smaller than num_classes",
                f"num_classes={high + 1}",
            )
    if num_classes < 1:
        raise shape_error(
            f"F.one_hot was given num_classes={num_classes}",
            "a class is one of num_classes, one at least",
            "F.one_hot(tensor, num_classes=10)",
        )
    return _one_hot(x, num_classes)
