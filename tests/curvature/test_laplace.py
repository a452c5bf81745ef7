"""The Laplace approximation against exact Bayesian inference and dense matrices in double precision."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.core.errors import MissingRngError, ShapeError, StateWriteError, UnknownNameError
from statefulnn.curvature import Laplace
from tests.precision import in_float64


def linear_problem(n=30, d=3, seed=0):
    """A linear regression in double precision, with one of its ridge solutions as the model."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = x @ rng.normal(size=d) + 0.7 + 0.3 * rng.normal(size=n)
    return x, y


def exact(x, y, alpha, sigma):
    """Posterior and log evidence of y = X w + b, w and b ~ N(0, 1/alpha): Bishop, section 3.3."""
    design = np.concatenate([np.ones((len(x), 1)), x], 1)  # b, w: the order of the names
    precision = alpha * np.eye(design.shape[1]) + design.T @ design / sigma**2
    mean = np.linalg.solve(precision, design.T @ y / sigma**2)
    marginal = sigma**2 * np.eye(len(x)) + design @ design.T / alpha
    evidence = -0.5 * (
        y @ np.linalg.solve(marginal, y)
        + np.linalg.slogdet(marginal)[1]
        + len(x) * np.log(2 * np.pi)
    )
    return mean, np.linalg.inv(precision), evidence


def fitted(x, y, mean, **options):
    model = nn.Linear(x.shape[1], 1, dtype=jnp.float64)
    model.bias.value, model.weight.value = jnp.asarray(mean[:1]), jnp.asarray(mean[None, 1:])
    return Laplace.fit(model, x, y[:, None], likelihood="regression", **options)


