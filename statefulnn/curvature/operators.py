"""Matrices known by their products with vectors, and the algebra of these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.conjugate_gradients import Solver, conjugate_gradients
from statefulnn.core.errors import ConvergenceError, DtypeError, ShapeError, explain
from statefulnn.core.failures import typed_failures, wait_for
from statefulnn.core.reports import lanes_of
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._spaces import Space
from statefulnn.transforms.types import PyTree

Scalar = int | float | jax.Array
STATIC = {"static": True}


@dataclass(frozen=True)
class Bound:
    """A function with its first arguments; it equals another one of the same, and so compiles once."""

    function: Callable
    arguments: tuple

    def __call__(self, *args: Any) -> Any:
        return self.function(*self.arguments, *args)


@dataclass(frozen=True, eq=False, repr=False)
class LinearOperator:
    """A matrix that is known by its products with vectors.

    `hessian`, `ggn`, `fisher`, `empirical_fisher`, `jacobian` and `tangent_kernel` make those of a model,
    `LinearOperator.of` makes one of any function. It is a pytree: compiled functions take and return it, and
    `jax.vmap` maps over its arrays. Products outside of compiled code are compiled once for each structure.

    A vector is a tree like the parameters, for a module a dict of name -> array; or it is flat, ``(P,)``,
    with the parameters in the order of ``named_parameters()`` (of a function that `functionalize` did not
    make, in the order of ``jax.tree.leaves``). A product comes in the form in which the vector was given.

    =========================  ============================================================================
    ``A @ v``                  the product with a vector; with ``(P, k)``, the product with k columns
    ``A.T``                    the transpose
    ``A + B``, ``A - B``       of operators of equal structure
    ``2 * A``, ``A * c``       c a number or a traced scalar
    ``A @ B``                  the product of two operators
    ``A.damped(c)``            ``A + c I``
    ``A.inverse()``            ``A⁻¹`` by conjugate gradients, for a symmetric positive definite A
    ``A.to_dense()``           the matrix
    =========================  ============================================================================

    Source: Dangel et al. 2025, "Position: Curvature matrices should be democratized via linear operators",
    https://arxiv.org/abs/2501.19183, for the idea.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros((2, 1))
        >>> hessian = nn.curvature.hessian(model, F.mse_loss, (x, y))
        >>> hessian.to_dense().tolist()  # 2/N Xᵀ X, the bias last
        [[10.0, 14.0, 4.0], [14.0, 20.0, 6.0], [4.0, 6.0, 2.0]]
        >>> step = hessian.damped(0.1).inverse() @ nn.grad(lambda m: F.mse_loss(m(x), y))(model)
        >>> step["weight"].shape
        (1, 2)
    """

    source: Space = field(metadata=STATIC)
    target: Space = field(metadata=STATIC)
    symmetric: bool = field(metadata=STATIC)

    def _run(self, vector: PyTree, many: bool) -> Any:
        """Return the product with a tree, or with many, stacked along a new first axis."""
        raise NotImplementedError

    def _transposed(self) -> LinearOperator:
        """Return the transpose of an operator that is not symmetric."""
        raise NotImplementedError

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self if self.symmetric else self._transposed()

    @staticmethod
    def of(
        product: Callable[[Any, Any], Any],
        like: object,
        operands: object = (),
        *,
        symmetric: bool = False,
    ) -> LinearOperator:
        """Return the operator of a function.

        Args:
            product: ``product(operands, v) -> A v``, linear in v.
            like: a vector, or its shapes and dtypes, ``jax.ShapeDtypeStruct``.
            operands: the arrays that the function uses. What it finds in a closure is a constant of compiled
                code.
            symmetric: whether the matrix equals its transpose.

        Returns:
            a `LinearOperator`, whose transpose JAX derives.

        Raises:
            ShapeError: if it is called symmetric, and product and vector differ in structure.

        Example:
            >>> matrix = jnp.array([[1.0, 2.0], [3.0, 4.0]])
            >>> operator = nn.curvature.LinearOperator.of(
            ...     lambda matrix, v: matrix @ v, jnp.zeros(2), matrix
            ... )
            >>> (operator.T @ jnp.array([1.0, 0.0])).tolist()
            [1.0, 2.0]
        """
        source = Space.of(like)
        target = Space.of(jax.eval_shape(product, operands, source.structure))
        if symmetric and source != target:
            raise ShapeError(
                explain(
                    f"LinearOperator.of(symmetric=True) was given a function from {source.structure} to "
                    f"{target.structure}",
                    "a symmetric matrix takes and returns vectors of one structure",
                    "symmetric=False, or a function that returns the structure of its vector",
                )
            )
        adjoint = product if symmetric else Bound(_transposed, (product, source))
        return Leaf(source, target, symmetric, operands, product, adjoint)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.target.size, self.source.size

    @property
    def dtype(self) -> Any:
        """The dtype of flat vectors: float32 at least."""
        return self.source.dtype

    @property
    def in_structure(self) -> Any:
        """Shapes and dtypes of the vectors it takes."""
        return self.source.structure

    @property
    def out_structure(self) -> Any:
        """Shapes and dtypes of the vectors it returns."""
        return self.target.structure

    def flatten(self, vector: object) -> jax.Array:
        """Return a vector that the operator takes as ``(P,)``."""
        return self.source.flatten(self.source.take(vector, False, "A.flatten(v)")[0])

    def unflatten(self, flat: ArrayLike) -> Any:
        """Return a vector ``(P,)`` as a tree."""
        return self.source.take(flat, False, "A.unflatten(v)")[0]

    @shortened
    def matvec(self, vector: object) -> Any:
        """Return the product with one vector, a tree or flat ``(P,)``."""
        tree, flat = self.source.take(vector, False, "A @ v")
        out = self._run(tree, False)
        return self.target.flatten(out) if flat else out

    @shortened
    def matmat(self, vectors: object) -> Any:
        """Return the products with k vectors, which are worked on together.

        Args:
            vectors: columns ``(P, k)``, or a tree whose arrays have one more axis of length k, the first.

        Returns:
            ``(rows, k)``, or such a tree.
        """
        trees, flat = self.source.take(vectors, True, "A.matmat(V)")
        out = self._run(trees, True)
        return jax.vmap(self.target.flatten, out_axes=1)(out) if flat else out

    @shortened
    def to_dense(self) -> jax.Array:
        """Return the matrix, ``(rows, columns)``: for small ones, since all columns are made together."""
        return self.matmat(jnp.eye(self.source.size, dtype=self.dtype))

    def damped(self, damping: Scalar) -> LinearOperator:
        """Return ``A + damping I``."""
        return self + scalar(damping, "A.damped(c)") * identity(self.source)

    @shortened
    def inverse(
        self,
        tol: float | None = 1e-5,
        max_steps: int = 1000,
        preconditioner: LinearOperator | None = None,
    ) -> LinearOperator:
        """Return the inverse of a symmetric positive definite operator, by conjugate gradients.

        Each product with it is a solve. It is differentiable, by the vector and by the operator's arrays.

        Args:
            tol: the residual to reach, relative to the right-hand side; None takes what the steps give.
            max_steps: at most as many products with the operator for each solve.
            preconditioner: an operator that is near the inverse, symmetric and positive definite, for fewer
                steps: ``kfac(...).damped(c).inverse()``, say.

        Raises:
            TypeError: if the operator, or the preconditioner, is not symmetric.
            ShapeError: if the preconditioner takes other vectors.
            ConvergenceError: by a product, if the operator is found to be not positive definite, or the
                tolerance is not reached. From a raw ``jax.jit`` it is a ``jax.errors.JaxRuntimeError`` with
                this text; both are RuntimeError.

        Source: Hestenes and Stiefel 1952.

        Example:
            >>> A = nn.curvature.LinearOperator.of(lambda _, v: 2 * v, jnp.zeros(2), symmetric=True)
            >>> (A.inverse() @ jnp.ones(2)).tolist()
            [0.5, 0.5]
        """
        require_symmetric(self, "A.inverse()", "(A.T @ A).damped(1e-3).inverse() @ A.T")
        check_count(max_steps, 1, "max_steps", "A.inverse()")
        if preconditioner is not None:
            require_symmetric(preconditioner, "A.inverse(preconditioner=M)", "M.T @ M")
            _require_equal(self.source, preconditioner.source, "A.inverse()", "the preconditioner")
        return Inverse(self.source, self.target, True, self, preconditioner, tol, max_steps)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            _require_equal(self.source, other.target, "A @ B", "what B returns")
            gram = _are_transposes(self, other)
            return Product(other.source, self.target, gram, self, other)
        columns = getattr(other, "ndim", 0) == 2 and other.shape[0] == self.source.size
        if columns and other.shape != self.source.leaves[0].shape:
            return self.matmat(other)
        return self.matvec(other)

    def __add__(self, other: object) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            raise TypeError(
                explain(
                    f"added {type(other).__name__} to a LinearOperator",
                    "operators are added to operators; a number could mean its multiple of the identity, or "
                    "be added to each entry",
                    "A.damped(c) for A + c I",
                )
            )
        _require_equal(self.source, other.source, "A + B", "what B takes")
        _require_equal(self.target, other.target, "A + B", "what B returns")
        symmetric = self.symmetric and other.symmetric
        return Sum(self.source, self.target, symmetric, self, other)

    def __mul__(self, factor: Scalar) -> LinearOperator:
        factor = scalar(factor, "A * c")
        return Scaled(self.source, self.target, self.symmetric, self, factor)

    # numpy's and JAX's numbers would otherwise try to multiply each entry.
    __array_ufunc__ = None
    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-other)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape[0]} x {self.shape[1]}>"


@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Leaf(LinearOperator):
    """A function ``product(operands, v)``, and that of the transpose."""

    operands: Any
    product: Callable = field(metadata=STATIC)
    adjoint: Callable = field(metadata=STATIC)

    def _run(self, vector: PyTree, many: bool) -> Any:
        return _compiled(self.product, many, self.operands, vector)

    def _transposed(self) -> LinearOperator:
        return Leaf(self.target, self.source, False, self.operands, self.adjoint, self.product)


@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearOperator):
    """A + B."""

    first: LinearOperator
    second: LinearOperator

    def _run(self, vector: PyTree, many: bool) -> Any:
        return jax.tree.map(jnp.add, self.first._run(vector, many), self.second._run(vector, many))

    def _transposed(self) -> LinearOperator:
        return self.first.T + self.second.T


@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Scaled(LinearOperator):
    """c A."""

    operator: LinearOperator
    factor: Any

    def _run(self, vector: PyTree, many: bool) -> Any:
        out = self.operator._run(vector, many)
        return jax.tree.map(lambda a: a * self.factor.astype(a.dtype), out)

    def _transposed(self) -> LinearOperator:
        return self.operator.T * self.factor


@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Product(LinearOperator):
    """A B."""

    first: LinearOperator
    second: LinearOperator

    def _run(self, vector: PyTree, many: bool) -> Any:
        return self.first._run(self.second._run(vector, many), many)

    def _transposed(self) -> LinearOperator:
        return self.second.T @ self.first.T


@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Inverse(LinearOperator):
    """A⁻¹ of a symmetric A."""

    operator: LinearOperator
    preconditioner: LinearOperator | None
    tol: float | None = field(metadata=STATIC)
    max_steps: int = field(metadata=STATIC)

    def _run(self, vector: PyTree, many: bool) -> Any:
        return _solved(self, vector, many)

    def solve(self, vector: PyTree) -> Any:
        """Return ``A⁻¹ v`` of a tree."""
        A, M, tol = self.operator, self.preconditioner, self.tol
        given = f"tol={tol if tol is None else format(tol, 'g')}, max_steps="
        solver = Solver(
            call=f"A.inverse({given}{self.max_steps})",
            more=f"A.inverse({given}{10 * self.max_steps})",
            damping="damping, A.damped({:g}).inverse()",
            usual=1e-3,
            noun="vector",
        )
        out, _ = conjugate_gradients(
            flat_product(A),
            A.source.flatten(vector),
            solver,
            tol=tol,
            steps=self.max_steps,
            precondition=None if M is None else flat_product(M),
        )
        return A.source.unflatten(out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(product: Callable, many: bool, operands: PyTree, vector: PyTree) -> Any:
    run = functools.partial(product, operands)
    return jax.vmap(run)(vector) if many else run(vector)


def checked_jit(function: Callable, static_argnums: int | tuple[int, ...] = ()) -> Callable:
    """Compile a function that may multiply with an inverse; where a solve fails, the error is ours."""
    compiled = jax.jit(function, static_argnums=static_argnums)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with typed_failures():
            out = compiled(*args)
        wait_for(out)
        return out

    return call


@functools.partial(checked_jit, static_argnums=2)
def _solved(inverse: Inverse, vector: PyTree, many: bool) -> Any:
    return jax.vmap(inverse.solve)(vector) if many else inverse.solve(vector)


def _transposed(product: Callable, source: Space, operands: PyTree, vector: PyTree) -> Any:
    return jax.linear_transpose(functools.partial(product, operands), source.structure)(vector)[0]


def _same(operands: PyTree, vector: PyTree) -> Any:
    return vector


def identity(space: Space) -> LinearOperator:
    """Return the identity."""
    return Leaf(space, space, True, (), _same, _same)


def flat_product(A: LinearOperator) -> Callable:
    """Return ``v -> A v`` on flat vectors."""
    return lambda flat: A.target.flatten(A._run(A.source.unflatten(flat), False))


def scalar(value: ArrayLike, function: str) -> Any:
    """Return a number as an array without axes."""
    array = value if isinstance(value, Tracer) else jnp.asarray(value)
    if jnp.shape(array) != () or not jnp.issubdtype(array.dtype, jnp.number):
        raise ShapeError(
            explain(
                f"{function} was given an array of shape {jnp.shape(array)} as c",
                "an operator is multiplied by one number",
                "a number; or A @ v for the product with a vector",
            )
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise DtypeError(
            explain(
                f"{function} was given a number of dtype {array.dtype} as c",
                "the operator is real",
                "a real number; multiply the products, which are arrays: (A @ v) * 1j",
            )
        )
    return array


def check_count(value: object, least: int, option: str, function: str) -> None:
    """Raise unless a value is a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            explain(
                f"{function} was given {option}={value!r}",
                f"it is a whole number of at least {least}",
                f"{option}={max(least, 10)}",
            )
        )


