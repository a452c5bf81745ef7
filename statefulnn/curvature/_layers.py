"""The tangent kernel layer by layer: inputs and cotangents instead of gradients of weights.

Terms
  structured layer  a Linear, convolution or Embedding whose weight and bias enter the model through this
                    layer alone
  position          where a layer applies its weight: a pixel of a convolution's output, a step of a
                    sequence, another call of the same layer
  patch             what the weight is multiplied with at one position, (K,); of an Embedding the row's
                    number, which stands for a unit vector
  cotangent         the derivative of one output of the model by the layer's output at one position

The gradient of a weight is the sum over positions t of ``cotangent[t] ⊗ patch[t]``.

The cotangents are derivatives by a zero that is added to the layer's output by a forward hook; the hook
sees the input as well. Hooks are registered on a twin of the module, which shares its arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.compat import current_trace, own_on_devices, trace_of
from statefulnn.core.graph import merge, split
from statefulnn.core.hooks import hooks_of
from statefulnn.core.module import Module
from statefulnn.core.plan import plan_of
from statefulnn.curvature._contractions import jacobian_is_cheaper
from statefulnn.curvature._models import checked_output
from statefulnn.functional.conv import padded
from statefulnn.modules.conv import Conv1d, Conv2d, Conv3d
from statefulnn.modules.linear import Linear
from statefulnn.modules.sparse import Embedding
from statefulnn.transforms.functional_call import functional_call
from statefulnn.transforms.types import PyTree

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
DENSE = (Linear, *CONVOLUTIONS)

# (module, params, inputs) -> what is differentiated.
Call = Callable[[Module, Mapping[str, Any], tuple], Any]


def on_one(module: Module, params: Mapping[str, Any], inputs: tuple) -> Any:
    """Call a module on one example, in a batch of one."""
    return functional_call(module, params, tuple(a[None] for a in inputs))


@dataclass(frozen=True)
class Layers:
    """The structured layers of a module: weight's name -> layer, and a twin of it with the hooks."""

    by_weight: dict[str, Module]
    twin: Module
    tape: _Tape
    call: Call

    def biases(self, params: Collection[str]) -> dict[str, str]:
        """Return those of the names that are biases of these layers, with the weights' names."""
        biases = {f"{weight[:-6]}bias": weight for weight in self.by_weight}
        return {bias: weight for bias, weight in biases.items() if bias in params}

    def run(
        self, params: Mapping[str, Any], inputs: tuple, visit: Callable[[str, tuple, Any], Any]
    ) -> Any:
        """Call the twin on one example, with a function of (name, args, out) at each layer."""
        self.tape.visit = visit
        try:
            return self.call(self.twin, params, inputs)
        finally:
            self.tape.visit = None


class _Tape:
    """What the hooks do while one forward runs."""

    def __init__(self) -> None:
        self.visit: Any = None

    def hook_for(self, name: str) -> Any:
        def hook(module: Module, args: tuple, kwargs: dict, out: PyTree) -> Any:
            return out if self.visit is None else self.visit(name, args, out)

        return hook


def structured_layers(
    module: Module,
    params: Mapping[str, Any],
    inputs: tuple,
    *,
    kinds: tuple[type, ...] = DENSE,
    among: Collection[str] | None = None,
    call: Call = on_one,
) -> Layers:
    """Find the structured layers, by running the module once without numbers.

    Args:
        module: it is not touched.
        params: by name.
        inputs: one example.
        kinds: the classes of layers.
        among: names of weights that may be found; None for all.
        call: what is differentiated.
    """
    by_weight = {}
    names = _leaf_names(module)
    for path, layer in module.named_modules():
        weight = f"{path}.weight" if path else "weight"
        once = names.get(weight) == 1 and names.get(f"{weight[:-6]}bias", 1) == 1
        if once and weight in (params if among is None else among):
            if type(layer) in kinds and _fits(layer):
                by_weight[weight] = layer
    while True:
        layers = _with_hooks(module, by_weight, call)
        refused = _refused(layers, params, inputs)
        if not refused:
            return layers
        by_weight = {name: layer for name, layer in by_weight.items() if name not in refused}


