"""The comparison of the demo compares the same computation."""

from __future__ import annotations

import re

import pytest

import demo


def test_both_sides_compute_the_same_losses(capsys):
    ratio = demo.compare_with_raw_jax(rounds=1, calls=5)
    assert ratio > 0
    ours, theirs = map(float, re.findall(r"steps (\d\.\d+)", capsys.readouterr().out))
    assert ours == pytest.approx(theirs, rel=1e-3)
