"""Kronecker factors of the generalised Gauss-Newton matrix, a block for each parameter.

Where a layer multiplies a patch with its weight, the block is approximated by ``A ⊗ B``: A the mean of
``a aᵀ`` over examples and positions (with a a patch), B the sum of ``g gᵀ`` over examples, positions and the
columns g of the cotangents of the curvature's root. It is exact for one position and one patch, and its bias
has the block B. The table of an Embedding has unit vectors as patches, so that its A is diagonal. Other
parameters have their whole block, or the diagonal of it if they are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from statefulnn.core.module import Module
from statefulnn.curvature._blocks import fold_blocks, length
from statefulnn.curvature._gaussians import Pair
from statefulnn.curvature._layers import DENSE, Layers, all_positions, probed, structured_layers
from statefulnn.curvature._models import checked_output, wide
from statefulnn.modules.sparse import Embedding
from statefulnn.transforms.types import PyTree

# Beyond it a parameter without a layer that is known has the diagonal of its block.
LARGEST_BLOCK = 1024


class _Curved(Protocol):
    """What has a curvature by the outputs of an example: a likelihood, or a loss."""

    def of(self, out: jax.Array, target: PyTree) -> tuple[Any, Any]:
        """Return its value, and R with R Rᵀ the curvature by the flat outputs."""
        ...


@dataclass(frozen=True)
class Blocks:
    """How the curvature of each random parameter is kept.

    Attributes:
        layers: the layers with factors.
        biases: bias's name -> the weight's name of such a layer.
        names: all parameters, in the order of the flat ones.
    """

    layers: Layers
    biases: dict[str, str]
    names: tuple[str, ...]


def find_blocks(
    module: Module, params: Mapping[str, Any], chosen: Mapping[str, Any], example: tuple
) -> Blocks:
    """Look at the layers of a module.

    Args:
        module: it is not touched.
        params: all of its parameters that are given.
        chosen: those that are random.
        example: the inputs of one example.
    """
    layers = structured_layers(
        module, params, example, kinds=(*DENSE, Embedding), among=chosen.keys()
    )
    return Blocks(layers, layers.biases(chosen), tuple(sorted(chosen)))


def kron_curvature(
    blocks: Blocks,
    params: Mapping[str, Any],
    data: tuple,
    likelihood: _Curved,
    batch_size: int | None,
    function: str,
) -> tuple[Any, Any, tuple[Pair, ...]]:
    """Return the log-likelihood of the data, eigenvalues (P,) and eigenvectors of each block.

    Args:
        blocks: see `find_blocks`.
        params: all parameters.
        data: inputs and targets.
        likelihood: of an example.
        batch_size: how many examples are in memory at once; None for all.
        function: for messages.
    """
    layers = blocks.layers
    covered = {*layers.by_weight, *blocks.biases}
    others = {n: params[n] for n in blocks.names if n not in covered}
    dtype = wide(*(params[n].dtype for n in blocks.names))

    def one_example(inputs: tuple, target: PyTree) -> tuple[Any, dict, dict]:
        finish = lambda out: checked_output(out, function).reshape(-1)
        out, pull, seen = probed(layers, params, others, inputs, finish)
        score, root = likelihood.of(out.astype(dtype), target)
        rows, cotangents = jax.vmap(lambda r: pull(r.astype(out.dtype)))(root.T)
        rows = {n: j.reshape(out.size, -1) for n, j in rows.items()}
        called = {n: all_positions(layers.by_weight[n], seen[n], cotangents[n]) for n in seen}
        return score, rows, called

    def block(data: tuple) -> tuple[tuple, None]:
        scores, rows, called = jax.vmap(one_example)(*data)
        sums = {n: _square(j.astype(dtype), j.shape[-1] <= LARGEST_BLOCK) for n, j in rows.items()}
        factors = {}
        for name, (patches, cotangents) in called.items():
            if type(layers.by_weight[name]) is Embedding:
                inner = jnp.zeros(params[name].shape[0], dtype).at[patches.reshape(-1)].add(1)
            else:
                inner = _square(patches.astype(dtype), True)
            inner = inner / patches.shape[1]
            factors[name] = (inner, _square(cotangents.astype(dtype), True))
        return (scores.sum(), sums, factors), None

    @jax.jit
    def compute(data: tuple) -> tuple[Any, Any, tuple[Pair, ...]]:
        add = lambda one, two: jax.tree.map(jnp.add, one, two)
        score, sums, factors = fold_blocks(block, add, data, batch_size)[0]
        values, pairs = [], []
        for name in blocks.names:
            found = _decomposed(name, blocks, params[name], sums, factors, length(data))
            values.append(found[0])
            pairs.append(found[1])
        return score, jnp.concatenate(values), tuple(pairs)

    return compute(data)


def _square(rows: jax.Array, whole: bool) -> Any:
    """Return rowsᵀ rows, or the diagonal of it."""
    rows = rows.reshape(-1, rows.shape[-1])
    if not whole:
        return jnp.sum(jnp.square(rows), 0)
    return jnp.matmul(rows.T, rows, precision="highest")


def _decomposed(
    name: str, blocks: Blocks, value: jax.Array, sums: dict, factors: dict, examples: int
) -> tuple[Any, Pair]:
    """Return the eigenvalues of a parameter's block, in its shape made flat, and the eigenvectors."""
    weight = blocks.biases.get(name, name)
    if weight not in factors:
        square = sums.get(name)
        if square is None:  # a layer that is not called
            return jnp.zeros(value.size, wide(value.dtype)), (None, None)
        values, vectors = _eigh(square)
        return values, (None, vectors)
    inner, inner_vectors = _eigh(factors[weight][0] / examples)
    outer, outer_vectors = _eigh(factors[weight][1])
    if name != weight:
        return outer, (None, outer_vectors)
    if inner_vectors is None:  # of an Embedding, whose weight has the axes the other way around
        return jnp.outer(inner, outer).reshape(-1), (None, outer_vectors)
    return jnp.outer(outer, inner).reshape(-1), (outer_vectors, inner_vectors)


def _eigh(matrix: jax.Array) -> tuple[Any, Any]:
    """Return eigenvalues and eigenvectors; of a vector, which stands for a diagonal, no eigenvectors."""
    if matrix.ndim == 1:
        return matrix, None
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, 0), vectors
