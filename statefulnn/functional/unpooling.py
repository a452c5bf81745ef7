"""The partial inverse of max pooling: values back to where they came from, zeros elsewhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import array, concrete_on_cpu, numbers, rank_advice, shape_error
from statefulnn.functional._compiled import compiled
from statefulnn.functional.pooling import Size, require_kind


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _placed(x: jax.Array, indices: jax.Array, size: int) -> Any:
    # (rows, L) into (rows, size); what lies outside is dropped.
    rows = jnp.arange(x.shape[0], dtype=indices.dtype)[:, None]
    return jnp.zeros((x.shape[0], size), x.dtype).at[rows, indices].set(x, mode="drop")


@_placed.defjvp
def _placed_jvp(size: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # Of values with one index the last is kept, and yet each gets the whole gradient, as in torch.
    (x, indices), (dx, _) = primals, tangents
    rows = jnp.arange(x.shape[0], dtype=indices.dtype)[:, None]
    moved = jnp.zeros((x.shape[0], size), dx.dtype).at[rows, indices].add(dx, mode="drop")
    return _placed(x, indices, size), moved


@functools.partial(compiled, static_argnums=2)
def _unpool_kernel(x: jax.Array, indices: jax.Array, sizes: tuple[int, ...]) -> Any:
    lead, size = x.shape[: x.ndim - len(sizes)], math.prod(sizes)
    rows = math.prod(lead)
    count = math.prod(x.shape[len(lead) :])
    indices = indices.reshape(rows, count)
    # A negative index counts from the end in JAX.
    indices = jnp.where(indices < 0, np.asarray(size, indices.dtype), indices)
    return _placed(x.reshape(rows, count), indices, size).reshape(*lead, *sizes)


def _sizes(
    x: jax.Array,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_size: Sequence[int] | None,
    function: str,
) -> tuple[int, ...]:
    n = len(kernel)
    usual = tuple(
        (size - 1) * s + k - 2 * p
        for size, k, s, p in zip(x.shape[x.ndim - n :], kernel, stride, padding, strict=True)
    )
    if output_size is None:
        given = usual
    else:
        if not isinstance(output_size, (tuple, list)):
            raise DtypeError(
                explain(
                    f"{function} was given output_size={output_size!r}",
                    "a tuple of sizes is needed, since one number does not say of which axis",
                    f"output_size={usual}",
                )
            )
        given = tuple(output_size)
        given = given[2:] if len(given) == n + 2 else given
        if len(given) != n:
            raise shape_error(
                f"{function} was given output_size={tuple(output_size)}",
                f"output_size is {n} spatial sizes, or the {n + 2} sizes of a whole batch",
                f"output_size={usual}",
            )
        for size, most, s in zip(given, usual, stride, strict=True):
            if not most - s < size < most + s:
                raise shape_error(
                    f"{function} was given output_size={tuple(output_size)}",
                    f"each size must be between {most - s} and {most + s}, both excluded: max "
                    "pooling of another size does not give this input",
                    f"output_size={usual}",
                )
    if any(size < 0 for size in given):
        raise shape_error(
            f"{function} was asked for an output of spatial sizes {given}",
            "sizes are not negative",
            "a smaller padding, or a larger kernel_size",
        )
    return given


def _unpool(
    input: ArrayLike,
    indices: ArrayLike,
    n: int,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    output_size: Sequence[int] | None,
    function: str,
) -> Any:
    x = array(input, "input", function)
    where = array(indices, "indices", function)
    require_kind(x, function, integers=False)
    if not jnp.issubdtype(where.dtype, jnp.signedinteger):
        raise DtypeError(
            explain(
                f"{function} was given indices of dtype {where.dtype}",
                "elements in indices should be integers: positions in the flattened output",
                "pass what max pooling returns with return_indices=True",
            )
        )
    if x.ndim not in (n + 1, n + 2) or 0 in x.shape[1:]:
        axes = ("L", "H, W", "D, H, W")[n - 1]
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            f"the input is (N, C, {axes}) or (C, {axes}), and only the first size may be 0",
            rank_advice(x, (n + 1, n + 2)),
        )
    if x.shape != where.shape:
        raise shape_error(
            f"{function} was given input of shape {x.shape} and indices of shape {where.shape}",
            "there is one index for each element of the input",
            "pass both as max pooling returns them",
        )
    kernel = numbers(kernel_size, n, "kernel_size", function)
    steps = kernel if stride is None else numbers(stride, n, "stride", function)
    if n == 3 and any(s < 1 for s in steps):
        raise shape_error(
            f"{function} was given stride={steps}",
            "strides should be greater than zero",
            f"stride={kernel}",
        )
    pads = numbers(padding, n, "padding", function)
    sizes = _sizes(x, kernel, steps, pads, output_size, function)
    known = concrete_on_cpu(where)
    if known is not None and known.size:
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= math.prod(sizes):
            raise shape_error(
                f"{function} was given indices from {low} to {high}",
                f"the output has spatial sizes {sizes}, so they go from 0 to {math.prod(sizes) - 1}",
                "output_size=..., the spatial sizes of what was pooled",
            )
    return _unpool_kernel(x, where, sizes)


def max_unpool1d(
    input: ArrayLike,
    indices: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> jax.Array:
    """Put the values of a max pooling back where they came from, among zeros.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``, floating.
        indices: of the same shape, positions in the flattened ``L'``.
        kernel_size: the size of the window that was pooled.
        stride: its step; None for its size.
        padding: the padding that was added.
        output_size: the spatial sizes, or all sizes, of what was pooled, where several sizes are
            pooled to that of the input.

    Returns:
        ``(N, C, L')``. Of several values with one index the last is kept; all have its gradient.

    Raises:
        ShapeError: if sizes do not fit, or an index lies outside. An index whose value is not known
            when the call is made, in compiled code or off the CPU, is dropped if it lies outside.

    Source: ``torch.nn.functional.max_unpool1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.array([[1.0, 4.0, 2.0, 3.0]])
        >>> out, indices = F.max_pool1d(x, 2, return_indices=True)
        >>> F.max_unpool1d(out, indices, 2).tolist()
        [[0.0, 4.0, 0.0, 3.0]]
    """
    return _unpool(input, indices, 1, kernel_size, stride, padding, output_size, "F.max_unpool1d")


def max_unpool2d(
    input: ArrayLike,
    indices: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> jax.Array:
    """Put the values of a max pooling back where they came from, among zeros.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating.
        indices: of the same shape, positions in the flattened ``H' x W'``.
        kernel_size: the size of the window that was pooled.
        stride: its step; None for its size.
        padding: the padding that was added.
        output_size: the spatial sizes, or all sizes, of what was pooled, where several sizes are
            pooled to that of the input.

    Returns:
        ``(N, C, H', W')``. Of several values with one index the last is kept; all have its gradient.

    Raises:
        ShapeError: if sizes do not fit, or an index lies outside. An index whose value is not known
            when the call is made, in compiled code or off the CPU, is dropped if it lies outside.

    Source: ``torch.nn.functional.max_unpool2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.arange(4.0).reshape(1, 2, 2)
        >>> out, indices = F.max_pool2d(x, 2, return_indices=True)
        >>> F.max_unpool2d(out, indices, 2).tolist()
        [[[0.0, 0.0], [0.0, 3.0]]]
    """
    return _unpool(input, indices, 2, kernel_size, stride, padding, output_size, "F.max_unpool2d")


def max_unpool3d(
    input: ArrayLike,
    indices: ArrayLike,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> jax.Array:
    """Put the values of a max pooling back where they came from, among zeros.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``, floating.
        indices: of the same shape, positions in the flattened ``D' x H' x W'``.
        kernel_size: the size of the window that was pooled.
        stride: its step; None for its size.
        padding: the padding that was added.
        output_size: the spatial sizes, or all sizes, of what was pooled, where several sizes are
            pooled to that of the input.

    Returns:
        ``(N, C, D', H', W')``. Of several values with one index the last is kept; all have its gradient.

    Raises:
        ShapeError: if sizes do not fit, or an index lies outside. An index whose value is not known
            when the call is made, in compiled code or off the CPU, is dropped if it lies outside.

    Source: ``torch.nn.functional.max_unpool3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.arange(8.0).reshape(1, 2, 2, 2)
        >>> out, indices = F.max_pool3d(x, 2, return_indices=True)
        >>> F.max_unpool3d(out, indices, 2).ravel().tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0]
    """
    return _unpool(input, indices, 3, kernel_size, stride, padding, output_size, "F.max_unpool3d")
