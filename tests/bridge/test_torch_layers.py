"""Layers from torch and to torch: the rows of the parity tests, and trees with ties, modes and oddities."""

from __future__ import annotations

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, from_torch, to_torch
from tests.parity.oracle import TOLERANCE, Case, close, flat, to_jax
from tests.parity.oracle import to_torch as tensors_of
from tests.parity.table import LAYERS, ONE_OF_EACH, TORCH_WARNS
from tests.precision import in_float64

pytestmark = TORCH_WARNS

# What holds a function, which is code on one library's arrays.
OF_FUNCTIONS = {"TripletMarginWithDistanceLoss"}
# One of each kind of constructor in the short run.
QUICK = set(
    "Linear Conv2d ConvTranspose1d BatchNorm2d LayerNorm GroupNorm PReLU Hardtanh Embedding "
    "MultiheadAttention LSTM GRUCell MaxPool2d Upsample CrossEntropyLoss BCEWithLogitsLoss Dropout "
    "TransformerEncoderLayer Transformer AdaptiveLogSoftmaxWithLoss Unflatten ZeroPad2d Fold "
    "PairwiseDistance InstanceNorm2d LinearCrossEntropyLoss FractionalMaxPool2d".split()
)
FIRST = {id(c) for c in ONE_OF_EACH if c.layer in QUICK}
ROWS = [
    pytest.param(c, id=str(c), marks=() if id(c) in FIRST else (pytest.mark.long,))
    for c in LAYERS
    if c.layer not in OF_FUNCTIONS and "PairwiseDistance" not in str(c.kwargs)
]


def built(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = {k: tensors_of(v) for k, v in case.kwargs.items()}
    return getattr(torch.nn, case.layer)(*case.args, **kwargs).eval()


def output(module, case: Case, convert) -> list:
    call = {k: convert(v) for k, v in case.call.items()}
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in map(convert, case.inputs)]
    with torch.no_grad():
        return flat(module(*inputs, **call))


@pytest.mark.parametrize("case", ROWS)
def test_a_layer_goes_there_and_back(case: Case) -> None:
    theirs = built(case)
    wanted = output(theirs, case, tensors_of)
    ours = from_torch(theirs)
    assert type(ours) is getattr(nn, case.layer)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(output(ours, case, to_jax), wanted, strict=True):
        close(a, b, "output", TOLERANCE["float32"] * case.tolerance)
    back = to_torch(ours)
    # torch names a private subclass of Linear inside attention.
    assert repr(back) == repr(theirs).replace("NonDynamicallyQuantizableLinear", "Linear")
    for name, value in theirs.state_dict().items():
        assert back.state_dict()[name].dtype == value.dtype
    for a, b in zip(output(back, case, tensors_of), wanted, strict=True):
        close(a, b, "output of the way back", TOLERANCE["float32"])


def tree() -> torch.nn.Sequential:
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4),
        torch.nn.ModuleDict({"a": shared, "b": shared}),
        torch.nn.BatchNorm1d(4),
        torch.nn.ParameterList([torch.nn.Parameter(torch.randn(2)), torch.randn(3)]),
        torch.nn.ParameterDict({"x": torch.nn.Parameter(torch.randn(2))}),
        torch.nn.ModuleList([torch.nn.Dropout(0.3)]),
    )
    model[1]["a"].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[2].eval()
    return model


def described(model) -> list:
    modes = [(n, m.training) for n, m in model.named_modules()]
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    return [modes, flags, list(model.state_dict())]


def test_ties_shared_modules_modes_and_flags_survive_both_ways():
    theirs = tree()
    ours = from_torch(theirs)
    assert described(ours) == described(theirs)
    assert ours[0].weight is ours[1]["a"].weight
    assert ours[1]["a"] is ours[1]["b"]
    back = to_torch(ours)
    assert described(back) == described(theirs)
    assert back[0].weight is back[1]["b"].weight and back[1]["a"] is back[1]["b"]
    assert back[2].num_batches_tracked.dtype == torch.int64
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_dtypes_are_kept(dtype):
    theirs = torch.nn.Linear(3, 2).to(getattr(torch, dtype))
    ours = from_torch(theirs)
    assert str(ours.weight.dtype) == dtype
    assert torch.equal(to_torch(ours).weight, theirs.weight)


