"""Parts of the Laplace approximation: the curvature of an example, subsets of parameters, checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import ShapeError, UnknownNameError, explain
from statefulnn.core.module import Module
from statefulnn.curvature._models import Model, check_choice

Subset = str | Iterable[str] | Callable[[str], bool]


def triangle(rows: Any) -> Any:
    """Return R, (P, P), with Rᵀ R = rowsᵀ rows.

    Its singular values are the roots of the eigenvalues of rowsᵀ rows, and more exact than those: a
    product would round the small ones off, and small ones is what most are.
    """
    triangle = jnp.linalg.qr(rows, mode="r")
    missing = rows.shape[1] - triangle.shape[0]
    return jnp.pad(triangle, ((0, missing), (0, 0)))


def likelihood_of(out: Any, target: Any, likelihood: str) -> tuple[Any, Any]:
    """Return the log-likelihood of an example, and R with R Rᵀ its curvature by the outputs (C, C).

    For regression with a noise yet to be chosen the score is minus the squared error.
    """
    if likelihood == "regression":
        error = out - target.reshape(-1).astype(out.dtype)
        return -jnp.sum(jnp.square(error)), jnp.eye(out.size, dtype=out.dtype)
    log_p = jax.nn.log_softmax(out)
    p, root_p = jnp.exp(log_p), jnp.exp(log_p / 2)
    return log_p[target], jnp.diag(root_p) - jnp.outer(p, root_p)


def parts(params: Any, names: tuple[str, ...] | None) -> tuple[Any, Any, Callable]:
    """Return random and fixed parameters, and the function that puts them together."""
    if names is None:
        return params, {}, lambda chosen, rest: chosen
    chosen = {n: params[n] for n in names}
    rest = {n: p for n, p in params.items() if n not in chosen}
    return chosen, rest, lambda chosen, rest: {**rest, **chosen}


def chosen_names(
    model: Model, params: Any, subset: Subset, function: str
) -> tuple[str, ...] | None:
    if isinstance(subset, str) and subset == "all":
        return None
    if not isinstance(params, Mapping):
        raise TypeError(
            explain(
                f"{function} was given subset={subset!r} and parameters of type "
                f"{type(params).__name__}",
                "parameters are chosen by name",
                "pass a dict of name -> array, or subset='all'",
            )
        )
    if isinstance(subset, str):
        check_choice(subset, ("all", "last_layer"), "subset", function)
        module = model[0] if isinstance(model, tuple) else model
        if not isinstance(module, Module):
            raise TypeError(
                explain(
                    f"{function}(subset='last_layer') was given a function",
                    "JAX sorts dicts by name, so nothing tells which layer is the last",
                    "pass a Module or (module, params), or the names: subset=['head.weight', ...]",
                )
            )
        ordered = [n for n, _ in module.named_parameters() if n in params]
        owner = ordered[-1].rpartition(".")[0]
        return tuple(n for n in ordered if n.rpartition(".")[0] == owner)
    wanted = None if callable(subset) else tuple(subset)
    unknown = [n for n in wanted or () if n not in params]
    names = tuple(n for n in params if (subset(n) if callable(subset) else n in wanted))
    if unknown or not names:
        raise UnknownNameError(
            explain(
                f"{function} was given a subset "
                + (
                    f"with {', '.join(map(repr, unknown))}"
                    if unknown
                    else "that takes no parameter"
                ),
                f"the parameters are {list(params)}",
                "choose among these",
            )
        )
    return names


def check_positive(value: Any, option: str, function: str) -> None:
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


def check_targets(y: Any, outputs: int, likelihood: str, function: str) -> None:
    if likelihood == "regression":
        if y.size != y.shape[0] * outputs or y.ndim > 2:
            raise ShapeError(
                explain(
                    f"{function} was given targets of shape {y.shape} for a model of {outputs} outputs",
                    "a regression has one target for each output",
                    f"pass y of shape ({y.shape[0]}, {outputs})",
                )
            )
        return
    if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ShapeError(
            explain(
                f"{function} was given labels of shape {y.shape} and dtype {y.dtype}",
                "a classification has the number of its class for each example",
                "pass y of shape (N,) of integers: y.argmax(-1) of one-hot labels",
            )
        )
    if outputs < 2:
        raise ShapeError(
            explain(
                f"{function} was given a classifier of {outputs} output",
                "the likelihood is that of a softmax over all classes",
                "use two outputs for two classes",
            )
        )
    if isinstance(y, Tracer):
        return
    low, high = np.asarray(y).min(), np.asarray(y).max()
    if low < 0 or high >= outputs:
        raise ValueError(
            explain(
                f"{function} was given labels from {low} to {high}",
                f"the model has {outputs} outputs",
                f"number the classes from 0 to {outputs - 1}",
            )
        )
