"""Evolution strategies: exact gradients of quadratic objectives, in expectation, are the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.quick import quickly


def test_a_linear_objective_in_one_dimension_has_the_exact_slope_on_average():
    # Each pair gives slope * e^2 / sigma^2, whose mean is the slope and whose variance is 2 slope^2.
    _, grads = nn.meta.es_gradient(
        lambda w: -4.0 * w, jnp.asarray(1.0), key=jax.random.key(0), sigma=0.1, pairs=20_000
    )
    assert abs(float(grads) + 4.0) < 5 * 4.0 * np.sqrt(2 / 20_000)


def test_even_terms_cancel_in_every_pair():
    # At the minimum of an even function both signs give the same value, so the estimate is zero.
    _, grads = nn.meta.es_gradient(
        lambda p: (p["w"] ** 2).sum(), {"w": jnp.zeros(3)}, key=jax.random.key(1), pairs=4
    )
    np.testing.assert_array_equal(grads["w"], 0.0)


def test_the_estimate_points_along_the_gradient_and_has_its_length():
    a = jnp.asarray(np.random.default_rng(0).standard_normal((5, 5)), jnp.float32)
    f = lambda w: 0.5 * w @ a @ a.T @ w
    w = jnp.arange(5.0)
    value, grads = nn.meta.es_gradient(f, w, key=jax.random.key(2), sigma=0.05, pairs=20_000)
    expected = jax.grad(f)(w)
    assert float(jnp.linalg.norm(grads - expected)) < 0.05 * float(jnp.linalg.norm(expected))
    np.testing.assert_allclose(value, f(w), rtol=0.01)


def test_a_step_function_has_a_gradient_when_it_is_smoothed():
    # The mean of [w + s e > 0] is the normal distribution function at w / s.
    _, grads = nn.meta.es_gradient(
        lambda w: (w > 0).astype(jnp.float32),
        jnp.asarray(0.1),
        key=jax.random.key(0),
        sigma=0.2,
        pairs=50_000,
    )
    density = np.exp(-0.5 * 0.5**2) / np.sqrt(2 * np.pi) / 0.2
    assert abs(float(grads) - density) < 0.1


def test_it_runs_under_jit_and_vmap():
    f = jax.jit(
        jax.vmap(lambda w, key: nn.meta.es_gradient(lambda w: w**2, w, key=key, pairs=8)[1])
    )
    assert f(jnp.ones(3), jax.random.split(jax.random.key(0), 3)).shape == (3,)


def accumulate(steps, length, pairs, key):
    """PES over one unroll of x <- x + theta, loss x after each piece of one step."""
    piece = lambda theta, x: (x + theta, x + theta)
    theta = jnp.asarray(0.5)
    pes = nn.meta.pes_init(jnp.asarray(0.0), theta, pairs)
    total = 0.0
    for i in range(steps):
        _, grads, pes = nn.meta.pes_gradient(
            piece, theta, pes, key=jax.random.fold_in(key, i), sigma=0.1
        )
        total += float(grads)
    return total, pes


def test_persistent_evolution_strategies_see_the_whole_past():
    # The loss after step t is t * theta: the gradient of the sum over T steps is T (T + 1) / 2. A
    # truncated gradient, one step at a time, would be T.
    steps, pairs = 6, 20_000
    total, pes = accumulate(steps, 1, pairs, jax.random.key(0))
    assert abs(total - steps * (steps + 1) / 2) < 0.05 * steps * (steps + 1) / 2
    assert pes.states.shape == (2 * pairs,)
    # What each pair has been perturbed by so far.
    np.testing.assert_allclose(pes.states[:pairs] - pes.states[pairs:], 0.0, atol=20.0)


def test_both_signs_of_a_pair_keep_their_own_states():
    piece = lambda theta, x: (x.sum(), x + theta)
    theta = jnp.zeros(3)
    pes = nn.meta.pes_init(jnp.zeros(3), theta, 5)
    for i in range(3):
        _, _, pes = nn.meta.pes_gradient(piece, theta, pes, key=jax.random.key(i), sigma=0.1)
    np.testing.assert_allclose(pes.states[:5], pes.sums, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(pes.states[5:], -pes.sums, rtol=1e-5, atol=1e-7)


def test_bad_input_is_refused():
    f = lambda w: w.sum()
    with pytest.raises(nn.MissingRngError, match="without a random key"):
        nn.meta.es_gradient(f, jnp.ones(2))
    with pytest.raises(nn.DtypeError, match=r"params\['n'\] of dtype int32"):
        nn.meta.es_gradient(f, {"n": jnp.ones(2, jnp.int32)}, key=0)
    with pytest.raises(ValueError, match="sigma"):
        nn.meta.es_gradient(f, jnp.ones(2), key=0, sigma=0.0)
    with pytest.raises(ValueError, match="pairs"):
        nn.meta.es_gradient(f, jnp.ones(2), key=0, pairs=0)


def test_sigma_may_be_traced():
    f = lambda w: (w**3).sum()
    w = jnp.array([1.0, -2.0])
    es = lambda sigma: nn.meta.es_gradient(f, w, key=0, sigma=sigma)
    pes = nn.meta.pes_init(w, w, 4)
    piece = lambda theta, x: ((x * theta).sum(), x + theta)
    step = lambda sigma: nn.meta.pes_gradient(piece, w, pes, key=0, sigma=sigma)
    both = lambda sigma: (*es(sigma), *step(sigma)[:2])
    for traced, given in zip(quickly(both)(0.1), both(0.1), strict=True):
        np.testing.assert_allclose(traced, given, rtol=1e-5)


def test_an_unroll_starts_again_where_it_is_done():
    """PES is a pytree: a selection between it and a fresh one restarts all particles."""
    start, theta = jnp.zeros(2), jnp.zeros(2)
    fresh = nn.meta.pes_init(start, theta, 3)
    piece = lambda theta, x: (x.sum(), x + theta + 1)

    def step(pes, i):
        pes = jax.tree.map(lambda a, b: jnp.where(i % 2 == 0, a, b), fresh, pes)
        _, _, pes = nn.meta.pes_gradient(piece, theta, pes, key=jax.random.key(i), report=False)
        return pes, pes.states.mean()

    _, means = jax.lax.scan(step, fresh, jnp.arange(6))
    np.testing.assert_allclose(means, [1, 2, 1, 2, 1, 2], rtol=1e-5)


def test_a_particle_that_diverges_is_reported():
    diverge = lambda **options: nn.meta.es_gradient(
        lambda w: jnp.log(w), jnp.asarray(-1.0), key=0, pairs=2, **options
    )
    with pytest.warns(nn.errors.DivergenceWarning, match="particles 0, 1, 2, 3 of 4 diverged"):
        diverge()
        jax.effects_barrier()
    diverge(report=False)  # a warning would be an error here
    jax.effects_barrier()


@pytest.mark.parametrize(
    ("dtype", "sigma", "at"),
    [("float16", 1e-2, 1.0), ("float16", 1e-4, 0.01), ("float32", 1e-24, 0.0)],
)
def test_the_slope_of_a_line_is_estimated_with_a_small_sigma(dtype, sigma, at):
    w = jnp.asarray(at, dtype)
    line = lambda w: 3 * w.astype(jnp.float32)
    _, slope = nn.meta.es_gradient(line, w, key=jax.random.key(0), sigma=sigma, pairs=2000)
    # The mean of 3 e^2 over 2000 pairs has a standard deviation of 0.1.
    assert abs(float(slope) - 3) < 0.4
    assert slope.dtype == dtype


def test_perturbations_that_round_to_nothing_are_an_error():
    with pytest.raises(nn.DtypeError, match="(?s)es_gradient.*round to nothing.*larger sigma"):
        nn.meta.es_gradient(lambda w: w, jnp.ones(()), key=jax.random.key(0), sigma=1e-12)
    pes = nn.meta.pes_init(jnp.zeros(()), jnp.ones(()), pairs=2)
    with pytest.raises(nn.DtypeError, match="pes_gradient.*round to nothing"):
        nn.meta.pes_gradient(
            lambda w, x: (w, x), jnp.ones(()), pes, key=jax.random.key(0), sigma=1e-12
        )
