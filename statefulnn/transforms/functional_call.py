"""Pure calls: functional_call, functionalize, stack_module_state.

A pure call runs on a clone around the arrays it is given. It never touches the module, may be nested
and may run in several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import DtypeError, ShapeError, UnknownNameError, explain
from statefulnn.core.generator import Generator, as_key, use_generator
from statefulnn.core.graph import build_clones, merge, require_module
from statefulnn.core.module import Module
from statefulnn.core.moduledef import ModuleDef, differences, positions_of
from statefulnn.core.narrowing import check_jax_holds
from statefulnn.core.ownership import Scope
from statefulnn.core.parameter import Parameter
from statefulnn.core.plan import build_plan, plan_of
from statefulnn.core.state_dict import _dtype_kind as dtype_kind
from statefulnn.transforms.lift import check_structure

_PURE = (
    "the call is pure: it returns its output only, so the new value would be lost",
    "functional_call(..., mutable=True) or functionalize(module, mutable=True), which return the new "
    "state; or module.eval() first, if nothing should change; batch normalisation can do without: "
    "nn.func.with_batch_norm(module, 'batch' or 'frozen')",
)
_PARAMETER = (
    "a pure call gives back new buffers, but no new parameters: the write would be lost",
    "keep what forward changes in a buffer, or call the module under nn.jit, which writes back",
)


def _pure_call(
    moduledef: ModuleDef,
    leaves: Sequence[Any],
    names: Mapping[str, int],
    args: tuple,
    kwargs: dict,
    rng: Any,
    method: str,
    writable: tuple[str, ...],
) -> tuple[Any, list[Any]]:
    """Run a method on a clone; return its output and the values of all leaves after it."""
    parameters = Scope(False, _PARAMETER if writable else _PURE, moduledef)
    buffers = Scope(bool(writable), _PURE, moduledef)
    absent = {i for i, v in enumerate(leaves) if v is None}
    scope = Scope(moduledef=moduledef)
    roots, boxes, modules = build_clones(moduledef, leaves, scope, parameters, buffers)
    # A module around a pure function hands on the generator in force: see transforms/statefulize.py.
    generator = Generator(rng) if not isinstance(rng, Generator | None) else rng
    if isinstance(rng, Generator) and moduledef.count("generator"):
        rng = rng.next_key()
    for i, box in enumerate(boxes):
        if isinstance(box, Generator):
            box._scope = Scope(moduledef=moduledef)
            if rng is not None:  # a module's own generators follow the key as well
                box._value = Generator(jax.random.fold_in(as_key(rng), i)).state
            else:
                box._scope.writable = False
        elif isinstance(box, Parameter) and moduledef.kind_of(i) in writable:
            box._scope = buffers
    for name, i in names.items():
        if i in absent:
            path, _, last = name.rpartition(".")
            owner = roots[0].get_submodule(path)
            registry = owner._parameters if last in owner._parameters else owner._buffers
            dict.__setitem__(registry, last, None)
    function = roots[0] if method == "forward" else getattr(roots[0], method)
    with use_generator(generator):
        out = function(*args, **kwargs)
    if not absent:
        check_structure(moduledef, modules, roots, boxes)
    return out, [box._value for box in boxes]


def _merged(dicts: Any) -> dict[str, Any]:
    if isinstance(dicts, Mapping):
        return dict(dicts)
    if not isinstance(dicts, Sequence) or not all(isinstance(d, Mapping) for d in dicts):
        raise TypeError(
            explain(
                f"functional_call was given parameters of type {type(dicts).__name__}",
                "it finds arrays by name",
                "pass a dict of name -> array, or a tuple of such dicts",
            )
        )
    merged: dict[str, Any] = {}
    for d in dicts:
        twice = merged.keys() & d.keys()
        if twice:
            raise ValueError(f"{sorted(twice)} appear in multiple dictionaries")
        merged.update(d)
    return merged


def _checked(name: str, value: Any, have: Any, function: str) -> Any:
    """Return the array to use under a name, or raise if it does not fit."""
    if value is None:
        return None
    if isinstance(value, Box):
        value = value.value
    if isinstance(value, (np.ndarray, np.generic)):
        check_jax_holds(value, lambda: f"{name!r}, which was given to {function},")
    if isinstance(value, (np.ndarray, np.generic, float, int)):
        value = jnp.asarray(value)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            explain(
                f"{function} was given an object of type {type(value).__name__} for {name!r}",
                "parameters and buffers are arrays",
                "pass a jax.Array or a numpy array",
            )
        )
    if value.shape != have.shape:
        hint = "pass an array of the same shape"
        if value.shape[1:] == have.shape:
            hint = "for parameters stacked along a leading axis, call it under jax.vmap(in_axes=0)"
        raise ShapeError(
            explain(
                f"{function} was given {name!r} with shape {value.shape}",
                f"the module has shape {have.shape} there",
                hint,
            )
        )
    if dtype_kind(value.dtype) != dtype_kind(have.dtype):
        raise DtypeError(
            explain(
                f"{function} was given {name!r} with dtype {value.dtype}",
                f"the module has dtype {have.dtype} there",
                "cast it: array.astype(...)",
            )
        )
    return value


def functional_call(
    module: Module,
    parameter_and_buffer_dicts: Any,
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    rng: Any = None,
    method: str = "forward",
    mutable: bool = False,
    strict: bool = False,
    tie_weights: bool = True,
) -> Any:
    """Call a module with other arrays in place of its own, as a pure function.

    Args:
        module: it is never touched.
        parameter_and_buffer_dicts: a dict of dotted name -> array, or a tuple of such dicts.
        args: the positional arguments: a tuple, or one argument that is no tuple.
        kwargs: the keyword arguments.
        rng: a random key for dropout and the like.
        method: the method to call.
        mutable: whether forward may write buffers; their new values are then returned.
        strict: whether every parameter and buffer must be given.
        tie_weights: whether one name of a tied parameter replaces it under all its names.

    Returns:
        the output, or with ``mutable=True`` the pair of output and a dict of every buffer by name.

    Raises:
        UnknownNameError: for names the module does not have, or missing ones with ``strict=True``.
        ShapeError, DtypeError: for arrays that do not fit.
        ValueError: for a name in several dicts, or different arrays for one tied parameter.
        StateWriteError: if forward writes state and `mutable` is False.
        MissingRngError: if forward draws random numbers and `rng` is None.

    Source: ``torch.func.functional_call``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Linear(2, 1)
        >>> zeros = {name: jnp.zeros(p.shape) for name, p in model.named_parameters()}
        >>> nn.functional_call(model, zeros, jnp.ones((3, 2))).tolist()
        [[0.0], [0.0], [0.0]]
    """
    require_module(module, "functional_call")
    given = _merged(parameter_and_buffer_dicts)
    plan = plan_of(module) if tie_weights else build_plan((module,), untie=True)
    moduledef = plan.moduledef
    positions = positions_of(moduledef, given, "functional_call")
    leaves = list(plan.leaves())
    if current_trace() is not EAGER:
        given_positions = set(positions)
        for i, box in enumerate(plan.boxes):
            if i not in given_positions:
                box._read_in_trace()
    filled: dict[int, str] = {}
    for (name, value), i in zip(given.items(), positions, strict=True):
        checked = _checked(name, value, plan.boxes[i]._value, "functional_call")
        if i in filled and checked is not leaves[i]:
            raise ValueError(
                explain(
                    f"functional_call was given different arrays for {filled[i]!r} and {name!r}",
                    "they are tied: one parameter under two names",
                    "pass one of the names, the same array under both, or tie_weights=False",
                )
            )
        leaves[i], filled[i] = checked, name
    if strict:
        named = {i: n for n, i in reversed(list(moduledef.names.items()))}
        missing = [n for i, n in named.items() if i not in filled]
        if missing:
            raise UnknownNameError(
                explain(
                    f"functional_call(strict=True) was not given {', '.join(map(repr, missing))}",
                    "with strict=True every parameter and buffer must be given",
                    "pass them all, or strict=False to use the module's own",
                )
            )
    if args is None:
        args = ()
    elif not isinstance(args, tuple):
        args = (args,)
    writable = ("buffer",) if mutable else ()
    out, after = _pure_call(
        moduledef, leaves, moduledef.names, args, kwargs or {}, rng, method, writable
    )
    if not mutable:
        return out
    return out, _by_name(moduledef, after, ("buffer",))


def _by_name(moduledef: ModuleDef, leaves: Sequence[Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Return the leaves of some kinds under their first names, in the order of the names."""
    seen: set[int] = set()
    result = {}
    for name, i in moduledef.names.items():
        if i not in seen and moduledef.kind_of(i) in kinds:
            seen.add(i)
            result[name] = leaves[i]
    return result


