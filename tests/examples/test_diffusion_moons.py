"""The diffusion model draws moons, and the averaged weights are the average."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import optax
import pytest

import diffusion_moons as example
import statefulnn as nn

pytestmark = pytest.mark.compiled_with_care

# Of a normal number of that spread, the mean absolute value.
OF_THE_DATA = example.SPREAD * np.sqrt(2 / np.pi)


def check(shown: dict[str, np.ndarray], closeness: float) -> None:
    points = shown["averaged weights"]
    distances = example.distances(points)
    assert distances.min(1).mean() < closeness * OF_THE_DATA
    of_the_upper = (distances[:, 0] < distances[:, 1]).mean()
    assert 0.35 < of_the_upper < 0.65


@pytest.mark.long
def test_points_lie_near_both_moons(capsys):
    shown = example.main(["--steps", "2000", "--picture", "pictures/moons.png"])
    noise = np.random.default_rng(0).normal(size=(5000, 2))
    far = example.distances(noise).min(1).mean() / OF_THE_DATA
    check(shown, far / 2)
    assert Path("pictures/moons.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "averaged weights" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_at_full_length_the_average_draws_nearer_points_than_the_last_weights(seed):
    shown = example.main(["--seed", str(seed)])
    check(shown, 2)
    last, average = (example.distances(shown[f"{w} weights"]).min(1) for w in ("last", "averaged"))
    assert average.mean() < last.mean()


def test_distances_are_those_of_the_data():
    points = example.moons(np.random.default_rng(0), 20_000)
    assert example.distances(points).min(1).mean() == pytest.approx(OF_THE_DATA, rel=0.03)
    on_the_moons = np.array([[-0.5, 0.75], [0.5, -0.75], [-1.5, -0.25], [1.5, 0.25]])
    np.testing.assert_allclose(example.distances(on_the_moons).min(1), 0, atol=1e-12)
    assert example.distances(np.array([[-0.5, -0.25]]))[0, 0] == pytest.approx(1)


def test_the_average_follows_by_its_formula():
    model = example.Denoiser(hidden=4)
    average = copy.deepcopy(model)
    opt = nn.Optimizer(model, optax.sgd(0.1))
    expected = {name: np.asarray(p.value) for name, p in model.named_parameters()}
    points = example.moons(np.random.default_rng(0), 8)
    for _ in range(3):
        example.train_step(model, average, opt, points)
        for name, p in model.named_parameters():
            expected[name] = example.DECAY * expected[name] + (1 - example.DECAY) * p.value
    for name, p in average.named_parameters():
        np.testing.assert_allclose(p.value, expected[name], rtol=1e-5, atol=1e-7)


def test_sampling_with_the_true_noise_of_one_point_leads_to_it():
    """For data at one point the noise is known: what is left of a point when the data's share is gone."""

    class Known(example.Denoiser):
        def forward(self, points, times):
            signal, share = np.stack([example.SIGNAL, example.NOISE])
            signal, share = (nn.Parameter(a).value[times, None] for a in (signal, share))
            return (points - signal * np.array([0.3, -0.2], np.float32)) / share

    noise = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    np.testing.assert_allclose(example.sample(Known(), noise), [[0.3, -0.2]] * 6, atol=1e-4)
