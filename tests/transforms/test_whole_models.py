"""The package's own stateful layers in one model, through every transform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.quick import quickly


def model():
    nn.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Lambda(lambda x: jnp.tanh(x)),
        nn.Dropout(0.5),
        nn.Linear(6, 2),
    )


X = jnp.asarray(np.random.RandomState(0).randn(8, 4).astype(np.float32))


def loss(m, x):
    return jnp.mean(m(x) ** 2)


def state(m):
    return {k: np.asarray(v) for k, v in m.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=1e-5, atol=1e-6, err_msg=k)


HOW = {
    "nn.jit": lambda f: nn.jit(f),
    "nn.remat": lambda f: nn.remat(f),
    "jit of remat": lambda f: nn.jit(nn.remat(f)),
}


@pytest.mark.parametrize("how", HOW)
def test_value_state_and_stream_are_those_of_the_eager_call(how):
    m = model()
    nn.manual_seed(7)
    eager = [float(loss(m, X)) for _ in range(2)]
    expected, stream = state(m), np.asarray(nn.get_rng_state())
    m = model()
    nn.manual_seed(7)
    f = HOW[how](loss)
    np.testing.assert_allclose([float(f(m, X)) for _ in range(2)], eager, rtol=1e-5)
    same(state(m), expected)
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), stream)


def test_the_gradient_is_that_of_the_pure_function_with_the_same_masks():
    m = model()
    fn, params, buffers = nn.functionalize(m, mutable=True)
    key = jax.random.key(3)

    def pure(p):
        out, _ = fn(p, buffers, X, rng=key)
        return jnp.mean(out**2)

    expected = quickly(jax.grad(pure))(params)
    with nn.rng_scope(key):
        grads = nn.grad(loss)(m, X)
    assert set(grads) == set(expected)
    for name in grads:
        np.testing.assert_allclose(
            np.asarray(grads[name]), np.asarray(expected[name]), rtol=1e-4, atol=1e-6
        )


def test_eval_mode_is_one_pure_function_under_every_raw_transform():
    m = model().eval()
    expected = np.asarray(m(X))
    for out in (
        jax.jit(lambda m, x: m(x))(m, X),
        jax.jit(lambda m, x: jax.vmap(lambda v: m(v[None])[0])(x))(m, X),
        jax.checkpoint(lambda m, x: m(x))(m, X),
        nn.functionalize(m)[0](nn.functionalize(m)[1], X),
    ):
        np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-6)


def test_training_mode_raises_under_every_raw_transform():
    m = model()
    before = state(m)
    for raw in (jax.jit, jax.checkpoint, lambda f: jax.vmap(f, in_axes=(None, 0))):
        x = X if raw in (jax.jit, jax.checkpoint) else X[None]
        with pytest.raises(nn.StatefulnnError):
            raw(lambda m, x: m(x))(m, x)
    same(state(m), before)


def test_a_training_run_in_nn_scan_is_the_run_in_a_loop():
    import optax

    xs = jnp.stack([X, X * 0.5, X - 1])

    def step(carry, x):
        m, opt = carry
        value, grads = nn.value_and_grad(loss)(m, x)
        opt.step(grads)
        return carry, value

    m = model()
    carry = (m, nn.Optimizer(m, optax.sgd(1e-2)))
    nn.manual_seed(1)
    looped = [float(step(carry, x)[1]) for x in xs]
    expected = state(m)
    m = model()
    nn.manual_seed(1)
    _, scanned = nn.scan(step, (m, nn.Optimizer(m, optax.sgd(1e-2))), xs)
    np.testing.assert_allclose(np.asarray(scanned), looped, rtol=1e-4)
    same(state(m), expected)


def test_an_ensemble_built_and_trained_under_nn_vmap():
    nn.manual_seed(0)
    models = nn.vmap(lambda _: model_without_seed(), axis_size=3)(jnp.arange(3))
    assert models[0].weight.shape == (3, 6, 4)
    assert not np.array_equal(np.asarray(models[0].weight[0]), np.asarray(models[0].weight[1]))

    @nn.jit
    def step(models, x):
        return nn.vmap(nn.value_and_grad(loss), in_axes=(0, None))(models, x)

    values, grads = step(models, X)
    assert values.shape == (3,)
    assert grads["0.weight"].shape == (3, 6, 4)
    np.testing.assert_array_equal(np.asarray(models[1].num_batches_tracked), [1, 1, 1])
    assert models[1].running_mean.shape == (3, 6)


def model_without_seed():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)
    )
