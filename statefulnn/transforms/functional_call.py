"""Pure calls: functional_call, functionalize, stack_module_state.

A pure call runs on a clone around the arrays it is given. It never touches the module, may be nested
and may run in several threads.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias, overload

import jax
import jax.numpy as jnp

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import called_by
from statefulnn.core.generator import Generator, Seed, as_key, use_generator
from statefulnn.core.graph import build_clones, merge, require_module
from statefulnn.core.module import Callee, Module
from statefulnn.core.moduledef import ModuleDef, differences, positions_of
from statefulnn.core.ownership import Scope
from statefulnn.core.parameter import Parameter
from statefulnn.core.plan import build_plan, plan_of
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.given import (
    Stored,
    checked,
    joined,
    layers_given,
    merged,
    named_by_layer,
)
from statefulnn.transforms.lift import check_structure
from statefulnn.transforms.types import PyTree, R

# A key, a seed, or a generator to go on with; None for a call that draws nothing.
Randomness: TypeAlias = Seed | Generator | None


def _pure_call(
    moduledef: ModuleDef,
    leaves: Sequence[Any],
    names: Mapping[str, int],
    args: tuple,
    kwargs: Mapping[str, object],
    rng: Randomness,
    method: str,
    writable: tuple[str, ...],
) -> tuple[PyTree, list[Any]]:
    """Run a method on a clone; return its output and the values of all leaves after it."""
    # The modules of the clone, its parameters and its buffers have owners of their own: each knows whether it
    # may be written, and what to say if it may not.
    parameters = Scope(
        False, refusals.PURE_BUT_FOR_BUFFERS if writable else refusals.PURE, moduledef
    )
    buffers = Scope(bool(writable), refusals.PURE, moduledef)
    absent = {i for i, v in enumerate(leaves) if v is None}
    scope = Scope(moduledef=moduledef)
    roots, boxes, modules = build_clones(moduledef, leaves, scope, parameters, buffers)
    # A module around a pure function hands on the generator in force: see transforms/statefulize.py.
    generator = Generator(rng) if not isinstance(rng, Generator | None) else rng
    if isinstance(rng, Generator) and moduledef.count("generator"):
        rng = rng.next_key()  # only if somebody needs it: to draw advances the generator
    for i, box in enumerate(boxes):
        if isinstance(box, Generator):
            # A generator may be advanced even in a pure call: its stream starts at the key and ends with the
            # call. Without a key every call would draw the same numbers, so a draw is refused.
            box._scope = Scope(moduledef=moduledef)
            if rng is not None:  # a module's own generators follow the key as well
                box._value = Generator(jax.random.fold_in(as_key(rng), i)).state
            else:
                box._scope.writable = False
        elif isinstance(box, Parameter) and moduledef.kind_of(i) in writable:
            box._scope = buffers
    # None for an array stands for a parameter or buffer that is not there, as in torch: a layer without bias.
    # The clone is built around all names, and loses these; so its structure is not the ModuleDef's.
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


@shortened
def functional_call(
    module: Module,
    parameter_and_buffer_dicts: Mapping[str, object] | Sequence[Mapping[str, object]],
    args: object = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    rng: Randomness = None,
    method: str = "forward",
    mutable: bool = False,
    strict: bool = False,
    tie_weights: bool = True,
) -> Any:
    """Call a module with other arrays in place of its own, as a pure function.

    Args:
        module: it is never touched.
        parameter_and_buffer_dicts: a dict of dotted name -> array, or a tuple of such dicts. Of an
            `nn.LayerStack`, names of layers as `state_dict` has them are taken too.
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
    given = merged(parameter_and_buffer_dicts)
    plan = plan_of(module) if tie_weights else build_plan((module,), untie=True)
    moduledef = plan.moduledef
    leaves = list(plan.leaves())
    layers = layers_given(given, moduledef.names, lambda: module)
    if current_trace() is not EAGER:
        for stored in layers:
            if not stored.complete(leaves[stored.position]):
                plan.boxes[stored.position]._read_in_trace()
    given = joined(given, layers, leaves, "functional_call", moduledef.names if strict else ())
    positions = positions_of(moduledef, given, "functional_call")
    if current_trace() is not EAGER:
        # The module's own arrays that are used become constants of the trace; those replaced do not.
        given_positions = set(positions)
        for i, box in enumerate(plan.boxes):
            if i not in given_positions:
                box._read_in_trace()
    filled: dict[int, str] = {}
    for (name, value), i in zip(given.items(), positions, strict=True):
        value = checked(name, value, plan.boxes[i]._value, "functional_call")
        if i in filled and value is not leaves[i]:
            raise refusals.tied_apart(filled[i], name)
        leaves[i], filled[i] = value, name
    if strict:
        # Reversed, so that the first name of a tied parameter is the one that stays.
        named = {i: n for n, i in reversed(list(moduledef.names.items()))}
        missing = [n for i, n in named.items() if i not in filled]
        if missing:
            raise refusals.not_all_given(missing)
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
    return out, named_by_layer(_by_name(moduledef, after, ("buffer",)), layers)


