"""The example finds wrong labels by influence, and as many large eigenvalues as there are classes."""

from __future__ import annotations

from pathlib import Path

import pytest

import mislabelled_digits as example


def check(numbers: dict[str, float]) -> None:
    assert numbers["accuracy"] >= 0.93
    assert numbers["precision"] >= 0.8  # by chance: 0.05
    assert 8 <= numbers["outliers"] <= 11  # ten classes, less one
    assert numbers["near zero"] >= 0.97


@pytest.mark.long
def test_influence_finds_wrong_labels_and_classes_stand_out_of_the_spectrum(capsys):
    check(example.main(["--steps", "600", "--picture", "pictures/digits.png"]))
    assert Path("pictures/digits.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "have wrong labels" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_numbers_do_not_hang_on_the_seed(seed, tmp_path):
    check(example.main(["--seed", str(seed), "--picture", str(tmp_path / "digits.png")]))
