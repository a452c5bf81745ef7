"""Code on several CPU devices, whose number is fixed when a process starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping


def run_on_devices(count: int, code: str, given: str = "") -> str:
    """Run a program in a process of its own that has `count` CPU devices, and raise if it fails."""
    # The last one counts; the others are those of this process, which make compilation cheap.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        input=given,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EACH = """
import json, sys, traceback
import statefulnn as nn
found = {}
for name, code in json.load(sys.stdin).items():
    nn.manual_seed(0)
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        found[name] = traceback.format_exc()
print(json.dumps(found))
"""


def failures_on_devices(count: int, programs: Mapping[str, str]) -> dict[str, str]:
    """Run programs one after the other in one such process; return the traceback of each that failed."""
    return json.loads(run_on_devices(count, EACH, json.dumps(programs)).splitlines()[-1])
