"""Sliding blocks of images, and their sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from statefulnn.functional._checks import array, numbers, shape_error
from statefulnn.functional._compiled import compiled
from statefulnn.functional.conv import static


def _pair(value: int | Sequence[int], name: str, function: str) -> tuple[int, ...]:
    if isinstance(value, tuple) and len(value) == 1:
        raise shape_error(
            f"{function} was given {name}={value}",
            "one number, or two, are needed",
            f"{name}={value[0]}",
        )
    return numbers(value, 2, name, function)


def _geometry(
    kernel: int | Sequence[int],
    dilation: int | Sequence[int],
    padding: int | Sequence[int],
    stride: int | Sequence[int],
    function: str,
) -> list[tuple[int, ...]]:
    """Return the four arguments as pairs, checked."""
    names = ("kernel_size", "dilation", "padding", "stride")
    values = [
        _pair(value, name, function)
        for name, value in zip(names, (kernel, dilation, padding, stride), strict=True)
    ]
    for name, value in zip(names, values, strict=True):
        least = 0 if name == "padding" else 1
        if min(value) < least:
            raise shape_error(
                f"{function} was given {name}={value}",
                f"{name} should be at least {least}",
                f"{name}={least}",
            )
    return values


def _places(
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> list[int]:
    """Return how many places a block has along each axis."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, d, p, s in zip(size, kernel, dilation, padding, stride, strict=True)
    ]


@functools.partial(compiled, static_argnums=(1, 2, 3, 4))
def _unfold(
    x: jax.Array,
    kernel: int | Sequence[int],
    dilation: int | Sequence[int],
    padding: int | Sequence[int],
    stride: int | Sequence[int],
) -> Any:
    # Checked here, where the code runs once for each combination of shapes: an eager call like an
    # earlier one pays nothing for it.
    kernel, dilation, padding, stride = _geometry(kernel, dilation, padding, stride, "F.unfold")
    given = f"F.unfold was given input of shape {x.shape}"
    if x.ndim not in (3, 4):
        raise shape_error(given, "the input is (N, C, H, W) or (C, H, W)", "an image: input[None]")
    if 0 in x.shape[-3:]:
        raise shape_error(
            given, "only the batch axis may be empty", "a channel and a pixel at least"
        )
    counts = _places(x.shape[-2:], kernel, dilation, padding, stride)
    if any(count < 1 for count in counts):
        raise shape_error(
            f"{given}, kernel_size={kernel}, dilation={dilation}, padding={padding}",
            "the kernel reaches beyond the padded input",
            "a smaller kernel, more padding, or a larger input",
        )
    edges = [(0, 0, 0)] * (x.ndim - 2) + [(p, p, 0) for p in padding]
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    channel = x.ndim - 3
    # One axis after the other: kH + kW slices, where one for each point of the kernel were kH · kW.
    for i in (1, 0):
        axis = x.ndim - 2 + i
        stop = stride[i] * (counts[i] - 1) + 1
        starts = [tap * dilation[i] for tap in range(kernel[i])]
        slices = [lax.slice_in_dim(x, a, a + stop, stride[i], axis) for a in starts]
        x = jnp.stack(slices, channel + 1)
    # (..., C, kH, kW, H', W')
    return x.reshape(
        *x.shape[:channel], math.prod(x.shape[channel : channel + 3]), math.prod(counts)
    )


def unfold(
    input: ArrayLike,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> jax.Array:
    """Lay the sliding blocks of an image side by side, each as a column.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        kernel_size: the size of a block, one number or two.
        dilation: the distance between the points of a block, one number or two.
        padding: zeros added on both sides, one number or two.
        stride: the step from block to block, one number or two.

    Returns:
        ``(N, C · kH · kW, L)``; L counts the blocks, row by row.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.unfold`` (im2col).

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.unfold(jnp.arange(6.0).reshape(1, 1, 2, 3), 2).tolist()
        [[[0.0, 1.0], [1.0, 2.0], [3.0, 4.0], [4.0, 5.0]]]
    """
    x = array(input, "input", "F.unfold")
    return _unfold(x, static(kernel_size), static(dilation), static(padding), static(stride))


@functools.partial(compiled, static_argnums=(1, 2, 3, 4, 5))
def _fold(
    x: jax.Array,
    size: int | Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int],
    padding: int | Sequence[int],
    stride: int | Sequence[int],
) -> Any:
    size = _pair(size, "output_size", "F.fold")
    kernel, dilation, padding, stride = _geometry(kernel, dilation, padding, stride, "F.fold")
    given = f"F.fold was given input of shape {x.shape}"
    if x.ndim not in (2, 3):
        raise shape_error(
            given, "the input is (N, C · kH · kW, L)", "columns, as F.unfold gives them"
        )
    if 0 in x.shape[-2:]:
        raise shape_error(given, "only the batch axis may be empty", "one block at least")
    if x.shape[-2] % math.prod(kernel):
        raise shape_error(
            f"{given} and kernel_size={kernel}",
            f"the columns are a block of {math.prod(kernel)} for each channel",
            f"a number of rows that {math.prod(kernel)} divides",
        )
    counts = _places(size, kernel, dilation, padding, stride)
    if any(count < 1 for count in counts) or math.prod(counts) != x.shape[-1]:
        raise shape_error(
            f"{given}, output_size={size}, kernel_size={kernel}, dilation={dilation}, "
            f"padding={padding}, stride={stride}",
            f"an output of this size has {counts[0]} · {counts[1]} blocks and the input has "
            f"{x.shape[-1]} columns",
            "the output_size, stride, padding and dilation with which the blocks were made",
        )
    lead = x.shape[:-2]
    x = x.reshape(
        *lead, x.shape[-2] // math.prod(kernel), *kernel, *counts
    )  # (..., C, kH, kW, H', W')
    at = len(lead) + 1
    for i in (0, 1):  # as in _unfold, backwards: one axis after the other
        x = _overlapped(x, at, i - 2, size[i], dilation[i], padding[i], stride[i])
    return x


def _overlapped(
    x: jax.Array, at: int, axis: int, size: int, dilation: int, padding: int, stride: int
) -> Any:
    """Add up what the axis `at` lays side by side; `axis` is that of the positions."""
    zero = jnp.zeros((), x.dtype)
    total = None
    for tap in range(x.shape[at]):
        term = lax.index_in_dim(x, tap, at, keepdims=False)
        start = tap * dilation - padding
        edges = [(0, 0, 0)] * term.ndim
        edges[axis] = (start, size - start - stride * (term.shape[axis] - 1) - 1, stride - 1)
        term = lax.pad(term, zero, edges)
        total = term if total is None else total + term
    return total


def fold(
    input: ArrayLike,
    output_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> jax.Array:
    """Put sliding blocks back into an image, and add where they overlap.

    Args:
        input: ``(N, C · kH · kW, L)`` or ``(C · kH · kW, L)``, as `unfold` returns it.
        output_size: H and W, or one number for both.
        kernel_size: the size of a block, one number or two.
        dilation: the distance between the points of a block, one number or two.
        padding: how far the blocks reach beyond the image on both sides, one number or two.
        stride: the step from block to block, one number or two.

    Returns:
        ``(N, C, H, W)`` or ``(C, H, W)``.

    Raises:
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.fold`` (col2im).

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> columns = F.unfold(jnp.ones((1, 1, 3, 3)), 2)
        >>> F.fold(columns, 3, 2).tolist()  # in how many blocks each pixel is
        [[[[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]]]
    """
    x = array(input, "input", "F.fold")
    sizes = (output_size, kernel_size, dilation, padding, stride)
    return _fold(x, *map(static, sizes))
