"""Estimates of traces and diagonals against their exact expectations over all vectors of signs."""

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
from statefulnn.core.errors import ShapeError
from statefulnn.curvature import LinearOperator, diagonal, trace, traces
from tests.precision import in_float64

N = 5
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=N)))
PAIRS = np.array([[a, b] for a in SIGNS for b in SIGNS])  # all pairs of vectors


def operator(matrix, symmetric=False):
    like = jnp.zeros(matrix.shape[1], matrix.dtype)
    return LinearOperator.of(lambda m, v: m @ v, like, jnp.asarray(matrix), symmetric=symmetric)


@functools.cache
def matrix(n=N, rank=None):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, rank or n)) @ rng.normal(size=(rank or n, n))


TRACES = {
    "hutchinson": lambda A, p: traces.hutchinson(A, p),
    "hutch++": lambda A, p: traces.hutch_plus_plus(A, p[:1], p[1:]),
    "xtrace": lambda A, p: traces.xtrace(A, p),
}
DIAGONALS = {"hutchinson": traces.hutchinson_diagonal, "xdiag": traces.xdiag}


@pytest.mark.parametrize("method", TRACES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_estimate_of_the_trace_is_unbiased(method, symmetric):
    with in_float64():
        m = matrix() + matrix().T if symmetric else matrix()
        A = operator(m, symmetric)
        estimates = jax.vmap(lambda p: TRACES[method](A, p).value)(jnp.asarray(PAIRS))
        assert np.ptp(estimates) > 1e-3
        np.testing.assert_allclose(estimates.mean(), np.trace(m), rtol=1e-10)


@pytest.mark.parametrize("method", DIAGONALS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_estimate_of_the_diagonal_is_unbiased(method, symmetric):
    with in_float64():
        m = matrix() + matrix().T if symmetric else matrix()
        A = operator(m, symmetric)
        estimates = jax.vmap(lambda p: DIAGONALS[method](A, p).value)(jnp.asarray(PAIRS))
        np.testing.assert_allclose(estimates.mean(0), np.diag(m), rtol=1e-10, atol=1e-12)


def test_error_of_hutchinson_is_its_standard_deviation():
    """The variance of z · A z is ``2 Σ aᵢⱼ²`` over the entries beside the diagonal."""
    with in_float64():
        m = matrix() + matrix().T
        A = operator(m, True)
        found = jax.vmap(lambda p: traces.hutchinson(A, p))(jnp.asarray(PAIRS))
        variance = 2 * (m**2).sum() - 2 * (np.diag(m) ** 2).sum()
        np.testing.assert_allclose((found.error**2).mean(), variance / 2, rtol=1e-10)
        np.testing.assert_allclose(found.value.var(), variance / 2, rtol=1e-10)
        assert np.isinf(traces.hutchinson(A, jnp.asarray(SIGNS[:1])).error)


@pytest.mark.parametrize(
    "dtype, counts",
    [
        (np.float64, (12, 13)),
        pytest.param(np.float64, (20, 40), marks=pytest.mark.long),
        pytest.param(np.float32, (12, 13, 20, 40), marks=pytest.mark.long),
    ],
)
def test_matrices_of_low_rank_are_exact(dtype, counts):
    with in_float64():
        m = matrix(60, 4).astype(dtype)
        A, size = operator(m), np.abs(m).max() * (1e-12 if dtype == np.float64 else 1e-3)
        for samples in counts:
            for method in ("hutch++", "xtrace"):
                got = trace(A, method=method, samples=samples, rng=0)
                assert got.value.dtype == dtype
                np.testing.assert_allclose(got.value, np.trace(m), atol=60 * size)
                assert got.error < 60 * size
            got = diagonal(A, samples=samples, rng=1)
            np.testing.assert_allclose(got.value, np.diag(m), atol=10 * size)
        zero = operator(np.zeros((9, 9), dtype))
        for method in TRACES:
            assert trace(zero, method=method, samples=6, rng=0) == (0, 0)


@pytest.mark.parametrize("method", TRACES)
def test_as_many_samples_as_numbers_are_exact(method):
    with in_float64():
        m = matrix()
        estimate = trace(operator(m), method=method, samples=5, rng=0)
        np.testing.assert_allclose(estimate.value, np.trace(m), rtol=1e-12)
        assert estimate.error == 0
        found = diagonal(operator(m), samples=7)
        np.testing.assert_allclose(found.value, np.diag(m), rtol=1e-12)


def test_a_decaying_spectrum_is_better_estimated_by_xtrace():
    """Errors of single draws: 1e-6 of the trace against the 1e-2 of Hutchinson."""
    with in_float64():
        q = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 200)))[0]
        m = (q * 2.0 ** -np.arange(200)) @ q.T
        A = operator((m + m.T) / 2, True)
        error = {
            name: abs(trace(A, method=name, samples=60, rng=0).value - np.trace(m))
            for name in TRACES
        }
        assert error["xtrace"] < error["hutch++"] < error["hutchinson"]
        assert error["xtrace"] < 1e-6 and error["hutchinson"] > 1e-4


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_products_are_as_many_as_said(method):
    calls = []

    def product(d, v):
        jax.debug.callback(lambda: calls.append(1))
        return d * v

    A = LinearOperator.of(product, jnp.zeros(80), jnp.linspace(0.0, 1.0, 80), symmetric=True)
    diagonal(A, method=method, samples=12, rng=0)
    jax.effects_barrier()
    assert len(calls) == 12
    for name in TRACES:
        calls.clear()
        trace(A, method=name, samples=12, rng=0)
        jax.effects_barrier()
        assert len(calls) == 12, name


def test_trace_and_diagonal_of_a_network_compiled():
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    x, y = jax.random.normal(jax.random.key(0), (20, 6)), jnp.arange(20) % 3
    A = curvature.ggn(model, F.cross_entropy, (x, y))
    dense = A.to_dense()

    @jax.jit
    def estimates(A, key):
        return trace(A, samples=60, rng=key), diagonal(A, samples=60, rng=key)

    of_trace, of_diagonal = estimates(A, jax.random.key(0))
    assert abs(of_trace.value - jnp.trace(dense)) < max(5 * of_trace.error, 1e-3)
    assert {n: v.shape for n, v in of_diagonal.value.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    gap = np.abs(A.flatten(of_diagonal.value) - jnp.diagonal(dense))
    assert gap.max() < 0.05 * np.abs(jnp.diagonal(dense)).max()
    np.testing.assert_allclose(trace(A, samples=60, rng=0).value, of_trace.value, rtol=1e-4)


def test_what_has_no_trace_is_refused():
    A = curvature.jacobian(nn.Linear(2, 2), jnp.ones((5, 2)))
    for function in (trace, diagonal):
        with pytest.raises(ShapeError, match=r"given an operator of shape \(10, 6\)"):
            function(A)
        with pytest.raises(ValueError, match="method='exact'"):
            function(A, method="exact")
    square = operator(matrix().astype(np.float32))
    for method, samples in (("xtrace", 3), ("hutch++", 2), ("hutchinson", 0)):
        with pytest.raises(ValueError, match=f"samples={samples}"):
            trace(square, method=method, samples=samples)
    with pytest.raises(ValueError, match="at least 4"):
        diagonal(square, samples=3)
