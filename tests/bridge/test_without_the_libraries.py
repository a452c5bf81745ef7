"""The bridges of Flax, Equinox and Haiku: imported when they are used, and only where their library is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("library", "package"), [("flax", "flax"), ("equinox", "equinox"), ("haiku", "dm-haiku")]
)
def test_a_bridge_without_its_library_says_what_to_install(library, package):
    message = run(
        "import sys\n"
        f"sys.modules[{library!r}] = None  # as if it were not installed\n"
        "import statefulnn as nn\n"
        "try:\n"
        f"    nn.bridge.{library}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert f"pip install {package}" in message
    assert f"imported statefulnn.bridge.{library}" in message


def test_importing_the_package_imports_no_bridge():
    loaded = run(
        "import sys, statefulnn as nn\n"
        "nn.bridge, nn.statefulize\n"
        "print(*(m for m in ('flax', 'equinox', 'haiku') if m in sys.modules))\n"
    )
    assert loaded.split() == []
