"""Tests that a machine cannot run are left out aloud, and fail in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browsers import HOW_TO_INSTALL

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("where", ["at home", "in CI"])
def test_without_a_browser_the_run_says_which_tests_it_left_out_or_fails_in_ci(where, tmp_path):
    # Of the search path the interpreter's own folder is left, and no home has a downloaded browser.
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    env |= {"PATH": str(tmp_path), "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    env |= {"CI": "true"} if where == "in CI" else {}
    test = "tests/browser/test_explore.py::test_bars_show_what_is_asked_for"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert " ".join(HOW_TO_INSTALL.split()) in " ".join(done.stdout.split()), done.stdout
    if where == "in CI":
        assert done.returncode == 1
        assert "1 error" in done.stdout
    else:
        assert "left out: tests/browser" in done.stdout
        assert "1 deselected" in done.stdout
