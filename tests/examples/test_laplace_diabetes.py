"""Laplace on the diabetes set: intervals that hold, and the Kronecker posterior written out in numpy."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import laplace_diabetes as example
import statefulnn as nn

pytestmark = pytest.mark.compiled_with_care


def check(numbers: dict[str, np.ndarray], margin: float) -> None:
    nll, coverage = numbers["Laplace"].mean(0)
    assert 0.85 <= coverage <= 0.95
    assert abs(coverage - 0.9) < abs(numbers["tuned"][:, 1].mean() - 0.9)
    assert nll < numbers["tuned"][:, 0].mean()
    assert nll < numbers["plain"][:, 0].mean() + margin  # which has seen a fifth less


def test_intervals_hold_as_many_patients_as_they_should(capsys):
    numbers = example.main(["--splits", "1", "--picture", "pictures/diabetes.png"])
    check(numbers, margin=0.02)
    assert Path("pictures/diabetes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "90 % interval" in capsys.readouterr().out


def dense_variances(params, prior, sigma, x, new):
    """Return the variances of predictions by the posterior of a network 10-H-1, each block in full.

    A block is ``(A ⊗ B) / σ² + prior``: A the mean of the inputs' squares, B the sum of the cotangents'.
    """
    weight, bias, out = (
        np.asarray(params[n], np.float64) for n in ("0.weight", "0.bias", "2.weight")
    )

    def inputs_and_cotangents(x):
        hidden = np.tanh(x @ weight.T + bias)
        return (x, hidden), (out * (1 - hidden**2), np.ones((len(x), 1)))

    found = np.zeros(len(new))
    of_data, of_new = (inputs_and_cotangents(np.asarray(v, np.float64)) for v in (x, new))
    for layer in (0, 1):
        a, g = (side[layer] for side in of_data)
        a_new, g_new = (side[layer] for side in of_new)
        bias_block, weight_block = g.T @ g, np.kron(g.T @ g, a.T @ a / len(a))
        jacobians = g_new, (g_new[:, :, None] * a_new[:, None]).reshape(len(new), -1)
        for at, block, rows in zip((0, 1), (bias_block, weight_block), jacobians, strict=True):
            precision = block / sigma**2 + prior[2 * layer + at] * np.eye(len(block))
            found += (rows * np.linalg.solve(precision, rows.T).T).sum(1)
    return found + sigma**2


def test_variances_are_those_of_the_kronecker_posterior_written_out():
    x, new, y, _ = example.load_data(0)
    posterior, penalty = example.compiled_tuned(
        example.network(0), nn.functionalize(example.network(0))[1], jnp.ones(4), x, y
    )
    _, variance = example.predict(posterior, new)
    prior, sigma = np.asarray(posterior.prior_precision, np.float64), float(posterior.sigma)
    expected = dense_variances(posterior.params, prior, sigma, x, new)
    assert expected.max() > 1.1 * sigma**2  # or the parameters would not matter
    np.testing.assert_allclose(variance[:, 0], expected, rtol=1e-3)
    np.testing.assert_allclose(penalty, prior * sigma**2, rtol=1e-5)


@pytest.mark.long
def test_ten_splits_say_the_same(tmp_path):
    picture = str(tmp_path / "diabetes.png")
    check(example.main(["--splits", "10", "--picture", picture]), margin=0.0)
