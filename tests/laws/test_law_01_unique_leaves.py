"""Law 1: a module is a pytree of its unique leaves; ties, sharing and cycles survive."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn


class Affine(nn.Module):
    def __init__(self, n_in=2, n_out=2):
        super().__init__()
        self.weight = nn.Parameter(jnp.arange(1.0, n_in * n_out + 1).reshape(n_out, n_in))
        self.bias = nn.Parameter(jnp.zeros(n_out))

    def forward(self, x):
        return x @ self.weight.value.T + self.bias


class TiedParameter(nn.Module):
    """An autoencoder with one matrix under two names, in two modules."""

    def __init__(self):
        super().__init__()
        self.encode = Affine()
        self.decode = Affine()
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x))

    def is_tied(self):
        return self.encode.weight is self.decode.weight


class SharedSubmodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Affine()
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))

    def is_tied(self):
        return self.first is self.second


class Cycle(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = Affine()
        self.child.parent = self

    def forward(self, x):
        return self.child(x)

    def is_tied(self):
        return self.child.parent is self


class SelfLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(jnp.ones(2))
        self.me = self

    def forward(self, x):
        return x * self.me.me.weight

    def is_tied(self):
        return self.me is self


class TiedBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(jnp.ones(2))
        shared = nn.Buffer(jnp.zeros(2))
        self.one = shared
        self.inner = nn.Module()
        self.inner.two = shared

    def forward(self, x):
        return x * self.weight + self.one + self.inner.two

    def is_tied(self):
        return self._buffers["one"] is self.inner._buffers["two"]


class Referring(nn.Module):
    """`nn.Ref` sees the same box without owning it."""

    def __init__(self):
        super().__init__()
        self.owner = Affine()
        self.user = nn.Module()
        self.user.target = nn.Ref(self.owner)
        self.user.weight = nn.Ref(self.owner.weight)

    def forward(self, x):
        return self.owner(x) + self.user.weight

    def is_tied(self):
        return self.user.target is self.owner and self.user.weight is self.owner.weight


MODELS = [TiedParameter, SharedSubmodule, Cycle, SelfLoop, TiedBuffer, Referring]
UNIQUE_LEAVES = {
    TiedParameter: 3,
    SharedSubmodule: 2,
    Cycle: 2,
    SelfLoop: 1,
    TiedBuffer: 2,
    Referring: 2,
}

ROUND_TRIPS = {
    "split and merge": lambda m: nn.merge(*nn.split(m)),
    "tree.map": lambda m: jax.tree.map(lambda x: x, m),
    "flatten and unflatten": lambda m: jax.tree.unflatten(*jax.tree.flatten(m)[::-1]),
    "flatten with paths": lambda m: jax.tree_util.tree_map_with_path(lambda path, x: x, m),
    "jax.jit": lambda m: jax.jit(lambda m: m)(m),
    "jax.jit after use": lambda m: jax.jit(lambda m: (m(jnp.ones(2)), m)[1])(m),
    "nn.jit": lambda m: nn.jit(lambda m: m)(m),
    "in a dict": lambda m: jax.tree.map(lambda x: x, {"a": [m]})["a"][0],
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "twice": lambda m: nn.merge(*nn.split(nn.merge(*nn.split(m)))),
    "deepcopy of a clone": lambda m: copy.deepcopy(nn.merge(*nn.split(m))),
    "jax.eval_shape": lambda m: jax.eval_shape(lambda m: m, m),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda c: c.__name__)
def test_each_box_is_one_leaf(model):
    assert len(jax.tree.leaves(model())) == UNIQUE_LEAVES[model]
    assert len(nn.split(model())[1]) == UNIQUE_LEAVES[model]


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@pytest.mark.parametrize("model", MODELS, ids=lambda c: c.__name__)
def test_ties_survive(model, trip):
    m = model()
    again = ROUND_TRIPS[trip](m)
    assert type(again) is model
    assert again.is_tied()
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in m.named_parameters()]
    assert len(jax.tree.leaves(again)) == UNIQUE_LEAVES[model]


@pytest.mark.parametrize("trip", [t for t in ROUND_TRIPS if t != "jax.eval_shape"])
@pytest.mark.parametrize("model", MODELS, ids=lambda c: c.__name__)
def test_a_copy_computes_the_same_and_shares_no_box(model, trip):
    m = model()
    again = ROUND_TRIPS[trip](m)
    x = jnp.asarray([1.0, -2.0])
    np.testing.assert_allclose(np.asarray(again(x)), np.asarray(m(x)), rtol=1e-6)
    mine = {id(p) for p in m.parameters()}
    if trip != "nn.jit":  # there the user's own module comes back
        assert not mine & {id(p) for p in again.parameters()}


@pytest.mark.parametrize("model", [TiedParameter, SharedSubmodule], ids=lambda c: c.__name__)
def test_a_write_through_one_name_of_a_copy_is_seen_through_the_other(model):
    again = nn.merge(*nn.split(model()))
    one, two = ("encode", "decode") if model is TiedParameter else ("first", "second")
    getattr(again, one).weight.value = jnp.zeros((2, 2))
    assert float(jnp.abs(getattr(again, two).weight.value).sum()) == 0


def analytic_gradient(x):
    """d/dW of sum(W (W x)) by hand: 1 (Wx)^T + W^T 1 x^T."""
    w = np.arange(1.0, 5.0).reshape(2, 2)
    one = np.ones(2)
    return np.outer(one, w @ x) + np.outer(w.T @ one, x)


@pytest.mark.parametrize("model", [TiedParameter, SharedSubmodule], ids=lambda c: c.__name__)
@pytest.mark.parametrize("how", ["nn.grad", "jax.grad", "functional", "under nn.jit"])
def test_a_tied_parameter_has_one_gradient_the_sum(model, how):
    m = model()
    x = jnp.asarray([0.5, -1.5])
    name = "encode.weight" if model is TiedParameter else "first.weight"

    def loss(m):
        return m(x).sum()

    if how == "nn.grad":
        grad = nn.grad(loss)(m)[name]
    elif how == "under nn.jit":
        grad = nn.jit(nn.grad(loss))(m)[name]
    elif how == "jax.grad":
        grad = jax.grad(loss)(m).get_parameter(name)
    else:
        fn, params = nn.functionalize(m)
        grads = jax.grad(lambda p: fn(p, x).sum())(params)
        assert sorted(grads) == sorted(n for n, _ in m.named_parameters())
        grad = grads[name]
    np.testing.assert_allclose(
        np.asarray(grad), analytic_gradient(np.asarray(x)), rtol=1e-6, atol=1e-6
    )


def test_an_optimizer_has_one_slot_for_a_tied_parameter():
    m = TiedParameter()
    slots = optax.trace(0.9).init(m)
    assert len(jax.tree.leaves(slots)) == 3


def test_an_l2_penalty_over_parameters_or_leaves_counts_a_tied_parameter_once():
    m = TiedParameter()
    expected = float((np.arange(1.0, 5.0) ** 2).sum())
    assert float(sum((p.value**2).sum() for p in m.parameters())) == expected
    assert float(sum((x**2).sum() for x in jax.tree.leaves(m))) == expected


def test_a_tie_holds_after_many_compiled_sgd_steps_by_tree_map():
    m = TiedParameter()

    @jax.jit
    def step(m, x):
        grads = jax.grad(lambda m: (m(x) ** 2).sum())(m)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, m, grads)

    for _ in range(3):
        m = step(m, jnp.ones(2))
    assert m.is_tied()
    w = np.arange(1.0, 5.0).reshape(2, 2)
    b1 = b2 = np.zeros(2)
    for _ in range(3):
        x = np.ones(2)
        h = w @ x + b1
        dy = 2 * (w @ h + b2)
        dw = np.outer(dy, h) + np.outer(w.T @ dy, x)
        w, b1, b2 = w - 1e-3 * dw, b1 - 1e-3 * (w.T @ dy), b2 - 1e-3 * dy
    np.testing.assert_allclose(np.asarray(m.encode.weight), w, rtol=1e-5)


def test_leaves_come_as_trainable_then_frozen_then_buffers_then_generators():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Generator(0)
            self.register_buffer("count", jnp.zeros(3, jnp.int32))
            self.frozen = nn.Parameter(jnp.zeros(4), requires_grad=False)
            self.inner = Affine(2, 5)

    leaves = nn.split(Net())[1]
    assert [x.shape for x in leaves[:4]] == [(5, 2), (5,), (4,), (3,)]
    assert len(leaves) == 5
    assert jax.tree.leaves(Net())[3].dtype == jnp.int32


def test_one_module_passed_twice_to_nn_jit_is_one_module_inside():
    m = Affine()
    seen = []

    @nn.jit
    def step(a, b):
        seen.append(a is b)
        a.bias.value = a.bias + 1
        return b.bias.value

    np.testing.assert_array_equal(np.asarray(step(m, m)), [1.0, 1.0])
    assert seen == [True]
    np.testing.assert_array_equal(np.asarray(m.bias), [1.0, 1.0])


def test_two_equal_modules_passed_to_nn_jit_stay_two():
    a, b = Affine(), Affine()

    @nn.jit
    def step(a, b):
        a.bias.value = a.bias + 1
        return b.bias.value

    step(a, a)
    np.testing.assert_array_equal(np.asarray(step(a, b)), [0.0, 0.0])
    np.testing.assert_array_equal(np.asarray(b.bias), [0.0, 0.0])


def test_a_box_shared_by_two_root_arguments_is_one_box_inside_nn_jit():
    model = Affine()

    class Opt(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.target = nn.Ref(m)

        def step(self):
            self.target.bias.value = self.target.bias + 1

    @nn.jit
    def step(model, opt):
        opt.step()
        return model.bias.value

    np.testing.assert_array_equal(np.asarray(step(model, Opt(model))), [1.0, 1.0])
    np.testing.assert_array_equal(np.asarray(model.bias), [1.0, 1.0])


def test_sharing_is_part_of_the_module_def():
    tied, untied = TiedParameter(), TiedParameter()
    untied.decode.weight = nn.Parameter(untied.encode.weight.value)
    assert nn.split(tied)[0] != nn.split(untied)[0]
    assert nn.split(tied)[0] == nn.split(TiedParameter())[0]


def test_a_tie_made_after_a_compiled_call_is_seen_by_the_next():
    m = TiedParameter()
    m.decode.weight = nn.Parameter(m.encode.weight.value)
    count = nn.jit(lambda m: len(jax.tree.leaves(m)))
    assert count(m) == 4
    m.decode.weight = m.encode.weight
    assert count(m) == 3


def test_a_model_in_a_deepcopied_container_keeps_ties_between_models():
    m = TiedParameter()
    a, b = copy.deepcopy([m.encode, m.decode])
    assert a.weight is b.weight
    c, d = pickle.loads(pickle.dumps([m.encode, m.decode]))
    assert c.weight is d.weight


def test_merge_refuses_the_wrong_number_of_leaves():
    moduledef, leaves = nn.split(Affine())
    for wrong in (leaves[:-1], [*leaves, jnp.ones(1)], []):
        with pytest.raises((nn.StatefulnnError, ValueError), match=str(len(wrong))):
            nn.merge(moduledef, wrong)