def _leaf_names(module: Module) -> dict[str, int]:
    """Return under how many names each parameter goes, by each of its names."""
    positions = plan_of(module).moduledef.names
    counts: dict[int, int] = {}
    for i in positions.values():
        counts[i] = counts.get(i, 0) + 1
    return {name: counts[i] for name, i in positions.items()}


def _fits(layer: Module) -> bool:
    # A hook may do something else to the output.
    if hooks_of(layer, "_forward_hooks"):
        return False
    if type(layer) is Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq
    return type(layer) is Linear or (layer.groups == 1 and layer.padding_mode == "zeros")


def _with_hooks(module: Module, by_weight: dict[str, Module], call: Call) -> Layers:
    twin, tape = merge(*split(module)), _Tape()
    for name in by_weight:
        layer = twin.get_submodule(name.rpartition(".")[0])
        layer.register_forward_hook(tape.hook_for(name), with_kwargs=True)
    return Layers(by_weight, twin, tape, call)


def _refused(layers: Layers, params: Mapping[str, Any], inputs: tuple) -> set[str]:
    """Return which layers are called in a way, or whose weight is used elsewhere, that does not fit."""
    refused: set[str] = set()
    used: set[str] = set()

    def survey(params: Mapping[str, Any], inputs: tuple) -> None:
        biases = layers.biases(params)
        owned = {n: params[n] for n in (*layers.by_weight, *biases)}

        def outside(some: dict[str, Any]) -> Any:
            here = current_trace()

            def visit(name: str, args: tuple, out: jax.Array) -> Any:
                if current_trace() is not here or not args:
                    refused.add(name)  # in a scan's body, say, where its input cannot be had
                    return out
                # Depend on the input, and on the layer's parameters no longer: who else uses them?
                return jnp.zeros(out.shape, out.dtype) + jnp.sum(args[0]).astype(out.dtype)

            out = layers.run({**params, **some}, inputs, visit)
            if any(trace_of(leaf) is here for leaf in jax.tree.leaves(out)):
                used.update(some)
            return out

        def differentiate(some: dict[str, Any]) -> None:
            # In reverse mode, which modules with backward hooks allow.
            jax.vjp(outside, some)

        if owned:
            differentiate(owned)
        if used:  # by some of them: by which?
            used.clear()
            for name, value in owned.items():
                differentiate({name: value})
        refused.update(biases.get(name, name) for name in used)

    jax.eval_shape(survey, params, inputs)
    return refused


def layer_factors(
    layers: Layers,
    params: Mapping[str, Any],
    inputs: tuple,
    pairs: tuple[int, int],
    outputs: str,
    function: str,
) -> list[tuple]:
    """Return the factors of every parameter for a block of examples.

    Args:
        layers: the structured layers.
        params: by name.
        inputs: arrays (N, ...).
        pairs: how many examples of each side meet in one contraction.
        outputs: which outputs of the model are wanted, see `empirical_ntk`.
        function: for messages.

    Returns:
        for each parameter its Jacobian ``(N, C, size)``, alone in a tuple, or patches ``(N, T, K)``
        and cotangents ``(N, C, T, out)``.
    """
    others = {n: p for n, p in params.items() if n not in layers.by_weight}

    def one_example(inputs: tuple) -> list[tuple]:
        finish = lambda out: checked_output(out, function).reshape(-1)
        out, pull, seen = probed(layers, params, others, inputs, finish)
        jacobians, cotangents = jax.vmap(pull)(jnp.eye(out.size, dtype=out.dtype))
        factors: list[tuple] = [(j.reshape(out.size, -1),) for j in jax.tree.leaves(jacobians)]
        for name in seen:
            patches, cotangent = all_positions(layers.by_weight[name], seen[name], cotangents[name])
            if jacobian_is_cheaper(patches.shape, cotangent.shape, pairs, outputs):
                jacobian = jnp.einsum("tk,cto->cok", patches, cotangent)
                factors.append((jacobian.reshape(out.size, -1),))
            else:
                factors.append((patches, cotangent))
        return factors

    return jax.vmap(one_example)(inputs)


