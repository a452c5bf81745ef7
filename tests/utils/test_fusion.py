"""Fusing batch norm against torch; the remaining names of torch.nn.utils."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.parity.oracle import array, close, load, same_class

CONVS = [
    ("Conv1d", (3, 4, 2), "BatchNorm1d", (2, 3, 6)),
    ("Conv2d", (3, 4, 2), "BatchNorm2d", (2, 3, 5, 5)),
    ("ConvTranspose1d", (3, 4, 2), "BatchNorm1d", (2, 3, 6)),
    ("ConvTranspose2d", (3, 4, 2), "BatchNorm2d", (2, 3, 5, 5)),
    ("Linear", (3, 4), "BatchNorm1d", (5, 3)),
    ("Linear", (3, 4), "BatchNorm1d", (5, 3, 1)),
]


def pairs(layer, args, norm, bias=True, **kwargs):
    torch.manual_seed(0)
    features = args[1]
    theirs = getattr(torch.nn, layer)(*args, bias=bias), getattr(torch.nn, norm)(features, **kwargs)
    ours = getattr(nn, layer)(*args, bias=bias), getattr(nn, norm)(features, **kwargs)
    theirs[1].running_mean.normal_()
    theirs[1].running_var.uniform_(0.5, 2)
    for p in theirs[1].parameters():
        p.data.normal_()
    for a, b in zip(ours, theirs, strict=True):
        load(a, b)
        a.eval(), b.eval()
    return theirs, ours


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layer", "args", "norm", "shape"), CONVS[:5])
def test_fused_layers_are_torchs_and_do_what_both_did(layer, args, norm, shape, bias, affine):
    theirs, ours = pairs(layer, args, norm, bias, affine=affine)
    if layer == "Linear":
        if not affine:
            return  # torch's needs weight and bias
        name, extra = "fuse_linear_bn_eval", ()
    else:
        name, extra = "fuse_conv_bn_eval", (layer.startswith("ConvTranspose"),)
    wanted = getattr(torch.nn.utils, name)(*theirs, *extra)
    fused = getattr(nn.utils, name)(*ours, *extra)
    assert list(fused.state_dict()) == list(wanted.state_dict())
    for key, value in wanted.state_dict().items():
        close(fused.state_dict()[key], value, key, 1e-5)
    for key, parameter in wanted.named_parameters():
        assert fused.get_parameter(key).requires_grad == parameter.requires_grad
    x = jnp.asarray(array(*shape))
    close(fused(x), ours[1](ours[0](x)), "output", 1e-5)
    assert fused is not ours[0] and (fused.weight is not ours[0].weight)


def test_a_linear_layer_without_affine_batch_norm():
    _, ours = pairs(*CONVS[4][:3], affine=False)
    x = jnp.asarray(array(5, 3))
    close(nn.utils.fuse_linear_bn_eval(*ours)(x), ours[1](ours[0](x)), "output", 1e-5)


def test_one_feature_for_all():
    torch.manual_seed(0)
    theirs, ours = torch.nn.Linear(3, 4).eval(), nn.Linear(3, 4).eval()
    load(ours, theirs)
    norms = torch.nn.BatchNorm1d(1).eval(), nn.BatchNorm1d(1).eval()
    norms[0].running_mean.fill_(0.5), norms[0].running_var.fill_(2.0)
    load(norms[1], norms[0])
    wanted = torch.nn.utils.fuse_linear_bn_eval(theirs, norms[0])
    fused = nn.utils.fuse_linear_bn_eval(ours, norms[1])
    for key, value in wanted.state_dict().items():
        close(fused.state_dict()[key], value, key, 1e-5)


def test_dtypes_are_kept():
    theirs, ours = pairs(*CONVS[1][:3])
    theirs[0].bfloat16(), ours[0].bfloat16()
    wanted = torch.nn.utils.fuse_conv_bn_eval(*theirs)
    fused = nn.utils.fuse_conv_bn_eval(*ours)
    assert fused.weight.dtype == fused.bias.dtype == jnp.bfloat16
    close(fused.weight, wanted.weight, "weight", 1e-2)
    close(fused.bias, wanted.bias, "bias", 1e-2)


MISUSE = {
    "training": lambda u, conv, bn: u.fuse_conv_bn_eval(conv.train(), bn),
    "no statistics": lambda u, conv, bn: (
        setattr(bn, "running_mean", None),
        u.fuse_conv_bn_eval(conv, bn),
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_raises_what_torch_raises(case):
    theirs, ours = pairs(*CONVS[1][:3])
    with pytest.raises(AssertionError) as their_error:
        MISUSE[case](torch.nn.utils, *theirs)
    with pytest.raises(AssertionError) as our_error:
        MISUSE[case](nn.utils, *ours)
    same_class(our_error.value, their_error.value)


def test_features_have_to_fit():
    for library in (torch.nn, nn):
        with pytest.raises(AssertionError, match="out_features"):
            library.utils.fuse_linear_bn_eval(
                library.Linear(3, 4).eval(), library.BatchNorm1d(3).eval()
            )


def test_the_deprecated_functional_call():
    theirs, ours = torch.nn.Linear(2, 1), nn.Linear(2, 1)
    load(ours, theirs)
    x, bias = np.ones((3, 2), np.float32), np.full(1, 5, np.float32)
    with pytest.warns(FutureWarning, match="deprecated"):
        wanted = torch.nn.utils.stateless.functional_call(
            theirs, {"bias": torch.as_tensor(bias)}, torch.as_tensor(x)
        )
    with pytest.warns(FutureWarning, match="deprecated"):
        out = nn.utils.stateless.functional_call(ours, {"bias": jnp.asarray(bias)}, jnp.asarray(x))
    close(out, wanted, "output", 1e-6)
    with pytest.warns(FutureWarning), pytest.raises(nn.UnknownNameError):
        nn.utils.stateless.functional_call(ours, {}, jnp.asarray(x), strict=True)
