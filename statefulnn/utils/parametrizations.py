"""Ready-made parametrizations: orthogonal matrices, weight norm, spectral norm.

Source: ``torch.nn.utils.parametrizations``.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.box import unwrap
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.generator import next_key
from statefulnn.core.listing import listing
from statefulnn.core.module import Module
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.utils._computed import Loading
from statefulnn.utils._norms import (
    as_matrix,
    checked_dim,
    divided_by_sigma,
    norm_except_dim,
    normalised,
    output_dim,
    power_iterations,
    random_vectors,
    require_positive,
    weight_of,
)
from statefulnn.utils._tensors import numbers_of
from statefulnn.utils.parametrize import register_parametrization

__all__ = ["orthogonal", "spectral_norm", "weight_norm"]
__dir__ = listing(globals())


class _OrthMaps(enum.Enum):
    matrix_exp = enum.auto()
    cayley = enum.auto()
    householder = enum.auto()


def _adjoint(x: jax.Array) -> Any:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _householder(x: jax.Array) -> Any:
    """Return the first columns of the product of the reflections in the columns below the diagonal."""
    n, k = x.shape[-2:]
    one = jnp.eye(n, k, dtype=x.dtype)
    v = jnp.tril(x, -1) + one
    # I - V T Vᵀ, where the inverse of T is triangular: products instead of k reflections in turn.
    gram = jnp.swapaxes(v, -1, -2) @ v
    inverse = jnp.triu(gram, 1) + jnp.eye(k, dtype=x.dtype) * (gram / 2)
    top = jnp.swapaxes(v[..., :k, :], -1, -2)
    q = one - v @ jax.lax.linalg.triangular_solve(inverse, top, left_side=True, lower=False)
    # The diagonal holds signs, which are not trained.
    signs = jnp.trunc(jnp.diagonal(x, axis1=-2, axis2=-1))
    return q * jax.lax.stop_gradient(signs)[..., None, :]


@functools.partial(jax.jit, static_argnames="kind")
def _orthogonal(x: jax.Array, base: jax.Array | None, kind: _OrthMaps) -> Any:
    transposed = x.shape[-2] < x.shape[-1]
    if transposed:
        x = jnp.swapaxes(x, -1, -2)
    n, k = x.shape[-2:]
    if kind is _OrthMaps.householder:
        q = _householder(x)
    else:
        x = jnp.tril(x)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n - k)])
        skew = x - _adjoint(x)
        if kind is _OrthMaps.matrix_exp:
            q = jax.scipy.linalg.expm(skew)
        else:
            one = jnp.eye(n, dtype=x.dtype)
            q = jnp.linalg.solve(one - skew / 2, one + skew / 2)
        q = q[..., :k]
    if base is not None:
        q = base @ q
    return jnp.swapaxes(q, -1, -2) if transposed else q


@jax.jit
def _orthogonalised(x: jax.Array) -> Any:
    """Return Q of x = QR with a diagonal of R that is real and not negative."""
    q, r = jnp.linalg.qr(x)
    return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


@jax.jit
def _orthogonalised_if_needed(x: jax.Array) -> Any:
    eps = 10 * x.shape[-2] * jnp.finfo(x.dtype).eps
    one = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.where(jnp.allclose(_adjoint(x) @ x, one, atol=eps), x, _orthogonalised(x))


@jax.jit
def _reflections(x: jax.Array) -> Any:
    """Return the reflections of x = QR below a diagonal of signs."""
    h, tau = jnp.linalg.qr(x, mode="raw")
    a = jnp.swapaxes(h, -1, -2)
    n, k = a.shape[-2:]
    # LAPACK leaves a reflection out where it is not needed, and says so by a zero.
    signs = jnp.sign(jnp.diagonal(a, axis1=-2, axis2=-1)) * jnp.where(tau == 0, -1, 1).astype(
        a.dtype
    )
    one = jnp.eye(n, k, dtype=a.dtype)
    return a * (1 - one) + one * signs[..., None, :]


class _Orthogonal(Module):
    # Built by `orthogonal`. With a base B the matrix is B·f(X), and X starts where f(X) is the identity
    # ("dynamic trivialization", Lezcano-Casado 2019).
    def __init__(
        self, weight: jax.Array, orthogonal_map: _OrthMaps, *, use_trivialization: bool = True
    ) -> None:
        super().__init__()
        complex_ = jnp.issubdtype(weight.dtype, jnp.complexfloating)
        if complex_ and orthogonal_map is _OrthMaps.householder:
            raise ValueError(
                explain(
                    'orthogonal(module, name, "householder") of a complex tensor',
                    "The householder parametrization does not support complex tensors: reflections "
                    "have too few parameters for unitary matrices",
                    'orthogonal_map="matrix_exp" or "cayley"',
                )
            )
        self.shape = tuple(weight.shape)
        self.orthogonal_map = orthogonal_map
        if use_trivialization:
            self.register_buffer("base", None)

    def forward(self, X: jax.Array) -> Any:
        base = self.base if "base" in self._buffers else None
        return _orthogonal(unwrap(X), base, self.orthogonal_map)

    def right_inverse(self, Q: jax.Array) -> Any:
        Q = jnp.asarray(unwrap(Q))
        if Q.shape != self.shape:
            raise ShapeError(
                explain(
                    f"assigned an array of shape {Q.shape} to an orthogonal tensor",
                    f"Expected a matrix or batch of matrices of shape {self.shape}",
                    f"assign an array of shape {self.shape}",
                )
            )
        *batch, n, k = self.shape
        transposed = n < k
        tall = jnp.swapaxes(Q, -1, -2) if transposed else Q
        if "base" not in self._buffers:
            if self.orthogonal_map is not _OrthMaps.householder:
                raise NotImplementedError(
                    explain(
                        "assigned to an orthogonal tensor with use_trivialization=False",
                        "It is not possible to assign to the matrix exponential or the Cayley "
                        "parametrizations: their inverse is not known",
                        'use_trivialization=True, or orthogonal_map="householder"',
                    )
                )
            a = _reflections(tall)
            return jnp.swapaxes(a, -1, -2) if transposed else a
        if n == k:
            self.base = _orthogonalised_if_needed(tall)
        else:
            # Random columns complete it to a square matrix.
            shape = (*batch, max(n, k), abs(n - k))
            more = jax.random.normal(next_key(), shape, Q.dtype)
            self.base = _orthogonalised(jnp.concatenate([tall, more], -1))
        # The diagonal of Householder's map is -1 where all reflections are those of the unit vectors.
        return jnp.broadcast_to(-jnp.eye(n, k, dtype=Q.dtype), Q.shape)


def _tensor(module: Module, name: str) -> Any:
    """Return the array of a parameter or buffer, parametrized or not."""
    value = getattr(module, name, None)
    if not isinstance(value, (Parameter, Buffer, jax.Array)):
        raise ValueError(
            explain(
                f"parametrized {name!r} of {type(module).__name__}",
                f"Module '{type(module).__name__}' has no parameter or buffer with name '{name}'",
                "name one of named_parameters(recurse=False) or named_buffers(recurse=False)",
            )
        )
    return numbers_of(value, f"parametrized {name!r} of {type(module).__name__}")


def orthogonal(
    module: Module,
    name: str = "weight",
    orthogonal_map: str | None = None,
    *,
    use_trivialization: bool = True,
) -> Module:
    """Keep a matrix, or a batch of matrices, orthogonal (complex: unitary).

    Its columns are orthonormal, or its rows if it has more columns than rows.

    Args:
        module: it is changed.
        name: of a tensor ``(..., m, n)``.
        orthogonal_map: ``"matrix_exp"``, exp(A), or ``"cayley"``, (I + A/2)(I - A/2)⁻¹, of a skew A; or
            ``"householder"``, a product of reflections. None takes the exponential for square and complex
            matrices and reflections for others.
        use_trivialization: whether the map starts from an orthogonal matrix near the present value,
            which is then a buffer ``parametrizations.<name>.0.base``.

    Returns:
        The module.

    Raises:
        ValueError: for an unknown name or map, fewer than two axes, or reflections of complex matrices.

    Source: Lezcano-Casado 2019; ``torch.nn.utils.parametrizations.orthogonal``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from statefulnn.utils.parametrizations import orthogonal
        >>> layer = orthogonal(nn.Linear(20, 40))
        >>> q = layer.weight
        >>> bool(jnp.allclose(q.T @ q, jnp.eye(20), atol=1e-5))
        True
    """
    weight = _tensor(module, name)
    if weight.ndim < 2:
        raise ShapeError(
            explain(
                f"orthogonal was given {name!r} of shape {weight.shape}",
                f"Expected a matrix or batch of matrices. Got a tensor of {weight.ndim} dimensions",
                "name a tensor with two axes or more",
            )
        )
    if orthogonal_map is None:
        square = weight.shape[-1] == weight.shape[-2]
        exponential = square or jnp.issubdtype(weight.dtype, jnp.complexfloating)
        orthogonal_map = "matrix_exp" if exponential else "householder"
    if orthogonal_map not in _OrthMaps.__members__:
        raise ValueError(
            explain(
                f"orthogonal was given orthogonal_map={orthogonal_map!r}",
                'orthogonal_map has to be one of "matrix_exp", "cayley", "householder"',
                "leave it out for the one that fits the shape",
            )
        )
    orth = _Orthogonal(weight, _OrthMaps[orthogonal_map], use_trivialization=use_trivialization)
    return register_parametrization(module, name, orth, unsafe=True)


class _WeightNorm(Module):
    # Built by `weight_norm`.
    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = -1 if dim is None else dim

    def forward(self, weight_g: jax.Array, weight_v: jax.Array) -> Any:
        return weight_of(unwrap(weight_v), unwrap(weight_g), self.dim)

    def right_inverse(self, weight: jax.Array) -> tuple[Any, Any]:
        weight = unwrap(weight)
        return norm_except_dim(weight, self.dim), weight

    @staticmethod
    def _convert_old_names(name: str, given: Loading) -> None:
        # Checkpoints of the older `statefulnn.utils.weight_norm`.
        entries, prefix = given.state_dict, given.prefix
        if f"{prefix}{name}_g" in entries and f"{prefix}{name}_v" in entries:
            inside = f"{prefix}parametrizations.{name}.original"
            entries[f"{inside}0"] = entries.pop(f"{prefix}{name}_g")
            entries[f"{inside}1"] = entries.pop(f"{prefix}{name}_v")


def weight_norm(module: Module, name: str = "weight", dim: int | None = 0) -> Module:
    """Split a parameter into magnitude and direction: w = g · v / ‖v‖.

    Args:
        module: it is changed; ``parametrizations.<name>.original0`` is g, ``original1`` is v.
        name: of the parameter.
        dim: the axis along which each slice has a norm of its own; None for one norm of everything.

    Returns:
        The module. Checkpoints with the older names ``<name>_g`` and ``<name>_v`` load as well.

    Raises:
        ValueError: if there is no such parameter.
        IndexError: if it has no such axis.

    Source: Salimans and Kingma 2016; ``torch.nn.utils.parametrizations.weight_norm``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils.parametrizations import weight_norm
        >>> layer = weight_norm(nn.Linear(20, 40))
        >>> layer.parametrizations.weight.original0.shape
        (40, 1)
    """
    return register_parametrization(module, name, _WeightNorm(dim), unsafe=True)


class _SpectralNorm(Module):
    # Built by `spectral_norm`.
    def __init__(
        self, weight: jax.Array, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.dim = checked_dim(weight, dim, "spectral_norm")
        require_positive(n_power_iterations, "spectral_norm")
        self.eps = eps
        if weight.ndim > 1:  # the norm of a vector needs no iteration
            self.n_power_iterations = n_power_iterations
            matrix = as_matrix(weight, self.dim)
            u, v = random_vectors(matrix, eps)
            u, v = power_iterations(matrix, u, v, n=15, eps=eps, u_first=True)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def forward(self, weight: jax.Array) -> Any:
        weight = unwrap(weight)
        if weight.ndim == 1:
            return normalised(weight, self.eps)
        u, v = self._u, self._v
        if self.training:
            matrix = as_matrix(weight, self.dim)
            u, v = power_iterations(
                matrix, u, v, n=self.n_power_iterations, eps=self.eps, u_first=True
            )
            self._u, self._v = u, v
        return divided_by_sigma(weight, u, v, self.dim)

    def right_inverse(self, value: jax.Array) -> Any:
        return value


def spectral_norm(
    module: Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> Module:
    """Divide a parameter by its largest singular value, estimated by power iteration.

    Each reading of the parameter in training mode iterates, and writes the vectors ``_u`` and ``_v``,
    which are buffers of ``parametrizations.<name>.0``; a pure call in training mode returns them with
    ``mutable=True``. In evaluation mode nothing is written.

    Args:
        module: it is changed.
        name: of the parameter; more than two axes are taken as a matrix, one axis as a vector, which is
            divided by its norm.
        n_power_iterations: how many steps each reading makes.
        eps: the smallest norm that is divided by.
        dim: the axis of the outputs; None for 1 in transposed convolutions and 0 elsewhere.

    Returns:
        The module.

    Raises:
        ValueError: if there is no such parameter, or for less than one iteration.
        IndexError: if it has no such axis.

    Source: Miyato et al. 2018; ``torch.nn.utils.parametrizations.spectral_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from statefulnn.utils.parametrizations import spectral_norm
        >>> layer = spectral_norm(nn.Linear(20, 40))
        >>> 0.9 < float(jnp.linalg.norm(layer.weight, 2)) < 1.1
        True
    """
    weight = _tensor(module, name)
    if dim is None:
        dim = output_dim(module)
    return register_parametrization(
        module, name, _SpectralNorm(weight, n_power_iterations, dim, eps)
    )
