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


class TheirTwo(torch.nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        if tied:
            self.b = self.a

    def forward(self, x):
        return self.run(self.a, self.b, x)

    run = staticmethod(lambda a, b, x: b(a(x)))


def two(theirs=lambda a, b, x: b(a(x)), ours=lambda a, b, x: b(a(x)), tied=False):
    """Return two layers in a model of torch and one of ours, each called by a function."""

    class Their(TheirTwo):
        run = staticmethod(theirs)

    class Our(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return ours(self.a, self.b, x)

    torch.manual_seed(0)
    return Their(tied), Our()


def test_gradients_of_parameters_and_arguments_and_buffers_are_compared_too():
    class OnItsWeight(nn.Linear):
        def forward(self, x):
            return F.linear(x, jax.lax.stop_gradient(self.weight.value), self.bias)

    found = compare(torch.nn.Linear(4, 4), OnItsWeight(4, 4), X)
    assert found.first is None and found.first_gradient is None and not found.agrees
    assert "These gradients differ: weight" in str(found)

    found = compare(*two(lambda a, b, x: b(a(x.detach()))), X)
    assert "These gradients differ: the argument 0 by position" in str(found)

    theirs = torch.nn.BatchNorm1d(4)
    found = compare(theirs, nn.BatchNorm1d(4, momentum=0.01), X)
    assert set(found.buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    assert "these buffers differ: running_mean" in str(found) and "momentum is 0.01" in str(found)
    # A bias before the normalisation has a gradient of rounding errors.
    before = torch.nn.Sequential(torch.nn.Linear(4, 4), theirs)
    assert compare(before, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), X).agrees


def test_a_gradient_that_torch_does_not_take_is_zero():
    found = compare(*two(lambda a, b, x: b(a(x).detach())), X)
    assert found.first_gradient.path == "a"
    argmax = lambda a, b, x: (b(a(x)), b(a(x)).argmax(-1))  # the second calls have no gradient
    assert compare(*two(argmax, argmax), X).agrees


@pytest.mark.parametrize(
    "theirs, ours, word",
    [
        (lambda a, b, x: {"y": a(x), "z": x}, lambda a, b, x: {"z": x, "y": a(x)}, None),
        (
            lambda a, b, x: {"y": a(x)},
            lambda a, b, x: {"w": a(x)},
            "names that it returns is ['w']",
        ),
        (lambda a, b, x: (a(x), 3), lambda a, b, x: (a(x), 4), "look at the code around"),
        (lambda a, b, x: (a(x), x), lambda a, b, x: a(x), "number of arrays that it returns is 1"),
        (
            lambda a, b, x: (a(x), x > 0),
            lambda a, b, x: (a(x), (x > 0).astype("float32")),
            "dtype that it returns is 'float32' here and 'bool' in torch",
        ),
        (lambda a, b, x: a(a(x)), lambda a, b, x: a(x), "calls is 1 here and 2 in torch"),
        (lambda a, b, x: torch.dropout(a(x), 0.5, True), lambda a, b, x: a(x), "random numbers"),
    ],
)
def test_outputs_are_compared_by_their_places_and_the_reason_is_told(theirs, ours, word):
    found = compare(*two(theirs, ours), X)
    assert found.agrees if word is None else word in str(found)


def test_a_module_that_is_shared_in_one_model_only_is_compared_call_by_call():
    theirs, ours = two(tied=True)
    found = compare(theirs, ours, X)
    assert found.first is None and found.first_gradient is None and found.only_ours == ()
    assert "one parameter in torch, and 2 here: a.weight, b.weight" in str(found)
    assert not found.agrees  # each has a part of the gradient
    theirs, ours = two()
    assert "frozen in torch, trained here: a.weight" in str(
        compare(theirs.requires_grad_(False), ours, X)
    )


def test_bfloat16_differs_by_its_own_steps():
    theirs, ours = torch.nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, dtype=jnp.bfloat16)
    found = compare(theirs, ours, X.bfloat16())
    assert found.agrees and found.tolerance > 0.01
    assert compare(theirs, ours, X.bfloat16(), tolerance=1e-6).tolerance == 1e-6


def test_modules_inside_of_a_transformation_are_said_to_be_left_out():
    found = compare(*two(ours=lambda a, b, x: b(nn.remat(a)(x))), X)
    assert found.agrees and found.inside == ("a",) and found.only_theirs == ()
    assert [row.path for row in found.rows] == ["b", ""]


def test_everything_is_as_it_was_afterwards():
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    ours = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    theirs[0].weight.grad = torch.ones(4, 4)
    x = (X.clone().requires_grad_() * 2) + 0  # no leaf
    nn.manual_seed(1)
    torch.manual_seed(1)
    moduledef, _ = nn.split(ours)
    before = torch.get_rng_state(), nn.default_generator.get_state()
    compare(theirs, ours, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(nn.default_generator.get_state(), before[1])
    assert torch.equal(theirs[0].weight.grad, torch.ones(4, 4)) and ours.training
    assert nn.split(ours)[0] is moduledef  # no hooks


def test_arrays_are_inputs_and_suggestions_go_by_names_that_begin_alike():
    for x in (X.numpy(), jnp.asarray(X.numpy())):
        assert compare(torch.nn.Linear(4, 2), nn.Linear(4, 2), x).agrees
    theirs = torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in "qkv"})
    ours = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("value", "query", "key")})
    suggested = compare(theirs, ours, X).suggested
    assert suggested == {"value": "v", "query": "q", "key": "k"}


def test_errors_say_in_which_module_they_were_raised():
    with pytest.raises(nn.ShapeError) as caught:
        compare(*two(ours=lambda a, b, x: b(a(x)[:, :3])), X)
    assert "raised in 'b' of Our (Linear)" in caught.value.__notes__
    assert "raised while compare called our module" in caught.value.__notes__
    with pytest.raises(RuntimeError) as caught:
        compare(*two(lambda a, b, x: b(a(x)[:, :3])), X)
    assert "compare called 'b' of torch's module" in caught.value.__notes__[0]
    for wrong in ({"kwargs": [1]}, {"names": ["a"]}, {"tolerance": -1}):
        with pytest.raises(nn.ArgumentError):
            compare(*two(), X, **wrong)
