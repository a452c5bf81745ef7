"""What every function checks before it computes: arrays, dtypes, ranks, dimensions.

The checks run in Python, on shapes and dtypes only, so they cost nothing in compiled code and hold
there just as well.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import DtypeError, ShapeError, explain, user_stack_level
from statefulnn.core.parameter import ArrayBox
from statefulnn.core.refusals import array_of, to_shape

LOW_PRECISION = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def array(x: object, name: str, function: str) -> Any:
    """Return the JAX array in `x`: itself, what a box holds, or a converted number or numpy array."""
    if isinstance(x, ArrayBox):  # the cheaper question: that for jax.Array runs Python
        return x.__jax_array__()
    if isinstance(x, jax.Array):
        return x
    is_number = isinstance(x, (np.ndarray, np.generic, int, float, complex))
    if is_number and np.result_type(x).kind != "O":
        return jnp.asarray(x)
    convert = getattr(x, "__jax_array__", None)
    if convert is not None:
        return convert()
    why, instead = "it computes with arrays", f"pass an array: {array_of(x, name)}"
    if isinstance(x, tuple) and any(isinstance(part, jax.Array) for part in x):
        why += ", and a layer such as nn.GRU or nn.MultiheadAttention returns several"
        instead = "take the output apart, out, *rest = layer(x), and pass out"
    raise DtypeError(explain(f"{function} was given {name}={type(x).__name__}", why, instead))


def is_float(dtype: DTypeLike) -> bool:
    """Say whether a dtype is a real floating one."""
    return jnp.issubdtype(dtype, jnp.floating)


def require_float(x: jax.Array, name: str, function: str) -> None:
    """Raise unless an array is of a floating or complex dtype."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise DtypeError(
            explain(
                f"{function} was given {name} of dtype {x.dtype}",
                "it is defined for floating dtypes only",
                f"cast it first: {name}.astype(jnp.float32)",
            )
        )


def require_real_float(x: jax.Array, name: str, function: str) -> None:
    """Raise unless an array is of a real floating dtype."""
    if not is_float(x.dtype):
        raise DtypeError(
            explain(
                f"{function} was given {name} of dtype {x.dtype}",
                "it is defined for real floating dtypes only",
                f"cast it first: {name}.astype(jnp.float32)",
            )
        )


def require_same_dtype(function: str, **arrays: Any) -> None:
    """Raise unless all arrays that are not None have one dtype."""
    (first, x), *others = ((name, x) for name, x in arrays.items() if x is not None)
    for name, other in others:
        if other.dtype != x.dtype:
            _mixed(function, first, x, name, other)


def require_same_or_wider(function: str, **arrays: Any) -> None:
    """As `require_same_dtype`, but a low-precision first array may meet float32 parameters."""
    (first, x), *others = ((name, x) for name, x in arrays.items() if x is not None)
    require_float(x, first, function)
    for name, other in others:
        if other.dtype != x.dtype and not (
            x.dtype in LOW_PRECISION and other.dtype == np.dtype(np.float32)
        ):
            _mixed(function, first, x, name, other)


def _mixed(function: str, first: str, x: jax.Array, name: str, other: jax.Array) -> None:
    raise DtypeError(
        explain(
            f"{function} was given {first} of dtype {x.dtype} and {name} of dtype {other.dtype}",
            "mixed dtypes are not promoted: a model would silently compute in another precision",
            cast_advice(x, other, first),
        )
    )


def cast_advice(x: jax.Array, other: jax.Array, name: str = "input") -> str:
    """Return what to write where an array has another dtype than the parameters."""
    cast = f"cast it: {name}.astype(jnp.{other.dtype})"
    if jnp.issubdtype(x.dtype, jnp.inexact):  # a module does not become one of integers
        cast += f", or the module: module.to(jnp.{x.dtype})"
    return cast


def require_rank(x: Any, ranks: Sequence[int], name: str, function: str, layout: str) -> None:
    """Raise unless an array has one of the ranks; `layout` says what the axes mean."""
    if x.ndim not in ranks:
        raise ShapeError(
            explain(
                f"{function} was given {name} of shape {tuple(x.shape)}",
                f"it has {x.ndim} dimensions, and {layout} is needed",
                rank_advice(x, ranks, name),
            )
        )


