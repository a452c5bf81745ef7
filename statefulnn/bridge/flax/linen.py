"""Flax Linen: its modules as ours, and ours as its.

Names: the parameter ``variables["params"]["Dense_0"]["kernel"]`` is ``Dense_0.kernel``. The arrays of the
other collections are buffers beside the parameters, ``BatchNorm_0.mean``; a collection in which a name is
taken already gets its own name in front, ``cache.Dense_0.kernel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.errors
import jax
from flax import linen
from flax.core.meta import AxisMetadata

from statefulnn.bridge._model import (
    MODES,
    Mode,
    Model,
    as_module,
    flat,
    is_key,
    model_and_arrays,
    names_in_boxes,
    nested,
)
from statefulnn.core.errors import MissingRngError, StateWriteError, explain
from statefulnn.core.generator import as_key
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.transforms.functional_call import functionalize


class _Linen(Model):
    library = "Flax"

    def __init__(self, module: Any, method: Any, rngs: tuple[str, ...], mode: Any) -> None:
        self.module = module
        self.method = method
        self.rngs = rngs
        self.draws = bool(rngs)
        self.name = type(module).__name__
        # A mode that is a field of the module is changed by a copy of the module.
        fields = getattr(type(module), "__dataclass_fields__", {})
        set_fields = {n: getattr(module, n, None) for n in MODES if n in fields}
        set_fields = {n: value for n, value in set_fields.items() if value is not None}
        self.fields = tuple(n for n in set_fields if isinstance(set_fields[n], bool))
        called = getattr(module, method or "__call__") if not callable(method) else method
        self.mode = Mode(mode, called, tuple(set_fields), elsewhere=bool(self.fields))
        if mode != "auto":
            self.fields = ()
        elif self.fields:
            modes = {set_fields[n] is MODES[n] for n in self.fields}
            self.given, self.mixed = True in modes, len(modes) > 1

    def in_training(self, training: bool | None) -> linen.Module:
        if training is None or not self.fields:
            return self.module
        fields: dict[str, Any] = {n: MODES[n] is training for n in self.fields}
        return self.module.clone(**fields)

    def __call__(self, training, params, state, /, *inputs, rng=None, **kwargs):
        still = self.is_still(training)
        mode = self.given if training is None else training
        keys = {} if rng is None or still else self.keys(rng)
        try:
            out, written = self.in_training(training).apply(
                {"params": params, **state},
                *inputs,
                rngs=keys,
                method=self.method,
                mutable=[] if still else list(state),
                **self.mode.add(mode, inputs, kwargs),
            )
        except flax.errors.InvalidRngError as error:
            if still:
                raise self.still_training("drew random numbers", MissingRngError) from error
            if keys:
                raise self.without_stream(error) from error
            raise self.without_key(error) from error
        except flax.errors.ModifyScopeVariableError as error:
            if not still:
                raise
            raise self.still_training("changed its state", StateWriteError) from error
        return out, {**state, **_thawed(written)}

    def keys(self, rng: Any) -> dict[str, Any]:
        """Return a key for each stream: the key itself if there is one stream."""
        if len(self.rngs) == 1:
            return {self.rngs[0]: rng}
        return dict(zip(self.rngs, jax.random.split(rng, len(self.rngs)), strict=True))

    def without_stream(self, error: Exception) -> Exception:
        return MissingRngError(
            explain(
                f"{self.name} asked Flax for a random stream that it was not given: {error}",
                f"the module was made with rngs={self.rngs}",
                "name every stream: from_linen(..., rngs=('dropout', 'noise'))",
            )
        )


def from_linen(
    module: linen.Module,
    variables: object,
    *inputs: object,
    rngs: Sequence[str] = ("dropout",),
    mode: Any = "auto",
    method: Any = None,
    **kwargs: object,
) -> Module:
    """Return a Linen module with its variables as a module.

    ``train()`` and ``eval()`` set the argument ``train``, ``training``, ``is_training``,
    ``deterministic``, ``use_running_average`` or ``inference`` of its call, or the field of that name.
    Random streams come from the generator in force; ``model(x, rng=key)`` gives the key.

    Args:
        module: the Linen module, unbound.
        variables: what ``module.init`` returned; or a random key to call it with.
        inputs, kwargs: for a key, what the module is initialised with.
        rngs: the random streams it draws from. One stream gets the key itself, several get
            ``jax.random.split(key, len(rngs))``; ``()`` draws nothing.
        mode: how the module is told the mode: a function such as
            ``lambda training: {"train": training}``; or None for one that is the same in both.
        method: another method than ``__call__``.

    Returns:
        a Module: the collection ``params`` as parameters, the others as buffers, which calls update.

    Raises:
        RegistrationError: for variables that are no arrays.
        MissingRngError: in a call that draws without a key, or from a stream that is not in `rngs`.
        StateWriteError: in a call that changes state in evaluation mode, of a module for which no way was
            found to tell it the mode.

    Source: ``flax.linen.Module.apply``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> from flax import linen
        >>> dense = linen.Dense(3)
        >>> model = nn.bridge.flax.from_linen(dense, jax.random.key(0), jnp.ones((1, 2)))
        >>> [name for name, _ in model.named_parameters()]
        ['kernel', 'bias']
        >>> nn.grad(lambda m: m(jnp.ones((5, 2))).sum())(model)["bias"].tolist()
        [5.0, 5.0, 5.0]
    """
    did = "called nn.bridge.flax.from_linen"
    if not isinstance(module, linen.Module):
        raise TypeError(
            explain(
                f"{did} with an object of type {type(module).__name__}",
                "it takes a Linen module",
                "pass an instance of flax.linen.Module; for NNX there is from_nnx",
            )
        )
    model = _Linen.of(module, method, tuple(rngs), mode)
    if is_key(variables):
        asked = model.mode.add(False, inputs, kwargs)
        variables = model.in_training(False).init(
            as_key(variables), *inputs, method=method, **asked
        )
    elif inputs or kwargs or not isinstance(variables, Mapping):
        raise TypeError(
            explain(
                f"{did} with variables of type {type(variables).__name__}"
                + (" and inputs" if inputs or kwargs else ""),
                "it takes variables, or a key and the inputs to initialise them with",
                "from_linen(module, module.init(key, x)), or from_linen(module, key, x)",
            )
        )
    state = _thawed(variables)
    params = state.pop("params", {})
    name_of = _names({"params": params, **state})

    def named(path: tuple) -> str:
        return name_of[path]

    return as_module(model, params, state, named, did)


def linen_variables(module: Module) -> dict[str, Any]:
    """Return the variables of a module that `from_linen` made, as its Linen module takes them.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> from flax import linen
        >>> dense, x = linen.Dense(3), jnp.ones((1, 2))
        >>> model = nn.bridge.flax.from_linen(dense, jax.random.key(0), x)
        >>> bool((dense.apply(nn.bridge.flax.linen_variables(model), x) == model(x)).all())
        True
    """
    did = "called nn.bridge.flax.linen_variables"
    _, params, state = model_and_arrays(module, _Linen, did, "from_linen")
    return {"params": params, **state}


def _names(variables: Mapping[str, Any]) -> dict[tuple, str]:
    """Return the name of each array by its path: within "params", and for the others with the collection."""
    names: dict[tuple, str] = {}
    taken: set[str] = set()  # names, and every beginning of one
    for collection, tree in variables.items():
        # Where `linen.with_partitioning` wraps an array, the box leaves no trace in its name.
        found = names_in_boxes(tree, lambda x: isinstance(x, AxisMetadata))
        if any(n in taken for n in found.values()) or any(
            b in names.values() for b in _begun(found)
        ):
            found = {path: f"{collection}.{name}" for path, name in found.items()}
        taken |= {*found.values(), *_begun(found)}
        first = () if collection == "params" else (jax.tree_util.DictKey(collection),)
        names.update({(*first, *path): name for path, name in found.items()})
    return names


def _thawed(tree: object) -> Any:
    """Return plain dicts for FrozenDicts, their keys in order: ``flax.core.unfreeze`` would sort them."""
    if isinstance(tree, Mapping):
        return {key: _thawed(value) for key, value in tree.items()}
    return tree


def _begun(found: Mapping[tuple, str]) -> set[str]:
    return {n[:i] for n in found.values() for i, c in enumerate(n) if c == "."}


# --------------------------------------------------------------------------------------------------
# The way out


class _Source:
    """A module of ours as a pure function with its first arrays; compared by identity, as a field."""

    def __init__(self, module: Module, collection: str, stream: str) -> None:
        self.fn, params, state = functionalize(module, mutable=True)
        self.params, self.state = nested(params), nested(state)
        self.collection = collection
        self.stream = stream
        self.name = type(module).__name__

    def __deepcopy__(self, memo: dict) -> _Source:
        return self

    def __repr__(self) -> str:
        return self.name


class LinenModule(linen.Module):
    """A module of this package as a Linen module; made by `to_linen`."""

    source: Any

    @linen.compact
    def __call__(self, *inputs: Any, train: bool | None = None, **kwargs: Any) -> Any:
        """Call the module; `train` sets the mode, None leaves the one it was made in."""
        source = self.source
        params = {
            name: self.param(name, lambda key, value=value: value)
            for name, value in source.params.items()
        }
        state = {
            name: self.variable(source.collection, name, lambda value=value: value)
            for name, value in source.state.items()
        }
        fn = source.fn if train is None else source.fn.in_mode(train)
        drawing = self.has_rng(source.stream) or self.has_rng("params")
        rng = self.make_rng(source.stream) if drawing else None
        old = flat({name: variable.value for name, variable in state.items()})
        out, new = fn(flat(params), old, *inputs, rng=rng, **kwargs)
        changed = {n.partition(".")[0] for n, value in new.items() if value is not old[n]}
        if changed and not self.is_initializing():
            after = nested(new)
            for name in changed:
                state[name].value = after[name]
        return out


def to_linen(
    module: Module, *, collection: str = "batch_stats", rng: str = "dropout"
) -> LinenModule:
    """Return a module as a Linen module.

    Its ``init`` gives the module's own parameters and state, under nested dicts: ``fc1.weight`` is
    ``variables["params"]["fc1"]["weight"]``. Its ``apply`` runs the module, in the mode it has now, or with
    ``train=True`` or ``False`` in that one.

    Args:
        module: it is not touched, and later changes of it do not reach the Linen module.
        collection: where buffers and frozen parameters go; a call that changes them needs
            ``mutable=[collection]``.
        rng: the random stream that draws come from.

    Returns:
        a ``flax.linen.Module``, to be used alone or inside another.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> dense = nn.bridge.flax.to_linen(nn.Linear(2, 3))
        >>> variables = dense.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'bias': (3,), 'weight': (3, 2)}}
        >>> dense.apply(variables, jnp.ones((5, 2))).shape
        (5, 3)
    """
    require_module(module, "nn.bridge.flax.to_linen")
    return LinenModule(_Source(module, collection, rng))
