"""What nn.export is asked for: which functions, with which inputs, and which dimensions of any size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from statefulnn.core.box import Box
from statefulnn.core.errors import ShapeError, explain
from statefulnn.transforms.lift import call_module

_SETTINGS = ("function", "inputs", "kwargs", "shapes", "constraints")


class Task(NamedTuple):
    """One method to export.

    Attributes:
        function: of the module and the inputs.
        args, kwargs: shapes and dtypes in place of arrays.
        example: the same without dimensions of any size, None where the caller gave them.
        positional: the names of `args`.
        labels: a name for each array, in JAX's order.
        given: the arrays, or shapes in their place, as the caller gave them.
    """

    name: str
    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    example: tuple[tuple, dict[str, Any]] | None
    positional: list[str]
    labels: list[str]
    given: list[Any]
    constraints: list[str]


def named(methods: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(methods, Mapping):
        methods = dict.fromkeys((methods,) if isinstance(methods, str) else methods)
    found: dict[str, Mapping[str, Any]] = {n: dict(s or {}) for n, s in methods.items()}
    for name, settings in found.items():
        unknown = [key for key in settings if key not in _SETTINGS]
        if unknown or not isinstance(name, str):
            raise TypeError(
                explain(
                    f"called nn.export with the setting {unknown[0]!r} of method {name!r}"
                    if unknown
                    else f"called nn.export with a method {name!r}",
                    f"methods are names, or a dict of name -> settings: {', '.join(_SETTINGS)}",
                    "methods=('forward', 'encode'), or methods={'encode': {'inputs': (ids,)}}",
                )
            )
    if not found:
        raise ValueError(
            explain("called nn.export without methods", "a file has one", "methods=('forward',)")
        )
    return found


def task_of(module: Any, name: str, settings: dict[str, Any], batch: str | None) -> Task:
    args = settings["inputs"]
    args = args if type(args) is tuple else (args,)
    kwargs = dict(settings["kwargs"] or {})
    function = settings.get("function")
    if function is None:
        if not callable(getattr(module, name, None)):
            raise AttributeError(
                explain(
                    f"called nn.export with the method {name!r}",
                    f"{type(module).__name__} has none of that name",
                    f"methods={{{name!r}: {{'function': lambda model, x: ...}}}}",
                )
            )
        function = call_module if name == "forward" else _method(name)
        described = getattr(module, "forward_signature", None) if name == "forward" else None
        signature = described or inspect.signature(getattr(module, name))
    else:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            signature = signature.replace(parameters=parameters[1:])
    positional = _positional(signature, args, kwargs, f"{type(module).__name__}.{name}")
    fixed = jax.tree_util.tree_map_with_path(
        lambda where, v: _shape_of(v, name, _label(where, positional)),
        (args, kwargs),
        is_leaf=lambda v: isinstance(v, Box),
    )
    leaves = jax.tree_util.tree_leaves_with_path(fixed)
    constraints: list[str] = list(settings["constraints"] or ())
    named = settings["shapes"] or {}
    if not isinstance(named, Mapping):
        raise TypeError(
            explain(
                f"called nn.export with shapes={named!r} for {name!r}",
                "each input has a shape of its own, by its name",
                f"shapes={{{(positional or ['input'])[0]!r}: {named!r}}}",
            )
        )
    shapes = {_argument(n, positional): s for n, s in named.items()}
    symbolic = _symbolic(fixed, positional, shapes, constraints, batch, name)
    changed = jax.tree_util.tree_leaves(symbolic) != [leaf for _, leaf in leaves]
    return Task(
        name,
        function,
        symbolic[0],
        symbolic[1],
        fixed if changed else None,
        positional,
        [_label(where, positional) for where, _ in leaves],
        jax.tree_util.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, Box)),
        constraints,
    )


def _method(name: str) -> Callable:
    def call(module: object, *args: Any, **kwargs: Any) -> Any:
        return getattr(module, name)(*args, **kwargs)

    return call


def _positional(signature: Any, args: tuple, kwargs: dict, called: str) -> list[str]:
    """Return the names of the positional arguments."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            explain(
                f"called nn.export with {len(args)} inputs and kwargs {sorted(kwargs)}",
                f"{called}{signature}: {error}",
                "inputs=(x, mask) in the order of the arguments, kwargs={'mask': mask} by name",
            )
        ) from None
    names = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(len(args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[: len(args)]


def _argument(name: str, positional: Sequence[str]) -> str:
    """Return the name of an argument that is given as ``args[0]``."""
    numbers = {f"args[{i}]": known for i, known in enumerate(positional)}
    return name if name in positional else numbers.get(name, name)


def _label(where: Sequence[Any], positional: Sequence[str]) -> str:
    """Return the argument's name and what leads from it to an array."""
    side, first, *rest = where
    name = positional[first.idx] if side.idx == 0 else first.key
    return str(name) + jax.tree_util.keystr(tuple(rest))


def _shape_of(value: Any, method: str, label: str) -> jax.ShapeDtypeStruct:
    value = value.value if isinstance(value, Box) else value
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            explain(
                f"called nn.export with {label!r} of {method!r} of type {type(value).__name__}",
                "inputs of a compiled function are arrays",
                f"an array, or a function that has the value: methods={{{method!r}: {{'function': "
                f"lambda model, x: model(x, {label}={value!r})}}}}",
            )
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise TypeError(
            explain(
                f"called nn.export with {label!r} of {method!r} of dtype {value.dtype}",
                "a program takes numbers",
                "rng=True for the random key of dropout and the like; jax.random.key_data(key)",
            )
        )
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    return jax.ShapeDtypeStruct(value.shape, dtype)


def _symbolic(
    fixed: Any,
    positional: Sequence[str],
    shapes: Mapping[str, Any],
    constraints: Sequence[str],
    batch: str | None,
    method: str,
) -> Any:
    """Give names to dimensions: those of `shapes`, and the first one of the other inputs."""
    args, kwargs = fixed
    names = [*positional, *kwargs]
    unknown = [n for n in shapes if n not in names]
    if unknown:
        raise TypeError(
            explain(
                f"called nn.export with shapes of {unknown[0]!r} for {method!r}",
                f"its inputs are {', '.join(map(repr, names))}",
                f"shapes={{{names[0]!r}: 'b, ...'}}" if names else "leave shapes out",
            )
        )
    scope = jax.export.SymbolicScope(constraints)
    leaves = jax.tree_util.tree_leaves(fixed)
    given = any(jax.export.is_symbolic_dim(d) for leaf in leaves for d in leaf.shape)
    size = next((leaf.shape[0] for leaf in leaves if leaf.shape), None)
    b = None
    if batch is not None and not given:
        (b,) = jax.export.symbolic_shape(batch, scope=scope)

    def batched(leaf: Any) -> Any:
        if b is None or not leaf.shape or leaf.shape[0] != size:
            return leaf
        return jax.ShapeDtypeStruct((b, *leaf.shape[1:]), leaf.dtype)

    def specified(name: str, value: object) -> Any:
        if name not in shapes:
            return jax.tree_util.tree_map(batched, value)
        try:
            specs = jax.export.symbolic_args_specs(value, shapes[name], scope=scope)
            jax.tree_util.tree_map(_same_rank, specs, value)
            return specs
        except ValueError as error:
            raise ShapeError(
                explain(
                    f"called nn.export with shapes={{{name!r}: {shapes[name]!r}}} for {method!r}",
                    str(error),
                    "one dimension each, a number, a name, or '...': 'b, t, 64' or 'b, ...'",
                )
            ) from None

    return (
        tuple(specified(n, v) for n, v in zip(positional, args, strict=True)),
        {n: specified(n, v) for n, v in kwargs.items()},
    )


def _same_rank(named: Any, given: Any) -> None:
    if len(named.shape) != len(given.shape):
        raise ValueError(f"the input has shape {given.shape}")
