"""Gradients in torch.func's order, and the gradient of each example of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.differentiate import function_name
from statefulnn.transforms.grad import grad_of_example, value_and_grad
from statefulnn.transforms.types import PyTree
from statefulnn.transforms.vmap import vmap


def grad_and_value(
    func: Callable | None = None, argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Any:
    """Return a function that computes a gradient and the loss, in this order.

    Args:
        func: returns a scalar, or with `has_aux` a pair of a scalar and anything.
        argnums: which argument, or arguments, to differentiate: a Module, a Parameter, or arrays.
        has_aux: whether `func` returns a pair.

    Returns:
        a function that returns ``(grads, value)`` or ``(grads, (value, aux))``; for a Module the
        gradient is a dict of dotted name -> array.

    Source: ``torch.func.grad_and_value``; `nn.value_and_grad` has JAX's order.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> grads, value = nn.func.grad_and_value(lambda x: (x**2).sum())(jnp.arange(3.0))
        >>> grads.tolist(), float(value)
        ([0.0, 2.0, 4.0], 5.0)
    """
    if func is None:
        return functools.partial(grad_and_value, argnums=argnums, has_aux=has_aux)
    both = value_and_grad(func, argnums, has_aux)

    @shortened
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return grads, value

    return wrapper


def per_sample_grad(
    loss: Callable,
    argnums: int | tuple[int, ...] = 0,
    in_dims: PyTree = None,
    has_aux: bool = False,
    randomness: str = "different",
) -> Callable:
    """Return a function that computes the gradient of every example's own loss.

    Args:
        loss: the loss of one example, ``loss(model, x, y) -> scalar``; `x` and `y` come without the
            batch axis. ``model(x[None])[0]`` gives the model a batch of one, which normalisations need
            (others take an input without a batch).
        argnums: what to differentiate: a Module, or a dict of parameters as `functionalize` gives.
        in_dims: the batch axis of each argument, None for what all examples share. By default the
            arguments of `argnums` are shared, and all others have it first.
        has_aux: whether `loss` returns a pair of the loss and anything.
        randomness: "different" gives every example its own dropout mask, "same" one mask, "error"
            forbids it.

    Returns:
        a function ``(model, xs, ys)`` that returns gradients with a leading axis of examples: for a
        Module a dict of name -> ``(N, *shape)``; with `has_aux` a pair of these and aux.

    Raises:
        StateWriteError: if the model writes state, as batch normalisation in training mode does: a
            statistic of the batch has no gradient of one example. Use ``model.eval()``, or a norm
            of each example (GroupNorm, LayerNorm).
        ShapeError: if the arguments disagree about the number of examples.
        TypeError: if the loss of one example is no scalar.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> loss = lambda model, x, y: ((model(x) - y) ** 2).sum()
        >>> grads = nn.func.per_sample_grad(loss)(
        ...     nn.Linear(3, 2), jnp.ones((8, 3)), jnp.ones((8, 2))
        ... )
        >>> grads["weight"].shape
        (8, 2, 3)
    """
    one_example = grad_of_example(loss, argnums, has_aux)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @shortened
    @functools.wraps(loss)
    def wrapper(*args: Any) -> Any:
        shared = {n % len(args) for n in numbers if -len(args) <= n < len(args)}
        axes = in_dims
        if axes is None:
            axes = tuple(None if i in shared else 0 for i in range(len(args)))
            if all(axis is None for axis in axes):
                raise ShapeError(
                    explain(
                        f"called per_sample_grad({function_name(loss)}) with {len(args)} arguments, which "
                        "are all differentiated",
                        "none of them holds a batch of examples",
                        "pass the data after the model: per_sample_grad(loss)(model, xs, ys)",
                    )
                )
        return vmap(one_example, axes, randomness=randomness)(*args)

    return wrapper