def functionalize(module: Module, *, mutable: bool = False, method: str = "forward") -> Any:
    """Return a module as a pure function and its arrays.

    Args:
        module: it is not touched, and later changes of it do not reach the function.
        mutable: whether the function takes and returns state (buffers and frozen parameters).
        method: the method to call.

    Returns:
        ``fn, params`` with ``fn(params, *inputs, rng=None, **kwargs) -> out``; or, with
        ``mutable=True``, ``fn, params, state`` with
        ``fn(params, state, *inputs, rng=None, **kwargs) -> (out, new_state)``. `params` holds the
        trainable parameters by name, each tied parameter once.

    Raises:
        UnknownNameError, ShapeError, DtypeError: when `fn` is given arrays that do not fit.
        StateWriteError: when forward writes state and `mutable` is False.
        MissingRngError: when forward draws random numbers without `rng`.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> fn, params = nn.functionalize(nn.Linear(2, 1))
        >>> grads = jax.grad(lambda p, x: fn(p, x).sum())(params, jnp.ones((3, 2)))
        >>> grads["bias"].tolist()
        [3.0]
    """
    require_module(module, "functionalize")
    if not callable(getattr(module, method, None)):
        raise AttributeError(
            explain(
                f"functionalize({type(module).__name__}, method={method!r})",
                f"{type(module).__name__} has no method {method!r}",
                "pass the name of a method",
            )
        )
    plan = plan_of(module)
    moduledef, own = plan.moduledef, plan.given_out()
    fn = _pure_function(moduledef, own, method, mutable)
    params = _by_name(moduledef, own, ("trainable",))
    return (fn, params, _by_name(moduledef, own, ("buffer", "frozen"))) if mutable else (fn, params)


