"""Parameters in bfloat16 that are trained by float32 copies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn


def gradients(steps, dtype):
    random = np.random.default_rng(0)
    for _ in range(steps):
        yield {
            "weight": jnp.asarray(random.normal(size=(4, 3)), dtype),
            "bias": jnp.asarray(random.normal(size=4), dtype),
        }


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_parameters_are_at_each_step_those_of_a_float32_model_of_torch_rounded(dtype, compiled):
    model = nn.Linear(3, 4, dtype=dtype)
    theirs = torch.nn.Linear(3, 4)
    wide = {k: np.asarray(v, np.float32) for k, v in model.state_dict().items()}
    theirs.load_state_dict({k: torch.as_tensor(v) for k, v in wide.items()})
    opt = nn.Optimizer(model, nn.amp.master_weights(optax.adamw(1e-3, weight_decay=0.1)))
    their_opt = torch.optim.AdamW(theirs.parameters(), 1e-3, weight_decay=0.1)
    step = nn.jit(lambda model, opt, grads: opt.step(grads))
    for grads in gradients(40, dtype):
        step(model, opt, grads) if compiled else opt.step(grads)
        for name, p in theirs.named_parameters():
            p.grad = torch.tensor(np.asarray(grads[name], np.float32))
        their_opt.step()
        master = opt.state.master
        for name, p in model.named_parameters():
            assert p.dtype == dtype
            np.testing.assert_array_equal(p.value, master[name].astype(dtype))
            expected = theirs.get_parameter(name).detach().numpy()
            np.testing.assert_allclose(master[name], expected, rtol=1e-4, atol=1e-6)


def test_a_parameter_equals_its_master_whatever_their_distance():
    # The update is a difference in float32; its sum with the parameter is rounded once more.
    old = jnp.asarray([1.0, -3.0, 1e-3, 255.0, 1e20, 1.0], jnp.bfloat16)
    new = jnp.asarray([1.0 + 1 / 300, 2.0**-14, -7.0, 0.0, 1e18, 1 / 3], jnp.float32)
    tx = nn.amp.master_weights(optax.sgd(1.0))
    state = tx.init(old)
    updates, state = tx.update(jnp.zeros(6, jnp.bfloat16), state._replace(master=new), old)
    with jax.numpy_dtype_promotion("standard"):
        after = optax.apply_updates(old, updates)
    np.testing.assert_array_equal(after, state.master.astype(jnp.bfloat16))


def test_small_steps_add_up_that_bfloat16_would_round_away():
    plain = nn.Linear(1, 1, bias=False, dtype=jnp.bfloat16)
    nn.init.ones_(plain.weight)
    model = nn.Linear(1, 1, bias=False, dtype=jnp.bfloat16)
    nn.init.ones_(model.weight)
    tx = optax.sgd(2.0**-11)
    opts = nn.Optimizer(plain, tx), nn.Optimizer(model, nn.amp.master_weights(tx))
    for _ in range(64):
        for opt in opts:
            opt.step({"weight": jnp.ones((1, 1), jnp.bfloat16)})
    assert float(plain.weight[0, 0]) == 1.0
    assert float(model.weight[0, 0]) == 1.0 - 64 * 2.0**-11


def test_parameters_in_float32_beside_them_are_trained_as_without_it():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(2, 2, dtype=jnp.bfloat16)
            self.wide = nn.LayerNorm(2)

    model, plain = Both(), nn.LayerNorm(2)
    opt = nn.Optimizer(model, nn.amp.master_weights(optax.adam(0.1)))
    plain_opt = nn.Optimizer(plain, optax.adam(0.1))
    assert sorted(k for k in opt.state_dict() if k.startswith("master.")) == [
        "master.low.bias",
        "master.low.weight",
    ]
    given = jnp.asarray([0.3, -0.7])
    for _ in range(3):
        zeros = {n: jnp.zeros_like(p.value) for n, p in model.named_parameters()}
        opt.step({**zeros, "wide.weight": given, "wide.bias": -given})
        plain_opt.step({"weight": given, "bias": -given})
    np.testing.assert_array_equal(model.wide.weight, plain.weight)
    np.testing.assert_array_equal(model.wide.bias, plain.bias)


def test_the_copies_are_saved_and_loaded_with_the_slots():
    model, other = (nn.Linear(3, 4, dtype=jnp.bfloat16) for _ in range(2))
    opts = [nn.Optimizer(m, nn.amp.master_weights(optax.adam(1e-3))) for m in (model, other)]
    first, *rest = gradients(4, jnp.bfloat16)
    opts[0].step(first)
    other.load_state_dict(model.state_dict())
    opts[1].load_state_dict(opts[0].state_dict())
    for grads in rest:
        for opt in opts:
            opt.step(grads)
    np.testing.assert_array_equal(model.weight, other.weight)
    np.testing.assert_array_equal(opts[0].state.master["weight"], opts[1].state.master["weight"])


def test_a_scaler_steps_it():
    model, scaler = nn.Linear(3, 4, dtype=jnp.float16), nn.amp.GradScaler(init_scale=4.0)
    opt = nn.Optimizer(model, nn.amp.master_weights(optax.adam(1e-3)))
    before = opt.state_dict()
    scaler.scale(jnp.ones(()))
    scaler.step(
        opt, {"weight": jnp.full((4, 3), jnp.inf, jnp.float16), "bias": jnp.zeros(4, jnp.float16)}
    )
    scaler.update()
    for name, value in opt.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
