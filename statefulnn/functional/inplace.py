"""Torch's forms with an underscore. Arrays are immutable, so each returns the new array."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn.functional.rectifier import (
    celu,
    elu,
    hardtanh,
    leaky_relu,
    relu,
    rrelu,
    selu,
)
from statefulnn.functional.rectifier import threshold as _threshold


def relu_(input: ArrayLike) -> jax.Array:
    """Return `relu` of the input as a new array; the input stays as it is.

    Args:
        input: any shape.

    Source: ``torch.nn.functional.relu_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.relu_(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    return relu(input)


def threshold_(input: ArrayLike, threshold: float, value: float) -> jax.Array:
    """Return `threshold` of the input as a new array; the input stays as it is.

    Args:
        input: any shape.
        threshold: elements up to and including it are replaced.
        value: by this.

    Source: ``torch.nn.functional.threshold_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.threshold_(jnp.array([0.5, 2.0]), 1.0, 20.0).tolist()
        [20.0, 2.0]
    """
    return _threshold(input, threshold, value)


def hardtanh_(input: ArrayLike, min_val: float = -1.0, max_val: float = 1.0) -> jax.Array:
    """Return `hardtanh` of the input as a new array; the input stays as it is.

    Args:
        input: any shape.
        min_val: the lower end.
        max_val: the upper end.

    Source: ``torch.nn.functional.hardtanh_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.hardtanh_(jnp.array([-3.0, 0.5])).tolist()
        [-1.0, 0.5]
    """
    return hardtanh(input, min_val, max_val)


def leaky_relu_(input: ArrayLike, negative_slope: float = 0.01) -> jax.Array:
    """Return `leaky_relu` of the input as a new array; the input stays as it is.

    Args:
        input: any shape, floating.
        negative_slope: the derivative for x ≤ 0.

    Source: ``torch.nn.functional.leaky_relu_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.leaky_relu_(jnp.array([-2.0, 2.0]), 0.5).tolist()
        [-1.0, 2.0]
    """
    return leaky_relu(input, negative_slope)


def rrelu_(
    input: ArrayLike,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return `rrelu` of the input as a new array; the input stays as it is.

    Args:
        input: any shape, floating.
        lower: the least slope.
        upper: the largest slope.
        training: draw a slope for each element.
        rng: a random key; without one the draw comes from the generator in force.

    Source: ``torch.nn.functional.rrelu_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.rrelu_(jnp.array([-2.0, 2.0]), 0.25, 0.75).tolist()
        [-1.0, 2.0]
    """
    return rrelu(input, lower, upper, training, rng=rng)


def elu_(input: ArrayLike, alpha: float = 1.0) -> jax.Array:
    """Return `elu` of the input as a new array; the input stays as it is.

    Args:
        input: any shape, floating.
        alpha: minus the limit for very negative x.

    Source: ``torch.nn.functional.elu_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.elu_(jnp.array([-100.0, 2.0]), 0.5).tolist()
        [-0.5, 2.0]
    """
    return elu(input, alpha)


def selu_(input: ArrayLike) -> jax.Array:
    """Return `selu` of the input as a new array; the input stays as it is.

    Args:
        input: any shape, floating.

    Source: ``torch.nn.functional.selu_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.selu_(jnp.array([0.0])).tolist()
        [0.0]
    """
    return selu(input)


def celu_(input: ArrayLike, alpha: float = 1.0) -> jax.Array:
    """Return `celu` of the input as a new array; the input stays as it is.

    Args:
        input: any shape, floating.
        alpha: minus the limit for very negative x.

    Source: ``torch.nn.functional.celu_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.celu_(jnp.array([-100.0, 2.0]), 0.5).tolist()
        [-0.5, 2.0]
    """
    return celu(input, alpha)
