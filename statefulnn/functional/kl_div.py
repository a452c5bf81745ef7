"""The Kullback-Leibler divergence."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.errors import user_stack_level
from statefulnn.functional._checks import array, reduced, reduction_of
from statefulnn.functional._compiled import compiled
from statefulnn.functional._losses import together


@functools.partial(compiled, static_argnums=(2, 3))
def _kl_div(input: jax.Array, target: jax.Array, reduction: str, log_target: bool) -> Any:
    dtype, x, y = together("F.kl_div", input=input, target=target)
    if log_target:
        loss = jnp.exp(y) * (y - x)
    else:
        # 0 log 0 is 0, and its derivative is left out.
        absent = y == 0
        safe = jnp.where(absent, 1, y)
        loss = jnp.where(absent, 0, safe * jnp.log(safe)) - y * x
    if reduction == "batchmean":
        total = jnp.sum(loss)
        return (total / input.shape[0] if input.ndim else total).astype(dtype)
    return reduced(loss, reduction).astype(dtype)


def kl_div(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> jax.Array:
    """Return the Kullback-Leibler divergence of `input` from `target`.

    ``target · (log target - input)``, where `input` holds log-probabilities.

    Args:
        input: log-probabilities, any shape.
        target: probabilities, of a shape that broadcasts with it.
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "batchmean" (the sum over the size of the first axis: the divergence of the
            mathematics), "mean" (over all elements, with a warning), "sum" or "none".
        log_target: whether `target` holds log-probabilities, too.

    Returns:
        A scalar, or the shape that both broadcast to.

    Raises:
        ShapeError: if the shapes do not broadcast.

    Source: ``torch.nn.functional.kl_div``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> p, q = jnp.array([[0.5, 0.5]]), jnp.array([[0.25, 0.75]])
        >>> round(float(F.kl_div(jnp.log(q), p, reduction="batchmean")), 4)
        0.1438
    """
    function = "F.kl_div"
    if reduction == "mean" and size_average is None and reduce is None:
        warnings.warn(
            "reduction: 'mean' divides the total loss by the number of all elements, not by the "
            "batch's size: it is no divergence; write reduction='batchmean'",
            UserWarning,
            stacklevel=user_stack_level(),
        )
    if reduction != "batchmean" or size_average is not None or reduce is not None:
        reduction = reduction_of(reduction, size_average, reduce, function)
    x = array(input, "input", function)
    y = array(target, "target", function)
    return _kl_div(x, y, reduction, bool(log_target))
