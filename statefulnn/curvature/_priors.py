"""Prior precisions: one for all parameters, or one for each group of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import ShapeError, UnknownNameError, explain
from statefulnn.core.names import chosen
from statefulnn.curvature._models import path_name, wide
from statefulnn.transforms.types import PyTree


@dataclass(frozen=True)
class Groups:
    """Which numbers of the flat parameters have a prior precision in common.

    Attributes:
        index: the group of each number, (P,).
        keys: the names of the groups if they have any, else how many there are; None for a single one.
    """

    index: np.ndarray
    keys: tuple[str, ...] | int | None

    def spread(self, prior: Any) -> Any:
        """Return the prior precision of each number, (P,)."""
        each = [prior[k] for k in self.keys] if isinstance(self.keys, tuple) else prior
        return jnp.atleast_1d(jnp.asarray(each))[self.index]

    def collect(self, values: jax.Array) -> Any:
        """Return the sums of some numbers (P,) over the groups, in the form of the prior precision."""
        if self.keys is None:
            return values.sum()
        count = self.keys if isinstance(self.keys, int) else len(self.keys)
        sums = jax.ops.segment_sum(values, self.index, count)
        return sums if isinstance(self.keys, int) else dict(zip(self.keys, sums, strict=True))


def groups_of(params: PyTree, prior: ArrayLike | Mapping[str, Any], function: str) -> Groups:
    """Return the groups that the form of a prior precision makes of parameters.

    Args:
        params: the random ones.
        prior: a number; an array with one for each array of `params`, in the order of ``jax.tree.leaves``;
            or a dict of name or pattern -> number, where the longest that fits a name counts.
        function: for messages.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [leaf.size for _, leaf in leaves]
    if isinstance(prior, Mapping):
        names = [path_name(path) for path, _ in leaves]
        keys = tuple(sorted(prior, key=lambda key: (len(key), key)))
        key_of: dict[str, int] = {}
        for number, key in enumerate(keys):
            key_of.update(dict.fromkeys(chosen(names, key, f"{function}: prior_precision"), number))
        missing = [n for n in names if n not in key_of]
        if missing:
            raise UnknownNameError(
                explain(
                    f"{function} was given a prior precision for {', '.join(map(repr, prior))}",
                    f"nothing there fits {', '.join(map(repr, missing))}",
                    "add an entry for the others: {'*': 1.0, ...}",
                )
            )
        return Groups(np.repeat([key_of[n] for n in names], sizes), keys)
    shape = jnp.shape(prior)
    if shape == ():
        return Groups(np.zeros(sum(sizes), np.int64), None)
    if shape != (len(leaves),):
        raise ShapeError(
            explain(
                f"{function} was given prior precisions of shape {shape}",
                f"there are {len(leaves)} arrays of random parameters: "
                f"{', '.join(path_name(path) for path, _ in leaves)}",
                "pass one number, one for each array in this order, or a dict of name or pattern -> number",
            )
        )
    return Groups(np.repeat(np.arange(len(leaves)), sizes), len(leaves))


def as_arrays(prior: ArrayLike | Mapping[str, Any], dtype: DTypeLike) -> Any:
    """Return a prior precision with its numbers as arrays of a dtype."""
    if isinstance(prior, Mapping):
        return {key: jnp.asarray(value, dtype) for key, value in prior.items()}
    return jnp.asarray(prior, dtype)


def squares(params: PyTree) -> Any:
    """Return the square of every number, (P,), in float32 at least."""
    leaves = jax.tree.leaves(params)
    dtype = wide(*(leaf.dtype for leaf in leaves))
    return jnp.concatenate([jnp.square(leaf.astype(dtype)).reshape(-1) for leaf in leaves])


def check_prior(prior: ArrayLike | Mapping[str, Any], function: str) -> None:
    """Raise unless prior precisions are positive numbers; traced values pass."""
    if isinstance(prior, Mapping):
        for key, value in prior.items():
            check_positive(value, f"prior_precision[{key!r}]", function)
    elif jnp.ndim(prior) == 0 or isinstance(prior, Tracer):
        check_positive(prior, "prior_precision", function)
    else:
        for i, value in enumerate(np.asarray(prior).reshape(-1).tolist()):
            check_positive(value, f"prior_precision[{i}]", function)


def check_positive(value: Any, option: str, function: str) -> None:
    """Raise unless a value is one positive number; a traced one passes."""
    if isinstance(value, Tracer):
        return
    if jnp.shape(value) != () or not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(
            explain(
                f"{function} was given {option}={value!r}",
                "it is one positive number",
                f"{option}=1.0",
            )
        )