def probed(
    layers: Layers,
    params: Mapping[str, Any],
    others: Mapping[str, Any],
    inputs: tuple,
    finish: Callable[[Any], Any],
) -> tuple[Any, Callable[[Any], tuple[dict, dict]], dict[str, list[Any]]]:
    """Run one example, and differentiate by what the structured layers return.

    Args:
        layers: the structured layers.
        params: by name.
        others: of these the parameters that are differentiated themselves.
        inputs: one example.
        finish: makes one array of the output.

    Returns:
        the output; the function from its cotangent to those of `others` and of the outputs of the layers'
        calls, by weight; the inputs of these calls. A layer that is not called is not among them.
    """
    shapes = jax.eval_shape(lambda i: _probe_shapes(layers, params, i), inputs)
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    others = own_on_devices(dict(others), inputs)

    def of_probes(others: Mapping[str, Any], probes: dict[str, list[Any]]) -> tuple[Any, Any]:
        seen: dict[str, list[Any]] = {name: [] for name in shapes}

        def visit(name: str, args: tuple, out: jax.Array) -> Any:
            probe = probes[name][len(seen[name])]
            seen[name].append(args[0])
            return out + probe

        return finish(layers.run({**params, **others}, inputs, visit)), seen

    return jax.vjp(of_probes, others, zeros, has_aux=True)


def _probe_shapes(layers: Layers, params: Mapping[str, Any], inputs: tuple) -> dict[str, list[Any]]:
    outs: dict[str, list[Any]] = {}

    def visit(name: str, args: tuple, out: jax.Array) -> Any:
        outs.setdefault(name, []).append(out)
        return out

    layers.run(params, inputs, visit)
    return outs


def all_positions(layer: Module, inputs: list[Any], cotangents: list[Any]) -> tuple[Any, Any]:
    """Return patches (T, K), or of an Embedding (T,), and cotangents (C, T, out) of a layer's calls."""
    calls = [_positions(layer, x, d) for x, d in zip(inputs, cotangents, strict=True)]
    return jnp.concatenate([x for x, _ in calls]), jnp.concatenate([d for _, d in calls], 1)


def _positions(layer: Module, x: jax.Array, cotangents: jax.Array) -> tuple[Any, Any]:
    """Return patches and cotangents of one call of a layer."""
    if type(layer) is Embedding:
        cotangents = cotangents.reshape(cotangents.shape[0], -1, cotangents.shape[-1])
        x = x.reshape(-1)
        if layer.padding_idx is not None:
            cotangents = jnp.where((x == layer.padding_idx)[:, None], 0, cotangents)
        return x, cotangents
    if type(layer) is Linear:
        return x.reshape(-1, x.shape[-1]), cotangents.reshape(
            cotangents.shape[0], -1, cotangents.shape[-1]
        )
    spatial = layer.spatial
    cotangents = cotangents.reshape(cotangents.shape[0], -1, *cotangents.shape[-spatial - 1 :])
    patches = jnp.moveaxis(patches_of(layer, x, cotangents.shape[-spatial:]), 1, -1)
    cotangents = jnp.moveaxis(cotangents, 2, -1)
    return (
        patches.reshape(-1, patches.shape[-1]),
        cotangents.reshape(cotangents.shape[0], -1, cotangents.shape[-1]),
    )


def patches_of(layer: Module, x: jax.Array, sizes: tuple[int, ...]) -> Any:
    """Return the patches of a convolution, (N, K, positions...), for inputs (..., channels, ...)."""
    x = x.reshape(-1, *x.shape[-layer.spatial - 1 :])
    pads = padded(layer.padding, layer.kernel_size, layer.stride, layer.dilation, "conv")
    x = jnp.pad(x, ((0, 0), (0, 0), *pads))
    steps = (1, 1, *layer.stride)
    slices = []
    for point in itertools.product(*map(range, layer.kernel_size)):
        start = [p * d for p, d in zip(point, layer.dilation, strict=True)]
        end = [s + (n - 1) * t + 1 for s, n, t in zip(start, sizes, layer.stride, strict=True)]
        slices.append(jax.lax.slice(x, (0, 0, *start), (*x.shape[:2], *end), steps))
    stacked = jnp.stack(slices, 2)  # (N, channels, points, positions...)
    return stacked.reshape(x.shape[0], -1, *sizes)
