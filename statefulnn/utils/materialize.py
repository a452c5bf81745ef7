"""Models without numbers: shapes first, values later and where they belong."""

from __future__ import annotations

import collections
import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from statefulnn.core.arrays import filled
from statefulnn.core.baked_in import probing
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import TraceLeakError, UninitializedParameterError, explain
from statefulnn.core.generator import current_generator, rng_scope
from statefulnn.core.module import Module, places_in
from statefulnn.core.placement import (
    META,
    DeviceLike,
    elsewhere,
    is_meta,
    place_of_entry,
    resolve_device,
)
from statefulnn.core.placement import device as device_type
from statefulnn.core.slices import slice_of
from statefulnn.core.walk import LEAVE, walk
from statefulnn.modules.adaptive import AdaptiveLogSoftmaxWithLoss
from statefulnn.modules.lazy import LazyModuleMixin
from statefulnn.utils._computed import computations

_M = TypeVar("_M", bound=Module)


def skip_init(module_cls: type[_M], *args: Any, **kwargs: Any) -> _M:
    """Build a module without drawing initial values: its parameters are zeros.

    Args:
        module_cls: a class of modules that takes `device`.
        args: its arguments.
        kwargs: its keyword arguments; `device` says where the parameters are put.

    Raises:
        RuntimeError: if `module_cls` is no class of modules or takes no `device`.

    Source: ``torch.nn.utils.skip_init``.

    Example:
        >>> import statefulnn as nn
        >>> float(abs(nn.utils.skip_init(nn.Linear, 100, 100).weight.value).max())
        0.0
    """
    if not (isinstance(module_cls, type) and issubclass(module_cls, Module)):
        raise RuntimeError(
            explain(
                f"nn.utils.skip_init was given {module_cls!r}",
                f"Expected a Module; got {module_cls}",
                "nn.utils.skip_init(nn.Linear, 3, 4)",
            )
        )
    if "device" not in inspect.signature(module_cls).parameters:
        raise RuntimeError(
            explain(
                f"nn.utils.skip_init was given {module_cls.__name__}",
                "Module must support a 'device' arg to skip initialization",
                'with nn.device("meta"): ... and module.to_empty(device="cpu")',
            )
        )
    final = kwargs.pop("device", None)
    return module_cls(*args, device=META, **kwargs).to_empty(device=final)


