"""functional_call, functionalize, statefulize, stack_module_state beside torch.func."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.precision import in_float64


class Net(nn.Module):
    """Two layers and a counter; the twin of `Theirs`."""

    def __init__(self, n_in=3, n_hidden=4):
        super().__init__()
        self.w1 = nn.Parameter(jnp.asarray(_values(n_hidden, n_in)))
        self.b1 = nn.Parameter(jnp.asarray(_values(n_hidden)))
        self.w2 = nn.Parameter(jnp.asarray(_values(1, n_hidden)))
        self.register_buffer("offset", jnp.asarray(_values(n_in)))

    def forward(self, x, *, power=1):
        h = jnp.tanh((x - self.offset) @ self.w1.value.T + self.b1)
        return (h @ self.w2.value.T) ** power


class Theirs(torch.nn.Module):
    def __init__(self, n_in=3, n_hidden=4):
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.as_tensor(_values(n_hidden, n_in)))
        self.b1 = torch.nn.Parameter(torch.as_tensor(_values(n_hidden)))
        self.w2 = torch.nn.Parameter(torch.as_tensor(_values(1, n_hidden)))
        self.register_buffer("offset", torch.as_tensor(_values(n_in)))

    def forward(self, x, *, power=1):
        h = torch.tanh((x - self.offset) @ self.w1.T + self.b1)
        return (h @ self.w2.T) ** power


def _values(*shape):
    return np.sin(1.0 + np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


X = _values(5, 3) * 2
ATOL = 2e-6


def given(scale=1.5):
    return {n: np.asarray(p) * np.float32(scale) for n, p in Net().named_parameters()}


def ours(d):
    return {k: jnp.asarray(v) for k, v in d.items()}


def theirs(d):
    return {k: torch.as_tensor(v) for k, v in d.items()}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("names", [["w1"], ["w1", "b1", "w2"], ["w1", "offset"], []], ids=str)
def test_the_output_is_torch_s(names, power):
    params = {k: v for k, v in {**given(), "offset": _values(3) + 1}.items() if k in names}
    a = nn.functional_call(Net(), ours(params), (jnp.asarray(X),), {"power": power})
    b = torch.func.functional_call(
        Theirs(), theirs(params), (torch.as_tensor(X),), {"power": power}
    )
    np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), atol=ATOL)


def test_the_gradient_is_torch_s():
    a = jax.grad(lambda p: (nn.functional_call(Net(), p, (jnp.asarray(X),)) ** 2).sum())(
        ours(given())
    )
    b = torch.func.grad(
        lambda p: (torch.func.functional_call(Theirs(), p, (torch.as_tensor(X),)) ** 2).sum()
    )(theirs(given()))
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(np.asarray(a[name]), b[name].numpy(), rtol=1e-4, atol=1e-5)


def test_per_sample_gradients_are_torch_s():
    fn, params = nn.functionalize(Net())
    a = jax.vmap(jax.grad(lambda p, x: fn(p, x).sum()), in_axes=(None, 0))(params, jnp.asarray(X))
    t = Theirs()
    tp = {k: v.detach() for k, v in t.named_parameters()}
    b = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(t, p, (x,)).sum()),
        in_dims=(None, 0),
    )(tp, torch.as_tensor(X))
    for name in a:
        assert a[name].shape == (5, *params[name].shape)
        np.testing.assert_allclose(np.asarray(a[name]), b[name].numpy(), rtol=1e-4, atol=ATOL)


@pytest.mark.parametrize("jit", [False, True])
def test_an_ensemble_by_vmap_over_stacked_state_is_torch_s(jit):
    scales = [0.5, 1.0, 2.0]

    def members(make):
        out = []
        for s in scales:
            m = make()
            for p in m.parameters():
                p.data = p.data * s
            out.append(m)
        return out

    mine, thine = members(Net), members(Theirs)
    params, buffers = nn.stack_module_state(mine)
    tparams, tbuffers = torch.func.stack_module_state(thine)
    assert list(params) == list(tparams)
    assert list(buffers) == list(tbuffers)
    assert {k: v.shape for k, v in params.items()} == {
        k: tuple(v.shape) for k, v in tparams.items()
    }
    f = jax.vmap(lambda p, b, x: nn.functional_call(mine[0], (p, b), (x,)), in_axes=(0, 0, None))
    a = (jax.jit(f) if jit else f)(params, buffers, jnp.asarray(X))
    b = torch.func.vmap(
        lambda p, b, x: torch.func.functional_call(thine[0], (p, b), (x,)), in_dims=(0, 0, None)
    )(tparams, tbuffers, torch.as_tensor(X))
    np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), atol=ATOL)


def test_the_hessian_is_the_difference_of_gradients():
    with in_float64():
        fn, params = nn.functionalize(Net().double())
        x = jnp.asarray(X, jnp.float64)

        def loss(w2):
            return (fn({**params, "w2": w2}, x) ** 2).sum()

        w2 = params["w2"]
        hessian = jax.jit(jax.hessian(loss))(w2)[0, :, 0, :]
        gradient = jax.jit(jax.grad(loss))
        eps = 1e-5
        for i in range(w2.shape[1]):
            up, down = (gradient(w2.at[0, i].add(s * eps)) for s in (1, -1))
            np.testing.assert_allclose(hessian[:, i], ((up - down) / (2 * eps))[0], rtol=1e-6)


def test_forward_mode_agrees_with_finite_differences():
    fn, params = nn.functionalize(Net())
    v = jax.tree.map(lambda p: jnp.cos(p), params)
    _, tangent = jax.jvp(lambda p: fn(p, jnp.asarray(X)).sum(), (params,), (v,))
    eps = 1e-2
    up, down = (
        fn(jax.tree.map(lambda p, d, s=s: p + s * eps * d, params, v), jnp.asarray(X)).sum()
        for s in (1, -1)
    )
    np.testing.assert_allclose(float(tangent), float((up - down) / (2 * eps)), rtol=5e-3)


ARGS = {
    "tuple": ((jnp.asarray(X),), None),
    "one array": (jnp.asarray(X), None),
    "kwargs only": (None, {"x": jnp.asarray(X)}),
    "empty tuple": ((), {"x": jnp.asarray(X)}),
}


@pytest.mark.parametrize("form", ARGS)
def test_the_forms_of_arguments(form):
    args, kwargs = ARGS[form]
    out = nn.functional_call(Net(), {}, args, kwargs)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(Net()(jnp.asarray(X))))


def test_a_list_is_one_argument_not_several():
    class Sum(nn.Module):
        def forward(self, xs):
            return sum(xs)

    assert float(nn.functional_call(Sum(), {}, [jnp.ones(()), jnp.ones(())])) == 2.0


def test_parameters_inside_forward_are_the_given_ones():
    class Penalty(Net):
        def forward(self, x):
            return sum((p.value**2).sum() for p in self.parameters())

    zeros = {n: jnp.zeros_like(p.value) for n, p in Net().named_parameters()}
    assert float(nn.functional_call(Penalty(), zeros, (X,))) == 0.0


def test_none_may_replace_a_bias():
    class Maybe(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(jnp.ones(2))

        def forward(self, x):
            return x if self.bias is None else x + self.bias

    m = Maybe()
    np.testing.assert_array_equal(
        np.asarray(nn.functional_call(m, {"bias": None}, (jnp.ones(2),))), [1, 1]
    )
    np.testing.assert_array_equal(np.asarray(m(jnp.ones(2))), [2, 2])


def test_boxes_are_taken_as_values():
    source = Net()
    out = nn.functional_call(Net(), dict(source.named_parameters()), (jnp.asarray(X),))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(source(jnp.asarray(X))))


def test_untied_on_request():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(jnp.ones(2))
            self.b = self.a

        def forward(self, x):
            return x * self.a + self.b

    one = jnp.ones(2)
    tied = nn.functional_call(Tied(), {"a": 3 * one}, (one,))
    untied = nn.functional_call(Tied(), {"a": 3 * one}, (one,), tie_weights=False)
    np.testing.assert_array_equal(np.asarray(tied), [6, 6])
    np.testing.assert_array_equal(np.asarray(untied), [4, 4])


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray(2.0))
        self.frozen = nn.Parameter(jnp.asarray(5.0), requires_grad=False)
        self.register_buffer("count", jnp.zeros((), jnp.int32))
        self.register_buffer("hidden", jnp.zeros(()), persistent=False)

    def forward(self, x):
        self.count = self.count + 1
        return self.w * x + self.frozen


def test_functionalize_sorts_trainable_and_state():
    fn, params, state = nn.functionalize(Counter(), mutable=True)
    assert set(params) == {"w"}
    assert set(state) == {"frozen", "count", "hidden"}
    out, new = fn(params, state, 1.0)
    assert float(out) == 7.0
    assert int(new["count"]) == 1
    assert set(new) == set(state)


def test_the_state_threads_through_a_raw_scan():
    fn, params, state = nn.functionalize(Counter(), mutable=True)

    def step(state, x):
        out, state = fn(params, state, x)
        return state, out

    final, outs = jax.lax.scan(step, state, jnp.arange(4.0))
    assert int(final["count"]) == 4
    np.testing.assert_array_equal(np.asarray(outs), 2 * np.arange(4) + 5)


def test_functional_call_returns_every_buffer_when_mutable():
    out, state = nn.functional_call(Counter(), {"w": jnp.asarray(1.0)}, (1.0,), mutable=True)
    assert {"count", "hidden"} <= set(state)
    assert "w" not in state


def test_statefulize_is_the_way_back():
    net = Net()
    fn, params = nn.functionalize(net)
    again = nn.statefulize(fn, params)
    assert isinstance(again, nn.Module)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in net.named_parameters()]
    np.testing.assert_array_equal(
        np.asarray(again(jnp.asarray(X))), np.asarray(net(jnp.asarray(X)))
    )
    grads = nn.grad(lambda m: m(jnp.asarray(X)).sum())(again)
    plain = jax.grad(lambda p: fn(p, jnp.asarray(X)).sum())(params)
    np.testing.assert_allclose(np.asarray(grads["w1"]), np.asarray(plain["w1"]), rtol=1e-6)


def test_statefulize_keeps_state_as_buffers_that_advance():
    fn, params, state = nn.functionalize(Counter(), mutable=True)
    again = nn.statefulize(fn, params, state)
    nn.jit(again)(1.0)
    again(1.0)
    assert int(dict(again.named_buffers())["count"]) == 2


def test_dotted_names_survive_statefulize():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, x):
            return self.inner(x)

    fn, params = nn.functionalize(Outer())
    assert "inner.w1" in params
    again = nn.statefulize(fn, params)
    assert "inner.w1" in dict(again.named_parameters())
    assert "inner.w1" in again.state_dict()


def test_bfloat16_and_empty_batches():
    m = Net().bfloat16()
    out = nn.functional_call(m, {}, (jnp.zeros((0, 3), jnp.bfloat16),))
    assert out.shape == (0, 1)
    assert out.dtype == jnp.bfloat16
    grads = jax.grad(lambda p: nn.functional_call(m, p, (jnp.zeros((0, 3), jnp.bfloat16),)).sum())(
        nn.functionalize(m)[1]
    )
    assert {g.dtype for g in grads.values()} == {jnp.dtype("bfloat16")}
    assert float(jnp.abs(grads["w1"].astype(jnp.float32)).sum()) == 0


def test_under_x64_float64_stays_float64():
    with in_float64():
        m = Net().double()
        fn, params = nn.functionalize(m)
        out = fn(params, jnp.asarray(X, jnp.float64))
        assert out.dtype == jnp.float64
        t = Theirs().double()
        np.testing.assert_allclose(
            np.asarray(out), t(torch.as_tensor(X).double()).detach().numpy(), rtol=1e-12
        )
