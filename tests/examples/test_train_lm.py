"""The language model learns on a mesh, and a run that stopped goes on, on another mesh too."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import train_lm as example

from tests.devices import run_on_devices

SMALL = (
    "--layers 2 --width 32 --heads 2 --context 32 --batch 8 --text 40000 --warmup 2 --lr 0.01 "
    "--eval-every 8 --eval-batches 1 --save-every 4"
)
ON_DEVICES = """
import json, sys
sys.path[:0] = {path}
import train_lm
first = train_lm.main("{small} --steps 12 --data 2 --model 2 --folder whole --accumulate 2".split())
train_lm.main("{small} --steps 12 --data 2 --model 2 --folder parts --accumulate 2 --stop 8".split())
again = train_lm.main("{small} --steps 12 --data 4 --model 1 --folder parts --accumulate 2".split())
json.dump([first, again], open("losses.json", "w"))
"""


def test_a_run_on_a_mesh_learns_and_goes_on_on_another_one(tmp_path):
    run_on_devices(4, ON_DEVICES.format(path=sys.path, small=SMALL))
    whole, again = json.loads(Path("losses.json").read_text())
    assert len(whole) == len(again) == 12
    # Where it goes on, the numbers are the same but for the order of sums on the devices.
    np.testing.assert_allclose(whole, again, rtol=1e-3)
    assert whole[-1] < 0.75 * math.log(256)  # nats a byte of one who knows nothing: 5.5
    assert Path("out/train_lm.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_text_is_cut_in_two_and_batches_are_those_of_their_step():
    text, held_out = example.read_text(40_000)
    assert len(text) == 38_000 and len(held_out) == 2_000
    batch = example.batch_of(text, 3, 4, 16, seed=0)
    assert batch.shape == (4, 17)
    np.testing.assert_array_equal(batch, example.batch_of(text, 3, 4, 16, seed=0))
    assert (batch != example.batch_of(text, 4, 4, 16, seed=0)).any()
    row = bytes(batch[0].astype(np.uint8))
    assert row in bytes(text)


def test_a_step_in_parts_is_the_step_as_a_whole(tmp_path):
    whole = example.main(f"{SMALL} --steps 4 --folder {tmp_path}/a".split())
    parts = example.main(f"{SMALL} --steps 4 --folder {tmp_path}/b --accumulate 4".split())
    np.testing.assert_allclose(whole, parts, rtol=1e-4)
    assert math.isclose(whole[0], math.log(256), rel_tol=0.05)  # nothing is known yet