@pytest.mark.parametrize("alpha, sigma", [(1.0, 1.0), (0.05, 0.3), (20.0, 2.0)])
def test_it_is_exact_for_linear_regression(alpha, sigma):
    with in_float64():
        x, y = linear_problem()
        mean, covariance, evidence = exact(x, y, alpha, sigma)
        posterior = fitted(x, y, mean, prior_precision=alpha, sigma=sigma)
        np.testing.assert_allclose(posterior.covariance(), covariance, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(posterior.log_marginal_likelihood(), evidence, rtol=1e-12)
        # The same from other hyperparameters than those it was fitted with.
        other = fitted(x, y, mean).log_marginal_likelihood(np.log(alpha), np.log(sigma))
        np.testing.assert_allclose(other, evidence, rtol=1e-12)
        new = np.random.default_rng(1).normal(size=(5, 3))
        design = np.concatenate([np.ones((5, 1)), new], 1)
        got_mean, variance = posterior.predict(new)
        np.testing.assert_allclose(got_mean[:, 0], design @ mean, rtol=1e-10)
        want = np.einsum("mp,pq,mq->m", design, covariance, design) + sigma**2
        np.testing.assert_allclose(variance[:, 0], want, rtol=1e-10)


def test_maximal_evidence_is_a_maximum_of_the_exact_evidence():
    with in_float64():
        x, y = linear_problem(200)
        model = nn.Linear(3, 1, dtype=jnp.float64)
        fn, _ = nn.functionalize(model)

        @jax.jit
        def maximised(mean, alpha, sigma):
            posterior = Laplace.fit(
                (fn, {"bias": mean[:1], "weight": mean[None, 1:]}),
                x,
                y[:, None],
                likelihood="regression",
                prior_precision=alpha,
                sigma=sigma,
            ).maximize_evidence(tolerance=1e-10)
            return posterior.prior_precision, posterior.sigma

        # The ridge solution depends on the hyperparameters: fit and maximise until they agree.
        alpha, sigma = 1.0, 1.0
        for _ in range(30):
            alpha, sigma = map(float, maximised(exact(x, y, alpha, sigma)[0], alpha, sigma))
        best = exact(x, y, alpha, sigma)[2]
        for a, s in ((1.05, 1), (0.95, 1), (1, 1.02), (1, 0.98)):
            assert exact(x, y, alpha * a, sigma * s)[2] < best
        assert 0.25 < sigma < 0.35


def test_derivative_of_the_evidence_is_its_slope_and_zero_at_the_maximum():
    with in_float64():
        x, y = linear_problem()
        posterior = fitted(x, y, np.array([0.5, 1.0, -0.3, 0.2]))
        evidence = jax.jit(posterior.log_marginal_likelihood)
        slopes = jax.jit(jax.grad(posterior.log_marginal_likelihood, argnums=(0, 1)))
        step = 1e-5
        got = slopes(-0.4, 0.3)
        want = [
            (evidence(-0.4 + step, 0.3) - evidence(-0.4 - step, 0.3)) / (2 * step),
            (evidence(-0.4, 0.3 + step) - evidence(-0.4, 0.3 - step)) / (2 * step),
        ]
        np.testing.assert_allclose(got, want, rtol=1e-7)
        best = posterior.maximize_evidence(tolerance=1e-12)
        there = slopes(jnp.log(best.prior_precision), jnp.log(best.sigma))
        np.testing.assert_allclose(there, 0, atol=1e-8)


def mlp(outputs):
    # The float64 of torch and ours.
    return (
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).to(jnp.float64),
        torch.nn.Sequential(
            torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)
        ).double(),
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_curvature_is_the_gauss_newton_matrix_of_torch(likelihood):
    with in_float64():
        ours, theirs = mlp(3)
        theirs.load_state_dict(
            {n: torch.tensor(np.asarray(v)) for n, v in ours.state_dict().items()}
        )
        x = np.random.randn(9, 2)
        y = np.random.randn(9, 3) if likelihood == "regression" else np.arange(9) % 3
        # Jᵀ Λ J with Λ the Hessian of torch's own loss by the outputs.
        params = {n: p.detach() for n, p in sorted(theirs.named_parameters())}
        of_outputs = lambda p: torch.func.functional_call(theirs, p, (torch.tensor(x),))
        jacobian = torch.func.jacrev(of_outputs)(params)
        j = torch.cat([v.flatten(2) for v in jacobian.values()], 2)
        outputs = of_outputs(params)

        def loss(outputs):
            if likelihood == "regression":
                return torch.sum((outputs - torch.tensor(y)) ** 2) / 2
            return torch.nn.functional.cross_entropy(outputs, torch.tensor(y), reduction="sum")

        hessian = torch.func.hessian(loss)(outputs)
        want = torch.einsum("ncp,ncmd,mdq->pq", j, hessian, j).numpy()

        options = {"likelihood": likelihood, "prior_precision": 0.5}
        full = Laplace.fit(ours, x, y, **options, batch_size=4)
        got = full.eigenvectors * full.eigenvalues @ full.eigenvectors.T
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(
            full.covariance(), np.linalg.inv(want + 0.5 * np.eye(len(want))), rtol=1e-8, atol=1e-10
        )
        diag = Laplace.fit(ours, x, y, **options, structure="diag")
        np.testing.assert_allclose(diag.eigenvalues, np.diag(want), rtol=1e-9)
        np.testing.assert_allclose(diag.covariance(), 1 / (np.diag(want) + 0.5), rtol=1e-9)

        theta = np.concatenate([p.numpy().ravel() for p in params.values()])
        log_likelihood = -loss(outputs).item()
        if likelihood == "regression":
            log_likelihood -= y.size * np.log(2 * np.pi) / 2
        precision = want + 0.5 * np.eye(len(want))
        evidence = log_likelihood - 0.25 * theta @ theta + len(theta) / 2 * np.log(0.5)
        evidence -= np.linalg.slogdet(precision)[1] / 2
        np.testing.assert_allclose(full.log_marginal_likelihood(), evidence, rtol=1e-10)

        new = np.random.randn(5, 2)
        mean, covariance = full.functional(new, batch_size=2)
        of_new = lambda p: torch.func.functional_call(theirs, p, (torch.tensor(new),))
        j = torch.cat([v.flatten(2) for v in torch.func.jacrev(of_new)(params).values()], 2).numpy()
        np.testing.assert_allclose(mean, of_new(params).numpy(), rtol=1e-10)
        want = np.einsum("mcp,pq,mdq->mcd", j, np.linalg.inv(precision), j)
        np.testing.assert_allclose(covariance, want, rtol=1e-7, atol=1e-10)


