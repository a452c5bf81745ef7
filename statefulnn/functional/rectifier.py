"""Non-linearities that are the identity, or nearly, on one side of a threshold.

Each is written as a choice between branches, so that derivatives at the corners are torch's, and so that
the branch which is not taken can neither overflow nor spoil a derivative.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import (
    array,
    require_real_float,
    require_same_dtype,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._random import drawing


def _require_ordered(x: jax.Array, function: str) -> None:
    if x.dtype == jnp.bool_ or not jnp.issubdtype(x.dtype, jnp.number) or x.dtype.kind == "c":
        raise DtypeError(
            explain(
                f"{function} was given input of dtype {x.dtype}",
                "it compares with numbers: real numbers or integers are needed",
                "cast it first: input.astype(jnp.float32)",
            )
        )


@compiled
def _relu(x: jax.Array) -> Any:
    _require_ordered(x, "F.relu")
    # NaN is not <= 0 and passes through.
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


def relu(input: ArrayLike, inplace: bool = False) -> jax.Array:
    """Return ``max(x, 0)`` elementwise; the derivative at 0 is 0.

    Args:
        input: any shape; integers stay integers.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: ``torch.nn.functional.relu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.relu(jnp.array([-1.0, 0.0, 2.0])).tolist()
        [0.0, 0.0, 2.0]
    """
    return _relu(array(input, "input", "F.relu"))


@functools.partial(compiled, static_argnums=(1, 2))
def _threshold(x: jax.Array, threshold: float, value: float) -> Any:
    _require_ordered(x, "F.threshold")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        threshold, value = int(threshold), int(value)
    return jnp.where(x <= threshold, jnp.asarray(value, x.dtype), x)


def threshold(input: ArrayLike, threshold: float, value: float, inplace: bool = False) -> jax.Array:
    """Return x where it is above a threshold, and a constant elsewhere.

    Args:
        input: any shape; integers stay integers.
        threshold: elements up to and including it are replaced.
        value: by this.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: ``torch.nn.functional.threshold``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.threshold(jnp.array([0.1, 1.0, 2.0]), 1.0, 20.0).tolist()
        [20.0, 20.0, 2.0]
    """
    return _threshold(array(input, "input", "F.threshold"), threshold, value)


@functools.partial(compiled, static_argnums=(1, 2))
def _hardtanh(x: jax.Array, low: float, high: float) -> Any:
    _require_ordered(x, "F.hardtanh")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        low, high = int(low), int(high)
        if low < 0 and jnp.issubdtype(x.dtype, jnp.unsignedinteger):
            raise DtypeError(
                explain(
                    f"F.hardtanh was given input of dtype {x.dtype} and min_val={low}",
                    "cannot do hardtanh on an unsigned type with negative limits",
                    "F.hardtanh(input, 0, max_val), or a signed dtype",
                )
            )
    bounds = jnp.asarray(low, x.dtype), jnp.asarray(high, x.dtype)
    clipped = lax.stop_gradient(lax.clamp(bounds[0], x, bounds[1]))
    return jnp.where((x > bounds[0]) & (x < bounds[1]), x, clipped)


def hardtanh(
    input: ArrayLike, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> jax.Array:
    """Limit x to an interval; the derivative at its ends is 0.

    Args:
        input: any shape; integers stay integers.
        min_val: the lower end.
        max_val: the upper end.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Raises:
        ValueError: if `min_val` is above `max_val`.

    Source: ``torch.nn.functional.hardtanh``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.hardtanh(jnp.array([-3.0, 0.5, 3.0])).tolist()
        [-1.0, 0.5, 1.0]
    """
    if min_val > max_val:
        raise ValueError(
            explain(
                f"F.hardtanh was given min_val={min_val} and max_val={max_val}",
                "min_val cannot be greater than max_val",
                f"F.hardtanh(input, {max_val}, {min_val})",
            )
        )
    return _hardtanh(array(input, "input", "F.hardtanh"), min_val, max_val)


def relu6(input: ArrayLike, inplace: bool = False) -> jax.Array:
    """Return ``min(max(x, 0), 6)`` elementwise; the derivative at 0 and 6 is 0.

    Args:
        input: any shape; integers stay integers.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: ``torch.nn.functional.relu6``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.relu6(jnp.array([-1.0, 5.0, 7.0])).tolist()
        [0.0, 5.0, 6.0]
    """
    return _hardtanh(array(input, "input", "F.relu6"), 0.0, 6.0)


@functools.partial(compiled, static_argnums=1)
def _leaky_relu(x: jax.Array, slope: float) -> Any:
    require_real_float(x, "input", "F.leaky_relu")
    return jnp.where(x > 0, x, (widened(x) * slope).astype(x.dtype))


def leaky_relu(input: ArrayLike, negative_slope: float = 0.01, inplace: bool = False) -> jax.Array:
    """Return x where it is positive, and ``negative_slope · x`` elsewhere.

    Args:
        input: any shape, floating.
        negative_slope: the derivative for x ≤ 0.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: Maas, Hannun and Ng 2013; ``torch.nn.functional.leaky_relu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.leaky_relu(jnp.array([-2.0, 2.0]), 0.5).tolist()
        [-1.0, 2.0]
    """
    return _leaky_relu(array(input, "input", "F.leaky_relu"), negative_slope)


@compiled
@ruled(Rule.LOW)
def _prelu(x: jax.Array, weight: jax.Array) -> Any:
    require_real_float(x, "input", "F.prelu")
    require_same_dtype("F.prelu", input=x, weight=weight)
    channels = x.shape[1] if x.ndim > 1 else 1
    if weight.ndim > 1 or (weight.size != 1 and weight.size != channels):
        raise shape_error(
            f"F.prelu was given input of shape {x.shape} and weight of shape {weight.shape}",
            f"the input has {channels} channels (axis 1), and the weight is one number, or one for "
            "each channel, on one axis",
            f"a weight of shape ({channels},)",
        )
    if weight.size != 1 and x.ndim > 1:
        slope = weight.reshape(1, -1, *(1,) * (x.ndim - 2))
    else:
        slope = weight.reshape((1,) * x.ndim)
    positive = x > 0
    negative = jnp.where(positive, jnp.zeros((), x.dtype), x)
    return jnp.where(positive, x, slope * negative)


def prelu(input: ArrayLike, weight: ArrayLike) -> jax.Array:
    """Return x where it is positive, and ``weight · x`` elsewhere, with a weight that is learnt.

    Args:
        input: ``(N, C, *)``, or any shape for a single weight; floating.
        weight: ``(C,)``, ``(1,)`` or ``()``.

    Raises:
        ShapeError: if there are neither one weight nor C.
        DtypeError: if the dtypes differ.

    Source: He et al. 2015; ``torch.nn.functional.prelu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.prelu(jnp.array([-2.0, 2.0]), jnp.array([0.25])).tolist()
        [-0.5, 2.0]
    """
    return _prelu(array(input, "input", "F.prelu"), array(weight, "weight", "F.prelu"))


def _noisy_slopes(key: jax.Array, x: jax.Array, lower: float, upper: float) -> Any:
    require_real_float(x, "input", "F.rrelu")
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    slope = jax.random.uniform(key, x.shape, dtype, lower, upper)
    return jnp.where(x <= 0, (widened(x) * slope).astype(x.dtype), x)


_rrelu = drawing(_noisy_slopes)


def rrelu(
    input: ArrayLike,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return x where it is positive, and elsewhere x times a slope that is random in training.

    Args:
        input: any shape, floating.
        lower: the least slope.
        upper: the largest slope.
        training: draw a slope for each element, uniformly; otherwise it is the middle of the range.
        inplace: accepted for compatibility with torch; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Raises:
        RuntimeError: if the range is not finite or empty.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Xu et al. 2015; ``torch.nn.functional.rrelu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.rrelu(jnp.array([-2.0, 2.0]), 0.25, 0.75).tolist()
        [-1.0, 2.0]
    """
    if not (lower <= upper and math.isfinite(lower) and math.isfinite(upper)):
        raise RuntimeError(
            explain(
                f"F.rrelu was given lower={lower} and upper={upper}",
                "the slopes come from a finite range: the lower bound should be less than or equal "
                "to the upper bound",
                "F.rrelu(input, 1 / 8, 1 / 3)",
            )
        )
    x = array(input, "input", "F.rrelu")
    if not training:
        require_real_float(x, "input", "F.rrelu")
        return _leaky_relu(x, (lower + upper) / 2)
    return _rrelu(rng, x, lower, upper)


