"""The example finds the published hyperparameters, and the kernel predicts training."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ntk_laplace as example


def test_short_run_reaches_the_published_numbers_and_saves_a_picture(capsys):
    numbers = example.main(["--width", "128", "--picture", "pictures/curvature.png"])
    # Three runs of a hand-written version gave sigma .295-.323 and precision .077-.124.
    assert abs(numbers["sigma"] - 0.28) < 0.05
    assert 0.05 < numbers["prior precision"] < 0.2
    assert 0.9 <= numbers["coverage"] <= 1.0
    # The kernel is what gradient descent on the linearised model does; a network comes near it.
    assert numbers["kernel and linearised"] < 1e-4
    assert 1e-3 < numbers["network and linearised"] < 0.3
    assert Path("pictures/curvature.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert "0.28" in printed and "0.10" in printed


def test_data_are_a_sine_with_the_stated_noise():
    x, y = example.noisy_sine(example.jax.random.key(3))
    assert x.shape == y.shape == (150, 1)
    assert 0 <= float(x.min()) and float(x.max()) <= 8
    assert abs(float(jnp.std(y - jnp.sin(x))) - 0.3) < 0.06


def test_error_bars_grow_away_from_the_data():
    posterior, x, y = example.laplace(seed=1)
    _, variance = posterior.predict(jnp.array([[4.0], [14.0]]))
    assert variance[1, 0] > 5 * variance[0, 0] > 5 * float(posterior.sigma) ** 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_hyperparameters_do_not_hang_on_the_seed(seed):
    posterior, _, _ = example.laplace(seed)
    assert 0.25 < float(posterior.sigma) < 0.35
    assert 0.05 < float(posterior.prior_precision) < 0.2
    assert example.coverage(posterior, seed) >= 0.9


@pytest.mark.long
def test_the_wider_the_network_the_nearer_it_is_to_its_linearised_model():
    widths = [64, 256, 1024]
    apart = [
        np.mean(
            [
                example.differences(example.wide_network(w, seed))["network and linearised"]
                for seed in range(3)
            ]
        )
        for w in widths
    ]
    # Lee et al. 2019, section 3.1: the difference falls at least as 1/sqrt(width).
    slope = np.polyfit(np.log(widths), np.log(apart), 1)[0]
    assert slope < -0.4
    assert apart[-1] < 0.05
