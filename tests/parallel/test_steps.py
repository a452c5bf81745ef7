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
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.KIND,) * 2)
copies = lambda m: parallel.data_parallel(m, mesh)
shards = lambda m: parallel.fully_shard(m, mesh, min_size=64)
layers = lambda m: parallel.parallelize_module(m, mesh, STYLES)
split = STYLES | {"*.ln?": parallel.SequenceParallel(), "*.dropout": parallel.SequenceParallel()}
positions = lambda m: parallel.parallelize_module(m, mesh, split)
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

ways = {
    "data parallel": (copies, same, (), "up", jax.P(), jax.P()),
    "fully sharded": (shards, same, (0, 1), "up", jax.P("data"), jax.P("data")),
    "tensor parallel": (layers, same, (0, 1), "down", jax.P(None, "model"), jax.P(None, "model")),
    "both": (lambda m: shards(layers(m)), same, (), "down", *[jax.P("data", "model")] * 2),
    "sequence": (positions, same, (), "down", *[jax.P(None, "model")] * 2),
    "ZeRO-1": (copies, shards, (), "up", jax.P(), jax.P("data")),
}
for name in WAYS:
    place, place_slots, donate, layer, weight, slot = ways[name]
    found = check(name, place, place_slots, donate)
    assert found[f"0 blocks.0.{layer}.weight"].spec == weight, name
    assert found[f"1 nu.blocks.0.{layer}.weight"].spec == slot, name
"""
)


# Which ways run; the long run has all of them on both kinds of meshes.
SHORT = [("Auto", ["sequence", "ZeRO-1"]), ("Explicit", ["both"])]
WAYS = ["data parallel", "fully sharded", "tensor parallel", "both", "sequence", "ZeRO-1"]
LONG = [pytest.param(kind, WAYS, marks=pytest.mark.long) for kind in ("Auto", "Explicit")]


@pytest.mark.parametrize(("kind", "ways"), [*SHORT, *LONG])
def test_a_step_gives_the_losses_of_one_device_and_leaves_every_array_where_it_was_put(kind, ways):
    run_on_devices(4, STEPS.replace("KIND", kind).replace("WAYS", repr(ways)))


COLLECTIVES = (
    SETUP
    + """
import collections, re
mesh = parallel.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
model = parallel.fully_shard(parallel.parallelize_module(built(), mesh, STYLES), mesh, min_size=64)
opt = optimizer(model)
x, y = parallel.shard_batch(batch(), mesh)

def counted(compiled):
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf" ({kinds})(?:-start)?\\(", compiled.as_text())
    return collections.Counter(found)

ours = nn.jit(train_step).lower(model, opt, x, y).compile()
fn, params = nn.functionalize(model)
tx = opt.tx
slots = tx.init(params)
everywhere = NamedSharding(mesh, jax.P())
slots = jax.tree.map(lambda v: v if v.ndim else jax.device_put(v, everywhere), slots)

def by_hand(params, slots, key, x, y):
    def loss_of(params):
        return F.cross_entropy(fn(params, x, rng=key).reshape(-1, VOCABULARY), y.reshape(-1))
    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, slots = tx.update(grads, slots, params)
    return loss, optax.apply_updates(params, updates), slots

places = jax.tree.map(lambda v: v.sharding, (params, slots))
key = jax.device_put(jax.random.key(0), everywhere)
theirs = jax.jit(by_hand, out_shardings=(None, *places)).lower(params, slots, key, x, y).compile()
assert counted(ours) <= counted(theirs), (counted(ours), counted(theirs))
assert counted(ours)["all-reduce"] and counted(ours)["all-gather"]
"""
)


def test_a_step_has_no_more_collectives_than_one_by_hand():
    run_on_devices(4, COLLECTIVES)
