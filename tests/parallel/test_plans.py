"""Plans by name: which pattern decides, what does not fit, and models that are drawn where they belong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.devices import run_on_devices

parallel = nn.parallel
P = jax.P
ONE = jax.make_mesh((1,), ("data",))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))


def specs(module: nn.Module) -> dict[str, jax.P]:
    return {n: p.value.sharding.spec for n, p in module.named_parameters()}


def test_one_pattern_decides_and_a_star_stands_for_the_rest():
    m = model().to(parallel.Plan(ONE, {"0.weight": P("data"), "2.*": P(None), "*": P()}))
    found = specs(m)
    assert (found["0.weight"], found["2.weight"], found["1.weight"]) == (P("data"), P(None), P())
    assert m[1].num_batches_tracked.sharding.spec == P()


def test_a_function_of_name_and_array_is_a_plan():
    rows = lambda name, x: P("data") if x.ndim == 2 and name != "2.weight" else P()
    for plan in (parallel.Plan(ONE, rows), lambda n, x: jax.NamedSharding(ONE, rows(n, x))):
        found = specs(model().to(plan))
        assert (found["0.weight"], found["2.weight"], found["0.bias"]) == (P("data"), P(), P())


def test_a_tied_parameter_answers_to_all_of_its_names():
    m = nn.ModuleDict({"tok": nn.Embedding(4, 6), "head": nn.Linear(6, 4, bias=False)})
    m["head"].weight = m["tok"].weight
    m.to(parallel.Plan(ONE, {"head.weight": P("data")}))
    assert m["tok"].weight.value.sharding.spec == P("data")
    with pytest.raises(nn.ArgumentError, match="say different things"):
        m.to(parallel.Plan(ONE, {"head.weight": P("data"), "tok.weight": P()}))


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        ({"3.weight": P(), "*": P()}, nn.UnknownNameError, "3.weight"),
        ({"0.weight": P()}, nn.UnknownNameError, "'0.bias'"),
        ({"0.*": P("data"), "*.weight": P(), "*": P()}, nn.ArgumentError, "'0.weight'"),
        ({"*": P("data")}, nn.ShapeError, "num_batches_tracked"),
        ({"*": P("model")}, nn.UnknownNameError, "axis 'model'"),
        ({"*": "data"}, nn.ArgumentError, "PartitionSpec"),
        (lambda name, x: "data", nn.ArgumentError, "PartitionSpec"),
    ],
    ids=["nothing", "no pattern", "twice", "rank", "axis", "no spec", "no spec of a function"],
)
def test_a_plan_that_does_not_fit_moves_nothing(rules, error, text):
    m = model()
    before = dict(m.state_dict())
    with pytest.raises(error, match=text) as caught:
        m.to(parallel.Plan(ONE, rules))
    assert "Instead: " in str(caught.value)
    assert all(v is before[n] for n, v in m.state_dict().items())


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (lambda: parallel.Plan(3, {"*": P()}), nn.ArgumentError),
        (lambda: parallel.fully_shard(model(), ONE, axis="model"), nn.UnknownNameError),
        (lambda: parallel.shard_batch(jnp.ones(4), ONE, axis="model"), nn.UnknownNameError),
        (lambda: parallel.init_device_mesh("cpu", (99,), mesh_dim_names=("data",)), ValueError),
        (
            lambda: parallel.parallelize_module(
                model(), ONE, {"1": parallel.ColwiseParallel()}, axis="data"
            ),
            nn.ArgumentError,
        ),
        (
            lambda: parallel.parallelize_module(
                model(), ONE, {"fc": parallel.ColwiseParallel()}, axis="data"
            ),
            nn.UnknownNameError,
        ),
        (
            lambda: parallel.parallelize_module(
                model(), ONE, {"0": parallel.ColwiseParallel}, axis="data"
            ),
            nn.ArgumentError,
        ),
        (
            lambda: parallel.parallelize_module(model(), ONE, "colwise", axis="data"),
            nn.ArgumentError,
        ),
        (lambda: parallel.init_device_mesh("cpu", (1, 1), mesh_dim_names="data"), ValueError),
        (lambda: parallel.init_device_mesh("cpu", (1, 1), mesh_dim_names="aa"), ValueError),
        (lambda: parallel.init_device_mesh("cpu", (0,), mesh_dim_names=("data",)), ValueError),
        (lambda: parallel.init_device_mesh("cpu", (1, 1), mesh_dim_names=["a"] * 2), ValueError),
        (lambda: nn.jit(model(), in_shardings=None), nn.ArgumentError),
        (lambda: nn.jit(model(), out_shardings=None), nn.ArgumentError),
    ],
    ids=[
        *["mesh", "axis", "axis of a batch", "devices", "style", "pattern"],
        *["class of a style", "name of a style", "names", "letters", "size", "one name twice"],
        *["in", "out"],
    ],
)
def test_what_is_asked_for_and_not_there_is_an_error_that_says_what_to_do(use, error):
    with pytest.raises(error, match="Instead: "):
        use()


def test_too_few_devices_tells_of_virtual_ones():
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count=8"):
        parallel.init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "model"))


def test_styles_split_layers_as_torch_does():
    m = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4), "e": nn.Embedding(5, 4)})
    columns, rows = parallel.ColwiseParallel(), parallel.RowwiseParallel()
    parallel.parallelize_module(m, ONE, {"a": columns, "[be]": rows}, axis="data")
    assert specs(m) == {
        "a.weight": P("data"),
        "a.bias": P("data"),
        "b.weight": P(None, "data"),
        "b.bias": P(),
        "e.weight": P("data"),
    }
    parallel.parallelize_module(m["e"], ONE, columns, axis="data")
    assert m["e"].weight.value.sharding.spec == P(None, "data")


def test_a_plan_says_where_what_is_loaded_goes(tmp_path):
    source = model()
    nn.save(source, tmp_path / "m.safetensors")
    plan = parallel.Plan(ONE, {"0.weight": P("data"), "*": P()})
    state = nn.load(tmp_path / "m.safetensors", device=plan)
    assert state["0.weight"].sharding.spec == P("data")
    np.testing.assert_array_equal(state["0.weight"], source[0].weight)
    with pytest.raises(nn.ShapeError, match=r"0\.bias"):
        nn.load(tmp_path / "m.safetensors", device=parallel.Plan(ONE, {"*": P(None, "data")}))


ON_EIGHT = """
import sys; sys.path.insert(0, ".")
import jax, jax.numpy as jnp, numpy as np, statefulnn as nn
from tests.parallel.programs import *
parallel = nn.parallel
mesh = jax.make_mesh((4, 2), ("data", "model"))
"""


def test_what_does_not_divide_is_named_with_both_numbers_and_devices_do_not_mix():
    run_on_devices(
        8,
        ON_EIGHT
        + """
