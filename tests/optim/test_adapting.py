"""opt.adapt() after the model has changed: slots follow their parameters, and fresh ones begin anew."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from tests.optim.twins import gradients, pair, same


def freeze(part, *models, frozen=True):
    for model in models:
        model[part].requires_grad_(not frozen)


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def steps(opt, torch_opt, theirs, seeds, step=nn.Optimizer.step, size=1.0):
    for seed in seeds:
        step(opt, gradients(theirs, seed, size))
        torch_opt.step()


RULES = {
    "adam": (lambda: optax.adam(1e-2), lambda p: torch.optim.Adam(p, lr=1e-2)),
    "adamw": (
        lambda: optax.adamw(1e-2, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
    "momentum": (
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "groups": (
        lambda: {"*.bias": optax.adam(1e-2), "*": optax.adamw(1e-2, weight_decay=0.0)},
        lambda p: torch.optim.Adam(p, lr=1e-2),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_is_unfrozen_counts_its_own_steps_as_in_torch(rule):
    ours, theirs = pair()
    make, make_torch = RULES[rule]
    freeze(0, ours, theirs)
    opt, torch_opt = nn.Optimizer(ours, make()), make_torch(trained(theirs))
    step = nn.jit(lambda opt, grads: opt.step(grads))
    steps(opt, torch_opt, theirs, range(3), step)
    freeze(0, ours, theirs, frozen=False)
    with pytest.raises(nn.StructureChangeError, match=r"opt\.adapt\(\)"):
        step(opt, gradients(theirs, 9))
    report = opt.adapt()
    assert report.fresh == ("0.weight", "0.bias")
    assert report.kept == ("1.weight", "1.bias", "2.weight", "2.bias")
    torch_opt.add_param_group({"params": theirs[0].parameters()})
    steps(opt, torch_opt, theirs, range(3, 6), step)
    same(ours, theirs)
    assert step.trace_count == 3  # one of them failed
    assert any("cohort1" in name for name in opt.state_dict()) == (rule != "momentum")


def test_slots_stay_with_their_parameters_through_several_changes():
    ours, theirs = pair()
    freeze(0, ours, theirs)
    freeze(1, ours, theirs)
    opt = nn.Optimizer(ours, optax.adam(1e-2))
    torch_opt = torch.optim.Adam(trained(theirs), lr=1e-2)
    steps(opt, torch_opt, theirs, range(2))
    for part in (1, 0):
        freeze(part, ours, theirs, frozen=False)
        opt.adapt()
        torch_opt.add_param_group({"params": theirs[part].parameters()})
        steps(opt, torch_opt, theirs, range(2, 4))
    assert {"count", "cohort1.count", "cohort2.count"} <= set(opt.state_dict())
    same(ours, theirs)
    # A new head takes the place of those that began first: two cohorts are left, and one begins.
    theirs[2] = torch.nn.Linear(4, 5)
    ours[2] = nn.Linear(4, 5)
    ours[2].load_state_dict({n: t.numpy() for n, t in theirs[2].state_dict().items()})
    report = opt.adapt()
    assert (report.fresh, report.dropped) == (("2.weight", "2.bias"),) * 2
    fresh = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    fresh.state.update({p: torch_opt.state[p] for p in theirs[:2].parameters()})
    steps(opt, fresh, theirs, range(4, 7))
    same(ours, theirs)
    assert [int(opt.state_dict()[n]) for n in ("count", "cohort1.count", "cohort2.count")] == [
        *(7, 5, 3),
    ]


def test_a_resized_parameter_begins_anew_and_one_of_another_name_does_not():
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2, bias=False))
    opt = nn.Optimizer(model, optax.sgd(0.1, momentum=0.9))
    opt.step({"0.weight": jnp.ones((4, 2)), "1.weight": jnp.full((2, 2), 3.0)})
    model[0].weight.data = jnp.zeros((6, 2))
    model.append(model[1])
    model[1] = nn.Identity()
    assert repr(opt.adapt()) == "kept 1: '2.weight'; fresh 1: '0.weight'; dropped 1: '0.weight'"
    assert opt.state_dict()["trace.0.weight"].tolist() == np.zeros((6, 2)).tolist()
    assert opt.state_dict()["trace.2.weight"].tolist() == np.full((2, 2), 3.0).tolist()
    assert opt.adapt() == (("0.weight", "2.weight"), (), ())


def test_before_the_first_step_all_begin_together():
    ours, _ = pair()
    freeze(0, ours)
    opt = nn.Optimizer(ours, optax.adam(1e-2))
    freeze(0, ours, frozen=False)
    opt.adapt()
    assert set(opt.state_dict()) == set(nn.Optimizer(ours, optax.adam(1e-2)).state_dict())


@pytest.mark.parametrize("inside", [True, False], ids=["in the transformation", "clip="])
def test_the_norm_is_that_of_old_and_new_together(inside):
    ours, theirs = pair()
    freeze(0, ours, theirs)
    tx = optax.adam(1e-2)
    chained = optax.chain(optax.clip_by_global_norm(0.5), tx)
    opt = nn.Optimizer(ours, chained) if inside else nn.Optimizer(ours, tx, clip=0.5)
    torch_opt = torch.optim.Adam(trained(theirs), lr=1e-2)

    def step(seed, size):
        # The moments see how the clipped gradients of the steps compare.
        opt.step(gradients(theirs, seed, size))
        torch.nn.utils.clip_grad_norm_(trained(theirs), 0.5)
        torch_opt.step()

    step(0, 0.02)
    step(1, 1.0)
    freeze(0, ours, theirs, frozen=False)
    opt.adapt()
    torch_opt.add_param_group({"params": theirs[0].parameters()})
    step(2, 1.0)
    step(3, 0.02)
    same(ours, theirs, atol=5e-6)


def test_a_schedule_and_a_rate_that_was_set_go_on():
    ours, theirs = pair()
    freeze(0, ours, theirs)
    rate = optax.linear_schedule(1e-1, 1e-3, 6)
    schedules = {"0.*|1.*": optax.adam(rate), "*": optax.inject_hyperparams(optax.adam)(1e-2)}
    opt = nn.Optimizer(ours, schedules)
    opt.lr = {"*": 0.5}
    torch_opt = torch.optim.Adam(
        [{"params": trained(theirs[:2])}, {"params": theirs[2].parameters(), "lr": 0.5}]
    )

    def step(i):
        for group in torch_opt.param_groups:
            group["lr"] = 0.5 if group is torch_opt.param_groups[1] else float(rate(i))
        steps(opt, torch_opt, theirs, [i])

    step(0)
    step(1)
    freeze(0, ours, theirs, frozen=False)
    opt.adapt()
    torch_opt.add_param_group({"params": theirs[0].parameters()})
    step(2)
    step(3)
    same(ours, theirs)


def test_settings_of_groups_stay_apart():
    ours, theirs = pair()
    freeze(0, ours, theirs)
    adamw = optax.inject_hyperparams(optax.adamw)
    opt = nn.Optimizer(
        ours, {"*.bias": adamw(1e-2, weight_decay=0.0), "*": adamw(0.1, weight_decay=0.1)}
    )
    groups = [
        {"params": [theirs[1].bias, theirs[2].bias], "lr": 1e-2, "weight_decay": 0.0},
        {"params": [theirs[1].weight, theirs[2].weight]},
    ]
    torch_opt = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    steps(opt, torch_opt, theirs, range(2))
    freeze(0, ours, theirs, frozen=False)
    opt.adapt()
    torch_opt.add_param_group({"params": theirs[0].bias, "lr": 1e-2, "weight_decay": 0.0})
    torch_opt.add_param_group({"params": theirs[0].weight})
    steps(opt, torch_opt, theirs, range(2, 5))
    same(ours, theirs, atol=5e-6)


def test_counts_of_groups_stay_apart():
    ours, theirs = pair()
    freeze(2, ours, theirs)
    opt = nn.Optimizer(ours, {"2.*": optax.adam(1e-2), "*": optax.adam(1e-2)})
    torch_opt = torch.optim.Adam(trained(theirs), lr=1e-2)
    for part in (2, 1):
        steps(opt, torch_opt, theirs, range(2))
        if part == 2:
            freeze(part, ours, theirs, frozen=False)
            torch_opt.add_param_group({"params": theirs[part].parameters()})
        opt.adapt()
    steps(opt, torch_opt, theirs, range(2))
    same(ours, theirs, atol=5e-6)


def test_a_group_that_is_frozen_keeps_its_rate_and_begins_anew():
    ours, theirs = pair()
    adam = optax.inject_hyperparams(optax.adam)
    freeze(0, ours, theirs)
    opt = nn.Optimizer(ours, {"0.*": adam(1e-2), "*": adam(1e-2)})
    torch_opt = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    opt.lr = 0.1
    torch_opt.param_groups[0]["lr"] = 0.1
    for frozen in (True, False, True, False):
        freeze(0, ours, theirs, frozen=frozen)
        opt.adapt()
        for p in theirs[0].parameters() if frozen else ():
            torch_opt.state.pop(p, None)
        steps(opt, torch_opt, theirs, range(2))
    same(ours, theirs, atol=5e-6)


def test_a_state_dict_says_who_began_when():
    ours, theirs = pair()
    freeze(0, ours, theirs)
    opt = nn.Optimizer(ours, optax.adam(1e-2))
    opt.step(gradients(theirs, 0))
    freeze(0, ours, theirs, frozen=False)
    opt.adapt()
    opt.step(gradients(theirs, 1))
    weights, saved = ours.state_dict(), opt.state_dict()
    later = {n for n in saved if n.startswith("cohort1")}
    assert later == {"cohort1.count"} | {
        f"cohort1.{s}.0.{n}" for s in ("mu", "nu") for n in ("weight", "bias")
    }

    resumed, _ = pair()
    resumed.load_state_dict(weights)
    again = nn.Optimizer(resumed, optax.adam(1e-2))
    plain = again.state_dict()
    with pytest.raises(nn.StateDictError, match=r"mu\.0\.bias"):
        again.load_state_dict({n: v for n, v in saved.items() if n != "cohort1.mu.0.bias"})
    assert again.state_dict().keys() == plain.keys()
    again.load_state_dict(saved)
    for o in (opt, again):
        o.step(gradients(theirs, 2))
    for name, value in opt.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value, err_msg=name)
    for name, p in ours.named_parameters():
        np.testing.assert_array_equal(dict(resumed.named_parameters())[name], p, err_msg=name)
    with pytest.raises(nn.StateDictError, match=r"mu\.0\.bias"):  # and as it was after a failure
        again.load_state_dict({n: v for n, v in plain.items() if n != "mu.0.bias"})
    assert again.state_dict()["cohort1.count"] == opt.state_dict()["cohort1.count"] == 2
    again.load_state_dict(plain)
    assert again.state_dict().keys() == plain.keys()
    assert int(again.state_dict()["count"]) == 0


def test_it_is_saved_in_files_and_checkpoints(tmp_path):
    ours, theirs = pair()
    freeze(0, ours, theirs)
    opt = nn.Optimizer(ours, optax.adam(1e-2))
    opt.step(gradients(theirs, 0))
    freeze(0, ours, theirs, frozen=False)
    opt.adapt()
    nn.save(opt, tmp_path / "opt.safetensors")
    with nn.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, opt=opt)
        restored, loaded = (nn.Optimizer(ours, optax.adam(1e-2)) for _ in range(2))
        checkpointer.restore(opt=restored)
    loaded.load_state_dict(nn.load(tmp_path / "opt.safetensors"))
    for again in (restored, loaded):
        assert again.state_dict().keys() == opt.state_dict().keys()
        assert [int(again.state_dict()[n]) for n in ("count", "cohort1.count")] == [1, 0]


def test_what_no_longer_fits_is_refused_and_changes_nothing():
    model, theirs = pair()
    opt = nn.Optimizer(model, {"2.*": optax.sgd(0.1), "*": optax.adam(0.1)})
    before = opt.state_dict()
    model[2] = nn.Identity()
    with pytest.raises(nn.UnknownNameError, match="'2.*', of which there is none"):
        opt.adapt()
    assert opt.groups["2.*"] == ("2.weight", "2.bias")
    assert opt.state_dict().keys() == before.keys()
    with pytest.raises(nn.StructureChangeError, match="in code that is traced"):
        nn.jit(lambda opt: opt.adapt())(opt)


def test_numbers_of_the_transformation_that_are_not_arrays_stay():
    model, theirs = pair()

    def init(params):
        return {"what": "kept", "slot": {n: jnp.zeros_like(p) for n, p in params.items()}}

    def update(grads, state, params=None):
        assert state["what"] == "kept"
        return grads, {**state, "slot": grads}

    freeze(0, model, theirs)
    opt = nn.Optimizer(model, optax.GradientTransformation(init, update))
    opt.step(gradients(theirs, 0))
    freeze(0, model, theirs, frozen=False)
    opt.adapt()
    opt.step(gradients(theirs, 1))
    assert opt.state["what"] == "kept"


def test_many_adaptations_compile_without_a_warning():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(10)))
    model.requires_grad_(False)
    model[9].requires_grad_(True)
    opt = nn.Optimizer(model, optax.sgd(0.1))
    for i in reversed(range(9)):
        opt.step({f"{j}.weight": jnp.ones((2, 2)) for j in range(i + 1, 10)})  # warnings are errors
        model[i].requires_grad_(True)
        assert opt.adapt().fresh == (f"{i}.weight",)
