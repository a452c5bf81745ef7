"""per_member: an optax transformation that treats each member of an ensemble by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.extras import import_extra
from statefulnn.ensemble._building import described
from statefulnn.transforms.types import PyTree


def per_member(tx: Any, **hyperparameters: Any) -> Any:
    """Return an optax transformation that treats each member by itself.

    Elementwise transformations such as Adam need this only for hyperparameters that differ. Whatever
    looks at all parameters together does need it: under ``per_member`` the norm of
    ``clip_by_global_norm`` is that of one member, and so is a trust ratio or a plateau.

    Args:
        tx: an optax transformation; or, with hyperparameters, a function that makes one of them, such as
            ``optax.adam``.
        hyperparameters: arrays ``(n, ...)``: an entry for each member. They are part of the optimizer's
            state, so ``opt.learning_rate`` reads them and ``opt.learning_rate = array`` changes them
            without a compilation. Everything else (numbers, schedules, flags) is for all members.

    Returns:
        The transformation, for parameters that all have a leading axis of n, as those of an `Ensemble`.
        Extra arguments of its update, ``opt.step(grads, value=losses)``, are per member where they are
        arrays ``(n, ...)``.

    Raises:
        TypeError: if `tx` is no transformation, or no function that makes one.
        ShapeError: when it is used, for an array without that leading axis.
        ImportError: if optax is not installed.

    Source: ``optax.inject_hyperparams`` for hyperparameters as state.

    Example:
        >>> import jax.numpy as jnp, optax, statefulnn as nn
        >>> from statefulnn.ensemble import per_member
        >>> ensemble = nn.Ensemble(lambda: nn.Linear(2, 3), 4)
        >>> clipped = lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        >>> opt = nn.Optimizer(
        ...     ensemble, per_member(clipped, rate=jnp.array([1e-4, 1e-3, 1e-2, 1e-1]))
        ... )
        >>> opt.rate = opt.rate / 10
        >>> opt.state_dict()["mu.stack.weight"].shape, opt.state_dict()["count"].shape
        ((4, 3, 2), (4,))
    """
    optax = import_extra("optax", "optax", "called per_member", "makes what it maps")
    lists = [k for k, v in hyperparameters.items() if isinstance(v, list)]
    if lists:
        raise TypeError(
            explain(
                f"called per_member with a list as {lists[0]!r}",
                "an array has an entry for each member, and everything else is for all of them",
                f"per_member(make_tx, {lists[0]}=jnp.array([...]))",
            )
        )
    mapped = {k: v for k, v in hyperparameters.items() if np.ndim(v) and hasattr(v, "shape")}
    # A tuple: closures compare it by content, so that an optimizer made anew finds its compiled code.
    start = tuple((name, jnp.asarray(value)) for name, value in mapped.items())
    shared = tuple((name, v) for name, v in hyperparameters.items() if name not in mapped)
    is_made = isinstance(tx, optax.GradientTransformation)
    _check_maker(tx, is_made, hyperparameters, bool(mapped))

    def made(values: Mapping[str, Any]) -> Any:
        if is_made:
            return optax.with_extra_args_support(tx)
        one = tx(**values, **dict(shared))
        if not isinstance(one, optax.GradientTransformation):
            raise TypeError(
                explain(
                    f"called per_member with a function that returned {described(one)}",
                    "it is called with a member's hyperparameters and makes an optax transformation",
                    "per_member(lambda rate: optax.adam(rate), rate=rates)",
                )
            )
        return optax.with_extra_args_support(one)

    def init(params: PyTree) -> Any:
        values = dict(start)
        _check_members({"parameter": params, "hyperparameter": values})
        state = jax.vmap(lambda values, params: made(values).init(params))(values, params)
        return (values, state) if start else state

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        values, inner = state if start else ({}, state)
        leaves, treedef = jax.tree.flatten(extra)
        own = [j for j, leaf in enumerate(leaves) if hasattr(leaf, "shape") and np.ndim(leaf)]
        parts = [leaves[j] for j in own]
        _check_members({"gradient": updates, "hyperparameter": values, "extra argument": parts})

        def one(values: PyTree, updates: PyTree, inner: PyTree, params: PyTree, parts: list) -> Any:
            full = list(leaves)
            for j, part in zip(own, parts, strict=True):
                full[j] = part
            return made(values).update(updates, inner, params, **treedef.unflatten(full))

        updates, inner = jax.vmap(one)(values, updates, inner, params, parts)
        return updates, (values, inner) if start else inner

    return optax.GradientTransformationExtraArgs(init, update)


def _check_maker(
    tx: object, is_made: bool, hyperparameters: Mapping[str, Any], any_arrays: bool
) -> None:
    """Raise unless `tx` is a transformation, or can make one for each member."""
    if is_made and hyperparameters:
        raise TypeError(
            explain(
                f"called per_member with a transformation and {', '.join(hyperparameters)}",
                "a transformation that is made already has its own",
                "pass the function that makes it: per_member(optax.adam, learning_rate=rates)",
            )
        )
    if not is_made and (not callable(tx) or not any_arrays):
        given = "" if not hyperparameters else " and hyperparameters without an array among them"
        raise TypeError(
            explain(
                f"called per_member with {described(tx)}{given}",
                "it needs an optax transformation, or a function that makes one and arrays (n,) for it",
                "per_member(optax.adam(1e-3)), or per_member(optax.adam, learning_rate=rates) with an "
                "array of rates",
            )
        )


def _check_members(trees: Mapping[str, Any]) -> None:
    """Raise unless all arrays have a leading axis of one size."""
    size = None
    for noun, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            shape = jnp.shape(leaf)
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if size is None and shape:
                size = shape[0]
            if not shape or shape[0] != size:
                members = "a number of members" if size is None else f"{size} members"
                raise ShapeError(
                    explain(
                        f"per_member was given the {noun} {name!r} of shape {shape} for {members}",
                        "each member takes its own entry of the first axis",
                        "train the Ensemble with an optimizer of its own, nn.Optimizer(ensemble, "
                        "per_member(tx)); hyperparameters are arrays (n,)",
                    )
                )
