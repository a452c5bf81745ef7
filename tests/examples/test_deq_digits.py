"""The equilibrium network reads digits, with the gradient of the solution in the memory of one step."""

from __future__ import annotations

from pathlib import Path

import deq_digits as example


def test_a_short_run_reads_digits_and_saves_a_picture(capsys):
    numbers = example.main(["--epochs", "8", "--picture", "pictures/deq.png"])
    assert numbers["accuracy"] >= 0.94
    assert numbers["difference"] <= 1e-2  # both are iterations, up to a tolerance
    assert numbers["memory beside 80 steps"] <= 0.5
    assert Path("pictures/deq.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "accuracy" in capsys.readouterr().out
