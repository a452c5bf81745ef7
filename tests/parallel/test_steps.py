"""Training steps on a mesh: the losses of one device, one compilation, and every array where it was put."""

from __future__ import annotations

import pytest

from tests.devices import run_on_devices

SETUP = """
import sys; sys.path.insert(0, ".")
import jax, numpy as np, statefulnn as nn
from jax.sharding import AxisType, NamedSharding
from tests.parallel.programs import *
parallel = nn.parallel
"""

STEPS = (
    SETUP
    + """
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.{kind},) * 2)
copies = lambda m: parallel.data_parallel(m, mesh)
shards = lambda m: parallel.fully_shard(m, mesh, min_size=64)
layers = lambda m: parallel.parallelize_module(m, mesh, STYLES)
same = lambda o: o
expected = reference()
batch_ = parallel.shard_batch(batch(), mesh)

def check(name, place, place_slots, donate):
    model = place(built())
    opt = place_slots(optimizer(model))
    before = shardings(model, opt)
    step = nn.jit(train_step, donate=donate)
    with compilations() as count:
        found = losses(step, model, opt, *batch_)
        assert count() == 1, (name, count())
    assert step.trace_count == 1, name
    np.testing.assert_allclose(found, expected, rtol=2e-6, err_msg=name)
    before["1 count"] = NamedSharding(mesh, jax.P())
    after = shardings(model, opt)
    moved = [(n, s, after[n]) for n, s in before.items() if not s.is_equivalent_to(after[n], 2)]
    assert not moved, moved
    opt.register_buffer("noted", jax.numpy.zeros(()))  # the next call looks at everything anew
    del opt.noted
    assert np.isfinite(step(model, opt, *batch_)) and step.trace_count == 1, (name, step.trace_count)
    return before

found = check("data parallel", copies, same, ())
assert found["0 blocks.0.up.weight"].spec == found["1 mu.blocks.0.up.weight"].spec == jax.P()
found = check("fully sharded", shards, same, (0, 1))
assert found["0 blocks.0.up.weight"].spec == found["1 mu.blocks.0.up.weight"].spec == jax.P("data")
found = check("tensor parallel", layers, same, ())
assert found["0 blocks.0.down.weight"].spec == found["1 nu.blocks.0.down.weight"].spec == jax.P(None, "model")
found = check("both", lambda m: shards(layers(m)), same, (0, 1))
assert found["0 blocks.0.down.weight"].spec == jax.P("data", "model")
found = check("ZeRO-1", copies, shards, ())
assert found["0 blocks.0.up.weight"].spec == jax.P()
assert found["1 mu.blocks.0.up.weight"].spec == jax.P("data")
"""
)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_step_gives_the_losses_of_one_device_and_leaves_every_array_where_it_was_put(kind):
    run_on_devices(4, STEPS.format(kind=kind))