def message(error, use):
    try:
        use()
    except error as raised:
        return str(raised)
    raise AssertionError("no error")

m = nn.Linear(4, 6)
text = message(nn.ShapeError, lambda: m.to(parallel.Plan(mesh, {"weight": jax.P("data"), "*": jax.P()})))
assert "'weight' of shape (6, 4)" in text and "axis 0 has 6" in text and "4 equal parts" in text, text
assert m.weight.value.devices() == {jax.devices()[0]}
text = message(nn.ShapeError, lambda: parallel.shard_batch({"x": jnp.ones((6, 3))}, mesh))
assert "batch['x']" in text, text
odd, columns = nn.Linear(4, 3), parallel.ColwiseParallel()
text = message(nn.ShapeError, lambda: parallel.parallelize_module(odd, mesh, columns))
assert "'weight'" in text, text
x = parallel.shard_batch(jnp.ones((8, 3)), mesh, axis=("data", "model"))
assert x.sharding.shard_shape((8, 3)) == (1, 3)

first, second = (jax.make_mesh((2,), ("data",), devices=jax.devices()[i : i + 2]) for i in (0, 2))
m = parallel.data_parallel(nn.Linear(3, 4), first)
x = parallel.shard_batch(jnp.ones((2, 3)), second)
text = message(ValueError, lambda: nn.jit(lambda model, x: model(x))(m, x))
assert "'model.weight' on [0, 1]; 'x' on [2, 3]" in text, text

m = parallel.data_parallel(nn.Linear(3, 4), first)
b = jax.device_put(jnp.ones(4), jax.NamedSharding(jax.make_mesh((2,), ("other",)), jax.P()))
text = message(ValueError, lambda: nn.jit(lambda model, b: model.bias + b)(m, b))
assert "'model.weight' on Mesh('data': 2" in text and "'b' on Mesh('other': 2" in text, text

