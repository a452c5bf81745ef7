"""Optimizers inside: learning rates to learn, Adam that can be differentiated, and a check that it can."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import NotDifferentiableError, explain
from statefulnn.core.extras import import_extra
from statefulnn.meta._arrays import strong_arrays
from statefulnn.meta._closures import hoisted
from statefulnn.meta.per_step import PerStep, require_steps

Shapes = tuple[tuple[tuple[int, ...], Any], ...]

MOST_STEPS = 100  # that an optimizer is tried for
MOST_NUMBERS = 1 << 24  # of parameters, times steps, that a trial in their own shapes keeps
MOST_VERDICTS = 64  # that are kept
_verdicts: dict[Any, str] = {}  # by optimizer, structure of the parameters, steps, and shapes


def learning_rates(
    params: Mapping[str, ArrayLike],
    value: float,
    *,
    each: str = "element",
    steps: int | None = None,
) -> dict[str, jax.Array | PerStep]:
    """Return learning rates to learn, one for each element or each array of the parameters.

    Args:
        params: arrays by name.
        value: where they start.
        each: "element" for arrays of the parameters' shapes (Meta-SGD), "array" for one number each.
        steps: None, or the number of inner steps, each of which then has its own (MAML++).

    Returns:
        a dict of name -> array, or `PerStep`, for ``adapt(..., lr=...)``.

    Source: Li, Zhou, Chen and Li 2017 (Meta-SGD); Antoniou et al. 2019, section 4.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.meta.learning_rates({"w": jnp.zeros((2, 3))}, 0.01)["w"].shape
        (2, 3)
    """
    if each not in ("element", "array"):
        raise ValueError(f"learning_rates: each must be 'element' or 'array', got {each!r}")
    if steps is not None:
        require_steps(steps, "learning_rates")

    def one(p: Any) -> Any:
        shape = jnp.shape(p) if each == "element" else ()
        if steps is None:
            return jnp.full(shape, value, jnp.result_type(p))
        return PerStep(jnp.full((steps, *shape), value, jnp.result_type(p)))

    return {name: one(p) for name, p in params.items()}


def adam(
    learning_rate: ArrayLike | Callable[[Any], ArrayLike],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 1e-8,
) -> Any:
    """Return Adam whose steps can be differentiated, also where a gradient is zero.

    The square root in Adam has an infinite slope at zero, and zero gradients are common (a ReLU that is
    off), so its derivative would be NaN. A small number under the root prevents that.

    Args:
        learning_rate: the step size; it may be traced.
        b1: the decay of the mean.
        b2: the decay of the mean square.
        eps: added to the root.
        eps_root: added under the root; positive.

    Returns:
        an optax transformation.

    Raises:
        ImportError: if optax is not installed.
        ValueError: if `eps_root` is not positive.

    Source: Kingma and Ba 2015; ``optax.adam``.

    Example:
        >>> import statefulnn as nn
        >>> optimizer = nn.meta.adam(1e-3)
    """
    # Inside of optax.inject_hyperparams all numbers are traced.
    if not isinstance(eps_root, Tracer) and not eps_root > 0:
        raise ValueError(
            explain(
                f"called adam(eps_root={eps_root})",
                "the derivative of its step would be NaN where a gradient is zero",
                "pass a small positive number, such as 1e-8",
            )
        )
    optax = import_extra("optax", "optax", "called nn.meta.adam", "does the arithmetic")
    return optax.adam(learning_rate, b1, b2, eps, eps_root)


def require_differentiable(optimizer: Any, params: Any, steps: int, *, unless: bool) -> None:
    """Raise unless this is an optimizer whose steps have a useful derivative by the gradient.

    It takes as many steps as the loop, on small arrays, with one gradient of zero and another one, with
    parameters of zero, and with gradients of zero alone; a number instead of each traced value, such as a
    learned rate. An optimizer that raises there may depend on the shapes, and is tried on arrays of the
    parameters' own ones. What raises again passes: it will raise in the loop, at the user's line.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            explain(
                f"adapt was given an optimizer of type {type(optimizer).__name__}",
                "it is an optax transformation, a pair of init and update",
                "pass optimizer=nn.meta.adam(1e-3), or lr=0.01 for plain gradient descent",
            )
        )
    if unless:
        return
    leaves, structure = jax.tree_util.tree_flatten(params)
    steps = min(steps, MOST_STEPS)
    verdict = _tried(optimizer, structure, steps, None)
    if verdict == "raised":
        steps = max(1, min(steps, MOST_NUMBERS // max(1, sum(p.size for p in leaves))))
        verdict = _tried(optimizer, structure, steps, tuple((p.shape, p.dtype) for p in leaves))
    if verdict in ("fine", "raised"):
        return
    remedy = "first_order=True, which needs no such derivative"
    if verdict == "nan":
        why = "the derivative of its step is not finite where a gradient or a parameter is zero"
        remedy = f"nn.meta.adam(...), optax.adam(..., eps_root=1e-8); or {remedy}"
    else:
        why = "its step does not depend smoothly on the gradient: the derivative is zero everywhere"
        remedy = f"a smooth optimizer; or {remedy}"
    raise NotDifferentiableError(
        explain("adapt was given an optimizer that is not differentiable", why, remedy)
    )


def updated(optimizer: Any, gradients: Any, slots: Any, params: Any) -> tuple[Any, Any]:
    """Return the updates of an optimizer and its state, or raise if it asks for more than gradients."""
    try:
        return optimizer.update(gradients, slots, params)
    except Exception as error:
        # optax names what is missing nowhere else.
        if not isinstance(error, TypeError) or "required keyword-only argument" not in str(error):
            name = getattr(optimizer.update, "__qualname__", type(optimizer).__name__)
            error.add_note(f"(in an inner step of nn.meta, in the optimizer's update, {name})")
            raise
        raise TypeError(
            explain(
                f"adapt was given an optimizer that takes more than it passes: {error}",
                "it calls update(gradients, state, params); a line search, or a step size that follows the "
                "loss, asks for the loss as well",
                "an optimizer of gradients alone, such as nn.meta.adam(1e-3)",
            )
        ) from error


def _tried(optimizer: object, structure: object, steps: int, shapes: Shapes | None) -> str:
    key = (optimizer, structure, steps, shapes)
    try:
        verdict = _verdicts.get(key)
    except TypeError:  # it cannot be hashed
        return _try(*key)[0]
    if verdict is None:
        verdict, knows_traces = _try(*key)
        if not knows_traces:  # a dead trace is not to be kept alive
            _verdicts[key] = verdict
            if len(_verdicts) > MOST_VERDICTS:
                _verdicts.pop(next(iter(_verdicts)))
    return verdict


def _try(optimizer: Any, structure: Any, steps: int, shapes: Shapes | None) -> tuple[str, bool]:
    """Return "fine", "nan", "flat" or "raised", and whether the optimizer depends on traced values.

    Args:
        shapes: shapes and dtypes of the parameters, None for two numbers each.
    """

    def tree(first: Any, other: Any) -> Any:
        leaves = [first, *[other] * (structure.num_leaves - 1)]
        if shapes is not None:
            leaves = [_enlarged(v, *how) for v, how in zip(leaves, shapes, strict=True)]
        return structure.unflatten(leaves)

    def updates(gradient: Any, start: Any, other: Any) -> Any:
        params, gradients = tree(start, start), tree(gradient, other)

        def step(state: Any, _: None) -> tuple[Any, Any]:
            updates, after = optimizer.update(gradients, state, params)
            if shapes is not None:  # not to keep the updates of all steps
                updates = jax.tree_util.tree_map(_weighted, updates)
            return jax.tree_util.tree_map(
                lambda a, s: jnp.asarray(a, s.dtype), after, state
            ), updates

        return jax.lax.scan(step, strong_arrays(optimizer.init(params)), length=steps)[1]

    def both(gradient: Any, start: Any, other: Any) -> tuple[Any, Any, Any]:
        moves, slopes = jax.jvp(
            lambda *g: updates(g[0], start, g[1]),
            (gradient, other),
            (jnp.ones_like(gradient), jnp.ones_like(other)),
        )
        # In the backward pass a branch that is not taken gives NaN as well, where its slope is infinite.
        back = jax.vjp(updates, gradient, start, other)[1](
            jax.tree_util.tree_map(jnp.ones_like, moves)
        )
        return moves, slopes, back

    # A bias starts at zero, and all gradients of one array may be zero: norms have no slope there. Those of
    # all arrays are not.
    some, none = np.array([0.0, 0.3], np.float32), np.zeros(2, np.float32)
    half = np.full(2, 0.5, np.float32)
    dead = none if structure.num_leaves > 1 else some
    cases = np.stack([some, some, dead]), np.stack([half, none, half]), np.stack([some] * 3)
    found, values = None, []
    # Whatever the caller's setting of promotion.
    with contextlib.suppress(Exception), jax.numpy_dtype_promotion("standard"):
        call, values, _ = hoisted(jax.vmap(both), *cases)
        numbers = [_stand_in(v) for v in values]
        with jax.ensure_compile_time_eval():
            found = jax.jit(lambda *cases: call(numbers, *cases))(*cases)
    if found is None:
        return "raised", bool(values)
    moves, slopes, back = (
        np.stack([*map(np.asarray, jax.tree_util.tree_leaves(t))]) for t in found
    )
    if not (np.isfinite(slopes).all() and np.isfinite(back).all()):
        return "nan", bool(values)
    # A schedule may start with steps of zero, which say nothing.
    return "flat" if moves.any() and not slopes.any() else "fine", bool(values)


def _uneven(size: int, step: float) -> Any:
    return 1 + jnp.arange(size, dtype=jnp.float32) * np.float32(step) % 1


def _enlarged(pair: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a pair of numbers in turn, as an array of a shape; uneven, since a mean may be subtracted."""
    size = math.prod(shape)
    values = pair[(jnp.arange(size) + 1) % 2] * _uneven(size, math.sqrt(2))
    return values.reshape(shape).astype(dtype)


def _weighted(update: Any) -> Any:
    """Return one number that is zero where all of an update is, and not finite where one of it is not."""
    values = jnp.ravel(update).astype(jnp.float32)
    return (values * _uneven(values.size, math.sqrt(3))).sum()


def _stand_in(value: Any) -> Any:
    """Return a number for a traced one: 1/2 may be a rate, a decay or a bound."""
    inexact = jnp.issubdtype(value.dtype, jnp.inexact)
    return np.full(value.shape, 0.5 if inexact else 1, value.dtype)