@functools.partial(compiled, static_argnums=(1, 2, 3, 4))
def _elu(x: jax.Array, alpha: float, scale: float, steepness: float, function: str) -> Any:
    require_real_float(x, "input", function)
    wide = widened(x)
    positive = wide > 0
    negative = jnp.where(positive, jnp.zeros((), wide.dtype), wide)
    saturating = (alpha * scale) * jnp.expm1(negative * steepness)
    return jnp.where(positive, wide * scale, saturating).astype(x.dtype)


def elu(input: ArrayLike, alpha: float = 1.0, inplace: bool = False) -> jax.Array:
    """Return x where it is positive, and ``alpha · (exp(x) - 1)`` elsewhere.

    Args:
        input: any shape, floating.
        alpha: minus the limit for very negative x.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: Clevert, Unterthiner and Hochreiter 2015; ``torch.nn.functional.elu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.elu(jnp.array([-100.0, 0.0, 2.0]), 0.5).tolist()
        [-0.5, 0.0, 2.0]
    """
    return _elu(array(input, "input", "F.elu"), alpha, 1.0, 1.0, "F.elu")


# The fixed point of Klambauer et al. 2017: activations of mean 0 and variance 1 keep them.
SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805


def selu(input: ArrayLike, inplace: bool = False) -> jax.Array:
    """Return ``scale · elu(x, alpha)`` with the constants that keep mean 0 and variance 1.

    Args:
        input: any shape, floating.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Source: Klambauer et al. 2017; ``torch.nn.functional.selu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.selu(jnp.array([-100.0, 1.0])).round(4).tolist()
        [-1.758..., 1.050...]
    """
    return _elu(array(input, "input", "F.selu"), SELU_ALPHA, SELU_SCALE, 1.0, "F.selu")


def celu(input: ArrayLike, alpha: float = 1.0, inplace: bool = False) -> jax.Array:
    """Return x where it is positive, and ``alpha · (exp(x / alpha) - 1)`` elsewhere.

    The derivative is continuous for every alpha.

    Args:
        input: any shape, floating.
        alpha: minus the limit for very negative x.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Raises:
        RuntimeError: if `alpha` is 0.

    Source: Barron 2017; ``torch.nn.functional.celu``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.celu(jnp.array([-100.0, 0.0, 2.0]), 0.5).tolist()
        [-0.5, 0.0, 2.0]
    """
    if alpha == 0:
        raise RuntimeError(
            explain(
                "F.celu was given alpha=0", "it divides by alpha: it cannot be 0", "F.relu(input)"
            )
        )
    return _elu(array(input, "input", "F.celu"), alpha, 1.0, 1 / alpha, "F.celu")
