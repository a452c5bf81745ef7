"""Equinox: its modules as ours, and ours as its. It needs the extra ``equinox``.

Names: the array at ``module.layers[0].weight`` is ``layers.0.weight``, and the state of a layer is named
after the attribute that holds its `StateIndex`. An array that is in two places of an Equinox module is two
parameters, as for Equinox itself; what ``eqx.nn.Shared`` shares is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from statefulnn.bridge._model import (
    Mode,
    Model,
    as_module,
    model_and_arrays,
    name_of_path,
)
from statefulnn.core.errors import MissingRngError, RegistrationError, explain
from statefulnn.core.extras import import_extra
from statefulnn.core.graph import require_module
from statefulnn.core.listing import listing
from statefulnn.core.module import Module
from statefulnn.transforms.functional_call import functionalize

__all__ = ["EquinoxModule", "equinox_module", "from_equinox", "to_equinox"]
__dir__ = listing(globals())

eqx = import_extra(
    "equinox", "equinox", "imported statefulnn.bridge.equinox", "defines the modules it takes"
)


def _is_index(x: object) -> bool:
    return isinstance(x, eqx.nn.StateIndex)


class _Equinox(Model):
    library = "Equinox"

    def __init__(
        self, static: Any, call: Callable, takes_state: bool, axis_name: str | None, mode: Any
    ) -> None:
        self.name = type(static).__name__
        self.call = call
        self.axis_name = axis_name
        # The module without arrays, as it was given and in each mode.
        modes = {m: eqx.nn.inference_mode(static, not m) for m in (True, False)}
        same = {m: bool(eqx.tree_equal(tree, static)) for m, tree in modes.items()}
        self.statics = {None: static, **modes}
        self.given = not same[False] or same[True]
        self.mixed = not same[self.given]
        parameters = inspect.signature(call).parameters
        self.draws = "key" in parameters
        self.takes_state = takes_state
        # `call` has the module before the inputs.
        own = [
            p for n, p in parameters.items() if n != "key" and not (n == "state" and takes_state)
        ]
        # What `inference_mode` sets is not said twice, nor under its older name.
        skip = ("inference", "deterministic") if hasattr(static, "inference") else ()
        elsewhere = not (same[True] and same[False])
        self.mode = Mode(mode, inspect.Signature(own[1:]), skip, elsewhere)

    def __call__(self, training, params, state, /, *inputs, rng=None, **kwargs):
        still = self.is_still(training)
        kwargs = self.mode.add(self.given if training is None else training, inputs, kwargs)
        module = eqx.combine(params, self.statics[training])
        before = jax.tree.leaves(state)  # Equinox lets nobody look at a state that was replaced
        named: dict[str, Any] = {}
        if self.takes_state:
            named["state"] = state
        if self.draws:
            named["key"] = kwargs.pop("key", None if still else rng)
        try:
            if self.axis_name is None:
                out, new = self.taken_apart(self.call(module, *inputs, **named, **kwargs))
            else:
                out, new = self.mapped(module, inputs, named, kwargs)
        except Exception as error:
            if named.get("key", error) is None and "key" in str(error):
                no_key = self.still_training("got no key", MissingRngError)
                error.add_note(str(no_key if still else self.without_key("it was given key=None")))
            raise
        if not self.takes_state:
            return out, state
        self.check_state(training, before, new)
        return out, new

    def taken_apart(self, result: Any) -> tuple[Any, Any]:
        """Return the output and the new state in what a call returned."""
        if not self.takes_state:
            return result, None
        if not isinstance(result, tuple) or not isinstance(result[-1], eqx.nn.State):
            raise TypeError(
                explain(
                    f"{self.name} was called with its state and returned {type(result).__name__}",
                    "the new state comes back last, or it would be lost",
                    "return out, state",
                )
            )
        *out, new = result
        return out[0] if len(out) == 1 else tuple(out), new

    def mapped(self, module: Any, inputs: tuple, named: dict, kwargs: dict) -> tuple[Any, Any]:
        """Call the module for each example of a batch."""
        size = jax.tree.leaves(inputs)[0].shape[0]
        key = named.get("key")
        keys = None if key is None else jax.random.split(key, size)

        def one(state: dict, key: object, *inputs: Any) -> Any:
            keyed = {"key": key} if self.draws else {}
            return self.taken_apart(self.call(module, *inputs, **state, **keyed, **kwargs))

        axes = (None, None if keys is None else 0, *(0 for _ in inputs))
        over = jax.vmap(one, axes, (0, None), axis_size=size, axis_name=self.axis_name)
        return over({n: v for n, v in named.items() if n == "state"}, keys, *inputs)


def from_equinox(
    module: object,
    state: object = None,
    *,
    axis_name: str | None = None,
    call: Callable | None = None,
    mode: Any = "auto",
) -> Module:
    """Return an Equinox module as a module.

    ``train()`` and ``eval()`` are ``eqx.nn.inference_mode``. The state is passed as ``state=`` and kept in
    buffers; a random key from the generator in force is passed as ``key=``, where the module takes one.

    Args:
        module: the Equinox module.
        state: its ``eqx.nn.State``, from ``eqx.nn.make_with_state``.
        axis_name: maps the module over the first axis of its inputs, an axis of this name, as
            ``eqx.nn.BatchNorm`` wants it; each example gets a key of ``jax.random.split``, and the keyword
            arguments as they are.
        call: a function ``call(module, *inputs)`` to be used instead of the module's own ``__call__``; if it
            has arguments ``state`` and ``key``, it gets them, and returns the new state last.
        mode: how the call is told the mode, beside ``inference_mode``: a function such as
            ``lambda training: {"train": training}``; or None for a module that is the same in both.

    Returns:
        a Module: arrays as parameters (integers frozen), everything else as it was.

    Raises:
        RegistrationError: for a module with state that was not passed.
        MissingRngError: in a call that draws without a key.
        StateWriteError: in a call that changes state in evaluation mode, of a module that
            ``inference_mode`` does not change.

    Source: ``equinox.partition``, ``equinox.combine``.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, statefulnn as nn
        >>> mlp = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
        >>> model = nn.bridge.equinox.from_equinox(mlp, axis_name="batch")
        >>> [name for name, _ in model.named_parameters()]
        ['layers.0.weight', 'layers.0.bias', 'layers.1.weight', 'layers.1.bias']
        >>> model(jnp.ones((5, 2))).shape
        (5, 1)
    """
    did = "called nn.bridge.equinox.from_equinox"
    if not isinstance(module, eqx.Module) or not (call or callable(module)):
        raise TypeError(
            explain(
                f"{did} with an object of type {type(module).__name__}",
                "it takes a module of Equinox that can be called",
                "pass an instance of eqx.Module with a __call__ (several go into eqx.nn.Sequential), or "
                "call=lambda module, x: module.encode(x)",
            )
        )
    indices = [i for i in jax.tree.leaves(module, is_leaf=_is_index) if _is_index(i)]
    if state is None and indices:
        raise RegistrationError(
            explain(
                f"{did} with {type(module).__name__}, but without its state",
                f"{len(indices)} of its layers keep a state, which Equinox holds apart",
                "model, state = eqx.nn.make_with_state(Model)(...); from_equinox(model, state)",
            )
        )
    call = call or type(module).__call__
    if state is not None and "state" not in inspect.signature(call).parameters:
        raise TypeError(
            explain(
                f"{did} with a state, but {type(module).__name__}.__call__ has no argument 'state'",
                "the state is passed under this name",
                "from_equinox(module, state, call=lambda module, x, state: module(x, state))",
            )
        )
    module = eqx.nn.delete_init_state(module)
    params, static = eqx.partition(module, eqx.is_array)
    model = _Equinox.of(static, call, state is not None, axis_name, mode)
    names = {} if state is None else _names_of_state(module, state)
    # One of ours has all its arrays in two dicts, of which nobody wants to see the names.
    ours = isinstance(module, EquinoxModule)

    def name_of(path: tuple) -> str:
        name = names.get(path) or name_of_path(path)
        return name.partition(".")[2] if ours else name

    return as_module(model, params, {} if state is None else state, name_of, did)


def _names_of_state(module: object, state: object) -> dict[tuple, str]:
    """Return the names of the arrays of a state by their path in it."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    # A state of numbers instead of arrays tells where the value of an index is.
    numbers = jax.tree.unflatten(jax.tree.structure(state), range(len(paths)))
    names = {}
    for at, index in jax.tree_util.tree_flatten_with_path(module, is_leaf=_is_index)[0]:
        if _is_index(index):
            value = numbers.get(index)
            for below, number in jax.tree_util.tree_flatten_with_path(value)[0]:
                names[paths[number]] = name_of_path((*at, *below))
    return names