def rank_advice(x: jax.Array, ranks: Sequence[int], name: str = "input") -> str:
    """Return what to write where an array has too many axes or too few."""
    if x.ndim + 1 in ranks:
        return f"add the missing axis in front: {name}[None]"
    return f"reshape it to one of these: {', '.join(map(str, ranks))} dimensions"


def shape_advice(x: jax.Array, name: str, shape: tuple[int, ...]) -> str:
    """Return what to write where an array should have another shape, if that mixes up no numbers."""
    return to_shape(name, tuple(x.shape), shape) or f"a {name} of shape {shape}"


def channels_advice(x: jax.Array, expected: int, spatial: int, layer: str) -> str:
    """Return what to write where an input has other channels than a layer expects.

    Args:
        x: the input, with its channels in front of `spatial` axes.
        expected: how many channels the layer has.
        spatial: how many axes come after the channels.
        layer: the layer that takes the input as it is.
    """
    axis = x.ndim - spatial - 1
    if x.shape[-1] == expected:  # images as JAX's own layers take them: channels last
        return f"put the channels first: jnp.moveaxis(input, -1, {axis})"
    if axis == 0 and expected == 1:  # it is a batch, of images without an axis for the channel
        return "give each its channel: input[:, None]"
    return f"{f'{layer}, or ' if axis else ''}an input with its {expected} channels on axis {axis}"


def shape_error(what: str, why: str, instead: str) -> ShapeError:
    """Build a ShapeError from the three parts of its message."""
    return ShapeError(explain(what, why, instead))


def dimension(dim: int, ndim: int, function: str) -> int:
    """Return a dimension as a number from 0, or raise IndexError if there is none such."""
    dim = operator.index(dim)
    bound = max(ndim, 1)
    if not -bound <= dim < bound:
        raise IndexError(
            explain(
                f"{function} was given dim={dim} for an array of {ndim} dimensions",
                f"dimensions go from {-bound} to {bound - 1}",
                f"use a dim in that range, such as dim={-1}",
            )
        )
    return dim % bound


def numbers(value: Any, count: int, name: str, function: str) -> tuple[int, ...]:
    """Return `count` integers from one integer or a sequence of one or `count` of them."""
    try:
        given = tuple(operator.index(v) for v in value)
    except TypeError:
        given = (_index(value, name, function),)
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise ShapeError(
            explain(
                f"{function} was given {name}={value!r}",
                f"one number, or one for each of {count} spatial dimensions, is needed",
                f"{name}={given[:1] * count if given else (1,) * count}",
            )
        )
    return given


def _index(value: SupportsIndex, name: str, function: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise DtypeError(
            explain(
                f"{function} was given {name}={value!r}",
                "an integer, or a tuple of integers, is needed",
                f"{name}=3",
            )
        ) from None


def reduction_of(
    reduction: str, size_average: bool | None, reduce: bool | None, function: str
) -> str:
    """Return "mean", "sum" or "none", also from torch's two older arguments."""
    if size_average is not None or reduce is not None:
        legacy = "none" if reduce is False else "sum" if size_average is False else "mean"
        warnings.warn(
            "size_average and reduce args will be deprecated: write "
            f"{function}(..., reduction={legacy!r})",
            UserWarning,
            stacklevel=user_stack_level(),
        )
        return legacy
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            explain(
                f"{function} was given reduction={reduction!r}",
                'a loss is reduced by "mean" or "sum", or by "none" to keep one value an element',
                f'{function}(input, target, reduction="mean")',
            )
        )
    return reduction


def reduced(loss: jax.Array, reduction: str) -> Any:
    """Reduce an array of losses."""
    if reduction == "mean":
        # Written out: jnp.mean divides integers and low precision by its own rules.
        return jnp.sum(loss) / jnp.asarray(loss.size, loss.dtype)
    return jnp.sum(loss) if reduction == "sum" else loss


def widened(x: jax.Array) -> Any:
    """Return float16 and bfloat16 arrays as float32, and others as they are."""
    return x.astype(jnp.float32) if x.dtype in LOW_PRECISION else x


def concrete_on_cpu(x: ArrayLike) -> np.ndarray | None:
    """Return an array's values if looking at them costs no transfer, and None otherwise."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable or any(d.platform != "cpu" for d in x.devices()):
            return None
    return np.asarray(x)
