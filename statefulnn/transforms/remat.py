"""nn.remat: recompute intermediate results in the backward pass instead of keeping them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import jax

from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.lift import SplitCall, unbound
from statefulnn.transforms.types import P, R


@overload
def remat(fun: Callable[P, R], **options: Any) -> Callable[P, R]: ...
@overload
def remat(fun: None = None, **options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def remat(fun: Callable | None = None, **options: Any) -> Any:
    """Return a function that keeps only its inputs for the backward pass, as ``jax.checkpoint``.

    What the function writes to the modules in its arguments is written back, and random draws are the
    same when it is recomputed.

    Args:
        fun: a function of modules and arrays, a Module or a method of one.
        options: passed to ``jax.checkpoint`` (``policy``, ``prevent_cse``).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Linear(2, 2)
        >>> def loss_fn(model, x):
        ...     return nn.remat(lambda model, x: model(x))(model, x).sum()
        >>> nn.grad(loss_fn)(model, jnp.ones((3, 2)))["bias"].tolist()
        [3.0, 3.0]
    """
    if fun is None:
        return functools.partial(remat, **options)

    function, owner = unbound(fun)

    @shortened
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if owner is not None:
            args = (owner, *args)
        call = SplitCall((args, kwargs))
        pure = call.signature.pure(function)
        return call.finish(*jax.checkpoint(pure, **options)(call.leaves, call.dynamic))

    return wrapper