def _by_name(moduledef: ModuleDef, leaves: Sequence[Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Return the leaves of some kinds under their first names, in the order of the names."""
    seen: set[int] = set()
    result = {}
    for name, i in moduledef.names.items():
        if i not in seen and moduledef.kind_of(i) in kinds:
            seen.add(i)
            result[name] = leaves[i]
    return result


@overload
def functionalize(
    module: Callee[..., R], *, mutable: Literal[False] = False
) -> tuple[PureFunction[R], dict[str, jax.Array]]: ...
@overload
def functionalize(
    module: Callee[..., R], *, mutable: Literal[True]
) -> tuple[
    PureFunction[tuple[R, dict[str, jax.Array]]], dict[str, jax.Array], dict[str, jax.Array]
]: ...
@overload
def functionalize(module: Module, *, mutable: bool = False, method: str = "forward") -> Any: ...
def functionalize(module: Any, *, mutable: bool = False, method: str = "forward") -> Any:
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
        raise refusals.no_method(type(module).__name__, method)
    plan = plan_of(module)
    moduledef, own = plan.moduledef, plan.given_out()
    fn = _pure_function(moduledef, own, method, mutable)
    params = _by_name(moduledef, own, ("trainable",))
    return (fn, params, _by_name(moduledef, own, ("buffer", "frozen"))) if mutable else (fn, params)


class PureFunction(functools.partial[R]):
    """A method of a module as a pure function; a copy of it, or one from a pickle, is built anew.

    Attributes:
        mutable: whether it takes and returns state.
        moduledef, training, in_mode: what makes `statefulize` the way back.
    """

    __name__: str
    mutable: bool
    moduledef: ModuleDef
    training: bool
    in_mode: Callable[[bool], Callable]
    _made_of: tuple[ModuleDef, list[Any], str, bool]

    def __repr__(self) -> str:
        return f"<pure function {self.__name__}>"

    def __copy__(self) -> Self:
        return self  # nothing in it changes

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        moduledef, own, method, mutable = self._made_of
        _require_importable(moduledef)
        # What every call is given, needs no numbers.
        given = ("trainable", "buffer", "frozen") if mutable else ("trainable",)
        leaves = [
            jax.ShapeDtypeStruct(v.shape, v.dtype) if moduledef.kind_of(i) in given else v
            for i, v in enumerate(own)
        ]
        return _rebuilt, (merge(moduledef, leaves), method, mutable)


def _require_importable(moduledef: ModuleDef) -> None:
    """Raise if a class of a module is not where a pickle will look for it; some picklers take it along."""
    if called_by("cloudpickle", "dill"):
        return
    for cls in dict.fromkeys(node.cls for node in moduledef.nodes):
        own = (
            cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
        )
        found: Any = sys.modules.get(cls.__module__)
        for name in cls.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is not cls and not own:
            raise refusals.not_importable(cls, moduledef.nodes[0].cls)


def _rebuilt(module: Module, method: str, mutable: bool) -> Callable:
    return functionalize(module, method=method, mutable=mutable)[0]


# One object each: it is part of what tells functions apart.
_PARAMETERS = {
    False: inspect.signature(lambda params, /, *inputs, rng=None, **kwargs: None),
    True: inspect.signature(lambda params, state, /, *inputs, rng=None, **kwargs: None),
}


def _as_method(function: Callable, method: Callable, mutable: bool) -> Callable:
    """Return a pure function that JAX's messages name as the method, with its own parameters."""
    told = shortened(function)
    told.__dict__.update(__wrapped__=method, __signature__=_PARAMETERS[mutable])
    return told


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

    def call(
        need: tuple, args: tuple, rng: Randomness, kwargs: dict
    ) -> tuple[PyTree, list[Any], list[Stored]]:
        given, layers = dict[str, Any](), list[Stored]()
        for noun, values, wanted in need:
            if not isinstance(values, Mapping):
                raise refusals.not_by_name(
                    type_name, noun, type(values).__name__, signature, hasattr(values, noun)
                )
            found = layers_given(values, moduledef.names, lambda: merge(moduledef, own))
            values = joined(values, found, own, f"the function of {type_name}", wanted)
            missing = [n for n in wanted if n not in values]
            if missing:
                raise refusals.not_given(type_name, noun, missing)
            given.update(values)
            layers += found
        leaves = list(own)
        positions = positions_of(moduledef, given, f"the function of {type_name}")
        for (name, value), i in zip(given.items(), positions, strict=True):
            leaves[i] = checked(name, value, own[i], f"the function of {type_name}")
        names = moduledef.names
        return *_pure_call(moduledef, leaves, names, args, kwargs, rng, method, writable), layers

    if mutable:

        def stateful(
            params: Mapping[str, Any],
            state: Mapping[str, Any],
            /,
            *inputs: PyTree,
            rng: Randomness = None,
            **kwargs: PyTree,
        ) -> tuple[PyTree, dict[str, Any]]:
            need = (("params", params, wanted_params), ("state", state, wanted_state))
            out, after, layers = call(need, inputs, rng, kwargs)
            return out, named_by_layer(_by_name(moduledef, after, ("buffer", "frozen")), layers)

        function: Callable = stateful
    else:

        def pure(
            params: Mapping[str, Any],
            /,
            *inputs: PyTree,
            rng: Randomness = None,
            **kwargs: PyTree,
        ) -> PyTree:
            return call((("params", params, wanted_params),), inputs, rng, kwargs)[0]

        function = pure

    def in_mode(training: bool) -> Callable:
        twin = merge(moduledef, own).train(training)
        return _pure_function(plan_of(twin).moduledef, own, method, mutable)

    fn = PureFunction(_as_method(function, getattr(moduledef.nodes[0].cls, method), mutable))
    fn._made_of = (moduledef, own, method, mutable)
    name, doc = f"{type_name}.{method}", f"{type_name}.{method} as a pure function {signature}."
    training = next(value for name, value, _ in moduledef.nodes[0].values if name == "training")
    facts = {"mutable": mutable, "moduledef": moduledef, "training": training, "in_mode": in_mode}
    fn.__dict__.update(facts, __name__=name, __qualname__=name, __doc__=doc)
    return fn


@shortened
def stack_module_state(
    models: Sequence[Module],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
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
            raise refusals.models_differ(number, differences(first, plan.moduledef))
    if current_trace() is not EAGER:
        for plan in plans:
            plan.note_read()
    stacked = [jnp.stack(values) for values in zip(*(p.leaves() for p in plans), strict=True)]
    return (
        _by_name(first, stacked, ("trainable", "frozen")),
        _by_name(first, stacked, ("buffer",)),
    )
