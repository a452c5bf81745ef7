"""Haiku's transformed functions as ours and ours as Haiku's; Haiku's own apply is the oracle."""

from __future__ import annotations

import copy
import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from statefulnn.bridge.haiku import from_haiku, haiku_arrays, to_haiku

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
KEY = jax.random.key(3)


def net(x, is_training):
    """Nested modules, a parameter of none, statistics, a counter and draws."""
    x = hk.nets.MLP([5, 5], name="encoder")(x)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
        calls = hk.get_state("calls", (), jnp.int32, init=jnp.zeros)
        hk.set_state("calls", calls + 1)
    return hk.Linear(2)(x) * hk.get_parameter("scale", (2,), init=jnp.ones)


NET = hk.transform_with_state(net)
APPLY = jax.jit(NET.apply, static_argnums=4)
MLP = hk.transform(lambda x: hk.nets.MLP([3, 2])(x))


@pytest.fixture(autouse=True)
def _standard_promotion():
    # Haiku's own layers mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def first_arrays():
    return jax.jit(NET.init, static_argnums=2)(jax.random.key(0), X, True)


def bridged() -> nn.Module:
    params, state = first_arrays()
    return from_haiku(NET, params, state=state)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


# --------------------------------------------------------------------------------------------------
# Haiku's functions as ours


def test_names_have_dots_for_slashes():
    model, (params, _) = bridged(), first_arrays()
    assert {n for n, _ in model.named_parameters()} == {
        n if m == "~" else f"{m.replace('/', '.')}.{n}" for m, a in params.items() for n in a
    }
    assert model.encoder.get_parameter("~.linear_0.w").shape == (4, 5)
    assert {"batch_norm.~.mean_ema.average", "calls"} <= set(dict(model.named_buffers()))


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), 0])
def test_a_key_initialises_as_init_does(key):
    same(haiku_arrays(from_haiku(MLP, key, X)), MLP.init(jax.random.key(0), X))


def test_outputs_and_state_are_haiku_s_with_the_same_keys():
    model, (params, state) = bridged(), first_arrays()
    step = nn.jit(model)
    for key in jax.random.split(KEY, 3):
        expected, state = APPLY(params, state, key, X, True)
        same(step(X, rng=key), expected)
        same(haiku_arrays(model), (params, state))
    assert step.trace_count == 1
    model.eval()
    same(model(X), APPLY(params, state, None, X, False)[0])


def test_training_gives_the_losses_of_haiku_s_own_loop():
    model, (params, state) = bridged(), first_arrays()
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer, opt_state = nn.Optimizer(model, tx), tx.init(params)

    @nn.jit
    def ours(model, optimizer, key):
        value, grads = nn.value_and_grad(lambda m: (m(X, rng=key) ** 2).mean())(model)
        optimizer.step(grads)
        return value

    @jax.jit
    def theirs(params, state, opt_state, key):
        def loss(params):
            out, new = NET.apply(params, state, key, X, True)
            return (out**2).mean(), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return value, optax.apply_updates(params, updates), state, opt_state

    for key in jax.random.split(KEY, 5):
        value, params, state, opt_state = theirs(params, state, opt_state, key)
        np.testing.assert_allclose(float(ours(model, optimizer, key)), float(value), rtol=1e-5)
    assert ours.trace_count == 1
    same(haiku_arrays(model), (params, state))


def test_masks_advance_and_pure_calls_take_a_key():
    model = bridged()
    step = nn.jit(model)
    assert (step(X) != step(X)).any()
    fn, params, state = nn.functionalize(model, mutable=True)
    out, new = fn(params, state, X, rng=KEY)
    assert int(new["calls"]) == int(state["calls"]) + 1 == int(model.calls) + 1
    with pytest.raises(nn.MissingRngError, match="(?s)drew random numbers.*PRNGKey.*rng=key"):
        fn(params, state, X)
    pure, params = nn.functionalize(model.eval())
    assert jax.vmap(lambda x: pure(params, x[None]))(X).shape == (6, 1, 2)


def test_functions_without_state_and_without_keys():
    model = from_haiku(MLP, KEY, X)
    params = MLP.init(KEY, X)
    same(haiku_arrays(model), params)
    same(model(X), MLP.apply(params, None, X))
    plain = from_haiku(hk.without_apply_rng(MLP), params)
    before = np.asarray(nn.get_rng_state())
    same(plain(X), model(X, rng=KEY))
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), before)
    grads = nn.grad(lambda m: m(X).sum())(plain)
    expected = jax.grad(lambda p: MLP.apply(p, None, X).sum())(params)
    same(grads["mlp.~.linear_0.w"], expected["mlp/~/linear_0"]["w"])


def test_shared_and_lifted_modules():
    def deep(x):
        shared = hk.Linear(4, name="shared")
        x = hk.experimental.layer_stack(3)(lambda h: jnp.tanh(hk.Linear(4, name="inner")(h)))(x)
        return shared(shared(x))

    f = hk.without_apply_rng(hk.transform(deep))
    params = f.init(KEY, X)
    model = from_haiku(f, params)
    assert sum(n.startswith("shared.") for n in model.state_dict()) == 2
    ours = nn.jit(nn.grad(lambda m: m(X).sum()))(model)
    theirs = jax.jit(jax.grad(lambda p: f.apply(p, X).sum()))(params)
    same(ours["shared.w"], theirs["shared"]["w"])


