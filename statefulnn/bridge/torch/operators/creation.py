"""Arrays made from sizes, and random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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


@operator("zeros")
def zeros(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.zeros(tuple(size), dtype_of(dtype, default_float()))


@operator("empty")
def empty(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Any:
    return zeros(size, dtype=dtype)


@operator("empty_strided", "empty_permuted")
def empty_strided(size: Sequence[int], *_: Any, dtype: str | None = None, **__: Any) -> Any:
    return zeros(size, dtype=dtype)


@operator("ones")
def ones(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.ones(tuple(size), dtype_of(dtype, default_float()))


@operator("full")
def full(size: Sequence[int], value: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.broadcast_to(cast(value, dtype_of(dtype, result_type(value))), tuple(size))


@operator("scalar_tensor")
def scalar_tensor(value: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return cast(value, dtype_of(dtype, default_float()))


@operator("zeros_like", "empty_like")
def zeros_like(x: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.zeros(x.shape, dtype_of(dtype, x.dtype))


@operator("ones_like")
def ones_like(x: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.ones(x.shape, dtype_of(dtype, x.dtype))


@operator("full_like")
def full_like(x: Any, value: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.broadcast_to(cast(value, dtype_of(dtype, x.dtype)), x.shape)


@operator("new_zeros", "new_empty", "new_empty_strided")
def new_zeros(x: Any, size: Sequence[int], *_: Any, dtype: str | None = None, **__: Any) -> Any:
    return jnp.zeros(tuple(size), dtype_of(dtype, x.dtype))


@operator("new_ones")
def new_ones(x: Any, size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.ones(tuple(size), dtype_of(dtype, x.dtype))


@operator("new_full")
def new_full(x: Any, size: Sequence[int], value: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.broadcast_to(cast(value, dtype_of(dtype, x.dtype)), tuple(size))


@operator("arange")
def arange(*bounds: Any, dtype: str | None = None, **_: Any) -> Any:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    whole = all(map(is_size, bounds))
    return jnp.arange(start, end, step, dtype_of(dtype, integer() if whole else default_float()))


@operator("linspace")
def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, **_: Any) -> Any:
    dtype = dtype_of(dtype, default_float())
    if isinstance(steps, int) and not is_array(start) and not is_array(end):
        return jnp.linspace(start, end, steps, dtype=dtype)
    whole = jnp.arange(steps, dtype=default_float()) / jnp.maximum(
        cast(steps - 1, default_float()), 1.0
    )
    return cast(start * (1 - whole) + end * whole, dtype)


@operator("logspace")
def logspace(
    start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None, **_: Any
) -> Any:
    exponents = linspace(start, end, steps)
    return cast(jnp.asarray(base, exponents.dtype) ** exponents, dtype_of(dtype, default_float()))


@operator("fft_fftfreq")
def fftfreq(n: int, d: float = 1.0, *, dtype: Any = None, **_: Any) -> Any:
    return jnp.fft.fftfreq(n, d, dtype=dtype_of(dtype, default_float()))


@operator("fft_rfftfreq")
def rfftfreq(n: int, d: float = 1.0, *, dtype: Any = None, **_: Any) -> Any:
    return jnp.fft.rfftfreq(n, d, dtype=dtype_of(dtype, default_float()))


@operator("tril_indices")
def tril_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None, **_: Any) -> Any:
    return cast(np.stack(np.tril_indices(row, offset, col)), dtype_of(dtype, integer()))


@operator("triu_indices")
def triu_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None, **_: Any) -> Any:
    return cast(np.stack(np.triu_indices(row, offset, col)), dtype_of(dtype, integer()))


def _window(name: str, shape: Callable[..., Any], *defaults: float) -> None:
    """Put a window into the table, a function of places from 0 to 1 and numbers that have defaults."""

    @operator(name)
    def window(n: Any, periodic: bool = True, *given: float, dtype: Any = None, **_: Any) -> Any:
        dtype = dtype_of(dtype, default_float())
        if isinstance(n, int) and n <= 1:
            return jnp.ones(n, dtype)
        last = cast(n if periodic else n - 1, default_float())
        place = jnp.arange(n, dtype=default_float()) / last
        return cast(shape(place, *given, *defaults[len(given) :]), dtype)


def _cosines(place: Any, *weights: float) -> Any:
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
def eye(n: int, m: int | None = None, *, dtype: str | None = None, **_: Any) -> Any:
    return jnp.eye(n, m, dtype=dtype_of(dtype, default_float()))


@operator("diag_embed")
def diag_embed(x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    size = x.shape[-1] + abs(offset)
    rows = jnp.arange(x.shape[-1]) + max(0, -offset)
    columns = jnp.arange(x.shape[-1]) + max(0, offset)
    out = jnp.zeros((*x.shape[:-1], size, size), x.dtype).at[..., rows, columns].set(x)
    return jnp.moveaxis(out, (-2, -1), (dim1, dim2))


# --------------------------------------------------------------------------------------------------
# Random numbers: drawn from the generator that the layers draw from


@operator("rand")
def rand(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Any:
    return jax.random.uniform(next_key(), tuple(size), dtype_of(dtype, default_float()))


@operator("randn")
def randn(size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Any:
    return jax.random.normal(next_key(), tuple(size), dtype_of(dtype, default_float()))


@operator("rand_like")
def rand_like(x: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return jax.random.uniform(next_key(), x.shape, dtype_of(dtype, x.dtype))


@operator("randn_like")
def randn_like(x: Any, *, dtype: str | None = None, **_: Any) -> Any:
    return jax.random.normal(next_key(), x.shape, dtype_of(dtype, x.dtype))


@operator("randint")
def randint(high: int, size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Any:
    return jax.random.randint(next_key(), tuple(size), 0, high, dtype_of(dtype, integer()))


@operator("randint.low")
def randint_low(
    low: int, high: int, size: Sequence[int], *, dtype: str | None = None, **_: Any
) -> Any:
    return jax.random.randint(next_key(), tuple(size), low, high, dtype_of(dtype, integer()))


@operator("randperm")
def randperm(n: int, *, dtype: str | None = None, **_: Any) -> Any:
    return cast(jax.random.permutation(next_key(), n), dtype_of(dtype, integer()))


@operator("bernoulli")
def bernoulli(x: Any, *_: Any, **__: Any) -> Any:
    return cast(jax.random.bernoulli(next_key(), x), x.dtype)


@operator("bernoulli.p", "bernoulli.float")
def bernoulli_p(x: Any, p: float = 0.5, **_: Any) -> Any:
    return cast(jax.random.bernoulli(next_key(), p, x.shape), x.dtype)


@operator("bernoulli.Tensor")
def bernoulli_tensor(x: Any, p: Any, **_: Any) -> Any:
    return cast(jax.random.bernoulli(next_key(), p, x.shape), x.dtype)


@operator("uniform")
def uniform(x: Any, low: float = 0.0, high: float = 1.0, **_: Any) -> Any:
    return jax.random.uniform(next_key(), x.shape, x.dtype, low, high)


@operator("normal", "normal.functional")
def normal(x: Any, mean: float = 0.0, std: float = 1.0, **_: Any) -> Any:
    drawn = jax.random.normal(next_key(), x.shape, x.dtype)
    return drawn * jnp.asarray(std, x.dtype) + jnp.asarray(mean, x.dtype)


@operator("exponential")
def exponential(x: Any, lambd: float = 1.0, **_: Any) -> Any:
    return jax.random.exponential(next_key(), x.shape, x.dtype) / jnp.asarray(lambd, x.dtype)


@operator("multinomial")
def multinomial(x: Any, num_samples: int, replacement: bool = False, **_: Any) -> Any:
    noise = jax.random.gumbel(next_key(), (num_samples if replacement else 1, *x.shape), x.dtype)
    scores = jnp.log(x) + noise
    if replacement:
        return cast(jnp.moveaxis(jnp.argmax(scores, -1), 0, -1), integer())
    return cast(jax.lax.top_k(scores[0], num_samples)[1], integer())
