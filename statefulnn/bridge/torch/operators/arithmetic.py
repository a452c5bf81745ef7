"""Element by element: arithmetic, comparisons, elementary functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

import statefulnn.functional as F
from statefulnn.bridge.torch.operators import _subgradients as subgradients
from statefulnn.bridge.torch.operators._promotion import (
    cast,
    category,
    dtype_of,
    floating,
    promoted,
    result_type,
)
from statefulnn.bridge.torch.operators._table import operator

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from statefulnn.bridge.torch.operators._table import Scalar

# --------------------------------------------------------------------------------------------------
# Two arguments


def _two(name: str, function: Callable, arguments: Callable = promoted) -> None:
    operator(*name.split())(lambda a, b: function(*arguments(a, b)))


for _name, _function in {
    "mul multiply": lambda a, b: a & b if a.dtype == bool else a * b,
    "maximum max.other": jnp.maximum,
    "minimum min.other": jnp.minimum,
    "fmax": subgradients.larger_first(jnp.greater_equal),
    "fmin": subgradients.larger_first(jnp.less_equal),
    "eq __eq__": jnp.equal,
    "ne not_equal __ne__": jnp.not_equal,
    "lt less": jnp.less,
    "le less_equal": jnp.less_equal,
    "gt greater": jnp.greater,
    "ge greater_equal": jnp.greater_equal,
    "bitwise_and __and__ and": jnp.bitwise_and,
    "bitwise_or __or__ or": jnp.bitwise_or,
    "bitwise_xor __xor__ xor": jnp.bitwise_xor,
    "bitwise_left_shift __lshift__": jnp.left_shift,
    "bitwise_right_shift __rshift__": jnp.right_shift,
    "remainder": jnp.remainder,
    "fmod": jnp.fmod,
    "floor_divide": jnp.floor_divide,
    "copysign": jnp.copysign,
    "gcd": jnp.gcd,
    "lcm": lambda a, b: jnp.abs(jnp.lcm(a, b)),
    "nextafter": jnp.nextafter,
}.items():
    _two(_name, _function, floating if _name == "copysign" else promoted)
for _name, _function in {
    "atan2 arctan2": subgradients.angle,
    "hypot": jnp.hypot,
    "logaddexp": jnp.logaddexp,
    "true_divide": jnp.true_divide,
    "special_zeta": jax.scipy.special.zeta,
    "igamma special_gammainc": jax.scipy.special.gammainc,
    "igammac special_gammaincc": jax.scipy.special.gammaincc,
}.items():
    _two(_name, _function, floating)
for _name, _function in {
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}.items():
    _two(_name, _function)


@operator("add")
def add(a: ArrayLike, b: ArrayLike, alpha: Scalar = 1) -> jax.Array:
    a, b = promoted(a, b)
    if a.dtype == bool:
        return a | b
    return a + (b if alpha == 1 else b * cast(alpha, b.dtype))


@operator("sub", "subtract")
def sub(a: ArrayLike, b: ArrayLike, alpha: Scalar = 1) -> jax.Array:
    a, b = promoted(a, b)
    return a - (b if alpha == 1 else b * cast(alpha, b.dtype))


@operator("rsub")
def rsub(a: ArrayLike, b: ArrayLike, alpha: Scalar = 1) -> jax.Array:
    return sub(b, a, alpha)


@operator("div", "divide")
def div(a: ArrayLike, b: ArrayLike, rounding_mode: str | None = None) -> jax.Array:
    if rounding_mode is None:
        return jnp.true_divide(*floating(a, b))
    a, b = promoted(a, b)
    if rounding_mode == "floor":
        return jnp.floor_divide(a, b)
    if category(a.dtype) == 1:
        return lax.div(*jnp.broadcast_arrays(a, b))
    return jnp.trunc(a / b)


@operator("pow")
def power(a: ArrayLike, b: ArrayLike) -> jax.Array:
    dtype = result_type(a, b)
    if isinstance(b, (int, float)) and not isinstance(b, bool) and b in (1, 2, 3, 4):
        return lax.integer_pow(cast(a, dtype), int(b))
    if b == 0.5 if isinstance(b, float) else False:
        return jnp.sqrt(cast(a, dtype))
    if category(dtype) != 2:
        return jnp.power(cast(a, dtype), cast(b, dtype))
    return subgradients.power(*jnp.broadcast_arrays(cast(a, dtype), cast(b, dtype)))


@operator("lerp")
def lerp(start: jax.Array, end: jax.Array, weight: ArrayLike) -> jax.Array:
    weight = cast(weight, start.dtype)
    return start + weight * (end - start)


@operator("addcmul")
def addcmul(x: jax.Array, a: jax.Array, b: jax.Array, value: Scalar = 1) -> jax.Array:
    x, a, b = promoted(x, a, b)
    return x + cast(value, x.dtype) * a * b


@operator("addcdiv")
def addcdiv(x: jax.Array, a: jax.Array, b: jax.Array, value: Scalar = 1) -> jax.Array:
    x, a, b = promoted(x, a, b)
    return x + cast(value, x.dtype) * a / b


@operator("where")
def where(condition: jax.Array, a: ArrayLike, b: ArrayLike) -> jax.Array:
    return jnp.where(cast(condition, bool), *promoted(a, b))


@operator("masked_fill")
def masked_fill(x: jax.Array, mask: jax.Array, value: ArrayLike) -> jax.Array:
    return jnp.where(mask, cast(value, x.dtype), x)


@operator("clamp", "clip")
def clamp(x: jax.Array, min: ArrayLike | None = None, max: ArrayLike | None = None) -> jax.Array:
    dtype = result_type(x, min, max)
    low, high = (None if bound is None else cast(bound, dtype) for bound in (min, max))
    return subgradients.clamp(cast(x, dtype), low, high)


@operator("clamp_min")
def clamp_min(x: jax.Array, min: ArrayLike) -> jax.Array:
    return clamp(x, min=min)


@operator("clamp_max")
def clamp_max(x: jax.Array, max: ArrayLike) -> jax.Array:
    return clamp(x, max=max)


@operator("isclose")
def isclose(
    a: jax.Array, b: jax.Array, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> jax.Array:
    return jnp.isclose(a, b, rtol, atol, equal_nan)


# --------------------------------------------------------------------------------------------------
# One argument

for _name, _function in {
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log2": jnp.log2,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": jnp.reciprocal,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "asin arcsin": jnp.arcsin,
    "acos arccos": jnp.arccos,
    "atan arctan": jnp.arctan,
    "asinh arcsinh": jnp.arcsinh,
    "acosh arccosh": jnp.arccosh,
    "atanh arctanh": jnp.arctanh,
    "erf special_erf": jax.scipy.special.erf,
    "erfc special_erfc": jax.scipy.special.erfc,
    "erfinv special_erfinv": jax.scipy.special.erfinv,
    "lgamma": jax.scipy.special.gammaln,
    "digamma": jax.scipy.special.digamma,
    "deg2rad": jnp.deg2rad,
    "rad2deg": jnp.rad2deg,
    "sigmoid special_expit": F.sigmoid,
    "tanh": F.tanh,
    "sinc": jnp.sinc,
    "i0 special_i0": jax.scipy.special.i0,
    "special_i0e": jax.scipy.special.i0e,
    "special_i1": jax.scipy.special.i1,
    "special_i1e": jax.scipy.special.i1e,
    "special_ndtri": jax.scipy.special.ndtri,
    "special_log_ndtr": jax.scipy.special.log_ndtr,
}.items():
    operator(*_name.split())(lambda x, _f=_function: _f(floating(x)[0]))
for _name, _function in {
    "neg negative": jnp.negative,
    "abs absolute": subgradients.absolute,
    "sign sgn": jnp.sign,
    "positive": lambda x: x,
    "square": jnp.square,
    "isnan": jnp.isnan,
    "isinf": jnp.isinf,
    "isfinite": jnp.isfinite,
    "isposinf": jnp.isposinf,
    "isneginf": jnp.isneginf,
    "signbit": jnp.signbit,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not,
    "real": jnp.real,
    "imag": jnp.imag,
    "conj conj_physical _conj": jnp.conj,
    "angle": jnp.angle,
    "view_as_real": lambda x: jnp.stack([x.real, x.imag], -1),
    "view_as_complex": lambda x: lax.complex(x[..., 0], x[..., 1]),
    "stop_gradient detach": lax.stop_gradient,
    "clone alias lift_fresh lift_fresh_copy contiguous resolve_conj resolve_neg": lambda x, **_: x,
}.items():
    operator(*_name.split())(_function)
for _name, _function in {"floor": jnp.floor, "ceil": jnp.ceil, "trunc fix": jnp.trunc}.items():
    operator(*_name.split())(lambda x, _f=_function: x if category(x.dtype) < 2 else _f(x))


@operator("round")
def round_(x: jax.Array, decimals: int = 0) -> jax.Array:
    return x if category(x.dtype) < 2 else jnp.round(x, decimals)


@operator("frac")
def frac(x: jax.Array) -> jax.Array:
    return x - jnp.trunc(x)


@operator("logit")
def logit(x: jax.Array, eps: float | None = None) -> jax.Array:
    (x,) = floating(x)
    if eps is not None:
        x = clamp(x, eps, 1 - eps)
    return jnp.log(x / (1 - x))


@operator("nan_to_num")
def nan_to_num(
    x: jax.Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> jax.Array:
    return jnp.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


@operator("xlogy", "special_xlogy")
def xlogy(a: ArrayLike, b: ArrayLike) -> jax.Array:
    return jax.scipy.special.xlogy(*floating(a, b))


@operator("polygamma", "special_polygamma")
def polygamma(n: int, x: jax.Array) -> jax.Array:
    (x,) = floating(x)
    return jax.scipy.special.polygamma(n, x)


@operator("frexp")
def frexp(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    mantissa, exponent = jnp.frexp(x)
    return mantissa, cast(exponent, jnp.int32)


@operator("polar")
def polar(size: jax.Array, angle: jax.Array) -> jax.Array:
    return lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))


@operator("complex")
def complex_(real: jax.Array, imag: jax.Array) -> jax.Array:
    return lax.complex(real, imag)


# --------------------------------------------------------------------------------------------------
# Dtypes


@operator("to.dtype", "to.dtype_layout", "_to_copy")
def to(x: jax.Array, dtype: str | None = None, *_: Any, **__: Any) -> jax.Array:
    return cast(x, dtype_of(dtype, x.dtype))


@operator("to.device")
def to_device(x: jax.Array, device: str, dtype: str | None = None, *_: Any, **__: Any) -> jax.Array:
    return cast(x, dtype_of(dtype, x.dtype))


@operator("to.other", "type_as")
def to_other(x: jax.Array, other: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return cast(x, other.dtype)


@operator("assign")
def assign(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return `new` as it is after it was written into `old`."""
    return jnp.broadcast_to(cast(new, old.dtype), old.shape)


@jax.custom_jvp
def _unseen(old: jax.Array, new: jax.Array) -> jax.Array:
    return new


@_unseen.defjvp
def _(
    values: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return values[1], tangents[0]


@operator("unseen")
def unseen(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return `new` as it is after it was written into `old` in a way that gradients do not see."""
    return _unseen(old, new) if category(new.dtype) > 1 else lax.stop_gradient(new)


@operator("copy")
def copy(x: jax.Array, source: jax.Array, non_blocking: bool = False) -> jax.Array:
    return assign(x, source)


@operator("fill")
def fill(x: jax.Array, value: ArrayLike) -> jax.Array:
    return assign(x, cast(value, x.dtype))


@operator("zero")
def zero(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


# --------------------------------------------------------------------------------------------------
# Numbers: what the code computes with sizes

for _name in ("sqrt", "ceil", "floor"):
    operator(f"math.{_name}")(getattr(math, _name))
