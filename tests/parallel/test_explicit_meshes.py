"""Every layer takes a batch that is split over a mesh with explicit axes, `jax.make_mesh`'s default."""

from __future__ import annotations

import pytest

from tests.devices import run_on_devices

CODE = """
import sys; sys.path.insert(0, ".")
from tests.parallel import rows
rows.main({everything})
"""


def test_every_layer_runs_forward_and_backward_with_a_batch_on_an_explicit_mesh():
    run_on_devices(2, CODE.format(everything=False))


@pytest.mark.long
def test_every_row_gives_on_an_explicit_mesh_what_one_device_gives():
    run_on_devices(2, CODE.format(everything=True))