def _pure_function(moduledef: ModuleDef, own: list[Any], method: str, mutable: bool) -> Callable:
    """Return a method of a module as a pure function, see `functionalize`.

    Everything it closes over is one of the arguments, or follows from them: two functions of the same
    arguments share compiled code.
    """
    type_name = moduledef.nodes[0].cls.__name__
    wanted_params = tuple(_by_name(moduledef, own, ("trainable",)))
    wanted_state = tuple(_by_name(moduledef, own, ("buffer", "frozen")))
    writable = ("buffer", "frozen") if mutable else ()
    signature = "(params, state, *inputs)" if mutable else "(params, *inputs)"

    def call(given: Mapping[str, Any], need: tuple, args: tuple, rng: Any, kwargs: dict) -> Any:
        for noun, values, wanted in need:
            if not isinstance(values, Mapping):
                raise TypeError(
                    explain(
                        f"the function of {type_name} was given {noun} of type "
                        f"{type(values).__name__}",
                        f"it finds arrays by name; the arguments are {signature}",
                        f"pass the dict of {noun} first",
                    )
                )
            missing = [n for n in wanted if n not in values]
            if missing:
                raise UnknownNameError(
                    explain(
                        f"the function of {type_name} was not given {', '.join(map(repr, missing))}",
                        f"all {noun} are arguments of the pure function",
                        f"start from the {noun} that functionalize returned",
                    )
                )
        leaves = list(own)
        positions = positions_of(moduledef, given, f"the function of {type_name}")
        for (name, value), i in zip(given.items(), positions, strict=True):
            leaves[i] = _checked(name, value, own[i], f"the function of {type_name}")
        return _pure_call(moduledef, leaves, moduledef.names, args, kwargs, rng, method, writable)

    if mutable:

        def stateful(params, state, /, *inputs, rng=None, **kwargs):
            need = (("params", params, wanted_params), ("state", state, wanted_state))
            given = {**params, **state} if isinstance(state, Mapping) else params
            out, after = call(given, need, inputs, rng, kwargs)
            return out, _by_name(moduledef, after, ("buffer", "frozen"))

        fn: Callable = stateful
    else:

        def pure(params, /, *inputs, rng=None, **kwargs):
            return call(params, (("params", params, wanted_params),), inputs, rng, kwargs)[0]

        fn = pure

    def in_mode(training: bool) -> Callable:
        twin = merge(moduledef, own).train(training)
        return _pure_function(plan_of(twin).moduledef, own, method, mutable)

    fn.__name__ = fn.__qualname__ = f"{type_name}.{method}"
    fn.__doc__ = f"{type_name}.{method} as a pure function {signature}."
    # Whether it takes and returns state; and what makes `statefulize` the way back.
    training = next(value for name, value, _ in moduledef.nodes[0].values if name == "training")
    facts = {"mutable": mutable, "moduledef": moduledef, "training": training, "in_mode": in_mode}
    fn.__dict__.update(facts)
    return fn


def stack_module_state(models: Sequence[Module]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stack the parameters and buffers of equal models along a new first axis.

    Args:
        models: modules of the same structure.

    Returns:
        ``(params, buffers)``: dicts of name -> array ``(len(models), ...)``, for ``jax.vmap`` over
        `functional_call`.

    Raises:
        ValueError: for no models, or models that differ in structure or mode.

    Source: ``torch.func.stack_module_state``.

    Example:
        >>> import statefulnn as nn
        >>> params, buffers = nn.stack_module_state([nn.Linear(2, 3) for _ in range(5)])
        >>> params["weight"].shape
        (5, 3, 2)
    """
    models = list(models)
    if not models:
        raise ValueError("stack_module_state: Expected at least one model, got 0.")
    for model in models:
        require_module(model, "stack_module_state")
    plans = [plan_of(m) for m in models]
    first = plans[0].moduledef
    for number, plan in enumerate(plans):
        if plan.moduledef is not first:
            listed = "; ".join(f"{n}: {c}" for n, c in differences(first, plan.moduledef)[:5])
            raise ValueError(
                explain(
                    f"stacked models that differ: number {number} against number 0 ({listed})",
                    "one function has to serve them all",
                    "build them the same way and put them into the same mode",
                )
            )
    if current_trace() is not EAGER:
        for plan in plans:
            plan.note_read()
    stacked = [jnp.stack(values) for values in zip(*(p.leaves() for p in plans), strict=True)]
    return (
        _by_name(first, stacked, ("trainable", "frozen")),
        _by_name(first, stacked, ("buffer",)),
    )
