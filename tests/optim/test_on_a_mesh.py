"""Groups, cohorts and accumulated gradients on several devices give what one device gives."""

from __future__ import annotations

from tests.devices import run_on_devices

CODE = """
import jax, jax.numpy as jnp, numpy as np, optax
import statefulnn as nn

mesh = jax.make_mesh((2,), ("data",))
adam = optax.inject_hyperparams(optax.adam)
weights = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).state_dict()
x = jnp.linspace(-1, 1, 128).reshape(4, 32)


@nn.jit
def step(model, opt, x):
    opt.step(nn.grad(lambda m: (m(x) ** 2).mean())(model))


def trained(x, place=lambda model: model, place_slots=lambda opt: opt):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.load_state_dict(weights)
    place(model)
    model[0].requires_grad_(False)
    groups = {"*.bias": adam(1e-2), "*": adam(1e-3)}
    opt = place_slots(nn.Optimizer(model, groups, clip=0.1, accumulate=2))
    before = step.trace_count
    for i in range(6):
        if i == 3:  # in the middle of an update
            model[0].requires_grad_(True)
            opt.adapt()
        opt.lr = 1e-2 / (i + 1)
        step(model, opt, x)
    assert step.trace_count == before + 2
    return model.state_dict()


one = trained(x)
split = nn.parallel.shard_batch(x, mesh)
fully = lambda m: nn.parallel.fully_shard(m, mesh)
copies = lambda m: nn.parallel.data_parallel(m, mesh)
for found in (trained(split, fully), trained(split, copies, fully)):
    for name, value in one.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
"""


def test_split_parameters_and_split_slots_train_as_on_one_device():
    run_on_devices(2, CODE)
