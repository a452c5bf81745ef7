"""Influence functions against leave-one-out retraining, in closed form and by Newton's method."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from tests.precision import in_float64

EXACT = {"tol": 1e-13, "max_steps": 5000}


def linear(weights, outputs=1):
    """A linear layer with the bias first in `weights`, (1 + features, outputs)."""
    model = nn.Linear(weights.shape[0] - 1, outputs, dtype=jnp.float64)
    model.weight.value, model.bias.value = jnp.asarray(weights[1:].T), jnp.asarray(weights[0])
    return model


def with_ones(x):
    return np.concatenate([np.ones((len(x), 1)), x], 1)


def test_scores_of_ridge_regression_are_leave_one_out_retraining_up_to_the_leverage():
    """Without example n the parameters move by ``H⁻¹ gₙ / N`` over ``1 - hₙ``, exactly."""
    with in_float64():
        rng = np.random.default_rng(0)
        n, penalty = 30, 0.2
        x, new = rng.normal(size=(n, 4)), rng.normal(size=(6, 4))
        y, of_new = x[:, 0] + 0.3 * rng.normal(size=n), new[:, 0]
        design, of_test = with_ones(x), with_ones(new)

        def fitted(keep):
            a = design[keep]
            matrix = 2 / n * a.T @ a + penalty * np.eye(5)
            return np.linalg.solve(matrix, 2 / n * a.T @ y[keep])

        w = fitted(np.arange(n))
        scores = curvature.influence(
            linear(w[:, None]),
            F.mse_loss,
            (x, y[:, None]),
            (new, of_new[:, None]),
            damping=penalty,
            **EXACT,
        )
        inverse = np.linalg.inv(2 / n * design.T @ design + penalty * np.eye(5))
        leverage = 2 / n * np.einsum("np,pq,nq->n", design, inverse, design)
        slope = 2 / 6 * of_test.T @ (of_test @ w - of_new)
        moves = np.stack([fitted(np.delete(np.arange(n), i)) - w for i in range(n)])
        np.testing.assert_allclose(scores / (1 - leverage), moves @ slope, rtol=1e-8, atol=1e-12)


def blobs(n, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return spread * rng.normal(size=(n, 2)) + 2.0 * y[:, None], y


def logistic(x, y, penalty, weights=None):
    """The minimum of the mean cross-entropy plus ``penalty/2 |w|²``, (3, 2), by Newton's method."""
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights
    design = with_ones(x)

    def loss(w):
        logits = design @ w.reshape(3, 2)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]
        return -jnp.sum(weights * picked) + penalty / 2 * jnp.sum(w**2)

    def step(_, w):
        return w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w))

    return jax.lax.fori_loop(0, 12, step, jnp.zeros(6)).reshape(3, 2)


def test_scores_of_logistic_regression_predict_leave_one_out_retraining():
    with in_float64():
        n, penalty = 24, 0.05
        (x, y), (new, of_new) = blobs(n), blobs(10, seed=1)
        w = logistic(x, y, penalty)

        def test_loss(w):
            logits = with_ones(new) @ w
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), of_new[:, None], 1))

        retrained = jax.jit(jax.vmap(lambda keep: test_loss(logistic(x, y, penalty, keep / n))))
        changes = retrained(1 - jnp.eye(n)) - test_loss(w)
        model, data = linear(w, 2), ((x, y), (new, of_new))
        scores = curvature.influence(model, F.cross_entropy, *data, damping=penalty, **EXACT)
        assert np.corrcoef(scores, changes)[0, 1] > 0.95
        # They are the derivative by an example's weight.
        step = 1e-4 * jnp.eye(n)
        slopes = (retrained(1 - step) - retrained(1 + step)) / 2e-4
        np.testing.assert_allclose(scores, slopes, rtol=1e-6, atol=1e-10)
        # A softmax of a linear model: both matrices are the same.
        by_hessian = curvature.influence(
            model, F.cross_entropy, *data, damping=penalty, curvature="hessian", **EXACT
        )
        np.testing.assert_allclose(by_hessian, scores, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("subset", [pytest.param("all", marks=pytest.mark.long), "2.*"])
def test_scores_of_a_network_are_those_of_dense_matrices(subset):
    with in_float64():
        nn.manual_seed(0)
        layers = nn.Linear(2, 4, dtype=jnp.float64), nn.Tanh(), nn.Linear(4, 2, dtype=jnp.float64)
        model = nn.Sequential(*layers)
        (x, y), (new, of_new) = blobs(12), blobs(5, seed=1)
        one = lambda m, x, y: F.cross_entropy(m(x[None]), y[None])
        A = curvature.empirical_fisher(model, F.cross_entropy, (x, y), subset=subset)

        def rows(x, y):
            gradients = nn.func.per_sample_grad(one)(model, jnp.asarray(x), jnp.asarray(y))
            return jax.vmap(A.flatten)({name: gradients[name] for name in A.in_structure})

        matrix = A.to_dense() + 0.1 * np.eye(A.shape[0])
        want = rows(new, of_new) @ np.linalg.solve(matrix, rows(x, y).T) / 12
        options = {"damping": 0.1, "curvature": "empirical_fisher", "subset": subset, **EXACT}

        @jax.jit
        def scores(train, test):
            of_each = curvature.influence(model, F.cross_entropy, train, test, each=True, **options)
            return of_each, curvature.influence(
                model, F.cross_entropy, train, test, batch_size=5, **options
            )

        each, mean = scores((x, y), (new, of_new))
        np.testing.assert_allclose(each, want, rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(mean, want.mean(0), rtol=1e-7, atol=1e-10)
        batches = [(x[:5], y[:5]), (x[5:], y[5:])]
        again = curvature.influence(model, F.cross_entropy, batches, [(new, of_new)], **options)
        np.testing.assert_allclose(again, mean, rtol=1e-7, atol=1e-10)


def test_wrong_labels_harm_most():
    with in_float64():
        x, y = blobs(60, spread=0.4)
        wrong = [3, 14, 27, 40]
        y[wrong] = 1 - y[wrong]
        new, of_new = blobs(40, seed=1, spread=0.4)
        model = linear(logistic(x, y, 0.01), 2)
        scores = curvature.influence(model, F.cross_entropy, (x, y), (new, of_new), damping=0.01)
        assert sorted(np.argsort(scores)[:4]) == wrong


def test_bad_curvature_is_reported():
    model, x = nn.Linear(2, 2), jnp.ones((4, 2))
    data = (x, jnp.zeros(4, int))
    with pytest.raises(ValueError, match="curvature='kfac'"):
        curvature.influence(model, F.cross_entropy, data, data, curvature="kfac")
    with pytest.raises(nn.ConvergenceError, match="damped"):
        curvature.influence(model, F.cross_entropy, data, data, damping=-10.0, curvature="hessian")
