"""The spirals example: an ensemble is better than its members, and knows where there was no data."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

import ensemble_spirals as spirals
import statefulnn as nn


def check(table: dict) -> None:
    accuracy, loss, error, auroc = table.values()
    assert accuracy["mean"] > accuracy["one"] and accuracy["vote"] > accuracy["one"]
    assert loss["mean"] < 0.8 * loss["one"]
    assert error["mean"] < 0.6 * error["one"]
    assert auroc["disagreement"] > 0.97 and auroc["mean"] > 0.97
    assert auroc["disagreement"] > auroc["one"] + 0.1


@pytest.mark.long
def test_the_ensemble_is_better_calibrated_and_finds_points_without_data(capsys):
    table = spirals.main(["--no-timing", "--picture", "pictures/spirals.png"])
    check(table)
    assert table["accuracy"]["mean"] > 0.9
    printed = capsys.readouterr().out
    for row in table.values():
        for number in row.values():
            assert f"{number:.3f}" in printed
    assert Path("pictures/spirals.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_that_does_not_hang_on_the_seed(seed):
    check(spirals.main(["--seed", str(seed), "--members", "50", "--epochs", "200", "--no-timing"]))


def test_the_scores_are_scikit_learns_for_fixed_probabilities():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    class Constant(nn.Module):
        def __init__(self, row):
            super().__init__()
            self.row = nn.Parameter(row)

        def forward(self, x):
            return (
                jnp.broadcast_to(self.row.value, (len(x), 3)) + x[:, :1]
            )  # which softmax takes out

    ensemble = nn.Ensemble.of([Constant(row) for row in logits])
    x, y = spirals.spirals(rng, 200)
    table = spirals.scores(ensemble, x, y, spirals.elsewhere(rng, 50))
    each = np.broadcast_to(np.asarray(jax.nn.softmax(logits))[:, None], (4, 200, 3)).astype(
        np.float64
    )
    mean = each.mean(0)
    assert table["accuracy"]["mean"] == pytest.approx(accuracy_score(y, mean.argmax(-1)))
    losses = [log_loss(y, p / p.sum(-1, keepdims=True), labels=range(3)) for p in each]
    assert table["log loss"]["one"] == pytest.approx(np.mean(losses), rel=1e-5)
    # One confidence everywhere: the error is its distance from the accuracy.
    gap = abs(mean[0].max() - table["accuracy"]["mean"])
    assert table["calibration error"]["mean"] == pytest.approx(gap, rel=1e-4)
    # Members that see no inputs disagree everywhere alike.
    assert table["AUROC"]["disagreement"] == 0.5


def test_points_lie_on_three_arms_and_elsewhere():
    rng = np.random.default_rng(0)
    x, arm = spirals.spirals(rng, 3000)
    radius, angle = np.hypot(*x.T), np.arctan2(x[:, 1], x[:, 0])
    off = np.angle(np.exp(1j * (angle - spirals.TURN * radius - 2 * np.pi * arm / spirals.ARMS)))
    assert np.abs(np.median(off)) < 0.1 and np.median(np.abs(off)) < 0.6
    far = np.hypot(*spirals.elsewhere(rng, 1000).T)
    assert far.min() >= 2 and far.max() <= 3 and radius.max() < 1.4


@pytest.mark.long
def test_both_sides_of_the_comparison_take_time():
    together, loop = spirals.compare_with_a_loop(members=3, steps=1)
    assert together > 0 and loop > 0
