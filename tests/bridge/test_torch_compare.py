"""nn.bridge.torch.compare finds where a port stops computing what torch computes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.bridge.torch import compare


class TheirBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(4, eps=1e-3)
        self.fc = torch.nn.Linear(4, 4)
        self.bn = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return x + self.bn(torch.nn.functional.silu(self.fc(self.norm(x))))


class OurBlock(nn.Module):
    def __init__(self, eps=1e-3, activation=F.silu, scale=1.0):
        super().__init__()
        self.norm = nn.LayerNorm(4, eps=eps)
        self.linear = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.activation, self.scale = activation, scale

    def forward(self, x):
        return x + self.bn(self.activation(self.linear(self.norm(x) * self.scale)))


NAMES = {"0.linear": "0.fc", "1.linear": "1.fc"}


def pair(**options):
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(TheirBlock(), TheirBlock(), torch.nn.Linear(4, 2))
    return theirs, nn.Sequential(OurBlock(**options), OurBlock(**options), nn.Linear(4, 2))


X = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))


def test_models_that_compute_the_same_agree_in_every_module_and_gradient():
    theirs, ours = pair()
    before = {n: t.clone() for n, t in theirs.state_dict().items()}
    found = compare(theirs, ours, X, names=NAMES)
    assert found.agrees and found.first is None and found.first_gradient is None
    assert [row.path for row in found.rows] == (
        ["0.norm", "0.linear", "0.bn", "0", "1.norm", "1.linear", "1.bn", "1", "2", ""]
    )
    assert all(row.output < 1e-5 for row in found.rows)
    assert all(row.gradient < 1e-5 for row in found.rows if row.path)
    assert "all agree" in str(found)
    # torch's is as it was, running statistics too; ours has its arrays.
    assert all(torch.equal(before[n], t) for n, t in theirs.state_dict().items())
    assert all(not m._forward_hooks for m in theirs.modules())
    np.testing.assert_array_equal(ours[0].linear.weight, before["0.fc.weight"].numpy())
    assert int(ours[0].bn.num_batches_tracked) == 0


@pytest.mark.parametrize(
    "options, path, word",
    [
        ({"eps": 1e-1}, "0.norm", "eps is 0.1 here and 0.001 in torch"),
        ({"activation": F.relu}, "0.bn", "the code that calls it"),
        ({"scale": 2.0}, "0.linear", "the code that calls it"),
    ],
)
def test_the_first_module_that_differs_is_named_with_the_likely_reason(options, path, word):
    theirs, ours = pair(**options)
    found = compare(theirs, ours, X, names=NAMES)
    assert found.first.path == path and not found.agrees
    assert word in str(found)


def test_a_mistake_after_the_last_call_is_that_of_the_caller():
    class Doubled(OurBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    theirs, ours = pair()
    ours[1] = Doubled()
    found = compare(theirs, ours, X, names=NAMES)
    assert found.first.path == "1" and "the code around these calls" in str(found)


def test_a_wrong_backward_pass_is_found_by_the_gradients():
    class Wrong(nn.Linear):
        def forward(self, x):
            return super().forward(jax.lax.stop_gradient(x))

    theirs, ours = pair()
    ours[2] = Wrong(4, 2)
    found = compare(theirs, ours, X, names=NAMES)
    assert found.first is None
    # Torch gives the block's output a gradient; here nothing arrives.
    assert found.first_gradient.path == "1" and not found.agrees
    assert compare(theirs, ours, X, names=NAMES, grads=False).agrees


def test_modes_that_differ_are_a_setting_and_dropout_is_told_apart():
    theirs, ours = pair()
    found = compare(theirs, ours.eval(), X, names=NAMES)
    assert found.first.path == "0.bn" and ("training", True, False) in found.first.settings
    assert "training is False here and True in torch, training" not in str(found)  # told once
    drop = compare(torch.nn.Dropout(0.5), nn.Dropout(0.5), torch.ones(64))
    assert "eval()" in str(drop)


def test_arrays_that_do_not_fit_are_named_and_nothing_is_loaded():
    theirs, ours = pair()
    before = np.asarray(ours[2].weight)
    found = compare(theirs, ours, X)
    assert not found.loads and not found.agrees and found.rows == ()
    assert found.missing == ("0.linear.weight", "0.linear.bias", "1.linear.weight", "1.linear.bias")
    assert found.suggested == NAMES
    np.testing.assert_array_equal(ours[2].weight, before)

    turned = compare(torch.nn.Linear(3, 5), nn.Linear(5, 3), torch.ones(2, 3))
    assert turned.misshapen["weight"] == ((5, 3), (3, 5)) and "transposed" in str(turned)


def test_a_comparison_without_loading_takes_the_arrays_as_they_are():
    theirs, ours = torch.nn.Linear(4, 2), nn.Linear(4, 2)
    assert compare(theirs, ours, X, load=False).first.path == ""
    ours.load_state_dict({n: jnp.asarray(t.detach().numpy()) for n, t in theirs.named_parameters()})
    assert compare(theirs, ours, X, load=False).agrees


def test_several_calls_several_outputs_and_other_shapes():
    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.GRU(4, 3, batch_first=True)
            self.fc = torch.nn.Linear(3, 3)

        def forward(self, x, *, scale):
            out, last = self.rnn(x)
            return {"out": self.fc(self.fc(out)) * scale, "last": last}

    class Ours(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.rnn = nn.GRU(4, 3, batch_first=batch_first)
            self.fc = nn.Linear(3, 3)

        def forward(self, x, *, scale):
            out, last = self.rnn(x)
            return {"out": self.fc(self.fc(out)) * scale, "last": last}

    theirs, x = Theirs(), torch.randn(2, 5, 4)
    found = compare(theirs, Ours(True), x, kwargs={"scale": 2.0})
    assert found.agrees and [row.path for row in found.rows] == ["rnn", "fc", ""]
    found = compare(theirs, Ours(False), x, kwargs={"scale": 2.0})
    assert found.first.path == "rnn" and found.first.output == math.inf
    assert ("batch_first", True, False) in found.first.settings


def test_other_things_than_modules_and_unknown_names_are_refused():
    theirs, ours = pair()
    with pytest.raises(nn.ArgumentError, match="the first is a torch.nn.Module"):
        compare(ours, theirs, X)
    with pytest.raises(nn.ArgumentError, match="our module has nothing of the name '0.fc'"):
        compare(theirs, ours, X, names={"0.fc": "0.linear"})