@functools.cache
def classifier():
    """A small classifier of three classes in a plane, trained a little."""
    nn.manual_seed(0)
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    angle = 2 * np.pi * y / 3
    x = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.4 * rng.normal(size=(60, 2))
    x = jnp.asarray(x, jnp.float32)
    fn, params = nn.functionalize(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)))

    @jax.jit
    def train(params):
        def loss(p):
            log_p = jax.nn.log_softmax(fn(p, x))
            penalty = sum(jnp.sum(v**2) for v in p.values()) * 0.1 / 2
            return penalty - jnp.take_along_axis(log_p, jnp.asarray(y)[:, None], 1).sum()

        step = lambda p, _: (jax.tree.map(lambda v, g: v - 0.01 * g, p, jax.grad(loss)(p)), None)
        return jax.lax.scan(step, params, length=300)[0]

    return fn, train(params), x, jnp.asarray(y)


@pytest.mark.long
def test_probabilities_grow_less_certain_than_those_of_the_network():
    fn, params, x, y = classifier()
    posterior = Laplace.fit((fn, params), x, y, likelihood="classification", prior_precision=0.1)
    far = jnp.array([[6.0, 0.5], [-5.0, 6.0], [0.1, 0.0]])
    point = jax.nn.softmax(fn(params, far))
    probit = posterior.predict_proba(far)
    mc = posterior.predict_proba(far, link="mc", samples=4000, rng=jax.random.key(0))
    for p in (probit, mc):
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
        assert (p.max(-1) < point.max(-1)).all()
        np.testing.assert_array_equal(p.argmax(-1), point.argmax(-1))
    mean, covariance = posterior.functional(far)
    scaled = mean / np.sqrt(1 + np.pi / 8 * np.einsum("mcc->mc", covariance))
    np.testing.assert_allclose(probit, jax.nn.softmax(scaled), rtol=1e-5)
    draws = np.stack(
        [
            np.random.default_rng(1).multivariate_normal(m, c, 20_000)
            for m, c in zip(mean, covariance, strict=True)
        ]
    )
    exact = np.exp(draws) / np.exp(draws).sum(-1, keepdims=True)
    np.testing.assert_allclose(mc, exact.mean(1), atol=0.015)
    blocks = posterior.predict_proba(
        far, link="mc", samples=4000, rng=jax.random.key(0), batch_size=2
    )
    np.testing.assert_allclose(blocks, mc, rtol=1e-4)


def test_draws_have_the_posterior_mean_and_covariance():
    fn, params, x, y = classifier()
    for structure in ("full", "diag"):
        posterior = Laplace.fit(
            (fn, params), x, y, likelihood="classification", subset=["2.bias"], structure=structure
        )
        drawn = posterior.sample(jax.random.key(0), 20_000)
        assert jax.tree.map(jnp.shape, drawn) == {n: (20_000, *p.shape) for n, p in params.items()}
        np.testing.assert_allclose(drawn["2.bias"].mean(0), params["2.bias"], atol=0.02)
        want = posterior.covariance()
        got = np.cov(drawn["2.bias"], rowvar=False)
        np.testing.assert_allclose(got if structure == "full" else np.diag(got), want, atol=0.01)
        assert (drawn["0.weight"] == params["0.weight"]).all()


def test_subsets_are_blocks_of_the_whole():
    fn, params, x, y = classifier()
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    model.load_state_dict(params)
    fit = functools.partial(Laplace.fit, likelihood="classification")
    whole = fit(model, x, y, prior_precision=2.0)
    h = whole.eigenvectors * whole.eigenvalues @ whole.eigenvectors.T
    order = sorted(params)
    sizes = np.concatenate([[i] * params[n].size for i, n in enumerate(order)])
    for subset in ("last_layer", ["2.weight", "2.bias"], lambda name: name.startswith("2.")):
        part = fit(model, x, y, subset=subset, prior_precision=2.0)
        assert sorted(part.names) == ["2.bias", "2.weight"]
        inside = np.isin(sizes, [order.index(n) for n in part.names])
        got = part.eigenvectors * part.eigenvalues @ part.eigenvectors.T
        np.testing.assert_allclose(got, np.asarray(h)[inside][:, inside], atol=2e-4)


