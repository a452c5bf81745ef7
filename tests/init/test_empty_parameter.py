"""Parameters before they have values: one way for all layers, which a copy of a layer's file can go too."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.precision import in_float64

MODULES = Path(nn.__file__).parent / "modules"


def test_it_is_a_parameter_of_zeros():
    p = nn.init.empty_parameter((2, 3))
    assert type(p) is nn.Parameter and p.requires_grad
    assert p.dtype == jnp.float32
    np.testing.assert_array_equal(p, np.zeros((2, 3)))
    p = nn.init.empty_parameter(4, jnp.bfloat16, requires_grad=False)
    assert (p.shape, p.dtype, p.requires_grad) == ((4,), jnp.bfloat16, False)
    with in_float64():
        assert nn.init.empty_parameter(2).dtype == jnp.float64


def test_it_minds_the_device_and_the_block_around():
    assert isinstance(nn.init.empty_parameter(3, device="meta").value, jax.ShapeDtypeStruct)
    with nn.device("meta"):
        inside = nn.init.empty_parameter((1 << 40,))
        wins = nn.init.empty_parameter(2, device="cpu")
    assert inside.shape == (1 << 40,)
    assert wins.tolist() == [0.0, 0.0]


# Each file that has no private import, with a layer of it.
COPIED = {
    "linear": lambda m: m.Linear(3, 2, bias=False),
    "normalization": lambda m: m.LayerNorm(3, bias=False),
    "rectifier": lambda m: m.PReLU(3),
    "rnn_cell": lambda m: m.GRUCell(3, 2, bias=False),
    "attention": lambda m: m.MultiheadAttention(4, 2, bias=False),
    "dropout": lambda m: m.Dropout(0.5),
}


@pytest.mark.parametrize("name", COPIED)
def test_a_file_of_layers_works_as_a_copy_in_somebody_s_project(name, tmp_path):
    source = (MODULES / f"{name}.py").read_text()
    assert not re.search(r"^from statefulnn\S*\._|^from statefulnn.* import _", source, re.M)
    copy = tmp_path / f"my_{name}.py"
    copy.write_text(source)
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nn.manual_seed(0)
    mine = COPIED[name](module)
    nn.manual_seed(0)
    ours = COPIED[name](nn)
    assert type(mine) is not type(ours)
    assert mine.state_dict().keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        np.testing.assert_array_equal(mine.state_dict()[key], value)


WITHOUT_BIAS = {
    "Linear": ((3, 2), {}),
    "Bilinear": ((3, 2, 4), {}),
    "Conv1d": ((3, 2, 1), {}),
    "Conv2d": ((3, 2, 1), {}),
    "ConvTranspose3d": ((3, 2, 1), {}),
    "BatchNorm2d": ((3,), {"affine": False}),
    "LayerNorm": ((3,), {}),
    "RMSNorm": ((3,), {"elementwise_affine": False}),
    "GroupNorm": ((1, 3), {"affine": False}),
    "InstanceNorm1d": ((3,), {}),
    "RNNCell": ((3, 2), {}),
    "LSTMCell": ((3, 2), {}),
    "LSTM": ((3, 2), {}),
    "MultiheadAttention": ((4, 2), {}),
    "TransformerEncoderLayer": ((4, 2), {}),
}


@pytest.mark.parametrize("layer", WITHOUT_BIAS)
def test_a_missing_bias_is_registered_as_none_wherever_torch_does_so(layer):
    args, kwargs = WITHOUT_BIAS[layer]
    kwargs = kwargs or ({} if layer == "InstanceNorm1d" else {"bias": False})
    ours, theirs = getattr(nn, layer)(*args, **kwargs), getattr(torch.nn, layer)(*args, **kwargs)

    def members(model):
        return {
            (path, name): None if p is None else tuple(p.shape)
            for path, m in model.named_modules()
            for name, p in m._parameters.items()
        }

    mine, wanted = members(ours), members(theirs)
    assert {k: v for k, v in mine.items() if v is not None or k in wanted} == wanted
    assert list(ours.state_dict()) == list(theirs.state_dict())
