"""Products of matrices, einsum, decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from statefulnn.bridge.torch.operators._promotion import cast
from statefulnn.bridge.torch.operators._table import operator


@operator("mm", "bmm", "matmul", "mv", "linalg_matmul")
def matmul(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b)


@operator("dot", "vdot", "linalg_vecdot")
def dot(a: Any, b: Any) -> Any:
    return jnp.dot(a, b)


@operator("outer", "ger")
def outer(a: Any, b: Any) -> Any:
    return jnp.outer(a, b)


@operator("addmm", "addmv", "baddbmm")
def addmm(x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = jnp.matmul(a, b)
    product = product if alpha == 1 else product * cast(alpha, product.dtype)
    if beta == 0:  # torch does not look at x then, not even for NaN
        return product
    return product + (x if beta == 1 else x * cast(beta, x.dtype))


@operator("addbmm")
def addbmm(x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = jnp.einsum("bij,bjk->ik", a, b)
    return x * cast(beta, x.dtype) + product * cast(alpha, x.dtype)


@operator("einsum")
def einsum(equation: str, tensors: Sequence[Any], *, path: Any = None) -> Any:
    return jnp.einsum(equation, *tensors)


@operator("tensordot")
def tensordot(a: Any, b: Any, dims_self: Sequence[int], dims_other: Sequence[int]) -> Any:
    return jnp.tensordot(a, b, (tuple(dims_self), tuple(dims_other)))


@operator("kron")
def kron(a: Any, b: Any) -> Any:
    return jnp.kron(a, b)


@operator("cross", "linalg_cross")
def cross(a: Any, b: Any, *, dim: int = -1) -> Any:
    return jnp.cross(a, b, axis=dim)


@operator("_weight_norm")
def weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    """Return v in the directions it has and with the lengths g, for each index of one axis."""
    others = tuple(a for a in range(v.ndim) if dim == -1 or a != dim % v.ndim)
    return v * (g / jnp.sqrt(jnp.sum(jnp.square(v), others, keepdims=True)))


@operator("trace")
def trace(x: Any) -> Any:
    return jnp.trace(x)


@operator("linalg_inv", "inverse")
def inverse(x: Any) -> Any:
    return jnp.linalg.inv(x)


@operator("linalg_det", "det")
def det(x: Any) -> Any:
    return jnp.linalg.det(x)


@operator("linalg_slogdet")
def slogdet(x: Any) -> Any:
    return tuple(jnp.linalg.slogdet(x))


@operator("linalg_cholesky", "cholesky")
def cholesky(x: Any, *, upper: bool = False) -> Any:
    return jnp.linalg.cholesky(x, upper=upper)


@operator("linalg_solve")
def solve(a: Any, b: Any, *, left: bool = True) -> Any:
    if not left:
        return jnp.swapaxes(solve(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2)), -1, -2)
    return jnp.linalg.solve(a, b[..., None])[..., 0] if b.ndim == 1 else jnp.linalg.solve(a, b)


@operator("cdist")
def cdist(a: Any, b: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    distance = jnp.abs(a[..., :, None, :] - b[..., None, :, :])
    if p == 2:
        squares = jnp.sum(jnp.square(distance), -1)
        # The gradient at equal points is 0, as torch has it.
        apart = squares > 0
        return jnp.where(
            apart, jnp.sqrt(jnp.where(apart, squares, jnp.ones_like(squares))), squares
        )
    if p == 1:
        return jnp.sum(distance, -1)
    if p == float("inf"):
        return jnp.max(distance, -1)
    power = jnp.asarray(p, a.dtype)
    return jnp.sum(distance**power, -1) ** (1 / power)


@operator("fft_fft")
def fft(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    return jnp.fft.fft(x, n, dim, norm)


@operator("fft_ifft")
def ifft(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    return jnp.fft.ifft(x, n, dim, norm)


@operator("fft_rfft")
def rfft(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    return jnp.fft.rfft(x, n, dim, norm)


@operator("fft_irfft")
def irfft(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    return jnp.fft.irfft(x, n, dim, norm)


@operator("fft_fft2", "fft_fftn")
def fftn(x: Any, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Any:
    return jnp.fft.fftn(x, s, dim, norm)


@operator("fft_rfft2", "fft_rfftn")
def rfftn(x: Any, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Any:
    return jnp.fft.rfftn(x, s, dim, norm)


@operator("fft_irfft2", "fft_irfftn")
def irfftn(x: Any, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Any:
    return jnp.fft.irfftn(x, s, dim, norm)
