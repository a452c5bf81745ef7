"""Averages and maxima over a given number of windows, which cover the input evenly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.functional import _pool_lowering as lowering
from statefulnn.functional._checks import array, numbers, rank_advice, shape_error, widened
from statefulnn.functional._compiled import compiled
from statefulnn.functional.pooling import require_kind

Size = int | Sequence[int]
OutputSize = int | Sequence[int | None]

# Above this many windows of unequal sizes along an axis they are gathered.
MOST_SLICES = 64


def _input(input: ArrayLike, n: int, empty_channels: bool, function: str) -> Any:
    x = array(input, "input", function)
    require_kind(x, function, integers=False)
    if x.ndim not in (n + 1, n + 2) or 0 in x.shape[x.ndim - n if empty_channels else 1 :]:
        axes = ("L", "H, W", "D, H, W")[n - 1]
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            f"the input is (N, C, {axes}) or (C, {axes}), and only N "
            + ("and C may be 0" if empty_channels else "may be 0"),
            rank_advice(x, (n + 1, n + 2)),
        )
    return x


def _outs(x: jax.Array, output_size: OutputSize, n: int, function: str) -> tuple[int, ...]:
    sizes = x.shape[x.ndim - n :]
    given = output_size
    if n > 1 and isinstance(output_size, (tuple, list)):
        given = tuple(output_size)
        if len(given) != n:
            raise shape_error(
                f"{function} was given output_size={output_size!r}",
                f"output_size must be {n} numbers, or one for all {n} axes",
                f"output_size={(1,) * n}",
            )
        given = [size if n is None else n for size, n in zip(sizes, given, strict=True)]
    outs = numbers(given, n, "output_size", function)
    if any(out < 0 for out in outs):
        raise shape_error(
            f"{function} was given output_size={output_size!r}",
            "elements of output_size must be greater than or equal to 0",
            f"output_size={(1,) * n}",
        )
    return outs


def _spans(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(out)
    return steps * size // max(out, 1), -(-(steps + 1) * size // max(out, 1))


def _even(x: jax.Array, outs: tuple[int, ...]) -> bool:
    sizes = x.shape[x.ndim - len(outs) :]
    return all(out and size % out == 0 for size, out in zip(sizes, outs, strict=True))


@functools.partial(compiled, static_argnums=1)
def _avg_kernel(x: jax.Array, outs: tuple[int, ...]) -> Any:
    n, lead = len(outs), x.shape[: x.ndim - len(outs)]
    total = widened(x)
    if _even(x, outs):
        shape = list(lead)
        for size, out in zip(x.shape[x.ndim - n :], outs, strict=True):
            shape += [out, size // out]
        within = tuple(range(len(lead) + 1, len(shape), 2))
        count = math.prod(shape[i] for i in within)
        total = total.reshape(shape).sum(within)
        return (total / np.asarray(count, total.dtype)).astype(x.dtype)
    for i, out in enumerate(outs):
        total = _means(total, i - n, out)
    return total.astype(x.dtype)


# Windows of unequal sizes, along one axis: a slice for each. A matrix product would be as fast, but
# spread NaN and infinities to all windows.


def _slices(x: jax.Array, axis: int, out: int) -> list[tuple[int, Any]]:
    starts, ends = _spans(x.shape[axis], out)
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    return [(a, lax.slice_in_dim(x, a, b, axis=x.ndim + axis)) for a, b in pairs]


def _positions(size: int, out: int) -> np.ndarray:
    # (out, k), -1 where a window is smaller than the largest.
    starts, ends = _spans(size, out)
    positions = starts[:, None] + np.arange((ends - starts).max())
    return np.where(positions < ends[:, None], positions, -1)


def _means(x: jax.Array, axis: int, out: int) -> Any:
    if out == 0:
        return lax.slice_in_dim(x, 0, 0, axis=x.ndim + axis)
    if out <= MOST_SLICES:
        means = [v.sum(axis) / np.asarray(v.shape[axis], x.dtype) for _, v in _slices(x, axis, out)]
        return jnp.stack(means, x.ndim + axis)
    positions = _positions(x.shape[axis], out)
    column = (1,) * (-axis - 1)
    member = jnp.asarray((positions >= 0).reshape(*positions.shape, *column))
    taken = jnp.take(x, np.maximum(positions, 0), axis)  # (*, out, k, *)
    total = jnp.where(member, taken, np.zeros((), x.dtype)[()]).sum(axis)
    count = (positions >= 0).sum(1).reshape(-1, *column)
    return total / jnp.asarray(count, x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _maxima(x: jax.Array, axis: int, out: int) -> Any:
    return jnp.stack([v.max(axis) for _, v in _slices(x, axis, out)], x.ndim + axis)


@_maxima.defjvp
def _maxima_jvp(axis: int, out: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    place = _places(lax.stop_gradient(x), axis, out)
    zero = np.zeros((), dx.dtype)[()]
    picked = []
    for i, (start, v) in enumerate(_slices(dx, axis, out)):
        mine = lax.slice_in_dim(place, i, i + 1, axis=x.ndim + axis)
        chosen = _coordinates(v, start, axis, place.dtype) == mine
        picked.append(jnp.where(chosen, v, zero).sum(axis))
    return _maxima(x, axis, out), jnp.stack(picked, x.ndim + axis)


def _coordinates(x: jax.Array, start: int, axis: int, dtype: DTypeLike) -> Any:
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return lax.broadcasted_iota(dtype, shape, x.ndim + axis) + np.asarray(start, dtype)


def _places(x: jax.Array, axis: int, out: int) -> Any:
    if out > MOST_SLICES:
        return lowering.places(x, _positions(x.shape[axis], out), axis)
    dtype = lowering.index_dtype()
    found = []
    for start, v in _slices(x, axis, out):
        here = _coordinates(v, start, axis, dtype)
        equal = v == v.max(axis, keepdims=True)
        first = jnp.where(equal, here, np.asarray(x.shape[axis], dtype)).min(axis)
        last = jnp.where(v != v, here, np.asarray(-1, dtype)).max(axis)
        found.append(jnp.where(last >= 0, last, first))
    return jnp.stack(found, x.ndim + axis)


@functools.partial(compiled, static_argnums=(1, 2))
def _max_kernel(x: jax.Array, outs: tuple[int, ...], with_indices: bool) -> Any:
    n = len(outs)
    sizes = x.shape[x.ndim - n :]
    if _even(x, outs):
        kernel = tuple(size // out for size, out in zip(sizes, outs, strict=True))
        w = lowering.windows(sizes, kernel, kernel, (0,) * n, (1,) * n, False, "")
        return lowering.largest_with_index(x, w) if with_indices else lowering.largest(x, w)
    if 0 in outs:
        shape = (*x.shape[: x.ndim - n], *outs)
        empty = jnp.zeros(shape, x.dtype)
        return (empty, jnp.zeros(shape, lowering.index_dtype())) if with_indices else empty
    index: Any = None
    step = 1
    for i in reversed(range(n)):
        axis, out = i - n, outs[i]
        if with_indices or out > MOST_SLICES:
            place = _places(lax.stop_gradient(x), axis, out)
            further = place * np.asarray(step, place.dtype)
            index = place if index is None else jnp.take_along_axis(index, place, axis) + further
            step *= sizes[i]
        if out > MOST_SLICES:
            x = jnp.take_along_axis(x, place, axis)
        else:
            x = _maxima(x, axis, out)
    return (x, index) if with_indices else x


def _avg(input: ArrayLike, output_size: OutputSize, n: int, function: str) -> Any:
    x = _input(input, n, n < 3, function)
    return _avg_kernel(x, _outs(x, output_size, n, function))


def _max(
    input: ArrayLike, output_size: OutputSize, with_indices: bool, n: int, function: str
) -> Any:
    x = _input(input, n, False, function)
    return _max_kernel(x, _outs(x, output_size, n, function), bool(with_indices))


def adaptive_avg_pool1d(input: ArrayLike, output_size: Size) -> jax.Array:
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``, floating.
        output_size: ``L'``.

    Returns:
        ``(N, C, L')``; window i of n over a size S goes from ``i S // n`` to ``ceil((i+1) S / n)``.

    Raises:
        ShapeError: if a size does not fit.

    Source: ``torch.nn.functional.adaptive_avg_pool1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_avg_pool1d(jnp.arange(4.0).reshape(1, 4), 2).tolist()
        [[0.5, 2.5]]
    """
    return _avg(input, output_size, 1, "F.adaptive_avg_pool1d")


