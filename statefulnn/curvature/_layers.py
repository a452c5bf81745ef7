"""The tangent kernel layer by layer: inputs and cotangents instead of gradients of weights.

Terms
  structured layer  a Linear or convolution whose weight enters the model through this layer alone
  position          where a layer applies its weight: a pixel of a convolution's output, a step of a
                    sequence, another call of the same layer
  patch             what the weight is multiplied with at one position, (K,)
  cotangent         the derivative of one output of the model by the layer's output at one position

The gradient of a weight is the sum over positions t of ``cotangent[t] ⊗ patch[t]``.

The cotangents are derivatives by a zero that is added to the layer's output by a forward hook; the hook
sees the input as well. Hooks are registered on a twin of the module, which shares its arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.compat import current_trace, trace_of
from statefulnn.core.graph import merge, split
from statefulnn.core.hooks import hooks_of
from statefulnn.core.module import Module
from statefulnn.core.plan import plan_of
from statefulnn.curvature._contractions import jacobian_is_cheaper
from statefulnn.curvature._models import checked_output
from statefulnn.functional.conv import padded
from statefulnn.modules.conv import Conv1d, Conv2d, Conv3d
from statefulnn.modules.linear import Linear
from statefulnn.transforms.functional_call import functional_call

_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)


@dataclass(frozen=True)
class Layers:
    """The structured layers of a module: weight's name -> layer, and a twin of it with the hooks."""

    by_weight: dict[str, Module]
    twin: Module
    tape: _Tape


class _Tape:
    """What the hooks do while one forward runs."""

    def __init__(self) -> None:
        self.visit: Any = None

    def hook_for(self, name: str) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, out: Any) -> Any:
            return out if self.visit is None else self.visit(name, args, out)

        return hook

    def run(self, twin: Module, params: Any, inputs: tuple, visit: Any) -> Any:
        """Call the twin on one example, with a function of (name, args, out) at each layer."""
        self.visit = visit
        try:
            return functional_call(twin, params, tuple(a[None] for a in inputs))
        finally:
            self.visit = None


def structured_layers(module: Module, params: Any, inputs: tuple) -> Layers:
    """Find the structured layers, by running the module once without numbers."""
    by_weight = {}
    names = _leaf_names(module)
    for path, layer in module.named_modules():
        weight = f"{path}.weight" if path else "weight"
        if weight in params and names.get(weight) == 1 and _kind_fits(layer):
            by_weight[weight] = layer
    while True:
        layers = _with_hooks(module, by_weight)
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


def _kind_fits(layer: Module) -> bool:
    # A subclass may do something else with its weight, and a hook something else to the output.
    if hooks_of(layer, "_forward_hooks"):
        return False
    if type(layer) is Linear:
        return True
    return type(layer) in _CONVOLUTIONS and layer.groups == 1 and layer.padding_mode == "zeros"


def _with_hooks(module: Module, by_weight: dict[str, Module]) -> Layers:
    twin, tape = merge(*split(module)), _Tape()
    for name in by_weight:
        layer = twin.get_submodule(name.rpartition(".")[0])
        layer.register_forward_hook(tape.hook_for(name), with_kwargs=True)
    return Layers(by_weight, twin, tape)


def _refused(layers: Layers, params: Any, inputs: tuple) -> set[str]:
    """Return which layers are called in a way, or whose weight is used elsewhere, that does not fit."""
    refused: set[str] = set()
    used: set[str] = set()

    def survey(params: Any, inputs: tuple) -> None:
        weights = {n: params[n] for n in layers.by_weight}

        def outside(some: dict[str, Any]) -> Any:
            here = current_trace()

            def visit(name: str, args: tuple, out: Any) -> Any:
                if current_trace() is not here or not args:
                    refused.add(name)  # in a scan's body, say, where its input cannot be had
                    return out
                # Without the layer's own use of the weight, who still depends on it?
                return jnp.zeros(out.shape, out.dtype)

            out = layers.tape.run(layers.twin, {**params, **some}, inputs, visit)
            if any(trace_of(leaf) is here for leaf in jax.tree.leaves(out)):
                used.update(some)
            return out

        def differentiate(some: dict[str, Any]) -> None:
            # In reverse mode, which modules with backward hooks allow.
            jax.vjp(outside, some)

        if weights:
            differentiate(weights)
        if used:  # by some of them: by which?
            used.clear()
            for name, weight in weights.items():
                differentiate({name: weight})

    jax.eval_shape(survey, params, inputs)
    return refused | used


