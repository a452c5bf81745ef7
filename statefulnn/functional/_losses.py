"""What losses share: dtypes brought together, shapes checked, reductions, the hinge."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.core.errors import user_stack_level
from statefulnn.functional._checks import require_float, shape_advice, shape_error, widened


def common_dtype(*arrays: Any) -> Any:
    """Return the dtype that arrays are promoted to; losses promote, as torch's do."""
    dtype, *others = [x.dtype for x in arrays]
    with jax.numpy_dtype_promotion("standard"):
        for other in others:
            dtype = dtype if other == dtype else jnp.promote_types(dtype, other)
    return dtype


def together(function: str, **arrays: Any) -> tuple[Any, ...]:
    """Return the common dtype, and the arrays in it, low precision widened for the computation.

    Arrays that are None stay None. The shapes must broadcast, and the common dtype must be floating.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    dtype = common_dtype(*given.values())
    if not jnp.issubdtype(dtype, jnp.inexact):
        name = next(iter(given))
        require_float(given[name], name, function)
    broadcast_shape(function, **given)
    return dtype, *[None if x is None else widened(x.astype(dtype)) for x in arrays.values()]


def broadcast_shape(function: str, **arrays: Any) -> tuple[int, ...]:
    """Return the shape that arrays broadcast to, or raise."""
    shapes = {name: tuple(x.shape) for name, x in arrays.items() if x is not None}
    try:
        return jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        given = " and ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
        raise shape_error(
            f"{function} was given {given}",
            "they meet element by element, and these sizes do not broadcast",
            _one_shape({n: x for n, x in arrays.items() if x is not None}),
        ) from None


def _one_shape(arrays: dict[str, Any]) -> str:
    """Return what to write for the first array that has another shape than the first of all."""
    shape = tuple(next(iter(arrays.values())).shape)
    name = next(n for n, x in arrays.items() if x.shape != shape)
    return shape_advice(arrays[name], name, shape)


def require_shape(
    x: jax.Array | None, shape: tuple[int, ...], name: str, like: str, function: str
) -> None:
    """Raise unless an array that is not None has a shape; `like` says what it belongs to."""
    if x is not None and x.shape != shape:
        raise shape_error(
            f"{function} was given {name} of shape {tuple(x.shape)}",
            f"there is one for each {like}, which makes {shape}",
            f"jnp.broadcast_to({name}, {shape}), or another {name}",
        )


def warn_of_broadcast(x: jax.Array, y: jax.Array, function: str) -> None:
    """Warn if two arrays that should have one shape are going to be broadcast."""
    if x.shape == y.shape:
        return
    shape = broadcast_shape(function, input=x, target=y)
    warnings.warn(
        f"{function} was given input of shape {x.shape} and target of shape {y.shape}, and "
        f"broadcasts both to {shape}: every element meets several others, which is seldom meant; "
        "reshape one of them to the shape of the other",
        UserWarning,
        stacklevel=user_stack_level(),
    )


def hinge(x: jax.Array) -> Any:
    """Return ``max(x, 0)`` with derivative 1 at 0 and 0 at NaN, as torch's ``clamp_min`` has it."""
    return jnp.where(x >= 0, x, lax.stop_gradient(jnp.maximum(x, 0)))


def signum(x: jax.Array) -> Any:
    """Return the sign of real numbers, 0 for NaN, as ``torch.sgn`` has it."""
    return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


@jax.custom_jvp
def absolute(x: jax.Array) -> Any:
    """Return the absolute value, with derivative 0 at 0 and NaN; that of ``jnp.abs`` at 0 is 1."""
    return lax.abs(x)


absolute.defjvps(lambda tangent, out, x: tangent * signum(x))