def test_more_parameters_than_data_leave_the_prior_where_nothing_is_known():
    with in_float64():
        x = np.array([[1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]])
        posterior = fitted(x, np.zeros(2), np.ones(6), prior_precision=4.0)
        assert np.sum(posterior.eigenvalues > 1e-12) == 1
        variances = np.diag(posterior.covariance())
        np.testing.assert_allclose(variances[2:], 0.25, rtol=1e-12)  # weights that no input meets
        assert (variances[:2] < 0.25).all()


def test_small_eigenvalues_survive_single_precision():
    # Two columns that differ by 1e-3: the small eigenvalue is 1e-7 of the large one, below the
    # rounding of the product of single precision numbers.
    x = np.random.randn(40, 1).astype(np.float32)
    x = np.concatenate([x, x * (1 + 1e-3 * np.random.randn(40, 1).astype(np.float32))], 1)
    model = nn.Linear(2, 1, bias=False)
    posterior = Laplace.fit(model, x, np.zeros((40, 1)), likelihood="regression")
    want = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    assert want[1] < 1e-6 * want[0]
    np.testing.assert_allclose(posterior.eigenvalues, want, rtol=1e-2)


def test_it_is_a_pytree_that_compiled_code_takes_and_makes():
    fn, params, x, y = classifier()
    fit = lambda p: Laplace.fit((fn, p), x, y, likelihood="classification", structure="diag")
    eager, compiled = fit(params), jax.jit(fit)(params)
    np.testing.assert_allclose(compiled.eigenvalues, eager.eigenvalues, rtol=1e-4)
    proba = jax.jit(lambda posterior, x: posterior.predict_proba(x))(compiled, x)
    np.testing.assert_allclose(proba, eager.predict_proba(x), rtol=1e-4)
    changed = dataclasses.replace(eager, prior_precision=jnp.array(7.0))
    np.testing.assert_allclose(1 / changed.covariance(), eager.eigenvalues + 7, rtol=1e-5)


def test_later_changes_of_the_module_do_not_reach_it():
    model, x = nn.Linear(2, 1), jnp.ones((4, 2))
    posterior = Laplace.fit(model, x, jnp.ones((4, 1)), likelihood="regression")
    before = posterior.predict(x)
    model.weight.value = model.weight * 3
    np.testing.assert_array_equal(posterior.predict(x)[0], before[0])


def test_frozen_parameters_are_not_random():
    model, x = nn.Linear(2, 1), jnp.ones((4, 2))
    model.weight.requires_grad_(False)
    posterior = Laplace.fit(model, x, jnp.ones((4, 1)), likelihood="regression")
    assert posterior.covariance().shape == (1, 1)
    np.testing.assert_allclose(posterior.eigenvalues, [4.0], rtol=1e-6)


@pytest.mark.long
def test_half_precision_models_have_a_posterior_in_float32():
    model = nn.Linear(2, 3, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.randn(6, 2), jnp.bfloat16)
    posterior = Laplace.fit(model, x, jnp.arange(6) % 3, likelihood="classification")
    assert posterior.eigenvalues.dtype == jnp.float32
    assert np.isfinite(posterior.predict_proba(x)).all()
    assert posterior.sample(jax.random.key(0), 2)["weight"].dtype == jnp.bfloat16


