"""What a linear operator takes and returns: named arrays, or all their numbers in one flat array."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import DtypeError, ShapeError, explain
from statefulnn.curvature._models import path_name, wide
from statefulnn.transforms.types import PyTree


@dataclasses.dataclass(frozen=True)
class Space:
    """Vectors of one structure.

    Attributes:
        treedef: the structure, as JAX flattens it.
        leaves: shape and dtype of each array, in JAX's order.
        names: the name of each array, in JAX's order, which sorts a dict by its keys.
        order: the positions of the arrays in the order of a flat vector.
    """

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, tree: PyTree, ordered: Iterable[str] = ()) -> Space:
        """Return the space of vectors like a tree; names in `ordered` come in that order."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = tuple(path_name(path) for path, _ in paths)
        rank = {name: i for i, name in enumerate(ordered)}
        order = sorted(range(len(names)), key=lambda i: rank.get(names[i], len(rank)))
        leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in paths)
        return cls(treedef, leaves, names, tuple(order))

    @property
    def size(self) -> int:
        """How many numbers a vector has."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    @property
    def dtype(self) -> Any:
        """The dtype of flat vectors: float32 at least."""
        return wide(*(leaf.dtype for leaf in self.leaves))

    @property
    def structure(self) -> Any:
        """The tree of shapes and dtypes."""
        return jax.tree.unflatten(self.treedef, self.leaves)

    def flatten(self, tree: PyTree) -> jax.Array:
        """Return all numbers of a vector, (size,)."""
        leaves = jax.tree.leaves(tree)
        return jnp.concatenate([leaves[i].reshape(-1).astype(self.dtype) for i in self.order])

    def unflatten(self, flat: jax.Array) -> Any:
        """Return the vector whose numbers these are."""
        leaves: list[Any] = [None] * len(self.leaves)
        start = 0
        for i in self.order:
            shape, dtype = self.leaves[i].shape, self.leaves[i].dtype
            stop = start + math.prod(shape)
            leaves[i] = flat[start:stop].reshape(shape).astype(dtype)
            start = stop
        return jax.tree.unflatten(self.treedef, leaves)

    def take(self, vector: PyTree, many: bool, function: str) -> tuple[Any, bool]:
        """Return a vector as a tree, and whether it came flat.

        Args:
            vector: a tree, or ``(size,)``; of many vectors a tree with one more axis, the first, or
                ``(size, k)``.
            many: whether there are many.
            function: for messages.
        """
        shape = getattr(vector, "shape", None)
        if shape is not None and len(shape) == 1 + many and shape[0] == self.size:
            if many or shape != self.leaves[0].shape or self.treedef.num_nodes > 1:
                vector = self._real(jnp.asarray(vector), "", function)
                return (
                    jax.vmap(self.unflatten)(vector.T) if many else self.unflatten(vector)
                ), True
        if isinstance(vector, Mapping):
            vector = dict(vector)
        paths, treedef = jax.tree_util.tree_flatten_with_path(vector)
        given = {path_name(path): getattr(leaf, "shape", None) for path, leaf in paths}
        wanted = {n: leaf.shape for n, leaf in zip(self.names, self.leaves, strict=True)}
        seen = {n: s[1:] if many and s else s for n, s in given.items()}
        if seen != wanted or treedef != self.treedef:
            raise self._no_vector(given, wanted, seen, many, function)
        if many and len({s[0] for s in given.values() if s}) > 1:
            raise self._no_vector(given, wanted, {}, many, function)
        leaves = [
            self._real(jnp.asarray(leaf), name, function).astype(like.dtype)
            for (_, leaf), name, like in zip(paths, self.names, self.leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, leaves), False

    def _real(self, array: jax.Array, name: str, function: str) -> Any:
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise DtypeError(
                explain(
                    f"{function} was given a vector of dtype {array.dtype}"
                    + (f" for {name!r}" if name else ""),
                    "the operator is real",
                    "multiply the real and the imaginary part one by one",
                )
            )
        return array

    def _no_vector(
        self,
        given: Mapping[str, Any],
        wanted: Mapping[str, Any],
        seen: Mapping[str, Any],
        many: bool,
        function: str,
    ) -> Any:
        missing = [n for n in wanted if n not in given]
        unknown = [n for n in given if n not in wanted]
        other = [
            f"{n!r} of shape {given[n]} for {wanted[n]}"
            for n in wanted
            if n in given and seen.get(n) != wanted[n]
        ]
        parts = [f"without {missing}"] * bool(missing) + [f"with {unknown}"] * bool(unknown)
        if set(given) == {""} and "" not in wanted:
            parts = [f"of shape {given['']}"]
        flat = f"({self.size}, k)" if many else f"({self.size},)"
        one_more = ", each with one more axis, the first" if many else ""
        return ShapeError(
            explain(
                f"{function} was given a vector "
                + "; ".join([*parts, *other] or ["of another tree"]),
                f"its arrays have the names and shapes of the operator's{one_more}; a flat one has "
                f"shape {flat}",
                "jax.tree.map(jnp.zeros_like, A.in_structure) shows what A takes",
            )
        )
