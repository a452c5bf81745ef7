"""The accountant against exact formulas of the Gaussian mechanism, with and without sampling."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import optimize, stats

from statefulnn import curvature
from tests.quick import first

DELTA = 1e-5


def gaussian_epsilon(noise):
    """The exact ε of one Gaussian mechanism: Balle and Wang 2018, theorem 8."""
    cdf = stats.norm.cdf

    def excess(epsilon):
        a, b = 1 / (2 * noise), epsilon * noise
        return cdf(a - b) - np.exp(epsilon) * cdf(-a - b) - DELTA

    return optimize.brentq(excess, 0, 200)


def sampled_epsilon(noise, rate):
    """The exact ε of one step with sampling, by integrating the densities' excess both ways round."""
    x = np.linspace(-60 * noise, 60 * noise, 2_000_001)
    without = stats.norm.pdf(x, 0, noise)
    mixed = (1 - rate) * without + rate * stats.norm.pdf(x, 1, noise)

    def excess(epsilon):
        gaps = (
            np.maximum(p - np.exp(epsilon) * q, 0) for p, q in ((mixed, without), (without, mixed))
        )
        return max(np.trapezoid(gap, x) for gap in gaps) - DELTA

    return optimize.brentq(excess, 0, 50)


@pytest.mark.parametrize("noise, steps", [(1.0, 1), (5.0, 1), (8.0, 30), (40.0, 400)])
def test_steps_on_all_examples_are_one_gaussian_of_less_noise(noise, steps):
    exact = gaussian_epsilon(noise / np.sqrt(steps))
    tight, renyi = (
        curvature.privacy_spent(noise, 1.0, steps, DELTA, accountant=a) for a in ("pld", "rdp")
    )
    assert exact * (1 - 1e-6) <= tight <= exact * 1.02
    # Mironov 2017: Rényi divergence α steps / (2 noise²), turned into ε with log(1/δ) / (α - 1).
    orders = np.linspace(1.01, 500, 200_000)
    bound = orders * steps / (2 * noise**2) + np.log(1 / DELTA) / (orders - 1)
    assert exact <= renyi <= bound.min() * 1.001


@pytest.mark.parametrize("noise, rate", [(0.8, 0.01), (1.5, 0.2)])
def test_one_step_on_a_sample_is_the_integral(noise, rate):
    exact = sampled_epsilon(noise, rate)
    tight, renyi = (
        curvature.privacy_spent(noise, rate, 1, DELTA, accountant=a) for a in ("pld", "rdp")
    )
    assert exact * (1 - 1e-6) <= tight <= exact * 1.02
    assert renyi >= exact


@pytest.mark.parametrize("accountant", first(1, ["rdp", "pld"]))
def test_the_noise_for_an_epsilon_spends_it_and_not_less_noise(accountant):
    run = {"sample_rate": 0.02, "steps": 200, "delta": DELTA}
    noise = curvature.noise_multiplier_for(3.0, accountant=accountant, **run)
    assert curvature.privacy_spent(noise, accountant=accountant, **run) <= 3.0
    assert curvature.privacy_spent(noise - 1e-3, accountant=accountant, **run) > 3.0


def test_without_noise_nothing_is_private():
    assert curvature.privacy_spent(0.0, 0.5, 3, DELTA) == np.inf


def test_what_is_wrong_is_named(monkeypatch):
    for bad in (
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"steps": 0},
        {"steps": 2.5},
        {"delta": 0.0},
        {"delta": 1.0},
        {"noise_multiplier": -1.0},
        {"accountant": "gdp"},
    ):
        run = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 5, "delta": DELTA, **bad}
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            curvature.privacy_spent(**run)
    with pytest.raises(ValueError, match="epsilon=0"):
        curvature.noise_multiplier_for(0, DELTA, 0.1, 5)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for call in (
        lambda: curvature.privacy_spent(1.0, 0.1, 5, DELTA),
        lambda: curvature.noise_multiplier_for(1.0, DELTA, 0.1, 5),
    ):
        with pytest.raises(ImportError, match="pip install dp-accounting"):
            call()
