"""Backward and backward-pre hooks: taps around a module. torch and formulas are the oracle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.precision import in_float64


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


# --------------------------------------------------------------------------------------------------
# What a hook may return

OURS = SimpleNamespace(
    nn=nn,
    array=jnp.asarray,
    numpy=np.asarray,
    ones=lambda *shape: jnp.ones(shape),
    arange=lambda n: jnp.arange(float(n)),
)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_none_in_the_place_of_a_gradient_is_zero(agree, kind):
    def scenario(lib):
        m = scaled(lib)
        getattr(m, kind)(lambda *a: (None,))
        grads, dx = backward(lib, m, lib.arange(2))
        return [lib.zeros(2) if g is None else g for g in (*grads.values(), dx)]

    agree(scenario)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_list_of_gradients_is_taken_as_a_tuple(agree, kind):
    def scenario(lib):
        m = scaled(lib)
        getattr(m, kind)(lambda m, g, *rest: [2 * g[0]])
        return backward(lib, m, lib.arange(2))

    agree(scenario)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize(
    ("change", "raises", "error", "says"),
    [
        (lambda lib, g: g[:1], RuntimeError, nn.errors.ShapeError, "shape"),
        (
            lambda lib, g: lib.array(lib.numpy(g).astype(np.float16)),
            RuntimeError,
            nn.errors.DtypeError,
            "float16",
        ),
        (lambda lib, g: 2.0, TypeError, TypeError, "float"),
    ],
    ids=["shape", "dtype", "number"],
)
def test_a_gradient_that_does_not_fit_is_an_error_of_torchs_class(
    agree, kind, change, raises, error, says
):
    def scenario(lib):
        m = scaled(lib)
        getattr(m, kind)(lambda m, g, *rest: (change(lib, g[0]),))
        return backward(lib, m, lib.arange(2))

    agree(scenario, raises=raises)
    with pytest.raises(error, match=f"backward .*{says}[\\s\\S]*Why: [\\s\\S]*Instead: "):
        scenario(OURS)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's
def test_a_gradient_where_no_input_is_differentiated_is_an_error(agree):
    def scenario(lib):
        m = scaled(lib)
        m.register_full_backward_hook(lambda m, gi, go: (go[0],))
        x = lib.ones(2)
        if lib.nn is nn:
            return nn.grad(lambda m: m(x).sum())(m)
        m(x).sum().backward()

    agree(scenario, raises=RuntimeError)


# --------------------------------------------------------------------------------------------------
# Inputs and outputs of other kinds


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's
def test_hooks_fire_when_the_only_input_is_a_keyword_or_inside_a_tuple(agree):
    def scenario(lib):
        class Product(lib.nn.Module):
            def forward(self, *pairs, x=None):
                return 2 * x if x is not None else 2 * pairs[0][0]

        seen = []
        m = Product()
        m.register_full_backward_hook(
            lambda m, gi, go: seen.append((gi, [lib.numpy(g) for g in go]))
        )

        def run(call):
            x = lib.arange(2)
            if lib.nn is nn:
                return jax.grad(lambda x: (3 * call(x)).sum())(x)
            x.requires_grad_(True)
            (3 * call(x)).sum().backward()
            return x.grad

        return run(lambda x: m(x=x)), run(lambda x: m((x, 1.0))), seen

    agree(scenario)


def test_outputs_that_are_no_arrays_pass_by(agree):
    def scenario(lib):
        class Several(lib.nn.Module):
            def forward(self, x):
                return 2 * x, None, (3 * x, 1), x > 0

        seen = []
        m = Several()
        m.register_full_backward_pre_hook(lambda m, go: (10 * go[0], None, None, None))
        m.register_full_backward_hook(
            lambda m, gi, go: seen.append(
                (lib.numpy(gi[0]), lib.numpy(go[0]), go[1] is None, go[2] is None)
            )
        )

        def loss(x):
            y, _, (z, _), _ = m(x)
            return (y + z).sum()

        x = lib.arange(2)
        if lib.nn is nn:
            return jax.grad(loss)(x), seen
        x.requires_grad_(True)
        loss(x).backward()
        return x.grad, seen

    agree(scenario)


def test_a_named_tuple_stays_one(agree):
    class Pair(NamedTuple):
        a: Any
        b: Any

    def scenario(lib):
        class Named(lib.nn.Module):
            def forward(self, x):
                return Pair(2 * x, 3 * x)

        m = Named()
        m.register_full_backward_hook(lambda m, gi, go: (gi[0] * 5,))
        x = lib.arange(2)
        if lib.nn is nn:
            return jax.grad(lambda x: m(x).b.sum())(x)
        x.requires_grad_(True)
        m(x).b.sum().backward()
        return x.grad

    agree(scenario)


def test_packed_sequences_have_no_array_to_hook_which_is_said():
    m = nn.LSTM(2, 3)
    m.register_full_backward_hook(lambda *a: pytest.fail("it fired"))
    packed = nn.utils.rnn.pack_padded_sequence(jnp.ones((4, 1, 2)), [4])
    with pytest.warns(UserWarning, match="LSTM has backward hooks.*do not fire"):
        grads = nn.grad(lambda m: m(packed)[0].data.sum())(m)
    plain = nn.LSTM(2, 3)
    plain.load_state_dict(m.state_dict())
    wanted = nn.grad(lambda m: m(packed)[0].data.sum())(plain)
    np.testing.assert_array_equal(grads["weight_ih_l0"], wanted["weight_ih_l0"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_gradients_have_the_dtype_of_the_computation(dtype):
    with in_float64(dtype == "float64"):
        m = nn.Linear(2, 2, dtype=jnp.dtype(dtype))
        seen = []

        def doubled(m, gi, go):
            seen.append((str(gi[0].dtype), str(go[0].dtype)))
            return (2 * gi[0],)

        loss_of = lambda m, x: jnp.real(m(x)).sum().astype(jnp.float32)
        x = jnp.ones((1, 2), dtype)
        plain = nn.grad(loss_of, argnums=1)(m, x)
        m.register_full_backward_hook(doubled)
        assert (nn.grad(loss_of, argnums=1)(m, x) == 2 * plain).all()
    assert seen == [(dtype, dtype)]


def test_an_empty_batch():
    m = nn.Linear(2, 3)
    shapes = []
    m.register_full_backward_hook(lambda m, gi, go: shapes.append((gi[0].shape, go[0].shape)))
    grads = nn.grad(lambda m, x: m(x).sum(), argnums=(0, 1))(m, jnp.ones((0, 2)))
    assert shapes == [((0, 2), (0, 3))]
    assert not grads[0]["weight"].any()


# --------------------------------------------------------------------------------------------------
# Forward runs for the shapes first: nobody notices


class Stateful(nn.Module):
    """Counts its calls, has statistics and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.drop(self.norm(x))


