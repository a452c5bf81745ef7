"""The GAN finds all eight modes, with a critic that changes no faster than it may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gan_ring as example
import statefulnn as nn

# Of points spread evenly along the circle, the share within four spreads of a centre.
ALONG_THE_CIRCLE = example.MODES * 4 * np.arcsin(2 * example.SPREAD / example.RADIUS) / (2 * np.pi)


@pytest.mark.long
def test_it_finds_all_modes_and_tells_them_from_the_circle(capsys):
    scores = example.main(["--steps", "2000", "--picture", "pictures/gan.png"])
    assert scores["modes"] == example.MODES
    assert scores["near"] > ALONG_THE_CIRCLE
    assert Path("pictures/gan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "modes found 8 of 8" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_that_does_not_hang_on_the_seed(seed):
    scores = example.main(["--seed", str(seed)])
    assert scores["modes"] == example.MODES and scores["near"] > 0.75


def test_scores_are_those_of_the_data_and_of_a_single_mode():
    rng = np.random.default_rng(0)
    scores = example.scores(example.ring(rng, 20_000))
    # Four spreads away in two dimensions: exp(-16 / 2).
    assert scores["modes"] == 8 and scores["near"] == pytest.approx(1 - np.exp(-8), abs=1e-3)
    one = example.CENTRES[:1] + np.zeros((100, 1), np.float32)
    assert example.scores(one) == {"modes": 1, "near": 1.0}
    angles = rng.uniform(0, 2 * np.pi, 50_000)
    circle = example.RADIUS * np.stack([np.cos(angles), np.sin(angles)], -1)
    assert example.scores(circle)["near"] == pytest.approx(ALONG_THE_CIRCLE, abs=0.01)


def test_the_critic_changes_no_faster_than_its_scale():
    critic = example.Critic()
    points = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)
    run = nn.jit(critic)
    for _ in range(30):  # the power iteration finds the norms
        run(points)
    values = np.asarray(nn.jit(critic.eval())(points))
    change = np.abs(values[:, None] - values)
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    assert (change <= critic.scale * distance * 1.01 + 1e-4).all()
