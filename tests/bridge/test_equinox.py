"""Equinox modules as ours and ours as Equinox's; Equinox's own calls are the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from statefulnn.bridge.equinox import equinox_module, from_equinox, to_equinox

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
KEY = jax.random.key(3)


class Net(eqx.Module):
    """Lists, functions, numbers and static fields beside arrays, state and draws."""

    layers: list
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    act: Callable
    scale: float
    order: jax.Array
    width: int = eqx.field(static=True)

    def __init__(self, key):
        keys = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 5, key=keys[0]), eqx.nn.Linear(5, 2, key=keys[1])]
        self.norm = eqx.nn.BatchNorm(5, "batch", mode="ema")
        self.drop = eqx.nn.Dropout(0.5)
        self.act, self.scale, self.order, self.width = jax.nn.relu, 2.0, jnp.arange(5)[::-1], 5

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.layers[0](x)[self.order], state)
        return self.layers[1](self.act(self.drop(x, key=key))) * self.scale, state


def made():
    return eqx.nn.make_with_state(Net)(jax.random.key(0))


@eqx.filter_jit
def apply(module, state, key):
    """What a user of Equinox writes."""
    over = jax.vmap(lambda x, s, k: module(x, s, key=k), (0, None, 0), (0, None), axis_name="batch")
    return over(X, state, None if key is None else jax.random.split(key, 6))


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]


def same(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Equinox's modules as ours


def test_arrays_have_the_paths_of_attributes_and_integers_are_frozen():
    model = from_equinox(*made(), axis_name="batch")
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    assert trainable == {
        **{f"layers.{i}.{n}": True for i in (0, 1) for n in ("weight", "bias")},
        "norm.weight": True,
        "norm.bias": True,
        "order": False,
    }
    buffers = [n for n, _ in model.named_buffers()]
    assert len(buffers) == 3 and all(n.startswith("norm.") for n in buffers)


def test_outputs_and_state_are_equinox_s_with_the_same_keys():
    module, state = made()
    model = from_equinox(module, state, axis_name="batch")
    step = nn.jit(model)
    for key in jax.random.split(KEY, 3):
        expected, state = apply(module, state, key)
        same(step(X, rng=key), expected)
        same(equinox_module(model)[1], state)
    assert step.trace_count == 1
    model.eval()
    same(model(X), apply(eqx.nn.inference_mode(module), state, None)[0])


def test_training_gives_the_losses_of_equinox_s_own_loop():
    module, state = made()
    model = from_equinox(module, state, axis_name="batch")
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer, opt_state = (
        nn.Optimizer(model, tx),
        tx.init(eqx.filter(module, eqx.is_inexact_array)),
    )

    @nn.jit
    def ours(model, optimizer, key):
        value, grads = nn.value_and_grad(lambda m: (m(X, rng=key) ** 2).mean())(model)
        optimizer.step(grads)
        return value

    @eqx.filter_jit
    def theirs(module, state, opt_state, key):
        def loss(module):
            out, new = apply(module, state, key)
            return (out**2).mean(), new

        (value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(module)
        updates, opt_state = tx.update(grads, opt_state)
        return value, eqx.apply_updates(module, updates), state, opt_state

    for key in jax.random.split(KEY, 5):
        value, module, state, opt_state = theirs(module, state, opt_state, key)
        np.testing.assert_allclose(float(ours(model, optimizer, key)), float(value), rtol=1e-5)
    assert ours.trace_count == 1
    same(equinox_module(model), (module, state))


def test_train_and_eval_are_inference_mode_and_compile_once_each():
    model = from_equinox(*made(), axis_name="batch")
    step = nn.jit(model)
    for _ in range(2):
        step(X)
        model.eval()
        step(X)
        assert equinox_module(model)[0].drop.inference is True
        model.train()
    assert step.trace_count == 2
    inferring = eqx.nn.inference_mode(eqx.nn.Dropout(0.5))
    assert from_equinox(inferring).training is False
    assert (np.asarray(from_equinox(inferring).train()(X)) != X).any()


def test_layers_in_another_mode_stay_so_until_the_mode_is_set():
    module = eqx.nn.Sequential([eqx.nn.Dropout(0.5, inference=True), eqx.nn.Dropout(0.0)])
    model = from_equinox(module)
    assert model.training and (np.asarray(model(X)) == X).all()
    assert (np.asarray(model.eval().train()(X)) != X).any()


def test_masks_advance_and_pure_calls_take_a_key():
    model = from_equinox(eqx.nn.Dropout(0.5))
    step = nn.jit(model)
    assert (step(X) != step(X)).any() and step.trace_count == 1
    expected = eqx.nn.Dropout(0.5)(X, key=KEY)
    same(nn.functional_call(model, {}, X, rng=jax.random.key(1)).shape, X.shape)
    same(model(X, rng=KEY), expected)
    with pytest.raises(RuntimeError, match="key") as raised:  # Equinox's own, with a note
        nn.functional_call(model, {}, X)
    assert any("rng=key" in note for note in raised.value.__notes__)


def test_a_module_without_keys_leaves_the_generator_alone():
    class Scale(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return x * self.w

    model = from_equinox(Scale(jnp.ones(4)))
    before = np.asarray(nn.get_rng_state())
    assert jax.jit(model)(X).shape == model(X).shape
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), before)


def test_shared_layers_are_one_parameter():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            keys = jax.random.split(key)
            pair = (eqx.nn.Linear(4, 4, key=keys[0]), eqx.nn.Linear(4, 4, key=keys[1]))
            self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

        def __call__(self, x):
            first, second = self.shared()
            return second(first(x))

    module = Tied(KEY)
    model = from_equinox(module, axis_name="batch")
    assert sum(n.endswith("weight") for n, _ in model.named_parameters()) == 1
    ours = nn.grad(lambda m: m(X).sum())(model)
    theirs = eqx.filter_grad(lambda m: jax.vmap(m)(X).sum())(module)
    same(sorted(ours.values(), key=jnp.size), sorted(arrays(theirs), key=np.size))


def test_another_call_takes_state_and_key_by_name():
    module, state = made()

    def call(module, x, state, key):
        over = jax.vmap(lambda x, s: module(x, s, key=key), (0, None), (0, None), axis_name="batch")
        return over(x, state)

    model = from_equinox(module, state, call=call)
    expected, new = call(module, X, state, KEY)
    same(model(X, rng=KEY), expected)
    same(equinox_module(model)[1], new)


def test_a_hidden_state_that_is_an_input_stays_one():
    class Cell(eqx.Module):
        w: jax.Array

        def __call__(self, x, state):
            return jnp.tanh(x + self.w * state), x

    model = from_equinox(Cell(jnp.ones(4)))
    out, hidden = model(X, X)
    np.testing.assert_array_equal(np.asarray(hidden), X)


def test_state_that_changes_in_evaluation_of_a_module_without_modes_is_an_error():
    class Counter(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))

        def __call__(self, x, state):
            return x, state.set(self.index, state.get(self.index) + 1)

    made = eqx.nn.make_with_state(Counter)
    model = from_equinox(*made())
    model(X)
    assert int(dict(model.named_buffers())["index"]) == 1
    with pytest.raises(nn.StateWriteError, match="(?s)Counter changed.*evaluation.*mode=None"):
        model.eval()(X)
    always = from_equinox(*made(), mode=None).eval()
    always(X)
    assert int(dict(always.named_buffers())["index"]) == 1


def test_a_copy_shares_compiled_code_and_files_keep_the_values(tmp_path):
    model = from_equinox(*made(), axis_name="batch").eval()
    twin = copy.deepcopy(model)
    step = nn.jit(lambda m, x: m(x))
    same(step(model, X), step(twin, X))
    assert step.trace_count == 1
    nn.save(model, tmp_path / "net.safetensors")
    other = from_equinox(*eqx.nn.make_with_state(Net)(jax.random.key(9)), axis_name="batch").eval()
    other.load_state_dict(nn.load(tmp_path / "net.safetensors"))
    same(step(other, X), step(model, X))


def test_a_key_of_the_call_is_split_over_the_batch():
    model = from_equinox(eqx.nn.Dropout(0.5), axis_name="batch")
    expected = jax.vmap(eqx.nn.Dropout(0.5))(X, key=jax.random.split(KEY, 6))
    same(model(X, rng=KEY), expected)
    same(model(X, key=KEY), expected)


def test_modules_that_were_built_alike_share_compiled_code():
    step = nn.jit(lambda m, x: m(x))
    for i in range(2):
        step(from_equinox(eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(i)), axis_name="batch"), X)
    assert step.trace_count == 1


def test_wrong_arguments_are_told():
    module, state = made()
    with pytest.raises(
        nn.RegistrationError, match="(?s)Net, but without its state.*make_with_state"
    ):
        from_equinox(module)
    with pytest.raises(TypeError, match="(?s)no argument 'state'.*call=lambda module, x, state"):
        from_equinox(eqx.nn.Linear(1, 1, key=KEY), state)
    with pytest.raises(TypeError, match="(?s)type Linear.*instance of eqx.Module"):
        from_equinox(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="equinox_module with an object of type Linear"):
        equinox_module(nn.Linear(1, 1))

    class Forgets(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.zeros(()))

        def __call__(self, x, state):
            return x

    with pytest.raises(TypeError, match="(?s)Forgets was called with its state.*return out, state"):
        from_equinox(*eqx.nn.make_with_state(Forgets)())(X)

    class Uncallable(eqx.Module):
        w: jax.Array

    with pytest.raises(TypeError, match="(?s)can be called.*call=lambda"):
        from_equinox(Uncallable(jnp.ones(1)))


# --------------------------------------------------------------------------------------------------
# Our modules as Equinox's


def ours_with_state() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[3].bias.requires_grad_(False)
    return model


def test_equinox_differentiates_and_trains_it_as_we_do():
    ours = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    theirs = to_equinox(ours)
    loss = lambda model: (model(X) ** 2).mean()
    step = nn.jit(nn.value_and_grad(loss))
    tx = optax.sgd(0.1)
    optimizer, opt_state = nn.Optimizer(ours, tx), tx.init(eqx.filter(theirs, eqx.is_inexact_array))
    for _ in range(3):
        value, grads = step(ours)
        expected, expected_grads = eqx.filter_jit(eqx.filter_value_and_grad(loss))(theirs)
        np.testing.assert_allclose(float(value), float(expected), rtol=1e-5)
        same(grads, expected_grads.params)
        optimizer.step(grads)
        updates, opt_state = tx.update(expected_grads, opt_state)
        theirs = eqx.apply_updates(theirs, updates)


def test_state_is_equinox_s_and_only_what_trains_is_a_parameter():
    ours = ours_with_state()
    module, state = to_equinox(ours, mutable=True)
    assert set(module.params) == {n for n, p in ours.named_parameters() if p.requires_grad}
    out, new = eqx.filter_jit(module)(X, state, key=KEY)
    ours(X)
    found = new.get(module.index)
    np.testing.assert_allclose(found["1.running_mean"], np.asarray(ours[1].running_mean), rtol=1e-5)
    assert int(found["1.num_batches_tracked"]) == 1
    inferring = eqx.nn.inference_mode(module)
    same(inferring(X, new)[0], ours.eval()(X))


def test_without_state_a_call_that_changes_it_raises():
    module = to_equinox(ours_with_state())
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        module(X, key=KEY)
    with pytest.raises(nn.MissingRngError):
        to_equinox(nn.Dropout(0.5))(X)
    assert eqx.nn.inference_mode(module)(X).shape == (6, 1)
    with pytest.raises(TypeError, match="to_equinox with an object of type Dropout"):
        to_equinox(eqx.nn.Dropout(0.5))


def test_there_and_back():
    ours = ours_with_state()
    back = from_equinox(*to_equinox(ours, mutable=True))
    assert set(back.state_dict()) == set(ours.state_dict())
    for model in (ours, back):
        nn.manual_seed(0)
        model(X)
        model.eval()
    same(back(X), ours(X))
    theirs = from_equinox(*made(), axis_name="batch").eval()
    same(to_equinox(theirs)(X), theirs(X))
