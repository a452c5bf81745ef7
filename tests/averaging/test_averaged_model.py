"""AveragedModel and lerp_ beside torch.optim.swa_utils and formulas."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import swa_utils

import statefulnn as nn
from statefulnn import averaging
from tests.devices import failures_on_devices


def net(lib: Any = nn) -> Any:
    """A frozen parameter, a tie, and batch normalisation, whose counter is an integer; in either library."""
    model = lib.Sequential(lib.Linear(3, 3), lib.BatchNorm1d(3), lib.Linear(3, 3))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    return model


def load(model: Any, step: int) -> None:
    """Give a model the numbers of a step: other parameters, statistics and a counter."""
    rng = np.random.default_rng(step)
    state = {
        name: np.asarray(8 * step + 3) if "num_batches" in name else rng.normal(size=value.shape)
        for name, value in model.state_dict().items()
    }
    state["2.weight"] = state["0.weight"]
    state = {name: np.asarray(v, np.float32) if v.ndim else v for name, v in state.items()}
    if isinstance(model, torch.nn.Module):
        state = {name: torch.as_tensor(v) for name, v in state.items()}
    model.load_state_dict(state)


def assert_equal_states(ours: Any, theirs: Any, rtol: float = 2e-6) -> None:
    wanted = {name: value.numpy() for name, value in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(wanted)
    for name, value in ours.state_dict().items():
        np.testing.assert_allclose(value, wanted[name], rtol, 1e-6, err_msg=name)


RULES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mean": lambda lib: {},
    "ema": lambda lib: {"avg_fn": lib.get_ema_avg_fn(0.9)},
    "own": lambda lib: {"avg_fn": lambda a, c, n: a + (c - a) / (n + 3)},
    "multi": lambda lib: {"multi_avg_fn": lib.get_ema_multi_avg_fn(0.9)},
}


@pytest.mark.parametrize("use_buffers", [False, True], ids=["copied", "averaged"])
@pytest.mark.parametrize("rule", RULES)
def test_an_average_is_torchs_after_each_step(rule, use_buffers):
    model, torch_model = net(), net(torch.nn)
    ours = nn.AveragedModel(model, **RULES[rule](averaging), use_buffers=use_buffers)
    theirs = swa_utils.AveragedModel(torch_model, **RULES[rule](swa_utils), use_buffers=use_buffers)
    step = nn.jit(lambda average, model: average.update_parameters(model))
    for number in range(4):
        load(model, number)
        load(torch_model, number)
        update = step if number % 2 else nn.AveragedModel.update_parameters
        update(ours, model)  # in turns in a compiled function and by itself
        theirs.update_parameters(torch_model)
        assert_equal_states(ours, theirs)
    ours = copy.deepcopy(ours) if rule == "own" else pickle.loads(pickle.dumps(ours))
    assert_equal_states(ours, theirs)
    assert len(list(ours.parameters())) == 5 and not ours.module[2].bias.requires_grad
    assert ours.module[2].weight is ours.module[0].weight
    x = np.ones((2, 3), np.float32)
    want = theirs.eval()(torch.as_tensor(x)).detach().numpy()
    np.testing.assert_allclose(ours.eval()(x), want, rtol=1e-5, atol=1e-6)


def test_an_eager_update_compiles_one_program_once(no_compilation_cache):
    model = net()
    average, target = nn.AveragedModel(model), copy.deepcopy(model)
    jax.clear_caches()  # so that an operation by itself would be compiled too
    nn.jit(lambda model: None)(model)  # what the first compiled call of all brings along
    compiled: list[float] = []
    listen = lambda event, seconds, **_: "backend_compile" in event and compiled.append(seconds)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(3):
            average.update_parameters(model)
        assert len(compiled) == 1
        for t in (0.1, 0.2, 0.7):
            nn.lerp_(target, model, t)
        assert len(compiled) == 2
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_donated_models_and_averages_share_no_memory():
    model = net()
    average = nn.AveragedModel(model, avg_fn=averaging.get_ema_avg_fn(0.5))
    opt = nn.Optimizer(model, optax.sgd(0.1))

    def step(model, opt, average, x):
        opt.step(nn.grad(lambda m: (m(x) ** 2).sum())(model))
        average.update_parameters(model)

    x = jnp.ones((4, 3))
    train = nn.jit(step, donate=("model", "opt"))
    for _ in range(2):
        train(model, opt, average, x)
        average.update_parameters(model)  # copies buffers
    nn.jit(step, donate="average")(model, opt, average, x)
    train(model, opt, average, x)
    pointers = [
        b._value.unsafe_buffer_pointer() for m in (model, average) for _, b in m._named_boxes()
    ]
    assert len(set(pointers)) == len(pointers)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((model, average)))


def test_a_model_in_bfloat16_has_an_average_in_float32():
    model = nn.Linear(4, 4, bias=False, dtype=jnp.bfloat16)
    average = nn.AveragedModel(model, avg_fn=averaging.get_ema_avg_fn(0.999)).float()
    want = np.zeros((4, 4))
    for number in range(20):
        model.weight.value = jnp.full((4, 4), number, jnp.bfloat16)
        average.update_parameters(model)
        want = 0.999 * want + 0.001 * number
    assert average.module.weight.dtype == jnp.float32 and model.weight.dtype == jnp.bfloat16
    np.testing.assert_allclose(average.module.weight, want, rtol=1e-5)
    # An average in bfloat16 is computed in float32 too: 0.99 * 64 + 0.01 * 0 is 63.36, rounded once.
    low = nn.AveragedModel(model, avg_fn=averaging.get_ema_avg_fn(0.99))
    for value in (64, 0):
        model.weight.value = jnp.full((4, 4), value, jnp.bfloat16)
        low.update_parameters(model)
    assert (low.module.weight.value == jnp.bfloat16(63.36)).all()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, statefulnn as nn
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, P("data"))
model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
model.to(lambda name, array: split if array.ndim else NamedSharding(mesh, P()))
average = nn.AveragedModel(model)
for value in (1.0, 3.0):
    model[0].weight.value = jax.device_put(jnp.full((4, 4), value), split)
    average.update_parameters(model)
nn.lerp_(average.module, model, 0.5)
assert average.module[0].weight.sharding == split, average.module[0].weight.sharding
np.testing.assert_allclose(average.module[0].weight, 2.5)
"""
ELSEWHERE = """
import jax, jax.numpy as jnp, numpy as np, statefulnn as nn
here, there = jax.devices()
model = nn.Linear(2, 2).to(here)
average = nn.AveragedModel(model, device=there)
for value in (1.0, 3.0):
    model.weight.value = jax.device_put(jnp.full((2, 2), value), here)
    average.update_parameters(model)
assert average.module.weight.devices() == {there} and model.weight.devices() == {here}
np.testing.assert_allclose(average.module.weight, 2.0)
"""


