"""Nothing of torch.nn is forgotten: every public name has an implementation or a reason, every layer and
function has rows in tests/parity/rows, and signatures agree argument for argument.
"""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

import pytest
import torch

import statefulnn as nn
from tests.parity.table import FUNCTIONS, LAYERS

# --------------------------------------------------------------------------------------------------
# Names

NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "nn": {
        "DataParallel": "jax.sharding: shard the batch, and jit splits the work",
        "Container": "deprecated in torch; Module is the same",
        "quantized": "quantisation is not the subject of this package",
        "quantizable": "quantisation is not the subject of this package",
        "qat": "quantisation is not the subject of this package",
        "intrinsic": "quantisation is not the subject of this package",
        "factory_kwargs": "a helper of torch's own constructors, not documented",
        "common_types": "type aliases",
    },
    "nn.functional": {
        "scaled_mm": "an entry point of fp8 kernels; XLA chooses these by dtype",
        "scaled_grouped_mm": "an entry point of fp8 kernels; XLA chooses these by dtype",
        "assert_int_or_pair": "a helper of torch's own code",
        "boolean_dispatch": "a helper of torch's own code",
        "handle_torch_function": "the dispatch of torch.Tensor subclasses",
        "has_torch_function": "the dispatch of torch.Tensor subclasses",
        "has_torch_function_unary": "the dispatch of torch.Tensor subclasses",
        "has_torch_function_variadic": "the dispatch of torch.Tensor subclasses",
        "Callable": "imported there",
        "Optional": "imported there",
        "TYPE_CHECKING": "imported there",
        "DType": "imported there",
        "BroadcastingList1": "imported there",
        "BroadcastingList2": "imported there",
        "BroadcastingList3": "imported there",
        "Tensor": "imported there",
        "GRID_SAMPLE_INTERPOLATION_MODES": "a table of torch's own code",
        "GRID_SAMPLE_PADDING_MODES": "a table of torch's own code",
        "reproducibility_notes": "text of torch's documentation",
        "tf32_notes": "text of torch's documentation",
        "sparse_support_notes": "text of torch's documentation",
        "ScalingType": "an option of the fp8 entry points",
        "SwizzleType": "an option of the fp8 entry points",
    },
    "nn.init": {},
    "nn.parameter": {
        "UninitializedTensorMixin": "a base class of torch's Tensor subclasses",
    },
    "nn.utils": {},
    "nn.utils.rnn": {},
    "nn.utils.parametrize": {},
    "nn.utils.parametrizations": {},
    "nn.utils.prune": {},
    "nn.utils.stateless": {},
    "nn.attention": {
        "WARN_FOR_UNFUSED_KERNELS": "XLA fuses; there is no choice of kernels to warn of",
        "activate_flash_attention_impl": "a registry of CUDA kernels",
        "current_flash_attention_impl": "a registry of CUDA kernels",
        "list_flash_attention_impls": "a registry of CUDA kernels",
        "register_flash_attention_impl": "a registry of CUDA kernels",
        "restore_flash_attention_impl": "a registry of CUDA kernels",
    },
    "nn.attention.bias": {},
    "nn.attention.flex_attention": {
        "FlexKernelOptions": "options of CUDA kernels",
    },
}


def public(path: str) -> list[str]:
    """Return the names a user of torch finds in a namespace."""
    module = importlib.import_module(f"torch.{path}")
    listed = getattr(module, "__all__", None)
    if path == "nn.functional" or listed is None:
        listed = [n for n in dir(module) if not n.startswith("_")]
    names = []
    for name in listed:
        value = getattr(module, name, None)
        if isinstance(value, types.ModuleType):
            if path != "nn" or not value.__name__.startswith("torch.nn"):
                continue
        elif path.startswith("nn.utils") or path in ("nn.init", "nn.parameter"):
            home = getattr(value, "__module__", "torch.nn")
            if not str(home).startswith("torch.nn"):
                continue
        if name != "annotations":
            names.append(name)
    if path == "nn":
        names += [n for n in dir(module) if inspect.isclass(getattr(module, n)) and n[0] != "_"]
    return sorted(set(names))


