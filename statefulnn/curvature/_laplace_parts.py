"""Parts of the Laplace approximation: the curvature of an example, subsets of parameters, checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module
from statefulnn.core.names import chosen
from statefulnn.curvature._models import Model, check_choice
from statefulnn.transforms.types import PyTree

Subset = str | Iterable[str] | Callable[[str], bool]


def triangle(rows: jax.Array) -> Any:
    """Return R, (P, P), with Rᵀ R = rowsᵀ rows.

    Its singular values are the roots of the eigenvalues of rowsᵀ rows, and more exact than those: a
    product would round the small ones off, and small ones is what most are.
    """
    triangle = jnp.linalg.qr(rows, mode="r")
    missing = rows.shape[1] - triangle.shape[0]
    return jnp.pad(triangle, ((0, missing), (0, 0)))


# torch's label for padding, which is not part of the data.
IGNORED = -100


@dataclass(frozen=True)
class Likelihood:
    """What the targets of an example are worth.

    Attributes:
        name: "regression" or "classification".
        shape: of the outputs of an example; a classification is over the last axis.
    """

    name: str
    shape: tuple[int, ...]

    def of(self, out: jax.Array, target: jax.Array) -> tuple[Any, Any]:
        """Return the log-likelihood of an example, and R with R Rᵀ its curvature by the outputs (C, C).

        For regression with a noise yet to be chosen the score is minus the squared error.

        Args:
            out: the outputs, flat.
            target: of the example.
        """
        if self.name == "regression":
            error = out - target.reshape(-1).astype(out.dtype)
            return -jnp.sum(jnp.square(error)), jnp.eye(out.size, dtype=out.dtype)
        labels = target.reshape(-1)
        log_p = jax.nn.log_softmax(out.reshape(labels.size, -1))
        is_datum = labels != IGNORED
        scores = jnp.take_along_axis(log_p, jnp.where(is_datum, labels, 0)[:, None], 1)[:, 0]
        p, root_p = jnp.exp(log_p), jnp.exp(log_p / 2)
        roots = jax.vmap(jnp.diag)(root_p) - p[:, :, None] * root_p[:, None]
        roots = jnp.where(is_datum[:, None, None], roots, 0)
        root = jax.scipy.linalg.block_diag(*roots) if labels.size > 1 else roots[0]
        return jnp.where(is_datum, scores, 0).sum(), root


def parts(params: PyTree, names: tuple[str, ...] | None) -> tuple[Any, Any, Callable]:
    """Return random and fixed parameters, and the function that puts them together."""
    if names is None:
        return params, {}, lambda chosen, rest: chosen
    chosen = {n: params[n] for n in names}
    rest = {n: p for n, p in params.items() if n not in chosen}
    return chosen, rest, lambda chosen, rest: {**rest, **chosen}


def chosen_names(
    model: Model, params: PyTree, subset: Subset, function: str
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
    if isinstance(subset, str) and (subset in params or any(c in subset for c in "*?[")):
        subset = [subset]
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
    return tuple(chosen(params, subset, f"{function}: subset", required=True))


def module_in(model: Model, function: str) -> Module:
    """Return the Module of a model."""
    module = model[0] if isinstance(model, tuple) else model
    if not isinstance(module, Module):
        raise TypeError(
            explain(
                f"{function} was given a function",
                "the factors are those of the layers of a module, which a function does not show",
                "pass a Module or (module, params)",
            )
        )
    return module


def check_targets(
    y: jax.Array, shape: tuple[int, ...], likelihood: str, function: str
) -> tuple[int, ...]:
    """Return the shape in which the outputs of an example are seen, or raise if targets do not fit.

    Args:
        y: the targets.
        shape: of the outputs of an example.
        likelihood: "regression" or "classification".
        function: for messages.
    """
    flat = (math.prod(shape),)
    if likelihood == "regression":
        if y.ndim > 1 and y.shape[1:] == shape:
            return shape
        if y.size != y.shape[0] * flat[0] or y.ndim > 2:
            raise ShapeError(
                explain(
                    f"{function} was given targets of shape {y.shape} for a model of {_said(shape)} "
                    "outputs",
                    "a regression has one target for each output",
                    f"pass y of shape {(y.shape[0], *(shape or flat))}",
                )
            )
        return flat
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ShapeError(
            explain(
                f"{function} was given labels of shape {y.shape} and dtype {y.dtype}",
                "a classification has the number of its class for each datum",
                "pass integers: y.argmax(-1) of one-hot labels",
            )
        )
    if y.ndim != 1 and (len(shape) != y.ndim or shape[:-1] != y.shape[1:]):
        raise ShapeError(
            explain(
                f"{function} was given labels of shape {y.shape} for a model of {_said(shape)} outputs",
                "there is one label for each example, y (N,) with outputs (N, C), or for each of its "
                "parts, y (N, T) with outputs (N, T, C)",
                "pass labels of that shape, or a model that puts the classes last",
            )
        )
    seen = flat if y.ndim == 1 else shape
    _check_labels(y, seen[-1], function)
    return seen


def _said(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else str(shape)


def _check_labels(y: jax.Array, classes: int, function: str) -> None:
    if classes < 2:
        raise ShapeError(
            explain(
                f"{function} was given a classifier of {classes} output",
                "the likelihood is that of a softmax over all classes",
                "use two outputs for two classes",
            )
        )
    if isinstance(y, Tracer):
        return
    labels = np.asarray(y)
    labels = labels[labels != IGNORED]
    if labels.size == 0:
        raise ValueError(
            explain(
                f"{function} was given labels that are all {IGNORED}",
                f"{IGNORED} stands for padding, which is no datum",
                f"number the classes from 0 to {classes - 1}",
            )
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            explain(
                f"{function} was given labels from {labels.min()} to {labels.max()}",
                f"the model has {classes} outputs",
                f"number the classes from 0 to {classes - 1}; {IGNORED} stands for padding",
            )
        )
