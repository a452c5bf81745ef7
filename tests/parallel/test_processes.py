"""Several processes on one machine: the same program, the same numbers, one checkpoint from all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import statefulnn as nn
from tests.parallel import programs, worker

pytest.importorskip("orbax.checkpoint")
WORKER = Path(worker.__file__)


def run(count: int, folder: Path, what: str, killed: int | None = None) -> list[Any]:
    """Run the worker in some processes and return what each found; with `killed`, wait for that one only."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    try:
        for index in range(count):
            command = [sys.executable, str(WORKER), *map(str, (index, count, port, folder, what))]
            with (folder / f"{what}.{index}.txt").open("w") as log:
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                )
        if killed is not None:
            assert started[killed].wait(900) == -signal.SIGKILL, said(folder, what)
            return []
        codes = [process.wait(900) for process in started]
        assert codes == [0] * count, said(folder, what)
        return [json.loads((folder / f"{what}.{i}.json").read_text()) for i in range(count)]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(folder: Path, what: str) -> str:
    return "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob(f"{what}.*.txt")))


def check(count: int, folder: Path, what: str) -> None:
    found = run(count, folder, what)
    for whole, held, mixed in (one.pop("refused") for one in found):
        assert "nn.Checkpointer" in whole and "Instead: " in held and "hold the same part" in mixed
    assert all(other == found[0] for other in found)
    first = found[0]

    expected = programs.reference()
    for name, losses in first["losses"].items():
        np.testing.assert_allclose(losses, expected, rtol=2e-6, err_msg=name)

    # One step with momentum 0.1 from 0.
    mean = 0.1 * worker.data().mean(0)
    for name, means in first["means"].items():
        np.testing.assert_allclose(means, mean, rtol=1e-5, atol=1e-7, err_msg=name)

    # BatchNorm and dropout are those of one device, and so are restored steps.
    model, opt = worker.made(None)
    losses = {str(i): float(worker.step(model, opt, worker.data())) for i in range(worker.STEPS)}
    assert list(losses) == list(first["trained"])
    np.testing.assert_allclose(list(first["trained"].values()), list(losses.values()), rtol=1e-5)
    model, opt = worker.made(None)
    with nn.Checkpointer(folder / "run") as checkpointer:
        assert checkpointer.steps() == list(range(worker.STEPS))
        checkpointer.restore(2, model=model, opt=opt, masks=nn.default_generator)
    assert model.fc1.weight.value.devices() == {jax.devices()[0]}
    assert float(worker.step(model, opt, worker.data())) == pytest.approx(losses["3"], rel=1e-5)


def test_two_processes_compute_what_one_does_and_save_one_checkpoint(tmp_path):
    check(2, tmp_path, "steps")


@pytest.mark.long
def test_four_processes_compute_what_one_does_and_save_one_checkpoint(tmp_path):
    check(4, tmp_path, "everything")


def killed_and_restarted(count: int, folder: Path) -> None:
    run(count, folder, "killed", killed=count - 1)
    with nn.Checkpointer(folder / "killed") as checkpointer:
        last = checkpointer.latest_step()
    # The step that was being written may be there or not; the one before is.
    assert last in (worker.KILLED_AT - 1, worker.KILLED_AT)
    restarted = run(count, folder, "restarted")[0]["trained"]
    assert list(map(int, restarted)) == list(range(last + 1, worker.STEPS))

    (folder / "killed").rename(folder / "old")
    whole = run(count, folder, "restarted")[0]["trained"]
    assert restarted == {i: whole[i] for i in restarted}  # bit for bit


def test_a_killed_process_leaves_the_last_good_step_and_the_run_goes_on_bit_for_bit(tmp_path):
    killed_and_restarted(2, tmp_path)