@pytest.mark.parametrize(
    ("jit", "shape_changes"),
    [(False, False), (True, True), pytest.param(True, False, marks=pytest.mark.long)],
    ids=["eager", "jit, inner hook changes the shape", "jit"],
)
def test_state_and_random_numbers_advance_once(jit, shape_changes):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)), jnp.float32)

    def step(hooked):
        m = Stateful()
        if shape_changes:
            m.norm.register_forward_hook(lambda m, args, out: out[:4])
        fired = []
        if hooked:
            m.register_full_backward_hook(lambda *a: fired.append(1))
        f = nn.value_and_grad(lambda m, x: (m(x) * x[:4] if shape_changes else m(x) * x).sum())
        quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        f = nn.jit(f, compiler_options=quickly) if jit else f
        nn.manual_seed(0)
        results = [f(m, x) for _ in range(2)]
        assert bool(fired) == hooked
        return results, m.state_dict(), nn.get_rng_state()

    for a, b in zip(*map(jax.tree.leaves, map(step, (True, False))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_forward_hook_further_inside_may_change_the_structure_of_the_output():
    m = nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 1))
    m[0].register_forward_hook(lambda m, args, out: out[0])
    shapes = []
    m.register_full_backward_hook(lambda m, gi, go: shapes.append((gi[0].shape, go[0].shape)))
    x = jnp.ones((4, 1, 2))
    np.testing.assert_array_equal(jax.grad(lambda x: m(x).sum())(x).shape, x.shape)
    assert shapes == [((4, 1, 2), (4, 1, 1))]


