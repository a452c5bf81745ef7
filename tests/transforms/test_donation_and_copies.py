"""What the package copied outlives a call that donates: snapshots, target networks, pure parameters."""

from __future__ import annotations

import copy
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn

X = jnp.ones((3, 2))


def shrink(m, scale=0.5):
    for p in m.parameters():
        p.value = p.value * scale


def arrays(m):
    return {name: np.array(v) for name, v in m.state_dict().items()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        return self.tied(self.norm(self.fc(x)))


def loaded(m):
    twin = Net()
    twin.load_state_dict(m.state_dict())
    return twin


def assigned(m):
    twin = Net()
    twin.load_state_dict(m.state_dict(), assign=True)
    return twin


def written(m):
    twin = Net()
    for mine, theirs in zip(twin.parameters(), m.parameters(), strict=True):
        mine.value = theirs.value
    for mine, theirs in zip(twin.parameters(), m.parameters(), strict=True):
        mine.data = theirs
    twin.norm.load_state_dict(m.norm.state_dict())
    return twin


class Average(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.made = nn.Parameter(m.fc.weight)
        self.held = nn.Buffer(m.fc.weight.value)
        self.register_buffer("registered", m.fc.bias.value)
        self.copied = nn.Parameter(jnp.zeros(2))
        self.copied.copy_(m.fc.bias)


# How a second holder of the arrays comes about, and how its values are read.
COPIES = {
    "copy.deepcopy": (copy.deepcopy, arrays),
    "state_dict": (lambda m: m.state_dict(), lambda s: {k: np.array(v) for k, v in s.items()}),
    "load_state_dict": (loaded, arrays),
    "load_state_dict(assign=True)": (assigned, arrays),
    "written by hand": (written, arrays),
    "copied, then moved": (lambda m: copy.deepcopy(m).cpu(), arrays),
    "constructors": (Average, arrays),
    "merge of split": (lambda m: nn.merge(*nn.split(m)), arrays),
    "split": (nn.split, lambda s: arrays(nn.merge(*s))),
    "nn.mutable": (nn.mutable, arrays),
    "jax.tree.map": (lambda m: jax.tree.map(lambda x: x, m), arrays),
    "jax.tree.map, looked at": (lambda m: arrays(c := jax.tree.map(lambda x: x, m)) and c, arrays),
    "tree.map of parameters": (
        lambda m: jax.tree.map(lambda x: x, dict(m.named_parameters())),
        lambda d: {k: np.array(v.value) for k, v in d.items()},
    ),
    "functionalize": (
        lambda m: nn.functionalize(m, mutable=True)[1:],
        lambda s: {k: np.array(v) for d in s for k, v in d.items()},
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_outlives_a_call_that_donates_the_original(kind):
    model = Net()
    model(X)
    take, read = COPIES[kind]
    other = take(model)
    before = read(other)
    step = nn.jit(lambda m, s: shrink(m, s), donate=0)
    for _ in range(3):
        step(model, 0.5)
    after = read(other)
    assert before.keys() == after.keys()
    for name in before:
        assert (before[name] == after[name]).all(), name
    if "fc.bias" in before:
        assert np.allclose(model.fc.bias, 0.125 * before["fc.bias"])


@pytest.mark.parametrize("kind", ["copy.deepcopy", "load_state_dict", "jax.tree.map"])
def test_the_original_outlives_a_call_that_donates_the_copy(kind):
    model = Net()
    other = COPIES[kind][0](model)
    before = arrays(model)
    nn.jit(lambda m, s: shrink(m, s), donate=0)(other, 0.5)
    after = arrays(model)
    assert all((before[n] == after[n]).all() for n in before)


def test_the_best_weights_of_a_run_can_be_put_back():
    model = Net()
    best = model.state_dict()
    expected = {k: np.array(v) for k, v in best.items()}
    nn.jit(lambda m: shrink(m), donate=0)(model)
    model.load_state_dict(best)
    nn.jit(lambda m: shrink(m), donate=0)(model)
    model.load_state_dict(best)
    assert all((np.array(v) == expected[k]).all() for k, v in model.state_dict().items())


def test_an_array_that_nobody_holds_any_more_is_given_away_and_not_copied():
    model = nn.Linear(2, 2)
    step = nn.jit(lambda m: shrink(m), donate=0)
    step(model)  # memory that came from numpy is not XLA's to reuse
    model.load_state_dict(model.state_dict())
    copy.deepcopy(model)
    gc.collect()
    array = model.weight.value
    pointer = array.unsafe_buffer_pointer()
    del array
    held = [p.value for p in model.parameters()]
    del held
    step(model)
    assert model.weight.value.unsafe_buffer_pointer() == pointer


def test_an_array_that_the_user_took_out_is_given_away_and_says_so_where_it_is_put_back():
    model = nn.Linear(2, 2)
    raw = model.weight.value
    nn.jit(lambda m: shrink(m), donate=0)(model)
    assert raw.is_deleted()
    with pytest.raises(RuntimeError, match="deleted.*'weight'.*\n.*Why:.*donate.*\n.*Instead:"):
        model.weight.value = raw
    with pytest.raises(RuntimeError, match="deleted.*weight"):
        model.load_state_dict({"weight": raw, "bias": model.bias.value})
    assert not model.weight.value.is_deleted()


def test_a_call_with_a_parameter_whose_memory_is_gone_names_it():
    model = nn.Sequential(nn.Linear(2, 2))
    jax.jit(lambda w: w * 2, donate_argnums=0)(model[0].weight.value)
    with pytest.raises(RuntimeError, match="deleted.*'0.weight'"):
        nn.jit(model)(X)


def test_the_copies_that_donation_makes_are_counted_once():
    model = Net()
    other = copy.deepcopy(model)
    step = nn.jit(lambda m: shrink(m), donate=0)
    step(model)
    pointers = {p.value.unsafe_buffer_pointer() for p in model.parameters()}
    step(model)
    assert {p.value.unsafe_buffer_pointer() for p in model.parameters()} == pointers
    assert not other.fc.weight.value.is_deleted()


@pytest.mark.parametrize("option", [{"donate_argnums": (0, 1)}, {"donate_argnames": ("a", "b")}])
def test_jaxs_names_for_donation_mean_the_same(option):
    a, other = nn.Linear(2, 2), nn.Linear(2, 2)
    b = copy.deepcopy(a)  # shares its arrays

    def step(a, b, other):
        for p in (a.weight, a.bias, b.weight, b.bias):
            p.value = p.value + other.weight.value.sum()

    want = np.asarray(a.weight) + np.asarray(other.weight).sum()
    nn.jit(step, **option)(a, b, other)
    for model in (a, b):
        np.testing.assert_allclose(model.weight, want, rtol=1e-6)
    assert np.isfinite(other.weight).all()  # was not donated
