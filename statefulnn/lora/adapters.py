"""The low-rank matrices themselves: what one weight gets, and the two ways in which they take effect.

*Beside* the layer, where it is a plain linear map of its input: ``layer(x) + scale * up(down(dropout(x)))``.
Neither the weight nor its gradient is computed. *In* the weight everywhere else, as a parametrization:
``layer.weight`` reads as ``W + scale * B A``. The matrices have the shapes of peft's.

Source: Hu et al., LoRA, 2021; Kalajdzievski, rsLoRA, 2023; Liu et al., DoRA, 2024; Meng et al., PiSSA, 2024.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.box import unwrap
from statefulnn.core.module import Module
from statefulnn.functional._compiled import compiled
from statefulnn.functional.conv import conv_nd
from statefulnn.lora import _refusals as refusals
from statefulnn.modules.containers import ModuleDict
from statefulnn.utils._computed import Computation, Loading, base_of

CHILD = "lora"  # under which a layer has what acts beside it
VARIANTS = ("rslora", "dora", "pissa")


@dataclass(frozen=True)
class Layout:
    """How a weight is a matrix.

    Attributes:
        kind: "linear", "embedding" or "conv" beside such a layer; "weight" in a weight of any layer.
        transposed: whether the weight lies as ``(in, out)``.
    """

    kind: str
    transposed: bool = False

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the sizes of outputs and inputs of the matrix."""
        count = math.prod(shape[1:])
        return (count, shape[0]) if self.transposed else (shape[0], count)

    def shapes(self, shape: tuple[int, ...], rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an adapter's parameters, which are peft's."""
        out, size = self.sizes(shape)
        conv = self.kind == "conv"
        ones = (1,) * len(shape[2:])
        shapes = {
            "lora_A": (rank, *shape[1:]) if conv else (rank, size),
            "lora_B": (out, rank, *ones) if conv else (out, rank),
        }
        if dora:
            shapes["lora_magnitude"] = (1, out, *ones) if conv else (out,)
        return shapes

    def matrix(self, weight: jax.Array) -> jax.Array:
        """Return a weight as ``(out, in)``."""
        return weight.T if self.transposed else weight.reshape(weight.shape[0], -1)

    def weight(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return a matrix ``(out, in)`` in the shape of the weight."""
        return (matrix.T if self.transposed else matrix).reshape(shape)


@dataclass(frozen=True)
class Spec:
    """What an adapter is like.

    Attributes:
        rank, alpha: the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` for "rslora".
        dropout: the probability that an element of the input is dropped on the way through the adapter.
        variants: some of `VARIANTS`.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    variants: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        root = math.sqrt(self.rank) if "rslora" in self.variants else self.rank
        return self.alpha / root


# What follows is compiled: one dispatch each in eager code, and XLA chooses the layouts on explicit meshes.
_by_shape = functools.partial(compiled, static_argnames=("layout", "spec"))


def _product(
    weight: jax.Array, a: jax.Array, b: jax.Array, layout: Layout, spec: Spec
) -> jax.Array:
    product = b.reshape(-1, spec.rank) @ a.reshape(spec.rank, -1)
    return layout.weight(spec.scale * product, weight.shape).astype(weight.dtype)


_delta = _by_shape(_product)


@_by_shape
def _changed_norm(
    weight: jax.Array, a: jax.Array, b: jax.Array, layout: Layout, spec: Spec
) -> jax.Array:
    """Return the norm of each row of the changed matrix, which DoRA takes for a constant."""
    matrix = layout.matrix(weight + _product(weight, a, b, layout, spec)).astype(a.dtype)
    return jax.lax.stop_gradient(jnp.linalg.norm(matrix, axis=1))


@functools.partial(compiled, static_argnames="layout")
def _scaled(weight: jax.Array, magnitude: jax.Array, norm: jax.Array, layout: Layout) -> jax.Array:
    """Return a weight with its rows as long as the magnitude says, where they are as long as `norm`."""
    factor = magnitude.reshape(-1) / norm
    ones = () if layout.transposed else (1,) * (weight.ndim - 1)
    return weight * factor.reshape(-1, *ones).astype(weight.dtype)


@compiled
def _dora(
    out: jax.Array, plain: jax.Array, more: jax.Array, magnitude: jax.Array, norm: jax.Array
) -> jax.Array:
    """Return the output of a layer whose rows are scaled: `plain` is without bias, `more` the change."""
    factor = magnitude.reshape(magnitude.shape[1:] if magnitude.ndim > 1 else magnitude.shape)
    factor = (factor / norm.reshape(factor.shape)).astype(more.dtype)
    return out + ((factor - 1) * plain.astype(more.dtype) + factor * more).astype(out.dtype)


@_by_shape
def _largest(weight: jax.Array, layout: Layout, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """Return PiSSA's matrices."""
    u, s, vh = jnp.linalg.svd(layout.matrix(weight), full_matrices=False)
    root = jnp.sqrt(s[: spec.rank] / spec.scale)
    return root[:, None] * vh[: spec.rank], u[:, : spec.rank] * root


class Adapter(Module):
    """One low-rank change of one weight.

    Attributes:
        lora_A: ``(rank, in)``, of a convolution ``(rank, in, *kernel)``.
        lora_B: ``(out, rank)``, of a convolution ``(out, rank, 1, ...)``.
        lora_magnitude: ``(out,)``, of a convolution ``(1, out, 1, ...)``; None but for DoRA.
        layout: how the weight is a matrix.
        spec: rank, alpha, dropout and variants.
    """

    def __init__(self, layout: Layout, weight: Any, spec: Spec) -> None:
        super().__init__()
        self.layout, self.spec = layout, spec
        half = jnp.finfo(weight.dtype).bits < 32  # as peft: small steps would be lost in 16 bits
        dtype = jnp.dtype(jnp.float32) if half else weight.dtype
        self.lora_magnitude = None
        shapes = layout.shapes(weight.shape, spec.rank, "dora" in spec.variants)
        for name, shape in shapes.items():
            setattr(self, name, init.empty_parameter(shape, dtype))

    def start(self, weight: jax.Array) -> None:
        """Give the initial values, for a weight that the adapter is to change."""
        if "pissa" in self.spec.variants:
            a, b = _largest(weight.astype(self.lora_A.dtype), self.layout, self.spec)
            self.lora_A.value, self.lora_B.value = (
                a.reshape(self.lora_A.shape),
                b.reshape(self.lora_B.shape),
            )
            # What was taken out of the weight, to give it back; a state dict has it beside that weight.
            self.register_buffer("first_A", self.lora_A.value)
            self.register_buffer("first_B", self.lora_B.value)
        elif self.layout.kind == "embedding":
            init.normal_(self.lora_B)
        else:
            init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.lora_magnitude is not None:
            self.lora_magnitude.value = self._norm(weight).reshape(self.lora_magnitude.shape)

    def delta(self, weight: jax.Array) -> jax.Array:
        """Return ``scale * B A`` in the shape and dtype of the weight."""
        return _delta(weight, unwrap(self.lora_A), unwrap(self.lora_B), self.layout, self.spec)

    def taken_out(self, weight: jax.Array) -> jax.Array:
        """Return what PiSSA took out of the weight."""
        return _delta(weight, self.first_A, self.first_B, self.layout, self.spec)

    def _norm(self, weight: jax.Array) -> jax.Array:
        a, b = unwrap(self.lora_A), unwrap(self.lora_B)
        return _changed_norm(weight, a, b, self.layout, self.spec)

    def changed(self, weight: jax.Array) -> jax.Array:
        """Return the weight with this change."""
        changed = weight + self.delta(weight)
        if self.lora_magnitude is None:
            return changed
        return _scaled(changed, unwrap(self.lora_magnitude), self._norm(weight), self.layout)

    def merged_into(self, weight: jax.Array) -> jax.Array:
        """Return the weight with this change, and note what `undone` needs."""
        if self.lora_magnitude is not None:
            self.register_buffer("merged_norm", self._norm(weight))
        return self.changed(weight)

    def undone(self, weight: jax.Array) -> jax.Array:
        """Return the weight without this change."""
        if self.lora_magnitude is not None:
            weight = _scaled(
                weight, self.merged_norm, unwrap(self.lora_magnitude).reshape(-1), self.layout
            )
            del self.merged_norm
        return weight - self.delta(weight)

    def beside(self, layer: Any, x: jax.Array, out: jax.Array) -> jax.Array:
        """Return the output of a layer with this change."""
        a, b = unwrap(self.lora_A), unwrap(self.lora_B)
        if self.layout.kind != "embedding":
            x = F.dropout(
                jnp.asarray(x).astype(a.dtype),
                self.spec.dropout,
                training=layer.training and self.spec.dropout > 0,
            )
        down, up = _maps(layer, self.layout)
        more = self.spec.scale * up(down(x, a), b)
        if self.lora_magnitude is None:
            return out + more.astype(out.dtype)
        weight, plain = jnp.asarray(layer.weight), out
        if self.layout.kind != "embedding":  # without the bias
            plain = down(x, (weight.T if self.layout.transposed else weight).astype(x.dtype))
        return _dora(out, plain, more, unwrap(self.lora_magnitude), self._norm(weight))

    def extra_repr(self) -> str:
        s = self.spec
        parts = [f"rank={s.rank}, alpha={s.alpha:g}"]
        parts += [f"dropout={s.dropout}"] if s.dropout else []
        return ", ".join([*parts, *s.variants])


def _maps(layer: Any, layout: Layout) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the linear map of a layer as a function of input and kernel, and the one after it."""
    if layout.kind == "embedding":
        look_up = lambda x, a: F.embedding(
            x, jnp.asarray(a).T, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq
        )
        return look_up, F.linear
    if layout.kind == "linear":
        return F.linear, F.linear
    n, how = layer.spatial, (layer.stride, layer.padding, layer.dilation, 1, layer.padding_mode)
    return (
        lambda x, a: conv_nd(n, x, a, None, *how),
        lambda x, b: conv_nd(n, x, b, None, (1,) * n, (0,) * n, (1,) * n, 1),
    )


class Adapters(ModuleDict):
    """The adapters of one weight, by name.

    Attributes:
        active: the names of those that take effect.
        merged: the names of those that the weight contains by now; None if it contains none.
        behind: the parameters of the layer that come after the weight, for the time when it is put back.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] | None = None
        self.behind: tuple[str, ...] = ()

    def forward(self, weight: jax.Array) -> jax.Array:
        """Return the weight with the active changes; this is the parametrization."""
        for name in self.active if self.merged is None else ():
            weight = self[name].changed(weight)
        return weight

    def _convert_old_names(self, name: str, given: Loading) -> None:
        """Take the weight of a checkpoint of the base by its own name."""
        place = f"{given.prefix}parametrizations.{name}."
        old, new = f"{given.prefix}{name}", f"{place}original"
        if old in given.state_dict and new not in given.state_dict:
            given.state_dict[new] = given.state_dict.pop(old)
        self.check_base(new, f"{place}0.", given)

    def check_base(self, weight: str, place: str, given: Loading) -> None:
        """Raise for a weight of which PiSSA has taken nothing out: the adapter would add it a second time.

        Args:
            weight: its name in the state dict.
            place: what the names of these adapters begin with there.
            given: what is loaded.
        """
        without = [
            name
            for name, adapter in self.items()
            if "pissa" in adapter.spec.variants and f"{place}{name}.first_A" not in given.state_dict
        ]
        if without and weight in given.state_dict:
            raise refusals.base_into_pissa(weight, f"{place}{without[0]}.first_A")

    def extra_repr(self) -> str:
        return f"active={', '.join(self.active) or None}" + (", merged" if self.merged else "")


def _forward_with_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
    out = base_of(self).forward(self, *args, **kwargs)
    x = args[0] if args else next(iter(kwargs.values()))
    adapters = self._modules[CHILD]
    for name in adapters.active:
        out = adapters[name].beside(self, x, out)
    return out


@dataclass(frozen=True)
class Beside(Computation):
    """Computes ``layer.forward``: that of the class, and beside it what the adapters add."""

    name: str = "forward"

    def __str__(self) -> str:
        return "the forward of its class with adapters"

    def read(self, module: Any) -> Any:
        adapters = module._modules[CHILD]
        works = adapters.active and adapters.merged is None
        function = _forward_with_adapters if works else base_of(module).forward
        return types.MethodType(function, module)

    def before_loading(self, module: Any, given: Loading) -> None:
        module._modules[CHILD].check_base(f"{given.prefix}weight", f"{given.prefix}{CHILD}.", given)
