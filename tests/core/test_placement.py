"""Where arrays are put: devices by name, the meta device, shardings, and models that are never whole."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn

CPU = jax.devices("cpu")[0]


def structs(module: nn.Module) -> list[bool]:
    return [isinstance(p.value, jax.ShapeDtypeStruct) for p in module.parameters()]


@pytest.mark.parametrize(
    "name", ["cpu", "cpu:0", CPU, nn.device("cpu"), jax.sharding.SingleDeviceSharding(CPU)]
)
def test_a_device_by_any_name(name) -> None:
    layer = nn.Linear(2, 3, device=name)
    assert layer.weight.value.committed
    assert layer.weight.value.devices() == {CPU}
    assert nn.Linear(2, 3).to(name).weight.value.devices() == {CPU}


@pytest.mark.parametrize(
    ("name", "error"), [("abacus", ValueError), ("cpu:99", ValueError), (3.5, TypeError)]
)
def test_a_device_that_is_not_there(name, error) -> None:
    with pytest.raises(error, match="Instead: "):
        nn.Linear(2, 3, device=name)
    with pytest.raises(error):
        nn.device(name)


def test_a_block_puts_everything_that_is_built_in_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(jnp.ones(3))
            self.register_buffer("count", jnp.zeros(()))
            self.norm = nn.BatchNorm1d(3)
            self.kept = nn.Linear(2, 2, device="cpu")

    with nn.device("meta"):
        net = Net()
    assert isinstance(net.scale.value, jax.ShapeDtypeStruct)
    assert isinstance(net.count, jax.ShapeDtypeStruct)
    assert isinstance(net.norm.running_var, jax.ShapeDtypeStruct)
    assert isinstance(net.kept.weight.value, jax.Array)  # what a layer is told wins
    assert not any(structs(nn.Linear(2, 2)))


def test_blocks_nest_and_are_left_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), nn.device("meta"):
        with nn.device("cpu"):
            assert not any(structs(nn.Linear(2, 2)))
        assert all(structs(nn.Linear(2, 2)))
        1 / 0
    assert not any(structs(nn.Linear(2, 2)))


def test_a_device_shows_itself() -> None:
    assert nn.device("meta").type == "meta"
    assert nn.device("cpu", 0) == nn.device(CPU)
    assert len({nn.device("cpu"), nn.device(CPU)}) == 1


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LSTM", "MultiheadAttention", "Embedding"])
def test_a_meta_layer_has_torchs_shapes_and_draws_nothing(name) -> None:
    args = {"Linear": (3, 4), "Conv2d": (3, 4, 3), "LSTM": (3, 4)}.get(name, (4, 2))
    nn.manual_seed(0)
    before = nn.get_rng_state()
    ours = getattr(nn, name)(*args, device="meta")
    assert (before == nn.get_rng_state()).all()
    theirs = getattr(torch.nn, name)(*args, device="meta")
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    assert all(structs(ours))


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m(jnp.ones((1, 3))),
        lambda m: nn.jit(m)(jnp.ones((1, 3))),
        lambda m: nn.functional_call(m, {}, jnp.ones((1, 3))),
        lambda m: m.weight + 1,
        lambda m: np.asarray(m.weight),
    ],
)
def test_computing_with_a_meta_layer_says_what_to_do(use) -> None:
    with pytest.raises(nn.UninitializedParameterError, match=r"nn\.materialize"):
        use(nn.Linear(3, 4, device="meta"))


def test_shapes_of_a_meta_model_can_be_computed() -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.ReLU())
    out = jax.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((7, 3), jnp.float32))
    assert out.shape == (7, 4)


def test_meta_models_cannot_be_moved_but_emptied() -> None:
    layer = nn.Linear(3, 4, device="meta")
    with pytest.raises(NotImplementedError, match="to_empty"):
        layer.to("cpu")
    with pytest.raises(NotImplementedError):
        torch.nn.Linear(3, 4, device="meta").to("cpu")
    assert layer.to(jnp.bfloat16).weight.dtype == jnp.bfloat16
    assert layer.to_empty(device="cpu") is layer
    assert layer.weight.value.shape == (4, 3)
    assert layer.weight.dtype == jnp.bfloat16
    assert all(structs(layer.to("meta")))


def test_a_state_dict_fills_a_meta_model() -> None:
    source = nn.Linear(3, 4)
    for assign in (False, True):
        layer = nn.Linear(3, 4, device="meta")
        layer.load_state_dict(source.state_dict(), assign=assign)
        np.testing.assert_array_equal(layer(jnp.ones((1, 3))), source(jnp.ones((1, 3))))
    with pytest.raises(nn.StateDictError, match="meta"):
        source.load_state_dict(nn.Linear(3, 4, device="meta").state_dict())


def test_skip_init_gives_zeros_where_they_belong() -> None:
    layer = nn.utils.skip_init(nn.Linear, 3, 4, bias=False, device="cpu")
    assert (np.asarray(layer.weight) == 0).all()
    assert layer.bias is None
    for wrong in (nn.ReLU, dict, 3):
        with pytest.raises(RuntimeError, match="Instead: "):
            nn.utils.skip_init(wrong)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LSTM(16, 8),
    )


def test_materialize_draws_what_construction_draws() -> None:
    nn.manual_seed(3)
    eager = model()
    with nn.device("meta"):
        meta = model()
    nn.manual_seed(3)
    assert nn.materialize(meta) is meta
    for name, value in eager.state_dict().items():
        np.testing.assert_array_equal(meta.state_dict()[name], value, err_msg=name)


def test_materialize_keeps_what_has_values() -> None:
    with nn.device("meta"):
        meta = model()
    weight = jnp.full((4, 3, 3, 3), 7.0)
    meta[0].weight.data = weight
    nn.materialize(meta)
    np.testing.assert_array_equal(meta[0].weight, weight)
    assert not any(structs(meta))


def test_materialize_without_a_rule_names_the_module_and_changes_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.scale = nn.Parameter(jnp.ones(3))

    with nn.device("meta"):
        outer = nn.Sequential(nn.Linear(2, 2), Net())
    with pytest.raises(nn.UninitializedParameterError, match="'1'"):
        nn.materialize(outer)
    assert all(structs(outer))


def test_materialize_that_fails_half_way_changes_nothing() -> None:
    class Net(nn.Linear):
        def reset_parameters(self) -> None:
            if not isinstance(self.weight.value, jax.ShapeDtypeStruct):
                raise ZeroDivisionError

    with nn.device("meta"):
        outer = nn.Sequential(nn.Linear(2, 2), Net(2, 2))
    with pytest.raises(ZeroDivisionError):
        nn.materialize(outer)
    assert all(structs(outer))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
import statefulnn as nn
from jax.sharding import NamedSharding, PartitionSpec as P

assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("x",))
rows, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())

def build(**kw):
    nn.manual_seed(5)
    return nn.Sequential(nn.Linear(40, 64, **kw), nn.ReLU(), nn.Linear(64, 8, **kw))

plain = build()
direct = build(device=rows)
with nn.device("meta"):
    meta = build()
nn.manual_seed(5)
seen = []
def place(name, struct):
    seen.append(name)
    return rows if struct.ndim == 2 else everywhere
nn.materialize(meta, device=place)
assert sorted(seen) == sorted(n for n, _ in plain.named_parameters())
for name, value in plain.state_dict().items():
    np.testing.assert_array_equal(direct.state_dict()[name], value)
    np.testing.assert_array_equal(meta.state_dict()[name], value)
assert meta[0].weight.value.sharding == rows
assert {s.data.shape for s in meta[0].weight.value.addressable_shards} == {(16, 40)}
assert meta[0].bias.value.sharding == everywhere
normal = nn.init.normal_(nn.Parameter(jnp.zeros((64, 40))), generator=nn.Generator(1))
shard = nn.Parameter(jnp.zeros((64, 40), device=rows))
nn.init.normal_(shard, generator=nn.Generator(1))
np.testing.assert_array_equal(shard, normal)
assert shard.value.sharding == rows
def weights(key):
    with nn.rng_scope(key):
        return nn.Linear(40, 64).weight.value
key = jax.random.key(2)
np.testing.assert_array_equal(jax.jit(weights, out_shardings=rows)(key), weights(key))
print("same")
"""


def test_values_are_the_same_eager_compiled_and_sharded() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "same", done.stderr
