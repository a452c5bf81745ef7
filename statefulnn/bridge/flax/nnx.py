"""Flax NNX: its modules as ours, and ours as its.

Names: the Variable at ``module.layers[0].kernel`` is ``layers.0.kernel``. A Variable that the module has in
several places is one parameter, under the first of its names in alphabetical order, as NNX keeps it.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
from flax import nnx

from statefulnn.bridge._model import (
    Mode,
    Model,
    as_module,
    model_and_arrays,
    names_in_boxes,
)
from statefulnn.core.errors import (
    MissingRngError,
    RegistrationError,
    StateWriteError,
    StructureChangeError,
    explain,
)
from statefulnn.core.generator import next_key
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.transforms.functional_call import functionalize
from statefulnn.transforms.statefulize import kinds_of_state


def _is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)


@dataclasses.dataclass(frozen=True)
class _Streams:
    """The random streams of a module: how their states are put together, their shapes and dtypes."""

    treedef: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, state: Any) -> _Streams:
        leaves, treedef = jax.tree.flatten(state)
        return cls(treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))

    def seeded(self, rng: Any) -> Any:
        """Return the states of fresh streams that start at a key, None for any."""
        rng = jax.random.key(0) if rng is None else rng
        leaves, number = [], 0
        for shape, dtype in self.leaves:
            if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
                key = jax.random.fold_in(rng, number)
                leaves.append(jax.random.split(key, shape) if shape else key)
                number += 1
            else:
                leaves.append(jax.numpy.zeros(shape, dtype))  # how many keys a stream has given
        return self.treedef.unflatten(leaves)


class _NNX(Model):
    library = "NNX"

    def __init__(
        self, kind: type, graphdefs: tuple, streams: _Streams, params: Any, method: str, mode: Any
    ) -> None:
        self.name = kind.__name__
        self.method = method
        self.filters = (params, nnx.RngState, ...)
        given, training, evaluation = graphdefs
        self.graphdefs = {None: given, True: training, False: evaluation}
        same = {m: self.graphdefs[m] == given for m in (True, False)}
        self.given = not same[False] or same[True]
        self.mixed = not same[self.given]
        self.streams = streams
        self.draws = bool(streams.leaves)
        signature = inspect.signature(getattr(kind, method))
        own = list(signature.parameters.values())[1:]
        elsewhere = not (same[True] and same[False])
        self.mode = Mode(mode, signature.replace(parameters=own), elsewhere=elsewhere)

    def __call__(self, training, params, state, /, *inputs, rng=None, **kwargs):
        still = self.is_still(training)
        graphdef = self.graphdefs[training]
        streams = self.streams.seeded(None if still else rng)
        # The module is built around the Variables in these trees and writes them in place.
        before = [jax.tree.leaves(tree) for tree in (params, streams, state)]
        module = nnx.merge(graphdef, params, streams, state)
        mode = self.given if training is None else training
        kwargs = self.mode.add(mode, inputs, kwargs)
        out = getattr(module, self.method)(*inputs, **kwargs)
        nnx.pop(module, nnx.Intermediate)
        graphdef_after, *after = nnx.split(module, *self.filters)
        if graphdef_after != graphdef:
            raise StructureChangeError(
                explain(
                    f"{self.name} changed more than the values of its Variables in a call",
                    "only arrays come back from a pure function: a new Variable, or a Python attribute "
                    "that was set, would be lost",
                    "make the change before from_nnx, and keep what changes in a Variable",
                )
            )
        written, drew, changed = (
            any(a is not b for a, b in zip(old, jax.tree.leaves(new), strict=True))
            for old, new in zip(before, after, strict=True)
        )
        if written:
            raise StateWriteError(
                explain(
                    f"{self.name} changed a parameter in a call",
                    "a pure function gives back new state, but no new parameters",
                    "use nnx.Variable for it, or say what trains: from_nnx(module, params=nnx.LoRAParam)",
                )
            )
        if drew and still:
            raise self.still_training("drew random numbers", MissingRngError)
        if drew and rng is None:
            raise self.without_key("one of its nnx.Rngs advanced")
        if changed and still:
            raise self.still_training("changed its state", StateWriteError)
        return out, after[2]


def from_nnx(
    module: nnx.Module, *, params: Any = nnx.Param, method: str = "__call__", mode: Any = "auto"
) -> Module:
    """Return an NNX module as a module.

    ``train()`` and ``eval()`` are those of NNX, and set an argument such as ``train`` or ``deterministic``
    of its call where it has one. What its ``nnx.Rngs`` give comes from the generator in force: stream number
    i, counted from 0 in the order of ``nnx.split``, starts at ``jax.random.fold_in(key, i)``;
    ``model(x, rng=key)`` gives the key.

    Args:
        module: it is not touched; ``nnx_module`` gives a new one with the arrays of the result.
        params: a filter of NNX: which Variables become parameters.
        method: another method than ``__call__``.
        mode: how the call is told the mode, beside ``train()`` and ``eval()``: a function such as
            ``lambda training: {"train": training}``; or None for a module that is the same in both.

    Returns:
        a Module: the Variables of `params` as parameters, all others as buffers, which calls update.
        Intermediates that a call sows are dropped.

    Raises:
        MissingRngError: in a call that draws without a key.
        StructureChangeError: in a call that changes more than values.
        StateWriteError: in a call that changes a parameter; or that changes state in evaluation mode, of a
            module that ``eval()`` does not change.

    Source: ``flax.nnx.split``, ``flax.nnx.merge``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from flax import nnx
        >>> model = nn.bridge.flax.from_nnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> list(model.state_dict())
        ['bias', 'scale', 'mean', 'var']
        >>> before = model.mean
        >>> _ = nn.jit(model)(jnp.ones((5, 3)))
        >>> bool((model.mean > before).all())
        True
    """
    did = "called nn.bridge.flax.from_nnx"
    if not isinstance(module, nnx.Module):
        raise TypeError(
            explain(
                f"{did} with an object of type {type(module).__name__}",
                "it takes an NNX module",
                "pass an instance of flax.nnx.Module; for Linen there is from_linen",
            )
        )
    twin = nnx.clone(module)
    nnx.pop(twin, nnx.Intermediate)
    given, arrays, streams, state = nnx.split(twin, params, nnx.RngState, ...)
    twin.train()
    training = nnx.split(twin)[0]
    twin.eval()
    graphdefs = (given, training, nnx.split(twin)[0])
    model = _NNX.of(type(module), graphdefs, _Streams.of(streams), params, method, mode)
    name_of = {**names_in_boxes(arrays, _is_variable), **names_in_boxes(state, _is_variable)}
    return as_module(model, arrays, state, name_of.__getitem__, did)


def nnx_module(module: Module) -> nnx.Module:
    """Return an NNX module with the arrays of a module that `from_nnx` made, in the mode it has now.

    Its random streams start at a key from the generator in force.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from flax import nnx
        >>> model = nn.bridge.flax.from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> nn.bridge.flax.nnx_module(model)(jnp.ones((5, 2))).shape
        (5, 3)
    """
    did = "called nn.bridge.flax.nnx_module"
    model, params, state = model_and_arrays(module, _NNX, did, "from_nnx")
    (training,) = module._fn.args  # pyright: ignore[reportAttributeAccessIssue]
    streams = model.streams.seeded(next_key() if model.draws else None)
    return nnx.merge(model.graphdefs[training], params, streams, state)


# --------------------------------------------------------------------------------------------------
# The way out


class Frozen(nnx.Variable):
    """A frozen parameter of a module that `to_nnx` took."""


class _Source:
    """A module of ours as a pure function, with the names of its arrays; static, compared by identity."""

    def __init__(self, fn: Any, params: Any, state: Any) -> None:
        self.fn = fn
        self.params = tuple(params)
        self.state = tuple(state)

    def __deepcopy__(self, memo: dict) -> _Source:
        return self


class NNXNode(nnx.Module):
    """A submodule of an `NNXModule`: it holds Variables."""


class NNXModule(NNXNode):
    """A module of this package as an NNX module; made by `to_nnx`."""

    def __init__(self, module: Module, rngs: nnx.Rngs | None) -> None:
        fn, params, state = functionalize(module, mutable=True)
        self.source = _Source(fn, params, state)
        self.deterministic = not module.training
        self.rngs = rngs
        frozen, _ = kinds_of_state(fn.moduledef)
        for name, value in params.items():
            self._place(name, nnx.Param(value))
        for name, value in state.items():
            self._place(name, Frozen(value) if name in frozen else nnx.BatchStat(value))

    def _place(self, name: str, variable: nnx.Variable) -> None:
        node: Any = self
        *path, last = name.split(".")
        for part in path:
            if part not in vars(node):
                _check_free(node, part, name)
                setattr(node, part, NNXNode())
            node = getattr(node, part)
        _check_free(node, last, name)
        setattr(node, last, variable)

    def _find(self, name: str) -> nnx.Variable:
        node: Any = self
        for part in name.split("."):
            node = getattr(node, part)
        return node

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module; its state is written into the Variables."""
        fn = self.source.fn
        if fn.training is self.deterministic:
            fn = fn.in_mode(not self.deterministic)
        params = {n: self._find(n).get_value() for n in self.source.params}
        state = {n: self._find(n).get_value() for n in self.source.state}
        if self.rngs is not None and "rng" not in kwargs:
            kwargs["rng"] = self.rngs()
        out, new = fn(params, state, *inputs, **kwargs)
        for name, value in new.items():
            if value is not state[name]:
                self._find(name).set_value(value)
        return out


