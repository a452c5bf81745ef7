"""Parameters in low precision, trained by way of float32 copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.typing import DTypeLike

from statefulnn.core.extras import import_extra
from statefulnn.functional._checks import LOW_PRECISION, widened
from statefulnn.transforms.types import PyTree


class MasterState(NamedTuple):
    """The state of `master_weights`.

    Attributes:
        master: float32 copies of the bfloat16 and float16 parameters; None for others.
        inner: the state of the transformation around which it is.
    """

    master: Any
    inner: Any


def master_weights(tx: Any) -> Any:
    """Return an optax transformation that trains low-precision parameters by float32 copies.

    A bfloat16 weight of 1 does not change by a step of less than 1/512. The copies do: `tx` gets gradients,
    parameters and slots in float32, and each parameter becomes its copy, rounded. Other parameters are
    trained as without it.

    Args:
        tx: the optax transformation, such as ``optax.adamw(1e-3)``.

    Returns:
        An optax transformation; its copies are slots of `nn.Optimizer`, ``master.fc1.weight``.

    Limitations: the copies are made when the optimizer is built. Weights that are loaded or set later are
    taken back at the next step: build the optimizer after loading, or load its state too. A parameter that
    one step makes smaller than 1/65536 of what it was is rounded like its former self in that step.

    Example:
        >>> import jax.numpy as jnp, optax, statefulnn as nn
        >>> model = nn.Linear(2, 1, bias=False, dtype=jnp.bfloat16)
        >>> opt = nn.Optimizer(model, nn.amp.master_weights(optax.sgd(1e-4)))
        >>> opt.step({"weight": jnp.ones((1, 2), jnp.bfloat16)})
        >>> list(opt.state_dict()), str(opt.state.master["weight"].dtype), str(model.weight.dtype)
        (['master.weight'], 'float32', 'bfloat16')
    """
    optax = import_extra("optax", "optax", "called nn.amp.master_weights", "does the arithmetic")
    tx = optax.with_extra_args_support(tx)

    def rounded(x: jax.Array, dtype: DTypeLike) -> Any:
        return widened(lax.optimization_barrier(x.astype(dtype)))

    def wide(params: PyTree, master: PyTree) -> Any:
        return jax.tree.map(lambda p, m: p if m is None else m, params, master)

    def init(params: PyTree) -> MasterState:
        master = jax.tree.map(lambda p: widened(p) if p.dtype in LOW_PRECISION else None, params)
        return MasterState(master, tx.init(wide(params, master)))

    def update(grads: PyTree, state: MasterState, params: PyTree, **extra: Any) -> Any:
        before = wide(params, state.master)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, before)
        updates, inner = tx.update(grads, state.inner, before, **extra)
        after = optax.apply_updates(before, updates)
        master = jax.tree.map(lambda p, a: a if p.dtype in LOW_PRECISION else None, params, after)
        # The sum of parameter and update is rounded to the parameter's dtype, whatever its last bits are. But
        # not twice: XLA would leave out a cast that is undone at once.
        updates = jax.tree.map(
            lambda u, p, m: u if m is None else rounded(m, p.dtype) - widened(p),
            updates,
            params,
            master,
        )
        return updates, MasterState(master, inner)

    return optax.GradientTransformationExtraArgs(init, update)
