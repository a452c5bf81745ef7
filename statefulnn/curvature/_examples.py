"""Gradients of single examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from statefulnn.core.compat import own_on_devices
from statefulnn.core.errors import explain
from statefulnn.core.generator import Forbidden, use_generator
from statefulnn.core.module import Module
from statefulnn.curvature._models import at_least_one, check_parameters, number_of_examples, wide
from statefulnn.transforms.grad import grad_of_example
from statefulnn.transforms.types import PyTree

# Under vmap one draw would serve all examples.
_FORBIDDEN = Forbidden(
    "drew random numbers in the loss of one example",
    "all examples would get the same ones",
    "call module.eval(); or pass keys (N,) as one more array of examples, and use "
    "nn.rng_scope(key) in the loss",
)


def without_randomness(loss: Callable, function: str) -> Callable:
    """Return a loss of one example that refuses to draw random numbers."""
    if not callable(loss):
        raise TypeError(
            explain(
                f"{function} was given a loss of type {type(loss).__name__}",
                "it differentiates a function of one example",
                "pass loss(params, x, y) -> scalar",
            )
        )

    def drawless(*args: Any) -> Any:
        with use_generator(_FORBIDDEN):
            return loss(*args)

    return drawless


def gradient_of_examples(loss: Callable, target: PyTree, function: str) -> Callable:
    """Return ``g(examples) -> gradients``, with a leading axis of examples on every gradient.

    Args:
        loss: ``loss(target, *example) -> scalar``, of one example.
        target: a Module, or arrays.
        function: for messages.
    """
    drawless = without_randomness(loss, function)
    # A module that JAX rebuilds inside vmap refuses writes, which no example could keep.
    one = grad_of_example(drawless)
    if not isinstance(target, Module):
        check_parameters(target, function)
        one = lambda params, *example: jax.grad(drawless)(own_on_devices(params, example), *example)

    def gradients(examples: tuple) -> Any:
        axes = (None, *(0,) * len(examples))
        return jax.vmap(one, in_axes=axes)(target, *examples)

    return gradients


def check_examples(examples: tuple, function: str) -> int:
    """Return how many examples there are; raise if they disagree, or there are none."""
    if not examples:
        raise TypeError(
            explain(
                f"{function} was given no examples",
                "the loss of an example is a function of its data",
                "pass the arrays (N, ...) after the parameters: (params, xs, ys)",
            )
        )
    n = number_of_examples(examples, function)
    at_least_one(n, function)
    return n


def flattened(gradients: PyTree) -> list[Any]:
    """Return gradients (N, ...) as (N, size), all of one dtype: float32 at least."""
    leaves = jax.tree.leaves(gradients)
    dtype = wide(*(g.dtype for g in leaves))
    return [g.reshape(g.shape[0], -1).astype(dtype) for g in leaves]
