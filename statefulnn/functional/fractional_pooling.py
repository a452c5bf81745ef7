"""Maxima over windows at random places, whose distances are a fraction on average."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.box import unwrap
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.generator import State, advance, drawing_generator
from statefulnn.functional import _pool_lowering as lowering
from statefulnn.functional._checks import array, numbers, shape_error, widened
from statefulnn.functional._compiled import compiled
from statefulnn.functional.pooling import Size, require_kind, spatial

Static = tuple[tuple[int, ...], tuple[int, ...], bool]  # kernel, outs, whether indices are wanted


def _starts(sample: jax.Array, size: int, kernel: int, out: int) -> Any:
    # (N, C) of [0, 1) to (N, C, out): the first coordinate of each window. The last one ends at the
    # edge.
    if out == 1:
        return jnp.full((*sample.shape, 1), np.int32(size - kernel))
    wide = widened(sample)[..., None]
    alpha = np.asarray(size - kernel, wide.dtype) / np.asarray(out - 1, wide.dtype)
    steps = jnp.arange(out, dtype=wide.dtype)
    starts = ((steps + wide) * alpha).astype(jnp.int32) - (wide * alpha).astype(jnp.int32)
    return starts.at[..., -1].set(np.int32(size - kernel))


def _fractional(x: jax.Array, samples: jax.Array, static: Static) -> Any:
    kernel, outs, with_indices = static
    n = len(kernel)
    batch = x if x.ndim == n + 2 else x[None]
    sizes = batch.shape[2:]
    # torch draws the sample of the last axis first where there are two.
    order = (1, 0) if n == 2 else (0, 1, 2)
    where: Any = 0  # (N, C, D', kD, H', kH, W', kW), flat positions
    for i in range(n):
        starts = _starts(samples[..., order[i]], sizes[i], kernel[i], outs[i])
        places = starts[..., None] + np.arange(kernel[i], dtype=np.int32)
        shape = [*places.shape[:2], *(1,) * (2 * n)]
        shape[2 + 2 * i : 4 + 2 * i] = outs[i], kernel[i]
        where = where * np.int32(sizes[i]) + places.reshape(shape)
    # (N, C, *outs, taps)
    where = where.transpose(0, 1, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2))
    where = where.reshape(*where.shape[:2], math.prod(outs), math.prod(kernel))
    lead = batch.shape[:2]
    flat = batch.reshape(*lead, math.prod(sizes))
    where = jnp.broadcast_to(where, (*lead, *where.shape[2:]))
    still = jnp.take_along_axis(
        lax.stop_gradient(flat), where.reshape(*lead, math.prod(where.shape[2:])), -1
    ).reshape(where.shape)
    tap = lowering.winner(still, -1)[..., None]
    index = jnp.take_along_axis(where, tap, -1)[..., 0]
    value = jnp.take_along_axis(flat, index, -1)
    shape = (*x.shape[: x.ndim - n], *outs)
    value = value.reshape(shape)
    return (value, index.astype(lowering.index_dtype()).reshape(shape)) if with_indices else value


@functools.partial(compiled, static_argnums=2)
def _with_samples(x: jax.Array, samples: jax.Array, static: Static) -> Any:
    return _fractional(x, samples, static)


def _drawn(x: jax.Array, key: jax.Array, static: Static) -> Any:
    n = len(static[0])
    lead = x.shape[:2] if x.ndim == n + 2 else (1, x.shape[0])
    return _fractional(x, jax.random.uniform(key, (*lead, n)), static)


@functools.partial(compiled, static_argnums=2)
def _with_key(x: jax.Array, key: jax.Array, static: Static) -> Any:
    return _drawn(x, key, static)


@functools.partial(compiled, static_argnums=2)
def _and_advance(x: jax.Array, state: State, static: Static) -> tuple[Any, Any]:
    key, state = advance(state)
    return _drawn(x, key, static), state


def _fractional_pool(
    input: ArrayLike,
    n: int,
    kernel_size: int | Sequence[int],
    output_size: int | Sequence[int] | None,
    output_ratio: Any,
    with_indices: bool,
    samples: ArrayLike | None,
    rng: jax.Array | None,
    function: str,
) -> Any:
    if output_size is None and output_ratio is None:
        raise ValueError(
            explain(
                f"{function} was given neither output_size nor output_ratio",
                "the number of windows follows from one of them",
                "output_ratio=0.5",
            )
        )
    x = spatial(input, n, function)
    require_kind(x, function, integers=False)
    sizes = x.shape[x.ndim - n :]
    kernel = numbers(kernel_size, n, "kernel_size", function)
    if output_size is None:
        ratios = tuple(output_ratio) if isinstance(output_ratio, (tuple, list)) else (output_ratio,)
        ratios = ratios * n if len(ratios) == 1 else ratios
        if len(ratios) != n:
            raise shape_error(
                f"{function} was given output_ratio={output_ratio!r}",
                f"one number, or one for each of {n} spatial dimensions, is needed",
                f"output_ratio={(0.5,) * n}",
            )
        outs = tuple(int(size * ratio) for size, ratio in zip(sizes, ratios, strict=True))
    else:
        outs = numbers(output_size, n, "output_size", function)
    for size, k, out in zip(sizes, kernel, outs, strict=True):
        if k < 1 or out < 0 or out + k - 1 > size:
            raise shape_error(
                f"{function} was asked for {outs} windows of size {kernel} in an input of spatial "
                f"sizes {sizes}",
                "the pool is too large relative to the input: windows start at different places, so "
                "there are at most size - kernel_size + 1, of at least one element",
                "a smaller kernel_size, or a smaller output_size",
            )
    static = (kernel, outs, bool(with_indices))
    if samples is not None:
        return _with_samples(x, _checked_samples(samples, x, n, function), static)
    if rng is not None:
        return _with_key(x, unwrap(rng), static)
    return drawing_generator().drawn(lambda state: _and_advance(x, state, static))


def _checked_samples(samples: Any, x: jax.Array, n: int, function: str) -> Any:
    samples = array(samples, "_random_samples", function)
    batch, channels = (1, x.shape[0]) if x.ndim == n + 1 else x.shape[:2]
    if samples.dtype != x.dtype:
        raise DtypeError(
            explain(
                f"{function} was given input of dtype {x.dtype} and _random_samples of dtype "
                f"{samples.dtype}",
                "both must have the same dtype",
                "_random_samples.astype(input.dtype)",
            )
        )
    if samples.ndim != 3 or samples.shape[0] < batch or samples.shape[1:] != (channels, n):
        raise shape_error(
            f"{function} was given _random_samples of shape {samples.shape}",
            f"one number is needed for each example, channel and axis: {(batch, channels, n)}",
            f"jax.random.uniform(key, {(batch, channels, n)}, input.dtype)",
        )
    return samples[:batch] if samples.shape[0] > batch else samples


def fractional_max_pool2d(
    input: ArrayLike,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: ArrayLike | None = None,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Take the largest element of each of randomly placed, overlapping windows.

    The distances between windows are 1 and 2, or other neighbouring numbers, in a random order, so
    that the output is smaller than the input by any factor.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating.
        kernel_size: the size of the windows.
        output_size: how many windows there are along each axis.
        output_ratio: how many there are in parts of the input's size, if `output_size` is None.
        return_indices: also return where each maximum was, as positions in the flattened
            ``H x W``.
        _random_samples: ``(N, C, 2)``, the numbers in [0, 1) that are otherwise drawn.
        rng: a random key; without one the draw comes from the generator in force.

    Returns:
        ``(N, C, H', W')``, and the indices if asked for.

    Raises:
        ValueError: if there is neither `output_size` nor `output_ratio`.
        ShapeError: if there is not enough room for so many windows.
        MissingRngError: for a draw where no generator can be advanced.

    Source: Graham 2014, Fractional Max-Pooling; ``torch.nn.functional.fractional_max_pool2d``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.ones((1, 1, 9, 9))
        >>> F.fractional_max_pool2d(x, 2, output_size=6, rng=jax.random.key(0)).shape
        (1, 1, 6, 6)
    """
    return _fractional_pool(
        input,
        2,
        kernel_size,
        output_size,
        output_ratio,
        return_indices,
        _random_samples,
        rng,
        "F.fractional_max_pool2d",
    )


