"""How many floating-point operations an equation of a jaxpr stands for.

A product of matrices and a convolution count ``2 * m * n * k``: a multiplication and an addition. Other
arithmetic counts one for each element, a reduction one for each element that it adds. What only moves or
converts numbers counts nothing, and neither does integer arithmetic. XLA's own count of a whole program
agrees with that, except that XLA takes the body of a loop once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

_MOVES = frozenset(
    """
    broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice dynamic_update_slice gather
    concatenate pad rev convert_element_type bitcast_convert_type copy copy_p name iota select_n split
    stop_gradient optimization_barrier device_put sharding_constraint real imag complex reduce_precision pvary
    random_bits random_unwrap random_wrap
    """.split()
)


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[Any]:
    """Yield the jaxprs that an equation runs, such as the body of a loop or the branches of a cond."""
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(part, "jaxpr", part)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def turns(eqn: JaxprEqn) -> int:
    """Return how often an equation runs its jaxpr: the length of a scan, and 1 of anything else."""
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def flops_of_layer(eqn: Any) -> int | None:
    """Return the operations of a convolution of `statefulnn.functional`, None of any other equation.

    They are counted by what it computes: on some devices it runs as several smaller ones.
    """
    transposed = {"_conv": False, "_conv_transpose": True}.get(str(eqn.params.get("name")))
    if transposed is None or len(eqn.invars) not in (2, 3) or len(eqn.outvars) != 1:
        return None
    (image, kernel, *bias), (out,) = eqn.invars, eqn.outvars
    channels = (image if transposed else out).aval.shape[1 - kernel.aval.ndim :][0]
    if channels != kernel.aval.shape[0]:
        return None
    each = _size(image if transposed else out)
    return 2 * each * _size(kernel) // kernel.aval.shape[0] + len(bias) * _size(out)


def flops_of(eqn: Any) -> int:
    """Return the floating-point operations of an equation that runs no jaxpr."""
    name, (out, *_) = eqn.primitive.name, eqn.outvars
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * _size(out) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        image, kernel = eqn.invars
        outer, inner, *_ = eqn.params["dimension_numbers"].rhs_spec
        # A transposed convolution spreads its input, and what it puts between is not multiplied.
        spread = math.prod(eqn.params["lhs_dilation"]) > 1
        each, axis = (image, inner) if spread else (out, outer)
        return 2 * _size(each) * _size(kernel) // kernel.aval.shape[axis]
    if name in _MOVES:
        return 0
    if "window_dimensions" in eqn.params and _is_floating(out):  # pooling
        return _size(out) * math.prod(eqn.params["window_dimensions"])
    variables = [v for v in (*eqn.invars, *eqn.outvars) if _is_floating(v)]
    if not variables:
        return 0
    most = max(map(_size, variables))
    return most - _size(out) if name.startswith("reduce_") else most


def _size(variable: Var | Literal) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


def _is_floating(variable: Var | Literal) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