def test_what_is_wrong_is_named():
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)), jnp.ones((6, 2))
    y, labels = jnp.ones((6, 3)), jnp.zeros(6, jnp.int32)
    fit = functools.partial(Laplace.fit, model, x)
    regression = {"y": y, "likelihood": "regression"}
    for options, text in (
        ({"y": y, "likelihood": "poisson"}, "likelihood='poisson'"),
        ({**regression, "structure": "block"}, "structure='block'"),
        ({**regression, "batch_size": 0}, "batch_size=0"),
        ({**regression, "prior_precision": 0.0}, "prior_precision=0.0"),
        ({**regression, "sigma": -1}, "sigma=-1"),
        ({**regression, "subset": "last"}, "subset='last'"),
        ({"y": labels + 3, "likelihood": "classification"}, "labels from 3 to 3"),
    ):
        with pytest.raises(ValueError, match=text):
            fit(**options)
    for options, text in (
        ({"y": y[:, :2], "likelihood": "regression"}, r"shape \(6, 2\) for a model of 3 outputs"),
        ({"y": y, "likelihood": "classification"}, "dtype float32"),
        ({"y": labels[:, None], "likelihood": "classification"}, r"shape \(6, 1\)"),
        ({"y": y[:2], "likelihood": "regression"}, "one N"),
    ):
        with pytest.raises(ShapeError, match=text):
            fit(**options)
    with pytest.raises(ShapeError, match="0 examples"):
        Laplace.fit(model, x[:0], y[:0], likelihood="regression")
    with pytest.raises(ShapeError, match="classifier of 1 output"):
        Laplace.fit(nn.Linear(2, 1), x, labels, likelihood="classification")
    with pytest.raises(UnknownNameError, match="'2.weight'"):
        fit(**regression, subset=["2.weight"])
    with pytest.raises(UnknownNameError, match="subset was given a filter that chooses nothing"):
        fit(**regression, subset=lambda name: False)
    with pytest.raises(TypeError, match="last_layer"):
        Laplace.fit(nn.functionalize(model), x, y, likelihood="regression", subset="last_layer")
    with pytest.raises(TypeError, match="chosen by name"):
        Laplace.fit(
            (lambda p, x: x * p[0], [jnp.ones(2)]), x, x, likelihood="regression", subset=["a"]
        )
    with pytest.raises(FloatingPointError, match="not finite"):
        Laplace.fit(model, x.at[0, 0].set(jnp.nan), y, likelihood="regression")


def test_predictions_ask_for_what_they_need():
    fn, params, x, y = classifier()
    posterior = Laplace.fit((fn, params), x, y, likelihood="classification", structure="diag")
    with pytest.raises(ValueError, match="posterior.predict_proba"):
        posterior.predict(x)
    with pytest.raises(ValueError, match="log_sigma for a classification"):
        posterior.log_marginal_likelihood(0.0, 0.0)
    with pytest.raises(ValueError, match="link='bridge'"):
        posterior.predict_proba(x, link="bridge")
    with pytest.raises(MissingRngError, match="without rng"):
        posterior.predict_proba(x, link="mc")
    with pytest.raises(ValueError, match="samples=0"):
        posterior.sample(jax.random.key(0), 0)
    with pytest.raises(ShapeError, match="0 examples"):
        posterior.predict_proba(x[:0])
    line = Laplace.fit(nn.Linear(2, 1), x, x[:, :1], likelihood="regression", structure="diag")
    with pytest.raises(ValueError, match=r"posterior.predict\(x\)"):
        line.predict_proba(x)


def test_evidence_without_a_maximum_is_an_error():
    x = jnp.asarray(np.random.randn(6, 2), jnp.float32)
    model = nn.Linear(2, 1)
    model.weight.value, model.bias.value = jnp.zeros((1, 2)), jnp.zeros(1)
    posterior = Laplace.fit(model, x, x[:, :1], likelihood="regression")
    with pytest.raises(FloatingPointError, match="parameters are all zero"):
        posterior.maximize_evidence()
    model.weight.value = jnp.array([[1.0, 0.0]])
    exact_fit = Laplace.fit(model, x, x[:, :1], likelihood="regression")
    with pytest.raises(FloatingPointError, match="fitted exactly"):
        exact_fit.maximize_evidence()


def test_batch_norm_works_in_eval_mode_only():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    x = jnp.asarray(np.random.randn(6, 2, 2), jnp.float32)
    with pytest.raises(StateWriteError):
        Laplace.fit(
            nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten()),
            x,
            jnp.ones((6, 6)),
            likelihood="regression",
        )
    posterior = Laplace.fit(model.eval(), x[:, 0], x[:, 0, :1], likelihood="regression")
    assert posterior.predict(x[:, 0])[1].shape == (6, 1)
    assert int(model[1].num_batches_tracked) == 0
