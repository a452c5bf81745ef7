"""Averages over windows of one, two or three axes."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.functional import _pool_lowering as lowering
from statefulnn.functional._checks import shape_error
from statefulnn.functional._compiled import compiled
from statefulnn.functional.pooling import Size, require_kind, spatial, windows_of


@functools.partial(compiled, static_argnums=(1, 2, 3))
def _avg_kernel(
    x: jax.Array, w: lowering.Windows, count_include_pad: bool, divisor: int | None
) -> Any:
    return average(x, w, count_include_pad, divisor).astype(x.dtype)


def average(
    x: jax.Array, w: lowering.Windows, count_include_pad: bool, divisor: int | None
) -> jax.Array:
    """Return the mean of each window, of float16 and bfloat16 inputs in float32."""
    total = lowering.sums(x, w)
    count: Any = np.asarray(1 if divisor is None else divisor)
    if divisor is None:
        for i, (size, k, p) in enumerate(zip(w.sizes, w.kernel, w.padding, strict=True)):
            start = w.positions(i)[:, 0]
            end = np.minimum(start + k, size + p)
            if not count_include_pad:
                start, end = np.maximum(start, 0), np.minimum(end, size)
            count = count * w.shaped(i, end - start)
        if (count == count.flat[0]).all():
            count = count.flat[0]
    if jnp.issubdtype(total.dtype, jnp.integer):
        return lax.div(total, jnp.broadcast_to(jnp.asarray(count, total.dtype), total.shape))
    return total / jnp.asarray(count, total.dtype)


def _avg_pool(
    input: ArrayLike,
    n: int,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    function: str,
) -> Any:
    x = spatial(input, n, function)
    require_kind(x, function)
    if divisor_override is not None:
        divisor_override = operator.index(divisor_override)
        if divisor_override == 0:
            raise shape_error(
                f"{function} was given divisor_override=0",
                "divisor must be not zero",
                "divisor_override=None divides by the number of elements",
            )
    w = windows_of(x, n, kernel_size, stride, padding, 1, ceil_mode, function)
    return _avg_kernel(x, w, bool(count_include_pad), divisor_override)


def avg_pool1d(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> jax.Array:
    """Take the mean of each window.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``; a mean of integers is rounded towards zero.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: zeros added on both sides, at most half the window.
        ceil_mode: also take a last window that hangs over the border.
        count_include_pad: whether the zeros of the padding count as elements.

    Returns:
        ``(N, C, L')``.

    Raises:
        ShapeError: if the window does not fit.

    Source: ``torch.nn.functional.avg_pool1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.avg_pool1d(jnp.arange(6.0).reshape(1, 6), 2).tolist()
        [[0.5, 2.5, 4.5]]
    """
    return _avg_pool(
        input,
        1,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        None,
        "F.avg_pool1d",
    )


def avg_pool2d(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """Take the mean of each window.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; a mean of integers is rounded towards zero.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: zeros added on both sides, at most half the window.
        ceil_mode: also take a last window that hangs over the border.
        count_include_pad: whether the zeros of the padding count as elements.
        divisor_override: divide by this instead of by the number of elements.

    Returns:
        ``(N, C, H', W')``.

    Raises:
        ShapeError: if the window does not fit.

    Source: ``torch.nn.functional.avg_pool2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.avg_pool2d(jnp.arange(16.0).reshape(1, 4, 4), 2).tolist()
        [[[2.5, 4.5], [10.5, 12.5]]]
    """
    return _avg_pool(
        input,
        2,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
        "F.avg_pool2d",
    )


def avg_pool3d(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """Take the mean of each window.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; a mean of integers is rounded towards zero.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: zeros added on both sides, at most half the window.
        ceil_mode: also take a last window that hangs over the border.
        count_include_pad: whether the zeros of the padding count as elements.
        divisor_override: divide by this instead of by the number of elements.

    Returns:
        ``(N, C, D', H', W')``.

    Raises:
        ShapeError: if the window does not fit.

    Source: ``torch.nn.functional.avg_pool3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.avg_pool3d(jnp.arange(8.0).reshape(1, 2, 2, 2), 2).tolist()
        [[[[3.5]]]]
    """
    return _avg_pool(
        input,
        3,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
        "F.avg_pool3d",
    )
