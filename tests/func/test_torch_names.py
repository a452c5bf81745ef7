"""nn.func against torch.func: the same names, on modules and on functions of arrays."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.func import functional_call

import statefulnn as nn
from tests.quick import QUICKLY, diagonal, first

# torch's own forward mode and Hessians still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

NAMES = [
    "functional_call", "stack_module_state", "grad", "grad_and_value", "vjp", "jvp", "jacrev", "jacfwd",
    "hessian", "linearize", "vmap", "replace_all_batch_norm_modules_",
]  # fmt: skip


def t(x):
    return torch.tensor(np.asarray(x))


def twins():
    torch.manual_seed(0)
    make = lambda lib: lib.Sequential(lib.Linear(3, 4), lib.Tanh(), lib.Linear(4, 2))
    theirs, ours = make(torch.nn), make(nn)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    params = {n: p.detach() for n, p in theirs.named_parameters()}
    return ours, theirs, params


X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)
V = {
    "0.weight": np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32),
    "0.bias": np.random.default_rng(2).standard_normal(4).astype(np.float32),
    "2.weight": np.random.default_rng(3).standard_normal((2, 4)).astype(np.float32),
    "2.bias": np.random.default_rng(4).standard_normal(2).astype(np.float32),
}


def same(ours, theirs, rtol=1e-4, atol=1e-5):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            same(ours[name], theirs[name], rtol, atol)
    elif isinstance(ours, (tuple, list)):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b, rtol, atol)
    else:
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=rtol, atol=atol)


def eager(f):
    return f


def compiled(f):
    return nn.jit(f, compiler_options=QUICKLY)


WRAPS = pytest.mark.parametrize("wrap", [eager, compiled], ids=["eager", "nn.jit"])


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_torch_func_is_there_with_its_arguments(name):
    theirs = inspect.signature(getattr(torch.func, name)).parameters
    ours = inspect.signature(getattr(nn.func, name)).parameters
    left_out = {
        "jvp": {"strict"},
        "jacrev": {"_preallocate_and_copy"},
        "jacfwd": {"randomness"},
    }.get(name, set())
    missing = [n for n in theirs if n not in ours and n not in left_out]
    renamed = {"kwargs", "func", "module", "parameter_and_buffer_dicts", "root", "models", "fun"}
    assert set(missing) <= renamed, missing


@WRAPS
def test_grad_and_value(wrap):
    ours, theirs, params = twins()
    grads, value = wrap(nn.func.grad_and_value(lambda m, x: (m(x) ** 2).mean()))(ours, X)
    expected = torch.func.grad_and_value(
        lambda p: (functional_call(theirs, p, (t(X),)) ** 2).mean()
    )
    same((grads, value), expected(params))


def test_grad_and_value_with_aux_has_torch_s_order():
    f = lambda w: ((w**2).sum(), w + 1)
    grads, (value, aux) = nn.func.grad_and_value(f, has_aux=True)(jnp.ones(2))
    theirs, (their_value, their_aux) = torch.func.grad_and_value(f, has_aux=True)(torch.ones(2))
    same((grads, value, aux), (theirs, their_value, their_aux))


@WRAPS
def test_vjp(wrap):
    ours, theirs, params = twins()

    def run(m, x):
        out, vjp_fn = nn.func.vjp(lambda m, x: m(x), m, x)
        return out, vjp_fn(jnp.ones_like(out))

    out, vjp_fn = torch.func.vjp(lambda p, x: functional_call(theirs, p, (x,)), params, t(X))
    same(wrap(run)(ours, X), (out, vjp_fn(torch.ones_like(out))))


@WRAPS
def test_jvp_and_linearize(wrap):
    ours, theirs, params = twins()
    dx = jnp.ones_like(X)
    f = lambda p, x: functional_call(theirs, p, (x,))
    expected = torch.func.jvp(f, (params, t(X)), ({n: t(v) for n, v in V.items()}, t(dx)))
    same(wrap(lambda m, x: nn.func.jvp(lambda m, x: m(x), (m, x), (V, dx)))(ours, X), expected)

    def linear(m, x):
        out, jvp_fn = nn.func.linearize(lambda m, x: m(x), m, x)
        return out, jvp_fn(V, dx)

    same(wrap(linear)(ours, X), expected)


@pytest.mark.parametrize("name, wrap", diagonal(2, ["jacrev", "jacfwd"], [eager, compiled]))
def test_jacobians_of_a_module_and_its_input(name, wrap):
    ours, theirs, params = twins()
    f = lambda p, x: functional_call(theirs, p, (x,))
    expected = getattr(torch.func, name)(f, argnums=(0, 1))(params, t(X))
    same(wrap(getattr(nn.func, name)(lambda m, x: m(x), argnums=(0, 1)))(ours, X), expected)


@pytest.mark.parametrize("chunk_size", first(2, [3, 100, 1, 10]))
def test_jacrev_in_chunks_and_of_several_outputs(chunk_size):
    f = lambda x: {"a": x**2, "b": (x[:2].sum(), x.prod())}
    found = nn.func.jacrev(f, chunk_size=chunk_size)(jnp.arange(1.0, 5.0))
    expected = torch.func.jacrev(lambda x: {"a": x**2, "b": (x[:2].sum(), x.prod())})(
        torch.arange(1.0, 5.0)
    )
    same(found, expected)


def test_the_hessian_of_a_module():
    ours, theirs, params = twins()
    found = compiled(nn.func.hessian(lambda m, x: (m(x) ** 2).mean()))(ours, X)
    f = lambda p: (functional_call(theirs, p, (t(X),)) ** 2).mean()
    same(found, torch.func.hessian(f)(params))


def test_aux_passes_through_jacobians():
    for name in ("jacrev", "jacfwd", "hessian"):
        _, aux = getattr(nn.func, name)(lambda x: (x**2, {"n": x + 1}), has_aux=True)(jnp.ones(2))
        assert aux["n"].tolist() == [2.0, 2.0]
    out, vjp_fn, aux = nn.func.vjp(lambda x: (x, {"n": 3}), jnp.ones(2), has_aux=True)
    assert aux == {"n": 3}
    assert nn.func.jvp(lambda x: (x, 4), (1.0,), (1.0,), has_aux=True)[2] == 4


def test_aux_may_hold_the_module_itself():
    model = nn.Linear(2, 1)
    _, aux = nn.func.jacrev(lambda m, x: (m(x), {"model": m}), has_aux=True)(model, jnp.ones(2))
    assert aux["model"] is model


def test_what_forward_writes_is_written_back_once():
    for transform in (
        lambda f: lambda m, x: nn.func.vjp(f, m, x),
        lambda f: lambda m, x: nn.func.linearize(f, m, x),
        lambda f: (
            lambda m, x: nn.func.jvp(f, (m, x), ({n: p.value for n, p in m.named_parameters()}, x))
        ),
        nn.func.jacrev,
        nn.func.jacfwd,
        lambda f: nn.func.hessian(lambda m, x: f(m, x).sum()),
    ):
        norm, twin = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        transform(lambda m, x: m(x))(norm, X)
        twin(X)
        assert int(norm.num_batches_tracked) == 1
        np.testing.assert_allclose(norm.running_mean, twin.running_mean, rtol=1e-6)


def test_a_shared_parameter_is_one_in_every_result():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    x = jnp.ones(2)
    model = Tied()
    by_hand = jax.jacrev(lambda w: w @ (w @ x))(model.a.weight.value)
    found = nn.func.jacrev(lambda m: m(x))(model)
    assert list(found) == ["a.weight"]
    np.testing.assert_allclose(found["a.weight"], by_hand, rtol=1e-5)
    second = nn.func.hessian(lambda m: m(x).sum())(model)
    by_hand = jax.hessian(lambda w: (w @ (w @ x)).sum())(model.a.weight.value)
    np.testing.assert_allclose(second["a.weight"]["a.weight"], by_hand, rtol=1e-5, atol=1e-6)
    # Two modules that share a parameter: each dict has the whole derivative.
    of_a, of_b = nn.func.jacrev(lambda a, b: b(a(x)), argnums=(0, 1))(model.a, model.b)
    np.testing.assert_allclose(of_a["weight"], of_b["weight"])


def test_frozen_parameters_are_constants():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    jacobian = nn.func.jacrev(lambda m, x: m(x))(model, jnp.ones(2))
    assert list(jacobian) == ["weight"]


# --------------------------------------------------------------------------------------------------
# vmap


def test_vmap_has_torch_s_axes_and_jax_s():
    a, b = jnp.arange(6.0).reshape(2, 3), jnp.arange(3.0)
    f = lambda a, b: a * b.sum() if False else a * b
    expected = torch.func.vmap(lambda a, b: a * b, in_dims=(1, 0), out_dims=1)(t(a), t(b))
    same(nn.func.vmap(f, in_dims=(1, 0), out_dims=1)(a, b), expected)
    same(nn.func.vmap(f, in_axes=(1, 0), out_axes=1)(a, b), expected)
    with pytest.raises(TypeError, match="two names of one option"):
        nn.func.vmap(f, in_dims=(1, 0), in_axes=(1, 0))


def test_vmap_forbids_random_numbers_unless_told():
    drop, x = nn.Dropout(0.5), jnp.ones((4, 50))
    with pytest.raises(nn.MissingRngError):
        nn.func.vmap(drop)(x)
    assert len({tuple(np.asarray(r)) for r in nn.func.vmap(drop, randomness="different")(x)}) == 4
    assert len({tuple(np.asarray(r)) for r in nn.func.vmap(drop, randomness="same")(x)}) == 1


@pytest.mark.parametrize("chunk_size", first(2, [2, 9, 1, 5]))
def test_vmap_in_chunks(chunk_size):
    x, y = jnp.arange(10.0).reshape(5, 2), jnp.arange(15.0).reshape(3, 5)
    f = lambda x, y, scale: (x.sum() * scale, {"y": y})
    found = nn.func.vmap(f, (0, 1, None), (0, {"y": 1}), chunk_size=chunk_size)(x, y, 2.0)
    expected = torch.func.vmap(
        lambda x, y: (x.sum() * 2.0, {"y": y}), (0, 1), (0, {"y": 1}), chunk_size=chunk_size
    )(t(x), t(y))
    same(found, expected)


def test_a_shared_module_is_written_once_a_chunk_or_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", jnp.zeros((), jnp.int32))

        def forward(self, x):
            self.calls = self.calls + 1
            return x

    counter = Counter()
    nn.func.vmap(lambda m, x: m(x), (None, 0), chunk_size=2)(counter, jnp.ones(4))
    assert int(counter.calls) == 2
    with pytest.raises(TypeError, match="stack of modules"):
        nn.func.vmap(lambda m, x: m(x), (0, 0), chunk_size=2)(counter, jnp.ones(4))


def test_vmap_refuses_bad_axes():
    with pytest.raises(ValueError, match="chunk_size"):
        nn.func.vmap(lambda x: x, chunk_size=0)
    with pytest.raises(ValueError, match="length 1 for 2 arguments"):
        nn.func.vmap(lambda x, y: x, (0,), chunk_size=2)(jnp.ones(2), jnp.ones(2))


# --------------------------------------------------------------------------------------------------
# Bad input


def test_tangents_and_cotangents_are_checked():
    model = nn.Linear(2, 1)
    f = lambda m, x: m(x)
    x = jnp.ones(2)
    with pytest.raises(nn.UnknownNameError, match=r"trainable parameters are \['bias', 'weight'\]"):
        nn.func.jvp(f, (model, x), ({"weight": jnp.ones((1, 2))}, x))
    with pytest.raises(
        nn.ShapeError, match=r"shape \(2, 1\) for an array of shape \(1, 2\), '\[0\].weight'"
    ):
        nn.func.jvp(f, (model, x), ({"weight": jnp.ones((2, 1)), "bias": jnp.ones(1)}, x))
    with pytest.raises(TypeError, match="tuple with one entry for each"):
        nn.func.jvp(f, (model, x), (x,))
    with pytest.raises(TypeError, match="primals of type"):
        nn.func.jvp(jnp.sin, 1.0, 1.0)
    _, vjp_fn = nn.func.vjp(f, model, x)
    with pytest.raises(
        nn.ShapeError, match=r"cotangent of shape \(3,\) for an output of shape \(1,\)"
    ):
        vjp_fn(jnp.ones(3))
    with pytest.raises(TypeError, match="for an output of structure"):
        vjp_fn((jnp.ones(1), jnp.ones(1)))


def test_a_module_as_differentiated_output_is_refused():
    with pytest.raises(TypeError, match="returned a Linear as its differentiated output"):
        nn.func.jacrev(lambda m: m)(nn.Linear(2, 1))


def test_a_module_that_is_not_used_is_an_error():
    model = nn.Linear(2, 1)
    with pytest.raises(nn.UnusedModuleError, match="never read"):
        nn.func.jacrev(lambda m: jnp.ones(2))(model)


def test_the_module_keeps_its_arrays_when_the_function_fails():
    model = nn.BatchNorm1d(3)
    before = np.array(model.running_mean)

    def fails(m, x):
        m(x)
        raise KeyError("in the middle")

    for transform in (nn.func.jacrev, nn.func.jacfwd, nn.func.hessian):
        with pytest.raises(KeyError, match="in the middle"):
            transform(fails)(model, X)
    np.testing.assert_array_equal(model.running_mean, before)


def test_forward_mode_through_hooks_is_refused():
    model = nn.Linear(3, 2)
    model.register_full_backward_hook(lambda m, gi, go: None)
    f = lambda m, x: m(x)
    v = {n: p.value for n, p in model.named_parameters()}
    for call in (
        lambda: nn.func.jvp(f, (model, X), (v, X)),
        lambda: nn.func.linearize(f, model, X),
        lambda: nn.func.jacfwd(f)(model, X),
        lambda: nn.func.ggn_vp(f, lambda out: (out**2).sum(), (model, X), v),
        lambda: nn.func.fisher_vp(f, (model, X), v),
    ):
        with pytest.raises(TypeError, match="backward hooks"):
            call()


def test_forward_over_reverse_shows_hooks_the_gradient():
    plain, hooked = nn.Linear(3, 2), nn.Linear(3, 2)
    hooked.load_state_dict(plain.state_dict())
    seen = []
    hooked.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape))
    v = {n: jnp.ones_like(p.value) for n, p in plain.named_parameters()}
    loss = lambda m, x: (m(x) ** 4).sum()
    for product in (
        lambda m: nn.func.hvp(loss, (m, X), v),
        lambda m: nn.func.hessian(loss)(m, X)["bias"],
    ):
        seen.clear()
        ours, expected = product(hooked), product(plain)
        assert seen == [(5, 2)]
        for name in expected:
            np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, atol=1e-5)
