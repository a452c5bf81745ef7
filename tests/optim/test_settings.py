"""Learning rates and other settings: read and set between two steps, without a compilation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from statefulnn.ensemble import per_member
from tests.optim.twins import gradients, pair, same

ADAM = optax.inject_hyperparams(optax.adam)


def test_a_rate_is_read_and_set_as_in_torch():
    ours, theirs = pair()
    opt = nn.Optimizer(ours, ADAM(learning_rate=1e-2))
    torch_opt = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    step = nn.jit(lambda opt, grads: opt.step(grads))

    def steps(rate):
        torch_opt.param_groups[0]["lr"] = rate
        np.testing.assert_allclose(opt.lr, rate, rtol=1e-6)
        step(opt, gradients(theirs, 0))
        torch_opt.step()

    steps(1e-2)
    opt.lr = 3e-3
    steps(3e-3)
    opt.lr = opt.lr / 3
    steps(1e-3)
    opt.lr = np.float32(0.1)
    steps(0.1)
    opt.hyperparams.learning_rate = 1
    assert (float(opt.lr), opt.lr.dtype) == (1.0, jnp.float32)
    opt.hyperparams["learning_rate"] = jnp.asarray(0.01)
    steps(0.01)
    same(ours, theirs)
    assert step.trace_count == 1
    opt.hyperparams["b1"] = 0.5
    assert opt.hyperparams["b1"] == opt.hyperparams.b1 == 0.5
    with pytest.raises(AttributeError, match="hyperparams"):
        opt.hyperparams = {"learning_rate": 0.1}


def test_a_rate_is_set_in_compiled_code():
    ours, theirs = pair()
    opt = nn.Optimizer(ours, optax.chain(optax.clip(9.0), ADAM(learning_rate=1e-2)))

    @nn.jit
    def halve(opt):
        opt.lr = opt.lr / 2
        opt.hyperparams.b1 = 0.5

    halve(opt)
    np.testing.assert_allclose(opt.lr, 5e-3, rtol=1e-6)
    assert float(opt.hyperparams.b1) == 0.5


def test_groups_have_a_rate_each():
    ours, theirs = pair()
    opt = nn.Optimizer(ours, {"2.*": ADAM(1e-2), "1.*": optax.sgd(0.5), "*": ADAM(1e-3)})
    torch_opt = torch.optim.Adam(
        [{"params": theirs[2].parameters(), "lr": 0.5}, {"params": theirs[0].parameters()}], lr=0.25
    )
    assert {p: round(float(rate), 6) for p, rate in opt.lr.items()} == {"2.*": 1e-2, "*": 1e-3}
    opt.lr = {"2.*": 0.5, "*": 1.0}
    opt.hyperparams["*"].learning_rate = 0.25
    theirs[1].requires_grad_(False)
    opt.step({**gradients(theirs, 0), "1.weight": jnp.zeros(4), "1.bias": jnp.zeros(4)})
    torch_opt.step()
    same(ours, theirs)
    for wrong in (0.1, {"1.*": 0.1}, {"*": 0.1, "head.*": 0.1}):
        with pytest.raises(nn.UnknownNameError, match=r"those that have are '2\.\*', '\*'"):
            opt.lr = wrong
        assert float(opt.lr["*"]) == 0.25
    both = nn.Optimizer(ours, {"2.*": ADAM(1e-2), "*": ADAM(1e-3)})
    both.lr = 0.125
    assert {p: float(rate) for p, rate in both.lr.items()} == {"2.*": 0.125, "*": 0.125}


def test_the_rate_of_a_schedule_is_read_and_not_set():
    ours, theirs = pair()
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    opt = nn.Optimizer(ours, optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
    rates = [float(opt.lr)]
    for i in range(3):
        opt.step(gradients(theirs, i))
        rates.append(float(opt.lr))
    assert rates == [1.0, 1.0, 0.75, 0.5]
    for assign in (
        lambda: setattr(opt, "lr", 0.1),
        lambda: setattr(opt.hyperparams, "learning_rate", 0.1),
        lambda: opt.hyperparams.__setitem__("learning_rate", jnp.asarray(0.1)),
    ):
        with pytest.raises(TypeError, match="which a schedule sets"):
            assign()


def test_a_rate_that_is_not_injected_says_how():
    ours, _ = pair()
    for opt in (
        nn.Optimizer(ours, optax.adam(1e-2)),
        nn.Optimizer(ours, {"*": optax.adam(1e-2)}),
        nn.Optimizer(ours, optax.adam(optax.linear_schedule(1.0, 0.0, 4))),
    ):
        words = r"optax\.inject_hyperparams\(optax\.adam\)\(learning_rate=1e-3\)"
        for use in (lambda opt: opt.lr, lambda opt: setattr(opt, "lr", 0.1)):
            with pytest.raises(AttributeError, match=words):
                use(opt)
        with pytest.raises(AttributeError, match=words):
            _ = opt.hyperparams
        with pytest.raises(AttributeError, match=words):
            opt.hyperparams = {"learning_rate": 0.1}


def test_the_rates_of_members_are_one_array():
    ensemble = nn.Ensemble(lambda: nn.Linear(2, 1), 3)
    opt = nn.Optimizer(ensemble, per_member(optax.adam, learning_rate=jnp.array([0.1, 0.2, 0.4])))
    np.testing.assert_allclose(opt.lr, [0.1, 0.2, 0.4], rtol=1e-6)
    opt.lr = 0.5
    assert opt.lr.tolist() == [0.5, 0.5, 0.5]
    opt.lr = jnp.array([1.0, 2.0, 3.0])
    assert opt.learning_rate.tolist() == [1.0, 2.0, 3.0]


def test_an_assigned_rate_keeps_dtype_and_shape():
    ours, _ = pair()
    opt = nn.Optimizer(ours, ADAM(learning_rate=1e-2))
    for rate in (jnp.int32(1), np.array(1), jnp.bfloat16(1), np.float64(1)):
        opt.lr = rate
        assert (float(opt.lr), opt.lr.dtype, opt.lr.shape) == (1.0, jnp.float32, ())
        opt.lr = 0.5
        assert float(opt.lr) == 0.5
    nn.jit(lambda opt, rate: setattr(opt, "lr", rate))(opt, 2)
    assert (float(opt.lr), opt.lr.dtype) == (2.0, jnp.float32)
    with pytest.raises(nn.ShapeError, match=r"shape \(1,\) to 'hyperparams.learning_rate'"):
        opt.lr = jnp.ones(1)
    for wrong in ("0.1", None, True, 1j, [0.1]):
        with pytest.raises(nn.ArgumentError, match=r"'hyperparams.learning_rate'"):
            opt.lr = wrong
    whole = nn.Optimizer(ours, optax.inject_hyperparams(optax.sgd)(learning_rate=1))
    whole.lr = 0.5
    assert float(whole.lr) == 0.5


def test_a_rate_for_all_groups_is_set_in_all_or_in_none():
    ours, _ = pair()
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    opt = nn.Optimizer(ours, {"2.*": ADAM(1e-2), "*": ADAM(schedule)})
    with pytest.raises(TypeError, match="which a schedule sets"):
        opt.lr = 0.5
    np.testing.assert_allclose(opt.lr["2.*"], 1e-2, rtol=1e-6)


def test_options_are_chosen_once_but_for_clip():
    ours, _ = pair()
    opt = nn.Optimizer(ours, optax.sgd(0.1), clip=1.0)
    for name, value in {"accumulate": 4, "reduction": "sum", "only": "2.*"}.items():
        with pytest.raises(nn.ArgumentError, match=rf"assigned '{name}'[\s\S]*{name}="):
            setattr(opt, name, value)
    for wrong in (0, -1.0, "1"):
        with pytest.raises(nn.ArgumentError, match="clip="):
            opt.clip = wrong
    opt.clip = None
