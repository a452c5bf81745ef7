"""nn.statefulize: pure functions as modules, and the way back from functionalize."""

from __future__ import annotations

import collections
import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from tests.precision import in_float64

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


class Net(nn.Module):
    """Everything a module may have: ties, a frozen parameter, state, a hidden buffer, draws."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.fc.weight
        self.head = nn.Linear(4, 2)
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", jnp.zeros((), jnp.int32), persistent=False)

    def forward(self, x, *, scale=1.0):
        self.calls = self.calls + 1
        return self.head(self.again(self.drop(self.norm(self.fc(x))))) * scale

    def encode(self, x):
        return self.fc(x)


def there_and_back(module: nn.Module, **options) -> nn.Module:
    return nn.statefulize(*nn.functionalize(module, **options))


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def quadratic(p, x):
    return (p["a"] * x + p["b"]) ** 2


QUADRATIC = {"b": np.float32(1.0), "a": np.float32(2.0)}


# --------------------------------------------------------------------------------------------------
# The way back


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_that_came_back_behaves_as_before(compiled):
    net = Net()
    again = there_and_back(net, mutable=True)
    for module in (net, again):
        nn.manual_seed(3)
        call = nn.jit(module) if compiled else module
        outs = [call(X), call(X, scale=2.0), call(X)]
        module.outs = [np.asarray(o) for o in outs]
    np.testing.assert_array_equal(net.outs, again.outs)
    assert (net.outs[0] != net.outs[2]).any()  # the masks advanced
    same(dict(net.named_buffers()), dict(again.named_buffers()))
    assert int(again.calls) == 3


def test_names_freezing_and_persistence_come_back():
    net = Net()
    again = there_and_back(net, mutable=True)
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in net.named_parameters()
    }
    assert "calls" in dict(again.named_buffers()) and "calls" not in again.state_dict()
    assert set(again.state_dict()) == set(net.state_dict()) - {"again.weight"}  # tied: once
    twice, once = nn.functionalize(again, mutable=True), nn.functionalize(net, mutable=True)
    for a, b in zip(twice[1:], once[1:], strict=True):
        assert set(a) == set(b)


def test_train_and_eval_switch_a_module_that_came_back():
    net = Net()
    again = there_and_back(net, mutable=True)
    step = nn.jit(again)
    for _ in range(3):  # each mode is compiled once
        for module in (net, again):
            module.eval()
        np.testing.assert_array_equal(np.asarray(net(X)), np.asarray(again(X)))
        step(X)
        net.train()(X)  # what is normalised comes before the draws
        again.train()
        step(X)
    assert step.trace_count == 2
    assert there_and_back(net.eval(), mutable=True).training is False


def test_parts_that_were_in_another_mode_stay_so_until_the_mode_is_set():
    net = Net()
    net.norm.eval()
    again = there_and_back(net, mutable=True)
    again(X)
    assert int(again.norm.num_batches_tracked) == 0
    again.train()(X)
    assert int(again.norm.num_batches_tracked) == 1


def test_another_method_and_tied_gradients_come_back():
    net = Net()
    again = there_and_back(net, method="encode")
    np.testing.assert_array_equal(np.asarray(again(X)), np.asarray(net.encode(X)))
    model, again = Net().eval(), None
    again = there_and_back(model, mutable=True)
    model.calls, again.calls = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    ours = nn.grad(lambda m: m(X).sum())(model)
    theirs = nn.grad(lambda m: m(X).sum())(again)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(np.asarray(theirs[name]), np.asarray(ours[name]), rtol=1e-5)


def test_training_it_gives_the_same_losses():
    net = Net()
    again = there_and_back(net, mutable=True)
    losses = []
    for module in (net, again):
        nn.manual_seed(1)
        optimizer = nn.Optimizer(module, optax.sgd(1e-2))

        @nn.jit
        def step(model, optimizer, x):
            value, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
            optimizer.step(grads)
            return value

        losses.append([float(step(module, optimizer, X)) for _ in range(5)])
        assert step.trace_count == 1
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Random keys


def test_draws_need_a_key_only_where_there_are_draws():
    deterministic = there_and_back(nn.Linear(4, 2))
    assert jax.jit(deterministic)(X).shape == (6, 2)
    assert jax.vmap(deterministic)(X).shape == (6, 2)
    assert nn.functional_call(deterministic, {}, X).shape == (6, 2)
    random = there_and_back(nn.Dropout(0.5))
    with pytest.raises(nn.MissingRngError, match="rng=key"):
        nn.functional_call(random, {}, X)
    with pytest.raises(nn.MissingRngError):
        jax.jit(random)(X)


def test_the_key_of_a_pure_call_is_the_one_that_is_used(key):
    drop = nn.Dropout(0.5)
    expected = nn.functional_call(drop, {}, X, rng=key)
    random = there_and_back(drop)
    for found in (nn.functional_call(random, {}, X, rng=key), random(X, rng=key)):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    fn, params = nn.functionalize(random)
    np.testing.assert_array_equal(np.asarray(fn(params, X, rng=key)), np.asarray(expected))


def test_a_deterministic_module_leaves_the_generator_alone():
    again = there_and_back(nn.Linear(4, 2))
    before = np.asarray(nn.get_rng_state())
    again(X)
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), before)


def test_generators_of_the_module_s_own_follow_the_generator_in_force():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Generator(0)

        def forward(self, x):
            return x + jax.random.normal(self.generator.next_key(), x.shape)

    again = there_and_back(Own())
    a, b = again(X), again(X)
    assert (a != b).any()


def test_a_function_with_an_rng_keyword_gets_a_fresh_key():
    def noisy(params, x, *, rng):
        return x + params * jax.random.normal(rng, x.shape)

    model = nn.statefulize(noisy, jnp.ones(()))
    assert [n for n, _ in model.named_parameters()] == ["params"]
    step = nn.jit(model)
    assert (step(X) != step(X)).any() and step.trace_count == 1
    key = jax.random.key(7)
    np.testing.assert_array_equal(
        np.asarray(model(X, rng=key)), np.asarray(noisy(jnp.ones(()), X, rng=key))
    )
    with pytest.raises(nn.MissingRngError):
        nn.functional_call(model, {}, X)
    lanes = nn.vmap(model, in_axes=None, axis_size=2)(jnp.zeros(4))
    assert (lanes[0] != lanes[1]).any()


def test_an_optional_key_is_left_out_where_there_is_none():
    def maybe(params, x, rng=None):
        return x * params, rng is None

    model = nn.statefulize(maybe, jnp.ones(()))
    assert model(X)[1] is False
    assert nn.functional_call(model, {}, X)[1] is True


# --------------------------------------------------------------------------------------------------
# Trees


class Pair(NamedTuple):
    w: jax.Array
    b: jax.Array


def test_any_tree_of_arrays_keeps_its_form_and_names_its_leaves():
    tree = {
        "layers": [(jnp.ones((4, 3)), jnp.zeros(3)), Pair(jnp.ones((3, 2)), jnp.zeros(2))],
        "extra": collections.OrderedDict(z=jnp.ones(2), a=(jnp.zeros(2), None)),
    }
    seen = []

    def fn(params, x):
        seen.append(jax.tree.structure(params))
        (w, b), last = params["layers"]
        return (x @ w + b) @ last.w + last.b + params["extra"]["z"]

    model = nn.statefulize(fn, tree)
    assert [n for n, _ in model.named_parameters()] == [
        *("layers.0.0", "layers.0.1", "layers.1.w", "layers.1.b", "extra.z", "extra.a.0")
    ]
    np.testing.assert_allclose(np.asarray(model(X)), np.asarray(fn(tree, X)), rtol=1e-6)
    assert seen[0] == jax.tree.structure(tree)
    grads = nn.grad(lambda m: m(X).sum())(model)
    expected = jax.grad(lambda p: fn(p, X).sum())(tree)
    np.testing.assert_allclose(
        np.asarray(grads["layers.1.w"]), np.asarray(expected["layers"][1].w), rtol=1e-6
    )


def test_names_are_in_the_order_of_insertion():
    model = nn.statefulize(quadratic, QUADRATIC)
    assert list(model.state_dict()) == ["b", "a"]
    np.testing.assert_array_equal(np.asarray(model(3.0)), quadratic(QUADRATIC, 3.0))


def test_state_of_any_form_becomes_buffers_that_advance():
    def fn(params, state, x):
        count, sums = state["count"], state["sums"]
        return x * params["w"], {"count": count + 1, "sums": [s + x.sum() for s in sums]}

    state = {"count": jnp.zeros((), jnp.int32), "sums": [jnp.zeros(()), jnp.ones(())]}
    model = nn.statefulize(fn, {"w": jnp.ones(())}, state)
    step = nn.jit(model)
    for _ in range(3):
        step(X)
    assert step.trace_count == 1
    assert [n for n, _ in model.named_buffers()] == ["count", "sums.0", "sums.1"]
    assert int(model.count) == 3
    np.testing.assert_allclose(float(model.get_buffer("sums.1")), 1 + 3 * X.sum(), rtol=1e-5)


def test_state_that_does_not_change_is_not_written():
    fn = lambda params, state, x: (x * params["w"] + state["s"], state)
    model = nn.statefulize(fn, {"w": jnp.ones(())}, {"s": jnp.ones(())})
    assert nn.functional_call(model, {}, X).shape == X.shape  # a pure call: a write would raise
    assert jax.vmap(model)(X).shape == X.shape


def test_functions_without_parameters_or_with_empty_state():
    assert nn.statefulize(lambda p, x: x + 1, {})(1) == 2
    assert nn.statefulize(lambda p, s, x: (x + 1, s), {}, {})(1) == 2


def test_integers_are_frozen_parameters():
    table = {"index": jnp.arange(3), "w": jnp.ones((3, 2))}
    model = nn.statefulize(lambda p, i: p["w"][p["index"][i]], table)
    assert not model.index.requires_grad and model.w.requires_grad
    assert nn.grad(lambda m: m(1).sum())(model).keys() == {"w"}


def test_copies_and_rebuilt_modules_share_compiled_code():
    step = nn.jit(lambda m, x: m(x))
    model = nn.statefulize(quadratic, QUADRATIC)
    for m in (model, copy.deepcopy(model), nn.statefulize(quadratic, QUADRATIC)):
        step(m, X)
    assert step.trace_count == 1


def test_bfloat16_and_float64_arrays_keep_their_dtype():
    low = nn.statefulize(quadratic, {n: jnp.bfloat16(v) for n, v in QUADRATIC.items()})
    assert low(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
    with in_float64():
        high = nn.statefulize(quadratic, {n: np.float64(v) for n, v in QUADRATIC.items()})
        assert high(jnp.ones(3)).dtype == jnp.float64


# --------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    "params, says",
    [
        ({"a": {"b": 1.0}}, "float under 'a.b' in the params.*jnp.asarray"),
        ({"f": jnp.tanh}, "under 'f' in the params"),
        ({"s": "text"}, "str under 's'"),
        ({"p": nn.Parameter(np.ones(2))}, "Parameter under 'p'.*parameter.value"),
        ([nn.Linear(1, 1)], "Linear under '0'.*functionalize"),
        ({"a": jnp.ones(1), "a.b": jnp.ones(1)}, "'a', which is also the beginning of 'a.b'"),
        ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, "'a.b', which is twice in the params"),
        ({"forward": jnp.ones(1)}, "'forward'.*attribute 'forward' already.*another name"),
        ({"x": {"training": jnp.ones(1)}}, "'x.training'.*attribute 'training' already"),
        ({"": jnp.ones(1)}, "empty"),
        ({"a..b": jnp.ones(1)}, "empty"),
    ],
)
def test_what_cannot_be_an_array_of_a_module_is_refused_by_name(params, says):
    with pytest.raises(nn.RegistrationError, match=f"(?s){says}"):
        nn.statefulize(lambda p, x: x, params)


def test_a_name_in_both_trees_is_refused():
    with pytest.raises(nn.RegistrationError, match="'a', which is both"):
        nn.statefulize(lambda p, s, x: (x, s), {"a": jnp.ones(1)}, {"a": jnp.ones(1)})


@pytest.mark.parametrize("name", ["fn", "has_state", "names", "state", "params", "_x"])
def test_names_that_the_module_does_not_need_are_free(name):
    model = nn.statefulize(lambda p, x: x * p[name], {name: jnp.full((), 2.0)})
    assert float(model(3.0)) == 6.0 and float(getattr(model, name)) == 2.0


def test_something_that_is_no_function_is_refused():
    with pytest.raises(
        TypeError, match="(?s)with dict as the function.*nn.statefulize\\(fn, params"
    ):
        nn.statefulize({"a": jnp.ones(1)}, quadratic)


@pytest.mark.parametrize(
    "returned, error, says",
    [
        (lambda s: {**s, "cuont": s["count"]}, nn.StructureChangeError, "'cuont' unknown.*'count'"),
        (lambda s: {}, nn.StructureChangeError, "'count' missing"),
    ],
)
def test_a_state_of_another_structure_is_refused_and_nothing_is_written(returned, error, says):
    model = nn.statefulize(lambda p, s, x: (x, returned(s)), {}, {"count": jnp.zeros(())})
    with pytest.raises(error, match=f"(?s){says}"):
        model(X)
    assert float(model.count) == 0


def test_a_function_that_forgets_the_state_is_told():
    model = nn.statefulize(lambda p, s, x: x, {}, {"count": jnp.zeros(())})
    with pytest.raises(TypeError, match="(?s)returned .*return out, new_state"):
        model(X)


def test_an_exception_in_the_function_leaves_the_state():
    def fails(params, state, x):
        raise ValueError("midway")

    model = nn.statefulize(fails, {}, {"count": jnp.zeros(())})
    with pytest.raises(ValueError, match="midway"):
        nn.jit(model)(X)
    assert float(model.count) == 0
