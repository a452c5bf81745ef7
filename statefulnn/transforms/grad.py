"""nn.grad and nn.value_and_grad: gradients with respect to a module's trainable parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import jax

from statefulnn.core.failures import typed_failures
from statefulnn.core.refusals import no_callable
from statefulnn.core.repeated import loss_of_example
from statefulnn.core.selection import Selection, is_several
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.differentiate import Differentiation, real_scalar, require_argnums
from statefulnn.transforms.types import P, R

_Aux = TypeVar("_Aux")


@overload
def value_and_grad(
    fun: Callable[P, R],
    argnums: int | tuple[int, ...] = 0,
    has_aux: Literal[False] = False,
    *,
    only: Selection = None,
) -> Callable[P, tuple[R, Any]]: ...
@overload
def value_and_grad(
    fun: Callable[P, tuple[R, _Aux]],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: Literal[True],
    only: Selection = None,
) -> Callable[P, tuple[tuple[R, _Aux], Any]]: ...
@overload
def value_and_grad(
    fun: Callable[P, Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    only: Selection = None,
) -> Callable[P, Any]: ...
@overload
def value_and_grad(
    fun: None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    only: Selection = None,
) -> Callable[[Callable[P, Any]], Callable[P, Any]]: ...
def value_and_grad(
    fun: Callable | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    only: Selection = None,
) -> Any:
    """Return a function that computes a loss and its gradient.

    Args:
        fun: returns a scalar, or with `has_aux` a pair of a scalar and anything.
        argnums: which argument, or arguments, to differentiate: a Module, a Parameter, or arrays.
        has_aux: whether `fun` returns a pair.
        only: which parameters of the module to differentiate by: names or patterns, ``"head.*|*.bias"``;
            modules or parameters of it, one or several; or a function of the name. The others are constants,
            for which no gradient is computed.

    Returns:
        a function with `fun`'s arguments that returns ``(value, grads)`` or ``((value, aux), grads)``.
        For a Module, `grads` is a dict of dotted name -> array of its trainable parameters, each tied
        parameter once. What `fun` writes to modules (running statistics, generators) is written back.

    Raises:
        UnusedModuleError: if `fun` never reads the module it is differentiated by.
        UnknownNameError: if `only` matches nothing, or only what is frozen.
        TypeError: if the loss is no real scalar.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Linear(2, 1)
        >>> loss_fn = lambda model, x: model(x).sum()
        >>> loss, grads = nn.value_and_grad(loss_fn)(model, jnp.ones((3, 2)))
        >>> grads["bias"].tolist()
        [3.0]
        >>> list(nn.value_and_grad(loss_fn, only="bias")(model, jnp.ones((3, 2)))[1])
        ['bias']
    """
    if fun is None:
        return functools.partial(value_and_grad, argnums=argnums, has_aux=has_aux, only=only)
    _require_function(fun, "nn.value_and_grad", argnums)
    if is_several(only):
        only = tuple(only)  # an iterator would serve one call
    return _with_value(fun, argnums, has_aux, only)


def grad_of_example(
    fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable:
    """Return what `grad` does, for a loss of one example, which is no sum over devices."""
    _require_function(fun, "nn.func.per_sample_grad", argnums, "model, x, y")
    return _without_value(_with_value(fun, argnums, has_aux, None, of_example=True), fun, has_aux)


def _with_value(
    fun: Callable,
    argnums: int | tuple[int, ...],
    has_aux: bool,
    only: Selection,
    of_example: bool = False,
) -> Callable:
    @shortened
    @functools.wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        view = real_scalar(fun, has_aux)
        call = Differentiation(fun, args, kwargs, argnums, has_aux, view, only, of_example)
        example = loss_of_example() if of_example else contextlib.nullcontext()
        with typed_failures(), example:  # of what JAX compiles by itself, such as loops
            (loss, effects), grads = jax.value_and_grad(call, has_aux=True)(call.values)
        aux = call.finish(effects)
        return (loss, aux) if has_aux else loss, call.show(grads)

    return wrapper


def _without_value(both: Callable, fun: Callable, has_aux: bool) -> Callable:
    @shortened
    @functools.wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapper


@overload
def grad(
    fun: Callable[P, tuple[R, _Aux]],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: Literal[True],
    only: Selection = None,
) -> Callable[P, tuple[Any, _Aux]]: ...
@overload
def grad(
    fun: Callable[P, Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    only: Selection = None,
) -> Callable[P, Any]: ...
@overload
def grad(
    fun: None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    only: Selection = None,
) -> Callable[[Callable[P, Any]], Callable[P, Any]]: ...
def grad(
    fun: Callable | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    only: Selection = None,
) -> Any:
    """Return a function that computes the gradient of a loss; see `value_and_grad`.

    Args:
        fun: returns a scalar, or with `has_aux` a pair of a scalar and anything.
        argnums: which argument, or arguments, to differentiate.
        has_aux: whether `fun` returns a pair.
        only: which parameters of the module to differentiate by.

    Returns:
        a function that returns ``grads``, or ``(grads, aux)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> grads = nn.grad(lambda model, x: model(x).sum())(nn.Linear(2, 1), jnp.ones((3, 2)))
        >>> sorted(grads)
        ['bias', 'weight']
    """
    if fun is None:
        return functools.partial(grad, argnums=argnums, has_aux=has_aux, only=only)
    _require_function(fun, "nn.grad", argnums)
    return _without_value(value_and_grad(fun, argnums, has_aux, only=only), fun, has_aux)


def _require_function(fun: object, name: str, argnums: object, given: str = "model") -> None:
    if not callable(fun):
        example = f"{name}(lambda {given}: F.mse_loss(model(x), y))({given})"
        raise no_callable(name, type(fun).__name__, example)
    require_argnums(argnums, name)
