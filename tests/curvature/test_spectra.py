"""Eigenpairs, spectral densities and log-determinants against numpy.linalg and exact expectations."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.errors import MissingRngError
from statefulnn.curvature import LinearOperator, eigenpairs, logdet, spectral_density
from statefulnn.curvature.spectra import quadrature
from tests.precision import in_float64
from tests.quick import first, quickly

ORDERS = {"largest": lambda v: -v, "smallest": lambda v: v, "magnitude": lambda v: -abs(v)}


def operator(matrix):
    like = jnp.zeros(len(matrix), matrix.dtype)
    return LinearOperator.of(lambda m, v: m @ v, like, jnp.asarray(matrix), symmetric=True)


def with_eigenvalues(values, seed=0):
    """A dense symmetric matrix of these eigenvalues."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def all_signs(n):
    return jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=n)))


@functools.cache
def hessian_of_a_net():
    """An operator in double precision with eigenvalues of both signs, and its matrix."""
    with in_float64():
        nn.manual_seed(0)
        layers = nn.Linear(6, 10, dtype=jnp.float64), nn.Tanh(), nn.Linear(10, 3, dtype=jnp.float64)
        x = jax.random.normal(jax.random.key(0), (20, 6), jnp.float64)
        A = curvature.hessian(nn.Sequential(*layers), F.cross_entropy, (x, jnp.arange(20) % 3))
        return A, np.asarray(A.to_dense())


# The largest ones are looked for in each test below.
@pytest.mark.parametrize("which", first(2, ["smallest", "magnitude", "largest"]))
def test_eigenpairs_of_a_network_are_those_of_numpy(which):
    with in_float64():
        A, matrix = hessian_of_a_net()
        values, vectors = np.linalg.eigh(matrix)
        best = np.argsort(ORDERS[which](values))[:4]
        found = eigenpairs(A, 4, which=which, tol=1e-9, rng=0, max_restarts=1000)
        np.testing.assert_allclose(found.values, values[best], rtol=1e-9, atol=1e-12)
        got = jax.vmap(A.flatten)(found.vectors)
        np.testing.assert_allclose(abs(got @ vectors[:, best]), np.eye(4), atol=1e-5)
        np.testing.assert_allclose(got @ got.T, np.eye(4), atol=1e-10)
        true = np.linalg.norm(matrix @ got.T - got.T * found.values, axis=0)
        assert (true <= found.residuals + 1e-12).all() and (true <= 1e-9 * abs(values).max()).all()
        assert found.vectors["0.weight"].shape == (4, 10, 6)


SPECTRA = {
    "decaying": np.logspace(2, -3, 60),
    "of both signs": np.linspace(-1, 1, 60),
    "fifteen times each": np.repeat([5.0, 4.0, 3.0, 1.0], 15),
    "a pair below one": np.r_[3.0, 2.0, 2.0, np.linspace(0, 1.9, 57)],
    "nearly equal": np.r_[1, 1 - 1e-6, 1 - 2e-6, np.linspace(0, 0.9, 57)],
    "all equal": np.ones(60),
    "zero": np.zeros(60),
    "of rank two": np.r_[2.0, -1.0, np.zeros(58)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 5])
def test_eigenvalues_are_found_as_often_as_they_occur(spectrum, k):
    with in_float64():
        values = SPECTRA[spectrum]
        matrix = with_eigenvalues(values)
        for which in ("largest", "magnitude"):
            found = eigenpairs(operator(matrix), k, which=which, tol=1e-8, rng=0)
            want = values[np.argsort(ORDERS[which](values), kind="stable")][:k]
            ends = (abs(want), abs(found.values)) if which == "magnitude" else (want, found.values)
            np.testing.assert_allclose(ends[1], ends[0], rtol=1e-10, atol=1e-10)
            v = found.vectors
            np.testing.assert_allclose(v @ v.T, np.eye(k), atol=1e-10)
            assert np.linalg.norm(matrix @ v.T - v.T * found.values) <= 5e-8 * max(abs(values))


@pytest.mark.long
def test_a_regression_with_several_outputs_has_each_eigenvalue_several_times():
    with in_float64():
        x = jax.random.normal(jax.random.key(0), (50, 8), jnp.float64)
        model = nn.Linear(8, 3, bias=False, dtype=jnp.float64)
        A = curvature.ggn(model, F.mse_loss, (x, jnp.zeros((50, 3))))
        want = np.repeat(np.linalg.eigvalsh(2 * np.asarray(x.T @ x) / 150)[::-1], 3)
        np.testing.assert_allclose(eigenpairs(A, 7, tol=1e-9, rng=0).values, want[:7], rtol=1e-9)
        np.testing.assert_allclose(eigenpairs(A, 24, tol=1e-9, rng=0).values, want, rtol=1e-9)


