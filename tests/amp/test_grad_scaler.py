"""nn.amp.GradScaler beside torch's, step by step, and a step that is left out."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from statefulnn.amp import grad_scaler
from statefulnn.utils import clip_grad_norm_

OPTIONS = {
    "init_scale": 2.0**10,
    "growth_factor": 2.0,
    "backoff_factor": 0.25,
    "growth_interval": 3,
}
# Of eleven steps the ones whose gradients are not finite.
BAD = {2: float("inf"), 3: float("nan"), 7: float("inf")}


def batches():
    random = np.random.default_rng(0)
    for i in range(11):
        x = random.normal(size=(4, 3)).astype(np.float32)
        x[0, 0] = BAD.get(i, x[0, 0])
        yield x, random.normal(size=(4, 1)).astype(np.float32)


def models():
    torch.manual_seed(0)
    theirs, ours = torch.nn.Linear(3, 1), nn.Linear(3, 1)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return theirs, ours


def train_step(model, opt, scaler, x, y, clip=None):
    def scaled(model):
        loss = ((model(x) - y) ** 2).mean()
        return scaler.scale(loss), loss

    (_, loss), grads = nn.value_and_grad(scaled, has_aux=True)(model)
    if clip is not None:
        grads, _ = clip_grad_norm_(scaler.unscale_(grads), clip)
    scaler.step(opt, grads)
    scaler.update()
    return loss


@pytest.mark.parametrize("clip", [None, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_scales_and_weights_are_those_of_torch_at_each_step(compiled, clip):
    theirs, ours = models()
    opt = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", **OPTIONS)
    our_opt = nn.Optimizer(ours, optax.sgd(0.1, momentum=0.9))
    our_scaler = nn.amp.GradScaler(**OPTIONS)
    step = nn.jit(train_step, static_argnames="clip") if compiled else train_step
    for x, y in batches():
        opt.zero_grad()
        scaler.scale(((theirs(torch.as_tensor(x)) - torch.as_tensor(y)) ** 2).mean()).backward()
        if clip is not None:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        scaler.step(opt)
        scaler.update()
        step(ours, our_opt, our_scaler, jnp.asarray(x), jnp.asarray(y), clip=clip)
        assert float(our_scaler.get_scale()) == scaler.get_scale()
        assert int(our_scaler._growth_tracker) == scaler._get_growth_tracker()
        for name, p in theirs.named_parameters():
            found = ours.get_parameter(name).value
            np.testing.assert_allclose(found, p.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_a_step_with_gradients_that_are_not_finite_changes_no_bit(compiled):
    model, scaler = nn.Linear(3, 1), nn.amp.GradScaler()
    opt = nn.Optimizer(model, optax.adamw(0.1))
    step = nn.jit(train_step) if compiled else train_step
    given = list(batches())
    step(model, opt, scaler, *map(jnp.asarray, given[0]))
    before = {**model.state_dict(prefix="model."), **opt.state_dict()}
    step(model, opt, scaler, *map(jnp.asarray, given[3]))
    after = {**model.state_dict(prefix="model."), **opt.state_dict()}
    assert int(after["count"]) == 1
    for name, value in before.items():
        assert np.asarray(value).tobytes() == np.asarray(after[name]).tobytes(), name


def test_a_step_whose_scale_is_a_power_of_two_is_that_without_a_scaler():
    model, plain = nn.Linear(3, 1), nn.Linear(3, 1)
    plain.load_state_dict(model.state_dict())
    opt, plain_opt = (nn.Optimizer(m, optax.adamw(0.1)) for m in (model, plain))
    x, y = map(jnp.asarray, next(iter(batches())))
    train_step(model, opt, nn.amp.GradScaler(), x, y)
    plain_opt.step(nn.grad(lambda m: ((m(x) - y) ** 2).mean())(plain))
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value)


def test_small_gradients_vanish_in_float16_and_are_kept_by_a_scaler():
    model, x = nn.Linear(1, 1, bias=False), jnp.full((1, 1), 1e-4)

    def loss_fn(model):
        with nn.amp.autocast(jnp.float16):
            return model(x).astype(jnp.float32).sum() * 1e-4

    scaler = nn.amp.GradScaler()
    lost = nn.grad(loss_fn)(model)["weight"]
    kept = scaler.unscale_(nn.grad(lambda m: scaler.scale(loss_fn(m)))(model))["weight"]
    assert abs(float(lost[0, 0]) - 1e-8) > 5e-9
    np.testing.assert_allclose(float(kept[0, 0]), 1e-8, rtol=2 * float(jnp.finfo(jnp.float16).eps))


def test_of_two_optimizers_the_one_with_finite_gradients_steps():
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    opts = [nn.Optimizer(m, optax.sgd(0.1)) for m in (first, second)]
    scaler = nn.amp.GradScaler(init_scale=8.0)
    before = [m.weight.value for m in (first, second)]
    scaler.scale(jnp.ones(()))
    for opt, value in zip(opts, (jnp.inf, 8.0), strict=True):
        scaler.step(opt, {"weight": jnp.full((1, 2), value), "bias": jnp.zeros(1)})
    scaler.update()
    np.testing.assert_array_equal(first.weight.value, before[0])
    np.testing.assert_allclose(second.weight.value, before[1] - 0.1, rtol=1e-6)
    assert float(scaler.get_scale()) == 4.0


def test_a_state_dict_has_the_names_of_torch_and_takes_its_numbers():
    theirs = torch.amp.GradScaler("cpu", **OPTIONS)
    theirs.scale(torch.ones(()))
    state = theirs.state_dict()
    ours = nn.amp.GradScaler()
    assert ours.state_dict().keys() == state.keys()
    ours.load_state_dict(state)
    assert {k: float(v) for k, v in ours.state_dict().items()} == pytest.approx(state)
    outer = nn.ModuleDict({"scaler": ours})
    again = nn.ModuleDict({"scaler": nn.amp.GradScaler()})
    again.load_state_dict(outer.state_dict())
    assert "scaler.scale" in outer.state_dict()
    assert float(again["scaler"].get_scale()) == OPTIONS["init_scale"]
    back = torch.amp.GradScaler("cpu")
    back.load_state_dict({k: v.item() for k, v in ours.state_dict().items()})
    assert back.state_dict() == state


def test_a_scaler_that_is_off_changes_nothing():
    model, scaler = nn.Linear(3, 1), nn.amp.GradScaler(enabled=False)
    opt = nn.Optimizer(model, optax.sgd(0.1))
    x, y = map(jnp.asarray, next(iter(batches())))
    loss = nn.jit(train_step)(model, opt, scaler, x, y)
    assert np.isfinite(float(loss))
    assert float(scaler.get_scale()) == 1.0
    assert scaler.state_dict() == torch.amp.GradScaler("cpu", enabled=False).state_dict()


def test_a_step_is_compiled_once():
    model, scaler = nn.Linear(3, 1), nn.amp.GradScaler()
    opt, step = nn.Optimizer(model, optax.sgd(0.1)), nn.jit(train_step)
    for x, y in batches():
        step(model, opt, scaler, jnp.asarray(x), jnp.asarray(y))
    assert step.trace_count == 1


def test_a_new_scale_can_be_set():
    scaler = nn.amp.GradScaler()
    scaler.update(16.0)
    assert float(scaler.get_scale()) == 16.0


def test_low_losses_become_float32_and_trees_are_taken():
    scaled = nn.amp.GradScaler().scale({"a": jnp.ones((), jnp.float16), "b": jnp.ones(2)})
    assert scaled["a"].dtype == jnp.float32
    assert float(scaled["a"]) == 2.0**16


def test_unscaling_twice_is_refused_with_the_right_code():
    scaler = nn.amp.GradScaler()
    grads = {"weight": scaler.scale(jnp.ones(3))}
    grads = scaler.unscale_(grads)
    with pytest.raises(RuntimeError, match=r"grads = scaler.unscale_\(grads\) once"):
        scaler.unscale_(grads)


def test_an_update_without_a_step_is_refused_with_the_right_code():
    scaler = nn.amp.GradScaler()
    scaler.scale(jnp.ones(()))
    with pytest.raises(AssertionError, match=r"scaler.step\(opt, grads\)\n +scaler.update\(\)"):
        scaler.update()
    with pytest.raises(AssertionError, match="No inf checks"):
        nn.jit(lambda s: s.update())(scaler)


def test_compiled_code_that_steps_and_does_not_update_is_told():
    model, scaler = nn.Linear(3, 1), nn.amp.GradScaler()
    opt = nn.Optimizer(model, optax.sgd(0.1))
    grads = jax.tree.map(scaler.scale, nn.grad(lambda m: m(jnp.ones(3)).sum())(model))
    with pytest.raises(nn.StructureChangeError, match="stepped_without_update"):
        nn.jit(lambda opt, s, g: s.step(opt, g))(opt, scaler, grads)


def test_a_step_without_a_scaled_loss_is_refused_with_the_right_code(monkeypatch):
    monkeypatch.setitem(grad_scaler._met, "scale", False)
    model, scaler = nn.Linear(3, 1), nn.amp.GradScaler()
    opt = nn.Optimizer(model, optax.sgd(0.1))
    grads = nn.grad(lambda m: m(jnp.ones(3)).sum())(model)
    for call in (lambda: scaler.step(opt, grads), lambda: scaler.unscale_(grads)):
        with pytest.raises(AssertionError, match=r"return scaler.scale\(loss\), loss"):
            call()


def test_a_torch_program_and_ours_refuse_the_same_first_mistake():
    # In a process of its own, in which nothing has been scaled.
    code = """
import jax.numpy as jnp, optax, torch, statefulnn as nn
ours, theirs = nn.Linear(2, 1), torch.nn.Linear(2, 1)
opt, their_opt = nn.Optimizer(ours, optax.sgd(0.1)), torch.optim.SGD(theirs.parameters(), 0.1)
grads = nn.grad(lambda m: m(jnp.ones(2)).sum())(ours)
for call in (
    lambda: nn.amp.GradScaler().step(opt, grads),
    lambda: torch.amp.GradScaler("cpu").step(their_opt),
):
    try:
        call()
    except AssertionError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.split() == ["refused", "refused"]


def test_another_optimizer_and_factors_on_the_wrong_side_of_one_are_refused():
    scaler = nn.amp.GradScaler()
    with pytest.raises(nn.ArgumentError, match="opt = nn.Optimizer"):
        scaler.step(optax.sgd(0.1), {})
    for wrong in ({"growth_factor": 1.0}, {"backoff_factor": 1.0}):
        with pytest.raises(AssertionError, match="growth_factor=2.0, backoff_factor=0.5"):
            nn.amp.GradScaler(**wrong)
        with pytest.raises(AssertionError):
            torch.amp.GradScaler("cpu", **wrong)