def materialize(
    module: _M,
    *inputs: object,
    device: DeviceLike | Callable[[str, jax.ShapeDtypeStruct], DeviceLike] | None = None,
    **kwargs: object,
) -> _M:
    """Give lazy parameters their shapes, and parameters on the meta device their initial values.

    Shapes come from `inputs` by ``jax.eval_shape``: nothing is computed. Values are drawn where they are
    to be, one parameter after the other: with a ``jax.sharding.Sharding`` each device draws its part,
    and the model is never whole on the host. They are what the layers' ``reset_parameters`` draw, the
    children's before their parent's, lazy layers last, in the order of the call: what building the model
    with this seed gives. A tied parameter keeps what the module draws that had it first, and the copies
    of a layer (``copy.deepcopy``, nn.TransformerEncoder) have its values. Other values than in construction
    follow if a constructor draws for what its ``reset_parameters`` does not, or drops what it drew, as
    nn.TransformerEncoder does with the layer that it is given if ``nn.init.version("2026.1")`` draws for
    each copy.

    Args:
        module: the model; it is changed in place.
        inputs: what it will be called with, arrays or ``jax.ShapeDtypeStruct``; not needed without
            lazy layers.
        device: where parameters on the meta device are put: a device, a ``jax.sharding.Sharding``, a
            platform's name, a function ``(name, struct)`` that returns one of these, or an
            `nn.parallel.Plan`. Without it, where ``module.to(plan)`` has noted that they go.
        kwargs: keyword arguments it will be called with.

    Returns:
        The module.

    Raises:
        UninitializedParameterError: if a lazy layer is not reached by the call, or if a module with
            parameters on the meta device has no ``reset_parameters``, or is parametrized or pruned. Nothing
            is changed then, and nothing drawn.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> with nn.device("meta"):
        ...     model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
        >>> nn.materialize(model, jnp.ones((1, 5)))
        Sequential(
          (0): Linear(in_features=5, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    if current_trace() is not EAGER:
        raise TraceLeakError(
            explain(
                f"materialized {type(module).__name__} inside a JAX transformation",
                "the module would keep traced values",
                "call nn.materialize before, outside jax.jit",
            )
        )
    put_back = _snapshot(module)
    try:
        called = _infer_shapes(module, inputs, kwargs)
        _draw_values(module, device, called)
    except BaseException:
        put_back()
        raise
    return module


def _snapshot(module: Module) -> Callable[[], None]:
    """Return what makes a model, and the generator in force, as they are now."""
    boxes: dict[int, Box] = {id(b): b for m in module.modules() for b in _own(m).values()}
    generator = current_generator()
    if generator is not None:
        boxes[id(generator)] = generator
    values = [(box, type(box), box._value) for box in boxes.values()]
    dicts = lambda m: (m.__dict__, m._parameters, m._buffers, m._modules)
    modules = [(m, type(m), [(d, dict(d)) for d in dicts(m)]) for m in module.modules()]

    def put_back() -> None:
        for box, cls, value in values:
            if box._value is not value:
                box.__class__ = cls
                Box.write(box, value)
        for m, cls, contents in modules:
            if type(m) is not cls:
                object.__setattr__(m, "__class__", cls)
            for held, items in contents:
                dict.clear(held)
                dict.update(held, items)
            m._nn_stamp.touch()

    return put_back


def _own(module: Module) -> dict[str, Box]:
    both = (*module._parameters.items(), *module._buffers.items())
    return {name: box for name, box in both if box is not None}


# --------------------------------------------------------------------------------------------------
# Shapes


def _infer_shapes(module: Module, inputs: tuple, kwargs: dict[str, Any]) -> list[Module]:
    """Return the layers that were lazy, in the order in which a first call would initialise them."""
    lazy = {n: m for n, m in module.named_modules() if isinstance(m, LazyModuleMixin)}
    if not lazy:
        return []
    seen: dict[str, tuple[tuple, dict]] = {}

    # Arrays are traced; flags, names and numbers are what forward looks at.
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    arrays = [i for i, v in enumerate(leaves) if hasattr(v, "shape") and hasattr(v, "dtype")]

    def forward(given: list[Any]) -> None:
        held = dict(zip(arrays, given, strict=True))
        inputs, kwargs = treedef.unflatten([held.get(i, v) for i, v in enumerate(leaves)])
        clone = copy.deepcopy(module)  # built in the trace, so it may be written there
        for _, m in clone.named_modules():
            for box in _own(m).values():
                if is_meta(box._value):
                    box._value = jnp.zeros(box._value.shape, box._value.dtype)
        for name in lazy:
            _note_inputs(clone.get_submodule(name), name, seen)
        with rng_scope(jax.random.key(0)), elsewhere():
            clone(*inputs, **kwargs)

    with probing():
        jax.eval_shape(forward, [leaves[i] for i in arrays])
    for name in lazy:
        if name not in seen:
            raise UninitializedParameterError(
                explain(
                    f"nn.materialize did not reach the lazy layer {name!r}",
                    "forward did not call it with these inputs, so its sizes are not known",
                    "inputs that make forward call it, or an ordinary layer in its place",
                )
            )
    # One that has all its parameters from elsewhere draws nothing at its first call.
    called: list[Any] = sorted(
        (lazy[n] for n in seen), key=lambda m: not m.has_uninitialized_params()
    )
    for name, (args, keywords) in seen.items():
        lazy[name]._infer_parameters(args, keywords)
    return called


def _note_inputs(module: Module, name: str, seen: dict) -> None:
    infer = module._infer_parameters

    def noting(args: tuple, kwargs: dict) -> None:
        seen.setdefault(name, jax.tree.map(_struct, (args, kwargs)))
        infer(args, kwargs)

    # An attribute of the instance hides the method, on this clone only.
    object.__setattr__(module, "_infer_parameters", noting)


def _struct(x: object) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x


# --------------------------------------------------------------------------------------------------
# Values


def _draw_values(module: Module, device: Any, called: list[Module]) -> None:
    missing = {id(b) for m in module.modules() for b in _own(m).values() if is_meta(b._value)}
    if not missing:
        return
    order, parents = _construction_order(module, missing)
    ranks = {id(m): rank for rank, m in enumerate(called)}
    order.sort(key=lambda entry: ranks.get(id(entry[1]), -1))
    _require_rules(order, missing)
    owners: dict[int, Module] = {}
    for _, m in order:
        for box in _own(m).values():
            if id(box) not in owners or _first_home(box) is m:
                owners[id(box)] = m
    # A module draws for what it was built with. What it was given later keeps the values that it has: what
    # had numbers before, and what is tied and belongs elsewhere.
    holders = collections.Counter(id(b) for _, m in order for b in _own(m).values())
    boxes = {id(b): b for m in module.modules() for b in _own(m).values()}
    kept = [(b, None) for i, b in boxes.items() if i not in missing]
    kept += [
        (b, _upwards(owners[i], parents))
        for i, b in boxes.items()
        if i in missing and holders[i] > 1
    ]
    if hasattr(device, "places"):
        device = places_in(module, device)
    copies = _Copies(missing, [m for _, m in order])
    for name, m in order:
        for key, box in _own(m).items():
            if is_meta(box._value):
                copies.allocate(box, f"{name}.{key}" if name else key, device)
        reset = _reset_of(m)
        if copies.cover(m) or reset is None:
            continue
        before = [(box, box._value) for box, above in kept if above is None or m not in above]
        reset()
        for box, value in before:
            if box._value is not value:
                Box.write(box, value)


def _require_rules(order: list[tuple[str, Module]], missing: set[int]) -> None:
    """Raise if nobody says what the values of a module are."""
    for name, m in order:
        for computed in computations(m):
            raise UninitializedParameterError(
                explain(
                    f"nn.materialize met {name or type(m).__name__!r} with {computed} on the meta device",
                    "reset_parameters draws for parameters, and this attribute is computed from others",
                    "nn.materialize(model) first and the parametrization or pruning afterwards; or "
                    "module.to_empty(device=...) and load_state_dict",
                )
            )
    for name, m in order:
        if _reset_of(m) is None and any(id(b) in missing for b in _own(m).values()):
            raise UninitializedParameterError(
                explain(
                    f"nn.materialize met {name or type(m).__name__!r} with parameters on the meta device",
                    f"{type(m).__name__} has no reset_parameters, so nobody says what their values are",
                    "define reset_parameters(self) with nn.init functions; or module.to_empty("
                    "device=...) and load_state_dict",
                )
            )


class _Copies:
    """What was copied before it had numbers, as nn.TransformerEncoder copies its layer.

    Copies of a box hold the very same struct, until an initialiser gives them one of their own.
    """

    def __init__(self, missing: set[int], modules: list[Module]) -> None:
        self._missing = missing
        self._first: dict[int, tuple[Any, Box]] = {}  # for each struct, which has to stay alive
        self._boxes: set[int] = set()
        self._modules = dict.fromkeys(modules, False)

    def allocate(self, box: Box, name: str, device: Any) -> None:
        """Put zeros into a box, or the numbers of the one that it is a copy of."""
        struct = box._value
        if device is None:
            device = struct.sharding
        elif isinstance(device, dict):
            at = slice_of(box)
            device = device[id(box if at is None else at.whole)]
            if at is not None:
                at.note_place(device)
                device = place_of_entry(device, at.position(at.whole._value))
        elif callable(device) and not isinstance(device, device_type):
            device = device(name, struct)
        place = resolve_device(device)
        _, first = self._first.setdefault(id(struct), (struct, box))
        if first is box:
            Box.write(box, filled(struct.shape, struct.dtype, place))
        else:
            Box.write(box, jax.device_put(first._value, place, may_alias=False))
            self._boxes.add(id(box))

    def cover(self, m: Module) -> bool:
        """Say whether all that was missing in a module is a copy; asked for its children first."""
        parts = [id(b) in self._boxes for b in _own(m).values() if id(b) in self._missing]
        parts += [self._modules[c] for c in m._nn_shown().values() if c in self._modules]
        self._modules[m] = all(parts)
        return all(parts)


def _construction_order(
    module: Module, missing: set[int]
) -> tuple[list[tuple[str, Module]], dict[Module, Module]]:
    """Return the modules that have something to draw, children first, and where each module belongs."""
    order: list[tuple[str, Module]] = []
    parents: dict[Module, Module] = {}
    needed: set[Module] = set()

    def below(m: Module, name: str) -> list[tuple[str, Any]]:
        children = [(k, child) for k, child in m._nn_shown().items() if child is not None]
        for _, child in children:
            if child not in parents or _first_home(child) is m:
                parents[child] = m
        return [(f"{name}.{k}" if name else k, child) for k, child in children]

    for event, name, m in walk(module, below, once=True):
        if event is LEAVE:
            children = [child for child in m._nn_shown().values() if child is not None]
            own = any(id(b) in missing for b in _own(m).values())
            if own or any(child in needed for child in children):
                needed.add(m)
                order.append((name, m))
    return order, parents


def _first_home(member: Module | Box) -> Any:
    """Return the module in which a box or module was registered first, if that is known."""
    return member._nn_home[0]() if isinstance(member._nn_home, tuple) else None


def _upwards(module: Module, parents: dict[Module, Module]) -> set[Module]:
    """Return a module and all those to which it belongs."""
    found: set[Module] = set()
    above: Module | None = module
    while above is not None and above not in found:
        found.add(above)
        above = parents.get(above)
    return found


def _reset_of(module: Module) -> Callable | None:
    if isinstance(module, AdaptiveLogSoftmaxWithLoss):
        return None  # its constructor leaves drawing to its children; its reset_parameters asks them again
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(module, name, None)):
            return getattr(module, name)
    return None
