"""Backward and backward-pre hooks: taps around a module. torch and formulas are the oracle."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn


def backward(lib, m, x, weight=1.0):
    """Run `sum(weight * m(x))` backwards; return (grads of parameters, grad of x)."""
    if lib.nn is nn:
        model, dx = m, None

        def loss(p, x):
            return (weight * nn.functional_call(model, p, (x,))).sum()

        p = {n: v.value for n, v in m.named_parameters()}
        grads, dx = jax.grad(loss, argnums=(0, 1))(p, x)
        return dict(grads), dx
    x = x.clone().requires_grad_(True)
    m.zero_grad()
    (weight * m(x)).sum().backward()
    return {n: v.grad for n, v in m.named_parameters()}, x.grad


def scaled(lib, factor=3.0):
    class Scaled(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = lib.nn.Parameter(lib.ones(2) * factor)

        def forward(self, x):
            return x * self.w

    return Scaled()


def test_hooks_see_the_gradients_of_inputs_and_outputs(agree):
    def scenario(lib):
        seen = []
        m = scaled(lib)
        m.register_full_backward_pre_hook(
            lambda m, g: seen.append(("pre", [lib.numpy(v) for v in g]))
        )
        m.register_full_backward_hook(
            lambda m, gi, go: seen.append(
                ("post", [lib.numpy(v) for v in gi], [lib.numpy(v) for v in go])
            )
        )
        grads = backward(lib, m, lib.arange(2), weight=2.0)
        return seen, grads

    agree(scenario)


def test_backward_hooks_do_not_fire_in_forward(agree):
    def scenario(lib):
        calls = []
        m = scaled(lib)
        m.register_full_backward_hook(lambda *a: calls.append(1))
        m.register_full_backward_pre_hook(lambda *a: calls.append(2))
        m(lib.ones(2))
        return calls

    agree(scenario)


def test_all_four_kinds_fire_in_torch_s_order(agree):
    def scenario(lib):
        calls = []
        m = scaled(lib)
        m.register_full_backward_hook(lambda *a: calls.append("backward"))
        m.register_full_backward_pre_hook(lambda *a: calls.append("backward pre"))
        m.register_forward_hook(lambda *a: calls.append("forward"))
        m.register_forward_pre_hook(lambda *a: calls.append("forward pre"))
        backward(lib, m, lib.ones(2))
        return calls

    agree(scenario)


def test_backward_hooks_run_in_order_and_prepended_ones_first(agree):
    def scenario(lib):
        calls = []
        m = scaled(lib)
        for i in range(4):
            m.register_full_backward_hook(lambda *a, i=i: calls.append(i), prepend=i == 2)
            m.register_full_backward_pre_hook(lambda *a, i=i: calls.append(10 + i), prepend=i == 1)
        backward(lib, m, lib.ones(2))
        return calls

    agree(scenario)


def test_a_pre_hook_may_replace_the_output_gradient_and_the_hook_sees_that(agree):
    def scenario(lib):
        seen = []
        m = scaled(lib)
        m.register_full_backward_pre_hook(lambda m, g: (g[0] * 10,))
        m.register_full_backward_hook(lambda m, gi, go: seen.append(lib.numpy(go[0])))
        return backward(lib, m, lib.arange(2)), seen

    agree(scenario)


def test_a_hook_may_replace_the_input_gradient_which_parameters_do_not_see(agree):
    def scenario(lib):
        m = scaled(lib)
        m.register_full_backward_hook(lambda m, gi, go: (gi[0] * 7,))
        return backward(lib, m, lib.arange(2))

    agree(scenario)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_result_of_the_wrong_length_is_a_runtime_error(agree, kind):
    def scenario(lib):
        m = scaled(lib)
        getattr(m, kind)(lambda *a: ())
        backward(lib, m, lib.ones(2))

    agree(scenario, raises=RuntimeError)


def test_the_wrong_length_is_said_in_torch_s_words():
    m = nn.Linear(2, 2)
    m.register_full_backward_hook(lambda *a: ())
    with pytest.raises(RuntimeError, match="got 0, but expected 1"):
        jax.grad(lambda x: m(x).sum())(jnp.ones((1, 2)))


def test_several_inputs_and_outputs(agree):
    def scenario(lib):
        seen = []

        class Two(lib.nn.Module):
            def forward(self, x, y):
                return x * 2, y * 3

        class Outer(lib.nn.Module):
            def __init__(self):
                super().__init__()
                self.w = lib.nn.Parameter(lib.ones(2))
                self.two = Two()

            def forward(self, x):
                a, b = self.two(x * self.w, x)
                return a + b

        m = Outer()
        m.two.register_full_backward_hook(
            lambda m, gi, go: seen.append([[lib.numpy(v) for v in g] for g in (gi, go)])
        )
        return backward(lib, m, lib.arange(2)), seen

    agree(scenario)


def test_hooks_of_a_stack_fire_from_the_last_module_to_the_first(agree):
    def scenario(lib):
        calls = []
        m = lib.nn.Sequential(scaled(lib), scaled(lib, 2.0), scaled(lib))
        for i, x in enumerate(m):
            x.register_full_backward_hook(
                lambda m, gi, go, i=i: calls.append((i, lib.numpy(go[0])))
            )
        backward(lib, m, lib.ones(2))
        return calls

    agree(scenario)


def test_a_global_backward_hook_fires_before_the_local_one(agree):
    def scenario(lib):
        calls = []
        m = scaled(lib)
        m.register_full_backward_hook(lambda *a: calls.append("local"))
        handles = [
            lib.hooks.register_module_full_backward_hook(lambda *a: calls.append("global")),
            lib.hooks.register_module_full_backward_pre_hook(lambda *a: calls.append("global pre")),
        ]
        try:
            backward(lib, m, lib.ones(2))
        finally:
            for handle in handles:
                handle.remove()
        return calls

    agree(scenario)


def test_a_dict_output_runs_forward_hooks_only_and_warns_once():
    class Dicts(nn.Module):
        def forward(self, x):
            return {"y": 2 * x}

    calls = []
    m = Dicts()
    m.register_forward_hook(lambda *a: calls.append("forward"))
    m.register_full_backward_hook(lambda *a: calls.append("backward"))
    with pytest.warns(UserWarning, match="[Bb]ackward"):
        grad = jax.grad(lambda x: m(x)["y"].sum())(jnp.ones(2))
    np.testing.assert_array_equal(np.asarray(grad), [2.0, 2.0])
    assert "backward" not in calls
    assert "forward" in calls


@pytest.mark.parametrize("jit", [False, True])
def test_the_hook_fires_when_no_input_is_differentiated(jit):
    shapes = []
    m = nn.Linear(2, 3)
    m.register_full_backward_hook(lambda m, gi, go: shapes.append(go[0].shape))
    f = nn.grad(lambda m: m(jnp.ones((5, 2))).sum())
    grads = (nn.jit(f) if jit else f)(m)
    assert shapes == [(5, 3)]
    np.testing.assert_allclose(np.asarray(grads["bias"]), [5.0, 5.0, 5.0])


def hooked_gradient(wrap):
    """d/dx of sum(tap(x * w)) with a hook that triples the input gradient: 3 * w."""
    m = scaled(SimpleNamespace(nn=nn, ones=lambda n: jnp.ones(1)))
    m.register_full_backward_hook(lambda m, gi, go: (3 * gi[0],))
    f = wrap(lambda x: jnp.sum(m(x)))
    return jax.grad(f)(jnp.arange(2.0))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda x: jax.vmap(lambda v: f(v[None]))(x).sum(),
        lambda f: lambda x: jax.lax.scan(lambda c, v: (c + f(v[None]), None), 0.0, x)[0],
        lambda f: lambda x: jax.lax.cond(True, f, lambda x: 0.0, x),
        nn.jit,
        nn.remat,
    ],
    ids=["eager", "jit", "checkpoint", "vmap", "scan", "cond", "nn.jit", "nn.remat"],
)
def test_a_hook_that_triples_the_gradient_does_so_under_every_transform(wrap):
    np.testing.assert_allclose(np.asarray(hooked_gradient(wrap)), [9.0, 9.0])


def test_a_hook_acts_on_the_second_derivative_too():
    class Cube(nn.Module):
        def forward(self, x):
            return x**3

    m = Cube()
    m.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))
    x = jnp.asarray(1.5)
    np.testing.assert_allclose(np.asarray(jax.grad(lambda x: m(x))(x)), 2 * 3 * 1.5**2, rtol=1e-6)
    # d/dx of 2 * 3x^2 where the second pass also goes through the tap of the first: torch agrees
    theirs = torch.nn.Module()
    theirs.forward = lambda x: x**3
    theirs.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))
    tx = torch.tensor(1.5, requires_grad=True)
    (g,) = torch.autograd.grad(theirs(tx), tx, create_graph=True)
    (gg,) = torch.autograd.grad(g, tx)
    ours = jax.grad(jax.grad(lambda x: m(x)))(x)
    np.testing.assert_allclose(np.asarray(ours), gg.item(), rtol=1e-6)


def test_a_hook_may_write_to_a_buffer_under_nn_jit():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.ones(2))
            self.register_buffer("grad_norm", jnp.zeros(()))

        def forward(self, x):
            return x * self.w

    m = Net()

    def record(module, grad_input, grad_output):
        module.grad_norm = jnp.sqrt(jnp.sum(grad_output[0] ** 2))

    m.register_full_backward_hook(record)
    step = nn.jit(nn.grad(lambda m, x: (3 * m(x)).sum()))
    try:
        step(m, jnp.ones(2))
    except nn.StatefulnnError:  # refused loudly: nothing was lost
        assert float(m.grad_norm) == 0
    else:
        np.testing.assert_allclose(float(m.grad_norm), np.sqrt(18.0), rtol=1e-6)


def test_forward_mode_through_a_hooked_module_is_a_type_error():
    m = nn.Linear(2, 2)
    m.register_full_backward_hook(lambda *a: None)
    with pytest.raises(TypeError):
        jax.jvp(lambda x: m(x), (jnp.ones((1, 2)),), (jnp.ones((1, 2)),))


def test_removing_the_hook_restores_forward_mode():
    m = nn.Linear(2, 2)
    m.register_full_backward_hook(lambda *a: None).remove()
    out, tangent = jax.jvp(lambda x: m(x), (jnp.ones((1, 2)),), (jnp.ones((1, 2)),))
    expected = np.asarray(m.weight).sum(axis=1)
    np.testing.assert_allclose(np.asarray(tangent)[0], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_an_integer_input_is_none_or_zero():
    seen = []

    class Pick(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(jnp.arange(6.0).reshape(3, 2))

        def forward(self, index, x):
            return self.table[index] * x

    m = Pick()
    m.register_full_backward_hook(lambda m, gi, go: seen.append(gi))
    index = jnp.asarray([0, 2])
    grad = jax.grad(lambda x: m(index, x).sum())(jnp.ones((2, 2)))
    np.testing.assert_array_equal(np.asarray(grad), [[0.0, 1.0], [4.0, 5.0]])
    ((for_index, for_x),) = seen
    assert for_index is None or not np.any(np.asarray(for_index))
    np.testing.assert_array_equal(np.asarray(for_x), np.asarray(grad))
