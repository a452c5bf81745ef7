"""Objects with tensors among the inputs, such as a cache of keys and values: state of the converted module.

A forward changes such an object, and the next call finds it changed. A graph of operations changes buffers.
So the tensors of the object become buffers of a module that has the name of the argument, and while the
forward is followed they are put into a copy of the object.

Terms
  place    where a value is in an object: ``layers.0.keys``
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from statefulnn.bridge.torch.attributes import Snapshot
from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.bridge.torch.structures import CONSTANTS, is_record, rebuilt
from statefulnn.bridge.torch.tracing import SYMBOLIC
from statefulnn.core.errors import explain


@contextlib.contextmanager
def held(
    module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple, dict[str, Any], bool]]:
    """Let a module own the objects among its inputs as buffers, inside.

    Yields:
        the inputs without these objects, and whether there were any.

    Raises:
        ConversionError: for an object whose tensors grow, or that counts in numbers of Python.
    """
    if not any(is_object(x) for x in (*args, *kwargs.values())):
        yield args, dict(kwargs), False
        return
    signature = inspect.signature(module.forward)
    first = next((i for i, x in enumerate(args) if is_object(x)), len(args))
    named = list(signature.parameters)[first : len(args)]
    given = {**dict(zip(named, args[first:], strict=True)), **kwargs}
    objects = {name: x for name, x in given.items() if is_object(x)}
    empty = _begun(module, args[:first], given, objects)
    states = {name: _State(name, x) for name, x in empty.items()}
    forward = _with_states(module.forward, signature, states)
    before = dict(module._modules), module.__dict__.get("forward")
    try:
        for name, state in states.items():
            module.add_module(_free_name(module, name), state.owner)
        module.__dict__["forward"] = forward
        yield args[:first], {name: x for name, x in given.items() if name not in objects}, True
    finally:
        module._modules.clear()
        module._modules.update(before[0])
        del module.__dict__["forward"]
        if before[1] is not None:
            module.__dict__["forward"] = before[1]


def is_object(value: Any) -> bool:
    """Say whether a value is an object with attributes among which there are tensors."""
    plain = (torch.Tensor, torch.nn.Module, Mapping, tuple, list, type, *CONSTANTS)
    if isinstance(value, plain) or is_record(value) or not hasattr(value, "__dict__"):
        return False
    return _is_cache(value) or any(isinstance(x, torch.Tensor) for x in _values(value).values())


def _is_cache(value: Any) -> bool:
    """Say whether an object is a cache of transformers, which has no tensors before the first call."""
    return hasattr(value, "get_seq_length")


def _free_name(module: torch.nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


# --------------------------------------------------------------------------------------------------
# What is in an object


def _members(value: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Yield what an object or container holds, by name, and how another value is put there."""
    if isinstance(value, (dict, list)):
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, member in items:
            yield str(key), member, functools.partial(value.__setitem__, key)
    elif isinstance(value, tuple):
        for i, member in enumerate(value):
            yield str(i), member, functools.partial(_fixed, i)
    else:
        for key, member in list(vars(value).items()):
            yield key, member, functools.partial(setattr, value, key)


def _fixed(place: int, _: Any) -> None:
    raise TypeError(f"a tuple has the tensor at {place}")


