"""state_dict and load_state_dict: torch's names, order, metadata and hooks.

The values are arrays. They are immutable, so a state dict is a snapshot and never follows the module.
Loading is all or nothing: what a failed load wrote is put back.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box, Parameter, as_array
from statefulnn.core.construction import DEFAULT_VERSION
from statefulnn.core.errors import StateDictError, explain
from statefulnn.core.placement import is_meta
from statefulnn.core.uninitialized import is_lazy

EXTRA_STATE = "_extra_state"


class IncompatibleKeys(NamedTuple):
    """What did not match in `load_state_dict`."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return (
            f"IncompatibleKeys(missing_keys={self.missing_keys}, "
            f"unexpected_keys={self.unexpected_keys})"
        )

    __str__ = __repr__


def state_dict(module: Any, destination: Any, prefix: str, keep_vars: bool) -> Any:
    """Collect the module's own entries, then its children's."""
    if destination is None:
        destination = OrderedDict()
        destination._metadata = OrderedDict()  # pyright: ignore[reportAttributeAccessIssue]
    metadata: dict[str, Any] = {"version": module._version}
    if module.init_version != DEFAULT_VERSION:
        metadata["init_version"] = module.init_version
    if hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]] = metadata
    for hook, _, _ in list(_hooks(module, "_state_dict_pre_hooks")):
        hook(module, prefix, keep_vars)
    module._save_to_state_dict(destination, prefix, keep_vars)
    for name, child in module._modules.items():
        if child is not None:
            child.state_dict(
                destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
            )
    for hook, post, _ in list(_hooks(module, "_state_dict_hooks")):
        result = hook(module, destination, prefix, metadata)
        if post and result is not None:
            raise RuntimeError("state_dict post-hook must return None")
        if not post and result is not None:
            destination = result
    return destination


def save_own(module: Any, destination: dict, prefix: str, keep_vars: bool) -> None:
    """Put the module's own parameters, persistent buffers and extra state into a dict."""
    for name, box in module._parameters.items():
        if box is not None:
            destination[prefix + name] = box if keep_vars or is_lazy(box) else box.value
    for name, box in module._buffers.items():
        if box is not None and name not in module._non_persistent_buffers_set:
            destination[prefix + name] = box if keep_vars or is_lazy(box) else box.value
    if _overrides(module, "get_extra_state"):
        destination[prefix + EXTRA_STATE] = module.get_extra_state()


def load_state_dict(module: Any, given: Any, strict: bool, assign: bool) -> IncompatibleKeys:
    """Load names into boxes, or raise and leave every box as it was."""
    if not isinstance(given, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(given)}.")
    metadata = getattr(given, "_metadata", None)
    state = OrderedDict(given)
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    before = [(box, type(box), box._value) for box in _boxes(module)]
    try:
        _load(module, state, "", metadata, assign, strict, missing, unexpected, errors)
        if strict:
            if unexpected:
                names = ", ".join(f'"{k}"' for k in unexpected)
                errors.insert(0, f"Unexpected key(s) in state_dict: {names}. ")
            if missing:
                names = ", ".join(f'"{k}"' for k in missing)
                errors.insert(0, f"Missing key(s) in state_dict: {names}. ")
        if errors:
            listed = "\n\t".join(errors)
            raise StateDictError(
                explain(
                    f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{listed}",
                    "names, shapes and kinds of dtype have to match; the module was left as it was",
                    "rename or reshape the entries, or pass strict=False to skip names that do not match",
                )
            )
    except BaseException:
        for box, cls, value in before:
            if box._value is not value:
                box.__class__ = cls
                Box.write(box, value)
        raise
    return IncompatibleKeys(missing, unexpected)


