"""Several steps that make one update, clipping, and norms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from tests.optim.twins import gradients, pair, same

X = np.linspace(-1, 1, 36, dtype=np.float32).reshape(12, 3)


def loss_fn(model, x):
    return (model(x) ** 2).mean()


def train_step(model, opt, x):
    opt.step(nn.grad(loss_fn)(model, x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_several_small_batches_are_one_large_one(compiled):
    ours, theirs = pair()
    opt = nn.Optimizer(ours, optax.adamw(1e-2), accumulate=3)
    torch_opt = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=1e-4)
    step = nn.jit(train_step) if compiled else train_step
    for _ in range(2):
        before = ours.state_dict()
        for i, x in enumerate(np.split(X, 3)):
            assert all(np.array_equal(before[n], v) for n, v in ours.state_dict().items())
            assert int(opt.state_dict()["micro_step"]) == i
            step(ours, opt, jnp.asarray(x))
        torch_opt.zero_grad()
        (theirs(torch.tensor(X)) ** 2).mean().backward()
        torch_opt.step()
    same(ours, theirs)
    assert int(opt.state_dict()["count"]) == 2
    assert not np.any(opt.state_dict()["accumulated.0.weight"])
    if compiled:
        assert step.trace_count == 1


def test_the_sum_is_that_of_torch_and_is_clipped_as_one_gradient():
    ours, theirs = pair()
    opt = nn.Optimizer(
        ours,
        {"*.bias": optax.sgd(0.1), "*": optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)},
        only=lambda name: name[0] != "1",
        clip=0.8,
        accumulate=2,
        reduction="sum",
    )
    theirs[1].requires_grad_(False)
    weights, biases = ([getattr(theirs[i], n) for i in (0, 2)] for n in ("weight", "bias"))
    torch_opt = torch.optim.SGD(
        [{"params": biases}, {"params": weights, "momentum": 0.9, "lr": 0.2}], lr=0.1
    )
    opt.lr = {"*": 0.2}
    for i in (0, 2):
        first, second = gradients(theirs, i), gradients(theirs, i + 1)
        size = np.sqrt(sum(np.square(g).sum() for g in first.values()))
        np.testing.assert_allclose(opt.step(first, norm=True), size, rtol=1e-6)
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.grad += torch.tensor(np.asarray(first[name]))
        expected = torch.nn.utils.clip_grad_norm_([*weights, *biases], 0.8)
        torch_opt.step()
        np.testing.assert_allclose(opt.step(second, norm=True), expected, rtol=1e-6)
    same(ours, theirs)
    assert repr(opt).splitlines()[0].endswith("clip=0.8, accumulate=2, reduction='sum')")


def test_steps_in_a_scan_accumulate_too():
    ours, theirs = pair()
    opt = nn.Optimizer(ours, optax.sgd(0.1), accumulate=4)

    @nn.jit
    def train(model, opt, batches):
        def body(carry, x):
            train_step(*carry, x)
            return carry, None

        nn.scan(body, (model, opt), batches)

    train(ours, opt, jnp.asarray(X.reshape(4, 3, 3)))
    torch_opt = torch.optim.SGD(theirs.parameters(), lr=0.1)
    (theirs(torch.tensor(X)) ** 2).mean().backward()
    torch_opt.step()
    same(ours, theirs)


def test_what_was_accumulated_stays_when_the_model_changes():
    ours, theirs = pair()
    ours[0].requires_grad_(False)
    opt = nn.Optimizer(ours, optax.sgd(0.1), accumulate=2, reduction="sum")
    first = gradients(theirs, 0)
    opt.step({n: g for n, g in first.items() if n[0] != "0"})
    ours[0].requires_grad_(True)
    opt.adapt()
    second = gradients(theirs, 1)
    opt.step(second)
    for name, p in theirs.named_parameters():
        if name[0] != "0":
            p.grad += torch.tensor(np.asarray(first[name]))
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    same(ours, theirs)


def test_a_run_goes_on_in_the_middle_of_an_update():
    ours, theirs = pair()
    opt = nn.Optimizer(ours, optax.adam(0.1), accumulate=2)
    opt.step(gradients(theirs, 0))
    again = nn.Optimizer(pair()[0], optax.adam(0.1), accumulate=2)
    again.load_state_dict(opt.state_dict())
    for o in (opt, again):
        o.step(gradients(theirs, 1))
    for name, p in ours.named_parameters():
        np.testing.assert_array_equal(again.module.get_parameter(name), p)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_norm_and_clipping_are_those_of_torch(dtype):
    ours, theirs = pair()
    ours, theirs = ours.to(dtype), theirs.to(getattr(torch, jnp.dtype(dtype).name))
    opt = nn.Optimizer(ours, optax.sgd(1.0), clip=0.25)
    torch_opt = torch.optim.SGD(theirs.parameters(), lr=1.0)
    for size in (1.0, 1e-3):
        grads = {n: g.astype(dtype) for n, g in gradients(theirs.float(), 0, size).items()}
        theirs = theirs.to(getattr(torch, jnp.dtype(dtype).name))
        for name, p in theirs.named_parameters():
            p.grad = torch.tensor(np.asarray(grads[name], np.float32)).to(p.dtype)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
        torch_opt.step()
        rough = 1e-6 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(opt.step(grads, norm=True), expected.float(), rtol=rough)
        for name, p in theirs.named_parameters():
            value = np.asarray(ours.get_parameter(name), np.float32)
            np.testing.assert_allclose(value, p.detach().float(), rtol=rough, atol=rough / 10)


def test_a_scaler_leaves_out_what_is_not_finite():
    ours, theirs = pair()
    opt = nn.Optimizer(ours, optax.adam(0.1), accumulate=2, clip=1.0)
    scaler = nn.amp.GradScaler(init_scale=1.0)
    scaler.scale(jnp.ones(()))
    grads = gradients(theirs, 0)
    for size in (1.0, jnp.inf, 1.0):
        scaler.step(opt, {n: g * size for n, g in grads.items()})
        scaler.update()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    torch.optim.Adam(theirs.parameters(), lr=0.1).step()
    same(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{"clip": 0.0}, {"clip": "1"}, {"accumulate": 0}, {"accumulate": 2.0}, {"reduction": "max"}],
    ids=str,
)
def test_options_of_other_kinds_are_refused(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"given {name}="):
        nn.Optimizer(pair()[0], optax.sgd(0.1), **options)