def _walk(value: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Yield tensors and constants in an object by their places, and how another is put there."""
    seen: set[int] = set()

    def below(value: Any, place: str) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, member, put in _members(value):
            where = f"{place}.{name}" if place else name
            if isinstance(member, (torch.Tensor, *SYMBOLIC)) or type(member) in CONSTANTS:
                yield where, member, put
            elif isinstance(member, (dict, list, tuple)) or _is_inner(member):
                yield from below(member, where)

    return below(value, "")


def _is_inner(value: Any) -> bool:
    """Say whether a value is an object whose attributes belong to the object that refers to it."""
    is_torchs = type(value).__module__.partition(".")[0] == "torch"
    return hasattr(value, "__dict__") and not (is_torchs or callable(value))


def _values(value: Any) -> dict[str, Any]:
    return {place: member for place, member, _ in _walk(value)}


def _tensors(value: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in _values(value).items() if isinstance(v, torch.Tensor)}


def _copied(value: Any) -> Any:
    """Return a copy with tensors of its own, also where these are results of something."""
    return copy.deepcopy(value, {id(x): x.detach().clone() for x in _tensors(value).values()})


# --------------------------------------------------------------------------------------------------
# The state


def _begun(
    module: torch.nn.Module, args: tuple, given: Mapping[str, Any], objects: Mapping[str, Any]
) -> dict[str, Any]:
    """Return copies of objects that have all their tensors: some make them in the first call.

    Raises:
        ConversionError: for those that do not keep them.
    """
    begun = {name: _copied(x) for name, x in objects.items()}
    snapshot, buffers = Snapshot(module), [(b, b.clone()) for b in module.buffers()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as when it is traced
            module(*args, **{**given, **begun})
            for buffer, before in buffers:
                buffer.copy_(before)
    finally:
        snapshot.restore()
    for name, theirs in objects.items():
        before, after = _tensors(theirs), _tensors(begun[name])
        _check_shapes(name, theirs, before, after)
        if before.keys() == after.keys():
            begun[name] = _copied(theirs)
            continue
        if not hasattr(begun[name], "reset"):
            raise _made_later(name, theirs, after.keys() - before.keys())
        with torch.no_grad():
            begun[name].reset()
        if lost := after.keys() - _tensors(begun[name]).keys():
            raise _made_later(name, theirs, lost)
    return begun


class _Owner(torch.nn.Module):
    """The module whose buffers are the tensors of an object; it is never called."""


class _State:
    """An object among the inputs, and the buffers that stand for its tensors.

    Args:
        name: of the argument.
        value: a copy of the object, which is written to.
    """

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        self.constants = {k: v for k, v in _values(value).items() if type(v) in CONSTANTS}
        self.owner = _owner(value)
        self.buffers: dict[str, tuple[torch.nn.Module, str]] = {}
        for place, tensor in _tensors(value).items():
            *path, key = place.split(".")
            owner: torch.nn.Module = self.owner
            holder = value
            for part in path:
                holder = next(member for name, member, _ in _members(holder) if name == part)
                if part not in owner._modules:
                    owner.add_module(part, _owner(holder))
                owner = owner.get_submodule(part)
            owner.register_buffer(key, tensor, persistent=False)
            self.buffers[place] = owner, key

    def put(self) -> Any:
        """Return the object with the buffers in it."""
        for place, _, put in list(_walk(self.value)):
            if place in self.buffers:
                owner, key = self.buffers[place]
                put(owner._buffers[key])
        return self.value

    def take(self) -> None:
        """Write the tensors that the object has now to the buffers.

        Raises:
            ConversionError: if it has others than before, or other numbers of Python.
        """
        now = _values(self.value)
        tensors = {k: v for k, v in now.items() if isinstance(v, torch.Tensor)}
        before = {place: owner._buffers[key] for place, (owner, key) in self.buffers.items()}
        _check_shapes(self.name, self.value, before, tensors)  # type: ignore
        for place, value in now.items():
            if place not in tensors and self.constants.get(place, now) != value:
                raise _counts(self.name, self.value, place, self.constants.get(place), value)
        for place, tensor in tensors.items():
            if tensor is not before[place]:
                before[place].copy_(tensor)  # type: ignore


def _owner(value: Any) -> torch.nn.Module:
    """Return a module for what an object or container holds, with the name of its class."""
    if isinstance(value, list) and not any(isinstance(x, torch.Tensor) for x in value):
        return torch.nn.ModuleList()
    return type(type(value).__name__, (_Owner,), {})()


def _with_states(
    forward: Callable, signature: inspect.Signature, states: Mapping[str, _State]
) -> Callable:
    """Return a forward that takes its objects from `states`, and returns None for them."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        objects = {name: state.put() for name, state in states.items()}
        out = forward(*args, **kwargs, **objects)
        for state in states.values():
            state.take()
        return rebuilt(out, lambda x: None if any(x is o for o in objects.values()) else x)

    parameters, past = [], False
    for p in signature.parameters.values():
        past = past or p.name in states
        if p.name not in states:
            positional = p.kind is p.POSITIONAL_OR_KEYWORD
            parameters.append(p.replace(kind=p.KEYWORD_ONLY) if past and positional else p)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore
    return call


# --------------------------------------------------------------------------------------------------
# What cannot be state


def _check_shapes(
    name: str, value: Any, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> None:
    for place, tensor in before.items():
        new = after.get(place)
        if new is None or (new.shape, new.dtype) != (tensor.shape, tensor.dtype):
            is_now = "is gone" if new is None else f"is {_spec(new)} after it"
            raise _refused(
                name,
                value,
                f"its tensor {place} was {_spec(tensor)} before a call and {is_now}, and the shapes of what "
                "a compiled function keeps are fixed",
            )


def _spec(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


def _counts(name: str, value: Any, place: str, before: Any, after: Any) -> ConversionError:
    return _refused(
        name,
        value,
        f"its {place} is {before!r} before a call and {after} after it: a number of Python, "
        "which a graph of operations has as it was when it was traced",
    )


def _made_later(name: str, value: Any, places: Any) -> ConversionError:
    shown = ", ".join(sorted(places)[:3]) + (" and more" if len(places) > 3 else "")
    return _refused(
        name,
        value,
        f"it makes tensors while it is called ({shown}), and has none after a reset()",
    )


def _refused(name: str, value: Any, why: str) -> ConversionError:
    if type(value).__name__ == "StaticCache":  # of a model with sliding windows
        instead = (
            f"layers that keep all tokens: {name}=transformers.Cache(layers=[transformers.StaticLayer(64) "
            "for _ in range(config.num_hidden_layers)])"
        )
    elif _is_cache(value):
        instead = (
            f"a cache of fixed size, {name}=transformers.StaticCache(config=config, max_cache_len=64); or "
            "one that the model was called with before, if its arrays do not grow; or use_cache=False"
        )
    else:
        instead = "give it tensors of fixed shapes before the conversion, and count in tensors"
    return ConversionError(
        explain(f"converted with {name}, an object of type {type(value).__name__}", why, instead)
    )