def require_symmetric(A: object, function: str, instead: str) -> None:
    """Raise unless A is an operator that is known to be symmetric."""
    if not isinstance(A, LinearOperator):
        raise TypeError(
            explain(
                f"{function} was given {type(A).__name__} as its operator",
                "it multiplies the operator with vectors",
                "nn.curvature.hessian(model, loss, data), ggn, fisher, or LinearOperator.of(...)",
            )
        )
    if not A.symmetric:
        raise TypeError(
            explain(
                f"{function} was given an operator of shape {A.shape} that is not known to be symmetric",
                "its method is one for symmetric matrices",
                f"{instead}; or LinearOperator.of(..., symmetric=True)",
            )
        )


def not_positive_definite(
    function: str, fine: np.ndarray, smallest: np.ndarray
) -> ConvergenceError:
    """Return the error about an eigenvalue that is not above zero."""
    return ConvergenceError(
        explain(
            f"{function} met the eigenvalue {smallest[~fine].min():.1e}{lanes_of(fine, 'operator')}",
            "the matrix is not positive definite, or not finite: a Hessian away from a minimum is not",
            "damping, A.damped(1e-3) or more; a larger penalty in training, or more steps of it; or ggn in "
            "place of hessian",
        )
    )


def _are_transposes(a: LinearOperator, b: LinearOperator) -> bool:
    return (
        isinstance(a, Leaf)
        and isinstance(b, Leaf)
        and a.operands is b.operands
        and (a.product, a.adjoint) == (b.adjoint, b.product)
    )


def _require_equal(one: Space, two: Space, function: str, which: str) -> None:
    if one == two:
        return
    mine, other = (dict(zip(s.names, s.leaves, strict=True)) for s in (one, two))
    names = [n for n in {**mine, **other} if mine.get(n) != other.get(n)]
    differs = (
        f"they differ in {names[0]!r}" if names and names[0] else "they differ in shape or order"
    )
    raise ShapeError(
        explain(
            f"{function} was given operators that do not fit: {one.size} numbers, and {two.size} of {which}",
            f"{differs}: vectors of both have the same names, shapes and dtypes",
            "make both of the same model and subset",
        )
    )
