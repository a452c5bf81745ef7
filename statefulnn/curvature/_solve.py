"""Conjugate gradients that say when the matrix is not positive definite, and how reports reach the user."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import ConvergenceError, DivergenceWarning, explain
from statefulnn.core.reports import report_unless, warn


class Solved(NamedTuple):
    """What a solver knows of its solution."""

    indefinite: Any
    residual: Any
    steps: Any


def require(fine: Any, say: Callable[..., str], *values: Any) -> None:
    """Raise `ConvergenceError` unless all is fine; compiled code warns, since it cannot raise.

    Args:
        fine: one or more truth values.
        say: ``say(*values)`` is the message.
        values: arrays.
    """
    if not any(isinstance(v, Tracer) for v in (fine, *values)):
        if not np.all(fine):
            raise ConvergenceError(say(*map(np.asarray, values)))
        return

    def tell(fine: Any, *values: Any) -> None:
        lane = tuple(np.argwhere(~fine)[0])  # the first one of what is mapped
        warn(say(*(v[lane] for v in values)), DivergenceWarning)

    report_unless(jnp.all(fine), tell, *values)


def solve(apply: Callable, b: Any, tol: float, steps: int) -> tuple[Any, Solved]:
    """Solve ``A x = b`` by conjugate gradients; the solution is differentiable.

    Args:
        apply: ``x -> A x`` on flat vectors, A symmetric.
        b: the right-hand side, flat.
        tol: the residual to reach, relative to `b`.
        steps: at most as many.

    Returns:
        x, NaN if A is found to be not positive definite; and what happened.
    """
    return jax.lax.custom_linear_solve(
        apply,
        b,
        lambda apply, b: _iterate(apply, b, tol, steps),
        symmetric=True,
        has_aux=True,
    )


def _iterate(apply: Callable, b: Any, tol: float, steps: int) -> tuple[Any, Solved]:
    dot = functools.partial(jnp.vdot, precision="highest")
    target = tol**2 * dot(b, b)

    def unfinished(state: tuple) -> Any:
        _, _, _, squared, step, indefinite = state
        return (squared > target) & (step < steps) & ~indefinite

    def advance(state: tuple) -> tuple:
        x, r, p, squared, step, _ = state
        product = apply(p)
        curvature = dot(p, product)
        # As a negation, so that NaN ends the loop too.
        indefinite = ~(curvature > 0)
        length = jnp.where(indefinite, 0, squared / jnp.where(indefinite, 1, curvature))
        x, r = x + length * p, r - length * product
        new = dot(r, r)
        return x, r, r + new / squared * p, new, step + 1, indefinite

    start = (jnp.zeros_like(b), b, b, dot(b, b), 0, jnp.asarray(False))
    x, _, _, _, step, indefinite = jax.lax.while_loop(unfinished, advance, start)
    # The residual of the iteration drifts from the true one.
    residual = jnp.linalg.norm(b - apply(x)) / jnp.maximum(
        jnp.linalg.norm(b), jnp.finfo(b.dtype).tiny
    )
    return jnp.where(indefinite, jnp.nan, x), Solved(indefinite, residual, step)


def require_solved(solved: Solved, tol: float, steps: int) -> None:
    """Report a matrix that is not positive definite, or a residual above ten times the tolerance."""
    fine = ~solved.indefinite & (solved.residual <= 10 * tol)
    require(fine, functools.partial(_say_unsolved, tol, steps), solved.indefinite, solved.residual)


def _say_unsolved(tol: float, steps: int, indefinite: Any, residual: Any) -> str:
    what = f"A.inverse(tol={tol:g}, max_steps={steps}) "
    if np.any(indefinite):
        return not_positive_definite(what + "met a direction p with p·Ap not above 0")
    return explain(
        f"{what}left a residual of {np.max(residual):.1e} relative to the right-hand side",
        "the matrix is ill-conditioned, or singular; the solution is off by much",
        f"damping, A.damped(1e-3).inverse(); more steps, max_steps={10 * steps}; or a larger tol",
    )


def not_positive_definite(what: str) -> str:
    """Return the message about a matrix that is not positive definite."""
    return explain(
        what,
        "the matrix is not positive definite, or not finite: a Hessian away from a minimum is not",
        "damping, A.damped(1e-3) or more; a larger penalty in training, or more steps of it; or ggn in "
        "place of hessian",
    )
