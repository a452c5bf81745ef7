"""Conjugate gradients on trees of arrays, and what is said where a solver finds no solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import ConvergenceError, explain
from statefulnn.core.repeated import body_of_loop
from statefulnn.core.reports import fail_unless, lanes_of, staging
from statefulnn.core.scaling import exponent_of, shifted


def dot(a: Any, b: Any) -> Any:
    """Return the inner product of two trees of arrays, in float32 at least."""

    def one(a: Any, b: Any) -> Any:
        dtype = jnp.result_type(a)
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
        return jnp.vdot(a, b, precision="highest", preferred_element_type=wide).real

    return sum(jax.tree_util.tree_leaves(jax.tree_util.tree_map(one, a, b)))


def norm(tree: Any) -> Any:
    """Return the Euclidean norm of a tree of arrays, in float32 at least."""
    exponent = exponent_of(tree)
    unit = shifted(tree, -exponent)
    return shifted(jnp.sqrt(dot(unit, unit)), exponent)


def difference(a: Any, b: Any) -> Any:
    """Return ``a - b`` of two trees of arrays."""
    return jax.tree_util.tree_map(jnp.subtract, a, b)


def reachable(tol: float | None, tree: Any) -> float:
    """Return a relative tolerance, or the coarsest rounding of numbers of a tree if that is larger."""
    eps = [float(jnp.finfo(jnp.result_type(v)).eps) for v in jax.tree_util.tree_leaves(tree)]
    return max(tol or 0.0, *eps)


def _along(x: Any, length: Any, way: Any) -> Any:
    return jax.tree_util.tree_map(lambda x, w: x + length.astype(x.dtype) * w, x, way)


@dataclass(frozen=True)
class Solver:
    """A linear solver in the words of its messages.

    Attributes:
        call: how it was called, ``"nn.meta.cg(steps=100, tol=1e-05)"``.
        more: the call with more steps.
        damping: how to damp the matrix, with ``{:g}`` in place of the number.
        usual: a number that serves where the matrix is ill-conditioned.
        damped: what the matrix is damped by already.
        noun: what an index along a mapped axis counts.
    """

    call: str
    more: str
    damping: str
    usual: float
    damped: float = 0.0
    noun: str = "task"

    def solve(
        self, method: Callable, matvec: Callable, b: Any, tol: float | None
    ) -> tuple[Any, Any]:
        """Solve ``A x = b`` by a method, whatever the size of `b`, and check the solution.

        Args:
            method: ``method(matvec, b) -> (x, steps)``. It sees numbers near 1, so it may square them.
            matvec, b, tol: as `require_solution` takes them.

        Returns:
            x, and the number of steps; where that is not None and `tol` is, the method has checked x.
        """
        if not any(jnp.size(v) for v in jax.tree_util.tree_leaves(b)):
            return b, jnp.zeros((), jnp.int32)
        exponent = exponent_of(b)
        b = shifted(b, -exponent)
        x, steps = method(matvec, b)
        if tol is not None or steps is None:
            self.require_solution(matvec, b, x, tol, steps)
        return shifted(x, exponent), steps

    def require_solution(
        self, matvec: Callable, b: Any, x: Any, tol: float | None, steps: Any = None
    ) -> None:
        """Raise `ConvergenceError`, in compiled code too, if a residual is above ten times the tolerance.

        Args:
            matvec: ``x -> A x``.
            b, x: the right-hand side, and the solution.
            tol: relative to `b`; None looks for numbers that are not finite only.
            steps: how many there were, if that is known.
        """
        smallest = float(jnp.finfo(jnp.float32).tiny)
        residual = norm(difference(b, matvec(x))) / jnp.maximum(norm(b), smallest)
        # Ten times: the methods stop by a residual they update, which drifts from the true one.
        fine = jnp.isfinite(residual) if tol is None else residual <= 10 * reachable(tol, b)
        known = () if steps is None else (steps,)
        fail_unless(fine, self._unconverged, residual, *known)

    def _unconverged(self, fine: Any, residual: Any, steps: Any = None) -> ConvergenceError:
        if not np.isfinite(residual).all():
            return self._not_finite(np.isfinite(residual))
        after = "" if steps is None else f" after {int(steps[~fine].max())} steps"
        return ConvergenceError(
            explain(
                f"{self.call} did not converge{lanes_of(fine, self.noun)}: residual "
                f"{residual.max():.1e} relative to the right-hand side{after}",
                "what is computed from the solution, such as a gradient, would be wrong by about as much",
                f"more steps, {self.more}; {self.damping.format(self.usual)}, where the system is "
                "ill-conditioned; or "
                "tol=None to take what the steps give",
            )
        )

    def not_positive(self, fine: Any, curvature: Any, step: Any) -> ConvergenceError:
        """Return the error about a direction p with ``p·Ap / p·p``, the curvature, not above zero."""
        if np.isnan(curvature).any():
            return self._not_finite(np.isfinite(curvature))
        lowest = float(curvature.min())
        # The quotient bounds the smallest eigenvalue from above: that may be lower still.
        enough = self.damping.format(float(f"{1.05 * self.damped - 2 * lowest:.2g}") or self.usual)
        return ConvergenceError(
            explain(
                f"{self.call} met a direction p with p·Ap <= 0 in step {int(step[~fine].min())}"
                f"{lanes_of(fine, self.noun)}: the matrix is not positive definite, an eigenvalue is "
                f"{lowest:.2g} or lower",
                "conjugate gradients go down x·Ax / 2 - x·b, which has no minimum then; a Hessian away "
                "from a minimum is indefinite",
                f"{enough} or more; a larger penalty in the objective, or more inner steps; "
                "nn.curvature.ggn in place of a Hessian; or nn.meta.gmres(), where the solution is a saddle "
                "point",
            )
        )

    def preconditioner_not_positive(self, fine: Any) -> ConvergenceError:
        """Return the error about a residual r with ``r·Mr`` not above zero."""
        return ConvergenceError(
            explain(
                f"{self.call} was given a preconditioner M with r·Mr not above 0{lanes_of(fine, self.noun)}",
                "it stands for the inverse of a positive definite matrix",
                "damping in it, such as nn.curvature.kfac(...).damped(1e-2).inverse()",
            )
        )

    def _not_finite(self, fine: object) -> ConvergenceError:
        return ConvergenceError(
            explain(
                f"{self.call} met numbers that are not finite{lanes_of(fine, self.noun)}",
                "the right-hand side, or a product with the matrix, holds NaN or infinity",
                "look at the solution and at the loss of it; an inner solver that diverges wants a smaller "
                "learning rate",
            )
        )


def conjugate_gradients(
    matvec: Callable,
    b: Any,
    solver: Solver,
    *,
    tol: float | None,
    steps: int,
    precondition: Callable | None = None,
) -> tuple[Any, Any]:
    """Solve ``A x = b`` for a symmetric positive definite A; the solution is differentiable.

    Args:
        matvec: ``x -> A x`` on trees like `b`.
        b: the right-hand side.
        solver: whose messages are raised, also from compiled code and in the backward pass.
        tol: the residual to reach, relative to `b`; None takes what the steps give.
        steps: at most as many.
        precondition: ``r -> M r``, with M near the inverse of A, symmetric and positive definite.

    Returns:
        x, and the number of steps.

    Raises:
        ConvergenceError: if A or M is found to be not positive definite, whatever `tol` is; if the tolerance
            is missed; for numbers that are not finite.

    Source: Hestenes and Stiefel 1952.
    """

    def iterate(matvec: Callable, b: object) -> tuple[Any, Any]:
        return _iterate(matvec, b, solver, tol, steps, precondition)

    def solve(matvec: Callable, b: object) -> tuple[Any, Any]:
        return solver.solve(iterate, matvec, b, tol)

    with staging():
        return jax.lax.custom_linear_solve(
            matvec, b, solve, transpose_solve=solve, symmetric=True, has_aux=True
        )


def _iterate(
    matvec: Callable,
    b: object,
    solver: Solver,
    tol: float | None,
    steps: int,
    precondition: Callable | None,
) -> tuple[Any, Any]:
    # Below the rounding of the numbers a direction has no meaning, nor has its curvature.
    goal = reachable(tol, b) ** 2 * dot(b, b)
    near = precondition or (lambda r: r)

    def more(carry: tuple) -> Any:
        *_, square, drop, curvature, step = carry
        return (square > goal) & (drop > 0) & (curvature > 0) & (step < steps)

    def one(carry: tuple) -> tuple:
        x, r, p, _, drop, _, step = carry
        ap = matvec(p)
        height = dot(p, ap)
        length = jnp.where(height > 0, drop / height, 0)
        x, r = _along(x, length, p), _along(r, -length, ap)
        z = near(r)
        after = dot(r, z)
        return x, r, _along(z, after / drop, p), dot(r, r), after, height / dot(p, p), step + 1

    z, square = near(b), dot(b, b)
    zeros = jax.tree_util.tree_map(lambda v: v * 0, b)  # NaN where b is
    before = jnp.where(jnp.isfinite(square), 1.0, jnp.nan).astype(square.dtype)
    start = (zeros, b, z, square, dot(b, z), before, jnp.zeros((), jnp.int32))
    x, _, _, square, drop, curvature, step = jax.lax.while_loop(more, body_of_loop(one), start)
    fail_unless(curvature > 0, solver.not_positive, curvature, step)
    if precondition is not None:
        fine = (drop > 0) | (square <= goal) | ~(curvature > 0)
        fail_unless(fine, solver.preconditioner_not_positive)
    return x, step