def test_one_function_of_several():
    def several():
        encoder, decoder = hk.Linear(3, name="encoder"), hk.Linear(4, name="decoder")
        return lambda x: decoder(encoder(x)), (encoder, decoder)

    f = hk.multi_transform(several)
    with pytest.raises(TypeError, match="(?s)MultiTransformed.*f.apply.encode"):
        from_haiku(f, KEY, X)
    params = f.init(KEY, X)
    model = from_haiku(hk.Transformed(f.init, f.apply[0]), params)
    same(model(X), f.apply[0](params, None, X))


def test_the_mode_is_said_or_an_error():
    params, state = first_arrays()
    baked = hk.transform_with_state(lambda x: net(x, True))
    model = from_haiku(baked, params, state=state)
    model(X)
    model.eval()
    with pytest.raises(nn.MissingRngError, match="(?s)evaluation mode.*mode=lambda training"):
        model(X)
    norm = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True))
    model = from_haiku(norm, KEY, X)
    model(X)
    with pytest.raises(nn.StateWriteError, match="(?s)changed its state.*mode=None"):
        model.eval()(X)
    phased = hk.transform_with_state(lambda x, phase: net(x, phase == "train"))
    mode = lambda training: {"phase": "train" if training else "test"}
    same(from_haiku(phased, params, state=state, mode=mode).eval()(X), bridged().eval()(X))
    same(bridged()(X, False), bridged().eval()(X))  # what the call says wins


def test_a_copy_shares_compiled_code_and_files_keep_the_values(tmp_path):
    model = bridged().eval()
    twin = copy.deepcopy(model)
    step = nn.jit(lambda m, x: m(x))
    same(step(model, X), step(twin, X))
    assert step.trace_count == 1
    nn.save(model, tmp_path / "net.safetensors")
    other = from_haiku(NET, 9, X).eval()
    other.load_state_dict(nn.load(tmp_path / "net.safetensors"))
    same(step(other, X), step(model, X))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: from_haiku(net, {}), "type function.*hk.transform"),
        (lambda: from_haiku(NET, {}), "without state.*state=state"),
        (lambda: from_haiku(MLP, {}, state={}), "with state.*transform_with_state"),
        (lambda: from_haiku(MLP, None), "params of type NoneType.*from_haiku\\(f, key, x\\)"),
        (lambda: from_haiku(MLP, {}, X), "and inputs"),
        (lambda: haiku_arrays(nn.Linear(1, 1)), "haiku_arrays with an object of type Linear"),
        (lambda: to_haiku(MLP), "to_haiku with an object of type Transformed"),
    ],
)
def test_wrong_arguments_are_told(call, says):
    with pytest.raises(TypeError, match=f"(?s){says}"):
        call()


def test_names_that_clash_are_refused():
    f = hk.transform(lambda x: hk.Linear(1, name="a")(x) + hk.get_parameter("a", (), init=jnp.ones))
    with pytest.raises(nn.RegistrationError, match="'a', which is also the beginning of 'a\\."):
        from_haiku(f, KEY, X)


# --------------------------------------------------------------------------------------------------
# Our modules as Haiku's


class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.scale = nn.Parameter(jnp.ones(4))
        self.offset = nn.Parameter(jnp.zeros(4), requires_grad=False)

    def forward(self, x):
        return self.body(x) * self.scale + self.offset


def test_init_gives_the_module_s_own_arrays_by_haiku_s_names():
    ours = Ours()
    params, state = to_haiku(ours, mutable=True).init(KEY, X)
    assert {m: set(a) for m, a in params.items()} == {
        "body/0": {"weight", "bias"},
        "body/1": {"weight", "bias"},
        "~": {"scale"},
    }
    assert set(state) == {"body/1", "~"} and set(state["~"]) == {"offset"}
    np.testing.assert_array_equal(params["body/0"]["weight"], np.asarray(ours.body[0].weight))


def test_apply_runs_the_module_with_state_and_keys():
    ours = Ours()
    f = to_haiku(ours, mutable=True)
    params, state = f.init(None, X)
    out, new = jax.jit(f.apply)(params, state, KEY, X)
    ours(X)
    mean = new["body/1"]["running_mean"]
    np.testing.assert_allclose(mean, np.asarray(ours.body[1].running_mean), rtol=1e-5)
    same(f.apply(params, new, None, X, is_training=False)[0], ours.eval()(X))
    grads = jax.grad(lambda p: f.apply(p, state, KEY, X)[0].sum())(params)
    assert float(jnp.abs(grads["~"]["scale"]).sum()) > 0
    with pytest.raises(nn.MissingRngError):
        f.apply(params, state, None, X)


def test_without_state_a_call_that_changes_it_raises():
    f = hk.without_apply_rng(to_haiku(nn.BatchNorm1d(4)))
    params = f.init(None, X)
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        f.apply(params, X)
    assert f.apply(params, X, is_training=False).shape == X.shape


def test_there_and_back():
    ours = Ours()
    f = to_haiku(ours, mutable=True)
    params, state = f.init(None, X)
    back = from_haiku(f, params, state=state)
    assert set(back.state_dict()) == set(ours.state_dict())
    for model in (ours, back):
        model(X)
        model.eval()
    same(back(X), ours(X))
    theirs = bridged()
    again = to_haiku(theirs, mutable=True)
    arrays = again.init(None, X)
    same(again.apply(*arrays, None, X, is_training=False)[0], theirs.eval()(X))
