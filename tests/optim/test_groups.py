"""Groups of parameters, each with a transformation of its own."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from tests.optim.twins import gradients, pair, same


def decayed(decay=0.3):
    return {
        "*.bias|1.weight": optax.adamw(1e-2, weight_decay=0.0),
        "*": optax.adamw(1e-2, weight_decay=decay),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_groups_are_those_of_torch(compiled):
    ours, theirs = pair()
    opt = nn.Optimizer(ours, decayed())
    plain = [p for n, p in theirs.named_parameters() if n.endswith("bias") or n == "1.weight"]
    rest = [theirs[0].weight, theirs[2].weight]
    torch_opt = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": rest}], lr=1e-2, weight_decay=0.3
    )
    step = nn.jit(lambda opt, grads: opt.step(grads)) if compiled else nn.Optimizer.step
    for i in range(4):
        grads = gradients(theirs, i)
        torch_opt.step()
        step(opt, grads)
    same(ours, theirs)
    if compiled:
        assert step.trace_count == 1
        step(nn.Optimizer(ours, decayed()), grads)  # an equal one
        assert step.trace_count == 1
        step(nn.Optimizer(ours, decayed(0.4)), grads)
        assert step.trace_count == 2


def test_groups_take_a_schedule_that_changes_its_own_closure():
    """optax's cosine makes a float of its whole number of steps, in the first call."""
    model, _ = pair()
    schedule = optax.cosine_decay_schedule(1e-2, 10)
    opt = nn.Optimizer(model, {"*.bias": optax.sgd(schedule), "*": optax.sgd(schedule)})
    step = nn.jit(lambda opt, grads: opt.step(grads))
    for _ in range(2):
        step(opt, {name: jnp.ones(p.shape) for name, p in model.named_parameters()})
    assert step.trace_count == 1


def test_groups_are_told_and_slots_have_short_names():
    model, _ = pair()
    opt = nn.Optimizer(model, decayed())
    assert opt.groups == {
        "*.bias|1.weight": ("0.bias", "1.weight", "1.bias", "2.bias"),
        "*": ("0.weight", "2.weight"),
    }
    assert repr(opt).splitlines() == [
        "Optimizer(Sequential, 6 trainable parameters)",
        "  '*.bias|1.weight': '0.bias', '1.weight', '1.bias', '2.bias'",
        "  '*': '0.weight', '2.weight'",
    ]
    slots = {f"{slot}.{name}" for slot in ("mu", "nu") for name, _ in model.named_parameters()}
    assert set(opt.state_dict()) == slots | {"group0.count", "group1.count"}
    assert list(opt.state) == ["*.bias|1.weight", "*"]
    assert set(optax.tree.get(opt.state["*"], "mu")) == {"0.weight", "2.weight"}


def test_other_transformations_and_extra_arguments_go_to_their_groups():
    ours, theirs = pair()
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=9, cooldown=0)
    opt = nn.Optimizer(
        ours, {"2.*": optax.chain(optax.sgd(0.1), plateau), "*": optax.sgd(0.2, momentum=0.9)}
    )
    torch_opt = torch.optim.SGD(
        [
            {"params": [*theirs[:2].parameters()], "momentum": 0.9, "lr": 0.2},
            {"params": theirs[2].parameters()},
        ],
        lr=0.1,
    )
    for i in range(2):
        opt.step(gradients(theirs, i), value=jnp.ones(()))
        torch_opt.step()
    same(ours, theirs)
    assert "group0.scale" in opt.state_dict()


def test_rates_may_fall_from_layer_to_layer():
    ours, theirs = pair()
    rate = lambda depth: 0.1 * 0.5**depth
    opt = nn.Optimizer(ours, {f"{i}.*": optax.sgd(rate(2 - i), momentum=0.9) for i in range(3)})
    torch_opt = torch.optim.SGD(
        [{"params": theirs[i].parameters(), "lr": rate(2 - i)} for i in range(3)], momentum=0.9
    )
    for i in range(3):
        opt.step(gradients(theirs, i))
        torch_opt.step()
    same(ours, theirs)


def test_clipping_takes_all_groups_together():
    ours, theirs = pair()
    opt = nn.Optimizer(ours, {"2.*": optax.sgd(0.1), "*": optax.sgd(0.2)}, clip=0.7)
    torch_opt = torch.optim.SGD(
        [{"params": theirs[:2].parameters(), "lr": 0.2}, {"params": theirs[2].parameters()}], lr=0.1
    )
    grads = gradients(theirs, 0)
    norm = opt.step(grads, norm=True)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
    torch_opt.step()
    same(ours, theirs)
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


MISTAKES = {
    "a pattern that matches nothing": ({"head.*": optax.sgd(0.1)}, nn.UnknownNameError, "'head"),
    "a parameter in two": (
        {"0.*": optax.sgd(0.1), "*.bias": optax.sgd(0.2)},
        TypeError,
        r"two groups for '0.bias': '0\.\*' and '\*\.bias'",
    ),
    "a parameter in none": (
        {"0.*": optax.sgd(0.1)},
        nn.UnknownNameError,
        "no group for '1.weight'",
    ),
    "no transformation": ({"*": optax.sgd}, TypeError, r"of the group '\*'"),
    "no groups": ({}, nn.UnknownNameError, "no group for"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_groups_that_do_not_cover_each_parameter_once_are_refused(kind):
    groups, error, words = MISTAKES[kind]
    with pytest.raises(error, match=words):
        nn.Optimizer(pair()[0], groups)


def test_a_group_may_be_frozen_and_comes_to_life():
    ours, theirs = pair()
    ours[0].requires_grad_(False)
    theirs[0].requires_grad_(False)
    opt = nn.Optimizer(ours, {"0.*": optax.adam(1e-3), "*": optax.adam(1e-2)})
    torch_opt = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    assert opt.groups["0.*"] == ()
    opt.step(gradients(theirs, 0))
    torch_opt.step()
    ours[0].requires_grad_(True)
    theirs[0].requires_grad_(True)
    assert opt.adapt().fresh == ("0.weight", "0.bias")
    torch_opt.add_param_group({"params": theirs[0].parameters(), "lr": 1e-3})
    for i in range(2):
        opt.step(gradients(theirs, i))
        torch_opt.step()
    same(ours, theirs)