def test_products_are_counted():
    calls = []

    def product(d, v):
        jax.debug.callback(lambda: calls.append(1))
        return d * v

    A = LinearOperator.of(product, jnp.zeros(80), jnp.linspace(0.0, 1.0, 80), symmetric=True)
    found = eigenpairs(A, 3, rng=0, tol=1e-4)
    jax.effects_barrier()
    assert found.products == len(calls) > 20
    np.testing.assert_allclose(found.values, [1.0, 78 / 79, 77 / 79], atol=1e-5)
    calls.clear()
    few = eigenpairs(A, 3, rng=0, tol=1e-4, basis_size=8)  # in many restarts
    jax.effects_barrier()
    assert few.products == len(calls)
    np.testing.assert_allclose(few.values, found.values, atol=1e-5)


@pytest.mark.long
def test_eigenpairs_in_single_precision_compiled_and_mapped():
    matrix = with_eigenvalues(np.linspace(0, 1, 40) ** 4).astype(np.float32)
    want = np.linalg.eigvalsh(matrix)[::-1][:3]

    def top(matrix, key):
        found = eigenpairs(operator(matrix), 3, rng=key)
        return found.values, found.vectors

    for got in (top(matrix, 0), jax.jit(top)(matrix, jax.random.key(1))):
        np.testing.assert_allclose(got[0], want, atol=1e-5)
    stack = jnp.stack([matrix, 2 * matrix])
    values, vectors = jax.jit(jax.vmap(top, in_axes=(0, None)))(stack, jax.random.key(0))
    np.testing.assert_allclose(values, [want, 2 * want], atol=2e-5)
    np.testing.assert_allclose(
        jnp.einsum("bij,bkj->bki", stack, vectors), values[:, :, None] * vectors, atol=1e-4
    )


def test_eigenpairs_report_what_they_did_not_reach():
    A = operator(np.diag(np.linspace(0, 1, 200)).astype(np.float32))
    with pytest.raises(nn.ConvergenceError, match="basis_size=16") as caught:
        eigenpairs(A, 3, rng=0, basis_size=8, max_restarts=1)
    assert "k=3" in str(caught.value) and str(caught.value).count("\n") == 2
    found = lambda A, tol: eigenpairs(A, 3, rng=0, tol=tol, basis_size=8, max_restarts=1)
    with pytest.raises(nn.ConvergenceError, match="k=3"):
        nn.jit(lambda A: found(A, 1e-5))(A)
    taken = jax.jit(lambda A: found(A, None))(A)
    assert (taken.residuals > 1e-5).any() and np.isfinite(taken.values).all()
    with pytest.raises(nn.ConvergenceError, match="not finite"):
        eigenpairs(operator(np.full((3, 3), np.nan, np.float32)), rng=0)


