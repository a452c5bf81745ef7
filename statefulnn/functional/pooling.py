"""Maxima and averages over windows of two axes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from statefulnn.core.errors import explain
from statefulnn.functional._checks import (
    array,
    numbers,
    require_float,
    shape_error,
    widened,
)

# Above this many elements a window is gathered instead of being unrolled into one shift an element.
MOST_SHIFTS = 64


class _Windows:
    """Where the windows of a pooling lie, along two axes.

    Args:
        sizes: ``(H, W)`` of the input.
        kernel, stride, padding, dilation: two numbers each.
        ceil_mode: whether a last window may hang over the padded border.
        function: for messages.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        function: str,
    ) -> None:
        given = f"{function} was given input of height and width {tuple(sizes)}"
        for name, values in (("kernel_size", kernel), ("stride", stride), ("dilation", dilation)):
            if any(v < 1 for v in values):
                raise shape_error(
                    f"{function} was given {name}={tuple(values)}",
                    f"{name} must be greater than zero",
                    f"{name}=1",
                )
        outs = []
        for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
            extent = d * (k - 1) + 1
            if not 0 <= p <= extent // 2:
                raise shape_error(
                    f"{function} was given padding={p}, kernel_size={k}, dilation={d}",
                    "pad should be at most half of effective kernel size, and not negative: windows "
                    "of nothing but padding have no value",
                    f"padding={extent // 2} or less",
                )
            rest = size + 2 * p - extent
            out = (rest + (s - 1 if ceil_mode else 0)) // s + 1
            if ceil_mode and (out - 1) * s >= size + p:
                out -= 1  # a window must start inside the input or its left border
            if out < 1:
                raise shape_error(
                    f"{given}, kernel_size={tuple(kernel)}, padding={tuple(padding)}",
                    "the window is larger than the input: the output size is too small",
                    "a smaller kernel_size, or a larger input",
                )
            outs.append(out)
        self.sizes, self.outs = tuple(sizes), tuple(outs)
        self.kernel, self.stride = tuple(kernel), tuple(stride)
        self.padding, self.dilation = tuple(padding), tuple(dilation)

    def padded(self, x: Any, value: Any) -> Any:
        """Return the input with its border, wide enough for the last window."""
        config = [(0, 0, 0)] * (x.ndim - 2)
        for size, out, k, s, p, d in zip(
            self.sizes,
            self.outs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        ):
            config.append((p, max((out - 1) * s + d * (k - 1) + 1 - size - p, 0), 0))
        return lax.pad(x, jnp.asarray(value, x.dtype), config)

    def shifts(self) -> Iterator[tuple[int, ...]]:
        """Yield the elements of a window, row by row."""
        return itertools.product(*(range(k) for k in self.kernel))

    def shifted(self, x: Any, shift: tuple[int, ...]) -> Any:
        """Return one element of every window of a padded input, ``(*, outH, outW)``."""
        starts = [i * d for i, d in zip(shift, self.dilation, strict=True)]
        stops = [
            a + (n - 1) * s + 1 for a, n, s in zip(starts, self.outs, self.stride, strict=True)
        ]
        lead = x.ndim - 2
        return lax.slice(
            x, (0,) * lead + tuple(starts), (*x.shape[:lead], *stops), (1,) * lead + self.stride
        )

    def positions(self, axis: int) -> np.ndarray:
        """Return the coordinates of every window along an axis, ``(out, k)``, negative in the border."""
        starts = np.arange(self.outs[axis]) * self.stride[axis] - self.padding[axis]
        return starts[:, None] + np.arange(self.kernel[axis]) * self.dilation[axis]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _max_pool(x: Any, static: tuple, with_indices: bool) -> Any:
    windows = _Windows(*static)
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    rows, columns = windows.positions(0), windows.positions(1)
    height, width = windows.sizes
    padded = windows.padded(x, lowest)
    inside = [
        (rows >= 0) & (rows < height),  # (outH, kH)
        (columns >= 0) & (columns < width),
    ]
    if rows.shape[1] * columns.shape[1] > MOST_SHIFTS:
        return _max_by_gathering(padded, windows, rows, columns, inside, with_indices)
    # A running maximum over shifted views: ties go to the first element, in value and derivative,
    # and all derivatives exist to every order. NaN wins over everything.
    best: Any = None
    index: Any = None
    started = np.zeros(windows.outs, bool)
    for shift in windows.shifts():
        i, j = shift
        value = windows.shifted(padded, shift)
        valid = inside[0][:, i, None] & inside[1][None, :, j]
        here = np.where(valid, rows[:, i, None] * width + columns[None, :, j], 0)
        here = jnp.asarray(here, _index_dtype())
        if best is None:
            best, index = value, jnp.broadcast_to(here, value.shape)
        else:
            better = (value > best) | (value != value)
            first = valid & ~started
            if first.any():
                better = better | jnp.asarray(first)
            best = jnp.where(better, value, best)
            index = jnp.where(better, here, index)
        started |= valid
    return (best, index) if with_indices else best