def ours(path: str) -> Any:
    """Return our namespace of that path."""
    found: Any = nn
    for part in path.split(".")[1:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", NOT_APPLICABLE)
def test_every_public_name_is_here_or_has_a_reason(path: str) -> None:
    names = public(path)
    assert len(names) > 0
    here = set(dir(ours(path)))
    missing = [n for n in names if n not in here and n not in NOT_APPLICABLE[path]]
    assert missing == []


@pytest.mark.parametrize("path", NOT_APPLICABLE)
def test_reasons_are_for_names_that_exist_and_are_missing(path: str) -> None:
    module = importlib.import_module(f"torch.{path}")
    here = set(dir(ours(path)))
    stale = [n for n in NOT_APPLICABLE[path] if n in here or not hasattr(module, n)]
    assert stale == []


def test_every_layer_is_a_name_of_the_package() -> None:
    for name in nn.modules.__all__:
        assert getattr(nn, name) is getattr(nn.modules, name)


def test_submodules_of_layers_do_not_leak_into_the_package() -> None:
    for name in ("conv", "linear", "batchnorm", "containers", "sparse"):
        assert not hasattr(nn, name)
    assert nn.utils.__name__ == "statefulnn.utils"
    assert nn.attention.__name__ == "statefulnn.attention"


# --------------------------------------------------------------------------------------------------
# Rows

LAYER_CLASSES = [
    n
    for n in dir(torch.nn)
    if inspect.isclass(getattr(torch.nn, n))
    and issubclass(getattr(torch.nn, n), torch.nn.Module)
    and n in nn.__all__
]
TESTED_ELSEWHERE = {
    "Module": "tests/core",
    "Sequential": "tests/core/test_containers.py",
    "ModuleList": "tests/core/test_containers.py",
    "ModuleDict": "tests/core/test_containers.py",
    "ParameterList": "tests/core/test_containers.py",
    "ParameterDict": "tests/core/test_containers.py",
    "TransformerEncoder": "tests/parity/test_transformer.py: it takes a layer",
    "TransformerDecoder": "tests/parity/test_transformer.py: it takes a layer",
    "RNNBase": "a base class",
    "RNNCellBase": "a base class",
    **{n: "tests/core/test_lazy.py" for n in LAYER_CLASSES if n.startswith("Lazy")},
}


def test_every_layer_has_rows() -> None:
    covered = {case.layer for case in LAYERS} | set(TESTED_ELSEWHERE)
    assert [n for n in LAYER_CLASSES if n not in covered] == []


FUNCTION_NAMES = [
    n
    for n in public("nn.functional")
    if n in nn.functional.__all__ and n not in NOT_APPLICABLE["nn.functional"]
]


FUNCTIONS_TESTED_ELSEWHERE = {
    "gumbel_softmax": "tests/parity/test_activation.py, by its distribution",
    "upsample": "tests/parity/test_upsampling.py, with its warning",
    "upsample_nearest": "tests/parity/test_upsampling.py, with its warning",
    "upsample_bilinear": "tests/parity/test_upsampling.py, with its warning",
}


def test_every_function_has_rows() -> None:
    covered = {call.name for call in FUNCTIONS} | set(FUNCTIONS_TESTED_ELSEWHERE)
    # A layer's rows run its function: nn.Conv3d is F.conv3d.
    source = {case.layer for case in LAYERS}
    code = "".join(inspect.getsource(getattr(nn, layer)) for layer in source if layer in nn.__all__)
    for layer in source:
        for base in getattr(nn, layer).__mro__:
            if base.__module__.startswith("statefulnn.modules"):
                code += inspect.getsource(base)
    without = [n for n in FUNCTION_NAMES if n not in covered and f"F.{n}(" not in code]
    assert without == []


# --------------------------------------------------------------------------------------------------
# Signatures

ACCEPTED = {  # arguments of ours that torch does not have, by name
    "rng",
    "axis_name",
    "batch_first",
}


def arguments(function: Any) -> list[tuple[str, Any]]:
    """Return (name, default) of every argument."""
    found = []
    for p in inspect.signature(function).parameters.values():
        if p.name in ("self", "args", "kwargs") or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        default = p.default
        if default is inspect.Parameter.empty or callable(default):
            default = "required or a function"
        found.append((p.name, default))
    return found


def agree(mine: Any, theirs: Any) -> None:
    wanted = arguments(theirs)
    got = [(n, d) for n, d in arguments(mine) if n not in ACCEPTED or n in dict(wanted)]
    assert got == wanted


# Torch's constructors take (*args, **kwargs) there and hand them on.
HANDED_ON = {"RNN": "RNNBase", "LSTM": "RNNBase", "GRU": "RNNBase"}
# Arguments that torch reads from a string at the place of the first, or that only its own code passes.
LEFT_OUT = {"RNN": {"mode", "proj_size"}, "LSTM": {"mode"}, "GRU": {"mode", "proj_size"}}


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_constructor_takes_torchs_arguments(name: str) -> None:
    theirs = getattr(torch.nn, HANDED_ON.get(name, name))
    left_out = LEFT_OUT.get(name, set())
    wanted = [a for a in arguments(theirs.__init__) if a[0] not in left_out]
    extra = (ACCEPTED | left_out) - {n for n, _ in wanted}
    got = [a for a in arguments(getattr(nn, name).__init__) if a[0] not in extra]
    if name == "RNN":
        got = [a for a in got if a[0] != "nonlinearity"]  # torch reads it from **kwargs
    assert got == wanted


# What a forward takes beside torch's arguments, after them.
OF_OURS = {name: ["lengths"] for name in ("RNN", "LSTM", "GRU")}


# torch's own have no forward at all.
@pytest.mark.parametrize("name", [n for n in LAYER_CLASSES if n not in ("Module", "RNNBase")])
def test_forward_takes_torchs_arguments(name: str) -> None:
    mine, theirs = getattr(nn, name).forward, getattr(torch.nn, name).forward
    wanted = [n for n, _ in arguments(theirs)] + OF_OURS.get(name, [])
    assert [n for n, _ in arguments(mine)] == wanted


# Builtins without a signature, from their documentation.
BUILTIN = {
    "conv_tbc": "input weight bias pad",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale enable_gqa",
    "logsigmoid": "input",
}


@pytest.mark.parametrize("name", FUNCTION_NAMES)
def test_function_takes_torchs_arguments(name: str) -> None:
    theirs = getattr(torch.nn.functional, name)
    private = getattr(torch.nn.functional, f"_{name}", None)
    try:
        if not arguments(theirs) and private is not None:
            theirs = private  # a choice between two functions by return_indices
        wanted = [n for n, _ in arguments(theirs)]
    except ValueError:
        if name in BUILTIN:
            wanted = BUILTIN[name].split()
        else:
            lines = [line for line in theirs.__doc__.splitlines() if line.startswith(f"{name}(")]
            inside = lines[0].partition("(")[2].partition(" ->")[0].rstrip(") ")
            wanted = [part.split("=")[0].strip() for part in inside.split(",")]
            wanted = [n for n in wanted if n not in ("*", "out")]
        assert [
            n for n, _ in arguments(getattr(nn.functional, name)) if n not in ACCEPTED
        ] == wanted
        return
    agree(getattr(nn.functional, name), theirs)


@pytest.mark.parametrize("name", [n for n in public("nn.init") if n.endswith("_")])
def test_initialiser_takes_torchs_arguments(name: str) -> None:
    agree(getattr(nn.init, name), getattr(torch.nn.init, name))
