"""nn.audit: which parameters a model does not use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.functional_call import functionalize


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What `audit` found, as lists of dotted names.

    Attributes:
        unused: trainable parameters that do not enter the output at all.
        zero_grad: trainable parameters that enter it, but whose gradient is exactly zero.
        frozen: parameters with ``requires_grad=False``.
        used: all other parameters.
    """

    unused: list[str]
    zero_grad: list[str]
    frozen: list[str]
    used: list[str]

    @property
    def ok(self) -> bool:
        """Whether every trainable parameter gets a gradient."""
        return not self.unused and not self.zero_grad

    def __str__(self) -> str:
        lines = [f"{len(self.used)} parameters get a gradient"]
        for title, names in (
            ("never used", self.unused),
            ("gradient exactly zero", self.zero_grad),
            ("frozen", self.frozen),
        ):
            if names:
                lines.append(f"{title}: " + ", ".join(names))
        return "\n".join(lines)


@shortened
def audit(model: Module, *inputs: Any, rng: ArrayLike | None = None, **kwargs: Any) -> AuditReport:
    """Look for parameters that never get a gradient, such as those of a layer whose output is dropped.

    The gradient is that of a random projection of all floating outputs, on one call with `inputs`. The
    model is not changed.

    Args:
        model: a Module.
        inputs: the positional arguments of its call.
        rng: a random key for dropout and the projection; a fixed one by default.
        kwargs: the keyword arguments of its call.

    Returns:
        an `AuditReport`; print it, or look at ``unused``, ``zero_grad`` and ``frozen``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        ...
        ...     def forward(self, x):
        ...         out = self.a(x)
        ...         out = self.b(x)
        ...         return out
        >>> nn.audit(Net(), jnp.ones((1, 2))).unused
        ['a.weight', 'a.bias']
    """
    require_module(model, "nn.audit")
    key = jax.random.key(0) if rng is None else rng
    draw, project = jax.random.split(key)
    fn, params, state = functionalize(model, mutable=True)

    # A random projection, since the gradient of a plain sum may be zero for a parameter that is in use: the
    # outputs of a softmax add up to 1 whatever the weights are.
    def projected(params: dict) -> Any:
        out, _ = fn(params, state, *inputs, rng=draw, **kwargs)
        total = jnp.zeros((), jnp.float32)
        for i, leaf in enumerate(jax.tree_util.tree_leaves(out)):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                weight = jax.random.normal(jax.random.fold_in(project, i), jnp.shape(leaf))
                total += jnp.sum(weight * jnp.real(leaf).astype(jnp.float32))
        return total

    reached = _reached(projected, params)
    grads = jax.grad(projected)(params)
    unused = [n for n in params if n not in reached]
    zero = [n for n in params if n in reached and not bool(jnp.any(grads[n] != 0))]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    used = [n for n in params if n not in unused and n not in zero]
    return AuditReport(unused, zero, frozen, used)


def _reached(fn: Callable, params: dict[str, jax.Array]) -> set[str]:
    """Return the names whose arrays the output of a function depends on, by its jaxpr."""
    # A gradient of zero would not tell: a parameter may be used, and have no slope at this point.
    names, _ = zip(*sorted(params.items()), strict=True) if params else ((), ())
    jaxpr = jax.make_jaxpr(fn)(params).jaxpr
    # From the outputs backwards, as reverse mode goes.
    needed = {id(v) for v in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in eqn.outvars):
            needed.update(_needed_inputs(eqn, needed))
    return {name for name, var in zip(names, jaxpr.invars, strict=True) if id(var) in needed}


def _needed_inputs(eqn: Any, needed: set[int]) -> list[int]:
    # A call's inputs count only if they reach one of its outputs that is needed: each layer is a call, and
    # may return more than the model uses. Of any other equation all inputs count.
    inner = eqn.params.get("jaxpr")
    if eqn.primitive.name not in ("pjit", "jit") or inner is None:
        return [id(v) for v in eqn.invars]
    body = inner.jaxpr
    live = {id(b) for b, v in zip(body.outvars, eqn.outvars, strict=True) if id(v) in needed}
    for inner_eqn in reversed(body.eqns):
        if any(id(v) in live for v in inner_eqn.outvars):
            live.update(_needed_inputs(inner_eqn, live))
    return [id(v) for b, v in zip(body.invars, eqn.invars, strict=True) if id(b) in live]