def _max_by_gathering(
    padded: Any,
    windows: _Windows,
    rows: np.ndarray,
    columns: np.ndarray,
    inside: list[np.ndarray],
    with_indices: bool,
) -> Any:
    lead = padded.shape[:-2]
    by_row = padded[..., rows + windows.padding[0], :]  # (*, outH, kH, W)
    patches = by_row[..., columns + windows.padding[1]]  # (*, outH, kH, outW, kW)
    patches = jnp.moveaxis(patches, -3, -2)  # (*, outH, outW, kH, kW)
    flat = patches.reshape(*lead, *windows.outs, -1)
    valid = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    valid = valid.reshape(*windows.outs, -1)
    # argmax would name a border element where the whole window is -inf: -inf elements rank by whether
    # they are inside.
    best = jnp.argmax(flat, -1, keepdims=True)
    value = jnp.take_along_axis(flat, best, -1)
    first_valid = jnp.asarray(valid.argmax(-1), best.dtype)[..., None]
    lowest = -jnp.inf if jnp.issubdtype(flat.dtype, jnp.floating) else jnp.iinfo(flat.dtype).min
    best = jnp.where(value == jnp.asarray(lowest, flat.dtype), first_valid, best)
    value = jnp.take_along_axis(flat, best, -1)[..., 0]
    if not with_indices:
        return value
    where = rows[:, None, :, None] * windows.sizes[1] + columns[None, :, None, :]
    where = jnp.asarray(where.reshape(*windows.outs, -1), _index_dtype())
    index = jnp.take_along_axis(jnp.broadcast_to(where, flat.shape), best, -1)[..., 0]
    return value, index


def _index_dtype() -> Any:
    return jax.dtypes.canonicalize_dtype(np.int64)


def _image(input: Any, function: str) -> Any:
    x = array(input, "input", function)
    if x.ndim not in (3, 4) or 0 in x.shape[-3:]:
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            "the input is (N, C, H, W) or (C, H, W), and only N may be 0",
            "reshape to these axes: input[None] adds one in front",
        )
    return x


def _pair(value: Any, name: str, function: str) -> tuple[int, ...]:
    return numbers(value, 2, name, function)


def _static(
    x: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    function: str,
) -> tuple:
    kernel = _pair(kernel_size, "kernel_size", function)
    if stride is None or stride == () or stride == []:
        stride = kernel
    static = (
        x.shape[-2:],
        kernel,
        _pair(stride, "stride", function),
        _pair(padding, "padding", function),
        _pair(dilation, "dilation", function),
        bool(ceil_mode),
        function,
    )
    return static


