"""Linear maps at a point: vjp, jvp, linearize; Jacobians and Hessians."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.differentiate import Differentiation, function_name, require_argnums
from statefulnn.transforms.types import PyTree


def _all(primals: tuple) -> tuple[int, ...]:
    return tuple(range(len(primals)))


@shortened
def vjp(func: Callable, *primals: object, has_aux: bool = False) -> tuple:
    """Run a function and return what pulls cotangents of its output back to its arguments.

    Args:
        func: takes `primals` and returns arrays, or with `has_aux` a pair of these and anything.
        primals: modules, parameters and arrays, in any pytree.
        has_aux: whether `func` returns a pair.

    Returns:
        ``(output, vjp_fn)`` or ``(output, vjp_fn, aux)``. ``vjp_fn(cotangents)`` takes cotangents of
        the output's structure and returns a tuple with one entry for each primal; for a Module a dict
        of name -> array of its trainable parameters.

    Source: ``torch.func.vjp``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> out, vjp_fn = nn.func.vjp(lambda m, x: m(x), nn.Linear(2, 3), jnp.ones(2))
        >>> of_model, of_x = vjp_fn(jnp.ones(3))
        >>> of_model["bias"].tolist(), of_x.shape
        ([1.0, 1.0, 1.0], (2,))
    """
    call = Differentiation(func, primals, {}, _all(primals), has_aux)
    out, pullback, effects = jax.vjp(call, call.values, has_aux=True)
    aux = call.finish(effects)

    def vjp_fn(cotangents: PyTree) -> tuple:
        return call.show(pullback(_like_output(cotangents, out, "a cotangent"))[0])

    return (out, vjp_fn, aux) if has_aux else (out, vjp_fn)


@shortened
def jvp(func: Callable, primals: tuple, tangents: tuple, *, has_aux: bool = False) -> tuple:
    """Run a function and its derivative along tangents.

    Args:
        func: takes `primals` and returns arrays, or with `has_aux` a pair of these and anything.
        primals: a tuple of modules, parameters and arrays.
        tangents: a tuple with one entry for each primal, of its structure; for a Module a dict of
            name -> array of its trainable parameters.
        has_aux: whether `func` returns a pair.

    Returns:
        ``(output, tangent of the output)``, and aux with `has_aux`.

    Raises:
        TypeError: if a module has backward hooks: forward mode has no gradients to show them.

    Source: ``torch.func.jvp``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> out, tangent = nn.func.jvp(jnp.sin, (jnp.zeros(()),), (jnp.ones(()),))
        >>> float(tangent)
        1.0
    """
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, (tuple, list)):
            raise TypeError(
                explain(
                    f"called jvp({function_name(func)}) with {name} of type {type(value).__name__}",
                    "there is one entry for each argument of the function",
                    f"pass a tuple, ({name[:-1]},) for one argument",
                )
            )
    call = Differentiation(func, tuple(primals), {}, _all(tuple(primals)), has_aux)
    given = call.take(tuple(tangents), "a tangent")
    out, tangent, effects = jax.jvp(call, (call.values,), (given,), has_aux=True)
    aux = call.finish(effects)
    return (out, tangent, aux) if has_aux else (out, tangent)


@shortened
def linearize(func: Callable, *primals: object) -> tuple:
    """Run a function and return its derivative as a function of tangents, to be used many times.

    Args:
        func: takes `primals` and returns arrays.
        primals: modules, parameters and arrays, in any pytree.

    Returns:
        ``(output, jvp_fn)``; ``jvp_fn(*tangents)`` takes one tangent for each primal, as `jvp`, and does
        not run `func` again.

    Raises:
        TypeError: if a module has backward hooks: forward mode has no gradients to show them.

    Source: ``torch.func.linearize``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> out, jvp_fn = nn.func.linearize(lambda x: x**2, jnp.asarray(3.0))
        >>> float(jvp_fn(1.0)), float(jvp_fn(2.0))
        (6.0, 12.0)
    """
    call = Differentiation(func, primals, {}, _all(primals))
    call.refuse_hooks()
    out, pushforward, effects = jax.linearize(call, call.values, has_aux=True)
    call.finish(effects)
    return out, lambda *tangents: pushforward(call.take(tangents, "a tangent"))


def jacrev(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable:
    """Return a function that computes the Jacobian row by row, for few outputs and many inputs.

    Args:
        func: returns arrays, or with `has_aux` a pair of these and anything.
        argnums: which argument, or arguments, to differentiate: a Module, a Parameter, or arrays.
        has_aux: whether `func` returns a pair.
        chunk_size: how many rows to compute at once, which bounds the memory; None for all.

    Returns:
        a function that returns the Jacobian, ``(*output shape, *input shape)`` for each pair of output
        and input; for a Module a dict of name -> array. With `has_aux` a pair of it and aux.

    Source: ``torch.func.jacrev``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> jacobian = nn.func.jacrev(lambda model, x: model(x))(nn.Linear(2, 3), jnp.ones(2))
        >>> jacobian["weight"].shape
        (3, 3, 2)
    """
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"jacrev: chunk_size must be a positive integer or None, got {chunk_size}")
    require_argnums(argnums, "nn.func.jacrev")

    @shortened
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Differentiation(func, args, kwargs, argnums, has_aux)
        out, pullback, effects = jax.vjp(call, call.values, has_aux=True)
        _real(out, func)
        # One row for each number of the output.
        flat, unravel = ravel_pytree(out)
        row = lambda unit: pullback(unravel(unit))[0]
        units = jnp.eye(flat.size, dtype=flat.dtype)
        rows = (
            jax.lax.map(row, units, batch_size=chunk_size) if chunk_size else jax.vmap(row)(units)
        )
        start, parts = 0, []
        for leaf in jax.tree_util.tree_leaves(out):
            size, shape = jnp.size(leaf), jnp.shape(leaf)
            part = slice(start, start + size)
            take = lambda v, part=part, shape=shape: v[part].reshape(shape + v.shape[1:])
            parts.append(jax.tree_util.tree_map(take, rows))
            start += size
        jacobian = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out), parts)
        aux = call.finish(effects)
        return (call.show(jacobian), aux) if has_aux else call.show(jacobian)

    return wrapper


def jacfwd(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """Return a function that computes the Jacobian column by column, for few inputs and many outputs.

    Args:
        func: returns arrays, or with `has_aux` a pair of these and anything.
        argnums: which argument, or arguments, to differentiate: a Module, a Parameter, or arrays.
        has_aux: whether `func` returns a pair.

    Returns:
        a function that returns the Jacobian, as `jacrev`.

    Raises:
        TypeError: if a module has backward hooks: forward mode has no gradients to show them.

    Source: ``torch.func.jacfwd``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.func.jacfwd(lambda x: x**2)(jnp.arange(3.0)).tolist()
        [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0]]
    """
    return _jacobian(jax.jacfwd, func, argnums, has_aux)


def hessian(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """Return a function that computes the Hessian, forward over reverse.

    Args:
        func: returns a scalar (or arrays: the Hessian of each number), or with `has_aux` a pair.
        argnums: which argument, or arguments, to differentiate: a Module, a Parameter, or arrays.
        has_aux: whether `func` returns a pair.

    Returns:
        a function that returns the Hessian; for a Module a dict of dicts, ``h["fc.weight"]["fc.bias"]``
        of shape ``(*output, *weight, *bias)``.

    Source: ``torch.func.hessian``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.func.hessian(lambda x: (x**3).sum())(jnp.ones(2)).tolist()
        [[6.0, 0.0], [0.0, 6.0]]
    """
    return _jacobian(jax.hessian, func, argnums, has_aux)


def _jacobian(
    transform: Callable, func: Callable, argnums: int | tuple[int, ...], has_aux: bool
) -> Callable:
    require_argnums(argnums, f"nn.func.{transform.__name__}")

    @shortened
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Differentiation(func, args, kwargs, argnums, has_aux)
        jacobian, effects = transform(call, has_aux=True)(call.values)
        aux = call.finish(effects)
        return (call.show(jacobian), aux) if has_aux else call.show(jacobian)

    return wrapper


def _real(out: PyTree, func: Callable) -> None:
    for leaf in jax.tree_util.tree_leaves(out):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                explain(
                    f"{function_name(func)} returned an output of dtype {jnp.result_type(leaf)}",
                    "a Jacobian is that of real numbers",
                    "return real arrays; has_aux=True passes anything else through",
                )
            )


def _like_output(given: PyTree, out: PyTree, what: str) -> Any:
    """Return cotangents as arrays of the output's structure, shapes and dtypes."""
    parts, structure = jax.tree_util.tree_flatten(given)
    wanted = jax.tree_util.tree_structure(out)
    if structure != wanted:
        raise TypeError(
            explain(
                f"gave {what} of structure {structure} for an output of structure {wanted}",
                "each array of the output has its own",
                "pass arrays in the structure of the output",
            )
        )
    arrays = []
    for part, leaf in zip(parts, jax.tree_util.tree_leaves(out), strict=True):
        if jnp.shape(part) != jnp.shape(leaf):
            raise ShapeError(
                explain(
                    f"gave {what} of shape {jnp.shape(part)} for an output of shape "
                    f"{jnp.shape(leaf)}",
                    "it has the shape of what it belongs to",
                    "pass an array of the same shape, such as jnp.ones_like(output)",
                )
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            part = jnp.asarray(part, jnp.result_type(leaf))
        arrays.append(part)
    return jax.tree_util.tree_unflatten(wanted, arrays)
