"""Finding weights that can carry an adapter, and those that do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from statefulnn.core.module import Module
from statefulnn.core.names import Filter, chosen
from statefulnn.core.parameter import Parameter
from statefulnn.lora import _refusals as refusals
from statefulnn.lora.adapters import CHILD, Adapter, Adapters, Beside, Layout
from statefulnn.modules.adaptive import AdaptiveLogSoftmaxWithLoss
from statefulnn.modules.attention import MultiheadAttention
from statefulnn.modules.conv import Conv1d
from statefulnn.modules.linear import Linear
from statefulnn.modules.normalization import LayerNorm, RMSNorm
from statefulnn.modules.sparse import Embedding
from statefulnn.transforms.functional_call import functional_call
from statefulnn.utils._computed import add_computation, base_of, computations, remove_computation
from statefulnn.utils._tensors import numbers_of
from statefulnn.utils.parametrize import register_parametrization, remove_parametrizations

_WEIGHT = re.compile(r"(.*_)?weight(_.*)?")
# These read the weights of layers inside of them, and do not call them.
_READERS = (MultiheadAttention, AdaptiveLogSoftmaxWithLoss)


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that carries adapters, or may.

    Attributes:
        path: the dotted name of the layer.
        layer: the layer.
        name: the name of the weight in it.
        layout: how it is a matrix, and where the adapters go.
    """

    path: str
    layer: Any
    name: str
    layout: Layout

    @property
    def label(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def adapters(self) -> Adapters | None:
        return adapters_of(self.layer, self.name)

    @property
    def box(self) -> Parameter | None:
        """The parameter with the numbers of the base; None if they are computed."""
        own = self.layer._parameters.get(self.name)
        if own is None and self.layout.kind == "weight" and self.adapters is not None:
            own = self.layer.parametrizations[self.name]._parameters.get("original")
        return own

    @property
    def shape(self) -> tuple[int, ...]:
        box = self.box
        return tuple(getattr(self.layer, self.name).shape if box is None else box.shape)

    def add(self, name: str, adapter: Adapter) -> None:
        """Give the weight an adapter; it is not active yet."""
        adapters = self.adapters
        if adapters is None:
            adapters = Adapters(self.layout).train(self.layer.training)
            own = list(self.layer._parameters)
            adapters.behind = tuple(own[own.index(self.name) + 1 :] if self.name in own else ())
            if self.layout.kind == "weight":
                register_parametrization(self.layer, self.name, adapters, unsafe=True)
            else:
                setattr(self.layer, CHILD, adapters)
                add_computation(self.layer, Beside())
        adapters[name] = adapter.train(self.layer.training)

    def remove(self, name: str) -> None:
        """Take an adapter away, and with the last one what held it."""
        adapters: Any = self.adapters
        adapters.active = tuple(n for n in adapters.active if n != name)
        del adapters[name]
        if len(adapters):
            return
        if self.layout.kind == "weight":
            remove_parametrizations(self.layer, self.name, leave_parametrized=False)
            for n in adapters.behind:  # the order of parameters is that of vectors made of them
                if n in self.layer._parameters:
                    box = self.layer._parameters[n]
                    delattr(self.layer, n)
                    self.layer.register_parameter(n, box)
        else:
            remove_computation(self.layer, Beside())
            delattr(self.layer, CHILD)


def adapters_of(layer: Any, name: str) -> Adapters | None:
    """Return the adapters that a weight of a layer has."""
    beside = layer._modules.get(CHILD)
    if name == "weight" and isinstance(beside, Adapters):
        return beside
    lists = layer._modules.get("parametrizations") or {}
    first = lists[name][0] if name in lists else None
    return first if isinstance(first, Adapters) else None


def carriers(model: Module) -> list[Target]:
    """Return the weights of a model that have adapters."""
    found = []
    first = {id(layer): path for path, layer in reversed(named_layers(model).items())}
    for path, layer in named_layers(model).items():
        for name in _weight_names(layer) if first[id(layer)] == path else ():
            adapters = adapters_of(layer, name)
            if adapters is not None:
                found.append(Target(path, layer, name, adapters.layout))
    return found


def named_layers(model: Module) -> dict[str, Any]:
    """Return the modules of a model by every name they have, but for adapters and parametrizations."""
    inner = re.compile(rf"(.*\.)?(parametrizations|{CHILD})(\..*)?")
    modules = dict(model.named_modules(remove_duplicate=False))
    ours = {n for n, m in modules.items() if isinstance(m, Adapters)}
    return {
        name: module
        for name, module in modules.items()
        if not (inner.fullmatch(name) and any(f"{name}.".startswith(f"{n}.") for n in ours))
        and not re.fullmatch(r"(.*\.)?parametrizations(\..*)?", name)
    }


def wanted_targets(model: Module, layers: Filter, where: str) -> list[Target]:
    """Return the weights that can carry an adapter of the layers that a filter chooses."""
    known = named_layers(model)
    names = chosen(known, layers, where)
    readers = [path for path, layer in known.items() if isinstance(layer, _READERS)]
    wanted = dict.fromkeys(names)
    for path in names:
        if isinstance(known[path], MultiheadAttention):  # one layer, though its parts are two
            wanted[f"{path}.out_proj" if path else "out_proj"] = None
    found: dict[int, list[Target]] = {}
    for path in wanted:
        by_reader = any(path.startswith(f"{r}." if r else "") and path != r for r in readers)
        found.setdefault(id(known[path]), list(_targets_of(path, known[path], by_reader)))
    targets = [target for those in found.values() for target in those]
    if not targets:
        below = [
            p
            for p, layer in known.items()
            if any(p.startswith(f"{n}." if n else "") for n in names)
            and any(_targets_of(p, layer, True))
        ]
        kinds = {p: type(known[p]).__name__ for p in names}
        raise refusals.no_carrier(where, kinds, below)
    return targets


def _weight_names(layer: Any) -> list[str]:
    """Return the names of the attributes of a layer that may be matrices."""
    computed = [c.name for c in computations(layer)]
    computed += ["weight"] if hasattr(type(layer), "weight") else []
    names = dict.fromkeys([*parameter_order(layer), *computed])
    return [n for n in names if _WEIGHT.fullmatch(n)]


def parameter_order(layer: Any) -> list[str]:
    """Return the names of parameters of a layer, in the order that they were registered in."""
    names = list(layer._parameters)
    parametrized = layer._modules.get("parametrizations") or {}
    for name, those in reversed(list(parametrized.items())):
        behind = [names.index(n) for n in getattr(those[0], "behind", ()) if n in names]
        names.insert(min(behind, default=len(names)), name)
    return names


def _targets_of(path: str, layer: object, by_reader: bool) -> Iterator[Target]:
    if isinstance(layer, (LayerNorm, RMSNorm)):
        return
    for name in _weight_names(layer):
        if getattr(getattr(layer, name), "ndim", 0) < 2:  # a vector, or None
            continue
        adapters = adapters_of(layer, name)
        if adapters is not None:
            layout = adapters.layout
        elif by_reader or name != "weight":
            layout = Layout("weight")
        else:
            layout = _layout(layer) or Layout("weight")
        yield Target(path, layer, name, layout)


def _layout(layer: Any) -> Layout | None:
    """Return how adapters act beside a layer; None if they cannot."""
    forward = base_of(layer).forward
    if forward is Linear.forward:
        return Layout("linear")
    if forward is Embedding.forward:
        return None if layer.max_norm is not None else Layout("embedding", transposed=True)
    if forward is Conv1d.forward:
        return Layout("conv") if layer.groups == 1 else None
    return _tried(layer)


def _tried(layer: Any) -> Layout | None:
    """Find out whether a layer with a forward of its own computes ``x @ weight.T + bias``, by an example.

    GPT-2's layers compute ``x @ weight + bias``, and peft knows them by their class, which is another here.
    """
    params = dict(layer.named_parameters())
    weight: Any = getattr(layer, "weight", None)
    if getattr(weight, "ndim", 0) != 2 or not params.keys() <= {"weight", "bias"}:
        return None
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.random(shape, np.float32) - np.float32(0.5)
    values = {name: draw(p.shape) for name, p in params.items()}
    given = values.copy()
    if "weight" not in values:  # stored small, and computed: that one, if it tells both ways apart
        own = values["weight"] = np.asarray(weight, np.float32)
        if own.shape[0] == own.shape[1] and np.allclose(own, own.T):
            return None
    tolerance = 1e-3 if jnp.finfo(weight.dtype).bits >= 32 else 0.1
    # A layer that was converted takes inputs of the shapes that it was traced for.
    outer = [shape[:-1] for shape in getattr(layer, "example_shapes", ())] or [(2,)]
    for transposed, batch in itertools.product((False, True), outer):
        matrix = values["weight"].T if not transposed else values["weight"]
        x = draw((*batch, matrix.shape[0]))
        cast = {name: jnp.asarray(v, weight.dtype) for name, v in given.items()}
        try:
            expected = x @ matrix + values.get("bias", np.float32(0))
            out = functional_call(layer, cast, (jnp.asarray(x, weight.dtype),))
            out = np.asarray(out, np.float32)
        except Exception:  # it takes something else
            continue
        if out.shape == expected.shape and np.allclose(out, expected, tolerance, tolerance):
            return Layout("linear", transposed)
    return None


def check_bases(targets: list[Target], where: str, writes: bool) -> None:
    """Raise for weights that cannot carry an adapter as they are.

    Args:
        writes: whether the base has to be written.
    """
    for target in targets:
        layer, box = target.layer, target.box
        if box is not None:
            numbers_of(box, f"{where} on {target.label!r}")
            if not jnp.issubdtype(box.dtype, jnp.floating):
                raise refusals.not_floating(where, target.label, box.dtype)
        # What is stored small and computed from buffers may stay so, if nothing has to be written.
        elif target.layout.kind == "weight" or writes or _is_trained(layer):
            raise refusals.computed(where, target.label, writes)
        if isinstance(layer, Embedding) and layer.max_norm is not None:
            raise refusals.embedding_with_max_norm(where, target.label)
        kernel = 2 + getattr(layer, "spatial", 0)
        if target.layout.kind != "weight" and len(target.shape) != kernel:
            raise refusals.of_members(where, target.label, target.shape)
        if target.adapters is None and target.layout.kind != "weight" and hasattr(layer, CHILD):
            raise refusals.taken(where, target.path, CHILD)


def _is_trained(layer: Any) -> bool:
    return any("weight" in name for name, _ in layer.named_parameters() if CHILD not in name)


def ties(model: Module, targets: list[Target]) -> dict[str, list[str]]:
    """Return for each target whose parameter other modules have too: its label, and the names there."""
    inner = re.compile(r"parametrizations\.([^.]+)\.original$")
    names: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            full = inner.sub(r"\1", f"{path}.{name}" if path else name)
            names.setdefault(id(p), {})[id(module)] = full
    found: dict[str, list[str]] = {}
    for t in [t for t in targets if t.box is not None]:
        owner = t.layer if t.name in t.layer._parameters else t.layer.parametrizations[t.name]
        others = [n for i, n in names.get(id(t.box), {}).items() if i != id(owner)]
        if others:
            found[t.label] = others
    return found
