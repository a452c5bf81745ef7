"""Inner loops that stop by themselves: after a traced number of steps, at a tolerance, or early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from statefulnn.core.conjugate_gradients import norm
from statefulnn.core.errors import DivergenceWarning, NotDifferentiableError, explain
from statefulnn.core.names import Filter
from statefulnn.core.repeated import body_of_loop
from statefulnn.core.reports import lanes_of, report_unless, warn
from statefulnn.core.tracebacks import shortened
from statefulnn.meta._cotangents import not_backwards
from statefulnn.meta.adapt import InnerTask, Loop
from statefulnn.meta.inner_optimizer import MOST_STEPS
from statefulnn.meta.per_step import is_rows, require_steps


class Stopped(NamedTuple):
    """What an inner loop ended with that stopped by itself.

    Attributes:
        params: the parameters at the end; with `validate` the best ones.
        state: the state there (None without one).
        slots: the optimizer's state there (empty without one).
        loss: the loss before the last step.
        gradient_norm: the norm of its gradient there.
        steps: how many steps led to the parameters, an int32 scalar.
    """

    params: Any
    state: Any
    slots: Any
    loss: Any
    gradient_norm: Any
    steps: Any


@shortened
def adapt_until(
    fn: Callable | None,
    params: object,
    loss: Callable,
    data: object,
    *separate: object,
    steps: int | jax.Array | Callable,
    tol: float | None = None,
    validate: Callable | None = None,
    patience: int = 1,
    optimizer: object = None,
    slots: object = None,
    lr: object = None,
    only: Filter = None,
    state: Mapping[str, object] | None = None,
    rng: jax.Array | None = None,
    first_order: bool = False,
    truncate: int | None = None,
) -> Stopped:
    """Take optimisation steps on one task until it is time to stop; under ``jax.vmap`` each task stops alone.

    The loop is a ``jax.lax.while_loop``: it is differentiable in forward mode (``jax.jvp``, ``jax.jacfwd``).
    In reverse mode pass `truncate`, or wrap it in `implicit_gradient`, which needs the solution alone.

    Args:
        fn, params, loss, data, separate: as for `adapt`.
        steps: at most as many; the number may be traced.
        tol: stops after a step in front of which the gradient's norm was at most so large; it may be traced.
            None does not look.
        validate: ``validate(params) -> scalar``, with `state` ``validate(params, state)``: the loop stops
            when the best value is `patience` steps old, and returns what gave it. NaN is the worst value.
        patience: how many steps without a better value end the loop.
        optimizer, slots, lr, only, state, rng, first_order: as for `adapt`, without `PerStep` values.
        truncate: differentiates through the last `truncate` steps only, in both modes; how many steps are
            taken has no derivative. The parameters before each of them are kept. What came before is a
            constant: after more steps the derivative by `params` is zero.

    Returns:
        `Stopped`. A loss or gradient that is not finite ends the loop too, with a `DivergenceWarning`, which
        names the tasks; so does a validation that is never finite.

    Raises:
        NotDifferentiableError: in reverse mode (and `jax.linearize`) without `truncate`.
        TypeError: for `PerStep` values, and as `adapt` does.

    Source: Shaban, Cheng, Hatch and Boots 2019, Truncated back-propagation for bilevel optimization.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> valley = lambda w, scale: (scale * w**2).sum()
        >>> solve = lambda scale: nn.meta.adapt_until(
        ...     None, jnp.ones(2), valley, (scale,), lr=0.1, steps=100, tol=1e-3
        ... )
        >>> jax.vmap(solve)(jnp.array([1.0, 4.0])).steps.tolist()
        [37, 7]
    """
    _check_options(steps, patience, truncate)
    task = InnerTask.of("adapt_until", locals())
    if any(map(is_rows, jax.tree_util.tree_leaves((params, state, lr), is_leaf=is_rows))):
        raise TypeError(
            explain(
                "adapt_until was given values of PerStep",
                "they have a row for each step, and the number of steps is not known",
                "nn.meta.adapt(..., steps=...), or one value for all steps",
            )
        )
    loop = Loop(task, steps if isinstance(steps, int) else MOST_STEPS)
    return _Until(loop, steps, tol, validate, patience, truncate).run()


class _Kept(NamedTuple):
    """A place in the loop: how to get there again.

    Attributes:
        carry: what is carried from step to step.
        ring: what was carried before each of the last steps, step i in row ``i % rows``; None without.
        count, loss, size: the number of steps so far; the last loss, and the norm of its gradient.
    """

    carry: Any
    ring: Any
    count: Any
    loss: Any
    size: Any


@dataclasses.dataclass(frozen=True)
class _Until:
    """A loop, and when it stops."""

    loop: Loop
    steps: Any
    tol: Any
    validate: Callable | None
    patience: int
    truncate: int | None

    def run(self) -> Stopped:
        loop = self.loop
        constants = (loop.lr, loop.fixed, loop.data)
        if self.truncate is None:
            kept = self._stopped(constants, loop.start)
            return self._shown(not_backwards(kept, _refuse_reverse_mode))
        stop = jax.lax.stop_gradient
        kept = stop(self._stopped(stop(constants), stop(loop.start)))
        return self._shown(self._again(constants, loop.start, kept))

    def _stopped(self, constants: tuple, start: Any) -> _Kept:
        """Run the loop to its end."""
        value = jax.eval_shape(lambda: self.loop.step(constants, start, (0, None))[1])
        number = jnp.zeros((), value.dtype)
        rows = self.truncate or 0
        ring = jax.tree_util.tree_map(lambda v: jnp.zeros((rows, *v.shape), v.dtype), start)
        now = _Kept(start, ring, jnp.zeros((), jnp.int32), number, number + jnp.inf)
        validate = self.validate
        best = None if validate is None else (now, self._validated(validate, start))

        def more(all_of_it: tuple) -> Any:
            now, best = all_of_it
            going = (now.count < self.steps) & jnp.isfinite(now.loss) & ~jnp.isnan(now.size)
            if self.tol is not None:
                going &= now.size > self.tol
            return going if best is None else going & (now.count - best[0].count < self.patience)

        def one(all_of_it: tuple) -> tuple:
            now, best = all_of_it
            now = self._next(constants, now)
            if best is not None and validate is not None:
                value = self._validated(validate, now.carry)
                better = value < best[1]
                best = jax.tree_util.tree_map(
                    lambda new, old: jnp.where(better, new, old), (now, value), best
                )
            return now, best

        now, best = jax.lax.while_loop(more, body_of_loop(one), (now, best))
        fine = jnp.isfinite(now.loss) & ~jnp.isnan(now.size)
        report_unless(fine, _say_diverged, now.count)
        if best is not None:
            report_unless(best[1] < jnp.inf, _say_no_validation)
        return now if best is None else best[0]

    def _next(self, constants: tuple, now: _Kept) -> _Kept:
        carry, value, grads = self.loop.step(constants, now.carry, (now.count, None))
        ring = now.ring
        if self.truncate:
            at = now.count % self.truncate
            ring = jax.tree_util.tree_map(lambda r, v: r.at[at].set(v), ring, now.carry)
        return _Kept(carry, ring, now.count + 1, value, norm(grads).astype(value.dtype))

    def _again(self, constants: tuple, begin: tuple, kept: _Kept) -> _Kept:
        """Take the last steps once more, this time to be differentiated."""
        rows = self.truncate
        if not rows:
            return kept
        first = jnp.maximum(kept.count - rows, 0)
        # Where all steps are among the last, they are differentiated from what the caller gave.
        start = jax.tree_util.tree_map(
            lambda r, v: jnp.where(first > 0, r[first % rows], v), kept.ring, begin
        )

        def one(now: _Kept, i: object) -> tuple[_Kept, None]:
            carry, value, grads = self.loop.step(constants, now.carry, (i, None))
            after = now._replace(carry=carry, loss=value, size=norm(grads).astype(value.dtype))
            going = i < kept.count
            return jax.tree_util.tree_map(lambda a, b: jnp.where(going, a, b), after, now), None

        start = kept._replace(carry=start, ring=None)
        return jax.lax.scan(body_of_loop(one), start, first + jnp.arange(rows))[0]

    def _validated(self, validate: Callable, carry: tuple) -> Any:
        chosen, _, state, _ = carry
        params = self.loop.merged(chosen, self.loop.fixed, 0)
        value = validate(params, *((state,) if self.loop.has_state else ()))
        if jnp.shape(value) != ():
            raise TypeError(
                explain(
                    f"validate returned an array of shape {jnp.shape(value)} to adapt_until",
                    "what is better is a smaller number",
                    "return loss.mean()",
                )
            )
        # Nothing compares with NaN: a start with it would stay the best.
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    def _shown(self, kept: _Kept) -> Stopped:
        chosen, slots, state, _ = kept.carry
        return Stopped(
            params=self.loop.merged(chosen, self.loop.fixed, 0),
            state=state if self.loop.has_state else None,
            slots=slots,
            loss=kept.loss,
            gradient_norm=kept.size,
            steps=kept.count,
        )


def _check_options(steps: Any, patience: Any, truncate: Any) -> None:
    shape, dtype = jnp.shape(steps), jnp.result_type(steps)
    if not isinstance(steps, jax.Array):
        require_steps(steps, "adapt_until")
    elif shape != () or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            explain(
                f"adapt_until was given steps of shape {shape} and dtype {dtype}",
                "it is a number of steps",
                "pass an integer scalar; under jax.vmap one for each task",
            )
        )
    require_steps(patience, "adapt_until (patience)")
    if truncate is not None and not (isinstance(truncate, int) and 0 <= truncate):
        raise ValueError(f"adapt_until: truncate must be a number of steps, got {truncate!r}")


def _say_diverged(fine: Any, steps: Any) -> None:
    warn(
        explain(
            f"adapt_until diverged{lanes_of(fine)}: the loss or its gradient is not finite before step "
            f"{int(steps[~fine].min())}, which ends the loop",
            "the inner loop left the region where its steps descend, or the data are not finite",
            "a smaller inner learning rate, fewer steps, or clipped inner gradients",
        ),
        DivergenceWarning,
    )


def _say_no_validation(fine: object) -> None:
    warn(
        explain(
            f"validate returned no finite number to adapt_until{lanes_of(fine)}",
            "no step is better than another then, and the start is returned, with steps=0",
            "look at validate and its data; or validate=None",
        ),
        DivergenceWarning,
    )


def _refuse_reverse_mode() -> NoReturn:
    raise NotDifferentiableError(
        explain(
            "differentiated adapt_until in reverse mode",
            "its number of steps is not known, so what they computed cannot be kept for the way back",
            "truncate=k for a gradient through the last k steps; nn.meta.implicit_gradient around it, "
            "for the gradient of the solution; jax.jvp or jax.jacfwd; or jax.lax.stop_gradient around "
            "the parameters",
        )
    )
