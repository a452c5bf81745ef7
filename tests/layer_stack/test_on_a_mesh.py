"""Stacks of layers on meshes: plans speak of layers, and their axis is not split."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import statefulnn as nn
from tests.devices import run_on_devices

ONE = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
P = jax.P


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(jax.nn.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, layers=6):
        super().__init__()
        self.blocks = nn.LayerStack(Block, layers)

    def forward(self, x):
        return self.blocks(x)


def specs(model):
    return {n: p.value.sharding.spec for n, p in model.named_parameters()}


STYLES = {"*.up": nn.parallel.ColwiseParallel(), "*.down": nn.parallel.RowwiseParallel()}
BY_STYLES = {
    "blocks.stack.up.weight": P(None, "model"),
    "blocks.stack.up.bias": P(None, "model"),
    "blocks.stack.down.weight": P(None, None, "model"),
    "blocks.stack.down.bias": P(),
}


def test_styles_of_layers_split_what_is_stored():
    assert specs(nn.parallel.parallelize_module(Net(), ONE, STYLES)) == BY_STYLES


def test_styles_reach_the_layers_of_stacks_in_stacks():
    model = nn.ModuleDict({"groups": nn.LayerStack(lambda: Net(layers=3), 2)})
    found = specs(nn.parallel.parallelize_module(model, ONE, STYLES))
    assert found["groups.stack.blocks.stack.up.weight"] == P(None, None, "model")
    assert found["groups.stack.blocks.stack.down.weight"] == P(None, None, None, "model")


def test_a_layer_by_itself_goes_where_a_plan_says():
    model = Net().to(nn.parallel.Plan(ONE, {"*": P()}))
    layer = model.blocks[2].to(nn.parallel.Plan(ONE, {"up.weight": P("model"), "*": P()}))
    np.testing.assert_array_equal(layer.up.weight.value, model.state_dict()["blocks.2.up.weight"])


def test_the_axis_of_layers_is_not_split_although_it_is_the_largest():
    model = nn.parallel.fully_shard(Net(layers=64), ONE, min_size=1)
    for name, spec in specs(model).items():
        assert spec[0] is None and "data" in spec, name


@pytest.mark.parametrize(
    "pattern", ["blocks.stack.up.weight", "blocks.*.up.weight", "blocks.3.up.weight"]
)
def test_a_plan_has_the_axes_of_a_layer_whatever_its_name_is(pattern):
    model = Net().to(nn.parallel.Plan(ONE, {pattern: P("model", "data"), "*": P()}))
    assert specs(model)["blocks.stack.up.weight"] == P(None, "model", "data")
    assert specs(model)["blocks.stack.down.weight"] == P()


def test_a_function_is_shown_the_array_of_a_layer():
    shapes = {}

    def rule(name, x):
        shapes[name] = x.shape
        return P("model") if x.ndim == 2 else P()

    model = Net().to(nn.parallel.Plan(ONE, rule))
    assert shapes["blocks.stack.up.weight"] == (8, 4)
    assert specs(model)["blocks.stack.up.weight"] == P(None, "model")


@pytest.mark.parametrize("how", ["noted", "given"])
def test_a_stack_is_drawn_where_it_is_to_be_with_the_values_of_one_device(how):
    nn.manual_seed(3)
    plain = Net()
    nn.manual_seed(3)
    with nn.device("meta"):
        model = Net()
    plan = nn.parallel.Plan(ONE, {"*.up.weight": P("model"), "*": P()})
    if how == "noted":
        nn.materialize(model.to(plan))
    else:
        nn.materialize(model, device=plan)
    assert specs(model)["blocks.stack.up.weight"] == P(None, "model")
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        np.testing.assert_array_equal(p.value, q.value, err_msg=name)


ON_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax, statefulnn as nn
from tests.layer_stack.test_on_a_mesh import Net, STYLES

def train(model, x):
    opt = nn.Optimizer(model, optax.adamw(1e-2))

    @nn.jit
    def step(model, opt, x):
        loss, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        opt.step(grads)
        return loss

    losses = [float(step(model, opt, x)) for _ in range(3)]
    assert step.trace_count == 1
    return losses, opt

nn.manual_seed(0)
plain, x = Net(), jax.random.normal(jax.random.key(0), (8, 4))
nn.manual_seed(0)
with nn.device("meta"):
    model = Net()
mesh = nn.parallel.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
nn.parallel.fully_shard(nn.parallel.parallelize_module(model, mesh, STYLES), mesh, min_size=16)
nn.materialize(model)
up = model.blocks.stack.up.weight
assert up.value.sharding.spec == jax.P(None, "model", "data"), up.value.sharding
one, _ = train(plain, x)
several, opt = train(model, nn.parallel.shard_batch(x, mesh))
np.testing.assert_allclose(one, several, rtol=1e-5)
assert up.value.sharding.spec == jax.P(None, "model", "data"), up.value.sharding
slots = opt.state_dict()["mu.blocks.stack.up.weight"]
assert slots.sharding.spec == up.value.sharding.spec
assert model.blocks[2].up.weight.value.sharding.spec == jax.P("model", "data")
"""


def test_a_step_on_four_devices_is_the_step_on_one():
    run_on_devices(4, ON_DEVICES)


GATHERED = r"""
import pickle, re
import jax, jax.numpy as jnp, optax, statefulnn as nn
from tests.layer_stack.test_on_a_mesh import Net

mesh = nn.parallel.init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
model = nn.parallel.fully_shard(Net(), mesh, min_size=1)
opt = nn.Optimizer(model, optax.adamw(1e-2))
x = nn.parallel.shard_batch(jnp.ones((16, 4)), mesh)

@nn.jit
def step(model, opt, x):
    loss, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    opt.step(grads)
    return loss

text = step.lower(model, opt, x).compile().as_text()
kinds = "all-gather|all-reduce|all-to-all|collective-permute"
moved = re.findall(rf"= (.*?) ({kinds})\(.*while/body", text)
found = [s for results, _ in moved for s in re.findall(r"f32\[([\d,]*)\]", results)]
shapes = {tuple(map(int, s.split(","))) for s in found}
weights = {p.shape for p in model.blocks[0].parameters()}
assert shapes == weights, (shapes, weights)
assert {kind for _, kind in moved} == {"all-gather", "all-reduce"}

assert model.blocks.batch_axis == "data"
for x in (x[:3], x):  # what does not divide is left alone, and so is a model on one device
    assert nn.jit(model)(x).shape == x.shape
one = pickle.loads(pickle.dumps(model)).to(jax.devices()[1])
assert nn.jit(one)(jnp.ones((16, 4))).devices() == {jax.devices()[1]}
"""


def test_a_fully_sharded_stack_gathers_weights_and_not_what_layers_compute():
    run_on_devices(4, GATHERED)
