"""A layer whose output is a fixed point: as many layers as it takes, in the memory of one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.conjugate_gradients import difference, norm, reachable
from statefulnn.core.errors import ConvergenceError, explain
from statefulnn.core.module import Module
from statefulnn.core.repeated import body_of_loop
from statefulnn.core.reports import fail_unless, lanes_of
from statefulnn.meta.implicit import implicit_gradient
from statefulnn.meta.per_step import require_steps
from statefulnn.transforms.functional_call import functionalize


class FixedPoint(Module):
    """The z with ``z = cell(z, *inputs)``: a deep equilibrium layer.

    It calls the cell until z no longer changes, and its gradients, by the cell's parameters and by the
    inputs, are those of the solution: they need one linear solve and no step. The cell has to contract, at
    least near the solution; it may not write state or draw random numbers, since it is called in a loop.

    Args:
        cell: a module that is called as ``cell(z, *inputs)`` and returns arrays of the shapes of z.
        steps: calls it at most as often.
        tol: stops where z changes by less, relative to its norm, or by the rounding of its numbers; None
            takes what `steps` give.
        solve: the linear solver of the gradient, as for `implicit_gradient`: `gmres` by default; `neumann`
            is cheaper.

    Shape:
        - inputs: what the cell takes; the first one has the shape of z, unless there is a `start`.
        - output: that of z.

    Raises:
        ConvergenceError: in a call, if z still changes after `steps`; in a gradient, if the linear solver
            misses its tolerance. From a raw ``jax.jit`` see `implicit_gradient`.

    Source: Bai, Kolter and Koltun 2019, Deep equilibrium models.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> class Cell(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3, 3)
        ...
        ...     def forward(self, z, x):
        ...         return jnp.tanh(0.5 * self.layer(z) + x)
        >>> layer = nn.meta.FixedPoint(Cell())
        >>> x = jnp.ones((2, 3))
        >>> z = layer(x)
        >>> bool(jnp.allclose(z, layer.cell(z, x), atol=1e-3))
        True
        >>> sorted(nn.grad(lambda layer: layer(x).sum())(layer))
        ['cell.layer.bias', 'cell.layer.weight']
    """

    def __init__(
        self,
        cell: Module,
        *,
        steps: int = 100,
        tol: float | None = 1e-4,
        solve: Callable | None = None,
    ) -> None:
        super().__init__()
        require_steps(steps, "FixedPoint")
        self.cell = cell
        self.steps, self.tol, self.solve = steps, tol, solve

    def forward(self, *inputs: object, start: object = None) -> Any:
        """Return the fixed point.

        Args:
            inputs: what the cell takes beside z.
            start: the first z; None for zeros of the first input's shape.
        """
        if start is None:
            start = jax.tree_util.tree_map(jnp.zeros_like, inputs[0])
        # A pure function: what a module is asked for in a loop of JAX's, becomes a constant there.
        fn, params = functionalize(self.cell)

        def step(z: object, params: object, *inputs: Any) -> Any:
            return fn(params, z, *inputs)

        solver = functools.partial(self._iterate, step)
        return implicit_gradient(solver, fixed_point=step, solve=self.solve)(start, params, *inputs)

    def _iterate(self, step: Callable, start: object, *args: Any) -> Any:
        tol = 0.0 if self.tol is None else reachable(self.tol, start)

        def more(carry: tuple) -> Any:
            _, change, count = carry
            return ~(change <= tol) & (count < self.steps)

        def one(carry: tuple) -> tuple:
            z, _, count = carry
            after = step(z, *args)
            scale = jnp.maximum(norm(after), float(jnp.finfo(jnp.float32).tiny))
            return after, norm(difference(after, z)) / scale, count + 1

        first = (start, jnp.asarray(jnp.inf, norm(start).dtype), 0)
        z, change, _ = jax.lax.while_loop(more, body_of_loop(one), first)
        fine = jnp.isfinite(change) if self.tol is None else change <= tol
        fail_unless(fine, functools.partial(_unsolved, self.steps, tol), change)
        return z

    def extra_repr(self) -> str:
        return f"steps={self.steps}, tol={self.tol}"


def _unsolved(steps: int, tol: float | None, fine: Any, change: Any) -> ConvergenceError:
    what = f"z still changes by {change.max():.1e} of its norm in step {steps}, above tol={tol:g}"
    if not np.isfinite(change).all():
        what = f"z is not finite after {steps} steps"
    return ConvergenceError(
        explain(
            f"a FixedPoint layer did not converge{lanes_of(fine)}: {what}",
            "its cell does not contract there, or does so slowly",
            "a cell that contracts, such as one with spectral_norm or a factor below 1 on z; "
            f"FixedPoint(cell, steps={10 * steps}), or a larger tol",
        )
    )
