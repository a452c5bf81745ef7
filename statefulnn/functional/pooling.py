"""Maxima over windows of one, two or three axes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional import _pool_lowering as lowering
from statefulnn.functional._checks import array, numbers, rank_advice, shape_error
from statefulnn.functional._compiled import compiled

Size = int | Sequence[int]


def spatial(input: ArrayLike, n: int, function: str) -> jax.Array:
    """Return an input of n spatial axes, ``(N, C, *)`` or ``(C, *)``, of which only N may be 0."""
    x = array(input, "input", function)
    if x.ndim not in (n + 1, n + 2) or 0 in x.shape[x.ndim - n - 1 :]:
        axes = ("L", "H, W", "D, H, W")[n - 1]
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            f"the input is (N, C, {axes}) or (C, {axes}), and only N may be 0",
            rank_advice(x, (n + 1, n + 2)),
        )
    return x


def require_kind(x: jax.Array, function: str, *, integers: bool = True) -> None:
    """Raise unless an array is real and floating, or of integers where these are allowed."""
    kinds = (jnp.floating, jnp.integer) if integers else (jnp.floating,)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        raise DtypeError(
            explain(
                f"{function} was given input of dtype {x.dtype}",
                "it is defined for real numbers" + ("" if integers else " of floating dtypes"),
                "cast it first: input.astype(jnp.float32)",
            )
        )


def windows_of(
    x: jax.Array,
    n: int,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    function: str,
) -> lowering.Windows:
    """Return the windows over the last n axes, from arguments as the user gave them."""
    kernel = numbers(kernel_size, n, "kernel_size", function)
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel
    return lowering.windows(
        x.shape[x.ndim - n :],
        kernel,
        numbers(stride, n, "stride", function),
        numbers(padding, n, "padding", function),
        numbers(dilation, n, "dilation", function),
        bool(ceil_mode),
        function,
    )


@functools.partial(compiled, static_argnums=(1, 2))
def _max_kernel(x: jax.Array, w: lowering.Windows, with_indices: bool) -> Any:
    return lowering.largest_with_index(x, w) if with_indices else lowering.largest(x, w)


def _max_pool(
    input: ArrayLike,
    n: int,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    with_indices: bool,
    function: str,
) -> Any:
    x = spatial(input, n, function)
    require_kind(x, function)
    w = windows_of(x, n, kernel_size, stride, padding, dilation, ceil_mode, function)
    return _max_kernel(x, w, bool(with_indices))


def max_pool1d(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> jax.Array:
    """Take the largest element of each window.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: -inf added on both sides, at most half the window.
        dilation: the distance between the elements of a window.
        ceil_mode: also take a last window that hangs over the border.
        return_indices: also return where each maximum was, as positions in the flattened ``L``.

    Returns:
        ``(N, C, L')``, and the indices if asked for. The first of equal maxima is taken.

    Raises:
        ShapeError: if the window does not fit.

    Source: ``torch.nn.functional.max_pool1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.max_pool1d(jnp.arange(6.0).reshape(1, 6), 2).tolist()
        [[1.0, 3.0, 5.0]]
    """
    return _max_pool(
        input,
        1,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        return_indices,
        "F.max_pool1d",
    )


def max_pool1d_with_indices(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return what `max_pool1d` returns with ``return_indices=True``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.max_pool1d_with_indices(jnp.array([[1.0, 3.0, 2.0, 0.0]]), 2)[1].tolist()
        [[1, 2]]
    """
    return _max_pool(
        input,
        1,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        True,
        "F.max_pool1d_with_indices",
    )


def max_pool2d(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> jax.Array:
    """Take the largest element of each window.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: -inf added on both sides, at most half the window.
        dilation: the distance between the elements of a window.
        ceil_mode: also take a last window that hangs over the border.
        return_indices: also return where each maximum was, as positions in the flattened ``H x W``.

    Returns:
        ``(N, C, H', W')``, and the indices if asked for. The first of equal maxima is taken.

    Raises:
        ShapeError: if the window does not fit.

    Source: ``torch.nn.functional.max_pool2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.max_pool2d(jnp.arange(16.0).reshape(1, 4, 4), 2).tolist()
        [[[5.0, 7.0], [13.0, 15.0]]]
    """
    return _max_pool(
        input,
        2,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        return_indices,
        "F.max_pool2d",
    )


def max_pool2d_with_indices(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return what `max_pool2d` returns with ``return_indices=True``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.max_pool2d_with_indices(jnp.arange(16.0).reshape(1, 4, 4), 2)[1].tolist()
        [[[5, 7], [13, 15]]]
    """
    return _max_pool(
        input,
        2,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        True,
        "F.max_pool2d_with_indices",
    )


def max_pool3d(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> jax.Array:
    """Take the largest element of each window.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.
        kernel_size: the size of the window.
        stride: the step of the window; None for its size.
        padding: -inf added on both sides, at most half the window.
        dilation: the distance between the elements of a window.
        ceil_mode: also take a last window that hangs over the border.
        return_indices: also return where each maximum was, as positions in the flattened ``D x H x W``.

    Returns:
        ``(N, C, D', H', W')``, and the indices if asked for. The first of equal maxima is taken.

    Raises:
        ShapeError: if the window does not fit.

    Source: ``torch.nn.functional.max_pool3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.max_pool3d(jnp.arange(8.0).reshape(1, 2, 2, 2), 2).tolist()
        [[[[7.0]]]]
    """
    return _max_pool(
        input,
        3,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        return_indices,
        "F.max_pool3d",
    )


def max_pool3d_with_indices(
    input: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return what `max_pool3d` returns with ``return_indices=True``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.max_pool3d_with_indices(jnp.arange(8.0).reshape(1, 2, 2, 2), 2)[1].tolist()
        [[[[7]]]]
    """
    return _max_pool(
        input,
        3,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        True,
        "F.max_pool3d_with_indices",
    )
