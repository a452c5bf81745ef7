"""Layers that are in torch.nn and here under one name: each built from the attributes of the other.

A layer's constructor is the description of what it is made of: each of its arguments is an attribute of the
finished layer, under the same name. `_EXCEPTIONS` lists those that are not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

import statefulnn.functional as F
import statefulnn.modules as modules
from statefulnn.bridge.torch.attributes import has_forward_hooks
from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.core.errors import explain
from statefulnn.core.module import Module

CONTAINERS = ("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict")
# Abstract, or made of a Python function.
_NO_LAYERS = {"Module", "Lambda", "RNNBase", "RNNCellBase", "LinearCrossEntropyOptions"}
_PLAIN = (bool, int, float, str, tuple)
# What says where and how a layer is built, and not what it is.
_NOT_OF_THE_LAYER = {
    "device", "dtype", "_weight", "_freeze", "size_average", "reduce", "axis_name",
    "min_value", "max_value",
}  # fmt: skip
_ACTIVATIONS: dict[Callable, Callable] = {
    torch.nn.functional.relu: F.relu,
    torch.relu: F.relu,
    torch.nn.functional.gelu: F.gelu,
}


def _has(name: str) -> Callable[[Any], bool]:
    return lambda m: getattr(m, name) is not None


def _activation(m: Any) -> Any:
    if isinstance(m.activation, (torch.nn.Module, Module)):
        return type(m.activation).__name__.lower()
    return {v: k for k, v in _ACTIVATIONS.items()}.get(m.activation, _ACTIVATIONS.get(m.activation))


_TRANSFORMER_LAYER: dict[str, Callable[[Any], Any]] = {
    "d_model": lambda m: m.self_attn.embed_dim,
    "nhead": lambda m: m.self_attn.num_heads,
    "dim_feedforward": lambda m: m.linear1.out_features,
    "dropout": lambda m: m.dropout.p,
    "activation": _activation,
    "layer_norm_eps": lambda m: m.norm1.eps,
    "batch_first": lambda m: m.self_attn.batch_first,
    "bias": lambda m: m.linear1.bias is not None,
}
_EXCEPTIONS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "AdaptiveLogSoftmaxWithLoss": {"cutoffs": lambda m: list(m.cutoffs[:-1])},
    "MultiheadAttention": {"bias": _has("in_proj_bias"), "add_bias_kv": _has("bias_k")},
    "PairwiseDistance": {"p": lambda m: m.norm},
    "TransformerEncoderLayer": _TRANSFORMER_LAYER,
    "TransformerDecoderLayer": _TRANSFORMER_LAYER,
    "LinearCrossEntropyLoss": {
        "in_features": lambda m: m.linear.in_features,
        "bias": lambda m: m.linear.bias is not None,
    },
}


@functools.cache
def names() -> frozenset[str]:
    """Return the names of the layers that both libraries have."""
    found = set()
    for name in dir(modules):
        ours, theirs = getattr(modules, name), getattr(torch.nn, name, None)
        if name not in _NO_LAYERS and inspect.isclass(ours) and inspect.isclass(theirs):
            if issubclass(ours, Module) and issubclass(theirs, torch.nn.Module):
                found.add(name)
    return frozenset(found)


def name_of(module: Any, library: Any) -> str | None:
    """Return the name of a layer of the library, or None for a module of another class, or changed."""
    name = type(module).__name__
    if type(module) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "Linear"
    if name not in names() or type(module) is not getattr(library, name):
        return None
    changed = "forward" in module.__dict__ or library is torch.nn and has_forward_hooks(module)
    return None if changed else name


def arguments(module: Any, name: str, array: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the arguments of the constructor that make a layer like `module`.

    Args:
        module: a layer of either library.
        name: of its class.
        array: converts an array of this library into one of the other.

    Raises:
        ConversionError: for a function, which is code on the arrays of one library.
    """
    exceptions = _EXCEPTIONS.get(name, {})
    found = {}
    for parameter in inspect.signature(getattr(modules, name).__init__).parameters.values():
        key = parameter.name
        if key in exceptions:
            value = exceptions[key](module)
        elif key == "self" or key in _NOT_OF_THE_LAYER or parameter.kind.name.startswith("VAR"):
            continue
        elif key in module._parameters:  # bias=True
            value = module._parameters[key] is not None
        else:
            value = getattr(module, key)
            if module._buffers.get(key) is not None:
                value = array(value)
        if key == "activation" and value is None or key == "distance_function":
            value = _function(module, key)
        found[key] = value
    return found


def _function(module: Any, key: str) -> None:
    value = getattr(module, key)
    if value is None or isinstance(value, (torch.nn.PairwiseDistance, modules.PairwiseDistance)):
        return None
    raise ConversionError(
        explain(
            f"converted a {type(module).__name__} with {key}={getattr(value, '__name__', value)!r}",
            "it is a function of one library's arrays",
            "build the layer with a function of the other library, and load its state_dict",
        )
    )


def build(module: Any, name: str, library: Any, array: Callable[[Any], Any]) -> Any:
    """Return a layer of `library` like `module`, without its numbers and with children to be replaced.

    Args:
        module: a layer of the other library.
        name: of its class.
        library: ``torch.nn`` or our modules.
        array: converts an array of the other library.
    """
    target = getattr(library, name)
    if name in CONTAINERS:
        return target()
    if name in ("TransformerEncoder", "TransformerDecoder"):
        norm = None if module.norm is None else library.Identity()
        switched_off = {"enable_nested_tensor": False} if name == "TransformerEncoder" else {}
        layer = target(library.Identity(), 0, norm=norm, **switched_off)
        layer.num_layers = module.num_layers
    elif name == "Transformer":
        layer = target(
            d_model=module.d_model,
            nhead=module.nhead,
            custom_encoder=library.Identity(),
            custom_decoder=library.Identity(),
            batch_first=module.batch_first,
        )
    else:
        layer = target(**arguments(module, name, array))
    for key, value in module.__dict__.items():  # changed after the layer was made
        known = layer.__dict__.get(key, value)
        if not key.startswith("_") and type(value) in _PLAIN and type(known) in _PLAIN:
            if known != value:
                setattr(layer, key, value)
    return layer


def count(module: Any, layer: Any) -> None:
    """Tell a list or dict of parameters what is in it, and take over what is no array."""
    if type(module).__name__ == "ParameterList":
        layer._size = module._size
        keys = [str(i) for i in range(module._size)]
    else:
        keys = list(module._keys)
        layer._keys = dict.fromkeys(keys)
    for key in keys:
        value = getattr(module, key)
        if key not in module._parameters and key not in module._buffers:
            setattr(layer, key, value)
