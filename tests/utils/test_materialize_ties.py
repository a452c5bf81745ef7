"""nn.materialize of models that share parameters: bit for bit what building them with numbers gives."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Forward(nn.Module):
    """The weight of a layer built before goes into one built later."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        return self.head(self.tok(ids))


class Backward(Forward):
    """The weight of a layer built later goes into one built before."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.tok = nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.tok.weight = self.head.weight


class Levels(nn.Module):
    """A tie between modules at different depths, and a module after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"tok": nn.Embedding(64, 32), "mix": nn.Linear(32, 32)})
        self.heads = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Linear(32, 64))])
        self.heads[0][1].weight = self.body.tok.weight
        self.last = nn.Linear(64, 2)

    def forward(self, ids):
        return self.last(self.heads[0](self.body["mix"](self.body["tok"](ids))))


class Biases(nn.Module):
    """Tied biases, whose bounds follow from the weights beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(400, 3)
        self.narrow = nn.Linear(4, 3)
        self.third = nn.Linear(40, 3)
        self.narrow.bias = self.wide.bias
        self.third.bias = self.narrow.bias


class SharedModule(nn.Module):
    """A module in two places, one of which ties its weight to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(8, 8)
        self.a = nn.Sequential(nn.Linear(8, 8))
        self.b = nn.Sequential(self.a[0], nn.Tanh())
        self.b[0].weight = self.tok.weight
        self.last = nn.Linear(8, 8)


class Drawing(nn.Module):
    """A module that draws for its child, as nn.MultiheadAttention does."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.std = std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.inner.weight, 0.0, self.std)


class SharedBelowTwo(nn.Module):
    """Two modules that draw for one child; the second was built with another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Drawing(1.0)
        self.second = Drawing(100.0)
        self.second.inner.weight = self.first.inner.weight
        self.last = nn.Linear(8, 8)


class OwnOfTheParent(nn.Module):
    """A parameter of a parent in its child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)
        self.weight = nn.Parameter(jnp.zeros((8, 8)))
        self.child.weight = self.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, 3.0)


class DrawnByTheParentAfterTheTie(Forward):
    """A model whose own rule has the last word."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.head.weight, 0.0, 0.02)


class LazyHead(nn.Module):
    """A lazy layer that takes its only parameter from an ordinary one, between layers that draw."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(32)
        self.tok = nn.Embedding(64, 32)
        self.head = nn.LazyLinear(64, bias=False)
        self.head.weight = self.tok.weight
        self.last = nn.LazyLinear(2)
        self.mix = nn.Linear(32, 32)

    def forward(self, ids):
        x = self.mix(self.tok(ids))
        return self.last(self.head(x)), self.first(x)


class LazyOwner(nn.Module):
    """A lazy layer whose parameter an ordinary layer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(6, 6, bias=False)
        self.lazy = nn.LazyLinear(6)
        self.late.weight = self.lazy.weight
        self.other = nn.Linear(6, 6)

    def forward(self, x):
        return self.late(self.lazy(self.other(x)))


IDS, ROWS = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 6))
MODELS = [
    (Forward, ()),
    (Backward, ()),
    (Levels, ()),
    (Biases, ()),
    (SharedModule, ()),
    (SharedBelowTwo, ()),
    (OwnOfTheParent, ()),
    (DrawnByTheParentAfterTheTie, ()),
    (LazyHead, (IDS,)),
    (LazyOwner, (ROWS,)),
]


@pytest.mark.parametrize(("build", "inputs"), MODELS, ids=[c.__name__ for c, _ in MODELS])
def test_a_tied_model_gets_the_values_of_one_built_with_numbers(build, inputs) -> None:
    nn.manual_seed(3)
    eager = build()
    if inputs:
        eager(*inputs)
    with nn.device("meta"):
        meta = build()
    nn.manual_seed(3)
    nn.materialize(meta, *inputs)
    assert repr(meta) == repr(eager)
    assert meta.state_dict().keys() == eager.state_dict().keys()
    for name, value in eager.state_dict().items():
        np.testing.assert_array_equal(meta.state_dict()[name], value, err_msg=name)
    ties = [len(list(m.named_parameters(remove_duplicate=False))) for m in (eager, meta)]
    assert ties[0] == ties[1] > len(list(meta.parameters()))


def test_a_tied_model_with_some_values_keeps_them() -> None:
    with nn.device("meta"):
        meta = Forward()
    given = jnp.full((64, 32), 7.0)
    meta.tok.weight.data = given
    meta.extra = nn.Linear(32, 2, device="meta")
    nn.materialize(meta)
    np.testing.assert_array_equal(meta.head.weight, given)
    assert meta.head.weight is meta.tok.weight


def test_a_copy_of_a_tied_meta_model_gets_values_and_keeps_the_tie() -> None:
    with nn.device("meta"):
        meta = copy.deepcopy(Forward())
    nn.materialize(meta)
    assert meta.head.weight is meta.tok.weight
    assert not isinstance(meta.head.weight.value, jax.ShapeDtypeStruct)
