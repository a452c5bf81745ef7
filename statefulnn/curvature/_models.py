"""What the functions of this package take as a model, and one example at a time of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import DtypeError, ShapeError, UnusedModuleError, explain
from statefulnn.core.module import Module
from statefulnn.transforms.functional_call import functionalize
from statefulnn.transforms.types import PyTree

# A Module, or `(fn, params)` as `functionalize` returns it, or `(module, params)`.
Model = Any

_PAIR = "pass a Module, the pair (fn, params) that nn.functionalize(module) returns, or (module, params)"


def pure(model: Model, function: str) -> tuple[Callable, Any]:
    """Return a model as a pure function ``fn(params, *inputs)`` and its parameters."""
    if isinstance(model, Module):
        fn, params = functionalize(model)
    elif isinstance(model, tuple) and len(model) == 2:
        first, params = model
        if isinstance(first, Module):
            fn = _called_with(first)
            if not isinstance(params, Mapping):
                raise TypeError(
                    explain(
                        f"{function} was given a Module and parameters of type "
                        f"{type(params).__name__}",
                        "the parameters of a module are found by name",
                        "pass (module, {name: array, ...})",
                    )
                )
        elif callable(first):
            fn = first
        else:
            raise _no_model(model, function)
    else:
        raise _no_model(model, function)
    check_parameters(params, function)
    return fn, params


def _called_with(module: Module) -> Callable:
    # The module is read here and not in compiled code, for which it would be a constant.
    return functools.partial(_with_own, *functionalize(module))


def _with_own(
    fn: Callable, own: dict, params: Mapping[str, Any], /, *args: Any, **kwargs: Any
) -> Any:
    return fn({**own, **params}, *args, **kwargs)


def _no_model(model: object, function: str) -> TypeError:
    # What `functionalize` returns is a function to its user.
    what = "function" if isinstance(model, functools.partial) else type(model).__name__
    if isinstance(model, tuple):
        what = f"a tuple of {len(model)}: {', '.join(type(m).__name__ for m in model)}"
    return TypeError(
        explain(
            f"{function} was given {what} as its model",
            "it needs a function of parameters, and the parameters",
            _PAIR,
        )
    )


def check_parameters(params: PyTree, function: str) -> None:
    """Raise unless there are parameters, all of them real floating arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise UnusedModuleError(
            explain(
                f"{function} was given a model without trainable parameters",
                "it differentiates with respect to them",
                "unfreeze some, module.requires_grad_(True), or pass (module, params) with the "
                "arrays that are meant",
            )
        )
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            what = f"of type {type(leaf).__name__}" if dtype is None else f"of dtype {dtype}"
            raise DtypeError(
                explain(
                    f"{function} was given the parameter {path_name(path)!r} {what}",
                    "derivatives are taken with respect to real floating arrays",
                    "leave it out of params (state stays in the module), or cast it",
                )
            )


def path_name(path: Iterable[object]) -> str:
    """Return a leaf's path as users write it: for a dict of names, the name."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def inputs_of(x: object) -> tuple[Any, ...]:
    """Return the positional inputs of a model: a tuple is several of them."""
    return x if isinstance(x, tuple) else (x,)


def number_of_examples(arrays: PyTree, function: str) -> int:
    """Return the common length of the first axes of some arrays."""
    sizes: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        shape = jnp.shape(leaf)
        where = f"an array of shape {shape}"
        if not shape:
            raise ShapeError(
                explain(
                    f"{function} was given a number (argument {path_name(path)}) as data",
                    "the first axis of data counts the examples",
                    "pass arrays (N, ...)",
                )
            )
        sizes.setdefault(shape[0], where)
    if len(sizes) != 1:
        listed = ", ".join(sizes.values()) or "no arrays"
        raise ShapeError(
            explain(
                f"{function} was given {listed} as data",
                "the first axis counts the examples, and all arrays have the same number of them",
                "pass arrays (N, ...) with one N",
            )
        )
    return next(iter(sizes))


def at_least_one(n: int, function: str) -> None:
    """Raise for an empty batch."""
    if n == 0:
        raise ShapeError(
            explain(
                f"{function} was given a batch of 0 examples",
                "there is nothing to compute it from",
                "pass at least one example",
            )
        )


def one_output(fn: Callable, function: str) -> Callable:
    """Return ``f(params, inputs) -> (C,)``: the outputs of one example, made flat.

    The model sees a batch of one, so that what it does to a batch does not mix examples.
    """

    def single(params: PyTree, inputs: tuple[Any, ...]) -> Any:
        out = fn(params, *jax.tree.map(lambda a: a[None], inputs))
        return jnp.reshape(checked_output(out, function), (-1,))

    return single


def checked_output(out: Any, function: str) -> Any:
    """Return the output of a model for one example, in a batch of one, if it is a real array."""
    shape = getattr(out, "shape", None)
    if shape is None or not shape or shape[0] != 1:
        what = f"of type {type(out).__name__}" if shape is None else f"of shape {shape}"
        raise ShapeError(
            explain(
                f"{function} got an output {what} from the model for a batch of one example",
                "it needs one array, whose first axis counts the examples",
                "wrap the model: (lambda params, x: fn(params, x)[0], params) picks one of several "
                "outputs",
            )
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise DtypeError(
            explain(
                f"{function} got an output of dtype {out.dtype} from the model",
                "it is differentiated",
                "return the scores themselves, before an argmax or a comparison",
            )
        )
    return out


def check_choice(value: object, choices: tuple[str, ...], option: str, function: str) -> None:
    """Raise unless a value is one of a few words."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(
            explain(
                f"{function} was given {option}={value!r}",
                f"it knows {listed}",
                f"{option}={choices[0]!r}",
            )
        )


def check_batch_size(batch_size: object, function: str) -> None:
    """Raise unless a batch size is None or a positive whole number."""
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            explain(
                f"{function} was given batch_size={batch_size!r}",
                "it is the number of examples that are in memory at once",
                "batch_size=32, or None for all at once",
            )
        )


def check_finite(values: PyTree, done: str, why: str, instead: str) -> None:
    """Raise if an array that can be looked at holds NaN or infinity; traced values pass."""
    for value in jax.tree.leaves(values):
        if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value)).all():
            raise FloatingPointError(explain(done, why, instead))


def wide(*dtypes: Any) -> Any:
    """Return the dtype in which sums over parameters are taken: float32 at least."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
