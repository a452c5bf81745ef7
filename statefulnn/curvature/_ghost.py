"""Norms and clipped sums of the gradients of examples, without these gradients.

One backward pass through all examples gives, for each structured layer (see `_layers`), patches and
cotangents of every example. The norm of an example's gradient of weight and bias, ``Σₜ gₜ ⊗ aₜ`` and
``Σₜ gₜ``, follows from these, and so does the sum of clipped gradients: the same sums with every cotangent
shortened. So there is no second pass through the network, which would take longer and keep as much. All other
parameters have gradients of examples, by vmap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn import functional as F
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.plan import plan_of
from statefulnn.curvature._blocks import length, map_blocks
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
    squares = [jnp.sum(jnp.square(g), 1) for g in rows.values()]
    for name, inputs in seen.items():
        layer, with_bias = layers.by_weight[name], f"{name[:-6]}bias" in params
        squares.append(_squares(layer, inputs, cotangents[name], with_bias, dtype))
    norms = jnp.sqrt(sum(squares, jnp.zeros(length(examples), dtype)))
    factors = 1 / jnp.maximum(1, norms / max_norm)

    # A rounded product would let a gradient be a little longer than max_norm.
    with jax.default_matmul_precision("highest"):
        total = {n: jnp.zeros(p.shape, dtype) for n, p in params.items()}
        for name, g in rows.items():
            total[name] = jnp.dot(factors, g).reshape(params[name].shape)
        for name, inputs in seen.items():
            layer, bias = layers.by_weight[name], f"{name[:-6]}bias"
            for x, g in zip(inputs, cotangents[name], strict=True):
                wide_factors = factors.reshape(-1, *(1,) * (g.ndim - 1))
                shortened = (g.astype(dtype) * wide_factors).astype(g.dtype)
                gradient = _of_weight(layer, params[name], x, shortened)
                total[name] = total[name] + gradient.astype(dtype)
                if bias in params:
                    total[bias] = total[bias] + _of_bias(layer, shortened).astype(dtype)
    return total, norms


def _squares(
    layer: Any, inputs: list[Any], cotangents: list[Any], with_bias: bool, dtype: Any
) -> Any:
    """Return the squared norm of each example's gradient of a layer's weight and bias, (N,)."""
    if type(layer) is Embedding:
        positions = lambda x, g: all_positions(layer, x, [d[None] for d in g])
        a, g = jax.vmap(positions)(inputs, cotangents)
        return jax.vmap(_square_of_rows)(a, g[:, 0].astype(dtype))

    def factors(arrays: tuple) -> tuple[Any, Any]:
        calls = [_columns(layer, x, g) for x, g in zip(*arrays, strict=True)]
        a, g = (jnp.concatenate(part, -1).astype(dtype) for part in zip(*calls, strict=True))
        return a, g

    arrays = (inputs, cotangents)
    n, given = length(inputs), sum(a.size for a in jax.tree.leaves(arrays))
    a, g = jax.eval_shape(jax.vmap(factors), arrays)
    more = a.size + n * min(a.shape[2] ** 2, a.shape[1] * g.shape[1])

    def block(arrays: tuple) -> Any:
        a, g = jax.vmap(factors)(arrays)
        of_bias = jnp.sum(jnp.square(g.sum(2)), 1) if with_bias else 0
        return _square_of_products(a, g) + of_bias

    return map_blocks(block, arrays, max(1, n * given // more))


def _columns(layer: Any, x: Any, g: Any) -> tuple[Any, Any]:
    """Return patches (K, T) and cotangents (out, T) of one call: of a convolution as they lie in memory."""
    if type(layer) is Linear:
        return x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]).T
    g = g.reshape(-1, *g.shape[-layer.spatial - 1 :])
    patches = patches_of(layer, x, g.shape[2:])
    patches, g = (jnp.moveaxis(a, 1, 0).reshape(a.shape[1], -1) for a in (patches, g))
    return patches, g


def _square_of_products(a: Any, g: Any) -> Any:
    """Return ``|Σₜ gₜ ⊗ aₜ|²`` for patches (N, K, T) and cotangents (N, out, T)."""
    (_, k, t), o = a.shape, g.shape[1]
    if t == 1:
        return jnp.sum(jnp.square(a), (1, 2)) * jnp.sum(jnp.square(g), (1, 2))
    if 2 * t * t < k * o:  # the products of pairs of positions are smaller than the gradient
        of_patches = _einsum("nkt,nks->nts", a, a)
        return jnp.sum(of_patches * _einsum("not,nos->nts", g, g), (1, 2))
    return jnp.sum(jnp.square(_einsum("nkt,not->nko", a, g)), (1, 2))


def _square_of_rows(index: Any, g: Any) -> Any:
    """Return the squared norm of the gradient of a table, for rows (T,) and cotangents (T, out)."""
    order = jnp.argsort(index)
    is_new = jnp.diff(index[order], prepend=index[order][:1] - 1) != 0
    sums = jax.ops.segment_sum(g[order], jnp.cumsum(is_new) - 1, index.size)
    return jnp.sum(jnp.square(sums))


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

    return jax.vjp(apply, weight)[1](g)[0]


def _of_bias(layer: Any, g: Any) -> Any:
    """Return the gradient of a layer's bias by one call on all examples."""
    axis = g.ndim - 1 if type(layer) is Linear else g.ndim - layer.spatial - 1
    others = [i for i in range(g.ndim) if i != axis]

    # A sum would be computed from what `g` was made of, which then stays in memory beside it.
    ones = jnp.ones([g.shape[i] for i in others], g.dtype)
    return jnp.tensordot(g, ones, (others, list(range(ones.ndim))))
