"""Norms of vectors, distances between them, and the cosine of their angle."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import (
    array,
    dimension,
    require_float,
    require_rank,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional._losses import signum, together


def p_norm(x: jax.Array, p: float, axes: tuple[int, ...], function: str) -> jax.Array:
    """Return the p-norm over axes, which stay with size 1; where it is 0, so is its derivative.

    Args:
        x: floating, not of low precision.
        p: the degree: 0 counts, infinities give the largest and smallest magnitude.
        axes: from 0.
        function: whose name an error gives.
    """
    if (p < 0 or p == math.inf) and any(x.shape[a] == 0 for a in axes):
        raise shape_error(
            f"{function} was given p={p} and vectors of shape {x.shape}, empty along {axes}",
            f"the {p}-norm of no numbers is not defined",
            "a positive, finite p, or vectors with elements",
        )
    return _norm(x, int(p) if float(p).is_integer() else p, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm(x: jax.Array, p: float, axes: tuple[int, ...]) -> Any:
    total = functools.partial(jnp.sum, axis=axes, keepdims=True)
    size = x if p == 2 and not jnp.iscomplexobj(x) else lax.abs(x)
    if p == 0:
        return total((x != 0).astype(size.dtype))
    if math.isinf(p):
        return (jnp.max if p > 0 else jnp.min)(size, axis=axes, keepdims=True)
    if p == 1:
        return total(size)
    power = total(size**p)
    # The choice is for speed: XLA does not fuse the root with the sum if that is used twice, which on CPU
    # is four times faster for all pairs of rows.
    apart = power != 0
    root = jnp.sqrt if p == 2 else lambda x: x ** (1 / p)
    return jnp.where(apart, root(jnp.where(apart, power, 1)), 0.0 if p > 0 else jnp.inf)


@_norm.defjvp
def _norm_jvp(p: float, axes: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    out = _norm(x, p, axes)
    if p == 0:
        return out, jnp.zeros_like(out)
    moved = jnp.conj(_slope(x, out, p, axes)) * dx
    return out, jnp.sum(lax.real(moved) if jnp.iscomplexobj(x) else moved, axes, keepdims=True)


def _slope(x: jax.Array, out: jax.Array, p: float, axes: tuple[int, ...]) -> Any:
    """Return the derivative of a norm by each number, 0 where it or the norm is 0.

    Powers are of 1 there, for the sake of second derivatives. NaN and infinities go where they go in torch.
    """
    nonzero, apart = x != 0, out != 0
    size = lax.abs(jnp.where(nonzero, x, 1))
    scale = jnp.where(apart, jnp.where(apart, out, 1) ** (1 - p), 0)
    if 2 <= p < math.inf:
        return x * size ** (p - 2) * scale
    sign = x / size if jnp.iscomplexobj(x) else signum(x)
    if math.isinf(p):
        most = ((lax.abs(x) == out) | (x != x)).astype(size.dtype)
        return sign * most / jnp.sum(most, axes, keepdims=True)
    return sign if p == 1 else sign * jnp.where(nonzero, size ** (p - 1), 0) * scale


def _degree(p: float | str, function: str) -> float:
    if p == "fro":  # torch's name of the Euclidean norm
        return 2.0
    try:
        return float(p)
    except (TypeError, ValueError):
        raise DtypeError(
            explain(
                f"{function} was given p={p!r}",
                "the degree of a norm is a number, known before the arrays are",
                f"{function}(..., p=2.0)",
            )
        ) from None


@functools.partial(compiled, static_argnums=(2, 3))
def _cosine_similarity(x1: jax.Array, x2: jax.Array, dim: int, eps: float) -> Any:
    dtype, x1, x2 = together("F.cosine_similarity", x1=x1, x2=x2)
    x1, x2 = jnp.broadcast_arrays(x1, x2)
    axis = dimension(dim, x1.ndim, "F.cosine_similarity")
    axes = (axis,) if x1.ndim else ()

    def scaled(x: jax.Array) -> Any:
        length = p_norm(x, 2, axes, "F.cosine_similarity")
        # The smallest length bounds the value and not the derivative, as in torch.
        return x / (length + lax.stop_gradient(jnp.where(length < eps, eps - length, 0)))

    return jnp.sum(scaled(x1) * scaled(x2), axes).astype(dtype)


def cosine_similarity(x1: ArrayLike, x2: ArrayLike, dim: int = 1, eps: float = 1e-8) -> jax.Array:
    """Return the cosine of the angle between vectors, ``x1 · x2 / (‖x1‖ ‖x2‖)``.

    Args:
        x1: ``(*, D, *)``, floating.
        x2: a shape that broadcasts with it.
        dim: the vectors' axis.
        eps: the smallest length that is divided by.

    Returns:
        ``(*, *)``.

    Raises:
        ShapeError: if the shapes do not broadcast.
        DtypeError: if neither is floating.
        IndexError: if there is no such axis.

    Source: ``torch.nn.functional.cosine_similarity``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.cosine_similarity(jnp.eye(2), jnp.ones((2, 2))).round(3).tolist()
        [0.707..., 0.707...]
    """
    a = array(x1, "x1", "F.cosine_similarity")
    return _cosine_similarity(a, array(x2, "x2", "F.cosine_similarity"), dim, eps)


@functools.partial(compiled, static_argnums=(2, 3, 4))
def _pairwise_distance(x1: jax.Array, x2: jax.Array, p: float, eps: float, keepdim: bool) -> Any:
    dtype, x1, x2 = together("F.pairwise_distance", x1=x1, x2=x2)
    difference = x1 - x2 + eps
    axes = (difference.ndim - 1,) if difference.ndim else ()
    out = p_norm(difference, p, axes, "F.pairwise_distance")
    return (out if keepdim else out.reshape(out.shape[:-1])).astype(dtype)


def pairwise_distance(
    x1: ArrayLike, x2: ArrayLike, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> jax.Array:
    """Return the p-norm of ``x1 - x2 + eps`` over the last axis.

    Args:
        x1: ``(*, D)``, floating.
        x2: a shape that broadcasts with it.
        p: the degree of the norm; it may be infinite or negative.
        eps: added to each difference, so that the norm has a derivative between equal vectors.
        keepdim: whether the last axis stays, with size 1.

    Returns:
        ``(*)`` or ``(*, 1)``.

    Raises:
        ShapeError: if the shapes do not broadcast.
        DtypeError: if neither is floating.

    Source: ``torch.nn.functional.pairwise_distance``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.pairwise_distance(jnp.zeros((2, 3)), jnp.ones((2, 3)), p=1).round(3).tolist()
        [3.0..., 3.0...]
    """
    name = "F.pairwise_distance"
    a, b = array(x1, "x1", name), array(x2, "x2", name)
    return _pairwise_distance(a, b, _degree(p, name), eps, keepdim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _all_pairs(x: jax.Array, p: float) -> Any:
    """Return the distances of all pairs of rows, (N, N); their derivatives are torch.pdist's."""
    apart = x[:, None] - x[None]  # XLA never stores the differences
    if p == 0:
        return jnp.sum(jnp.minimum(jnp.ceil(jnp.abs(apart)), 1), -1)  # NaN stays NaN
    return p_norm(apart, p, (2,), "F.pdist")[..., 0]


