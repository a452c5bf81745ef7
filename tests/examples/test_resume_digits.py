"""A run that was interrupted ends where one that was not ends, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import resume_digits as example


def accuracy(printed: str) -> float:
    return float(printed.partition("test accuracy ")[2].partition("%")[0]) / 100


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(capsys):
    whole = example.main(["--epochs", "2", "--folder", "whole", "--picture", "pictures/r.png"])
    printed = capsys.readouterr().out
    assert accuracy(printed) > 0.8 and "resumed" not in printed  # by chance: 0.1
    example.main(["--epochs", "1", "--folder", "parts"])
    resumed = example.main(["--epochs", "2", "--folder", "parts"])
    assert "resumed at epoch 1" in capsys.readouterr().out
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(value, resumed.state_dict()[name], err_msg=name)
    assert Path("pictures/r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_that_is_over_is_not_trained_on(capsys):
    first = example.main(["--epochs", "1"])
    again = example.main(["--epochs", "1"])
    assert "resumed at epoch 1" in capsys.readouterr().out
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_accuracy_does_not_hang_on_the_seed(seed, capsys):
    example.main(["--seed", str(seed)])
    assert accuracy(capsys.readouterr().out) > 0.96


def test_the_split_is_fixed_and_disjoint():
    images, test_images, labels, test_labels = example.load_data()
    assert images.shape == (1347, 64) and test_images.shape == (450, 64)
    assert labels.shape == (1347,) and test_labels.shape == (450,)
    everything = np.concatenate([images, test_images])
    assert len(np.unique(everything, axis=0)) == 1797
    assert everything.min() == 0.0 and everything.max() == 1.0