def test_what_has_no_eigenpairs_is_refused():
    A = operator(np.eye(3, dtype=np.float32))
    rows = curvature.jacobian(nn.Linear(2, 2), jnp.ones((3, 2)))
    for function in (eigenpairs, spectral_density, logdet):
        with pytest.raises(TypeError, match=r"\(6, 6\) that is not known to be symmetric"):
            function(rows)
        with pytest.raises(TypeError, match="was given ndarray"):
            function(np.eye(3))
    for bad, message in (
        ({"k": 4}, "k=4"),
        ({"k": 0}, "k=0"),
        ({"which": "middle"}, "which='middle'"),
        ({"k": 2, "basis_size": 2}, "basis_size=2"),
    ):
        with pytest.raises(ValueError, match=message):
            eigenpairs(A, **bad)
    for bad in ({"samples": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match="=0"):
            spectral_density(A, **bad)


def test_random_vectors_come_from_a_key_or_the_generator_in_force():
    A = operator(np.diag(np.arange(1.0, 31.0)).astype(np.float32))
    A = A + operator(np.full((30, 30), 0.1, np.float32))
    nn.manual_seed(1)
    first, second = (spectral_density(A, samples=2, steps=3).nodes for _ in range(2))
    nn.manual_seed(1)
    np.testing.assert_array_equal(spectral_density(A, samples=2, steps=3).nodes, first)
    assert not np.array_equal(first, second)
    with pytest.raises(MissingRngError):
        jax.jit(lambda A: spectral_density(A).nodes)(A)
    with nn.rng_scope(3):
        assert eigenpairs(A).values.shape == (1,)


FUNCTIONS = {"exp": np.exp, "log": np.log, "cube": lambda t: t**3, "inverse": lambda t: 1 / t}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_quadrature_over_all_signs_is_the_trace_of_the_function(name):
    with in_float64():
        matrix = with_eigenvalues(np.array([0.5, 1.0, 2.0, 2.0, 5.0]))
        spectrum = quadrature(operator(matrix), all_signs(5), jax.random.key(0), 5)
        f = {"exp": jnp.exp, "log": jnp.log}.get(name, FUNCTIONS[name])
        want = FUNCTIONS[name](np.linalg.eigvalsh(matrix)).sum()
        np.testing.assert_allclose(spectrum.integral(f).value, want, rtol=1e-10)
        np.testing.assert_allclose(spectrum.weights.sum(1), 1, rtol=1e-12)


def test_few_steps_are_exact_for_polynomials_for_each_vector():
    with in_float64():
        matrix = with_eigenvalues(np.linspace(-1, 2, 12))
        z = np.random.default_rng(0).choice([-1.0, 1.0], (3, 12))
        spectrum = quadrature(operator(matrix), jnp.asarray(z), jax.random.key(0), 3)
        for degree in range(6):  # 2 · 3 - 1
            power = np.linalg.matrix_power(matrix, degree)
            got = 12 * jnp.sum(spectrum.weights * spectrum.nodes**degree, 1)
            np.testing.assert_allclose(got, np.einsum("si,ij,sj->s", z, power, z), rtol=1e-10)


def test_density_over_all_signs_is_the_smoothed_spectrum():
    with in_float64():
        values = np.array([-1.0, 0.0, 0.5, 0.5, 2.0])
        spectrum = quadrature(
            operator(with_eigenvalues(values)), all_signs(5), jax.random.key(0), 5
        )
        x = np.linspace(-3, 4, 2001)
        got = spectrum.density(x, 0.3)
        bumps = np.exp(-((x[:, None] - values) ** 2) / (2 * 0.3**2)) / np.sqrt(2 * np.pi) / 0.3
        np.testing.assert_allclose(got, bumps.mean(1), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(np.trapezoid(got, x), 1, rtol=1e-6)


def test_a_krylov_space_that_ends_leaves_the_quadrature_exact():
    with in_float64():
        matrix = with_eigenvalues(np.r_[3.0, 1.0, np.zeros(18)])
        spectrum = quadrature(operator(matrix), jnp.ones((1, 20)), jax.random.key(0), 15)
        assert np.isfinite(spectrum.nodes).all()
        for degree in (1, 2, 9):
            want = np.ones(20) @ np.linalg.matrix_power(matrix, degree) @ np.ones(20)
            got = spectrum.integral(lambda t, d=degree: t**d).value
            np.testing.assert_allclose(got, want, rtol=1e-10)


def test_logdet_over_all_signs_is_that_of_numpy():
    with in_float64():
        matrix = with_eigenvalues(np.array([0.1, 1.0, 2.0, 30.0]))
        spectrum = quadrature(operator(matrix), all_signs(4), jax.random.key(0), 4)
        want = np.linalg.slogdet(matrix)[1]
        np.testing.assert_allclose(spectrum.integral(jnp.log).value, want, rtol=1e-10)
        net, dense = hessian_of_a_net()
        damped = net @ net + 0.5 * operator_like(net)
        compiled = quickly(lambda A, key: logdet(A, samples=60, steps=40, rng=key))
        estimate = compiled(damped, jax.random.key(0))
        want = np.linalg.slogdet(dense @ dense + 0.5 * np.eye(len(dense)))[1]
        assert estimate.error < 0.05 * abs(want)
        assert abs(estimate.value - want) < 5 * estimate.error
        few = lambda A: logdet(A, samples=3, steps=3, rng=0).value
        np.testing.assert_allclose(quickly(few)(operator(matrix)), few(operator(matrix)))


def operator_like(A):
    return (0.0 * A).damped(1.0)


def test_logdet_reports_a_matrix_that_is_not_positive_definite():
    A = operator(np.diag([1.0, 2.0, -3.0]).astype(np.float32))
    with pytest.raises(nn.ConvergenceError, match="logdet met the eigenvalue -3"):
        logdet(A, rng=0)
    with pytest.raises(nn.ConvergenceError, match="logdet met the eigenvalue -3"):
        nn.jit(lambda A: logdet(A, rng=0).value)(A)