def test_the_module_s_own_forward_hook_may_change_the_shape():
    m = nn.Linear(2, 3)
    m.register_forward_hook(lambda m, args, out: out[:1])
    shapes = []
    m.register_full_backward_hook(lambda m, gi, go: shapes.append((gi[0].shape, go[0].shape)))
    grad = jax.grad(lambda x: m(x).sum())(jnp.ones((4, 2)))
    assert shapes == [((4, 2), (1, 3))]
    np.testing.assert_allclose(grad[0], np.asarray(m.weight).sum(0), rtol=1e-6)
    assert not grad[1:].any()


def test_forward_may_look_at_values_outside_jit():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", jnp.zeros((), jnp.int32))

        def forward(self, x):
            self.calls = self.calls + 1
            return 2 * x if float(jax.lax.stop_gradient(x).sum()) > 0 else x

    m = Looks()
    m.register_full_backward_hook(lambda m, gi, go: (3 * gi[0],))
    np.testing.assert_array_equal(jax.grad(lambda x: m(x).sum())(jnp.ones(2)), [6.0, 6.0])
    assert int(m.calls) == 1


def test_forward_may_use_what_a_clone_lacks_and_writes_once_all_the_same():
    class Cached(nn.Module):
        _python_cache = ("factor",)

        def __init__(self):
            super().__init__()
            self.factor = [2.0]
            self.register_buffer("calls", jnp.zeros((), jnp.int32))

        def forward(self, x):
            self.calls = self.calls + 1
            return x * self.factor[0]

    m = Cached()
    m.register_full_backward_hook(lambda m, gi, go: (3 * gi[0],))
    np.testing.assert_array_equal(jax.grad(lambda x: m(x).sum())(jnp.ones(2)), [6.0, 6.0])
    assert int(m.calls) == 1


def test_an_error_in_forward_is_raised_as_it_is():
    m = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
    m.register_full_backward_hook(lambda *a: None)
    with pytest.raises(nn.errors.ShapeError) as hooked:
        jax.grad(lambda x: m(x).sum())(jnp.ones((1, 2)))
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
    with pytest.raises(nn.errors.ShapeError) as usual:
        jax.grad(lambda x: plain(x).sum())(jnp.ones((1, 2)))
    assert str(hooked.value) == str(usual.value)


def test_a_module_among_the_arguments_is_written_once():
    class Calls(nn.Module):
        def forward(self, other, x):
            return 2 * other(x)

    other = Stateful()
    other.drop.eval()
    outer = Calls()
    outer.register_full_backward_hook(lambda *a: None)
    nn.grad(lambda other, x: outer(other, x).sum())(other, jnp.ones((4, 2)))
    assert int(other.calls) == 1
    assert int(other.norm.num_batches_tracked) == 1