def test_averages_keep_their_shardings_and_devices():
    assert failures_on_devices(2, {"sharded": SHARDED, "elsewhere": ELSEWHERE}) == {}


def test_lerp_moves_parameters_and_if_asked_buffers():
    target, source = net(), net()
    load(target, 1)
    load(source, 2)
    before, after = target.state_dict(), source.state_dict()
    nn.lerp_(target, source, 0.25)
    mix = lambda name, t: (1 - t) * np.asarray(before[name]) + t * np.asarray(after[name])
    for name, value in target.state_dict().items():
        want = before[name] if "running" in name or "num" in name else mix(name, 0.25)
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-7, err_msg=name)
    target.load_state_dict(before)
    nn.jit(lambda a, b, t: nn.lerp_(a, b, t, use_buffers=True))(target, source, 0.5)
    for name, value in target.state_dict().items():
        want = after[name] if "num" in name else mix(name, 0.5)
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_stack_of_layers_is_averaged():
    model = nn.LayerStack([nn.Linear(2, 2) for _ in range(3)])
    average = nn.AveragedModel(model)
    ones = jax.tree.map(jnp.ones_like, dict(model.state_dict()))
    for factor in (1.0, 3.0):
        model.load_state_dict({name: factor * value for name, value in ones.items()})
        average.update_parameters(model)
    assert list(average.state_dict())[1] == "module.0.weight"
    np.testing.assert_allclose(average.module[2].weight, 2.0)


def refused(call: Callable[[], object], error: type[Exception], *parts: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for part in (*parts, "Why:", "Instead:"):
        assert part in str(caught.value)


def test_models_of_other_structure_are_refused_and_nothing_is_changed():
    model = net()
    average = nn.AveragedModel(model)
    before = jax.tree.leaves(average)
    untied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    other = net()
    other[0].bias.data = jnp.ones(5)
    update, changed = average.update_parameters, nn.errors.StructureChangeError
    refused(lambda: update(untied), changed, "only the model has 2.weight")
    refused(lambda: update(nn.Linear(3, 3)), changed, "average has 0.weight", "model has weight")
    refused(lambda: update(other), nn.errors.ShapeError, "'0.bias' is (3,)", "(5,) in the model")
    refused(lambda: nn.lerp_(model, untied, 0.5), changed, "only the source has 2.weight")
    refused(lambda: update(None), nn.errors.ArgumentError, "NoneType")
    refused(lambda: nn.lerp_(model, {}, 0.5), nn.errors.ArgumentError, "dict")
    assert all(a is b for a, b in zip(jax.tree.leaves(average), before, strict=True))


def test_wrong_rules_are_refused_and_nothing_is_changed():
    wrong = nn.errors.ArgumentError
    model = nn.Linear(2, 2)
    for options, part in [
        ({"avg_fn": lambda a, c, n: None}, "a NoneType for 'weight'"),
        ({"avg_fn": lambda a, c, n: c.sum()}, "array of shape () for 'weight'"),
        ({"multi_avg_fn": lambda a, c, n: a[:1]}, "1 arrays for 2 arrays"),
        ({"multi_avg_fn": lambda a, c, n: None}, "a NoneType for 2 arrays"),
    ]:
        average = nn.AveragedModel(model, **options)
        refused(lambda average=average: average.update_parameters(model), wrong, part)
        assert average.n_averaged == 0
    rule = averaging.get_swa_avg_fn()
    refused(
        lambda: nn.AveragedModel(model, None, rule, averaging.get_swa_multi_avg_fn()),
        wrong,
        "Only one of",
    )
    refused(lambda: averaging.get_ema_avg_fn(1.5), ValueError, "decay=1.5", "from 0 to 1")
    lazy = nn.LazyLinear(2)
    average = nn.AveragedModel(lazy)
    with pytest.raises(nn.errors.UninitializedParameterError, match="weight"):
        average.update_parameters(lazy)


def test_lerp_takes_one_number():
    target, source = net(), net()
    for wrong in (None, "0.5", jnp.ones(2), np.ones((1,))):
        with pytest.raises(nn.ArgumentError, match="nn.lerp_ was given a t of"):
            nn.lerp_(target, source, wrong)
