"""torch.cond and other operators that hold functions."""

from __future__ import annotations

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan as torch_scan
from torch._higher_order_ops.while_loop import while_loop as torch_while_loop

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, from_torch
from tests.bridge.beside_torch import beside, same

# torch warns of its own compiler when it runs these operators eagerly.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python:RuntimeWarning"),
]

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).abs()


class Branched(torch.nn.Module):
    """Runs one of two layers, as the sum of its input says; the second is followed by dropout."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        positive = lambda x: self.up(x).relu()
        negative = lambda x: self.drop(self.down(x)) + torch.ones(3)
        return torch.cond(x.sum() > 0, positive, negative, (x,))


class Nested(torch.nn.Module):
    """A branch in a branch, in a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.inner = Branched()

    def forward(self, x):
        large = lambda x: torch.cond(x.mean() > 3, torch.sin, torch.cos, (x,))
        x = torch.cond(x.sum() > 1, large, lambda x: x.square(), (x,))
        return self.inner(self.inner(x) - 2)


class Looped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)

    def forward(self, x):
        step = lambda carry, x: (torch.tanh(self.fc(carry) + x), carry * 2)
        last, all_of_them = torch_scan(step, x[0] * 0, x)
        return last, all_of_them, torch_map(lambda row, y: row + y.sum(), x, last.clone())


class Counted(torch.nn.Module):
    def forward(self, x):
        small = lambda i, x: x.sum() < 50
        return torch_while_loop(small, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x))


@pytest.mark.parametrize("model", [Branched, Nested], ids=["cond", "nested"])
def test_branches_are_those_of_torch_with_their_gradients(model):
    torch.manual_seed(0)
    beside(model().eval(), X, others=((-X,), (5 * X[:2],)))


def test_loops_are_those_of_torch_with_their_gradients():
    torch.manual_seed(0)
    beside(Looped(), X, others=((-X[:3],),))


def test_a_loop_with_a_condition_runs_as_often_as_in_torch():
    beside(Counted(), X, others=((X + 30,), (X / 9,)))


def test_draws_in_a_branch_come_from_the_generator():
    ours = from_torch(Branched().train(), X)
    nn.manual_seed(0)
    first, second = (nn.jit(lambda m, x: m(x))(ours, -jnp.asarray(X.numpy())) for _ in range(2))
    assert not np.array_equal(first, second)


def test_the_mode_of_what_a_branch_calls_is_that_of_the_trace():
    theirs = Branched().eval()
    ours = from_torch(theirs, X)
    with pytest.raises(nn.StructureChangeError, match="in training mode"):
        ours.train()(jnp.ones((2, 3)))
    both = from_torch(theirs, X, modes=("train", "eval"))
    same(both.eval()(-jnp.asarray(X.numpy())), theirs(-X))
    assert (both.train()(-jnp.ones((50, 3))) == 1.0).any()  # dropped, and the one is added


def test_weights_of_a_layer_in_a_branch_can_be_changed_and_the_layer_cannot():
    theirs = Branched().eval()
    ours = from_torch(theirs, X)
    ours.up.weight = nn.Parameter(2 * ours.up.weight)
    with torch.no_grad():
        theirs.up.weight.mul_(2)
    same(ours(jnp.asarray(X.numpy())), theirs(X))
    ours.up = nn.Sequential(nn.Linear(3, 3)).eval()
    with pytest.raises(nn.StructureChangeError, match="replaced 'up'"):
        ours(jnp.asarray(X.numpy()))


class Twice(torch.nn.Module):
    """Calls its layers in a branch and outside of it."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))

    def forward(self, x):
        y = self.inner(x)
        return torch.cond(x.sum() > 0, lambda y: self.inner(y), lambda y: y.clone(), (y,))


def test_a_layer_that_is_called_outside_of_the_branch_as_well_cannot_be_replaced_either():
    theirs, x = Twice().eval(), jnp.abs(jnp.asarray(X.numpy()))
    ours = from_torch(theirs, X)
    same(ours(x), theirs(X.abs()))
    with pytest.raises(nn.StructureChangeError, match="in training mode"):
        ours.train()(x)
    ours.eval().inner[0] = nn.Sequential(nn.Linear(3, 3)).eval()
    with pytest.raises(nn.StructureChangeError, match="replaced 'inner.0'"):
        ours(x)
    ours.inner = nn.Linear(3, 3).eval()
    with pytest.raises(nn.StructureChangeError, match="replaced 'inner'"):
        ours(x)


def test_copies_and_pickles_have_the_branches():
    ours = from_torch(Branched().eval(), X)
    x = -jnp.asarray(X.numpy())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        np.testing.assert_array_equal(other(x), ours(x))


def test_operators_that_are_missing_in_a_branch_are_named_at_the_conversion():
    class Missing(torch.nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, torch.special.bessel_j0, torch.sin, (x,))

    with pytest.raises(ConversionError, match=r"special_bessel_j0.default, used 1x"):
        from_torch(Missing(), X)
    given = {torch.ops.aten.special_bessel_j0.default: jnp.cos}
    found = from_torch(Missing(), X, operators=given)(jnp.asarray(X.numpy()))
    np.testing.assert_allclose(found, np.cos(X.numpy()), rtol=1e-6)


def test_flex_attention_is_refused_in_one_message(capfd):
    from torch.nn.attention.flex_attention import flex_attention

    class Flexible(torch.nn.Module):
        def forward(self, q):
            return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + i - j)

    with pytest.raises(ConversionError, match="higher_order.flex_attention"):
        from_torch(Flexible(), torch.randn(1, 2, 128, 16))
    assert capfd.readouterr().out == ""