def _load(
    module: Any,
    state: dict,
    prefix: str,
    metadata: Any,
    assign: bool,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    local = {} if metadata is None else dict(metadata.get(prefix[:-1], {}))
    local["assign_to_params_buffers"] = assign
    module._load_from_state_dict(state, prefix, local, True, missing, unexpected, errors)
    for name, child in module._modules.items():
        if child is not None:
            inside = f"{prefix}{name}."
            below = OrderedDict((k, v) for k, v in state.items() if k.startswith(inside))
            _load(child, below, inside, metadata, assign, strict, missing, unexpected, errors)
    incompatible = IncompatibleKeys(missing, unexpected)
    for hook, _, _ in list(_hooks(module, "_load_state_dict_post_hooks")):
        if hook(module, incompatible) is not None:
            raise RuntimeError(
                "Hooks registered with ``register_load_state_dict_post_hook`` are not expected to "
                "return new values, if incompatible_keys need to be modified, it should be done "
                "inplace."
            )


def load_own(
    module: Any,
    state: dict,
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load the entries of one module; problems go into the three lists."""
    for hook, with_module, _ in list(_hooks(module, "_load_state_dict_pre_hooks")):
        arguments = (state, prefix, local_metadata, strict, missing, unexpected, errors)
        hook(*((module, *arguments) if with_module else arguments))
    assign = local_metadata.get("assign_to_params_buffers", False)
    own = {
        name: box
        for name, box in itertools.chain(module._parameters.items(), module._buffers.items())
        if box is not None and name not in module._non_persistent_buffers_set
    }
    for name, box in own.items():
        key = prefix + name
        if key in state:
            problem = _put(box, key, state[key], assign)
            if problem:
                errors.append(problem)
        elif strict:
            missing.append(key)

    extra = prefix + EXTRA_STATE
    if _overrides(module, "set_extra_state"):
        if extra in state:
            module.set_extra_state(state[extra])
        elif strict:
            missing.append(extra)
    elif strict and extra in state:
        unexpected.append(extra)

    if strict:
        for key in state:
            if key.startswith(prefix) and key != extra:
                head, _, rest = key[len(prefix) :].partition(".")
                if (rest and head not in module._modules) or (not rest and head not in own):
                    unexpected.append(key)
                elif rest and module._modules[head] is None:
                    unexpected.append(key)


def _put(box: Any, key: str, value: Any, assign: bool) -> str | None:
    """Write one entry into its box; return what is wrong with it, None if nothing is."""
    if is_lazy(value):
        return None if is_lazy(box) else f'"{key}" has no shape in the checkpoint, and has one here'
    if isinstance(value, Box):
        value = value.value
    arrays: Any = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    if not isinstance(value, arrays):
        return (
            f'While copying the parameter named "{key}", expected a jax or numpy array but received '
            f"{type(value)}"
        )
    if is_meta(value) and not (assign or is_meta(box._value)):
        return f'"{key}" is on the meta device in the checkpoint, which has no data to copy'
    if is_lazy(box):
        box.materialize(value.shape)
    have = box._value
    if tuple(value.shape) == (1,) and have.shape == ():
        value = value.reshape(())  # torch before 0.4 had no scalars
    if tuple(value.shape) != tuple(have.shape):
        return (
            f"size mismatch for {key}: copying a param with shape {tuple(value.shape)} from "
            f"checkpoint, the shape in current model is {tuple(have.shape)}."
        )
    if _dtype_kind(value.dtype) != _dtype_kind(have.dtype):
        return (
            f"dtype mismatch for {key}: copying an array of dtype {value.dtype} from checkpoint, the "
            f"dtype in current model is {have.dtype}."
        )
    if not assign and not is_meta(value):
        value = value.astype(have.dtype)
    new = as_array(value)
    if not assign:
        sharding = getattr(have, "sharding", None)
        if sharding is not None and getattr(have, "committed", False):
            new = jax.device_put(new, sharding)
    if isinstance(box, Parameter):
        box.data = new
    else:
        box.write(new)
    return None


def _dtype_kind(dtype: Any) -> str:
    for kind, parent in (
        ("bool", jnp.bool_),
        ("integer", jnp.integer),
        ("floating", jnp.floating),
        ("complex", jnp.complexfloating),
    ):
        if jnp.issubdtype(dtype, parent):
            return kind
    return str(dtype)


def _boxes(module: Any) -> list[Box]:
    return [
        box
        for m in module.modules()
        for box in (*m._parameters.values(), *m._buffers.values())
        if box is not None
    ]


def _hooks(module: Any, name: str) -> Any:
    return module.__dict__.get(name, {}).values()


def _overrides(module: Any, method: str) -> bool:
    # The base class raises in both, so a subclass that defines one has its own code.
    for cls in type(module).__mro__:
        if method in cls.__dict__:
            return cls.__module__ != "statefulnn.core.module"
    return False
