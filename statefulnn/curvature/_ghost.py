"""Norms and clipped sums of the gradients of examples, without these gradients.

One backward pass through all examples gives, for each structured layer (see `_layers`), patches and
cotangents of every example. The norm of an example's gradient of weight and bias, ``Σₜ gₜ ⊗ aₜ`` and
``Σₜ gₜ``, follows from these, and so does the sum of clipped gradients: the same sums with every cotangent
shortened. So there is no second pass through the network, which would take longer and keep as much. Of a
layer with many positions and few weights, such as a first convolution, the gradients of examples are smaller
than patches and cotangents, and take their place. All other parameters have gradients of examples, by vmap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn import functional as F
from statefulnn.core.compat import own_on_devices
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.plan import plan_of
from statefulnn.curvature._blocks import length, map_blocks, sum_blocks
from statefulnn.curvature._layers import (
    DENSE,
    Layers,
    all_positions,
    patches_of,
    probed,
    structured_layers,
)
from statefulnn.curvature._models import wide
from statefulnn.functional.conv import conv_nd
from statefulnn.modules.linear import Linear
from statefulnn.modules.sparse import Embedding

LAYERS = (*DENSE, Embedding)
# How much larger than a layer's inputs and cotangents its gradients of examples may be to be kept.
_KEPT = 1.5
_einsum = functools.partial(jnp.einsum, precision="highest")


def find_layers(
    loss: Callable, module: Module, params: Mapping[str, Any], example: tuple
) -> Layers:
    """Find the structured layers in the loss of one example.

    Args:
        loss: ``loss(module, *example) -> scalar``.
        module: it is not touched.
        params: by name; what is differentiated.
        example: arrays, or what has their shapes and dtypes.
    """

    def call(twin: Module, params: Mapping[str, Any], example: tuple) -> Any:
        leaves, treedef = jax.tree.flatten(twin)
        places = plan_of(twin).moduledef.names
        for name, value in params.items():
            leaves[places[name]] = value
        # A module that JAX rebuilds refuses writes, which no example could keep.
        return _scalar(loss(jax.tree.unflatten(treedef, leaves), *example))

    return structured_layers(module, params, example, kinds=LAYERS, call=call)


def _scalar(value: Any) -> Any:
    if jnp.shape(value) != ():
        raise TypeError(
            explain(
                f"the loss of one example has shape {jnp.shape(value)}",
                "its gradient is clipped, and only a scalar has one",
                "return a scalar: loss.sum()",
            )
        )
    return value


def ghost_sum(
    layers: Layers, params: Mapping[str, Any], examples: tuple, max_norm: Any
) -> tuple[dict[str, Any], Any]:
    """Return the sum of clipped gradients, in float32 at least, and the norms before clipping.

    Args:
        layers: see `find_layers`.
        params: by name.
        examples: arrays (N, ...).
        max_norm: the longest gradient that stays as it is.
    """
    covered = {*layers.by_weight, *layers.biases(params)}
    others = {n: p for n, p in params.items() if n not in covered}
    dtype = wide(*(p.dtype for p in params.values()))

    def one_example(example: tuple) -> tuple[dict, dict, dict]:
        out, pull, seen = probed(layers, params, others, example, lambda out: out)
        gradients, cotangents = pull(jnp.ones_like(out))
        return gradients, seen, cotangents

    gradients, seen, cotangents = jax.vmap(one_example)(examples)
    rows = {n: g.reshape(length(examples), -1).astype(dtype) for n, g in gradients.items()}
    parts = list(rows.values())
    sums: dict[str, Callable] = {}
    for name, inputs in seen.items():
        own = [params[n] for n in (name, f"{name[:-6]}bias") if n in params]
        found = _of_layer(layers.by_weight[name], own, inputs, cotangents[name], dtype)
        parts.append(found[0][:, None])
        sums[name] = found[1]
    norms = norms_of(parts or [jnp.zeros((length(examples), 0), dtype)])
    factors = 1 / jnp.maximum(1, norms / max_norm)

    total = {n: jnp.zeros(p.shape, dtype) for n, p in params.items()}
    # A rounded product would let a gradient be a little longer than max_norm.
    with jax.default_matmul_precision("highest"):
        for name, g in rows.items():
            total[name] = jnp.dot(factors, g).reshape(params[name].shape)
        for name, shortened in sums.items():
            total |= zip((name, f"{name[:-6]}bias"), shortened(factors), strict=False)
    return total, norms


def _of_layer(
    layer: Any, params: list[Any], inputs: list[Any], cotangents: list[Any], dtype: Any
) -> tuple[Any, Callable[[Any], list[Any]]]:
    """Return the norms of the examples' gradients of a layer, and the sum of shortened ones.

    Args:
        layer: a structured layer.
        params: its weight, and its bias if it has one.
        inputs, cotangents: of each of its calls, (N, ...).
        dtype: of the norms.

    Returns:
        norms, (N,), and ``f(factors) -> gradients`` of `params`.
    """
    calls = list(zip(inputs, cotangents, strict=True))
    later = lambda factors: _shortened(layer, params, calls, factors)
    if type(layer) is Embedding:
        positions = lambda x, g: all_positions(layer, x, [d[None] for d in g])
        a, g = jax.vmap(positions)(inputs, cotangents)
        return jax.vmap(_norm_of_rows)(a, g[:, 0].astype(dtype)), later

    def columns(calls: list[tuple]) -> tuple[Any, Any]:
        parts = zip(*(_columns(layer, x, g) for x, g in calls), strict=True)
        a, g = (jnp.concatenate(part, -1).astype(dtype) for part in parts)
        return a, g

    a, g = jax.eval_shape(jax.vmap(columns), calls)
    n, given = length(inputs), sum(leaf.size for leaf in jax.tree.leaves(calls))
    of_pairs, of_gradients = n * a.shape[2] ** 2, n * a.shape[1] * g.shape[1]

    def in_parts(size: int, factors: object) -> list[Any]:
        # The gradient of a convolution wants inputs in another layout: they would be in memory twice.
        def part(of: tuple[list[tuple], Any]) -> list[Any]:
            a, g = jax.vmap(columns)(of[0])
            g = g * of[1][:, None, None]
            sums = [_einsum("nkt,not->ok", a, g).reshape(params[0].shape), g.sum((0, 2))]
            return sums[: len(params)]

        return sum_blocks(part, (calls, factors), size)

    # Gradients of examples that are about as small as what the layer read and got take its place.
    keep = a.shape[2] > 1 and of_gradients <= _KEPT * given

    def block(calls: list[tuple]) -> Any:
        a, g = jax.vmap(columns)(calls)
        of_bias = g.sum(2)
        if keep:
            return _einsum("nkt,not->nok", a, g), of_bias
        norms = _norm_of_products(a, g)
        return norms_of([norms[:, None], of_bias]) if len(params) == 2 else norms

    more = a.size + (0 if keep else min(of_pairs, of_gradients))
    size = _even(n, n * given // more)
    found = map_blocks(block, calls, size)
    if not keep:
        return found, later if size == n else functools.partial(in_parts, size)
    found = found[: len(params)]
    norms = norms_of([part.reshape(n, -1) for part in found])
    both = list(zip(found, params, strict=True))
    return norms, lambda f: [jnp.tensordot(f, g, 1).reshape(p.shape) for g, p in both]


def _even(n: int, most: int) -> int:
    """Return the size of equal blocks of n examples, where there are such of about `most`.

    What is left over by blocks is a program of its own, for which XLA computes the inputs again.
    """
    most = max(1, min(n, most))
    size = next(d for d in range(most, 0, -1) if n % d == 0)
    return size if 4 * size > most else most


def _shortened(layer: Any, params: list[Any], calls: list[tuple], factors: Any) -> list[Any]:
    """Return the gradients of a layer's parameters with every cotangent shortened by its factor."""
    total = [0] * len(params)
    for x, g in calls:
        spread = factors.reshape(-1, *(1,) * (g.ndim - 1))
        g = (g.astype(factors.dtype) * spread).astype(g.dtype)
        found = [_of_weight(layer, params[0], x, g)]
        if len(params) == 2:
            found.append(_of_bias(layer, g))
        total = [a + b.astype(factors.dtype) for a, b in zip(total, found, strict=True)]
    return total


