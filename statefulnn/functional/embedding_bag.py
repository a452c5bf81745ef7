"""Sums, means and maxima of rows of a table, looked up in bags."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import (
    array,
    concrete_on_cpu,
    require_same_dtype,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional.embedding import renormalise, rows_of


def _first_maxima(
    table: jax.Array, index: jax.Array, counted: jax.Array, bag: jax.Array, bags: int
) -> Any:
    # For each bag and column the place of the first of its largest entries, or -1 for an empty bag.
    rows = lax.stop_gradient(rows_of(index, table, False))  # (n, D)
    place = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    nowhere = jnp.iinfo(jnp.int32).max
    # What is not in the table is the largest: it shows. NaN is the largest where a bag begins with it, and
    # else the smallest, because torch asks whether a number is larger than those before. So is padding.
    start = jax.ops.segment_min(jnp.where(counted, place[:, 0], nowhere), bag, bags)
    begins = place == jnp.take(start, bag, mode="clip")[:, None]
    missing = ((index < 0) | (index >= table.shape[0]))[:, None]
    rows = jnp.where(jnp.isnan(rows), jnp.where(begins | missing, jnp.inf, -jnp.inf), rows)
    rows = jnp.where(counted[:, None], rows, -jnp.inf)
    most = jax.ops.segment_max(rows, bag, bags)  # (B, D)
    at_most = (rows == jnp.take(most, bag, axis=0, mode="clip")) & counted[:, None]
    first = jax.ops.segment_min(jnp.where(at_most, place, nowhere), bag, bags)
    return jnp.where(first < index.shape[0], first, -1)


def _counted_rows(
    index: jax.Array,
    table: jax.Array,
    factors: jax.Array | None,
    counted: jax.Array,
    by_frequency: bool,
) -> Any:
    """Return rows times their factors, and 0 for padding, whatever its row and factor are."""
    rows = jnp.where(counted[..., None], widened(rows_of(index, table, by_frequency)), 0)
    if factors is None:
        return rows
    return rows * jnp.where(counted, factors, 0).astype(rows.dtype)[..., None]


@functools.partial(compiled, static_argnums=(4, 5, 6, 7))
def _embedding_bag(
    input: jax.Array,
    table: jax.Array,
    offsets: jax.Array | None,
    factors: jax.Array | None,
    mode: str,
    by_frequency: bool,
    padding_idx: int | None,
    include_last_offset: bool,
) -> Any:
    counted = jnp.ones(input.shape, bool) if padding_idx is None else input != padding_idx
    dtype = table.dtype
    if offsets is None and mode != "max":
        # Bags of one size: a sum over an axis, with no segments. (B, L) -> (B, D)
        rows = _counted_rows(input, table, factors, counted, by_frequency)
        total = jnp.sum(rows, 1)
        number = jnp.sum(counted.astype(total.dtype), 1)
    else:
        if offsets is None:
            bags, size = input.shape
            bag = jnp.repeat(jnp.arange(bags, dtype=jnp.int32), size)
            input, counted = input.reshape(-1), counted.reshape(-1)
        else:
            bags = offsets.shape[0] - include_last_offset
            # Each offset opens a bag at its place; several at one place open empty ones.
            opened = jnp.zeros(input.shape[0] + 1, jnp.int32).at[offsets].add(1)
            bag = jnp.cumsum(opened, dtype=jnp.int32)[:-1] - 1
        if mode == "max":
            if not input.shape[0]:
                return jnp.zeros((bags, table.shape[1]), dtype)
            first = _first_maxima(table, input, counted, bag, bags)
            chosen = jnp.take(input, first, mode="clip")  # (B, D)
            chosen = jnp.where(chosen < 0, table.shape[0], chosen)
            columns = jnp.arange(table.shape[1], dtype=chosen.dtype)
            out = table.at[chosen, columns].get(mode="fill", fill_value=jnp.nan)
            return jnp.where(first < 0, jnp.zeros((), dtype), out)
        rows = _counted_rows(input, table, factors, counted, by_frequency)
        total = jax.ops.segment_sum(rows, bag, bags, indices_are_sorted=True)
        number = jax.ops.segment_sum(counted.astype(rows.dtype), bag, bags, indices_are_sorted=True)
    if mode == "mean":
        total = total / jnp.maximum(number, 1)[:, None]
    return total.astype(dtype)


def embedding_bag(
    input: ArrayLike,
    weight: ArrayLike,
    offsets: ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> jax.Array:
    """Look up rows of a table in bags, and reduce each bag to one row.

    Args:
        input: integers, ``(B, L)`` for bags of one size, or ``(n,)`` with `offsets`.
        weight: ``(num_embeddings, embedding_dim)``.
        offsets: ``(B,)``: where each bag starts, from 0 on and not decreasing; values may be traced.
        max_norm: rows that are used and whose norm is larger are scaled down to it, in the table
            itself: `weight` must then be a Parameter or Buffer.
        norm_type: the p of that p-norm.
        scale_grad_by_freq: divide each row's gradient by how often the row occurs in `input`.
        mode: "sum", "mean" or "max".
        sparse: accepted for compatibility with torch; gradients are dense.
        per_sample_weights: a factor for each row, of the input's shape; for "sum".
        include_last_offset: whether `offsets` says where the last bag ends, too, ``(B + 1,)``.
        padding_idx: a row that bags leave out; negative numbers count from the end.

    Returns:
        ``(B, embedding_dim)``; an empty bag gives 0. Inside compiled code, and on devices where
        looking would stall, an index outside the table gives NaN.

    Raises:
        ValueError: for shapes and options that do not fit.
        RuntimeError: for an index outside the table or offsets out of order, where the values are at
            hand.
        NotImplementedError: for `per_sample_weights` in another mode.

    Source: ``torch.nn.functional.embedding_bag``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> index, offsets = jnp.array([0, 1, 1]), jnp.array([0, 2])
        >>> F.embedding_bag(index, jnp.eye(2), offsets).tolist()
        [[0.5, 0.5], [0.0, 1.0]]
    """
    function = "F.embedding_bag"
    x = array(input, "input", function)
    w = array(weight, "weight", function)
    if jnp.issubdtype(w.dtype, jnp.integer) and jnp.issubdtype(x.dtype, jnp.floating):
        warnings.warn(
            f"{function} was given the table first, an order of arguments that is deprecated: write "
            "F.embedding_bag(input, weight, ...)",
            UserWarning,
            stacklevel=2,
        )
        x, w, weight = w, x, input
    factors = None
    if per_sample_weights is not None:
        factors = array(per_sample_weights, "per_sample_weights", function)
    starts = None if offsets is None else array(offsets, "offsets", function)
    _check_shapes(x, w, starts, factors, include_last_offset, function)
    _check_mode(mode, factors, scale_grad_by_freq, sparse, function)
    rows = w.shape[0]
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise RuntimeError(
                explain(
                    f"{function} was given padding_idx={padding_idx}",
                    f"the table has {rows} rows",
                    f"a padding_idx from {-rows} to {rows - 1}",
                )
            )
        padding_idx %= rows
    _check_values(x, starts, rows, function)
    if max_norm is not None:
        w = renormalise(x, w, weight, max_norm, norm_type, function)
    last = bool(include_last_offset and starts is not None)
    return _embedding_bag(x, w, starts, factors, mode, bool(scale_grad_by_freq), padding_idx, last)


def _check_shapes(
    x: jax.Array,
    w: jax.Array,
    offsets: jax.Array | None,
    factors: jax.Array | None,
    include_last_offset: bool,
    function: str,
) -> None:
    if factors is not None and factors.shape != x.shape:
        raise shape_error(
            f"{function} was given input of shape {x.shape} and per_sample_weights of shape "
            f"{factors.shape}",
            "each index has one factor",
            f"per_sample_weights of shape {x.shape}",
        )
    if w.ndim != 2:
        raise shape_error(
            f"{function} was given weight of shape {w.shape}",
            "the table has two axes",
            "a weight of shape (num_embeddings, embedding_dim)",
        )
    given = f"{function} was given input of shape {x.shape}"
    if x.ndim not in (1, 2):
        raise shape_error(
            given, "bags are the rows of two axes, or parts of one", "input.reshape(-1, size)"
        )
    if x.ndim == 2 and offsets is not None:
        raise shape_error(
            f"{given} and offsets",
            "if input is 2D, then offsets has to be None: its rows are the bags",
            "leave offsets out, or input.reshape(-1)",
        )
    if x.ndim == 2 and not x.shape[1]:
        raise shape_error(given, "bags of one size must not be empty", "input of one axis, offsets")
    if x.ndim == 1 and (offsets is None or offsets.ndim != 1):
        raise shape_error(
            f"{given} and offsets " + ("None" if offsets is None else f"of shape {offsets.shape}"),
            "offsets has to be a 1D array: they say where in the input each bag starts",
            "offsets=jnp.array([0]) for one bag, or an input of shape (B, L)",
        )
    if offsets is not None and include_last_offset and not offsets.shape[0]:
        raise shape_error(
            f"{function} was given no offsets, and include_last_offset=True",
            "the last offset is where the last bag ends, so there is at least one",
            "offsets=jnp.array([0, len(input)])",
        )
    for name, numbers in (("input", x), ("offsets", offsets)):
        if numbers is not None and not jnp.issubdtype(numbers.dtype, jnp.integer):
            raise DtypeError(
                explain(
                    f"{function} was given {name} of dtype {numbers.dtype}",
                    "it holds places, which are integers",
                    f"cast it first: {name}.astype(jnp.int32)",
                )
            )
    require_same_dtype(function, weight=w, per_sample_weights=factors)


def _check_mode(
    mode: str, factors: jax.Array | None, by_frequency: bool, sparse: bool, function: str
) -> None:
    given = f"{function} was given mode={mode!r}"
    if mode not in ("sum", "mean", "max"):
        raise ValueError(explain(given, "mode has to be one of sum, mean or max", 'mode="mean"'))
    if mode == "max" and (by_frequency or sparse):
        option = "scale_grad_by_freq" if by_frequency else "sparse"
        raise ValueError(
            explain(f"{given} and {option}=True", f"max does not support {option}", 'mode="sum"')
        )
    if factors is not None and mode != "sum":
        raise NotImplementedError(
            explain(
                f"{given} and per_sample_weights",
                "per_sample_weights is only supported for sums",
                'mode="sum"',
            )
        )


def _check_values(x: jax.Array, offsets: jax.Array | None, rows: int, function: str) -> None:
    values = concrete_on_cpu(x)
    if values is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= rows:
            raise RuntimeError(
                explain(
                    f"{function} was given index {low if low < 0 else high}",
                    f"the table has {rows} rows, numbered from 0",
                    "a larger nn.EmbeddingBag(num_embeddings=...), or indices below its size",
                )
            )
    starts = None if offsets is None else concrete_on_cpu(offsets)
    if starts is None or not starts.size:
        return
    size = x.shape[0]
    why = None
    if starts[0] != 0:
        why = "offsets[0] has to be 0: the first bag starts with the input"
    elif (np.diff(starts) < 0).any():
        why = "bags follow one another: offsets must not decrease"
    elif starts[-1] > size:
        why = f"the input has {size} elements, and no bag can start after them"
    if why:
        raise RuntimeError(
            explain(
                f"{function} was given offsets {starts.tolist()}",
                why,
                "offsets = [0, *cumulative sizes of the bags]",
            )
        )
