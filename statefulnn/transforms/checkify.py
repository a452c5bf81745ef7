"""nn.checkify: checks inside compiled code, whose errors come back as values."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, overload

from jax.experimental import checkify as of_jax

from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.lift import SplitCall, unbound
from statefulnn.transforms.types import P, R


@overload
def checkify(
    fun: Callable[P, R], errors: frozenset[Any] = of_jax.user_checks
) -> Callable[P, tuple[of_jax.Error, R]]: ...
@overload
def checkify(
    fun: None = None, errors: frozenset[Any] = of_jax.user_checks
) -> Callable[[Callable[P, R]], Callable[P, tuple[of_jax.Error, R]]]: ...
def checkify(fun: Callable | None = None, errors: frozenset[Any] = of_jax.user_checks) -> Any:
    """Return a function that reports the first failed check beside its output, with state.

    What the function writes to the modules in its arguments is written back, also if a check failed: as in
    JAX, both the error and the results come back. Compile it as ``nn.jit(nn.checkify(f))``, and call
    ``err.throw()`` outside of the compiled code.

    Args:
        fun: a function of modules and arrays, a Module or a method of one. Without it, `checkify` returns a
            decorator.
        errors: what is checked, sets of ``jax.experimental.checkify`` joined by ``|``: ``user_checks`` for
            the calls of ``checkify.check``, ``nan_checks``, ``div_checks``, ``index_checks``.

    Returns:
        a function with `fun`'s arguments that returns ``(err, out)``. ``err.get()`` is the message or None,
        ``err.throw()`` raises it.

    Raises:
        StructureChangeError: if the function changes more than arrays.

    Source: ``jax.experimental.checkify.checkify``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from jax.experimental import checkify
        >>> norm = nn.BatchNorm1d(2)
        >>> def forward(norm, x):
        ...     checkify.check(jnp.all(x < 9), "an input is too large: {}", x.max())
        ...     return norm(x)
        >>> step = nn.jit(nn.checkify(forward))
        >>> err, out = step(norm, jnp.full((3, 2), 10.0))
        >>> err.get()
        'an input is too large: 10.0 (`check` failed)'
        >>> out.shape, int(norm.num_batches_tracked)
        ((3, 2), 1)
    """
    if fun is None:
        return functools.partial(checkify, errors=errors)

    function, owner = unbound(fun)

    @shortened
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = SplitCall((args, kwargs))
        pure = call.signature.pure(function)
        err, result = of_jax.checkify(pure, errors)(call.leaves, call.dynamic)
        return err, call.finish(*result)

    return wrapper if owner is None else types.MethodType(wrapper, owner)
