"""Arrays made from sizes, and random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.bridge.torch.operators._promotion import (
    cast,
    default_float,
    dtype_of,
    integer,
    is_array,
    is_size,
    result_type,
)
from statefulnn.bridge.torch.operators._table import operator
from statefulnn.core.generator import next_key

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from statefulnn.bridge.torch.operators._table import Scalar


@operator("zeros")
def zeros(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.zeros(tuple(size), dtype_of(dtype, default_float()))


@operator("empty")
def empty(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> jax.Array:
    return zeros(size, dtype=dtype)


@operator("empty_strided", "empty_permuted")
def empty_strided(size: Sequence[int], *_: Any, dtype: str | None = None, **__: Any) -> jax.Array:
    return zeros(size, dtype=dtype)


@operator("ones")
def ones(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.ones(tuple(size), dtype_of(dtype, default_float()))


@operator("full")
def full(size: Sequence[int], value: Scalar, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.broadcast_to(cast(value, dtype_of(dtype, result_type(value))), tuple(size))


@operator("scalar_tensor")
def scalar_tensor(value: Scalar, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return cast(value, dtype_of(dtype, default_float()))


@operator("zeros_like", "empty_like")
def zeros_like(x: jax.Array, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.zeros(x.shape, dtype_of(dtype, x.dtype))


@operator("ones_like")
def ones_like(x: jax.Array, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.ones(x.shape, dtype_of(dtype, x.dtype))


@operator("full_like")
def full_like(x: jax.Array, value: Scalar, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.broadcast_to(cast(value, dtype_of(dtype, x.dtype)), x.shape)


@operator("new_zeros", "new_empty", "new_empty_strided")
def new_zeros(
    x: jax.Array, size: Sequence[int], *_: Any, dtype: str | None = None, **__: Any
) -> jax.Array:
    return jnp.zeros(tuple(size), dtype_of(dtype, x.dtype))


@operator("new_ones")
def new_ones(x: jax.Array, size: Sequence[int], *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.ones(tuple(size), dtype_of(dtype, x.dtype))


@operator("new_full")
def new_full(
    x: jax.Array, size: Sequence[int], value: Scalar, *, dtype: str | None = None, **_: Any
) -> jax.Array:
    return jnp.broadcast_to(cast(value, dtype_of(dtype, x.dtype)), tuple(size))


@operator("arange")
def arange(*bounds: Scalar, dtype: str | None = None, **_: Any) -> jax.Array:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    whole = all(map(is_size, bounds))
    return jnp.arange(start, end, step, dtype_of(dtype, integer() if whole else default_float()))


@operator("linspace")
def linspace(
    start: ArrayLike, end: ArrayLike, steps: int, *, dtype: Any = None, **_: Any
) -> jax.Array:
    dtype = dtype_of(dtype, default_float())
    if isinstance(steps, int) and not is_array(start) and not is_array(end):
        return jnp.linspace(start, end, steps, dtype=dtype)
    whole = jnp.arange(steps, dtype=default_float()) / jnp.maximum(
        cast(steps - 1, default_float()), 1.0
    )
    return cast(start * (1 - whole) + end * whole, dtype)


@operator("logspace")
def logspace(
    start: ArrayLike,
    end: ArrayLike,
    steps: int,
    base: float = 10.0,
    *,
    dtype: str | None = None,
    **_: Any,
) -> jax.Array:
    exponents = linspace(start, end, steps)
    return cast(jnp.asarray(base, exponents.dtype) ** exponents, dtype_of(dtype, default_float()))


@operator("fft_fftfreq")
def fftfreq(n: int, d: float = 1.0, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.fft.fftfreq(n, d, dtype=dtype_of(dtype, default_float()))


@operator("fft_rfftfreq")
def rfftfreq(n: int, d: float = 1.0, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.fft.rfftfreq(n, d, dtype=dtype_of(dtype, default_float()))


@operator("tril_indices")
def tril_indices(
    row: int, col: int, offset: int = 0, *, dtype: str | None = None, **_: Any
) -> jax.Array:
    return cast(np.stack(np.tril_indices(row, offset, col)), dtype_of(dtype, integer()))


@operator("triu_indices")
def triu_indices(
    row: int, col: int, offset: int = 0, *, dtype: str | None = None, **_: Any
) -> jax.Array:
    return cast(np.stack(np.triu_indices(row, offset, col)), dtype_of(dtype, integer()))


def _window(name: str, shape: Callable[..., Any], *defaults: float) -> None:
    """Put a window into the table, a function of places from 0 to 1 and numbers that have defaults."""

    @operator(name)
    def window(
        n: int, periodic: bool = True, *given: float, dtype: Any = None, **_: Any
    ) -> jax.Array:
        dtype = dtype_of(dtype, default_float())
        if isinstance(n, int) and n <= 1:
            return jnp.ones(n, dtype)
        last = cast(n if periodic else n - 1, default_float())
        place = jnp.arange(n, dtype=default_float()) / last
        return cast(shape(place, *given, *defaults[len(given) :]), dtype)


def _cosines(place: jax.Array, *weights: float) -> Any:
    """Return a sum of cosines with weights whose signs alternate."""
    return sum(
        (-1) ** i * weight * jnp.cos(2 * math.pi * i * place) for i, weight in enumerate(weights)
    )


_window("hann_window", lambda place: _cosines(place, 0.5, 0.5))
_window("hamming_window", _cosines, 0.54, 0.46)
_window("blackman_window", lambda place: _cosines(place, 0.42, 0.5, 0.08))
_window("bartlett_window", lambda place: 1 - jnp.abs(2 * place - 1))
_window(
    "kaiser_window",
    lambda place, beta: (
        jax.scipy.special.i0(beta * jnp.sqrt(jnp.maximum(1 - (2 * place - 1) ** 2, 0.0)))
        / jax.scipy.special.i0(beta)
    ),
    12.0,
)


@operator("eye", "eye.m")
def eye(n: int, m: int | None = None, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jnp.eye(n, m, dtype=dtype_of(dtype, default_float()))


@operator("diag_embed")
def diag_embed(x: jax.Array, offset: int = 0, dim1: int = -2, dim2: int = -1) -> jax.Array:
    size = x.shape[-1] + abs(offset)
    rows = jnp.arange(x.shape[-1]) + max(0, -offset)
    columns = jnp.arange(x.shape[-1]) + max(0, offset)
    out = jnp.zeros((*x.shape[:-1], size, size), x.dtype).at[..., rows, columns].set(x)
    return jnp.moveaxis(out, (-2, -1), (dim1, dim2))


# --------------------------------------------------------------------------------------------------
# Random numbers: drawn from the generator that the layers draw from


@operator("rand")
def rand(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jax.random.uniform(next_key(), tuple(size), dtype_of(dtype, default_float()))


@operator("randn")
def randn(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jax.random.normal(next_key(), tuple(size), dtype_of(dtype, default_float()))


@operator("rand_like")
def rand_like(x: jax.Array, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jax.random.uniform(next_key(), x.shape, dtype_of(dtype, x.dtype))


@operator("randn_like")
def randn_like(x: jax.Array, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jax.random.normal(next_key(), x.shape, dtype_of(dtype, x.dtype))


@operator("randint")
def randint(high: int, size: Sequence[int], *, dtype: str | None = None, **_: Any) -> jax.Array:
    return jax.random.randint(next_key(), tuple(size), 0, high, dtype_of(dtype, integer()))


@operator("randint.low")
def randint_low(
    low: int, high: int, size: Sequence[int], *, dtype: str | None = None, **_: Any
) -> jax.Array:
    return jax.random.randint(next_key(), tuple(size), low, high, dtype_of(dtype, integer()))


@operator("randperm")
def randperm(n: int, *, dtype: str | None = None, **_: Any) -> jax.Array:
    return cast(jax.random.permutation(next_key(), n), dtype_of(dtype, integer()))


@operator("bernoulli")
def bernoulli(x: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return cast(jax.random.bernoulli(next_key(), x), x.dtype)


@operator("bernoulli.p", "bernoulli.float")
def bernoulli_p(x: jax.Array, p: float = 0.5, **_: Any) -> jax.Array:
    return cast(jax.random.bernoulli(next_key(), p, x.shape), x.dtype)


@operator("bernoulli.Tensor")
def bernoulli_tensor(x: jax.Array, p: jax.Array, **_: Any) -> jax.Array:
    return cast(jax.random.bernoulli(next_key(), p, x.shape), x.dtype)


@operator("uniform")
def uniform(x: jax.Array, low: float = 0.0, high: float = 1.0, **_: Any) -> jax.Array:
    return jax.random.uniform(next_key(), x.shape, x.dtype, low, high)


@operator("normal", "normal.functional")
def normal(x: jax.Array, mean: float = 0.0, std: float = 1.0, **_: Any) -> jax.Array:
    drawn = jax.random.normal(next_key(), x.shape, x.dtype)
    return drawn * jnp.asarray(std, x.dtype) + jnp.asarray(mean, x.dtype)


@operator("exponential")
def exponential(x: jax.Array, lambd: float = 1.0, **_: Any) -> jax.Array:
    return jax.random.exponential(next_key(), x.shape, x.dtype) / jnp.asarray(lambd, x.dtype)


@operator("multinomial")
def multinomial(x: jax.Array, num_samples: int, replacement: bool = False, **_: Any) -> jax.Array:
    noise = jax.random.gumbel(next_key(), (num_samples if replacement else 1, *x.shape), x.dtype)
    scores = jnp.log(x) + noise
    if replacement:
        return cast(jnp.moveaxis(jnp.argmax(scores, -1), 0, -1), integer())
    return cast(jax.lax.top_k(scores[0], num_samples)[1], integer())
