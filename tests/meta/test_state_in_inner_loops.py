"""Batch normalisation, dropout, spectral norm and recurrent layers in inner loops, second order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from tests.quick import first, quickly

N, C = 5, 3


def model():
    return nn.Sequential(nn.Linear(2, C), nn.BatchNorm1d(C), nn.Tanh(), nn.Linear(C, 1))


def data(tasks=4, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((tasks, N, 2)) * 2 + 1, jnp.float32)
    return x, jnp.asarray(rng.standard_normal((tasks, N, 1)), jnp.float32)


def meta_gradient(fn, params, x, y, **options):
    def one_task(params, x, y):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1, steps=2, **options)
        return F.mse_loss(fn(adapted.params, x), y)

    return quickly(jax.grad(nn.meta.over_tasks(one_task)))(params, x, y)


def torch_meta_gradient(theirs, x, y, buffers=()):
    """By torch.func over its model without running statistics, task after task."""
    from torch.func import functional_call, grad

    def mse(params, x, y):
        return ((functional_call(theirs, params, (x,)) - y) ** 2).mean()

    def outer(params, x, y):
        start = params
        for _ in range(2):
            g = grad(mse)(start, x, y)
            start = {n: p - 0.1 * g[n] for n, p in start.items()}
        return mse(start, x, y)

    params = {n: p.detach() for n, p in theirs.named_parameters()}
    total = None
    for xt, yt in zip(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(y)), strict=True):
        g = grad(outer)(params, xt, yt)
        total = g if total is None else {n: total[n] + g[n] for n in g}
    return {n: v / len(x) for n, v in total.items()}


def torch_model(ours, **changes):
    theirs = torch.nn.Sequential(
        torch.nn.Linear(2, C),
        torch.nn.BatchNorm1d(C, **changes),
        torch.nn.Tanh(),
        torch.nn.Linear(C, 1),
    )
    weights = {k: torch.tensor(np.asarray(v)) for k, v in ours.state_dict().items()}
    theirs.load_state_dict({k: v for k, v in weights.items() if k in theirs.state_dict()})
    return theirs


def agree(ours, theirs):
    for name in ours:
        np.testing.assert_allclose(
            ours[name], theirs[name].numpy(), rtol=2e-4, atol=1e-5, err_msg=name
        )


# --------------------------------------------------------------------------------------------------
# Policies of batch normalisation


def test_batch_statistics_only():
    ours = model()
    fn, params = nn.functionalize(nn.func.with_batch_norm(ours, "batch"))
    x, y = data()
    theirs = torch_model(ours, track_running_stats=False)
    agree(meta_gradient(fn, params, x, y), torch_meta_gradient(theirs, x, y))
    assert ours[1].track_running_stats


def test_frozen_statistics():
    ours = model()
    for _ in range(3):  # statistics worth the name
        ours(data(1)[0][0] * 3)
    before = np.array(ours[1].running_mean)
    fn, params = nn.functionalize(nn.func.with_batch_norm(ours, "frozen"))
    x, y = data()
    theirs = torch_model(ours).eval()
    agree(meta_gradient(fn, params, x, y), torch_meta_gradient(theirs, x, y))
    np.testing.assert_array_equal(ours[1].running_mean, before)
    assert ours[1].training


def test_statistics_of_each_task():
    ours = model()
    fn, params, state = nn.functionalize(ours, mutable=True)
    x, y = data()

    def one_task(params, x, y):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1, steps=3, state=state)
        return adapted.losses[-1], adapted.state

    _, states = quickly(
        jax.value_and_grad(nn.meta.over_tasks(one_task, has_aux=True), has_aux=True)
    )(params, x, y)[0]
    assert states["1.num_batches_tracked"].tolist() == [3, 3, 3, 3]
    one = quickly(lambda *d: nn.meta.adapt(fn, params, F.mse_loss, d, lr=0.1, state=state).state)
    # The first layer's weights move, so the mean is checked after the first step, against torch.
    for i in range(4):
        after = one(x[i], y[i])
        theirs = torch_model(ours)
        theirs(torch.tensor(np.asarray(x[i])))
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(
                after[f"1.{name}"], getattr(theirs[1], name), rtol=1e-5, atol=1e-6
            )
    assert len({tuple(np.asarray(v)) for v in states["1.running_mean"]}) == 4


def test_statistics_of_each_step():
    steps = 4
    ours = model()
    fn, params, state = nn.functionalize(ours, mutable=True)
    state = nn.meta.per_step(state, steps, "1.running_*")
    state = {
        n: nn.meta.PerStep(v.rows + jnp.arange(4.0)[:, None])
        if isinstance(v, nn.meta.PerStep)
        else v
        for n, v in state.items()
    }
    x, y = data(1)
    adapted = quickly(
        lambda p: nn.meta.adapt(
            fn, p, F.mse_loss, (x[0], y[0]), lr=0.1, steps=steps, state=state, keep_path=True
        )
    )(params)
    for i in range(steps):
        at_i = {n: p[i] for n, p in adapted.path.items()}
        row = {n: v.rows[i] if isinstance(v, nn.meta.PerStep) else v for n, v in state.items()}
        _, after = fn(at_i, row, x[0])
        for name in ("1.running_mean", "1.running_var"):
            np.testing.assert_allclose(
                adapted.rows[name].rows[i], after[name], rtol=1e-5, atol=1e-6
            )
    np.testing.assert_array_equal(
        adapted.state["1.running_mean"], adapted.rows["1.running_mean"].rows[-1]
    )
    assert int(adapted.state["1.num_batches_tracked"]) == steps
    fn(adapted.params, adapted.state, x[0])  # fits the model as it is


def test_scales_of_each_step_are_learned_outside_and_left_alone_inside():
    fn, params = nn.functionalize(nn.func.with_batch_norm(model(), "batch"))
    params = nn.meta.per_step(params, 3, ["1.weight", "1.bias"])
    x, y = data(1)

    def outer(params):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x[0], y[0]), lr=0.1, steps=3)
        return F.mse_loss(fn(adapted.params, x[0]), y[0]), adapted.params

    grads, adapted = quickly(jax.grad(outer, has_aux=True))(params)
    assert grads["1.weight"].rows.shape == (3, C)
    assert (jnp.abs(grads["1.weight"].rows).max(1) > 0).all()
    np.testing.assert_array_equal(adapted["1.weight"], params["1.weight"].rows[-1])
    assert adapted["0.weight"].shape == (C, 2)


def test_state_written_without_a_policy_is_an_error_that_names_the_ways_out():
    fn, params = nn.functionalize(model())
    x, y = data()
    with pytest.raises(nn.StateWriteError, match="(?s)running_mean.*with_batch_norm"):
        meta_gradient(fn, params, x, y)


def test_replaced_in_place_as_in_torch():
    ours = model()
    theirs = torch_model(ours)
    torch.func.replace_all_batch_norm_modules_(theirs)
    assert nn.func.replace_all_batch_norm_modules_(ours) is ours
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = data(1)[0][0]
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        np.testing.assert_allclose(
            ours(x), theirs(torch.tensor(np.asarray(x))).detach().numpy(), rtol=1e-4, atol=1e-5
        )


def test_policies_are_checked():
    with pytest.raises(ValueError, match="policies of a pure call"):
        nn.func.with_batch_norm(model(), "per-task")
    with pytest.raises(ValueError, match="froze the statistics of '1'"):
        nn.func.with_batch_norm(nn.func.with_batch_norm(model(), "batch"), "frozen")
    with pytest.raises(nn.UnknownNameError, match="of which there is none"):
        nn.meta.per_step({"a": jnp.ones(2)}, 3, "norm.*")
    with pytest.raises(ValueError, match="steps must be"):
        nn.meta.per_step({"a": jnp.ones(2)}, 0)


# --------------------------------------------------------------------------------------------------
# Other layers with state, or with loops of their own


def test_spectral_norm_carries_its_vectors_through_the_steps():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    fn, params, state = nn.functionalize(layer, mutable=True)
    x, y = jnp.ones((2, 5, 4)), jnp.zeros((2, 5, 3))

    def one_task(params, x, y):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1, steps=3, state=state)
        return adapted.losses[-1], adapted.state

    (value, states), grads = quickly(
        jax.value_and_grad(nn.meta.over_tasks(one_task, has_aux=True), has_aux=True)
    )(params, x, y)
    assert all(bool(jnp.isfinite(g).all()) for g in grads.values())
    moved = [n for n in states if float(jnp.abs(states[n][0] - state[n]).max()) > 0]
    assert moved


@pytest.mark.parametrize("kind", first(1, ["LSTM", "GRU", "RNN"]))
def test_recurrent_layers_in_second_order_over_tasks(kind):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(2, 3)
    ours = getattr(nn, kind)(2, 3)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    fn, params = nn.functionalize(ours)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 4, 2)).astype(np.float32)  # (tasks, T, N, features)

    def one_task(params, x):
        loss = lambda p, x: (fn(p, x)[0] ** 2).mean()
        adapted = nn.meta.adapt(None, params, loss, (x,), lr=0.5, steps=2)
        return loss(adapted.params, x)

    grads = quickly(jax.grad(nn.meta.over_tasks(one_task)))(params, jnp.asarray(x))

    total = None
    for xt in torch.tensor(x):
        leaves = {n: p.detach().clone().requires_grad_() for n, p in theirs.named_parameters()}
        now = dict(leaves)
        call = lambda p, xt=xt: (torch.func.functional_call(theirs, p, (xt,))[0] ** 2).mean()
        for _ in range(2):
            g = torch.autograd.grad(call(now), list(now.values()), create_graph=True)
            now = {n: p - 0.5 * gi for (n, p), gi in zip(now.items(), g, strict=True)}
        g = torch.autograd.grad(call(now), list(leaves.values()))
        total = g if total is None else [a + b for a, b in zip(total, g, strict=True)]
    for (name, found), expected in zip([(n, grads[n]) for n in leaves], total, strict=True):
        np.testing.assert_allclose(found, expected.numpy() / 3, rtol=1e-3, atol=1e-6, err_msg=name)
