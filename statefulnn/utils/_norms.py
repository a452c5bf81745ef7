"""What weight norm and spectral norm compute, in both their forms."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn import init
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Buffer
from statefulnn.modules.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d


def checked_dim(weight: jax.Array, dim: int, function: str) -> int:
    """Return an axis counted from the front, or raise."""
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError(
            explain(
                f"{function} was given dim={dim} for an array of shape {tuple(weight.shape)}",
                "Dimension out of range (expected to be in range of "
                f"[-{weight.ndim}, {weight.ndim - 1}])",
                "dim=0",
            )
        )
    return dim % weight.ndim


def require_positive(n_power_iterations: int, function: str) -> None:
    """Raise for less than one iteration."""
    if n_power_iterations <= 0:
        raise ValueError(
            explain(
                f"{function} was given n_power_iterations={n_power_iterations}",
                "Expected n_power_iterations to be positive",
                "n_power_iterations=1",
            )
        )


def norm_except_dim(v: jax.Array, dim: int) -> Any:
    """Return the norms of the slices along an axis, in place of the slices; -1: one norm, a scalar."""
    return _norm(v, dim if dim == -1 else checked_dim(v, dim, "weight_norm"))


def weight_of(v: jax.Array, g: jax.Array, dim: int) -> Any:
    """Return v with the norms g along an axis."""
    return _weight(v, g, dim if dim == -1 else checked_dim(v, dim, "weight_norm"))


def _wide(x: jax.Array) -> Any:
    return x.astype(jnp.float32) if x.dtype.itemsize == 2 else x


@functools.partial(jax.jit, static_argnums=1)
def _norm(v: jax.Array, dim: int) -> Any:
    axes = None if dim == -1 else tuple(i for i in range(v.ndim) if i != dim)
    squares = jnp.sum(jnp.square(jnp.abs(_wide(v))), axes, keepdims=dim != -1)
    return jnp.sqrt(squares).astype(v.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _weight(v: jax.Array, g: jax.Array, dim: int) -> Any:
    wide = _wide(v)
    return (wide * (_wide(g) / _norm(wide, dim))).astype(v.dtype)


def output_dim(module: Module) -> int:
    """Return the axis of the outputs in the weight of a layer."""
    return int(isinstance(module, (ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)))


def as_matrix(weight: jax.Array, dim: int) -> Any:
    """Return a weight with an axis in front and the others as one."""
    moved = jnp.moveaxis(weight, dim, 0)
    return moved.reshape(moved.shape[0], -1)


def random_vectors(matrix: jax.Array, eps: float) -> tuple[Any, Any]:
    """Draw a vector for the rows and one for the columns, of norm 1."""
    u, v = (init.normal_(Buffer(jnp.zeros(n, matrix.dtype))).value for n in matrix.shape)
    return normalised(u, eps), normalised(v, eps)


@jax.jit
def normalised(x: jax.Array, eps: float) -> Any:
    """Return a vector divided by its norm, or by eps if that is larger."""
    wide = _wide(x)
    squares = jnp.sum(jnp.square(wide))
    # The norm of zero has no derivative; nothing is divided by it there.
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    norm = jnp.where(squares > 0, jnp.maximum(norm, jnp.asarray(eps, norm.dtype)), eps)
    return (wide / norm).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("n", "u_first"))
def power_iterations(
    matrix: jax.Array, u: jax.Array, v: jax.Array, *, n: int, eps: float, u_first: bool
) -> tuple[Any, Any]:
    """Improve the singular vectors of the largest singular value; nothing is differentiated.

    Args:
        matrix: ``(h, w)``.
        u: ``(h,)``.
        v: ``(w,)``.
        n: how many steps.
        eps: the smallest norm that is divided by.
        u_first: whether u is computed from v first.
    """
    matrix, u, v = jax.lax.stop_gradient((matrix, u, v))

    def step(_: ArrayLike, vectors: tuple[Any, Any]) -> tuple[Any, Any]:
        u, v = vectors
        if u_first:
            u = normalised(matrix @ v, eps)
        v = normalised(jnp.conj(matrix).T @ u, eps)
        if not u_first:
            u = normalised(matrix @ v, eps)
        return u, v

    return step(0, (u, v)) if n == 1 else jax.lax.fori_loop(0, n, step, (u, v))


@functools.partial(jax.jit, static_argnums=3)
def divided_by_sigma(weight: jax.Array, u: jax.Array, v: jax.Array, dim: int) -> Any:
    """Return a weight divided by uᴴ W v, through which only the weight is differentiated."""
    u, v = jax.lax.stop_gradient((u, v))
    return weight / jnp.vdot(u, as_matrix(weight, dim) @ v)