# The largest axis that divides, of what is large enough, and of what is not split yet.
m = parallel.fully_shard(nn.Linear(64, 32), mesh)
assert (m.weight.value.sharding.spec, m.bias.value.sharding.spec) == (jax.P(None, "data"), jax.P())
m = parallel.fully_shard(nn.Linear(62, 32), mesh)
assert m.weight.value.sharding.spec == jax.P("data")
m = parallel.fully_shard(nn.Linear(63, 31), mesh, min_size=0)
assert m.weight.value.sharding.is_fully_replicated
m = parallel.parallelize_module(nn.Linear(32, 64), mesh, parallel.ColwiseParallel())
assert parallel.fully_shard(m, mesh).weight.value.sharding.spec == jax.P("model", "data")
assert parallel.fully_shard(m, mesh).weight.value.sharding.spec == jax.P("model", "data")
""",
    )


def test_what_nobody_placed_goes_where_the_array_was_that_it_replaces():
    run_on_devices(
        8,
        ON_EIGHT
        + """
m = parallel.fully_shard(nn.BatchNorm1d(8), mesh, min_size=1)
p, there = m.weight, m.weight.value.sharding
new = jnp.arange(8.0)
for write in (
    lambda: setattr(p, "value", new),
    lambda: setattr(p, "value", np.ones(8, np.float32)),
    lambda: setattr(p, "data", jnp.ones(8, jnp.bfloat16)),
    lambda: nn.utils.vector_to_parameters(jnp.ones(16), m.parameters()),
    lambda: m.load_state_dict(nn.BatchNorm1d(8).state_dict(), assign=True),
):
    write()
    assert p.value.sharding == there, p.value.sharding
m.running_mean = jnp.ones(8)
assert m.running_mean.sharding == there
p.value = new
nn.jit(lambda m: setattr(m.weight, "value", m.weight + 1), donate=0)(m)
assert new.sum() == 28 and p.value.sum() == 36 and p.value.sharding == there

p.value = jax.device_put(new, jax.devices()[3])  # somebody placed it
assert p.value.devices() == {jax.devices()[3]}
with nn.device("meta"):
    m = nn.Linear(8, 8)
parallel.fully_shard(m, mesh, min_size=64).load_state_dict(nn.Linear(8, 8).state_dict(), assign=True)
assert m.weight.value.sharding.spec == jax.P("data")
""",
    )


def test_what_is_drawn_in_place_has_the_values_of_one_device_and_ties_are_drawn_once():
    run_on_devices(
        8,
        ON_EIGHT
        + """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.copies = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.gpt, self.norm, self.lstm = GPT(), nn.BatchNorm1d(64), nn.LSTM(8, 16)

plain = built(Model)
styles = {f"gpt.{name}": style for name, style in STYLES.items()}
both = jax.P(None, ("data", "model"))
plan = parallel.Plan(mesh, {"*.down.weight": both, "gpt.head.weight": jax.P("data"), "*": jax.P()})
for device in (None, plan):
    with nn.device("meta"):
        model = Model()
    if device is None:
        parallel.parallelize_module(model, mesh, styles)
        assert parallel.fully_shard(model, mesh, min_size=64) is model
        model.to(jnp.float32)
        assert isinstance(model.norm.weight.value, jax.ShapeDtypeStruct)
    nn.manual_seed(0)
    nn.materialize(model, device=device)
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)
    assert model.gpt.tok.weight is model.gpt.head.weight
    spec = model.gpt.blocks[0].down.weight.value.sharding.spec
    assert spec == (jax.P("data", "model") if device is None else both)
    assert model.gpt.tok.weight.value.sharding.spec in (jax.P("data"), jax.P("model", "data"))
""",
    )


def test_a_program_for_many_devices_is_compiled_without_numbers():
    run_on_devices(
        8,
        ON_EIGHT
        + """
with nn.device("meta"):
    model = nn.Linear(256, 512, bias=False)
parallel.fully_shard(model, mesh)
x = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
compiled = nn.jit(lambda model, x: model(x)).lower(model, x).compile()
parts = (512 * 256 // 4 + 8 * 256 // 4) * 4
assert compiled.memory_analysis().argument_size_in_bytes == parts
""",
    )


def test_a_large_model_is_never_whole_twice_in_memory():
    run_on_devices(
        8,
        ON_EIGHT
        + """
import resource
mesh = jax.make_mesh((8,), ("data",))

def drawn(count):
    with nn.device("meta"):
        model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(count)])
    nn.materialize(parallel.fully_shard(model, mesh))
    jax.block_until_ready([p.value for p in model.parameters()])
    return model

first = drawn(1)  # compiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = drawn(16)
size = sum(p.value.nbytes for p in model.parameters())
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
assert used <= 1.1 * size, (used, size)
""",
    )
