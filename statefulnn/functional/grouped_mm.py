"""Matrix products of several groups of rows at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import array, require_float, require_same_dtype, shape_error
from statefulnn.functional._compiled import compiled
from statefulnn.functional._grouped_lowering import rows_by_group


@functools.partial(compiled, static_argnums=3)
def by_group(a: jax.Array, b: jax.Array, offs: jax.Array | None, transposed: bool = False) -> Any:
    """Multiply as `grouped_mm`; `transposed` says that a `b` with groups was made by transposing."""
    _check(a, b, offs)
    if offs is None:
        return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))))
    if a.ndim == 2 and b.ndim == 2:
        # JAX has a ragged product of this kind too, without a derivative: here each group takes its
        # part of the inner axis, and zeros for the rest.
        sizes = jnp.diff(offs, prepend=jnp.zeros(1, offs.dtype))
        at = jnp.arange(a.shape[1], dtype=offs.dtype)
        inside = (at >= (offs - sizes)[:, None]) & (at < offs[:, None])  # (G, K)
        parts = jnp.where(inside[:, None], a, 0)  # (G, M, K)
        return lax.dot_general(parts, b, (((2,), (0,)), ((), ())))
    if a.ndim == 2:
        return rows_by_group(a, b, offs, transposed)
    return rows_by_group(b.T, a.swapaxes(1, 2), offs, transposed=True).T


def _check(a: jax.Array, b: jax.Array, offs: jax.Array | None) -> None:
    given = f"F.grouped_mm was given mat_a of shape {a.shape} and mat_b of shape {b.shape}"
    for name, x in (("mat_a", a), ("mat_b", b)):
        if x.ndim not in (2, 3):
            raise shape_error(
                given, f"{name} has to have two or three axes", "(M, K), or (groups, M, K)"
            )
    if a.shape[-1] != b.shape[-2]:
        raise shape_error(
            given,
            f"the contracted axes must match, and have sizes {a.shape[-1]} and {b.shape[-2]}",
            "mat_b of shape (groups, K, N): mat_b.swapaxes(-1, -2) for weights (groups, N, K)",
        )
    require_same_dtype("F.grouped_mm", mat_a=a, mat_b=b)
    require_float(a, "mat_a", "F.grouped_mm")
    both = a.ndim == b.ndim == 3
    if (offs is None) != both:
        raise shape_error(
            f"{given}, and offs={'None' if offs is None else 'an array'}",
            "offs cuts a matrix without an axis of groups, and there is nothing to cut if both have one",
            "offs=jnp.array([...], jnp.int32), the end of each group",
        )
    if both and a.shape[0] != b.shape[0]:
        raise shape_error(given, "the numbers of groups must match", "the same first axis")
    if offs is None:
        return
    if offs.ndim != 1 or offs.dtype != np.int32:
        raise DtypeError(
            explain(
                f"{given}, and offs of shape {offs.shape} and dtype {offs.dtype}",
                "offs has to be one row of int32",
                "offs=jnp.array([...], jnp.int32), the end of each group",
            )
        )
    groups = a.shape[0] if a.ndim == 3 else b.shape[0] if b.ndim == 3 else offs.shape[0]
    if offs.shape[0] != groups:
        raise shape_error(
            f"{given}, and offs of shape {offs.shape}",
            f"one end for each of {groups} groups is needed",
            f"offs of shape {(groups,)}",
        )


def grouped_mm(
    mat_a: ArrayLike,
    mat_b: ArrayLike,
    *,
    offs: ArrayLike | None = None,
    bias: None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiply matrices group by group, the groups of different sizes lying one after another.

    Args:
        mat_a: ``(M, K)``, rows (or, if both have two axes, the inner axis) cut by `offs`; or
            ``(G, M, K)``.
        mat_b: ``(K, N)``, columns (or the inner axis) cut by `offs`; or ``(G, K, N)``.
        offs: ``(G,)``, int32, increasing: where each group ends. None if both have three axes.
        bias: for compatibility with torch, which does not support it either.
        out_dtype: that of the matrices, or None.

    Returns:
        ``(M, N)`` where one matrix is cut along M or N, ``(G, M, N)`` otherwise. Rows and columns past
        the last end are zeros.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes do not, or a bias is given.

    Source: ``torch.nn.functional.grouped_mm``; for mixtures of experts.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> experts = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> F.grouped_mm(jnp.ones((3, 2)), experts, offs=jnp.array([1, 3], jnp.int32)).tolist()
        [[1.0, 1.0], [10.0, 10.0], [10.0, 10.0]]
    """
    a, b = array(mat_a, "mat_a", "F.grouped_mm"), array(mat_b, "mat_b", "F.grouped_mm")
    if bias is not None:
        raise DtypeError(
            explain(
                "F.grouped_mm was given a bias",
                "a bias is not supported yet, as in torch",
                "out + bias, outside",
            )
        )
    if out_dtype is not None and np.dtype(out_dtype) != a.dtype:
        raise DtypeError(
            explain(
                f"F.grouped_mm was given mat_a of dtype {a.dtype} and out_dtype={out_dtype}",
                "the output's dtype must be that of mat_a",
                "F.grouped_mm(...).astype(out_dtype)",
            )
        )
    return by_group(a, b, None if offs is None else array(offs, "offs", "F.grouped_mm"))
