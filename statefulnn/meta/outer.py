"""Small pieces of outer objectives: Reptile's gradient, the weights of MAML++'s multi-step loss."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.tracebacks import shortened
from statefulnn.meta.per_step import require_steps

Tree = TypeVar("Tree")


@shortened
def reptile_gradient(params: Tree, adapted: Tree) -> Tree:
    """Return Reptile's meta-gradient of one task: from the adapted parameters back to the start.

    An optimizer that descends along it moves the start towards what the tasks adapt to.

    Args:
        params: where the inner loop started.
        adapted: where it ended, ``adapt(...).params``.

    Source: Nichol, Achiam and Schulman 2018, On first-order meta-learning algorithms.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.meta.reptile_gradient({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})["w"].tolist()
        [1.0, 1.0]
    """
    return jax.tree_util.tree_map(jnp.subtract, params, adapted)


def multi_step_weights(steps: int, progress: ArrayLike) -> jax.Array:
    """Return the weight of the loss after each inner step, annealed towards the last one alone.

    At first all steps count alike, which keeps training stable; at the end only the last one.

    Args:
        steps: the number of inner steps.
        progress: how far the annealing is, from 0 to 1; it may be traced.

    Returns:
        ``(steps,)``, which add up to 1.

    Raises:
        ValueError: if `steps` is no positive integer.

    Source: Antoniou, Edwards and Storkey 2019 (MAML++), multi-step loss optimisation.

    Example:
        >>> import statefulnn as nn
        >>> nn.meta.multi_step_weights(4, 0.0).tolist(), nn.meta.multi_step_weights(4, 1.0).tolist()
        ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0])
    """
    require_steps(steps, "multi_step_weights")
    progress = jnp.clip(progress, 0.0, 1.0)
    last = jnp.zeros(steps).at[-1].set(1.0)
    return (1 - progress) / steps + progress * last
