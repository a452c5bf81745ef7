"""The ensemble learns the noise where there are data, and disagrees where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ensemble_gap as example
import statefulnn as nn

# The logarithm of the noise is linear in x, so of any constant guess the mean error of it is at least
# that of the middle one: |x| / 2, over the data's x from 0.5 to 2 and their negatives.
BEST_CONSTANT = np.exp((0.5 + 2) / 2 / 2)


def check(numbers: dict[str, float]) -> None:
    off, on_data, in_gap = numbers.values()
    assert off < np.sqrt(BEST_CONSTANT)
    assert in_gap > 3 * on_data


@pytest.mark.long
def test_it_learns_the_noise_and_disagrees_in_the_gap(capsys):
    numbers = example.main(["--steps", "700", "--picture", "pictures/gap.png"])
    check(numbers)
    assert Path("pictures/gap.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert all(f"{number:.3f}" in printed for number in numbers.values())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_that_does_not_hang_on_the_seed(seed):
    check(example.main(["--seed", str(seed)]))


def test_predictions_are_those_of_the_members_one_by_one():
    ensemble = nn.Ensemble(example.Member, 3)
    x = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    each = [ensemble.member(i)(x) for i in range(3)]
    means, seen, apart = example.predict(ensemble, x)
    np.testing.assert_allclose(means, [mean for mean, _ in each], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen, np.mean([v for _, v in each], 0) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(apart, np.std([mean for mean, _ in each], 0), rtol=1e-4, atol=1e-6)


def test_no_data_lie_in_the_gap():
    x, y = example.draw_data(np.random.default_rng(0), 5000)
    assert 0.5 <= np.abs(x).min() and np.abs(x).max() <= 2
    z = (y - np.sin(3 * x)) / example.noise(x)
    assert z.mean() == pytest.approx(0, abs=0.05) and z.std() == pytest.approx(1, abs=0.03)
