"""A Laplace posterior as arrays and plain data by name, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import ShapeError, UnknownNameError, explain
from statefulnn.curvature._models import path_name
from statefulnn.transforms.types import PyTree

_ARRAYS = ("eigenvalues", "log_likelihood", "sigma")
_FUNCTION = "Laplace.from_state_dict"
_PARAMS, _PRIOR, _VECTORS = "params.", "prior_precision.", "eigenvectors."


def state_of(posterior: Any) -> dict[str, Any]:
    """Return the state dict of a posterior."""
    leaves = jax.tree_util.tree_leaves_with_path(posterior.params)
    state = {f"{_PARAMS}{path_name(path)}": leaf for path, leaf in leaves}
    state |= {name: getattr(posterior, name) for name in _ARRAYS}
    prior, vectors = posterior.prior_precision, posterior.eigenvectors
    if isinstance(prior, Mapping):
        state |= {f"{_PRIOR}{key}": value for key, value in prior.items()}
    else:
        state["prior_precision"] = prior
    if isinstance(vectors, tuple):
        for i, pair in enumerate(vectors):
            sides = zip(("left", "right"), pair, strict=True)
            state |= {f"{_VECTORS}{i}.{side}": v for side, v in sides if v is not None}
    elif vectors is not None:
        state["eigenvectors"] = vectors
    names = posterior.names
    return state | {
        "likelihood": posterior.likelihood,
        "names": None if names is None else list(names),
        "numbers": posterior.numbers,
        "structure": posterior.structure,
        "outputs": list(posterior.outputs),
    }


def from_state(params: PyTree, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a posterior but for the model's function.

    Args:
        params: arrays in the form and of the shapes of the model's.
        state: of `state_of`.
    """
    missing = [n for n in (*_ARRAYS, "likelihood", "structure", "outputs") if n not in state]
    if missing:
        raise UnknownNameError(
            explain(
                f"{_FUNCTION} was given a state without {', '.join(map(repr, missing))}",
                "it is not that of a posterior",
                "pass posterior.state_dict(), or nn.load(path) after nn.save(posterior, path)",
            )
        )
    prior = _under(state, _PRIOR)
    names = state["names"]
    return {name: jnp.asarray(state[name]) for name in _ARRAYS} | {
        "params": _parameters(params, state),
        "eigenvectors": _vectors(state, params, names),
        "prior_precision": prior or jnp.asarray(state["prior_precision"]),
        "likelihood": state["likelihood"],
        "names": None if names is None else tuple(names),
        "numbers": int(state["numbers"]),
        "structure": state["structure"],
        "outputs": tuple(state["outputs"]),
    }


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n[len(prefix) :]: jnp.asarray(v) for n, v in state.items() if n.startswith(prefix)}


def _vectors(state: Mapping[str, Any], params: PyTree, names: Sequence[str] | None) -> Any:
    if state["structure"] != "kron":
        return jnp.asarray(state["eigenvectors"]) if "eigenvectors" in state else None
    own = _under(state, _VECTORS)
    count = len(params if names is None else names)
    return tuple((own.get(f"{i}.left"), own.get(f"{i}.right")) for i in range(count))


def _parameters(params: PyTree, state: Mapping[str, Any]) -> Any:
    own = _under(state, _PARAMS)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    wanted = {path_name(path): leaf.shape for path, leaf in leaves}
    if own.keys() != wanted.keys():
        raise UnknownNameError(
            explain(
                f"{_FUNCTION} was given the parameters {', '.join(map(repr, own))}",
                f"the model's are {', '.join(map(repr, wanted))}",
                "pass the model of which the posterior was made",
            )
        )
    for name, shape in wanted.items():
        if own[name].shape != shape:
            raise ShapeError(
                explain(
                    f"{_FUNCTION} was given {name!r} of shape {own[name].shape}",
                    f"that of the model has shape {shape}",
                    "pass the model of which the posterior was made",
                )
            )
    return jax.tree.unflatten(treedef, [own[name] for name in wanted])
