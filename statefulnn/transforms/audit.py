"""nn.audit: which parameters a model does not use, and what it uses that is no parameter of it."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core import habits
from statefulnn.core.baked_in import probing
from statefulnn.core.compat import current_trace, trace_of
from statefulnn.core.graph import require_module
from statefulnn.core.listeners import listening
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
        built: layers that the call builds, with parameters of their own: new ones each time, never trained.
        outside: layers with parameters that the call uses, and that belong to another model, or to none.
        constants: attributes that are plain floating arrays: neither trained nor saved.
    """

    unused: list[str]
    zero_grad: list[str]
    frozen: list[str]
    used: list[str]
    built: list[str] = dataclasses.field(default_factory=list)
    outside: list[str] = dataclasses.field(default_factory=list)
    constants: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every trainable parameter gets a gradient, and no layer is built by the call."""
        return not self.unused and not self.zero_grad and not self.built

    def __str__(self) -> str:
        lines = [f"{len(self.used)} parameters get a gradient"]
        for title, names in (
            ("never used", self.unused),
            ("gradient exactly zero", self.zero_grad),
            ("frozen", self.frozen),
            ("built by the call, so never trained", self.built),
            ("used, and no part of the model", self.outside),
            ("plain arrays, neither trained nor saved", self.constants),
        ):
            if names:
                lines.append(f"{title}: " + ", ".join(names))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the text for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"


@shortened
def audit(
    model: Module, *inputs: object, rng: ArrayLike | None = None, **kwargs: object
) -> AuditReport:
    """Look for parameters that never get a gradient, such as those of a layer whose output is dropped.

    It also lists layers and arrays that the call uses, and that are no part of the model.

    The gradient is that of a random projection of all floating outputs, on one call with `inputs`. The
    model is not changed.

    Args:
        model: a Module.
        inputs: the positional arguments of its call.
        rng: a random key for dropout and the projection; a fixed one by default.
        kwargs: the keyword arguments of its call.

    Returns:
        an `AuditReport`; print it, or look at its lists, such as ``unused``.

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
    habits.refuse_sizes("nn.audit", model, inputs, kwargs, needed=True)
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

    reached, built, outside, constants = _reached(projected, params)
    grads = jax.grad(projected)(params)
    unused = [n for n in params if n not in reached]
    zero = [n for n in params if n in reached and not bool(jnp.any(grads[n] != 0))]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    used = [n for n in params if n not in unused and n not in zero]
    return AuditReport(unused, zero, frozen, used, built, outside, _arrays_among(constants, model))


def _arrays_among(constants: Sequence[Any], model: Module) -> list[str]:
    """Return the names of attributes that are floating arrays, and among the constants of a call."""
    known = set(map(id, constants))
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if id(value) in known and jnp.issubdtype(value.dtype, jnp.inexact)
    ]


class _Strangers:
    """Listens to calls: which modules with parameters are no part of the model."""

    def __init__(self) -> None:
        self.found: list[Module] = []
        self._seen: set[int] = set()

    def enter(self, module: Any, args: tuple, kwargs: dict) -> None:
        # What belongs to the model is a clone here.
        scope = module._nn_stamp.scope
        if (scope is None or scope.birth) and id(module) not in self._seen:
            self._seen.update(map(id, module.modules()))
            self.found.append(module)

    def values(self) -> list[list[Any]]:
        """Return the parameters of each; none for one of an inner trace, where nobody can read them."""
        found = [[p._value for p in module.parameters()] for module in self.found]
        here = (None, current_trace())
        return [v if all(trace_of(x) in here for x in v) else [] for v in found]


# Primitives that run one jaxpr once, by the names that JAX has had for them.
_CALLS = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)


def _reached(
    fn: Callable, params: dict[str, jax.Array]
) -> tuple[set[str], list[str], list[str], list[Any]]:
    """Return the names whose arrays the output depends on, layers built and from outside, constants."""
    strangers = _Strangers()
    sizes: list[int] = []

    def call(params: dict) -> Any:
        with listening(entering=strangers.enter):
            out = fn(params)
        values = strangers.values()
        sizes[:] = map(len, values)
        return out, values

    # A gradient of zero would not tell: a parameter may be used, and have no slope at this point.
    names = sorted(params)
    with probing():
        closed = jax.make_jaxpr(call)(params)

    def reaching(first: int, count: int) -> list[bool]:
        outputs = range(len(closed.jaxpr.outvars))
        return _live(closed.jaxpr, [first <= i < first + count for i in outputs])

    reached: set[str] = {name for name, used in zip(names, reaching(0, 1), strict=True) if used}
    built: list[str] = []
    outside: list[str] = []
    at = 1
    for module, size in zip(strangers.found, sizes, strict=True):
        # What a hypernetwork writes into a layer depends on parameters, which are trained.
        if size and not any(reaching(at, size)):
            text = repr(module) if not module._modules else type(module).__name__
            (outside if module._nn_stamp.scope is None else built).append(text)
        at += size
    return reached, built, outside, closed.consts


def _live(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    """Return which inputs of a jaxpr the wanted ones of its outputs depend on."""
    # From the outputs backwards, as reverse mode goes.
    needed = {id(v) for v, want in zip(jaxpr.outvars, wanted, strict=True) if want}
    for eqn in reversed(jaxpr.eqns):
        outputs = [id(v) in needed for v in eqn.outvars]
        if any(outputs):
            inputs = _live_inputs(eqn, outputs)
            needed.update(id(v) for v, used in zip(eqn.invars, inputs, strict=True) if used)
    return [id(v) in needed for v in jaxpr.invars]


def _live_inputs(eqn: Any, wanted: list[bool]) -> list[bool]:
    # Of a call, an input counts only if it reaches an output that is needed: each layer is a call, and may
    # return more than the model uses. A scan may carry it there in later steps. Of any other equation all
    # inputs count.
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":  # the first input says which branch runs
        branches = [_live(branch.jaxpr, wanted) for branch in params["branches"]]
        return [True, *map(any, zip(*branches, strict=True))]
    body = params.get("jaxpr", params.get("call_jaxpr"))
    body = getattr(body, "jaxpr", body)
    if name == "scan":
        # Constants, what is carried, slices; and what is carried, slices. A slice has an axis less.
        same = lambda a, b: sum(x.aval.ndim == y.aval.ndim for x, y in zip(a, b, strict=True))
        carried = same(body.outvars, eqn.outvars)
        consts = same(body.invars, eqn.invars) - carried
        while True:
            inputs = _live(body, wanted)
            carry = [a or b for a, b in zip(wanted, inputs[consts : consts + carried])]  # noqa: B905
            if carry == wanted[:carried]:
                return inputs
            wanted = [*carry, *wanted[carried:]]
    if name not in _CALLS or body is None or len(body.invars) != len(eqn.invars):
        return [True] * len(eqn.invars)
    return _live(body, wanted)
