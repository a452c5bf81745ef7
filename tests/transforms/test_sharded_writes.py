"""On several devices a box has a placement, and what compiled code writes to it keeps it."""

from __future__ import annotations

import pytest

from tests.devices import failures_on_devices

SETUP = """
import jax, jax.numpy as jnp, numpy as np, optax, statefulnn as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
auto = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
everywhere, rows = NamedSharding(auto, P()), NamedSharding(auto, P("d"))
x = jax.device_put(jnp.arange(32.0).reshape(8, 4), rows)
def step(m, o, x):
    o.step(nn.grad(lambda m: (m(x) ** 2).sum())(m))
"""

PROGRAMS = {
    "parameters_and_slots_keep_their_shardings_whatever_xla_would_choose": """
one = nn.Linear(4, 8)
state = {k: np.array(v) for k, v in one.state_dict().items()}
m = nn.Linear(4, 8)
m.load_state_dict(state)
m.to(everywhere)
opt, plain = nn.Optimizer(m, optax.adam(1e-2)), nn.Optimizer(one, optax.adam(1e-2))
for name in ("mu", "nu"):
    slot = opt.get_submodule(name)
    slot.weight = jax.device_put(slot.weight, rows)
f, g = nn.jit(step), nn.jit(step)
for _ in range(3):
    f(m, opt, x)
    g(one, plain, np.asarray(x))
    assert m.weight.sharding.is_equivalent_to(everywhere, 2), m.weight.sharding
    assert opt.get_submodule("mu").weight.sharding.is_equivalent_to(rows, 2)
assert f.trace_count == 1, f.trace_count
for name, value in one.state_dict().items():
    np.testing.assert_allclose(np.asarray(m.state_dict()[name]), np.asarray(value), rtol=1e-5, atol=1e-6)
""",
    "a_parameter_that_was_put_elsewhere_stays_there_from_then_on": """
m = nn.Linear(4, 8).to(everywhere)
f = nn.jit(lambda m, x: setattr(m.weight, "value", m.weight * 0.5), donate=0)
for sharding in (everywhere, rows, everywhere):
    m.weight.value = jax.device_put(m.weight.value, sharding)
    for _ in range(2):
        f(m, x)
        assert m.weight.sharding.is_equivalent_to(sharding, 2), (sharding, m.weight.sharding)
assert f.trace_count == 2, f.trace_count
""",
    "explicit_meshes_keep_shardings_too": """
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(mesh):
    w = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("d", None)))
    m = nn.Linear(4, 8, bias=False)
    m.weight.data = w
    f = nn.jit(lambda m: setattr(m.weight, "value", m.weight * 0.5))
    for _ in range(2):
        f(m)
        assert m.weight.sharding.spec == P("d", None), m.weight.sharding
    assert f.trace_count == 1
""",
    "models_on_one_device_know_nothing_of_placements": """
m = nn.BatchNorm1d(4)
f = nn.jit(lambda m, x: m(x))
for _ in range(3):
    f(m, jnp.ones((8, 4)))
assert f.trace_count == 1
assert len(m.running_mean.sharding.device_set) == 1
""",
    "the_default_generator_serves_models_on_a_mesh_and_on_one_device": """
other = NamedSharding(jax.make_mesh((2,), ("e",), devices=jax.devices()[2:]), P())
spread_out = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(everywhere)
apart = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(other)
alone = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
put = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(jax.devices()[1])
calls = [nn.jit(m) for m in (spread_out, alone, apart, put)]
ones, last = jnp.ones((8, 4)), jax.devices()[1]
inputs = [x, ones, jax.device_put(ones, other), jax.device_put(ones, last)]
for _ in range(3):
    outs = [call(v) for call, v in zip(calls, inputs)]
assert [len(m[0].weight.sharding.device_set) for m in (spread_out, alone, apart, put)] == [4, 1, 2, 1]
assert [call.trace_count for call in calls] == [1, 1, 1, 1], [call.trace_count for call in calls]
""",
}


@pytest.fixture(scope="module")
def failures():
    return failures_on_devices(4, {name: SETUP + code for name, code in PROGRAMS.items()})


@pytest.mark.parametrize("program", PROGRAMS)
def test_on_four_devices(program, failures):
    assert program not in failures, failures[program]
