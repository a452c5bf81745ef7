"""What the rows cannot say of normalisation: several batches, state, batches spread over devices."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import statefulnn as nn
import statefulnn.functional as F
from tests.parity.oracle import Case, array, close, load, pair, sixty_four_bits
from tests.precision import in_float64


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("BatchNorm2d", {"momentum": 0.1}),
        ("BatchNorm2d", {"momentum": None}),
        ("InstanceNorm2d", {"momentum": 0.3, "track_running_stats": True}),
        ("InstanceNorm2d", {"momentum": None, "track_running_stats": True}),
    ],
)
def test_running_statistics_agree_over_several_batches(layer: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(Case(layer, (4,), options))
    step = nn.jit(lambda model, x: model(x))
    for seed in range(4):
        x = array(3, 4, 5, 5, seed=seed)
        theirs(torch.as_tensor(x))
        step(ours, jnp.asarray(x))
    for name, value in theirs.named_buffers():
        np.testing.assert_allclose(ours.get_buffer(name), value.numpy(), rtol=1e-5, atol=1e-7)
    assert int(ours.num_batches_tracked) == (4 if layer == "BatchNorm2d" else 0)


def test_switching_the_tracking_off_leaves_the_statistics_alone() -> None:
    theirs, ours = pair(Case("BatchNorm1d", (3,)))
    theirs.track_running_stats = ours.track_running_stats = False
    x = array(4, 3)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        close(ours(jnp.asarray(x)), theirs(torch.as_tensor(x)), "output", 1e-5)
        for name, value in theirs.named_buffers():
            np.testing.assert_array_equal(ours.get_buffer(name), value.numpy())


# --------------------------------------------------------------------------------------------------
# The number of batches


@pytest.mark.parametrize("count", [0, 1, 1000, 2**31 - 3])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer", ["BatchNorm1d", "InstanceNorm1d"])
def test_batches_are_counted_from_any_number_as_in_torch(
    layer: str, momentum: float | None, count: int
) -> None:
    options = {"momentum": momentum, "track_running_stats": True}
    theirs, ours = pair(Case(layer, (3,), options))
    theirs.num_batches_tracked.fill_(count)
    load(ours, theirs)
    for seed in range(2):
        x = array(4, 3, 5, seed=seed)
        close(ours(jnp.asarray(x)), theirs(torch.as_tensor(x)), "output", 1e-5)
    for name, value in theirs.named_buffers():
        np.testing.assert_allclose(ours.get_buffer(name), value.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("x64", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("layer", "counts"), [("BatchNorm2d", True), ("SyncBatchNorm", True), ("InstanceNorm2d", False)]
)
def test_the_number_of_batches_stays_at_the_largest_of_its_dtype(
    layer: str, counts: bool, momentum: float | None, x64: bool, compiled: bool
) -> None:
    with in_float64(x64):
        options = {"momentum": momentum, "track_running_stats": True, "dtype": jnp.float32}
        ours = getattr(nn, layer)(3, **options)
        counter = ours.num_batches_tracked
        assert counter.dtype == (jnp.int64 if x64 else jnp.int32)
        largest = np.iinfo(counter.dtype).max
        ours.num_batches_tracked = jnp.asarray(largest - 1, counter.dtype)
        step = nn.jit(lambda model, x: model(x)) if compiled else lambda model, x: model(x)
        for seed in range(3):
            step(ours, jnp.asarray(array(2, 3, 4, 4, seed=seed)))
            assert int(ours.num_batches_tracked) == (largest if counts else largest - 1)
        assert ours.num_batches_tracked.dtype == counter.dtype
        # One of so many batches moves an average by nothing that float32 could show.
        if momentum is None:
            np.testing.assert_allclose(ours.running_mean, 0, atol=1e-8)
            np.testing.assert_allclose(ours.running_var, 1, atol=1e-8)
        else:
            assert np.abs(np.asarray(ours.running_mean)).max() > 1e-3


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_a_count_of_any_integer_dtype_goes_up_to_its_largest(dtype: str) -> None:
    with in_float64("64" in dtype):
        largest = np.iinfo(dtype).max
        x = jnp.asarray(array(4, 3))
        statistics = jnp.zeros(3, jnp.float32), jnp.ones(3, jnp.float32)
        for before in (0, 5, largest - 1, largest):
            count = jnp.asarray(before, dtype)
            *_, after = F.batch_norm_with_stats(x, *statistics, num_batches_tracked=count)
            assert (int(after), after.dtype) == (min(before + 1, largest), dtype)


# --------------------------------------------------------------------------------------------------
# State dicts


def test_batch_norm_state_without_a_version_counts_from_zero() -> None:
    old = {k: np.ones(3, np.float32) for k in ("weight", "bias", "running_mean", "running_var")}
    theirs, ours = torch.nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    theirs.load_state_dict({k: torch.as_tensor(v) for k, v in old.items()})
    ours.load_state_dict(old)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 0


@pytest.mark.parametrize("layer", ["BatchNorm1d", "BatchNorm3d", "InstanceNorm2d", "SyncBatchNorm"])
def test_state_carries_its_version(layer: str) -> None:
    ours, theirs = getattr(nn, layer)(3), getattr(torch.nn, layer)(3)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


def test_instance_norm_refuses_statistics_of_old_checkpoints() -> None:
    old = {k: np.ones(3, np.float32) for k in ("running_mean", "running_var")}
    with pytest.raises(RuntimeError, match="Unexpected running stats"):
        torch.nn.InstanceNorm1d(3).load_state_dict({k: torch.as_tensor(v) for k, v in old.items()})
    with pytest.raises(RuntimeError, match="track_running_stats=True"):
        nn.InstanceNorm1d(3).load_state_dict(old)


# --------------------------------------------------------------------------------------------------
# Functions that write, and layers that warn


def test_instance_norm_writes_the_buffers_it_is_given() -> None:
    x = array(5, 3, 4)
    mean, var = nn.Buffer(jnp.zeros(3)), nn.Buffer(jnp.ones(3))
    t_mean, t_var = torch.zeros(3), torch.ones(3)
    ours = F.instance_norm(jnp.asarray(x), mean, var)
    close(ours, TF.instance_norm(torch.as_tensor(x), t_mean, t_var), "out", 1e-5)
    close(mean.value, t_mean, "mean", 1e-6)
    close(var.value, t_var, "var", 1e-6)


def test_instance_norm_does_not_drop_statistics_silently() -> None:
    with pytest.raises(nn.StateWriteError, match="instance_norm_with_stats"):
        F.instance_norm(jnp.ones((2, 3, 4)), jnp.zeros(3), jnp.ones(3))


def test_no_gradient_flows_through_statistics_of_instance_norm() -> None:
    def statistics(x: Any) -> Any:
        _, mean, var = F.instance_norm_with_stats(x, jnp.zeros(3), jnp.ones(3))
        return mean.sum() + var.sum()

    assert (np.asarray(jax.grad(statistics)(jnp.asarray(array(5, 3, 4)))) == 0).all()


def test_instance_norm_warns_where_it_ignores_a_wrong_number_of_channels() -> None:
    x = array(2, 5, 4)
    for library, given in ((nn, jnp.asarray(x)), (torch.nn, torch.as_tensor(x))):
        with pytest.warns(UserWarning, match="does not match num_features"):
            out = library.InstanceNorm1d(3)(given)
        assert tuple(out.shape) == x.shape


@pytest.mark.parametrize("function", [F.layer_norm, F.rms_norm, F.group_norm, F.instance_norm])
def test_float32_parameters_serve_a_low_precision_input(function: Any) -> None:
    x = jnp.asarray(array(4, 6, 5), jnp.bfloat16)
    last = function in (F.layer_norm, F.rms_norm)
    w = jnp.asarray(np.abs(array(5 if last else 6)))
    arguments: dict[Any, tuple] = {F.layer_norm: ((5,),), F.rms_norm: ((5,),), F.group_norm: (2,)}
    out = function(x, *arguments.get(function, ()), weight=w)
    exact = function(x.astype(jnp.float32), *arguments.get(function, ()), weight=w)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
    with pytest.raises(nn.DtypeError, match="bfloat16"):
        function(x.astype(jnp.float32), *arguments.get(function, ()), weight=w.astype(jnp.bfloat16))


# --------------------------------------------------------------------------------------------------
# CrossMapLRN2d


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_cross_map_normalisation_has_torchs_values_for_many_channels(size: int) -> None:
    x = array(2, 12, 3, 2)
    options = {"alpha": 0.5, "beta": 0.6, "k": 2.0}
    ours = nn.CrossMapLRN2d(size, **options)(jnp.asarray(x))
    theirs = torch.nn.CrossMapLRN2d(size, **options)(torch.as_tensor(x))
    close(ours, theirs, "output", 1e-6)


def test_cross_map_normalisation_has_the_derivative_of_its_values() -> None:
    with sixty_four_bits():
        layer = nn.CrossMapLRN2d(3, alpha=0.5, k=2.0)
        x, c = (jnp.asarray(array(1, 6, 1, 2, seed=s, dtype="float64")) for s in (0, 1))
        loss = lambda x: (layer(x) * c).sum()
        slope = jax.grad(loss)(x)
        for i in range(6):
            step = jnp.zeros_like(x).at[0, i].set(1e-6)
            ratio = (loss(x + step) - loss(x - step)) / 2e-6
            np.testing.assert_allclose(slope[0, i].sum(), ratio, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# SyncBatchNorm

PARTS = array(4, 5, 3, 2)  # four parts of a batch of 20
COTANGENT = array(4, 5, 3, 2, seed=1)


def _torch_on_the_whole(**options: Any) -> tuple[Any, Any, Any, Any]:
    layer = torch.nn.BatchNorm1d(3, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    fresh = copy.deepcopy(layer)
    x = torch.as_tensor(PARTS.reshape(20, 3, 2)).requires_grad_(True)
    out = layer(x)
    (out * torch.as_tensor(COTANGENT.reshape(20, 3, 2))).sum().backward()
    return layer, fresh, x, out


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    ids=["plain", "cumulative", "not affine", "no statistics"],
)
def test_lanes_that_share_an_axis_are_one_batch(options: dict[str, Any]) -> None:
    whole, fresh, x, out = _torch_on_the_whole(**options)
    layer = nn.SyncBatchNorm(3, axis_name="lanes", **options)
    load(layer, fresh)
    fn, params, state = nn.functionalize(layer, mutable=True)
    lanes = jax.vmap(
        lambda p, x: fn(p, state, x), in_axes=(None, 0), out_axes=(0, None), axis_name="lanes"
    )

    def loss(params: Any, x: Any) -> tuple[Any, Any]:
        out, new = lanes(params, x)
        return (out * COTANGENT).sum(), (out, new)

    grads, (ours, new) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, jnp.asarray(PARTS))
    close(ours.reshape(20, 3, 2), out, "output", 1e-5)
    close(grads[1].reshape(20, 3, 2), x.grad, "gradient of the input", 1e-5)
    for name, parameter in whole.named_parameters():
        close(grads[0][name], parameter.grad, f"gradient of {name}", 1e-5)
    for name, buffer in whole.named_buffers():
        close(new[name], buffer, name, 1e-6)


def test_one_value_in_each_lane_is_enough() -> None:
    layer = nn.SyncBatchNorm(1, axis_name="lanes")
    fn, params, state = nn.functionalize(layer, mutable=True)
    x = jnp.array([1.0, 3.0]).reshape(2, 1, 1)
    out = jax.vmap(lambda x: fn(params, state, x)[0], axis_name="lanes")(x)
    np.testing.assert_allclose(out.ravel(), [-1, 1], atol=1e-5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fn(params, state, x[0])


def test_an_axis_that_is_not_bound_and_evaluation_make_a_plain_batch_norm() -> None:
    x = jnp.asarray(PARTS[0])
    ours, plain = nn.SyncBatchNorm(3, axis_name="lanes"), nn.BatchNorm1d(3)
    np.testing.assert_array_equal(ours(x), plain(x))
    # The same shapes were compiled without the axis: with it they are compiled anew.
    fn, params, state = nn.functionalize(ours, mutable=True)
    together = jax.vmap(lambda x: fn(params, state, x)[0], axis_name="lanes")(jnp.asarray(PARTS))
    assert np.abs(np.asarray(together[0] - plain(x))).max() > 0.1
    ours.eval(), plain.eval()
    fn, params = nn.functionalize(ours)
    apart = jax.vmap(lambda x: fn(params, x), axis_name="lanes")(jnp.asarray(PARTS))
    np.testing.assert_allclose(apart[0], ours(x), rtol=1e-6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3, momentum=0.3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
        self.again = self.first
        self.tied = nn.BatchNorm1d(3, bias=False)
        self.tied.weight = self.first.weight


def test_conversion_keeps_state_ties_and_mode() -> None:
    model = Net().eval()
    keys, weight = list(model.state_dict()), model.first.weight
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model, axis_name="batch")
    assert converted is model
    assert list(model.state_dict()) == keys
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 3
    assert not any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    assert model.again is model.first
    assert model.first.weight is weight
    assert model.tied.weight is weight
    assert model.tied.bias is None
    assert model.first.momentum == 0.3
    assert not any(m.training for m in norms)
    assert all(m.axis_name == "batch" for m in norms)


def test_conversion_of_a_layer_shares_its_boxes() -> None:
    layer = nn.BatchNorm2d(3)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer, "a group")
    assert type(converted) is nn.SyncBatchNorm
    assert converted.process_group == "a group"
    converted(jnp.ones((2, 3, 4, 4)))
    assert int(layer.num_batches_tracked) == 1


ACROSS_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    import statefulnn as nn

    given = dict(np.load({path!r}))
    assert len(jax.devices()) == 4
    mesh = jax.make_mesh((4,), ("batch",))
    x = jax.device_put(given["x"], NamedSharding(mesh, P("batch")))
    c = jax.device_put(given["c"], NamedSharding(mesh, P("batch")))

    def check(out, slope, new, grads):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        close(out, given["out"])
        close(slope, given["slope"])
        for name in ("weight", "bias"):
            close(grads[name], given["grad_" + name])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            close(new[name], given[name])

    # One device's part at a time.
    layer = nn.SyncBatchNorm(3, axis_name="batch")
    layer.load_state_dict({{"weight": given["weight"], "bias": given["bias"]}}, strict=False)
    fn, params, state = nn.functionalize(layer, mutable=True)
    parts = jax.shard_map(
        fn, mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=(P("batch"), P())
    )

    def loss(params, x):
        out, new = parts(params, state, x)
        return (out * c).sum(), (out, new)

    (grads, slope), (out, new) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    check(out, slope, new, grads)

    # An ordinary layer, in compiled code over a sharded batch.
    plain = nn.BatchNorm1d(3)
    plain.load_state_dict({{"weight": given["weight"], "bias": given["bias"]}}, strict=False)

    @nn.jit
    def step(model, x):
        def loss(model, x):
            out = model(x)
            return (out * c).sum(), out
        return nn.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)

    (_, out), (grads, slope) = step(plain, x)
    assert out.sharding.is_equivalent_to(x.sharding, 3), out.sharding
    check(out, slope, dict(plain.named_buffers()), grads)
    print("both agree")
"""


def test_devices_that_share_a_batch_normalise_all_of_it(tmp_path: Any) -> None:
    whole, fresh, x, out = _torch_on_the_whole()
    values = {
        "x": x,
        "c": torch.as_tensor(COTANGENT.reshape(20, 3, 2)),
        "out": out,
        "slope": x.grad,
        **dict(fresh.named_parameters()),
        **{f"grad_{name}": p.grad for name, p in whole.named_parameters()},
        **dict(whole.named_buffers()),
    }
    path = tmp_path / "torch.npz"
    np.savez(path, **{k: v.detach().numpy() for k, v in values.items()})
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ACROSS_DEVICES).format(path=str(path))],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "both agree", done.stderr[-3000:]
