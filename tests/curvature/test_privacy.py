"""DP-SGD's gradients: clipping, noise, blocks; against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.errors import DtypeError, MissingRngError, ShapeError, StateWriteError
from tests.quick import first


def by_numpy(gradients, max_norm):
    """Clip each row of double precision gradients (N, P): rows, norms."""
    rows = np.asarray(gradients, np.float64)
    norms = np.linalg.norm(rows, axis=1)
    return rows / np.maximum(1, norms / max_norm)[:, None], norms


def some_gradients(n=7):
    a, b = np.random.randn(n, 2, 3), np.random.randn(n, 4)
    tree = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return tree, np.concatenate([tree["a"].reshape(n, -1), tree["b"]], 1)


def flat(tree):
    return np.concatenate([np.ravel(v) for v in (tree["a"], tree["b"])])


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("max_norm", [0.5, 3.0, 100.0])
def test_clipping_is_the_formula(reduce, max_norm):
    tree, rows = some_gradients()
    got = curvature.clip_per_example(tree, max_norm, reduce=reduce)
    clipped, norms = by_numpy(rows, max_norm)
    np.testing.assert_allclose(
        flat(got.gradients), getattr(clipped, reduce)(0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(got.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(got.share, (norms > max_norm).mean(), rtol=1e-6)


limit = float(np.float32(1e22))  # squares overflow float32, and underflow at the other end
finite = st.floats(-limit, limit, width=32)


@settings(max_examples=60, deadline=None)
@given(
    rows=hnp.arrays(np.float32, (3, 4), elements=finite),
    max_norm=st.floats(1e-12, 1e12),
)
def test_no_example_counts_for_more_than_max_norm(rows, max_norm):
    for row in rows:
        got = curvature.clip_per_example(jnp.asarray(row)[None], max_norm, reduce="sum")
        length = np.linalg.norm(np.asarray(got.gradients, np.float64))
        assert length <= max_norm * (1 + 1e-5)
        original = np.linalg.norm(row.astype(np.float64))
        # Shortened to max_norm or left alone, and not turned; XLA takes subnormals for zeros.
        np.testing.assert_allclose(length, min(original, max_norm), rtol=1e-5, atol=1e-36)
        np.testing.assert_allclose(got.norms[0], original, rtol=1e-5, atol=1e-36)


def test_zero_gradients_stay_zero():
    got = curvature.clip_per_example({"w": jnp.zeros((4, 3))}, 1.0)
    np.testing.assert_array_equal(got.gradients["w"], np.zeros(3))
    np.testing.assert_array_equal(got.norms, np.zeros(4))
    assert got.share == 0.0
    slope = jax.grad(lambda g: curvature.clip_per_example(g, 1.0).gradients.sum())(jnp.ones((2, 3)))
    assert np.isfinite(slope).all()


def test_a_gradient_at_the_limit_is_not_counted_as_shortened():
    got = curvature.clip_per_example(jnp.array([[3.0, 4.0]]), 5.0)
    np.testing.assert_array_equal(got.gradients, [3.0, 4.0])
    assert got.share == 0.0


def test_gradients_keep_their_dtype_and_are_summed_in_float32():
    g = jnp.full((1000, 2), 0.01, jnp.bfloat16)
    got = curvature.clip_per_example({"w": g}, 1.0, reduce="sum")
    assert got.gradients["w"].dtype == jnp.bfloat16 and got.norms.dtype == jnp.float32
    want = np.asarray(g, np.float64).sum(0)
    np.testing.assert_allclose(np.asarray(got.gradients["w"], np.float64), want, rtol=2**-8)


def loss(params, x, y):
    return jnp.sum((params["w"] @ x + params["b"] - y) ** 2)


def problem(n=10):
    keys = jax.random.split(jax.random.key(3), 4)
    params = {"w": jax.random.normal(keys[0], (2, 3)), "b": jax.random.normal(keys[1], (2,))}
    return params, jax.random.normal(keys[2], (n, 3)), jax.random.normal(keys[3], (n, 2))


def rows_of(params, x, y):
    return {
        n: np.asarray(g) for n, g in jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y).items()
    }


@pytest.mark.parametrize("batch_size", first(3, [None, 4, 99, 1, 5, 10]))
def test_blocks_give_the_sum_over_all_examples(batch_size):
    params, x, y = problem()
    rows = rows_of(params, x, y)
    stacked = np.concatenate([rows["w"].reshape(10, -1), rows["b"]], 1)
    clipped, norms = by_numpy(stacked, 9.0)
    private = curvature.dp_gradients(loss, 9.0, 0.0, batch_size=batch_size, has_norms=True)
    got, got_norms = jax.jit(private)(params, x, y)
    assert (norms > 9).any() and (norms < 9).any()
    np.testing.assert_allclose(got["w"], clipped.mean(0)[:6].reshape(2, 3), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["b"], clipped.mean(0)[6:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got_norms, norms, rtol=1e-5)


def test_without_clipping_and_noise_it_is_the_gradient_of_the_mean():
    params, x, y = problem()
    mean = lambda p: jax.vmap(loss, (None, 0, 0))(p, x, y).mean()
    got = curvature.dp_gradients(loss, 1e6, 0)(params, x, y)
    want = jax.grad(mean)(params)
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_noise_has_the_stated_deviation_and_its_own_numbers_everywhere():
    n, lot, max_norm, multiplier = 5, 7, 0.3, 1.5
    params = {"w": jnp.zeros((200, 300)), "b": jnp.zeros((200, 300))}
    private = curvature.dp_gradients(
        lambda p, x: 0.0 * (p["w"].sum() + p["b"].sum()) * x, max_norm, multiplier, lot_size=lot
    )
    got = private(params, jnp.ones(n), rng=jax.random.key(0))
    std = multiplier * max_norm / lot
    for name in params:
        np.testing.assert_allclose(np.std(got[name]), std, rtol=0.02)
        assert abs(np.mean(got[name])) < 4 * std / np.sqrt(got[name].size)
    assert not np.allclose(got["w"], got["b"])
    again = private(params, jnp.ones(n), rng=jax.random.key(0))
    np.testing.assert_array_equal(again["w"], got["w"])
    assert not np.allclose(private(params, jnp.ones(n), rng=jax.random.key(1))["w"], got["w"])


def test_noise_is_added_once_and_not_for_each_block():
    params, x, y = problem(400)
    key = jax.random.key(0)
    few, many = (
        jax.jit(curvature.dp_gradients(loss, 1.0, 2.0, batch_size=b))(params, x, y, rng=key)
        for b in (None, 7)
    )
    np.testing.assert_allclose(few["w"], many["w"], rtol=1e-4, atol=1e-5)


def test_a_module_gives_gradients_by_name():
    model, (_, x, y) = nn.Linear(3, 2), problem()
    model.bias.requires_grad_(False)
    private = curvature.dp_gradients(lambda m, x, y: F.mse_loss(m(x), y), 0.5, 0.0)
    got = private(model, x, y)
    assert list(got) == ["weight"]
    outer = np.stack([np.outer(model(a) - b, a) for a, b in zip(x, y, strict=True)])
    clipped, _ = by_numpy(outer.reshape(10, -1), 0.5)
    np.testing.assert_allclose(got["weight"], clipped.mean(0).reshape(2, 3), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(nn.jit(private)(model, x, y)["weight"], got["weight"], rtol=1e-5)


def test_keys_are_examples_like_others():
    model, x = nn.Sequential(nn.Linear(40, 1, bias=False), nn.Dropout(0.5)), jnp.ones((30, 40))

    def loss(model, x, key):
        with nn.rng_scope(key):
            return model(x).sum()

    keys = jax.random.split(jax.random.key(0), 30)
    got, norms = curvature.dp_gradients(loss, 100.0, 0, batch_size=7, has_norms=True)(
        model, x, keys
    )
    kept = np.isclose(norms, 2 * np.sqrt(40))  # its own mask for each example
    assert 5 <= kept.sum() <= 25 and np.isclose(norms, 0)[~kept].all()
    np.testing.assert_allclose(got["0.weight"], 2 * kept.mean(), rtol=1e-5)
    with pytest.raises(MissingRngError, match="of one example"):
        curvature.dp_gradients(lambda m, x: m(x).sum(), 1.0, 0)(model, x)


def test_it_runs_in_a_scan_over_steps():
    params, x, y = problem()
    private = curvature.dp_gradients(loss, 1.0, 0.1)

    @jax.jit
    def train(params, keys):
        def step(params, key):
            grads = private(params, x, y, rng=key)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

        return jax.lax.scan(step, params, keys)[0]

    before = jax.vmap(loss, (None, 0, 0))(params, x, y).mean()
    after = jax.vmap(loss, (None, 0, 0))(
        train(params, jax.random.split(jax.random.key(0), 50)), x, y
    )
    assert after.mean() < 0.7 * before


def test_an_empty_lot_is_noise_alone():
    params, x, y = problem()
    private = curvature.dp_gradients(loss, 1.0, 1.0, lot_size=4)
    got = private(params, x[:0], y[:0], rng=jax.random.key(0))
    noise = private(params, x[:0], y[:0], rng=jax.random.key(1))
    assert np.isfinite(got["w"]).all() and not np.allclose(got["w"], noise["w"])
    silent, norms = curvature.dp_gradients(loss, 1.0, 0, lot_size=4, has_norms=True)(
        params, x[:0], y[:0]
    )
    np.testing.assert_array_equal(silent["w"], np.zeros((2, 3)))
    assert norms.shape == (0,)
    with pytest.raises(ShapeError, match="0 examples"):
        curvature.dp_gradients(loss, 1.0, 0)(params, x[:0], y[:0])


def test_what_is_wrong_is_named():
    params, x, y = problem()
    key = jax.random.key(0)
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="max_norm="):
            curvature.dp_gradients(loss, bad, 1.0)
        with pytest.raises(ValueError, match="max_norm="):
            curvature.clip_per_example(jnp.ones((2, 2)), bad)
    for bad in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="noise_multiplier="):
            curvature.dp_gradients(loss, 1.0, bad)
    with pytest.raises(ValueError, match="lot_size=0"):
        curvature.dp_gradients(loss, 1.0, 1.0, lot_size=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        curvature.dp_gradients(loss, 1.0, 1.0, batch_size=0)
    with pytest.raises(ValueError, match="reduce='max'"):
        curvature.clip_per_example(jnp.ones((2, 2)), 1.0, reduce="max")
    with pytest.raises(MissingRngError, match="without rng"):
        curvature.dp_gradients(loss, 1.0, 1.0)(params, x, y)
    with pytest.raises(TypeError, match="no examples"):
        curvature.dp_gradients(loss, 1.0, 1.0)(params, rng=key)
    with pytest.raises(ShapeError, match="one N"):
        curvature.dp_gradients(loss, 1.0, 1.0)(params, x, y[:3], rng=key)
    with pytest.raises(DtypeError, match="'w' of dtype int32"):
        curvature.dp_gradients(loss, 1.0, 1.0)({"w": jnp.ones(2, jnp.int32)}, x, y, rng=key)
    with pytest.raises(TypeError, match="loss of type float"):
        curvature.dp_gradients(1.0, 1.0, 1.0)(params, x, y, rng=key)
    with pytest.raises(ShapeError, match="0 examples"):
        curvature.clip_per_example(jnp.ones((0, 2)), 1.0)
    with pytest.raises(FloatingPointError, match="not finite"):
        curvature.clip_per_example(jnp.array([[jnp.nan], [1.0]]), 1.0)
    with pytest.raises(FloatingPointError, match="not finite"):
        curvature.dp_gradients(loss, 1.0, 0)(params, x.at[3].set(jnp.inf), y)


def test_batch_norm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    one = lambda m, x, y: F.mse_loss(m(jnp.stack([x, x])), jnp.stack([y, y]))
    _, x, y = problem()
    with pytest.raises(StateWriteError):
        curvature.dp_gradients(one, 1.0, 0)(model, x, y)
    assert int(model[1].num_batches_tracked) == 0
    assert curvature.dp_gradients(one, 1.0, 0)(model.eval(), x, y)["0.weight"].shape == (2, 3)