def adaptive_avg_pool2d(input: ArrayLike, output_size: OutputSize) -> jax.Array:
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating.
        output_size: ``H'`` and ``W'``, or one number for both; None keeps the input's size.

    Returns:
        ``(N, C, H', W')``; window i of n over a size S goes from ``i S // n`` to ``ceil((i+1) S / n)``.

    Raises:
        ShapeError: if a size does not fit.

    Source: ``torch.nn.functional.adaptive_avg_pool2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_avg_pool2d(jnp.arange(16.0).reshape(1, 4, 4), 1).tolist()
        [[[7.5]]]
    """
    return _avg(input, output_size, 2, "F.adaptive_avg_pool2d")


def adaptive_avg_pool3d(input: ArrayLike, output_size: OutputSize) -> jax.Array:
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``, floating.
        output_size: ``D'``, ``H'`` and ``W'``, or one number for all; None keeps the input's size.

    Returns:
        ``(N, C, D', H', W')``; window i of n over a size S goes from ``i S // n`` to ``ceil((i+1) S / n)``.

    Raises:
        ShapeError: if a size does not fit.

    Source: ``torch.nn.functional.adaptive_avg_pool3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_avg_pool3d(jnp.arange(8.0).reshape(1, 2, 2, 2), 1).tolist()
        [[[[3.5]]]]
    """
    return _avg(input, output_size, 3, "F.adaptive_avg_pool3d")


