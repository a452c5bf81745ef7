"""Gradients through solutions: the implicit function theorem instead of an unrolled solver.

A solution x*(a) of ``F(x, a) = 0`` has the derivative ``dx = -(dF/dx)^-1 dF/da da``. It needs the
solution and one linear solve, not the steps that led there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.conjugate_gradients import (
    Solver,
    conjugate_gradients,
    difference,
    norm,
    reachable,
)
from statefulnn.core.errors import ConvergenceError, TraceLeakError, explain
from statefulnn.core.reports import fail_unless, lanes_of, staging
from statefulnn.core.tracebacks import shortened
from statefulnn.meta._closures import hoisted
from statefulnn.transforms.differentiate import function_name


@shortened
def implicit_gradient(
    solver: Callable,
    *,
    objective: Callable | None = None,
    optimality: Callable | None = None,
    fixed_point: Callable | None = None,
    solve: Any = None,
    tolerance: float | None = None,
) -> Callable:
    """Return a solver whose derivative is that of the solution, whatever the solver does.

    Exactly one condition says what the solution satisfies. It is differentiated by `args`, and by the traced
    values that the functions find in their closures, such as the parameters of ``self`` in a forward. A
    module may be among `args` as well.

    Args:
        solver: ``solver(init, *args) -> x``, any code; it is never differentiated. One that looks at values
            (a ``while`` of Python) runs outside of compiled code, and may find no traced value in its
            closure.
        objective: ``objective(x, *args) -> scalar``, which the solution minimises.
        optimality: ``optimality(x, *args)``, of x's structure, which is zero at the solution.
        fixed_point: ``fixed_point(x, *args)``, which returns x at the solution.
        solve: how to solve the linear system: `cg` (the default for an objective), `gmres` (the default
            for the others), `neumann`, or any ``solve(matvec, b) -> x``.
        tolerance: the largest norm of the condition at the solution; None does not look.

    Returns:
        ``function(init, *args) -> x``, differentiable by `args` in forward and reverse mode, any number
        of times. The derivative by `init` is zero.

    Raises:
        TypeError: unless exactly one condition is given.
        TraceLeakError: for a solver that looks at values and is differentiated by one from its closure.
        ConvergenceError: if the linear solver misses its tolerance, or the solution its `tolerance`. In
            code that is compiled by a raw ``jax.jit``, JAX has one class for all that goes wrong while it
            runs, ``jax.errors.JaxRuntimeError``, with the text of this one; both are RuntimeError.

    Source: Rajeswaran et al. 2019 (implicit MAML); Blondel et al. 2022, Efficient and modular implicit
    differentiation.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> ridge = lambda w, penalty: ((w - 1) ** 2).sum() + penalty * (w**2).sum()
        >>> descend = lambda init, penalty: (
        ...     nn.meta.adapt(None, init, ridge, (penalty,), lr=0.2, steps=50).params
        ... )
        >>> fit = nn.meta.implicit_gradient(descend, objective=ridge)
        >>> slope = jax.grad(lambda penalty: fit(jnp.zeros(2), penalty).sum())(1.0)
        >>> round(float(slope), 4)  # w = 1 / (1 + penalty)
        -0.5
    """
    given = {"objective": objective, "optimality": optimality, "fixed_point": fixed_point}
    chosen = [name for name, function in given.items() if function is not None]
    if len(chosen) != 1:
        raise TypeError(
            explain(
                f"called implicit_gradient with {' and '.join(chosen) or 'no condition'}",
                "one condition says what the solution satisfies",
                "pass one of objective=, optimality=, fixed_point=",
            )
        )
    condition = _condition(objective, optimality, fixed_point)
    linear_solve = solve if solve is not None else (cg() if objective is not None else gmres())
    if not callable(linear_solve):
        raise TypeError(
            explain(
                f"called implicit_gradient with solve={solve!r}",
                "the linear solver is a function of a matrix-vector product and a right-hand side",
                "nn.meta.cg(), nn.meta.gmres(), nn.meta.neumann(), or a function solve(matvec, b)",
            )
        )

    @functools.wraps(solver)
    @shortened
    def function(init: Any, *args: Any, **named: Any) -> Any:
        if named:
            raise TypeError(
                explain(
                    f"called the solution of {function_name(solver)} with {listed(named)} by name",
                    "solver and condition take the same arguments, by position",
                    f"fit(init, ..., {', '.join(named)}), in the order of the solver's arguments",
                )
            )
        functions, values = _of_closures(solver, condition, init, args)
        solution = _differentiable(
            *functions, linear_solve, tolerance, symmetric=objective is not None
        )
        try:
            return solution(jax.lax.stop_gradient(init), *args, *values)
        except jax.errors.UnexpectedTracerError as error:
            raise TraceLeakError(
                explain(
                    f"differentiated {function_name(solver)} by a value that it takes from a closure",
                    "it looks at its values, so it cannot be traced to find out which ones it takes",
                    "pass the value: fit(init, value), and solver(init, value), objective(x, value); or loop "
                    "with jax.lax.while_loop in the solver",
                )
            ) from error

    return function


_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _of_closures(
    solver: Callable, condition: Callable, init: object, args: tuple
) -> tuple[tuple[Callable, Callable], tuple]:
    """Return solver and condition as functions of one more argument each, the values of their closures."""
    if current_trace() is EAGER:  # nothing is traced
        return (solver, condition), ()
    try:
        with staging():
            solve = hoisted(solver, init, *args)
            holds = hoisted(condition, solve.shapes, *args)
    except _LOOKS_AT_VALUES:
        return (solver, condition), ()

    def solved(init: object, *args: Any) -> Any:
        return solve.call(args[-2], init, *args[:-2])

    def held(x: object, *args: Any) -> Any:
        return holds.call(args[-1], x, *args[:-2])

    return (solved, held), (solve.values, holds.values)


def _differentiable(
    solver: Callable,
    condition: Callable,
    linear_solve: Callable,
    tolerance: float | None,
    symmetric: bool,
) -> Callable:
    """Return a solver whose derivative is that of a solution of ``condition(x, *args) = 0``."""

    @jax.custom_jvp
    def solution(init: object, *args: Any) -> Any:
        x = solver(init, *args)
        if tolerance is not None:
            size = norm(condition(x, *args))
            fail_unless(size <= tolerance, functools.partial(_unsolved, tolerance), size)
        return x

    @solution.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        init, *args = primals
        x = solution(init, *args)

        def of_args(*args: Any) -> Any:
            return condition(x, *args)

        def matvec(v: object) -> Any:
            return jax.jvp(lambda x: condition(x, *args), (x,), (v,))[1]

        _, b = jax.jvp(of_args, tuple(args), tuple(tangents[1:]))
        with staging():
            minus = jax.lax.custom_linear_solve(
                matvec, b, linear_solve, transpose_solve=linear_solve, symmetric=symmetric
            )
        return x, jax.tree_util.tree_map(jnp.negative, minus)

    return solution


def listed(names: Any) -> str:
    """Return names for a message."""
    return ", ".join(f"{name}=" for name in names)


def _condition(objective: Any, optimality: Any, fixed_point: Any) -> Callable:
    """Return what is zero at the solution."""
    if objective is not None:
        return jax.grad(objective)
    if optimality is not None:
        return optimality
    return lambda x, *args: difference(x, fixed_point(x, *args))


# --------------------------------------------------------------------------------------------------
# Linear solvers: solve(matvec, b) -> x, on pytrees


def cg(steps: int = 100, tol: float | None = 1e-5, damping: float = 0.0) -> Callable:
    """Return a conjugate-gradient solver, for symmetric positive definite systems.

    The Hessian of an objective is one at a minimum. Where the inner solver stopped early it may not be, and
    then no step has a meaning: that raises, whatever `tol` is.

    Args:
        steps: at most as many.
        tol: the residual to reach, relative to the right-hand side; None takes what `steps` give, as
            implicit MAML does with few steps.
        damping: added to the diagonal, for a system that is singular, ill-conditioned or indefinite.

    Raises:
        ConvergenceError: when it solves, if the matrix is not positive definite along a direction that it
            meets, or if it misses `tol`.

    Source: Hestenes and Stiefel 1952.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.meta.cg()(lambda v: 2 * v, jnp.ones(2)).tolist()
        [0.5, 0.5]
    """
    solver = _solver("cg", steps, tol, damping)

    def solve(matvec: Callable, b: object) -> Any:
        return conjugate_gradients(_damped(matvec, damping), b, solver, tol=tol, steps=steps)[0]

    return solve


def gmres(steps: int = 20, tol: float | None = 1e-5, damping: float = 0.0) -> Callable:
    """Return a GMRES solver, for any invertible system; restarted every 20 products.

    Args:
        steps: at most as many restarts.
        tol: the residual to reach, relative to the right-hand side; None does not look.
        damping: added to the diagonal.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> turn = lambda v: jnp.stack([-v[1], v[0]])
        >>> nn.meta.gmres()(turn, jnp.array([0.0, 1.0])).round(5).tolist()
        [1.0, 0.0]
    """
    solver = _solver("gmres", steps, tol, damping)

    def restarted(matvec: Callable, b: object) -> tuple[Any, None]:
        # JAX's works with a factorisation that LAPACK does not have in half precision.
        product = lambda v: _wide(matvec(_like(v, b)))
        goal = 0.0 if tol is None else reachable(tol, b)
        x = jax.scipy.sparse.linalg.gmres(product, _wide(b), tol=goal, maxiter=steps)[0]
        return _like(x, b), None

    def scaled(matvec: Callable, b: object) -> Any:
        return solver.solve(restarted, matvec, b, tol)[0]

    def solve(matvec: Callable, b: object) -> Any:
        # So that a right-hand side is scaled in derivatives as well.
        with staging():
            return jax.lax.custom_linear_solve(
                _damped(matvec, damping), b, scaled, transpose_solve=scaled
            )

    return solve


def neumann(steps: int = 10, lr: float = 1.0, tol: float | None = None) -> Callable:
    """Return a solver by the Neumann series ``x = lr * sum_k (1 - lr A)^k b``.

    It converges where ``|1 - lr A| < 1``: for a Hessian where `lr` is a step size that descends, for a
    fixed point with ``lr=1`` where the map contracts. Few terms give a biased, cheap gradient (Lorraine
    et al. 2020).

    Args:
        steps: the number of terms after the first, at least one.
        lr: the step size.
        tol: the residual to reach, relative to the right-hand side; None does not look.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.meta.neumann(steps=50, lr=0.4)(lambda v: 2 * v, jnp.ones(1)).round(5).tolist()
        [0.5]
    """
    solver = _solver("neumann", steps, tol)

    def series(matvec: Callable, b: object) -> tuple[Any, None]:
        def term(carry: tuple, _: None) -> tuple[tuple, None]:
            total, power = carry
            power = jax.tree_util.tree_map(lambda p, a: p - lr * a, power, matvec(power))
            return (jax.tree_util.tree_map(jnp.add, total, power), power), None

        (total, _), _ = jax.lax.scan(term, (b, b), length=steps)
        return jax.tree_util.tree_map(lambda v: lr * v, total), None

    def solve(matvec: Callable, b: object) -> Any:
        return solver.solve(series, matvec, b, tol)[0]

    return solve


def _solver(name: str, steps: int, tol: float | None, damping: Any = 0.0) -> Solver:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name}: steps must be a positive integer, got {steps!r}")
    if isinstance(tol, Tracer):
        raise TypeError(
            explain(
                f"nn.meta.{name} was given a traced tol",
                "it says where to stop, which has no derivative, and its message names the number",
                "a number of Python; or tol=None and a number of steps",
            )
        )
    return Solver(
        call=f"nn.meta.{name}(steps={steps}" + (")" if tol is None else f", tol={tol:g})"),
        more=f"nn.meta.{name}(steps={10 * steps})",
        damping="a smaller lr" if name == "neumann" else f"damping, nn.meta.{name}(damping={{:g}})",
        usual=10.0,
        damped=0.0 if isinstance(damping, Tracer) else float(damping),
    )


def _like(tree: object, other: object) -> Any:
    return jax.tree_util.tree_map(lambda v, o: v.astype(jnp.result_type(o)), tree, other)


def _wide(tree: object) -> Any:
    """Return arrays of float32 in place of those in half precision."""
    half = lambda v: jnp.finfo(v.dtype).bits < 32
    return jax.tree_util.tree_map(lambda v: v.astype(jnp.float32) if half(v) else v, tree)


def _damped(matvec: Callable, damping: float) -> Callable:
    if not isinstance(damping, Tracer) and not damping:
        return matvec
    return lambda v: jax.tree_util.tree_map(lambda a, v: a + damping * v, matvec(v), v)


def _unsolved(tolerance: float, fine: Any, size: Any) -> ConvergenceError:
    return ConvergenceError(
        explain(
            f"the solver of implicit_gradient ended{lanes_of(fine)} where the condition has norm "
            f"{size.max():.1e}, above tolerance={tolerance:g}",
            "the theorem holds at a solution; elsewhere the gradient is wrong",
            "more steps in the solver, or a larger tolerance",
        )
    )
