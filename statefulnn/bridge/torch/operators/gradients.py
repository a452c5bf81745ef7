"""Gradients for which ATen has operators of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from statefulnn.bridge.torch.operators._table import OPERATORS, operator

if TYPE_CHECKING:
    from statefulnn.bridge.torch.operators._table import Size


@operator("own_gradient")
def own_gradient(
    outputs: Sequence[jax.Array], inputs: Sequence[jax.Array], backward: Callable
) -> list[jax.Array]:
    """Return outputs as they are; their gradients go to the inputs, as `backward` tells."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)

    @jax.custom_vjp
    def given(outputs: list[jax.Array], inputs: list[jax.Array]) -> list[jax.Array]:
        return outputs

    def back(inputs: list[jax.Array], by_output: list[Any]) -> Any:
        floats = [g for g, x in zip(by_output, outputs, strict=True) if is_float(x)]
        slopes = iter(backward(*inputs, *floats))
        by_input = [jnp.asarray(next(slopes), x.dtype) if is_float(x) else None for x in inputs]
        return [None] * len(by_output), by_input

    given.defvjp(lambda outputs, inputs: (outputs, inputs), back)
    return given([jax.lax.stop_gradient(x) for x in outputs], list(inputs))


def _pulled_back(
    forward: Callable, gradient: jax.Array, *primals: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the gradients of ``forward(*primals)`` by its arguments."""
    _, back = jax.vjp(forward, *primals)
    return back(gradient)


@operator("_adaptive_avg_pool2d_backward")
def adaptive_avg_pool2d_backward(gradient: jax.Array, x: jax.Array) -> jax.Array:
    forward = lambda x: OPERATORS["_adaptive_avg_pool2d"](x, gradient.shape[-2:])
    return _pulled_back(forward, gradient, x)[0]


@operator("avg_pool2d_backward")
def avg_pool2d_backward(gradient: jax.Array, x: jax.Array, *how: Size | bool | None) -> jax.Array:
    return _pulled_back(lambda x: OPERATORS["avg_pool2d"](x, *how), gradient, x)[0]


@operator("max_pool2d_with_indices_backward")
def max_pool2d_with_indices_backward(
    gradient: jax.Array, x: jax.Array, *how_and_indices: Any
) -> jax.Array:
    indices = how_and_indices[-1]  # of the largest number of each window, in its image
    images = math.prod(x.shape[:-2])
    flat = jnp.zeros((images, math.prod(x.shape[-2:])), gradient.dtype)
    rows = jnp.arange(images)[:, None]
    added = flat.at[rows, indices.reshape(images, -1)].add(gradient.reshape(images, -1))
    return added.reshape(x.shape)


@operator("convolution_backward")
def convolution_backward(
    gradient: jax.Array, x: jax.Array, weight: jax.Array, bias_sizes: Sequence[int] | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, output_mask: Sequence[bool],
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    how = (stride, padding, dilation, transposed, output_padding, groups)
    forward = lambda x, weight: OPERATORS["convolution"](x, weight, None, *how)
    by_input, by_weight = _pulled_back(forward, gradient, x, weight)
    by_bias = gradient.sum((0, *range(2, gradient.ndim)))
    return _masked((by_input, by_weight, by_bias), output_mask)


@operator("embedding_dense_backward")
def embedding_dense_backward(
    gradient: jax.Array, indices: jax.Array, count: int, padding_idx: int, scale_grad_by_freq: bool
) -> jax.Array:
    size = gradient.shape[-1]
    indices, rows = indices.ravel(), gradient.reshape(-1, size)
    rows = jnp.where((indices == padding_idx)[:, None], jnp.zeros_like(rows), rows)
    if scale_grad_by_freq:
        often = jnp.zeros(count, rows.dtype).at[indices].add(jnp.ones(len(indices), rows.dtype))
        rows = rows / often[indices][:, None]
    return jnp.zeros((count, size), rows.dtype).at[indices].add(rows)


@operator("native_layer_norm_backward")
def native_layer_norm_backward(
    gradient: jax.Array, x: jax.Array, shape: Sequence[int], mean: jax.Array, inverse: jax.Array,
    weight: jax.Array | None, bias: jax.Array | None, output_mask: Sequence[bool],
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    outer = tuple(range(x.ndim - len(shape)))
    normal = (x - mean) * inverse
    scaled = gradient if weight is None else gradient * weight
    by_input = _of_normalised(scaled, normal, inverse, axes)
    return _masked((by_input, (gradient * normal).sum(outer), gradient.sum(outer)), output_mask)


@operator("native_group_norm_backward")
def native_group_norm_backward(
    gradient: jax.Array, x: jax.Array, mean: jax.Array, inverse: jax.Array,
    weight: jax.Array | None, n: int, c: int, size: int, groups: int, output_mask: Sequence[bool],
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    parts = (n, groups, c // groups, -1)
    grouped, mean, inverse = x.reshape(parts), mean[..., None, None], inverse[..., None, None]
    normal = (grouped - mean) * inverse
    given = gradient.reshape(parts)
    scaled = given if weight is None else given * weight.reshape(1, groups, c // groups, 1)
    by_input = _of_normalised(scaled, normal, inverse, (2, 3)).reshape(x.shape)
    by_weight = (given * normal).sum((0, 3)).ravel()
    return _masked((by_input, by_weight, given.sum((0, 3)).ravel()), output_mask)


def _of_normalised(
    gradient: jax.Array, normal: jax.Array, inverse: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """Return the gradient by what was normalised over some axes."""
    mean = lambda value: value.mean(axes, keepdims=True)
    return inverse * (gradient - mean(gradient) - normal * mean(gradient * normal))


def _masked(gradients: Sequence[jax.Array], mask: Sequence[bool]) -> tuple[jax.Array | None, ...]:
    """Return the gradients that are wanted, and None for the others, as torch does."""
    return tuple(g if wanted else None for g, wanted in zip(gradients, mask, strict=True))
