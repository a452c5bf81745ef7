"""Code on several CPU devices, whose number is fixed when a process starts."""

from __future__ import annotations

import os
import subprocess
import sys


def run_on_devices(count: int, code: str) -> None:
    """Run a program in a process of its own that has `count` CPU devices, and raise if it fails."""
    flags = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
