"""Losses of triplets: an anchor, something like it, and something unlike it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.functional._checks import array, reduced, reduction_of, shape_error
from statefulnn.functional._compiled import compiled
from statefulnn.functional._losses import hinge, together
from statefulnn.functional.distance import p_norm


def _distance(a: jax.Array, b: jax.Array, p: float, eps: float) -> Any:
    difference = a - b + eps
    axes = (difference.ndim - 1,) if difference.ndim else ()
    return p_norm(difference, p, axes, "F.triplet_margin_loss").reshape(difference.shape[:-1])


def _check_ranks(
    anchor: jax.Array, positive: jax.Array, negative: jax.Array, function: str
) -> None:
    if not anchor.ndim == positive.ndim == negative.ndim:
        raise shape_error(
            f"{function} was given anchor, positive and negative of shapes {anchor.shape}, "
            f"{positive.shape} and {negative.shape}",
            "all three need the same number of dimensions",
            "jnp.atleast_2d(x) of each, or x[None] of one that has an axis less",
        )


def check_margin(margin: float, function: str) -> None:
    """Raise unless a margin is positive."""
    if margin <= 0:
        raise ValueError(
            explain(
                f"{function} was given margin={margin}",
                "margin must be greater than 0",
                "margin=1.0",
            )
        )


@functools.partial(compiled, static_argnums=(3, 4, 5, 6, 7))
def _triplet_margin(
    anchor: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    margin: float,
    p: float,
    eps: float,
    swap: bool,
    reduction: str,
) -> Any:
    function = "F.triplet_margin_loss"
    _check_ranks(anchor, positive, negative, function)
    dtype, a, same, other = together(function, anchor=anchor, positive=positive, negative=negative)
    apart = _distance(a, other, p, eps)
    if swap:
        apart = jnp.minimum(apart, _distance(same, other, p, eps))
    return reduced(hinge(margin + _distance(a, same, p, eps) - apart), reduction).astype(dtype)


def triplet_margin_loss(
    anchor: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return ``max(0, d(anchor, positive) - d(anchor, negative) + margin)``.

    Args:
        anchor: vectors, ``(N, D)`` or ``(D,)``.
        positive: what should be near, likewise.
        negative: what should be far, likewise.
        margin: by how much farther; above 0.
        p: the distance is the p-norm of the difference plus `eps`.
        eps: keeps the norm away from 0.
        swap: whether the negative's distance is the smaller one of those to anchor and positive.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or ``(N,)``.

    Raises:
        ValueError: if `margin` is not positive.
        ShapeError: if the shapes do not fit.

    Source: Balntas et al. 2016; ``torch.nn.functional.triplet_margin_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> a, p, n = jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]), jnp.array([[1.5, 0.0]])
        >>> round(float(F.triplet_margin_loss(a, p, n)), 3)
        0.5
    """
    function = "F.triplet_margin_loss"
    reduction = reduction_of(reduction, size_average, reduce, function)
    check_margin(margin, function)
    a = array(anchor, "anchor", function)
    same = array(positive, "positive", function)
    other = array(negative, "negative", function)
    numbers = float(margin), float(p), float(eps)
    return _triplet_margin(a, same, other, *numbers, bool(swap), reduction)


@functools.partial(compiled, static_argnums=(3, 4))
def _hinge_of_distances(
    near: jax.Array, far: jax.Array, swapped: jax.Array | None, margin: float, reduction: str
) -> Any:
    dtype, near, far, swapped = together(
        "F.triplet_margin_with_distance_loss", positive=near, negative=far, swapped=swapped
    )
    far = far if swapped is None else jnp.minimum(far, swapped)
    return reduced(hinge(margin + near - far), reduction).astype(dtype)


def triplet_margin_with_distance_loss(
    anchor: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    distance_function: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> jax.Array:
    """Return ``max(0, d(anchor, positive) - d(anchor, negative) + margin)`` for any distance.

    Args:
        anchor: any shape that the distance takes.
        positive: what should be near, likewise.
        negative: what should be far, likewise.
        distance_function: d, from two arrays to one; None for the Euclidean distance over the last
            axis. It runs as it is: compile the call around it to fuse its steps.
        margin: by how much farther; above 0.
        swap: whether the negative's distance is the smaller one of those to anchor and positive.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the shape that the distance gives.

    Raises:
        ValueError: if `margin` is not positive.
        ShapeError: if the shapes do not fit.

    Source: ``torch.nn.functional.triplet_margin_with_distance_loss``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> l1 = lambda x, y: abs(x - y).sum(-1)
        >>> a, p, n = jnp.zeros((1, 2)), jnp.ones((1, 2)), 2.25 * jnp.ones((1, 2))
        >>> float(F.triplet_margin_with_distance_loss(a, p, n, distance_function=l1, margin=4.0))
        1.5
    """
    function = "F.triplet_margin_with_distance_loss"
    reduction = reduction_of(reduction, None, None, function)
    check_margin(margin, function)
    a = array(anchor, "anchor", function)
    same = array(positive, "positive", function)
    other = array(negative, "negative", function)
    _check_ranks(a, same, other, function)
    if distance_function is None:
        return _triplet_margin(a, same, other, float(margin), 2.0, 1e-6, bool(swap), reduction)
    near, far = distance_function(a, same), distance_function(a, other)
    swapped = distance_function(same, other) if swap else None
    return _hinge_of_distances(near, far, swapped, float(margin), reduction)