def _columns(layer: Any, x: Any, g: Any) -> tuple[Any, Any]:
    """Return patches (K, T) and cotangents (out, T) of one call: of a convolution as they lie in memory."""
    if type(layer) is Linear:
        return x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]).T
    g = g.reshape(-1, *g.shape[-layer.spatial - 1 :])
    patches = patches_of(layer, x, g.shape[2:])
    patches, g = (jnp.moveaxis(a, 1, 0).reshape(a.shape[1], -1) for a in (patches, g))
    return patches, g


def _unit(*parts: jax.Array) -> jax.Array:
    """Return the largest size of each example's numbers, (N,), or 1: by that divided they have squares."""
    sizes = [jnp.max(jnp.abs(p.reshape(p.shape[0], -1)), 1, initial=0) for p in parts]
    largest = functools.reduce(jnp.maximum, sizes)
    return jnp.where(largest > 0, largest, 1)


def norms_of(parts: Sequence[jax.Array]) -> jax.Array:
    """Return the norm of each example's numbers in arrays (N, P), also where squares over- or underflow."""
    unit = _unit(*parts)
    squares = [jnp.sum(jnp.square(p / unit[:, None]), 1) for p in parts]
    return unit * jnp.sqrt(sum(squares[1:], squares[0]))


def _norm_of_products(a: jax.Array, g: jax.Array) -> jax.Array:
    """Return ``|Σₜ gₜ ⊗ aₜ|`` for patches (N, K, T) and cotangents (N, out, T)."""
    (_, k, t), o = a.shape, g.shape[1]
    if t == 1:
        return norms_of([a[..., 0]]) * norms_of([g[..., 0]])
    of_a, of_g = _unit(a), _unit(g)
    a, g = a / of_a[:, None, None], g / of_g[:, None, None]
    if 2 * t * t < k * o:  # the products of pairs of positions are smaller than the gradient
        pairs = _einsum("nkt,nks->nts", a, a) * _einsum("not,nos->nts", g, g)
        square = jnp.maximum(jnp.sum(pairs, (1, 2)), 0)  # rounding may leave less than nothing
    else:
        square = jnp.sum(jnp.square(_einsum("nkt,not->nok", a, g)), (1, 2))
    return of_a * jnp.sqrt(square) * of_g


