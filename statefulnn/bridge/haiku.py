"""Haiku: its transformed functions as modules, and our modules as its. It needs the extra ``haiku``.

Names: the parameter ``params["mlp/~/linear_0"]["w"]`` is ``mlp.~.linear_0.w``, a dot for each slash, and
``params["~"]["scale"]``, which belongs to no module, is ``scale``. Haiku's module names have no dots, so what
is before the last dot is the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax

from statefulnn.bridge._model import (
    Mode,
    Model,
    as_module,
    is_key,
    model_and_arrays,
    name_of_path,
)
from statefulnn.core.errors import MissingRngError, explain
from statefulnn.core.extras import import_extra
from statefulnn.core.generator import as_key
from statefulnn.core.graph import require_module
from statefulnn.core.listing import listing
from statefulnn.core.module import Module
from statefulnn.transforms.functional_call import functionalize

__all__ = ["from_haiku", "haiku_arrays", "to_haiku"]
__dir__ = listing(globals())

hk = import_extra(
    "haiku", "dm-haiku", "imported statefulnn.bridge.haiku", "made the functions it takes"
)

_ROOT = "~"  # where Haiku keeps what belongs to no module


class _Haiku(Model):
    library = "Haiku"

    def __init__(self, transformed: Any, mode: Any) -> None:
        self.transformed = transformed
        self.stateful = isinstance(transformed, hk.TransformedWithState)
        self.name = "the transformed function"
        signature = inspect.signature(transformed.apply)
        _, *arguments = signature.parameters.values()
        if self.stateful:
            _, *arguments = arguments
        self.draws = bool(arguments) and arguments[0].name == "rng"
        own = arguments[1:] if self.draws else arguments
        self.mode = Mode(mode, signature.replace(parameters=own))

    def __call__(self, training, params, state, /, *inputs, rng=None, **kwargs):
        still = self.is_still(training)
        given = (params, state) if self.stateful else (params,)
        if self.draws:
            given = (*given, None if still else rng)
        kwargs = self.mode.add(training is not False, inputs, kwargs)
        try:
            result = self.transformed.apply(*given, *inputs, **kwargs)
        except ValueError as error:
            if type(error).__name__ != "MissingRNGError":
                raise
            if still:
                raise self.still_training("drew random numbers", MissingRngError) from error
            raise self.without_key(error) from error
        if not self.stateful:
            return result, state
        out, new = result
        self.check_state(training, jax.tree.leaves(state), new)
        return out, new


def from_haiku(
    transformed: Any,
    params: object,
    *inputs: object,
    state: object = None,
    mode: Any = "auto",
    **kwargs: object,
) -> Module:
    """Return a transformed function of Haiku with its arrays as a module.

    ``train()`` and ``eval()`` set the function's argument ``is_training``, ``training``, ``train``,
    ``deterministic``, ``inference`` or ``use_running_average``. Random keys come from the generator in force;
    ``model(x, rng=key)`` gives one.

    Args:
        transformed: what ``hk.transform`` or ``hk.transform_with_state`` returned, or
            ``hk.without_apply_rng`` of it.
        params: what ``transformed.init`` returned; or a random key to call it with.
        inputs, kwargs: for a key, what the function is initialised with.
        state: the state that ``init`` of a function with state returned.
        mode: how the function is told the mode: a function such as
            ``lambda training: {"is_training": training}``; or None for one that is the same in both.

    Returns:
        a Module: Haiku's parameters as parameters, its state as buffers, which calls update.

    Raises:
        RegistrationError: for arrays that are none.
        MissingRngError: in a call that draws without a key.
        StateWriteError: in a call that changes state in evaluation mode, of a function for which no way was
            found to tell it the mode.

    Source: ``haiku.transform_with_state``.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, statefulnn as nn
        >>> mlp = hk.transform(lambda x: hk.nets.MLP([4, 2])(x))
        >>> model = nn.bridge.haiku.from_haiku(mlp, jax.random.key(0), jnp.ones((1, 3)))
        >>> [name for name, _ in model.named_parameters()]
        ['mlp.~.linear_0.w', 'mlp.~.linear_0.b', 'mlp.~.linear_1.w', 'mlp.~.linear_1.b']
    """
    did = "called nn.bridge.haiku.from_haiku"
    if not isinstance(transformed, hk.Transformed | hk.TransformedWithState):
        several = isinstance(transformed, hk.MultiTransformed | hk.MultiTransformedWithState)
        raise TypeError(
            explain(
                f"{did} with an object of type {type(transformed).__name__}",
                "a module has one function" if several else "it takes a pair of init and apply",
                "pass one of them: hk.Transformed(f.init, f.apply.encode)"
                if several
                else "transform it first: hk.transform(f), or hk.transform_with_state(f)",
            )
        )
    model = _Haiku.of(transformed, mode)
    if is_key(params):
        # As Haiku's own examples do, and without effect on the values: in training mode.
        found = transformed.init(as_key(params), *inputs, **model.mode.add(True, inputs, kwargs))
        params, state = found if model.stateful else (found, None)
    elif inputs or kwargs or not isinstance(params, Mapping):
        raise TypeError(
            explain(
                f"{did} with params of type {type(params).__name__}"
                + (" and inputs" if inputs or kwargs else ""),
                "it takes parameters, or a key and the inputs to initialise them with",
                "from_haiku(f, params, state=state), or from_haiku(f, key, x)",
            )
        )
    if model.stateful != (state is not None):
        raise TypeError(
            explain(
                f"{did} {'without' if model.stateful else 'with'} state",
                f"a {type(transformed).__name__} {'has' if model.stateful else 'has no'} state",
                "params, state = f.init(key, x); from_haiku(f, params, state=state)"
                if model.stateful
                else "hk.transform_with_state(f) for a function with state",
            )
        )
    return as_module(model, params, state or {}, _name, did)


def _name(path: tuple) -> str:
    module = path[0].key
    parts = [] if module == _ROOT else module.split("/")
    return name_of_path((*map(jax.tree_util.DictKey, parts), *path[1:]))


def haiku_arrays(module: Module) -> Any:
    """Return the parameters of a module that `from_haiku` made, or parameters and state, as Haiku has them.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, statefulnn as nn
        >>> f, x = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(x))), jnp.ones((1, 3))
        >>> model = nn.bridge.haiku.from_haiku(f, jax.random.key(0), x)
        >>> bool((f.apply(nn.bridge.haiku.haiku_arrays(model), x) == model(x)).all())
        True
    """
    did = "called nn.bridge.haiku.haiku_arrays"
    model, params, state = model_and_arrays(module, _Haiku, did, "from_haiku")
    return (params, state) if model.stateful else params


# --------------------------------------------------------------------------------------------------
# The way out


def to_haiku(module: Module, *, mutable: bool = False) -> Any:
    """Return a module as a pair of Haiku's functions, ``init`` and ``apply``.

    ``init`` gives the module's own arrays, whatever the key: ``encoder.fc1.weight`` is
    ``params["encoder/fc1"]["weight"]``, and what belongs to the module itself is under ``"~"``. ``apply``
    runs the module in the mode it has now, or in the one that ``is_training=`` says.

    Args:
        module: it is not touched, and later changes of it do not reach the functions.
        mutable: whether there is state: buffers and frozen parameters, which ``apply`` takes and returns.
            Without it they are constants, and a call that changes them raises.

    Returns:
        ``hk.Transformed``: ``init(rng, *inputs) -> params``, ``apply(params, rng, *inputs) -> out``; with
        ``mutable=True`` ``hk.TransformedWithState``: ``init(rng, *inputs) -> (params, state)``,
        ``apply(params, state, rng, *inputs) -> (out, state)``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> f = nn.bridge.haiku.to_haiku(nn.Sequential(nn.Linear(3, 2)))
        >>> params = f.init(None, jnp.ones((1, 3)))
        >>> jax.tree.map(jnp.shape, params)
        {'0': {'bias': (2,), 'weight': (2, 3)}}
        >>> f.apply(params, None, jnp.ones((5, 3))).shape
        (5, 2)
    """
    require_module(module, "nn.bridge.haiku.to_haiku")
    fn, *arrays = functionalize(module, mutable=mutable)
    first = [_by_module(a) for a in arrays]

    def in_mode(is_training: bool | None) -> Any:
        return fn if is_training is None else fn.in_mode(is_training)

    def init(rng, *inputs, **kwargs):
        return tuple(first) if mutable else first[0]

    def apply(params, rng, *inputs, is_training=None, **kwargs):
        return in_mode(is_training)(_by_name(params), *inputs, rng=rng, **kwargs)

    def apply_with_state(params, state, rng, *inputs, is_training=None, **kwargs):
        arrays = _by_name(params), _by_name(state)
        out, new = in_mode(is_training)(*arrays, *inputs, rng=rng, **kwargs)
        return out, _by_module(new)

    # Haiku's functions of transformed functions, such as without_apply_rng, ask for what was transformed.
    init.__dict__["_original_fn"] = fn
    if mutable:
        return hk.TransformedWithState(init, apply_with_state)
    return hk.Transformed(init, apply)


def _by_module(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        path, _, last = name.rpartition(".")
        modules.setdefault(path.replace(".", "/") or _ROOT, {})[last] = array
    return modules


def _by_name(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name if path == _ROOT else f"{path.replace('/', '.')}.{name}": array
        for path, arrays in modules.items()
        for name, array in arrays.items()
    }
