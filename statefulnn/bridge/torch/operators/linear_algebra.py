"""Products of matrices, einsum, decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from statefulnn.bridge.torch.operators._promotion import cast, dtype_of
from statefulnn.bridge.torch.operators._subgradients import absolute, length
from statefulnn.bridge.torch.operators._table import operator
from statefulnn.functional.grouped_mm import by_group

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from statefulnn.bridge.torch.operators._table import Scalar


@operator("mm", "bmm", "matmul", "mv", "linalg_matmul")
def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b)


@operator("dot")
def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b)


@operator("vdot")
def vdot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.vdot(a, b)


@operator("linalg_vecdot")
def vecdot(a: jax.Array, b: jax.Array, *, dim: int = -1) -> jax.Array:
    return jnp.sum(jnp.conj(a) * b, dim)


@operator("linalg_householder_product")
def householder_product(a: jax.Array, taus: jax.Array) -> jax.Array:
    return lax.linalg.householder_product(a, taus)


@operator("outer", "ger")
def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.outer(a, b)


@operator("addmm", "addmv", "baddbmm")
def addmm(
    x: jax.Array, a: jax.Array, b: jax.Array, *, beta: Scalar = 1, alpha: Scalar = 1
) -> jax.Array:
    product = jnp.matmul(a, b)
    product = product if alpha == 1 else product * cast(alpha, product.dtype)
    if beta == 0:  # torch does not look at x then, not even for NaN
        return product
    return product + (x if beta == 1 else x * cast(beta, x.dtype))


@operator("addbmm")
def addbmm(
    x: jax.Array, a: jax.Array, b: jax.Array, *, beta: Scalar = 1, alpha: Scalar = 1
) -> jax.Array:
    product = jnp.einsum("bij,bjk->ik", a, b)
    return x * cast(beta, x.dtype) + product * cast(alpha, x.dtype)


@operator("einsum")
def einsum(
    equation: str, tensors: Sequence[jax.Array], *, path: Sequence[int] | None = None
) -> jax.Array:
    return jnp.einsum(equation, *tensors)


@operator("tensordot")
def tensordot(
    a: jax.Array, b: jax.Array, dims_self: Sequence[int], dims_other: Sequence[int]
) -> jax.Array:
    return jnp.tensordot(a, b, (tuple(dims_self), tuple(dims_other)))


@operator("kron")
def kron(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.kron(a, b)


@operator("cross", "linalg_cross")
def cross(a: jax.Array, b: jax.Array, *, dim: int = -1) -> jax.Array:
    return jnp.cross(a, b, axis=dim)


@operator("_weight_norm")
def weight_norm(v: jax.Array, g: jax.Array, dim: int = 0) -> jax.Array:
    """Return v in the directions it has and with the lengths g, for each index of one axis."""
    others = tuple(a for a in range(v.ndim) if dim == -1 or a != dim % v.ndim)
    return v * (g / jnp.sqrt(jnp.sum(jnp.square(v), others, keepdims=True)))


@operator("trace")
def trace(x: jax.Array) -> jax.Array:
    return jnp.trace(x)


@operator("linalg_inv", "inverse")
def inverse(x: jax.Array) -> jax.Array:
    return jnp.linalg.inv(x)


@operator("linalg_det", "det")
def det(x: jax.Array) -> jax.Array:
    return jnp.linalg.det(x)


@operator("linalg_slogdet")
def slogdet(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.linalg.slogdet(x))


@operator("linalg_cholesky", "cholesky")
def cholesky(x: jax.Array, *, upper: bool = False) -> jax.Array:
    return jnp.linalg.cholesky(x, upper=upper)


@operator("linalg_solve")
def solve(a: jax.Array, b: jax.Array, *, left: bool = True) -> jax.Array:
    if not left:
        return jnp.swapaxes(solve(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2)), -1, -2)
    return jnp.linalg.solve(a, b[..., None])[..., 0] if b.ndim == 1 else jnp.linalg.solve(a, b)


@operator("cdist")
def cdist(a: jax.Array, b: jax.Array, p: float = 2.0, compute_mode: int | None = None) -> jax.Array:
    distance = a[..., :, None, :] - b[..., None, :, :]
    if p == 0:
        return jnp.sum(cast(distance != 0, a.dtype), -1)
    return jnp.max(absolute(distance), -1) if p == float("inf") else length(distance, p, -1)


@operator("fft_fft")
def fft(x: jax.Array, n: int | None = None, dim: int = -1, norm: str | None = None) -> jax.Array:
    return jnp.fft.fft(x, n, dim, norm)


@operator("fft_ifft")
def ifft(x: jax.Array, n: int | None = None, dim: int = -1, norm: str | None = None) -> jax.Array:
    return jnp.fft.ifft(x, n, dim, norm)


@operator("fft_rfft")
def rfft(x: jax.Array, n: int | None = None, dim: int = -1, norm: str | None = None) -> jax.Array:
    return jnp.fft.rfft(x, n, dim, norm)


@operator("fft_irfft")
def irfft(x: jax.Array, n: int | None = None, dim: int = -1, norm: str | None = None) -> jax.Array:
    return jnp.fft.irfft(x, n, dim, norm)


@operator("fft_fft2", "fft_fftn")
def fftn(
    x: jax.Array,
    s: Sequence[int] | None = None,
    dim: Sequence[int] | None = (-2, -1),
    norm: str | None = None,
) -> jax.Array:
    return jnp.fft.fftn(x, s, dim, norm)


@operator("fft_rfft2", "fft_rfftn")
def rfftn(
    x: jax.Array,
    s: Sequence[int] | None = None,
    dim: Sequence[int] | None = (-2, -1),
    norm: str | None = None,
) -> jax.Array:
    return jnp.fft.rfftn(x, s, dim, norm)


@operator("fft_irfft2", "fft_irfftn")
def irfftn(
    x: jax.Array,
    s: Sequence[int] | None = None,
    dim: Sequence[int] | None = (-2, -1),
    norm: str | None = None,
) -> jax.Array:
    return jnp.fft.irfftn(x, s, dim, norm)


@operator("istft")
def istft(
    x: jax.Array,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: jax.Array | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> jax.Array:
    """Add the pieces of a signal that overlap, and divide by the sum of the squared windows."""
    hop = n_fft // 4 if hop_length is None else hop_length
    width = n_fft if win_length is None else win_length
    half = not return_complex if onesided is None else onesided
    norm = "ortho" if normalized else "backward"
    spectrum = jnp.swapaxes(x, -1, -2)  # (..., pieces, frequencies)
    pieces = (jnp.fft.irfft if half else jnp.fft.ifft)(spectrum, n_fft, norm=norm)
    pieces = pieces if half and not return_complex or return_complex else pieces.real
    real = pieces.real.dtype
    window = jnp.ones(width, real) if window is None else window
    before = (n_fft - width) // 2
    window = jnp.pad(window, (before, n_fft - width - before))
    places = hop * np.arange(pieces.shape[-2])[:, None] + np.arange(n_fft)
    total = int(places[-1, -1]) + 1
    signal = jnp.zeros((*x.shape[:-2], total), pieces.dtype).at[..., places].add(pieces * window)
    weight = jnp.zeros(total, real).at[places].add(jnp.square(window))
    start = n_fft // 2 if center else 0
    end = start + length if length is not None else total - start
    inside = slice(start, min(end, total))
    out = signal[..., inside] / weight[inside]
    return jnp.pad(out, [(0, 0)] * (out.ndim - 1) + [(0, end - min(end, total))])


@operator("_cdist_forward")
def cdist_forward(
    a: jax.Array, b: jax.Array, p: float, compute_mode: int | None = None
) -> jax.Array:
    return cdist(a, b, p)


@operator("pdist", "_pdist_forward")
def pdist(x: jax.Array, p: float = 2.0) -> jax.Array:
    rows, columns = np.triu_indices(x.shape[0], 1)
    return jax.vmap(lambda a, b: cdist(a[None], b[None], p)[0, 0])(x[rows], x[columns])


@operator("matrix_exp", "linalg_matrix_exp")
def matrix_exp(x: jax.Array) -> jax.Array:
    return jax.scipy.linalg.expm(x)


@operator("linalg_qr")
def qr(x: jax.Array, mode: str = "reduced") -> tuple[jax.Array, ...]:
    if mode == "r":
        return jnp.zeros(0, x.dtype), jnp.linalg.qr(x, "r")
    return tuple(jnp.linalg.qr(x, mode))


@operator("linalg_svd")
def svd(
    x: jax.Array, full_matrices: bool = True, *, driver: str | None = None
) -> tuple[jax.Array, ...]:
    return tuple(jnp.linalg.svd(x, full_matrices))


@operator("_linalg_svd")
def svd_inner(
    x: jax.Array, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[jax.Array | None, ...]:
    if compute_uv:
        return svd(x, full_matrices)
    return None, jnp.linalg.svd(x, compute_uv=False), None


@operator("linalg_pinv")
def pinv(
    x: jax.Array,
    rcond: ArrayLike | None = None,
    hermitian: bool = False,
    *,
    rtol: ArrayLike | None = None,
) -> jax.Array:
    rtol = rcond if rtol is None else rtol
    if rtol is None:
        rtol = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)
    return jnp.linalg.pinv(x, rtol=rtol, hermitian=hermitian)


@operator("linalg_pinv.atol_rtol_tensor", "linalg_pinv.atol_rtol_float")
def pinv_of_two(
    x: jax.Array,
    *,
    atol: ArrayLike | None = None,
    rtol: ArrayLike | None = None,
    hermitian: bool = False,
) -> jax.Array:
    if atol is not None:
        largest = jnp.max(jnp.linalg.svd(lax.stop_gradient(x), compute_uv=False), -1)
        rtol = jnp.maximum(cast(atol, largest.dtype) / largest, cast(rtol or 0.0, largest.dtype))
    return pinv(x, rtol=rtol, hermitian=hermitian)


def _went_well(x: jax.Array) -> jax.Array:
    """Return what torch says of matrices without an error."""
    return jnp.zeros(x.shape[:-2], jnp.int32)


@operator("linalg_inv_ex")
def inv_ex(x: jax.Array, *, check_errors: bool = False) -> tuple[jax.Array, ...]:
    return inverse(x), _went_well(x)


@operator("_linalg_solve_ex")
def solve_ex(
    a: jax.Array, b: jax.Array, *, left: bool = True, check_errors: bool = False
) -> tuple[jax.Array, ...]:
    factors, pivots, _ = lax.linalg.lu(a)
    return solve(a, b, left=left), factors, pivots + 1, _went_well(a)


@operator("_linalg_slogdet")
def slogdet_inner(x: jax.Array) -> tuple[jax.Array, ...]:
    factors, pivots, _ = lax.linalg.lu(x)
    return (*slogdet(x), factors, pivots + 1)


@operator("linalg_lu_factor_ex")
def lu_factor(
    x: jax.Array, *, pivot: bool = True, check_errors: bool = False
) -> tuple[jax.Array, ...]:
    factors, pivots, _ = lax.linalg.lu(x)
    return factors, pivots + 1, _went_well(x)


@operator("cholesky_solve")
def cholesky_solve(b: jax.Array, factor: jax.Array, upper: bool = False) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factor, not upper), b)


@operator("cholesky_inverse")
def cholesky_inverse(factor: jax.Array, upper: bool = False) -> jax.Array:
    eye = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return cholesky_solve(eye, factor, upper)


@operator("block_diag")
def block_diag(tensors: Sequence[jax.Array]) -> jax.Array:
    return jax.scipy.linalg.block_diag(*tensors)


@operator("linalg_eigh", "_linalg_eigh")
def eigh(x: jax.Array, uplo: str = "L", *_: bool) -> tuple[jax.Array, ...]:
    return tuple(jnp.linalg.eigh(x, UPLO=uplo))


@operator("linalg_solve_triangular")
def solve_triangular(
    a: jax.Array, b: jax.Array, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> jax.Array:
    return lax.linalg.triangular_solve(
        a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular
    )


@operator("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(
    a: jax.Array,
    b: jax.Array,
    offs: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: str | None = None,
) -> jax.Array:
    """Multiply runs of rows, which end at `offs`, by one matrix each."""
    # Mostly the matrices are those of linear layers, (groups, out, in), and torch's code transposes them.
    out = by_group(a, b, None if offs is None else offs.astype(jnp.int32), True)
    return cast(out, dtype_of(out_dtype, out.dtype))


# What torch divides by: nothing, the root of the size, the size.
_NORMALIZATIONS = ("backward", "ortho", "forward")
_INVERSE = ("forward", "ortho", "backward")


@operator("_fft_r2c")
def fft_r2c(x: jax.Array, dim: Sequence[int], normalization: int, onesided: bool) -> jax.Array:
    function = jnp.fft.rfftn if onesided else jnp.fft.fftn
    return function(x, axes=tuple(dim), norm=_NORMALIZATIONS[normalization])


@operator("_fft_c2c")
def fft_c2c(x: jax.Array, dim: Sequence[int], normalization: int, forward: bool) -> jax.Array:
    if forward:
        return jnp.fft.fftn(x, axes=tuple(dim), norm=_NORMALIZATIONS[normalization])
    return jnp.fft.ifftn(x, axes=tuple(dim), norm=_INVERSE[normalization])


@operator("_fft_c2r")
def fft_c2r(x: jax.Array, dim: Sequence[int], normalization: int, last: int) -> jax.Array:
    sizes = [*(x.shape[d] for d in dim[:-1]), last]
    return jnp.fft.irfftn(x, sizes, tuple(dim), norm=_INVERSE[normalization])