def _check_free(node: object, part: str, name: str) -> None:
    if hasattr(node, part):
        raise RegistrationError(
            explain(
                f"called nn.bridge.flax.to_nnx with a module that has an array {name!r}",
                f"an NNX module has an attribute {part!r} already",
                "rename it in the module",
            )
        )


def to_nnx(module: Module, *, rngs: nnx.Rngs | None = None) -> NNXModule:
    """Return a module as an NNX module.

    Its arrays are Variables under the module's names, ``model.fc1.weight`` (``getattr(model, "0").weight``
    for numbers): ``nnx.Param`` for trainable parameters, ``nnx.BatchStat`` for buffers. It has the module's
    mode, and NNX's ``train()`` and ``eval()`` switch it.

    Args:
        module: it is not touched, and later changes of it do not reach the NNX module.
        rngs: where random keys come from; without, a call that draws needs ``rng=key``.

    Raises:
        RegistrationError: for a name that every NNX module has already.

    Example:
        >>> import jax.numpy as jnp, optax, statefulnn as nn
        >>> from flax import nnx
        >>> model = nn.bridge.flax.to_nnx(nn.Linear(2, 3))
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        >>> loss, grads = nnx.value_and_grad(lambda m, x: m(x).sum())(model, jnp.ones((5, 2)))
        >>> _ = optimizer.update(model, grads)
        >>> grads.bias.get_value().tolist()
        [5.0, 5.0, 5.0]
    """
    require_module(module, "nn.bridge.flax.to_nnx")
    return NNXModule(module, rngs)