def double_inside(function):
    """Return a model with a hook at the outside, and one inside, which doubles, under `function`."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = scaled(OURS)

        def forward(self, x):
            return function(self.inner, x)

    m = Outer()
    m.register_full_backward_hook(lambda *a: None)
    m.inner.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))
    return m


def apply(m, x):
    return m(x)


@pytest.mark.parametrize("outside", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "function",
    [
        nn.jit(apply),
        jax.jit(lambda m, x: m(x)),
        jax.checkpoint(lambda m, x: m(x)),
        nn.remat(apply),
        lambda m, x: jax.lax.scan(lambda c, _: ((c[0], c[0](c[1])), None), (m, x), None, 1)[0][1],
        lambda m, x: nn.scan(lambda c, _: ((c[0], c[0](c[1])), None), (m, x), length=1)[0][1],
        lambda m, x: nn.vmap(apply, in_axes=(None, 0))(m, x[None])[0],
    ],
    ids=["nn.jit", "jit", "checkpoint", "nn.remat", "scan", "nn.scan", "nn.vmap"],
)
def test_hooks_inside_what_jax_traces_once_are_kept(function, outside):
    # The run for the shapes fires no hook; JAX must not remember that trace for the real one.
    m = double_inside(function)
    grad = outside(jax.grad(lambda x: m(x).sum()))(jnp.ones(2))
    np.testing.assert_array_equal(grad, [6.0, 6.0])


def test_what_the_run_for_the_shapes_reads_may_change_without_a_warning():
    teacher = nn.Linear(2, 2)

    class Student(nn.Module):
        _python_cache = ("teacher",)

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return ((self.fc(x) - teacher(x)) ** 2).sum()

    m = Student()
    m.register_full_backward_hook(lambda *a: None)
    nn.grad(lambda m, x: m(x))(m, jnp.ones((1, 2)))
    teacher.weight.value = teacher.weight * 0.9  # warnings are errors here
    teacher.eval()
    nn.grad(lambda m, x: m(x))(m, jnp.ones((1, 2)))


# --------------------------------------------------------------------------------------------------
# Under transformations


def test_a_shared_module_called_several_times_fires_for_each_call(agree):
    def scenario(lib):
        seen = []

        class Twice(lib.nn.Module):
            def __init__(self):
                super().__init__()
                self.part = scaled(lib)

            def forward(self, x):
                return self.part(self.part(x) ** 2)

        m = Twice()
        m.part.register_full_backward_hook(
            lambda m, gi, go: (seen.append((lib.numpy(gi[0]), lib.numpy(go[0]))), (2 * gi[0],))[1]
        )
        return backward(lib, m, lib.arange(2) + 1), seen

    agree(scenario)


@pytest.mark.parametrize("jit", [False, True])
def test_a_shared_module_under_scan_is_as_in_torchs_loop(jit):
    steps = 3
    theirs = scaled(SimpleNamespace(nn=torch.nn, ones=torch.ones))
    theirs.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))
    tx = torch.tensor([1.0, -0.5], requires_grad=True)
    y = tx
    for _ in range(steps):
        y = torch.tanh(theirs(y) / 3)
    y.sum().backward()

    m = scaled(OURS)
    m.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))

    def loss(m, x, scan):
        def body(c, _):
            m, x = c
            return (m, jnp.tanh(m(x) / 3)), None

        return scan(body, (m, x), None, steps)[0][1].sum()

    for scan in (nn.scan, jax.lax.scan):
        step = nn.grad(lambda m, x, scan=scan: loss(m, x, scan), argnums=(0, 1))
        grads, dx = (nn.jit(step) if jit else step)(m, jnp.asarray([1.0, -0.5]))
        np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=1e-5)
        np.testing.assert_allclose(grads["w"], theirs.w.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("raw", [False, True], ids=["nn.vmap", "jax.vmap"])
def test_under_vmap_a_hook_sees_one_example(raw):
    # Each example's gradient is normalised by its own norm; the loop is torch's.
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    theirs = torch.nn.Linear(3, 2)
    theirs.register_full_backward_hook(lambda m, gi, go: (gi[0] / gi[0].norm(),))
    wanted = []
    for row in x:
        row = torch.tensor(row, requires_grad=True)
        (theirs(row) ** 2).sum().backward()
        wanted.append(row.grad.numpy())

    m = nn.Linear(3, 2)
    m.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    m.register_full_backward_hook(lambda m, gi, go: (gi[0] / jnp.linalg.norm(gi[0]),))
    if raw:
        got = jax.jit(jax.vmap(jax.grad(lambda x: (m(x) ** 2).sum())))(jnp.asarray(x))
    else:
        losses = nn.vmap(lambda m, x: (m(x) ** 2).sum(), in_axes=(None, 0))
        got = jax.jit(jax.grad(lambda x: losses(m, x).sum()))(jnp.asarray(x))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_stack_of_modules_under_nn_vmap_is_a_loop_over_modules():
    models = [nn.Linear(3, 2) for _ in range(3)]
    for m in models:
        m.register_full_backward_hook(lambda m, gi, go: (gi[0] * m.bias.sum(),))
    stack = jax.tree.map(lambda *v: jnp.stack(v), *models)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 3)), jnp.float32)
    loss = lambda m, x: (m(x) ** 2).sum()
    together = jax.jit(jax.grad(lambda x: nn.vmap(loss)(stack, x).sum()))(x)
    for i, m in enumerate(models):
        slope = (2 * (np.asarray(x[i]) @ np.asarray(m.weight).T + np.asarray(m.bias))) @ m.weight
        np.testing.assert_allclose(together[i], slope * float(m.bias.sum()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, jax.checkpoint, jax.jit, lambda f: jax.jit(jax.checkpoint(f)), nn.remat],
    ids=["eager", "checkpoint", "jit", "jit of checkpoint", "nn.remat"],
)
def test_each_hook_runs_once_a_call(wrap):
    calls = []
    m = scaled(OURS)
    m.register_forward_pre_hook(lambda *a: calls.append("forward pre"))
    m.register_forward_hook(lambda *a: calls.append("forward"))
    m.register_full_backward_pre_hook(lambda *a: calls.append("backward pre"))
    m.register_full_backward_hook(lambda *a: calls.append("backward"))
    jax.grad(wrap(lambda x: m(x).sum()))(jnp.ones(2))
    assert calls == ["forward pre", "forward", "backward pre", "backward"]


@pytest.mark.parametrize(
    "gradient",
    [
        lambda f, m, x: jax.grad(lambda x: f(m, x))(x),
        lambda f, m, x: nn.grad(f, argnums=(0, 1))(m, x)[1],
        lambda f, m, x: nn.jit(nn.grad(f, argnums=(0, 1)))(m, x)[1],
        lambda f, m, x: jax.grad(f, argnums=(0, 1))(m, x)[1],
        lambda f, m, x: jax.jit(jax.grad(f, argnums=(0, 1)))(m, x)[1],
        lambda f, m, x: nn.grad(nn.remat(f), argnums=(0, 1))(m, x)[1],
        lambda f, m, x: jax.vmap(lambda x: nn.grad(f, argnums=(0, 1))(m, x)[1])(x[None])[0],
        lambda f, m, x: jax.grad(
            lambda x: nn.vmap(f)(jax.tree.map(lambda v: v[None], m), x[None]).sum()
        )(x),
        lambda f, m, x: nn.grad(
            lambda m, x: nn.scan(lambda c, x: (c, f(c, x)), m, x[None])[1].sum(), argnums=(0, 1)
        )(m, x)[1],
    ],
    ids="jax.grad-nn.grad-nn.jit-of module-jit-remat-vmap-stack-scan".split("-"),
)
@pytest.mark.parametrize("pre", [False, True])
def test_hooks_may_read_the_parameters_of_their_module(gradient, pre):
    # torch's full_backward hooks can: the module is there. Under a transformation it must be, too.
    def by_norm(module, grads, *rest):
        return (grads[0] * module.weight.sum() * module.bias.sum(),)

    theirs = torch.nn.Linear(2, 3)
    m = nn.Linear(2, 3)
    m.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    for model in (m, theirs):
        if pre:
            model.register_full_backward_pre_hook(by_norm)
        else:
            model.register_full_backward_hook(by_norm)
    x = np.asarray([[1.0, 2.0], [-0.5, 0.3]], np.float32)
    tx = torch.tensor(x, requires_grad=True)
    (theirs(tx) ** 2).sum().backward()
    got = gradient(lambda m, x: (m(x) ** 2).sum(), m, jnp.asarray(x))
    np.testing.assert_allclose(got, tx.grad, rtol=1e-4, atol=1e-6)


def test_a_hook_that_reads_buffers_sees_those_the_call_began_with():
    seen = []
    m = nn.BatchNorm1d(2)
    m.register_full_backward_hook(lambda m, gi, go: seen.append(int(m.num_batches_tracked)))
    for _ in range(2):
        nn.grad(lambda m, x: m(x).sum())(m, jnp.ones((3, 2)))
    assert seen == [0, 1]


# --------------------------------------------------------------------------------------------------
# Higher derivatives


def clipped_net():
    """A net whose hooks do something that is not linear, and different, to each gradient."""
    m = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    m[0].register_full_backward_pre_hook(lambda m, go: (jnp.sin(go[0]),))
    m[2].register_full_backward_hook(lambda m, gi, go: (gi[0] ** 2 * m.bias.sum(),))
    return m


@pytest.mark.parametrize(
    "second",
    [
        lambda f: jax.jacrev(jax.grad(f)),
        lambda f: jax.jacfwd(jax.grad(f)),
        jax.hessian,
        lambda f: jax.hessian(jax.jit(f)),
        lambda f: jax.jacrev(jax.grad(jax.checkpoint(f))),
    ],
    ids=["reverse", "forward over reverse", "hessian", "jit", "checkpoint"],
)
def test_a_second_derivative_is_that_of_the_gradient_the_hooks_made(second):
    with in_float64():
        m = clipped_net().to(jnp.float64)
        x = jnp.asarray([0.3, -0.7])
        f = lambda x: (m(x) ** 2).sum()
        slope = jax.jit(jax.grad(f))
        eps = 1e-6
        wanted = [(slope(x + eps * e) - slope(x - eps * e)) / (2 * eps) for e in jnp.eye(2)]
        np.testing.assert_allclose(jax.jit(second(f))(x), jnp.stack(wanted).T, atol=1e-8)


@pytest.mark.parametrize("how", ["jit", pytest.param("eager", marks=pytest.mark.long)])
def test_maml_differentiates_the_adaptation_that_the_hooks_made(how):
    # Second order, over a batch of tasks; the hooks change the inner gradients and the outer one.
    with in_float64():
        m = clipped_net().to(jnp.float64)
        fn, params = nn.functionalize(m)
        rng = np.random.default_rng(0)
        x, y = (
            jnp.asarray(rng.standard_normal((3, 5, 2))),
            jnp.asarray(rng.standard_normal((3, 5, 1))),
        )
        loss = lambda p, x, y: ((fn(p, x) - y) ** 2).mean()

        def adapted(p, x, y):
            grads = jax.grad(loss)(p, x, y)
            return jax.tree.map(lambda p, g: p - 0.1 * g, p, grads)

        def meta(p):
            return jax.vmap(lambda x, y: loss(adapted(p, x, y), x, y))(x, y).sum()

        got = (jax.jit(jax.grad(meta)) if how == "jit" else jax.grad(meta))(params)

        # By the chain rule: the outer gradient of each task, through the Jacobian of its adaptation,
        # which is taken by finite differences.
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        ravel = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
        eps = 1e-6

        @jax.jit
        def of_task(x, y):
            outer = ravel(jax.grad(loss)(adapted(params, x, y), x, y))
            move = lambda e: ravel(adapted(unravel(flat + e), x, y))
            columns = jax.vmap(lambda e: (move(e) - move(-e)) / (2 * eps))(eps * jnp.eye(len(flat)))
            return columns @ outer

        wanted = sum(of_task(a, b) for a, b in zip(x, y, strict=True))
        np.testing.assert_allclose(ravel(got), wanted, atol=1e-8)


def test_watching_hooks_change_no_second_derivative():
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    ours = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    for model in (ours, theirs):
        for layer in model:
            layer.register_full_backward_hook(lambda *a: None)
            layer.register_full_backward_pre_hook(lambda *a: None)
    x = np.asarray([[0.3, -0.7]], np.float32)
    wanted = torch.autograd.functional.hessian(lambda x: (theirs(x) ** 2).sum(), torch.tensor(x))
    got = jax.jit(jax.hessian(lambda x: (ours(x) ** 2).sum()))(jnp.asarray(x))
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Forward mode


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        nn.jit,
        jax.checkpoint,
        nn.remat,
        lambda f: lambda x: jax.vmap(f)(x[None])[0],
        lambda f: lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, 2)[0],
        lambda f: lambda x: jax.lax.cond(True, f, lambda x: 0.0, x),
        lambda f: lambda x: jax.jit(jax.checkpoint(f))(x),
    ],
    ids=["eager", "jit", "nn.jit", "checkpoint", "nn.remat", "vmap", "scan", "cond", "nested"],
)
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.jacfwd(f)(x),
        lambda f, x: jax.jacrev(jax.jacfwd(f))(x),
    ],
    ids=["jvp", "jacfwd", "jacrev of jacfwd"],
)
def test_forward_mode_is_refused_wherever_the_module_is_called(differentiate, wrap):
    m = nn.Linear(2, 2)
    m.register_full_backward_hook(lambda *a: None)
    with pytest.raises(
        TypeError, match="Linear in forward mode[\\s\\S]*Why: [\\s\\S]*Instead: remove"
    ):
        differentiate(wrap(lambda x: m(x).sum()), jnp.ones(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_linearize_and_compiled_code_refuse_forward_mode_in_jax_s_words(compiled):
    # When the module runs, linearize is reverse mode, and a function compiled before runs no Python.
    m = nn.Linear(2, 2)
    m.register_full_backward_hook(lambda *a: None)
    x = jnp.ones(2)
    f = jax.jit(lambda x: m(x).sum()) if compiled else lambda x: m(x).sum()
    f(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.linearize(f, x)[1](x)
    if compiled:
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(f, (x,), (x,))


# --------------------------------------------------------------------------------------------------
# Writing in a hook; what is counted


def test_a_hook_may_write_to_a_module_of_the_user_s_outside_compiled_code():
    m = scaled(OURS)
    log = nn.Module()
    log.register_buffer("norm", jnp.zeros(()))

    def record(module, grad_input, grad_output):
        log.norm = jnp.linalg.norm(grad_output[0])

    m.register_full_backward_hook(record)
    jax.grad(lambda x: (3 * m(x)).sum())(jnp.ones(2))
    np.testing.assert_allclose(log.norm, np.sqrt(18.0), rtol=1e-6)


@pytest.mark.parametrize("how", ["functional_call", "nn.grad", "jit"])
def test_a_write_in_a_hook_that_would_be_lost_is_an_error(how):
    m = scaled(OURS)
    m.register_buffer("norm", jnp.zeros(()))

    def record(module, grad_input, grad_output):
        module.norm = jnp.linalg.norm(grad_output[0])

    m.register_full_backward_hook(record)
    x = jnp.ones(2)
    run = {
        "functional_call": lambda: jax.grad(
            lambda p: nn.functional_call(m, p, (x,), mutable=True)[0].sum()
        )({"w": m.w.value}),
        "nn.grad": lambda: nn.grad(lambda m: m(x).sum())(m),
        "jit": lambda: jax.jit(jax.grad(lambda x: m(x).sum()))(x),
    }[how]
    with pytest.raises(nn.StatefulnnError, match="norm"):
        run()
    assert float(m.norm) == 0


def compilations(run):
    """Return how often XLA compiles during a call."""
    count = []
    listener = lambda event, duration, **kw: (
        count.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return len(count)


def test_hooks_cause_no_trace_and_no_compilation_after_the_first_call():
    m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    x = jnp.ones((5, 3))
    step = nn.jit(nn.value_and_grad(lambda m, x: (m(x) ** 2).sum()))
    step(m, x)
    assert step.trace_count == 1
    for layer in (m, *m):
        layer.register_full_backward_hook(lambda *a: None)
        layer.register_full_backward_pre_hook(lambda *a: None)
    assert compilations(lambda: step(m, x)) == 1  # another step: one with hooks
    assert step.trace_count == 2
    assert compilations(lambda: [step(m, x) for _ in range(3)]) == 0
    eager = jax.grad(lambda x: (m(x) ** 2).sum())
    m.eval()
    eager(x)
    assert compilations(lambda: eager(x)) == 0