def test_64_bits_need_the_switch_and_large_counters_too():
    with pytest.raises(nn.DtypeError, match="jax_enable_x64"):
        from_torch(torch.nn.Linear(3, 2).double())
    with in_float64():
        assert from_torch(torch.nn.Linear(3, 2).double()).weight.dtype == jnp.float64
    layer = torch.nn.BatchNorm1d(2)
    layer.num_batches_tracked += 2**40
    with pytest.raises(nn.DtypeError, match="num_batches_tracked"):
        from_torch(layer)


def test_a_copy_does_not_follow_the_tensor():
    theirs = torch.nn.Linear(512, 512)
    ours = from_torch(theirs)
    before = np.array(ours.weight)
    with torch.no_grad():
        theirs.weight.zero_()
    np.testing.assert_array_equal(ours.weight, before)


def test_without_copy_the_values_are_the_same():
    theirs = torch.nn.Linear(512, 512)
    ours = from_torch(theirs, copy=False)
    np.testing.assert_array_equal(ours.weight, theirs.weight.detach().numpy())


def test_attributes_changed_after_the_constructor_are_kept():
    theirs = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.BatchNorm2d(3))
    theirs[0].p, theirs[1].momentum, theirs[1].eps = 0.7, 0.3, 0.01
    ours = from_torch(theirs)
    assert (ours[0].p, ours[1].momentum, ours[1].eps) == (0.7, 0.3, 0.01)


def _sparse(model):
    model.register_buffer("s", torch.eye(2).to_sparse())


def _meta(model):
    model.to("meta")


def _foreign(model):
    model[0].extra = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (_sparse, "'s'.*layout torch.sparse"),
        (_meta, "'0.weight'.*meta device"),
        (_foreign, "'0'.*extra"),
        (lambda m: m.append(torch.nn.LazyLinear(3)), "'1'.*lazy"),
    ],
    ids=["sparse", "meta", "a child of a layer", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_oddities_are_refused_by_name(change, message):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    change(model)
    with pytest.raises(ConversionError, match="(?s)" + message) as error:
        from_torch(model)
    assert "Why: " in str(error.value) and "Instead: " in str(error.value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_a_function_in_a_layer_and_a_script_are_refused():
    loss = torch.nn.TripletMarginWithDistanceLoss(distance_function=torch.dist)
    with pytest.raises(ConversionError, match="distance_function='dist'"):
        from_torch(loss)
    ours = from_torch(torch.nn.TripletMarginWithDistanceLoss())
    assert isinstance(ours.distance_function, nn.PairwiseDistance)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        from_torch(nn.Linear(2, 2))


def test_to_torch_refuses_other_classes_and_hooks_and_names_them():
    class Own(nn.Module):
        def forward(self, x):
            return x

    model = nn.Sequential(nn.Linear(2, 2), Own())
    with pytest.raises(ConversionError, match=r"'1' \(Own\)") as error:
        to_torch(model)
    assert "nn.save" in str(error.value)
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ConversionError, match="hook"):
        to_torch(layer)
    with nn.device("meta"):
        layer = nn.Linear(2, 2)
    with pytest.raises(ConversionError, match="meta device"):
        to_torch(layer)
    with pytest.raises(TypeError, match="to_torch"):
        to_torch(torch.nn.ReLU())


def test_the_result_is_a_module_like_any_other(tmp_path):
    ours = from_torch(tree())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin[0].weight is twin[1]["a"].weight
    nn.save(ours, tmp_path / "m.safetensors")
    from_torch(tree()).load_state_dict(nn.load(tmp_path / "m.safetensors"))
