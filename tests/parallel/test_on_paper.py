"""The formulas of benchmarks/plan.py, and a step by hand, beside what XLA compiles for eight devices."""

from __future__ import annotations

from tests.devices import run_on_devices

PROGRAM = """
import sys; sys.path.insert(0, "benchmarks")
import numpy as np
import _sharded, plan

sizes = plan.Sizes(width=32, heads=8, layers=2, vocabulary=64, length=16)
for layout in plan.ON_EIGHT:
    program = plan.compiled(layout, sizes)
    found, expected = plan.collectives(program.as_text()), plan.volumes(layout, sizes)
    seen = plan.counted(found)
    if layout.sharded and layout.model > 1:  # the embedding and the head are XLA's affair there
        seen, expected = ({k: v for k, v in c.items() if k[1] == plan.BLOCK} for c in (seen, expected))
    assert seen == expected, (layout.name, seen, expected)
    if layout.model == 1:
        parts = 8 if layout.sharded else 1
        tokens = sizes.batch // 8 * (sizes.length + 1) * 4
        state = 3 * sizes.parameters() * 4 // parts + 4  # weights, two slots of each, Adam's count
        held = program.memory_analysis().argument_size_in_bytes
        assert held == state + tokens, (layout.name, held, state + tokens)
    if layout.model == 8:
        assert {c.layer for c in found} == {"blocks.o", "blocks.down", "blocks.up", "blocks"}

steps = _sharded.Steps(sizes)
losses = [[float(step()) for _ in range(2)] for step in (steps.ours, steps.theirs)]
np.testing.assert_allclose(*losses, rtol=1e-5)
ours, theirs = steps.collectives().values()
theirs["all-reduce of the rest"] += 1  # our loss adds up what it divides by, too
assert ours == theirs, (ours, theirs)
assert steps.traces() == 1
"""


def test_what_devices_exchange_is_what_the_formulas_say_and_what_jax_by_hand_exchanges():
    run_on_devices(8, PROGRAM)