def fractional_max_pool2d_with_indices(
    input: ArrayLike,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: ArrayLike | None = None,
    *,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return what `fractional_max_pool2d` returns with ``return_indices=True``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.ones((1, 4, 4))
        >>> F.fractional_max_pool2d_with_indices(x, 1, 4, rng=jax.random.key(0))[1].ravel().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    """
    return _fractional_pool(
        input,
        2,
        kernel_size,
        output_size,
        output_ratio,
        True,
        _random_samples,
        rng,
        "F.fractional_max_pool2d_with_indices",
    )


def fractional_max_pool3d(
    input: ArrayLike,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: ArrayLike | None = None,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Take the largest element of each of randomly placed, overlapping windows.

    The distances between windows are 1 and 2, or other neighbouring numbers, in a random order, so
    that the output is smaller than the input by any factor.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``, floating.
        kernel_size: the size of the windows.
        output_size: how many windows there are along each axis.
        output_ratio: how many there are in parts of the input's size, if `output_size` is None.
        return_indices: also return where each maximum was, as positions in the flattened
            ``D x H x W``.
        _random_samples: ``(N, C, 3)``, the numbers in [0, 1) that are otherwise drawn.
        rng: a random key; without one the draw comes from the generator in force.

    Returns:
        ``(N, C, D', H', W')``, and the indices if asked for.

    Raises:
        ValueError: if there is neither `output_size` nor `output_ratio`.
        ShapeError: if there is not enough room for so many windows.
        MissingRngError: for a draw where no generator can be advanced.

    Source: Graham 2014, Fractional Max-Pooling; ``torch.nn.functional.fractional_max_pool3d``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.ones((1, 1, 5, 5, 5))
        >>> F.fractional_max_pool3d(x, 2, output_size=3, rng=jax.random.key(0)).shape
        (1, 1, 3, 3, 3)
    """
    return _fractional_pool(
        input,
        3,
        kernel_size,
        output_size,
        output_ratio,
        return_indices,
        _random_samples,
        rng,
        "F.fractional_max_pool3d",
    )


def fractional_max_pool3d_with_indices(
    input: ArrayLike,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: ArrayLike | None = None,
    *,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return what `fractional_max_pool3d` returns with ``return_indices=True``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.ones((1, 2, 2, 2))
        >>> F.fractional_max_pool3d_with_indices(x, 1, 2, rng=jax.random.key(0))[1].ravel().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return _fractional_pool(
        input,
        3,
        kernel_size,
        output_size,
        output_ratio,
        True,
        _random_samples,
        rng,
        "F.fractional_max_pool3d_with_indices",
    )
