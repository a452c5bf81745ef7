"""to_torch: a tree of our layers as one of torch's."""

from __future__ import annotations

from typing import Any

import torch

import statefulnn.modules as ours
from statefulnn.bridge.torch import layers
from statefulnn.bridge.torch.arrays import to_tensor
from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.placement import is_meta

_COUNTER = "num_batches_tracked"


def to_torch(module: Module) -> torch.nn.Module:
    """Return a tree of layers as one of torch's, with the same names, values, ties and modes.

    Args:
        module: made of the layers and containers of this package; it is not changed.

    Raises:
        ConversionError: for a module of another class, and for hooks, by name.

    Source: ``torch.nn``.

    Example:
        >>> theirs = nn.bridge.torch.to_torch(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        >>> theirs
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): ReLU()
        )
    """
    if not isinstance(module, Module):
        raise TypeError(
            explain(
                f"called to_torch with an object of type {type(module).__name__}",
                "it converts a module of this package",
                "pass the module; torch.from_numpy(np.asarray(array)) takes an array",
            )
        )
    for name, member in module.named_modules():
        where = f"{name!r} ({member._get_name()})" if name else member._get_name()
        if layers.name_of(member, ours) is None:
            raise ConversionError(
                explain(
                    f"converted {where} to torch",
                    "its class has a forward of its own, which is code on JAX's arrays",
                    "write the class in torch, and take the values: nn.save(module, path), then "
                    "safetensors.torch.load_file(path) and load_state_dict",
                )
            )
        if member._hooked or member.__dict__.get("_state_dict_hooks"):
            raise ConversionError(
                explain(
                    f"converted {where} to torch, which has a hook",
                    "a hook is code on JAX's arrays",
                    "remove it, and register one on the converted module",
                )
            )
        for key, box in [*member._parameters.items(), *member._buffers.items()]:
            if box is not None and is_meta(box._value):
                raise ConversionError(
                    explain(
                        f"converted {where} to torch, whose {key!r} is on the meta device",
                        "it has a shape and no numbers",
                        "nn.materialize(module) first",
                    )
                )
    return _Tree().convert(module)


class _Tree:
    """Builds torch's modules, each once."""

    def __init__(self) -> None:
        self.modules: dict[int, Any] = {}
        self.tensors: dict[int, Any] = {}

    def convert(self, module: Any) -> Any:
        if id(module) in self.modules:
            return self.modules[id(module)]
        name = layers.name_of(module, ours)
        assert name is not None
        with torch.device("meta"):
            theirs = layers.build(module, name, torch.nn, to_tensor)
        self.modules[id(module)] = theirs
        for key, box in module._parameters.items():
            if box is not None or key in theirs._parameters or not hasattr(theirs, key):
                theirs.register_parameter(key, self.tensor(box, key, parameter=True))
        for key, box in module._buffers.items():
            persistent = key not in module._non_persistent_buffers_set
            tensor = self.tensor(box, key, parameter=False)
            theirs._buffers.pop(key, None)
            theirs.register_buffer(key, tensor, persistent=persistent)
        for key, child in module._modules.items():
            theirs._modules[key] = None if child is None else self.convert(child)
        if name in ("ParameterList", "ParameterDict"):
            layers.count(module, theirs)
        theirs.training = module.training
        return theirs

    def tensor(self, box: Any, key: str, parameter: bool) -> Any:
        if box is None:
            return None
        if id(box) not in self.tensors:
            tensor = to_tensor(box.value)
            if key == _COUNTER:  # 64 bits in torch, whatever JAX has
                tensor = tensor.to(torch.int64)
            if parameter:
                tensor = torch.nn.Parameter(tensor, requires_grad=box.requires_grad)
            self.tensors[id(box)] = tensor
        return self.tensors[id(box)]