def max_pool2d(
    input: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
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
    function = "F.max_pool2d"
    x = _image(input, function)
    static = _static(x, kernel_size, stride, padding, dilation, ceil_mode, function)
    return _max_pool(x, static, bool(return_indices))


def max_pool2d_with_indices(
    input: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Any, Any]:
    """Return what `max_pool2d` returns with ``return_indices=True``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.max_pool2d_with_indices(jnp.arange(16.0).reshape(1, 4, 4), 2)[1].tolist()
        [[[5, 7], [13, 15]]]
    """
    return max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _avg_pool(x: Any, static: tuple, count_include_pad: bool, divisor: int | None) -> Any:
    windows = _Windows(*static)
    wide = windows.padded(widened(x), 0)
    if len(list(windows.shifts())) > MOST_SHIFTS:
        lead = (1,) * (x.ndim - 2)
        zero = np.zeros((), wide.dtype)[()]
        total = lax.reduce_window(
            wide, zero, lax.add, lead + windows.kernel, lead + windows.stride, "VALID"
        )
    else:
        total = functools.reduce(
            lax.add, (windows.shifted(wide, shift) for shift in windows.shifts())
        )
    if divisor is not None:
        count = np.asarray(divisor)
    else:
        by_axis = []
        for axis, size in enumerate(windows.sizes):
            start = np.arange(windows.outs[axis]) * windows.stride[axis] - windows.padding[axis]
            end = np.minimum(start + windows.kernel[axis], size + windows.padding[axis])
            if not count_include_pad:
                start, end = np.maximum(start, 0), np.minimum(end, size)
            by_axis.append(end - start)
        count = by_axis[0][:, None] * by_axis[1]
        if (count == count.flat[0]).all():
            count = count.flat[0]
    return (total / jnp.asarray(count, total.dtype)).astype(x.dtype)


def avg_pool2d(
    input: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Take the mean of each window.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
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
    function = "F.avg_pool2d"
    x = _image(input, function)
    require_float(x, "input", function)
    if divisor_override == 0:
        raise RuntimeError(
            explain(
                f"{function} was given divisor_override=0",
                "divisor must be not zero",
                "divisor_override=None divides by the number of elements",
            )
        )
    static = _static(x, kernel_size, stride, padding, 1, ceil_mode, function)
    return _avg_pool(x, static, bool(count_include_pad), divisor_override)


@functools.partial(jax.jit, static_argnums=1)
def _adaptive_avg_pool(x: Any, outs: tuple[int, int]) -> Any:
    out = widened(x)
    for axis, count in zip((x.ndim - 2, x.ndim - 1), outs, strict=True):
        size = x.shape[axis]
        if count and size % count == 0:
            shape = (*out.shape[:axis], count, size // count, *out.shape[axis + 1 :])
            out = jnp.mean(out.reshape(shape), axis + 1)
            continue
        # Windows of unequal size: one matrix whose rows are the windows.
        steps = np.arange(count)
        starts, ends = steps * size // max(count, 1), -(-(steps + 1) * size // max(count, 1))
        places = np.arange(size)
        member = (places >= starts[:, None]) & (places < ends[:, None])  # (count, size)
        matrix = jnp.asarray(member / np.maximum(ends - starts, 1)[:, None], out.dtype)
        out = lax.dot_general(
            out, matrix, (((axis,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        out = jnp.moveaxis(out, -1, axis)
    return out.astype(x.dtype)


def adaptive_avg_pool2d(input: Any, output_size: int | None | Sequence[int | None]) -> Any:
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
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
    function = "F.adaptive_avg_pool2d"
    x = _image(input, function)
    require_float(x, "input", function)
    given: Any = output_size
    if not isinstance(output_size, (tuple, list)):
        given = (output_size, output_size)
    if len(given) != 2 or any(n is not None and n < 0 for n in given):
        raise shape_error(
            f"{function} was given output_size={output_size!r}",
            "a height and a width are needed, not negative, or None for the input's own",
            "output_size=(1, 1)",
        )
    height, width = (
        size if n is None else int(n) for n, size in zip(given, x.shape[-2:], strict=True)
    )
    return _adaptive_avg_pool(x, (height, width))
