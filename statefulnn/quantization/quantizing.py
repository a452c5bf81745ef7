"""nn.quantize: weights become codes in buffers, by a parametrization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.core.names import Filter, chosen
from statefulnn.core.parameter import Buffer
from statefulnn.core.plan import plan_of
from statefulnn.core.slices import slice_of
from statefulnn.core.tracebacks import shortened
from statefulnn.modules.conv import _Convolution
from statefulnn.modules.conv_transpose import _ConvTransposeNd
from statefulnn.modules.linear import Linear
from statefulnn.modules.normalization import LayerNorm, RMSNorm
from statefulnn.modules.sparse import Embedding
from statefulnn.quantization import _refusals as refusals
from statefulnn.quantization import formats
from statefulnn.quantization.report import QuantizationReport, QuantizedLayer
from statefulnn.utils._computed import base_of, computations
from statefulnn.utils._tensors import numbers_of
from statefulnn.utils.parametrize import register_parametrization


class _Format(Module):
    """A parametrization that computes a weight from codes; its class says how.

    Args:
        shape: of the weight.
        axis: whose entries have constants of their own, where the format has constants of rows.
    """

    def __init__(self, shape: Iterable[int], axis: int = 0) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.axis = axis

    def right_inverse(self, weight: jax.Array) -> tuple[jax.Array, ...]:
        """Return codes and constants of a weight."""
        if weight.shape != self.shape:
            raise refusals.other_shape(weight.shape, self.shape)
        return self._codes(weight)

    def _codes(self, weight: jax.Array) -> tuple[jax.Array, ...]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.shape))


class Int8(_Format):
    """A weight in 8 bits: integers times a scale for each output channel, its largest size over 127.

    No number is off by more than half a scale. It is a parametrization (`nn.utils.parametrize`), which
    `nn.quantize` registers.

    Args:
        shape: of the weight.
        axis: the axis of the output channels.

    Shape:
        - input: codes of the weight's shape, int8; scales, of size 1 in all axes but one.
        - output: the weight, in the dtype of the scales.

    Source: Jacob et al. 2018, arXiv:1712.05877, symmetric and by channels.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> form = nn.quantization.Int8((1, 3))
        >>> codes, scale = form.right_inverse(jnp.array([[-1.0, 0.5, 0.25]]))
        >>> codes.tolist(), form(codes, scale).shape
        ([[-127, 64, 32]], (1, 3))
    """

    def _codes(self, weight: jax.Array) -> tuple[jax.Array, ...]:
        back = lambda x: jnp.swapaxes(x, 0, self.axis)
        return tuple(map(back, formats.int8_codes(back(weight))))

    def forward(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return formats.int8_values(codes, scale)


class NF4(_Format):
    """A weight in 4 bits: 16 quantiles of a normal distribution times a constant for each 64 numbers.

    The constants are stored in 8 bits themselves, so a number takes 4.13 bits. It is a parametrization
    (`nn.utils.parametrize`), which `nn.quantize` registers.

    Args:
        shape: of the weight.
        axis: ignored.

    Shape:
        - input: codes, two in a byte along the last axis where blocks fit; one constant for each block, int8;
          for each 256 constants a step; the mean of the constants; and where blocks do not fit, no number in
          the weight's shape, ``(*shape, 0)``, by which a file for a weight of another shape is refused.
        - output: the weight, in the dtype of the mean.

    Source: Dettmers et al. 2023, arXiv:2305.14314.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> form = nn.quantization.NF4((2, 64))
        >>> codes, *constants = form.right_inverse(jnp.linspace(-1, 1, 128).reshape(2, 64))
        >>> codes.shape, str(codes.dtype), form(codes, *constants)[0, :3].round(3).tolist()
        ((2, 32), 'uint8', [-1.0, -1.0, -1.0])
    """

    def _codes(self, weight: jax.Array) -> tuple[jax.Array, ...]:
        parts = formats.nf4_codes(weight)
        flat = parts[0].ndim == 1  # which tells nothing of the shape
        return (*parts, jnp.zeros((*weight.shape, 0), jnp.uint8)) if flat else parts

    def forward(
        self,
        codes: jax.Array,
        constants: jax.Array,
        steps: jax.Array,
        mean: jax.Array,
        shape: jax.Array | None = None,
    ) -> jax.Array:
        return formats.nf4_values(codes, constants, steps, mean, shape=self.shape)


_KINDS = (Linear, Embedding, _Convolution)
FORMATS: dict[str, type[_Format]] = {"int8": Int8, "nf4": NF4}


@shortened
def quantize(model: Module, layers: Filter = None, format: str = "nf4") -> QuantizationReport:
    """Store the weights of layers in 8 or 4 bits; a layer that reads its weight computes it from these.

    Layers stay what they are, and ``layer.weight`` reads as an array in its former dtype. What is stored are
    buffers: codes, ``fc.parametrizations.weight.original0``, and constants, ``original1`` and so on. They are
    in state dicts and files, and never trained; gradients flow through to inputs. A file is loaded into a
    model that was quantised alike.

    Args:
        model: the model, which is changed.
        layers: which ones, by dotted name: names, patterns such as "*.mlp.*|head", a function of the name;
            None for all. Of what a pattern finds, those are quantised whose `weight` is a matrix or a kernel:
            Linear, Embedding, convolutions, layers of your own; no norms.
        format: "int8", symmetric with a scale for each output channel; or "nf4", 4 bits in blocks of 64.

    Returns:
        What it did: bytes and errors, layer by layer. Print it.

    Raises:
        UnknownNameError: for a pattern without a match, and for layers that have no such weight.
        ArgumentError: if a weight is tied, computed, quantised already, of integers or not finite; for an
            unknown format. Nothing is changed then.
        StructureChangeError: in a traced function.

    Source: Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
        >>> report = nn.quantize(model, "0", "nf4")
        >>> report.before, report.after, report.frozen
        (65536, 8456, ['0.weight'])
        >>> isinstance(model[0], nn.Linear), model[0].weight.shape, model(jnp.ones((1, 64))).shape
        (True, (256, 64), (1, 4))
        >>> [name for name, _ in model.named_parameters()]
        ['0.bias', '2.weight', '2.bias']
    """
    require_module(model, "nn.quantize")
    if format not in FORMATS:
        raise refusals.no_format(format, list(FORMATS))
    if current_trace() is not EAGER:
        raise refusals.while_tracing()
    found = _quantizable(model, layers)
    return QuantizationReport(
        format, tuple(_quantized(name, layer, FORMATS[format]) for name, layer in found.items())
    )


def _quantizable(model: Module, layers: Filter) -> dict[str, Module]:
    """Return the layers that a filter chooses, by name; raise if one of them cannot be quantised."""
    modules = dict(model.named_modules())
    names = chosen(modules, layers, "nn.quantize")
    found = {name: modules[name] for name in names if _has_matrix(modules[name])}
    without = {n: type(modules[n]).__name__ for n in names if n not in found}
    named = _texts(layers)
    if not found or not named.isdisjoint(without):
        raise refusals.no_weight({n: k for n, k in without.items() if n in named or not found})
    holders = _holders(model, modules)
    reasons = {name: _why_not(layer, name, holders) for name, layer in found.items()}
    if not any(reasons.values()):
        finite = jax.device_get([_finite(layer._parameters["weight"]) for layer in found.values()])
        reasons = {n: refusals.NOT_FINITE for n, ok in zip(found, finite, strict=True) if not ok}
    if any(reasons.values()):
        raise refusals.cannot({name: reason for name, reason in reasons.items() if reason})
    return found


def _texts(layers: Filter) -> set[str]:
    """Return the texts of a filter, some of which may be whole names."""
    given = [layers] if isinstance(layers, str) else layers
    texts = given if isinstance(given, Iterable) else []
    return {part for text in texts for part in (text, *text.split("|"))}


def _has_matrix(module: Any) -> bool:
    weight = module._parameters.get("weight")
    if weight is None:
        return any(c.name == "weight" for c in computations(module))
    numbers_of(weight, f"quantised {weight.label()}")
    return weight.ndim > 1 and not isinstance(module, (LayerNorm, RMSNorm))


def _holders(model: Module, modules: dict[str, Any]) -> dict[int, list[str]]:
    """Return for each parameter the names of the attributes that hold it, or refer to it."""
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        for own, box in module._parameters.items():
            if box is not None:
                holders.setdefault(id(box), []).append(f"{name}.{own}".lstrip("."))
    plan = plan_of(model)
    for node in plan.moduledef.nodes:
        for name, what, number in node.references:
            if what == "box":
                box = plan.boxes[plan.moduledef.order[number]]
                holders.setdefault(id(box), []).append(f"{name} of {node.cls.__name__}")
    return holders


def _why_not(layer: Any, name: str, holders: dict[int, list[str]]) -> str:
    """Return why the weight of a layer cannot be quantised, nothing if it can."""
    for computed in computations(layer):
        if computed.name == "weight":
            held = getattr(layer, "parametrizations", {})
            if "weight" in held and any(isinstance(p, _Format) for p in held["weight"]):
                return refusals.QUANTIZED
            return refusals.COMPUTED.format(computed)
    weight = layer._parameters["weight"]
    others = [h for h in holders.get(id(weight), []) if h != f"{name}.weight".lstrip(".")]
    if slice_of(weight) is not None:
        return refusals.STACKED
    if isinstance(layer, _KINDS) and weight.ndim != 2 + getattr(layer, "spatial", 0):
        return refusals.MEMBERS.format(weight.ndim)
    if others:
        return refusals.TIED.format(", ".join(map(repr, others)))
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        return refusals.DTYPE.format(weight.dtype)
    max_norm = getattr(layer, "max_norm", None)
    return "" if max_norm is None else refusals.MAX_NORM.format(max_norm)


@jax.jit
def _finite(x: Any) -> jax.Array:
    return jnp.isfinite(x).all()


def _quantized(name: str, layer: Any, form: type[_Format]) -> QuantizedLayer:
    weight = layer.weight.value
    delattr(layer, "weight")
    layer.register_buffer("weight", Buffer(weight))  # so that codes and constants become buffers
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    register_parametrization(layer, "weight", form(weight.shape, axis), unsafe=True)
    stored = layer.parametrizations["weight"].buffers()
    error = float(formats.relative_error(weight, layer.weight))
    kind = base_of(layer).__name__
    return QuantizedLayer(
        name, kind, weight.shape, weight.nbytes, sum(a.nbytes for a in stored), error
    )