def equinox_module(module: Module) -> Any:
    """Return the Equinox module in a module that `from_equinox` made, with its state if it has one.

    It has the arrays and the mode that the module has now.

    Example:
        >>> import equinox as eqx, jax, statefulnn as nn
        >>> model = nn.bridge.equinox.from_equinox(eqx.nn.Linear(2, 1, key=jax.random.key(0)))
        >>> nn.bridge.equinox.equinox_module(model)
        Linear(
          weight=f32[1,2], bias=f32[1], in_features=2, out_features=1, use_bias=True
        )
    """
    did = "called nn.bridge.equinox.equinox_module"
    model, params, state = model_and_arrays(module, _Equinox, did, "from_equinox")
    (training,) = module._fn.args  # pyright: ignore[reportAttributeAccessIssue]
    theirs = eqx.combine(params, model.statics[training])
    return (theirs, state) if model.takes_state else theirs


# --------------------------------------------------------------------------------------------------
# The way out


class EquinoxModule(eqx.Module):
    """A module of this package as an Equinox module; made by `to_equinox`.

    Attributes:
        params: the trainable parameters by dotted name.
        inference: whether it is in evaluation mode; ``eqx.nn.inference_mode`` sets it.
        index: where its state is, None without state.
    """

    params: dict[str, Any]
    inference: bool
    index: Any
    fn: Callable = eqx.field(static=True)

    def __init__(self, module: Module, mutable: bool) -> None:
        self.fn, self.params, *state = functionalize(module, mutable=mutable)
        self.inference = not module.training
        self.index = eqx.nn.StateIndex(state[0]) if mutable else None

    def __call__(
        self, *inputs: object, state: Any = None, key: jax.Array | None = None, **kwargs: object
    ) -> Any:
        """Call the module; one with state takes it as the last input and returns ``(out, state)``."""
        fn: Any = self.fn
        if fn.training is self.inference:
            fn = fn.in_mode(not self.inference)
        if self.index is None:
            return fn(self.params, *inputs, rng=key, **kwargs)
        if state is None:
            state, inputs = inputs[-1], inputs[:-1]
        out, new = fn(self.params, state.get(self.index), *inputs, rng=key, **kwargs)
        return out, state.set(self.index, new)


