"""Linear and bilinear maps."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import array, require_rank, require_same_dtype, shape_error
from statefulnn.functional._compiled import compiled


def _product(x: jax.Array, weight: jax.Array) -> Any:
    return lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))


@jax.custom_jvp
def _row_product(x: jax.Array, weight: jax.Array) -> Any:
    return _product(x, weight)


@functools.partial(_row_product.defjvp, symbolic_zeros=True)
def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # The weight's gradient of one row is an outer product. Mapped over examples, XLA makes it a product
    # of numbers, fused with what computed the row, which then runs once for every output (on CPU half of
    # the time of per-example gradients of a small CNN). As two halves it stays a matrix product.
    (x, weight), (dx, dw) = primals, tangents
    out = _row_product(x, weight)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_row_product(dx, weight))
    if not isinstance(dw, SymbolicZero):
        terms.append(_product(jnp.stack([x, x]), dw).sum(0) * 0.5)
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


@compiled
@ruled(Rule.LOW)
def _linear(input: jax.Array, weight: jax.Array, bias: jax.Array | None) -> Any:
    # Checked here, where the code runs once for each combination of shapes and dtypes: an eager call
    # like an earlier one pays nothing for it.
    shape = weight.shape
    fits = 1 <= len(shape) <= 2 and input.shape[-1:] == shape[-1:]
    if not fits or (bias is not None and bias.shape != shape[:-1]):
        _refuse_linear(input, weight, bias)
    require_same_dtype("F.linear", input=input, weight=weight, bias=bias)
    if weight.ndim == 2 and math.prod(input.shape[:-1]) == 1:
        out = _row_product(input.reshape(-1), weight).reshape(*input.shape[:-1], weight.shape[0])
    else:
        out = _product(input, weight)
    return out if bias is None else out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)


def linear(input: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
    """Apply ``y = x Aᵀ + b`` to the last axis.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, or ``(in_features,)`` for one output without an axis.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(*, out_features)``, or ``(*)`` for a weight with one axis.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.linear``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.linear(jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.zeros(4)).shape
        (2, 4)
    """
    x = input if isinstance(input, jax.Array) else array(input, "input", "F.linear")
    w = array(weight, "weight", "F.linear")
    b = None if bias is None else array(bias, "bias", "F.linear")
    return _linear(x, w, b)


def _refuse_linear(x: jax.Array, w: jax.Array, b: Any) -> None:
    given = f"F.linear was given input of shape {x.shape} and weight of shape {w.shape}"
    if w.ndim not in (1, 2):
        raise shape_error(
            given,
            "the weight is (out_features, in_features)",
            "reshape the weight to two dimensions",
        )
    if x.shape[-1:] != w.shape[-1:]:
        if not x.ndim:
            why, layer = "the input has no axis of features", ""
        else:
            why = f"the last axis of the input has {x.shape[-1]} features and the weight expects "
            why, layer = (
                why + str(w.shape[-1]),
                f"nn.Linear({x.shape[-1]}, {w.shape[0] if w.ndim == 2 else 1}), or ",
            )
            size = math.prod(x.shape[1:])
            # What a convolution gives is mostly flattened, and a layer for its last axis would run, too.
            if x.ndim > 3 or (x.ndim > 2 and size == w.shape[-1]):
                out = w.shape[0] if w.ndim == 2 else 1
                layer = (
                    f"nn.Sequential(nn.Flatten(), nn.Linear({size}, {out})); for features on the last axis "
                    f"{layer}"
                )
        raise shape_error(given, why, f"{layer}an input whose last axis is {w.shape[-1]}")
    out = w.shape[:-1]
    if b.ndim == 0 or (b.ndim == 1 and b.shape[0] == 1):
        fix = f"broadcast it: jnp.broadcast_to(bias, {out})"
    else:
        fix = f"a bias of shape {out}"
    raise shape_error(
        f"{given}, and bias of shape {b.shape}",
        f"one bias for each of {out} outputs is needed",
        fix,
    )


@compiled
def _bilinear(
    input1: jax.Array, input2: jax.Array, weight: jax.Array, bias: jax.Array | None
) -> Any:
    batch = input1.shape[:-1]
    left = input1.reshape(-1, input1.shape[-1])  # (N, I)
    right = input2.reshape(-1, input2.shape[-1])  # (N, J)
    # One matrix product over I, then a batched one over J: (N, I) x (O, I, J) -> (N, O, J) -> (N, O).
    inner = lax.dot_general(left, weight, (((1,), (1,)), ((), ())))
    out = lax.dot_general(inner, right, (((2,), (1,)), ((0,), (0,))))
    if bias is not None:
        out = out + bias[None]
    return out.reshape(*batch, weight.shape[0])


def bilinear(
    input1: ArrayLike, input2: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
) -> jax.Array:
    """Apply ``y_o = x1ᵀ A_o x2 + b_o`` to the last axes.

    Args:
        input1: ``(*, in1_features)``.
        input2: ``(*, in2_features)``, with the same leading axes.
        weight: ``(out_features, in1_features, in2_features)``.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(*, out_features)``.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.nn.functional.bilinear``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.bilinear(jnp.ones((5, 2)), jnp.ones((5, 3)), jnp.ones((4, 2, 3))).shape
        (5, 4)
    """
    x1 = array(input1, "input1", "F.bilinear")
    x2 = array(input2, "input2", "F.bilinear")
    w = array(weight, "weight", "F.bilinear")
    b = None if bias is None else array(bias, "bias", "F.bilinear")
    require_rank(w, (3,), "weight", "F.bilinear", "(out_features, in1_features, in2_features)")
    given = f"F.bilinear was given inputs of shapes {x1.shape} and {x2.shape}"
    if x1.ndim == 0 or x1.shape[:-1] != x2.shape[:-1]:
        raise shape_error(
            given,
            "all axes but the last are batch axes and must agree",
            "jnp.broadcast_to one of them",
        )
    if (x1.shape[-1], x2.shape[-1]) != w.shape[1:]:
        raise shape_error(
            f"{given}, and weight of shape {w.shape}",
            f"the weight expects {w.shape[1]} and {w.shape[2]} features",
            f"nn.Bilinear({x1.shape[-1]}, {x2.shape[-1]}, {w.shape[0]})",
        )
    if b is not None and b.shape != w.shape[:1]:
        raise shape_error(
            f"F.bilinear was given bias of shape {b.shape} and weight of shape {w.shape}",
            f"one bias for each of {w.shape[0]} outputs is needed",
            f"a bias of shape {w.shape[:1]}",
        )
    require_same_dtype("F.bilinear", input1=x1, input2=x2, weight=w, bias=b)
    return _bilinear(x1, x2, w, b)
