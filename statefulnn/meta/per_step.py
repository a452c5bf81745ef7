"""Values that differ from one inner step to the next: learning rates, batch statistics, scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.names import Filter, chosen
from statefulnn.core.tracebacks import shortened


class PerStep:
    """An array with a leading axis of inner steps: step i of `adapt` takes (and writes) row i.

    It is a pytree node around the array, so gradients and optax go through it.

    Args:
        rows: ``(steps, *shape)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.meta.PerStep(jnp.zeros((5, 3))).rows.shape
        (5, 3)
    """

    __slots__ = ("rows",)

    def __init__(self, rows: ArrayLike) -> None:
        self.rows: Any = rows

    def __repr__(self) -> str:
        return f"PerStep({self.rows!r})"


jax.tree_util.register_pytree_with_keys(
    PerStep,
    lambda p: (((jax.tree_util.GetAttrKey("rows"), p.rows),), None),
    lambda _, children: PerStep(*children),
)


@shortened
def per_step(
    values: Mapping[str, ArrayLike], steps: int, only: Filter = None
) -> dict[str, ArrayLike | PerStep]:
    """Return a dict of arrays with a row for each inner step in place of some of them.

    With buffers, each inner step has running statistics of its own; with parameters, a value of its
    own that the outer loop learns and the inner loop leaves alone. Both are what MAML++ does with batch
    normalisation.

    Args:
        values: arrays by name: the state, or the parameters, that `functionalize` returned.
        steps: the number of inner steps.
        only: which names: a pattern such as ``"*.norm.*"``, a list of these, or a function of the name;
            None for all floating-point ones.

    Returns:
        the dict with `PerStep` values, each row a copy.

    Raises:
        UnknownNameError: if `only` matches nothing.
        ValueError: if `steps` is no positive integer.

    Source: Antoniou, Edwards and Storkey 2019 (MAML++), per-step batch normalisation.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> fn, params, state = nn.functionalize(nn.BatchNorm1d(3), mutable=True)
        >>> state = nn.meta.per_step(state, 5, "running_*")
        >>> state["running_mean"].rows.shape, state["num_batches_tracked"].shape
        ((5, 3), ())
    """
    require_steps(steps, "per_step")
    names = chosen(values, only, "per_step", required=True)
    if only is None:
        names = [n for n in names if jnp.issubdtype(jnp.result_type(values[n]), jnp.floating)]
    return {
        name: PerStep(jnp.broadcast_to(value, (steps, *jnp.shape(value))))
        if name in names
        else value
        for name, value in values.items()
    }


def require_steps(steps: Any, function: str) -> None:
    """Raise unless a number of steps is a positive integer."""
    if isinstance(steps, Tracer):
        raise TypeError(
            explain(
                f"{function} was given a traced number of steps",
                "its loop is compiled for a number, which its gradient needs",
                "nn.meta.adapt_until(..., steps=steps), which stops where it is told to; or make the number "
                "static, jax.jit(f, static_argnames='steps')",
            )
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{function}: steps must be a positive integer, got {steps!r}")


def is_rows(x: Any) -> bool:
    """Say whether a value is `PerStep`."""
    return isinstance(x, PerStep)


def require_rows(tree: Any, steps: int, what: str) -> None:
    """Raise unless every `PerStep` has a row for each step."""
    for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_rows):
        if isinstance(value, PerStep) and value.rows.shape[:1] != (steps,):
            raise ShapeError(
                explain(
                    f"adapt was given {what}{jax.tree_util.keystr(path)} with "
                    f"{value.rows.shape[0]} rows for {steps} steps",
                    "each step takes its row",
                    f"make them with nn.meta.per_step(..., steps={steps})",
                )
            )


def rows_at(tree: Any, step: Any) -> Any:
    """Return a tree with the row of one step in place of each `PerStep`."""

    def one(value: object) -> Any:
        if not isinstance(value, PerStep):
            return value
        return jax.lax.dynamic_index_in_dim(value.rows, step, keepdims=False)

    return jax.tree_util.tree_map(one, tree, is_leaf=is_rows)