def adaptive_max_pool1d(
    input: ArrayLike, output_size: Size, return_indices: bool = False
) -> jax.Array:
    """Take maxima over as many windows as asked for, which cover the input evenly.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``, floating.
        output_size: ``L'``.
        return_indices: also return where each maximum was, as positions in the flattened ``L``.

    Returns:
        ``(N, C, L')``, and the indices if asked for; window i of n over a size S goes from
        ``i S // n`` to ``ceil((i+1) S / n)``. The first of equal maxima is taken.

    Raises:
        ShapeError: if a size does not fit.

    Source: ``torch.nn.functional.adaptive_max_pool1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_max_pool1d(jnp.arange(4.0).reshape(1, 4), 2).tolist()
        [[1.0, 3.0]]
    """
    return _max(input, output_size, return_indices, 1, "F.adaptive_max_pool1d")


def adaptive_max_pool1d_with_indices(
    input: ArrayLike, output_size: Size, return_indices: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return what `adaptive_max_pool1d` returns with ``return_indices=True``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_max_pool1d_with_indices(jnp.arange(4.0).reshape(1, 4), 2)[1].tolist()
        [[1, 3]]
    """
    return _max(input, output_size, True, 1, "F.adaptive_max_pool1d_with_indices")


def adaptive_max_pool2d(
    input: ArrayLike, output_size: OutputSize, return_indices: bool = False
) -> jax.Array:
    """Take maxima over as many windows as asked for, which cover the input evenly.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating.
        output_size: ``H'`` and ``W'``, or one number for both; None keeps the input's size.
        return_indices: also return where each maximum was, as positions in the flattened ``H x W``.

    Returns:
        ``(N, C, H', W')``, and the indices if asked for; window i of n over a size S goes from
        ``i S // n`` to ``ceil((i+1) S / n)``. The first of equal maxima is taken.

    Raises:
        ShapeError: if a size does not fit.

    Source: ``torch.nn.functional.adaptive_max_pool2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_max_pool2d(jnp.arange(16.0).reshape(1, 4, 4), 1).tolist()
        [[[15.0]]]
    """
    return _max(input, output_size, return_indices, 2, "F.adaptive_max_pool2d")


def adaptive_max_pool2d_with_indices(
    input: ArrayLike, output_size: OutputSize, return_indices: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return what `adaptive_max_pool2d` returns with ``return_indices=True``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_max_pool2d_with_indices(jnp.arange(16.0).reshape(1, 4, 4), 1)[1].tolist()
        [[[15]]]
    """
    return _max(input, output_size, True, 2, "F.adaptive_max_pool2d_with_indices")


def adaptive_max_pool3d(
    input: ArrayLike, output_size: OutputSize, return_indices: bool = False
) -> jax.Array:
    """Take maxima over as many windows as asked for, which cover the input evenly.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``, floating.
        output_size: ``D'``, ``H'`` and ``W'``, or one number for all; None keeps the input's size.
        return_indices: also return where each maximum was, as positions in the flattened ``D x H x W``.

    Returns:
        ``(N, C, D', H', W')``, and the indices if asked for; window i of n over a size S goes from
        ``i S // n`` to ``ceil((i+1) S / n)``. The first of equal maxima is taken.

    Raises:
        ShapeError: if a size does not fit.

    Source: ``torch.nn.functional.adaptive_max_pool3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_max_pool3d(jnp.arange(8.0).reshape(1, 2, 2, 2), 1).tolist()
        [[[[7.0]]]]
    """
    return _max(input, output_size, return_indices, 3, "F.adaptive_max_pool3d")


def adaptive_max_pool3d_with_indices(
    input: ArrayLike, output_size: OutputSize, return_indices: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return what `adaptive_max_pool3d` returns with ``return_indices=True``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.adaptive_max_pool3d_with_indices(jnp.arange(8.0).reshape(1, 2, 2, 2), 1)[1].tolist()
        [[[[7]]]]
    """
    return _max(input, output_size, True, 3, "F.adaptive_max_pool3d_with_indices")
