"""The gradient noise scale against numpy, and what its estimators expect."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.errors import DtypeError, MissingRngError, ShapeError, StateWriteError
from tests.precision import in_float64
from tests.quick import first


def by_numpy(flat):
    """The estimators as written down: flat (N, P) gradients in double precision."""
    flat = np.asarray(flat, np.float64)
    covariance = np.cov(flat, rowvar=False).reshape(flat.shape[1], -1)
    trace = np.trace(covariance)
    squared = flat.mean(0) @ flat.mean(0) - trace / len(flat)
    return trace / squared if squared > 0 else np.inf, squared, trace


def mse(model, x, y):
    return F.mse_loss(model(x), y)


def data(n=12):
    x = jax.random.normal(jax.random.key(0), (n, 3))
    return x, x[:, :1] + jax.random.normal(jax.random.key(1), (n, 1))


def test_estimates_are_those_of_numpy():
    a, b = np.random.randn(9, 2, 3) + 1, np.random.randn(9, 4) * 2
    got = curvature.gradient_noise_scale({"a": jnp.asarray(a, jnp.float32), "b": jnp.float32(b)})
    want = by_numpy(np.concatenate([a.reshape(9, -1), b], 1))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got.noise_scale == got[0] and got.trace == got[2]


def test_small_variance_beside_a_large_mean_is_not_lost():
    g = 1000 + 0.1 * np.random.randn(50, 3)
    given = jnp.asarray(g, jnp.float32)
    want = by_numpy(np.asarray(given))
    np.testing.assert_allclose(curvature.gradient_noise_scale(given)[2], want[2], rtol=1e-3)
    # The same through blocks of a loss whose gradients these are.
    of_loss = curvature.noise_scale_of(lambda p, x: p @ x, jnp.zeros(3), given, batch_size=7)
    np.testing.assert_allclose(of_loss, want, rtol=1e-3)


def test_a_gradient_that_drowns_in_noise_gives_an_infinite_scale():
    scale = curvature.gradient_noise_scale({"w": jnp.array([[1.0], [-1.0]])})
    assert scale.gradient_squared == -1.0 and scale.trace == 2.0
    assert scale.noise_scale == jnp.inf
    assert curvature.gradient_noise_scale(jnp.zeros((3, 2))).noise_scale == jnp.inf


@pytest.mark.parametrize("batch_size", first(2, [5, None, 1, 50]))
def test_blocks_of_examples_give_the_estimates_of_all(batch_size):
    model, (x, y) = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), data()
    fn, params = nn.functionalize(model)
    loss = lambda p, x, y: F.mse_loss(fn(p, x), y)
    slope = jax.jit(lambda *row: jax.flatten_util.ravel_pytree(jax.grad(loss)(params, *row))[0])
    rows = [slope(*row) for row in zip(x, y, strict=True)]
    of = lambda p, x, y: curvature.noise_scale_of(loss, p, x, y, batch_size=batch_size)
    got = jax.jit(of)(params, x, y)
    np.testing.assert_allclose(got, by_numpy(rows), rtol=1e-4)


def test_a_module_is_differentiated_by_its_trainable_parameters():
    model, (x, y) = nn.Linear(3, 1), data()
    model.bias.requires_grad_(False)
    rows = [2 * (model(r) - t) * r for r, t in zip(x, y, strict=True)]
    got = curvature.noise_scale_of(mse, model, x, y)
    np.testing.assert_allclose(got, by_numpy(rows), rtol=1e-4)
    compiled = nn.jit(lambda m, *data: curvature.noise_scale_of(mse, m, *data, batch_size=5))
    np.testing.assert_allclose(compiled(model, x, y), by_numpy(rows), rtol=1e-4)


def test_both_estimators_are_unbiased():
    # Gradients from N(G, Σ) with |G|² = 4 and tr Σ = 6: the averages of many estimates come near.
    key, n, times = jax.random.key(0), 8, 20_000
    std = jnp.sqrt(jnp.array([1.0, 2.0, 3.0]))
    g = jnp.array([2.0, 0.0, 0.0]) + std * jax.random.normal(key, (times, n, 3))
    one = jax.vmap(curvature.gradient_noise_scale)(g)
    np.testing.assert_allclose([one.gradient_squared.mean(), one.trace.mean()], [4, 6], rtol=0.02)
    small = jnp.sum(g[:, :2].mean(1) ** 2, -1)
    big = jnp.sum(g.mean(1) ** 2, -1)
    two = jax.vmap(lambda s, b: curvature.noise_scale_from_batches(s, b, 2, 8))(small, big)
    np.testing.assert_allclose([two.gradient_squared.mean(), two.trace.mean()], [4, 6], rtol=0.02)


def test_estimate_from_two_batches_solves_its_two_equations():
    # E|G_B|² = |G|² + tr Σ / B at both sizes.
    squared, trace = 0.7, 12.0
    small, big = squared + trace / 3, squared + trace / 40
    got = curvature.noise_scale_from_batches(small, big, 3, 40)
    np.testing.assert_allclose(got, (trace / squared, squared, trace), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    g = jnp.asarray(np.random.randn(6, 5000) * 3, dtype)
    got = curvature.gradient_noise_scale(g)
    assert got.trace.dtype == jnp.float32
    np.testing.assert_allclose(got, by_numpy(np.asarray(g, np.float64)), rtol=1e-3)


def test_mixed_precisions_are_summed_in_the_widest():
    with in_float64():
        g = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.asarray(np.random.randn(3, 2))}
        got = curvature.gradient_noise_scale(g)
        assert got.trace.dtype == jnp.float64
        want = by_numpy(np.concatenate([np.ones((3, 2)), g["b"]], 1))
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ShapeError, match="given 1 examples"):
        curvature.gradient_noise_scale({"w": jnp.ones((1, 3))})
    with pytest.raises(ShapeError, match="one N"):
        curvature.gradient_noise_scale({"w": jnp.ones((2, 3)), "b": jnp.ones((3,))})
    with pytest.raises(ShapeError, match="a number"):
        curvature.gradient_noise_scale({"w": jnp.ones(())})
    with pytest.raises(DtypeError, match="'w' of dtype int32"):
        curvature.gradient_noise_scale({"w": jnp.ones((2,), jnp.int32)})
    with pytest.raises(FloatingPointError, match="not finite"):
        curvature.gradient_noise_scale({"w": jnp.array([1.0, jnp.nan])})
    for sizes in ((4, 4), (5, 4), (0, 4)):
        with pytest.raises(ValueError, match="small="):
            curvature.noise_scale_from_batches(1.0, 1.0, *sizes)
    model, (x, y) = nn.Linear(3, 1), data()
    for batch in (1, 0):
        with pytest.raises(ShapeError, match=f"{batch} examples"):
            curvature.noise_scale_of(mse, model, x[:batch], y[:batch])
    with pytest.raises(ValueError, match="batch_size=-1"):
        curvature.noise_scale_of(mse, model, x, y, batch_size=-1)
    with pytest.raises(TypeError, match="loss of type Linear|no examples"):
        curvature.noise_scale_of(mse, model)


def test_modules_that_write_or_draw_are_refused():
    x, y = data()
    writes = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    with pytest.raises(StateWriteError):  # pairs of examples: BatchNorm wants two
        curvature.noise_scale_of(mse, writes, jnp.stack([x, x], 1), jnp.stack([y, y], 1))
    draws = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
    with pytest.raises(MissingRngError):
        curvature.noise_scale_of(mse, draws, x, y)
    assert int(writes[1].num_batches_tracked) == 0
