"""Layers of other libraries as attributes: told at the assignment, and made ours by a bridge."""

from __future__ import annotations

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from flax import linen, nnx

import statefulnn as nn
from statefulnn import bridge


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class OwnNNX(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def nnx_layer():
    return nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def eqx_layer():
    return eqx.nn.Linear(3, 3, key=jax.random.key(0))


FOREIGN = {
    "nnx layer": (nnx_layer, "flax.from_nnx"),
    "nnx model of a user": (OwnNNX, "flax.from_nnx"),
    "nnx parameter": (lambda: nnx.Param(jnp.ones(3)), "flax.from_nnx"),
    "equinox layer": (eqx_layer, "equinox.from_equinox"),
    "torch layer": (lambda: torch.nn.Linear(3, 3), "torch.from_torch"),
    "torch parameter": (lambda: torch.nn.Parameter(torch.ones(3)), "torch.from_torch"),
    "list of layers": (lambda: [1, eqx_layer()], "equinox.from_equinox"),
    "dict of layers": (lambda: {"a": {"b": nnx_layer()}}, "flax.from_nnx"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_layer_of_another_library_is_told_where_it_is_assigned(kind):
    make, function = FOREIGN[kind]
    with pytest.warns(nn.UntrainedLeavesWarning, match="'Holder.layer'") as said:
        Holder(make())
    assert len(said) == 1
    assert said[0].filename == __file__
    assert function in str(said[0].message)


HARMLESS = {
    "equinox without numbers": lambda: eqx.nn.Lambda(jax.nn.relu),
    "torch without numbers": lambda: torch.nn.ReLU(),
    "class": lambda: torch.nn.Linear,
    "linen, which holds no numbers": lambda: linen.Dense(3),
    "torch array": lambda: torch.ones(3),
    "transformation of optax": lambda: optax.adam(1e-3),
    "function": lambda: jax.nn.relu,
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_holds_nothing_to_train_may_be_kept(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Holder(HARMLESS[kind]())


def test_the_bridges_make_modules_that_train_and_say_nothing():
    x = jnp.ones((2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer, shown in (
            (bridge.flax.from_nnx(nnx_layer()), x),
            (bridge.equinox.from_equinox(eqx_layer()), x[0]),
            (bridge.torch.from_torch(torch.nn.Linear(3, 3)), x),
        ):
            model = Holder(layer)
            grads = nn.grad(lambda m, x: m(x).sum())(model, shown)
            assert len(list(model.parameters())) == len(grads) == 2


def test_a_gradient_that_equinox_took_has_holes_and_goes_through_compiled_code():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    loss = lambda m, x: m(x).sum()
    x = jnp.arange(6.0).reshape(2, 3)
    with pytest.warns(nn.UntrainedLeavesWarning, match="running_mean"):
        _, grads = eqx.filter_value_and_grad(loss)(model, x)
    assert "BatchNorm1d" in grads._repr_html_() and "BatchNorm1d" in str(nn.summary(grads))
    again = nn.jit(lambda g: g)(grads)
    expected = nn.grad(loss)(model, x)
    assert {n: p.value.tolist() for n, p in again.named_parameters()} == {
        n: g.tolist() for n, g in expected.items()
    }
    with pytest.raises(nn.ArgumentError, match=r"Optimizer\.step was given an? Sequential"):
        nn.Optimizer(model, optax.sgd(0.1)).step(grads)
