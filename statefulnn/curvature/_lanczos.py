"""Lanczos steps with full reorthogonalisation, on flat vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Basis:
    """Rows ``(P,)`` in a few arrays, so that those which are not filled yet are not read.

    On CPU an orthogonalisation takes the time of reading the rows, and half of them are empty on average. A
    part of one array would be copied first.

    Attributes:
        blocks: arrays ``(R, P)``; the last one may have more rows than are wanted.
        length: how many rows are wanted.
    """

    blocks: tuple[Any, ...]
    length: int = field(metadata={"static": True})

    @staticmethod
    def of(row: jax.Array, length: int) -> Basis:
        """Return a basis of a first row, in four blocks: with more of them, XLA compiles longer."""
        rows = -(-length // 4)
        empty = jnp.zeros((rows, *row.shape), row.dtype)
        blocks = empty.at[0].set(row), *[empty] * (-(-length // rows) - 1)
        return Basis(blocks, length)

    @property
    def rows(self) -> int:
        """The rows of a block."""
        return self.blocks[0].shape[0]

    def row(self, j: int | jax.Array) -> Any:
        """Return a row."""
        inside = j % self.rows
        branches = [lambda blocks, i=i: blocks[i][inside] for i in range(len(self.blocks))]
        return jax.lax.switch(j // self.rows, branches, self.blocks)

    def with_row(self, j: int | jax.Array, row: jax.Array) -> Basis:
        """Return the basis with another row."""

        # One branch for each block: XLA writes it in place.
        def put(i: int, block: jax.Array) -> Any:
            return jax.lax.cond(
                j // self.rows == i, lambda b: b.at[j % self.rows].set(row), lambda b: b, block
            )

        return Basis(tuple(put(i, b) for i, b in enumerate(self.blocks)), self.length)

    def first(self, count: int) -> Any:
        """Return the first rows, (count, P)."""
        return jnp.concatenate(self.blocks[: -(-count // self.rows)])[:count]

    def turned(self, turn: jax.Array) -> Basis:
        """Return a basis whose first rows are ``turn @ rows``, turn (count, m); the others do not count."""
        # Blocks are turned as one array: XLA is slow with matrices of few rows.
        new = _dot(turn, self.first(turn.shape[1]))
        new = jnp.pad(new, ((0, -len(new) % self.rows), (0, 0)))
        blocks = jnp.split(new, len(new) // self.rows)
        return Basis((*blocks, *self.blocks[len(blocks) :]), self.length)

    def without(self, vector: jax.Array, count: int | jax.Array) -> tuple[Any, Any]:
        """Return what of a vector is orthogonal to the first rows, and its products with all, (m + 1,).

        Those with other rows are 0.
        """
        number, rows = len(self.blocks), self.rows

        def branch(filled: int) -> Callable:
            def run(blocks: tuple, vector: jax.Array) -> tuple[Any, Any]:
                counts = jnp.arange(filled * rows).reshape(filled, rows) < count
                products = [
                    jnp.where(here, _dot(block, vector), 0)
                    for here, block in zip(counts, blocks, strict=False)
                ]
                inside = sum(_dot(p, b) for p, b in zip(products, blocks, strict=False))
                rest = jnp.zeros((number - filled) * rows, vector.dtype)
                return vector - inside, jnp.concatenate([*products, rest])

            return run

        branches = [branch(n + 1) for n in range(number)]
        rest, products = jax.lax.switch((count - 1) // rows, branches, self.blocks, vector)
        return rest, products[: self.length]

    def beside(self, vector: jax.Array, count: int | jax.Array) -> tuple[Any, Any]:
        """As `without`, but to working precision.

        Once is not enough where much of the vector is in the basis: rounding is relative to that.
        """

        def once(state: tuple) -> tuple:
            vector, products, passes, _ = state
            rest, more = self.without(vector, count)
            little = jnp.linalg.norm(rest) < 0.7 * jnp.linalg.norm(vector)
            return rest, products + more, passes + 1, little & (passes < 1)

        # A loop, so that a pass is compiled once.
        start = vector, jnp.zeros(self.length, vector.dtype), 0, True
        return jax.lax.while_loop(lambda state: state[3], once, start)[:2]

    def random_beside(self, key: jax.Array, count: int | jax.Array) -> tuple[Any, Any]:
        """Return a random unit vector orthogonal to the first rows, and 1; or zeros where there is none."""
        like = self.blocks[0]
        vector = self.beside(jax.random.normal(key, like.shape[1:], like.dtype), count)[0]
        norm = jnp.linalg.norm(vector)
        # In a basis of the whole space what is left is rounding.
        exists = norm > 1e-3
        return jnp.where(exists, vector / jnp.where(exists, norm, 1), 0), exists.astype(like.dtype)


def extend(
    apply: Callable, basis: Basis, matrix: jax.Array, start: int | jax.Array, key: jax.Array
) -> tuple[Basis, Any, Any]:
    """Extend an orthonormal basis by Krylov vectors, up to its length.

    Where the Krylov space ends, it goes on with a random vector. So vectors of an eigenvalue that occurs
    several times are found, which the Krylov space of one vector does not have.

    Args:
        apply: ``v -> A v``, A symmetric, ``(P,)``.
        basis: of length ``m + 1``; rows up to and with `start` are orthonormal, the others do not count.
        matrix: ``(m, m)``, the products ``qᵢ · A qⱼ`` of the rows before `start`; zero elsewhere.
        start: the number of the first row that A is applied to.
        key: for the random vectors.

    Returns:
        the full basis, the matrix, and the norm of what A makes of the last row beside those before.
    """
    m = matrix.shape[0]
    tiny = 10 * jnp.finfo(matrix.dtype).eps

    def step(j: jax.Array, state: tuple) -> tuple:
        basis, matrix, _, last, row = state
        product = apply(row)
        # Nearly all of it lies in the last two rows; without that, one more pass is mostly enough.
        near = _dot(last, product), _dot(row, product)
        rest, column = basis.beside(product - near[0] * last - near[1] * row, j + 1)
        column = column[:m].at[j].add(near[1]).at[jnp.maximum(j - 1, 0)].add(near[0])
        norm = jnp.linalg.norm(rest)
        ends = norm <= tiny * jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.linalg.norm(product))
        rest, length = jax.lax.cond(
            ends,
            lambda: basis.random_beside(jax.random.fold_in(key, j), j + 1),
            lambda: (rest, norm),
        )
        norm = jnp.where(ends, 0, norm)
        matrix = matrix.at[:, j].set(column).at[j].set(column)
        rest = rest / jnp.where(length > 0, length, 1)
        return basis.with_row(j + 1, rest), matrix, norm, row, rest

    first = basis.row(start)
    state = basis, matrix, jnp.zeros((), matrix.dtype), jnp.zeros_like(first), first
    return jax.lax.fori_loop(start, m, step, state)[:3]


def _dot(a: jax.Array, b: jax.Array) -> Any:
    return jnp.matmul(a, b, precision="highest")
