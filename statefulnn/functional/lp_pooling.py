"""Norms over windows of one, two or three axes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.functional import _pool_lowering as lowering
from statefulnn.functional._checks import widened
from statefulnn.functional._compiled import compiled
from statefulnn.functional._losses import absolute, signum
from statefulnn.functional.avg_pooling import average
from statefulnn.functional.pooling import Size, require_kind, spatial, windows_of
from statefulnn.functional.rectifier import relu


@functools.partial(compiled, static_argnums=(1, 2))
def _lp_kernel(x: jax.Array, norm_type: float, w: lowering.Windows) -> Any:
    if norm_type == np.inf:
        return lowering.largest(absolute(x), w)
    if norm_type == -np.inf:
        return -lowering.largest(-absolute(x), w)
    wide = widened(x)
    # As torch does: a window that hangs over the edge counts as a whole one of the same average.
    mean = average(_power(wide, norm_type), w, True, None)
    total = mean * np.asarray(len(w.taps), wide.dtype)
    # The slope of the power at 0 is infinite: times this one, which is 0 there, it is NaN as in torch.
    total = signum(total) * relu(absolute(total))
    return _power(total, 1 / norm_type).astype(x.dtype)


def _power(x: jax.Array, exponent: float) -> Any:
    if exponent == 0.5:
        return lax.sqrt(x)
    if exponent in (1, 2, 3, 4):
        return lax.integer_pow(x, int(exponent))
    return jnp.power(x, np.asarray(exponent, x.dtype)[()])


def _lp_pool(
    input: ArrayLike,
    norm_type: float,
    n: int,
    kernel_size: Size,
    stride: Size | None,
    ceil_mode: bool,
    function: str,
) -> Any:
    x = spatial(input, n, function)
    require_kind(x, function)
    norm_type = float(norm_type)
    if norm_type == 0:
        raise ZeroDivisionError(
            explain(
                f"{function} was given norm_type=0",
                "the root of order 0 does not exist",
                "norm_type=2.0, or float('inf') for the largest absolute value",
            )
        )
    if not np.isinf(norm_type) and jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.result_type(float))
    w = windows_of(x, n, kernel_size, stride, 0, 1, ceil_mode, function)
    return _lp_kernel(x, norm_type, w)


def lp_pool1d(
    input: ArrayLike,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> jax.Array:
    """Take the sum of the p-th powers of each window, and of that the p-th root.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``. The powers are of the numbers themselves, not of
            their absolute values: an odd `norm_type` is for inputs that are not negative.
        norm_type: p; infinity takes the largest absolute value.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        ceil_mode: also take a last window that hangs over the edge; it counts as a whole window of
            the same mean.

    Returns:
        ``(N, C, L')``. The gradient of a window of zeros is NaN for p > 1, as in torch.

    Raises:
        ShapeError: if the window does not fit.
        ZeroDivisionError: if p is 0.

    Source: ``torch.nn.functional.lp_pool1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.lp_pool1d(jnp.array([[3.0, 4.0]]), 2.0, 2).tolist()
        [[5.0]]
    """
    return _lp_pool(input, norm_type, 1, kernel_size, stride, ceil_mode, "F.lp_pool1d")


def lp_pool2d(
    input: ArrayLike,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> jax.Array:
    """Take the sum of the p-th powers of each window, and of that the p-th root.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``. The powers are of the numbers themselves, not of
            their absolute values: an odd `norm_type` is for inputs that are not negative.
        norm_type: p; infinity takes the largest absolute value.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        ceil_mode: also take a last window that hangs over the edge; it counts as a whole window of
            the same mean.

    Returns:
        ``(N, C, H', W')``. The gradient of a window of zeros is NaN for p > 1, as in torch.

    Raises:
        ShapeError: if the window does not fit.
        ZeroDivisionError: if p is 0.

    Source: ``torch.nn.functional.lp_pool2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.lp_pool2d(jnp.array([[[2.0, 4.0], [5.0, 6.0]]]), 2.0, 2).tolist()
        [[[9.0]]]
    """
    return _lp_pool(input, norm_type, 2, kernel_size, stride, ceil_mode, "F.lp_pool2d")


def lp_pool3d(
    input: ArrayLike,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> jax.Array:
    """Take the sum of the p-th powers of each window, and of that the p-th root.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``. The powers are of the numbers themselves, not of
            their absolute values: an odd `norm_type` is for inputs that are not negative.
        norm_type: p; infinity takes the largest absolute value.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        ceil_mode: also take a last window that hangs over the edge; it counts as a whole window of
            the same mean.

    Returns:
        ``(N, C, D', H', W')``. The gradient of a window of zeros is NaN for p > 1, as in torch.

    Raises:
        ShapeError: if the window does not fit.
        ZeroDivisionError: if p is 0.

    Source: ``torch.nn.functional.lp_pool3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.lp_pool3d(jnp.ones((1, 2, 2, 2)), 1.0, 2).tolist()
        [[[[8.0]]]]
    """
    return _lp_pool(input, norm_type, 3, kernel_size, stride, ceil_mode, "F.lp_pool3d")