def to_equinox(module: Module, *, mutable: bool = False) -> Any:
    """Return a module as an Equinox module.

    It has the module's own arrays, in a dict by name, and takes whole batches as the module does. It is
    called with ``key=`` where it draws; ``eqx.nn.inference_mode`` switches it.

    Args:
        module: it is not touched, and later changes of it do not reach the Equinox module.
        mutable: whether there is state: buffers and frozen parameters. Without it they are constants, and
            a call that changes them raises.

    Returns:
        an ``eqx.Module``, ``model(*inputs, key=None) -> out``; with ``mutable=True`` a pair of it and its
        ``eqx.nn.State``, ``model(*inputs, state, key=None) -> (out, state)``.

    Example:
        >>> import equinox as eqx, jax.numpy as jnp, statefulnn as nn
        >>> linear = nn.bridge.equinox.to_equinox(nn.Linear(2, 3))
        >>> loss = lambda model, x: model(x).sum()
        >>> eqx.filter_jit(eqx.filter_grad(loss))(linear, jnp.ones((5, 2))).params["bias"].tolist()
        [5.0, 5.0, 5.0]
    """
    require_module(module, "nn.bridge.equinox.to_equinox")
    if not mutable:
        return EquinoxModule(module, False)
    return eqx.nn.make_with_state(EquinoxModule)(module, True)