@_all_pairs.defjvp
def _all_pairs_jvp(p: float, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    out = _all_pairs(x, p)
    if p == 0:
        return out, jnp.zeros_like(out)
    apart = x[:, None] - x[None]
    if (
        p == math.inf
    ):  # each of equal magnitudes has the whole derivative, and all are NaN if one is
        below = jnp.minimum(jnp.ceil(jnp.abs(jnp.abs(apart) - out[..., None])), 1)
        slope = lax.stop_gradient(jnp.sign(apart) * (1 - below))
    elif p == 1:
        slope = jnp.sign(apart)
    else:
        slope = _slope(apart, out[..., None], p, (2,))
        slope = jnp.where(apart == 0, 0, slope) if p < 1 else slope
    # Only the upper half is used: the other's cotangents are 0, and may not meet what is not finite.
    row = jnp.arange(len(x))
    slope = jnp.where((row[:, None] < row)[..., None], slope, 0)
    return out, jnp.sum(slope * (dx[:, None] - dx[None]), -1)


@functools.partial(compiled, static_argnums=1)
def _pdist(x: jax.Array, p: float) -> Any:
    function = "F.pdist"
    require_rank(x, (2,), "input", function, "(N, D)")
    require_float(x, "input", function)
    if p < 0:
        raise shape_error(
            f"F.pdist was given p={p}", "only non-negative p values are supported", "p=2.0"
        )
    n, d = x.shape
    if n < 2 or d == 0:
        return jnp.zeros(n * (n - 1) // 2, x.dtype)
    wide = widened(x)
    table = _all_pairs(wide, p)
    first, second = np.triu_indices(n, 1)
    flat = (first * n + second).astype(np.int32)
    out = (
        table.reshape(-1)
        .at[flat]
        .get(mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True)
    )
    return out.astype(x.dtype)


def pdist(input: ArrayLike, p: float = 2.0) -> jax.Array:
    """Return the distances between all pairs of rows.

    Args:
        input: ``(N, D)``, floating.
        p: the distance is the p-norm of the difference; not negative.

    Returns:
        ``(N (N - 1) / 2,)``: of rows 0 and 1, 0 and 2, ..., 1 and 2, ...

    Raises:
        ShapeError: if the input is not a matrix, or `p` is negative.
        DtypeError: if it is not floating.

    Source: ``torch.nn.functional.pdist``. Time and memory are those of all N² pairs.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.pdist(jnp.array([[0.0], [1.0], [3.0]])).tolist()
        [1.0, 3.0, 2.0]
    """
    return _pdist(array(input, "input", "F.pdist"), _degree(p, "F.pdist"))


@functools.partial(compiled, static_argnums=(1, 2, 3))
def _normalize(x: jax.Array, p: float, dim: int | tuple[int, ...], eps: float) -> Any:
    function = "F.normalize"
    require_float(x, "input", function)
    dims: Sequence[int] = dim if isinstance(dim, tuple) else (dim,)
    dims = dims or range(x.ndim)  # none at all are all of them, as in torch
    axes = tuple(dimension(d, x.ndim, function) for d in dims)
    if len(set(axes)) != len(axes):
        raise shape_error(
            f"F.normalize was given dim={dim} for an input of shape {x.shape}",
            "an axis appears multiple times in the list of dims",
            f"dim={tuple(sorted(set(axes)))}",
        )
    wide = widened(x)
    length = p_norm(wide, p, axes if x.ndim else (), function)
    # A choice, not a maximum, whose derivative where both are equal would be a half.
    return (wide / jnp.where(length < eps, eps, length).astype(wide.dtype)).astype(x.dtype)


def normalize(
    input: ArrayLike,
    p: float = 2.0,
    dim: int | Sequence[int] = 1,
    eps: float = 1e-12,
    out: None = None,
) -> jax.Array:
    """Divide vectors by their p-norm.

    Args:
        input: any shape, floating or complex.
        p: the degree of the norm.
        dim: the vectors' axis, or several.
        eps: the smallest norm that is divided by: a vector of zeros stays as it is.
        out: for compatibility with torch; arrays cannot be written to.

    Returns:
        The input's shape.

    Raises:
        DtypeError: if the input is not floating, or `out` is given.
        IndexError: if there is no such axis.

    Source: ``torch.nn.functional.normalize``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
        [[0.600..., 0.800...], [0.0, 0.0]]
    """
    if out is not None:
        raise DtypeError(
            explain(
                "F.normalize was given out=",
                "arrays are immutable: there is nothing to write the result to",
                "out = F.normalize(input)",
            )
        )
    x = array(input, "input", "F.normalize")
    dims = tuple(dim) if isinstance(dim, (tuple, list)) else dim
    return _normalize(x, _degree(p, "F.normalize"), dims, eps)
