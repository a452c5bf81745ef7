"""The hyperparameter example reaches hypertorch's published loss, and its gradients agree."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hpo_logistic as hpo
from tests.precision import in_float64

pytestmark = pytest.mark.compiled_with_care


@pytest.mark.long
def test_a_thousand_steps_reach_the_published_loss(capsys):
    losses = hpo.main(["--picture", "pictures/hpo.png"])
    for loss in losses.values():
        assert loss[0] == pytest.approx(hpo.PUBLISHED["start"], abs=2e-6)
    assert losses["truncated"][-1] == pytest.approx(hpo.PUBLISHED["end"], abs=1e-4)
    # Published results of hand-written versions of the other two.
    assert losses["unrolled"][-1] == pytest.approx(0.28041, abs=1e-4)
    assert losses["implicit"][-1] == pytest.approx(0.28069, abs=1e-4)
    assert Path("pictures/hpo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "0.280506" in capsys.readouterr().out


@pytest.mark.parametrize("x64", [False, True])
def test_the_implicit_hypergradient_is_that_of_the_full_unroll(x64):
    with in_float64(x64):
        train, valid = hpo.load_data()
        penalty = jnp.ones(20)
        grads = {
            way: jax.jit(
                jax.grad(
                    lambda p, way=way: hpo.validation_loss(
                        hpo.FITS[way](jnp.zeros(20), p, *train), *valid
                    )
                )
            )(penalty)
            for way in ("unrolled", "implicit")
        }
    error = np.linalg.norm(grads["implicit"] - grads["unrolled"])
    assert error < 1e-3 * np.linalg.norm(grads["unrolled"])


def test_the_inner_gradient_is_the_formula():
    (x, y), _ = hpo.load_data()
    w, penalty = np.linspace(-1, 1, 20, dtype="f"), np.linspace(0, 2, 20, dtype="f")
    p = 1 / (1 + np.exp(-np.asarray(x) @ w))
    formula = np.asarray(x).T @ (p - np.asarray(y)) / len(y) + penalty * w
    np.testing.assert_allclose(
        jax.grad(hpo.fit_loss)(w, penalty, x, y), formula, rtol=1e-4, atol=1e-6
    )