def layer_factors(
    layers: Layers,
    params: Any,
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
    structured = {n: params[n] for n in layers.by_weight}
    others = {n: p for n, p in params.items() if n not in structured}
    shapes = jax.eval_shape(
        lambda i: _probe_shapes(layers, params, i), jax.tree.map(lambda a: a[0], inputs)
    )

    def one_example(inputs: tuple) -> list[tuple]:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def of_probes(others: Any, probes: Any) -> tuple[Any, Any]:
            seen: dict[str, list[Any]] = {name: [] for name in structured}

            def visit(name: str, args: tuple, out: Any) -> Any:
                probe = probes[name][len(seen[name])]
                seen[name].append(args[0])
                return out + probe

            out = layers.tape.run(layers.twin, {**structured, **others}, inputs, visit)
            return checked_output(out, function).reshape(-1), seen

        out, pull, seen = jax.vjp(of_probes, others, zeros, has_aux=True)
        jacobians, cotangents = jax.vmap(pull)(jnp.eye(out.size, dtype=out.dtype))
        factors: list[tuple] = [(j.reshape(out.size, -1),) for j in jax.tree.leaves(jacobians)]
        for name, layer in layers.by_weight.items():
            if not seen[name]:
                continue  # a layer that is not called has no gradient
            calls = [
                _positions(layer, x, d) for x, d in zip(seen[name], cotangents[name], strict=True)
            ]
            patches = jnp.concatenate([x for x, _ in calls])
            cotangent = jnp.concatenate([d for _, d in calls], 1)
            if jacobian_is_cheaper(patches.shape, cotangent.shape, pairs, outputs):
                jacobian = jnp.einsum("tk,cto->cok", patches, cotangent)
                factors.append((jacobian.reshape(out.size, -1),))
            else:
                factors.append((patches, cotangent))
        return factors

    return jax.vmap(one_example)(inputs)


def _probe_shapes(layers: Layers, params: Any, inputs: tuple) -> dict[str, list[Any]]:
    outs: dict[str, list[Any]] = {name: [] for name in layers.by_weight}

    def visit(name: str, args: tuple, out: Any) -> Any:
        outs[name].append(out)
        return out

    layers.tape.run(layers.twin, params, inputs, visit)
    return outs


def _positions(layer: Module, x: Any, cotangents: Any) -> tuple[Any, Any]:
    """Return patches (T, K) and cotangents (C, T, out) of one call of a layer."""
    if type(layer) is Linear:
        return x.reshape(-1, x.shape[-1]), cotangents.reshape(
            cotangents.shape[0], -1, cotangents.shape[-1]
        )
    spatial = layer.spatial
    x = x.reshape(-1, *x.shape[-spatial - 1 :])
    pads = padded(layer.padding, layer.kernel_size, layer.stride, layer.dilation, "conv")
    patches = jax.lax.conv_general_dilated_patches(
        x, layer.kernel_size, layer.stride, pads, rhs_dilation=layer.dilation
    )  # (N, K, positions...)
    patches = jnp.moveaxis(patches, 1, -1)
    cotangents = cotangents.reshape(cotangents.shape[0], -1, *cotangents.shape[-spatial - 1 :])
    cotangents = jnp.moveaxis(cotangents, 2, -1)
    return (
        patches.reshape(-1, patches.shape[-1]),
        cotangents.reshape(cotangents.shape[0], -1, cotangents.shape[-1]),
    )
