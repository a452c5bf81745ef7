"""What a run of a model's forward leaves in its attributes, and how these are put back.

Torch's modules may set flags, fill tables and note things in lists while they compute. A graph does none of
that. What is set once and stays is as after that call; what changes in each call is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from statefulnn.bridge.torch.errors import KeptTensorError
from statefulnn.bridge.torch.structures import CONSTANTS, rebuilt
from statefulnn.core.errors import explain

# Where the hooks of a module are while it is followed, when they are a part of its forward.
KEPT_HOOKS = "_hooks_of_statefulnn"
_CONTAINERS = (dict, list, set, OrderedDict, defaultdict, deque)
FORWARD_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
# What is replaced while a model is followed.
_FOLLOWED = ("training", "forward", *FORWARD_HOOKS)


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Say whether forward is more than the code of the class."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Snapshot:
    """The attributes of a model's modules, and what their containers hold, to be put back."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = [(m, dict(m.__dict__)) for m in model.modules()]
        held = [v for _, attributes in self.modules for v in attributes.values()]
        held += [
            cell for hooks in held if isinstance(hooks, dict) for cell in _cells(hooks.values())
        ]
        # Most are empty, such as the dicts of a module's hooks: these are noted without a copy, since the
        # copies of a small model would be as large as a tenth of its arrays.
        found = [c for c in held if type(c) in _CONTAINERS]
        self.empty = [c for c in found if not c]
        self.containers = [(c, copy.copy(c)) for c in found if c]

    def restore(self) -> None:
        for container in self.empty:
            container.clear()
        for container, before in self.containers:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(before)
        for module, attributes in self.modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)

    def changed(self) -> dict[Any, dict[str, Any]]:
        """Return the attributes that a run has set to another number, text or None, by module.

        Raises:
            KeptTensorError: for a tensor that was kept in an attribute.
        """
        found: dict[Any, dict[str, Any]] = {}
        for module, before in self.modules:
            for name, value in module.__dict__.items():
                if name in _FOLLOWED or name in _by_hooks(module) or value is before.get(name):
                    continue
                if isinstance(value, torch.Tensor):
                    raise kept(module, name)
                if type(value) in CONSTANTS and value != before.get(name):
                    found.setdefault(module, {})[name] = value
        if found:  # the hooks that came with it stay as well
            for module, _ in self.modules:
                if has_forward_hooks(module):
                    hooks = {name: copy.copy(module.__dict__[name]) for name in FORWARD_HOOKS}
                    found.setdefault(module, {}).update(hooks)
        return found


def _cells(hooks: Iterable[Any]) -> Iterator[Any]:
    """Yield what the functions among values refer to: a hook often notes something there."""
    for hook in hooks:
        code, known = getattr(hook, "__code__", None), getattr(hook, "__globals__", {})
        yield from (known[name] for name in getattr(code, "co_names", ()) if name in known)
        for cell in getattr(hook, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents


def _by_hooks(module: torch.nn.Module) -> set[str]:
    """Return the attributes that torch's hooks of old put before each forward: weight_norm's ``weight``."""
    hooks = [
        h for k in ("_forward_pre_hooks", KEPT_HOOKS) for h in module.__dict__.get(k, {}).values()
    ]
    own = [h for h in hooks if type(h).__module__.startswith("torch.nn.utils.")]
    return {getattr(h, "name", None) or getattr(h, "_tensor_name", "") for h in own}


def kept(module: torch.nn.Module, name: str) -> KeptTensorError:
    return KeptTensorError(
        explain(
            f"found that the forward of {type(module).__name__} changes self.{name}",
            "a graph of operations changes no attributes, and would always see the value of now",
            f"register_buffer({name!r}, tensor, persistent=False), or return it",
        )
    )


def tables_of_a_call(
    model: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], snapshot: Snapshot
) -> dict[str, torch.Tensor]:
    """Call a model as its user would, and return the tensors that it keeps from then on, by name.

    The attributes that the call set stay; parameters, numbers in buffers and the generator are as before.

    Raises:
        KeptTensorError: if one depends on the numbers in inputs, parameters, or buffers that a file has or a
            call writes to, so that it is state; or if one is part of a ``state_dict``, so that a file would
            be read and not used.
    """
    stored = {id(t) for t in model.state_dict(keep_vars=True).values()}
    # What no file has and no call writes to is as constant as the table: slopes of a bias, for example.
    constants = [b for b in model.buffers() if id(b) not in stored]
    while True:
        chosen = {id(b) for b in constants}
        with _put_back(model), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if id(tensor) not in chosen:
                    _write(tensor, _other_numbers(tensor))
            given = rebuilt((args, dict(kwargs)), _other_numbers)
            versions = [b._version for b in constants]
            other = _kept_by_a_call(model, *given)
            same = [b for b, v in zip(constants, versions, strict=True) if b._version == v]
        snapshot.restore()
        if len(same) == len(constants):
            break
        constants = same
    with _put_back(model), torch.no_grad():
        tables = _kept_by_a_call(model, args, kwargs)
    names = model.state_dict(keep_vars=True)
    for name, table in tables.items():
        path, _, attribute = name.rpartition(".")
        if name in names or not (name in other and torch.equal(table, other[name])):
            raise kept(model.get_submodule(path), attribute)
    return tables


@contextlib.contextmanager
def _put_back(model: torch.nn.Module) -> Iterator[None]:
    """Give parameters, buffers and the generator of torch the numbers they have now, afterwards."""
    numbers = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    random = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(random)
        with torch.no_grad():
            for tensor, was in numbers:
                _write(tensor, was)


def _write(tensor: torch.Tensor, numbers: torch.Tensor) -> None:
    # Nobody can write to what `expand` made: its elements share memory.
    with contextlib.suppress(RuntimeError):
        tensor.copy_(numbers)


def _kept_by_a_call(
    model: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    before = _tensors_of(model)
    model(*args, **kwargs)
    return {name: t for name, t in _tensors_of(model).items() if t is not before.get(name)}


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers, and the tensors in attributes, by name."""
    return {
        f"{path}.{name}".removeprefix("."): value
        for path, module in model.named_modules()
        for name, value in (*module._buffers.items(), *module.__dict__.items())
        if isinstance(value, torch.Tensor)
    }


def _other_numbers(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x * 0.5 + 0.25 if x.is_floating_point() else x.flip(tuple(range(x.ndim)))
