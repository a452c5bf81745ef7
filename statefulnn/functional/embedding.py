"""Looking up rows of a table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.box import Box
from statefulnn.core.errors import DtypeError, StateWriteError, explain
from statefulnn.functional._checks import array, concrete_on_cpu, require_rank
from statefulnn.functional._compiled import compiled


def rows_of(input: jax.Array, weight: jax.Array, by_frequency: bool) -> jax.Array:
    """Return the rows of a table, NaN where there is none; their gradients by frequency or plain."""
    num_rows = weight.shape[0]
    # Rows that do not exist read as NaN rather than as the nearest row: a wrong index shows. Negative
    # numbers would count from the end, so they are moved out of the table first.
    index = jnp.where(input < 0, jnp.asarray(num_rows, input.dtype), input)
    fill = jnp.nan if jnp.issubdtype(weight.dtype, jnp.inexact) else 0
    out = jnp.take(weight, index, axis=0, mode="fill", fill_value=fill)
    if by_frequency:
        ones = jnp.ones(input.shape, weight.dtype)
        counts = jnp.zeros(num_rows, weight.dtype).at[index].add(ones, mode="drop")
        share = jnp.take(counts, index, mode="fill", fill_value=1)[..., None]
        out = _shared(out, share)
    return out


@jax.custom_jvp
def _shared(rows: jax.Array, share: jax.Array) -> Any:
    return rows


@_shared.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return primals[0], tangents[0] / primals[1]


@functools.partial(compiled, static_argnums=(2, 3))
def _embedding(
    input: jax.Array, weight: jax.Array, padding_idx: int | None, by_frequency: bool
) -> Any:
    out = rows_of(input, weight, by_frequency)
    if padding_idx is not None:
        is_padding = (input == padding_idx)[..., None]
        out = jnp.where(is_padding, lax.stop_gradient(out), out)
    return out


@functools.partial(compiled, static_argnums=(2, 3))
def _renormalised(input: jax.Array, weight: jax.Array, max_norm: float, norm_type: float) -> Any:
    table = lax.stop_gradient(weight)
    norm = jnp.linalg.norm(table, ord=norm_type, axis=1, keepdims=True)
    scale = max_norm / (norm + jnp.asarray(1e-7, norm.dtype))
    used = jnp.zeros(weight.shape[0], bool).at[input.reshape(-1)].set(True, mode="drop")
    shrink = (norm > max_norm) & used[:, None]
    # The derivative with respect to the table is that of the shrunk one, as if it had been so before.
    return weight + jnp.where(shrink, table * scale - table, jnp.zeros((), table.dtype))


def renormalise(
    input: jax.Array,
    table: jax.Array,
    box: object,
    max_norm: float,
    norm_type: float,
    function: str,
) -> jax.Array:
    """Shrink the used rows of a table that are too long, in its box, and return the table."""
    if not isinstance(box, Box):
        raise StateWriteError(
            explain(
                f"{function} was given max_norm and a plain array as weight",
                "rows that are too long are shrunk in the table, and arrays are immutable",
                f"pass the Parameter itself: {function}(input, module.weight, max_norm=1.0)",
            )
        )
    box.value = table = _renormalised(input, table, float(max_norm), float(norm_type))
    return table


def embedding(
    input: ArrayLike,
    weight: ArrayLike,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    """Look up rows of a table.

    Args:
        input: integers, any shape, from 0 to ``num_embeddings - 1``.
        weight: ``(num_embeddings, embedding_dim)``.
        padding_idx: a row that gets no gradient; negative numbers count from the end.
        max_norm: rows that are used and whose norm is larger are scaled down to it, in the table
            itself: `weight` must then be a Parameter or Buffer.
        norm_type: the p of that p-norm.
        scale_grad_by_freq: divide each row's gradient by how often the row occurs in `input`.
        sparse: accepted for compatibility with torch; gradients are dense.

    Returns:
        ``(*input.shape, embedding_dim)``. Inside compiled code, and on devices where looking would
        stall, an index outside the table gives a row of NaN.

    Raises:
        IndexError: for an index outside the table, where the values are at hand.
        DtypeError: if `input` does not hold integers.

    Source: ``torch.nn.functional.embedding``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.embedding(jnp.array([2, 0]), jnp.eye(3)).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    x = array(input, "input", "F.embedding")
    w = array(weight, "weight", "F.embedding")
    require_rank(w, (2,), "weight", "F.embedding", "(num_embeddings, embedding_dim)")
    rows = w.shape[0]
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"F.embedding was given input of dtype {x.dtype}",
                "it holds the numbers of rows, which are integers",
                "cast it first: input.astype(jnp.int32)",
            )
        )
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise AssertionError(
                explain(
                    f"F.embedding was given padding_idx={padding_idx}",
                    f"the table has {rows} rows",
                    f"a padding_idx from {-rows} to {rows - 1}",
                )
            )
        padding_idx %= rows
    values = concrete_on_cpu(x)
    if values is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= rows:
            raise IndexError(
                explain(
                    f"F.embedding was given index {low if low < 0 else high}",
                    f"the table has {rows} rows, numbered from 0",
                    "a larger nn.Embedding(num_embeddings=...), or indices below its size",
                )
            )
    if max_norm is not None:
        w = renormalise(x, w, weight, max_norm, norm_type, "F.embedding")
    return _embedding(x, w, padding_idx, scale_grad_by_freq)
