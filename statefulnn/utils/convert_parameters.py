"""All parameters as one vector, and back.

Source: ``torch.nn.utils.convert_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.box import unwrap
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.parameter import Parameter


def parameters_to_vector(parameters: Iterable[ArrayLike]) -> jax.Array:
    """Return parameters flattened into one array.

    Args:
        parameters: parameters or arrays, of one dtype.

    Returns:
        an array ``(total number of elements,)``, in the order given.

    Raises:
        TypeError: for a dict.

    Example:
        >>> import statefulnn as nn
        >>> nn.parameters_to_vector(nn.Linear(2, 3).parameters()).shape
        (9,)
    """
    if isinstance(parameters, Mapping):
        raise TypeError(
            explain(
                "parameters_to_vector was given a dict",
                "the order of a dict is not that of model.parameters(): JAX sorts it by name",
                "parameters_to_vector(grads[name] for name, _ in model.named_parameters())",
            )
        )
    return jnp.concatenate([jnp.ravel(unwrap(p)) for p in parameters])


def vector_to_parameters(vec: ArrayLike, parameters: Iterable[Parameter]) -> None:
    """Write one vector into parameters, in their order.

    Args:
        vec: an array ``(total number of elements,)``.
        parameters: the parameters to write.

    Raises:
        ShapeError: if the vector has another length than the parameters have elements; none of them
            is changed.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.Linear(2, 1)
        >>> nn.vector_to_parameters(jnp.arange(3.0), layer.parameters())
        >>> layer.weight.tolist(), layer.bias.tolist()
        ([[0.0, 1.0]], [2.0])
    """
    parameters = list(parameters)
    array = unwrap(vec)
    sizes = [math.prod(p.shape) for p in parameters]
    if array.shape != (sum(sizes),):
        raise ShapeError(
            explain(
                f"vector_to_parameters was given an array of shape {array.shape}",
                f"the parameters have {sum(sizes)} elements",
                f"pass an array of shape ({sum(sizes)},), as parameters_to_vector gives it",
            )
        )
    start = 0
    for p, size in zip(parameters, sizes, strict=True):
        p.value = array[start : start + size].reshape(p.shape).astype(p.dtype)
        start += size