def _norm_of_rows(index: jax.Array, g: jax.Array) -> jax.Array:
    """Return the norm of the gradient of a table, for rows (T,) and cotangents (T, out)."""
    order = jnp.argsort(index)
    is_new = jnp.diff(index[order], prepend=index[order][:1] - 1) != 0
    sums = jax.ops.segment_sum(g[order], jnp.cumsum(is_new) - 1, index.size)
    return norms_of([sums.reshape(1, -1)])[0]


def _of_weight(layer: Any, weight: Any, x: Any, g: Any) -> Any:
    """Return the gradient of a layer's weight by one call on all examples."""

    def apply(weight: Any) -> Any:
        if type(layer) is Linear:
            return F.linear(x, weight)
        if type(layer) is Embedding:
            return F.embedding(x, weight, layer.padding_idx)
        images = x.reshape(-1, *x.shape[-layer.spatial - 1 :])
        steps = layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
        return conv_nd(layer.spatial, images, weight, None, *steps).reshape(g.shape)

    return jax.vjp(apply, own_on_devices(weight, g))[1](g)[0]


def _of_bias(layer: Any, g: Any) -> Any:
    """Return the gradient of a layer's bias by one call on all examples."""
    axis = g.ndim - 1 if type(layer) is Linear else g.ndim - layer.spatial - 1
    others = [i for i in range(g.ndim) if i != axis]

    # A sum would be computed from what `g` was made of, which then stays in memory beside it.
    ones = jnp.ones([g.shape[i] for i in others], g.dtype)
    return jnp.tensordot(g, ones, (others, list(range(ones.ndim))))
