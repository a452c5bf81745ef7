"""nn.jit: arguments of every form, static arguments, donation, traces, threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.precision import in_float64


class Net(nn.Module):
    def __init__(self, w=2.0):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray(w))
        self.register_buffer("calls", jnp.zeros((), jnp.int32))

    def forward(self, x, scale=1.0):
        self.calls = self.calls + 1
        return self.w * x * scale


X = jnp.arange(3.0)

FORMS = {
    "positional": lambda m: nn.jit(lambda m, x: m(x))(m, X),
    "keyword": lambda m: nn.jit(lambda *, m, x: m(x))(m=m, x=X),
    "in a dict": lambda m: nn.jit(lambda d: d["m"](d["x"]))({"m": m, "x": X}),
    "in a list": lambda m: nn.jit(lambda xs: xs[0](xs[1]))([m, X]),
    "in a nest": lambda m: nn.jit(lambda t: t["a"][0][1](t["x"]))({"a": ([0, m],), "x": X}),
    "keyword dict": lambda m: nn.jit(lambda **kw: kw["m"](kw["x"]))(m=m, x=X),
    "varargs": lambda m: nn.jit(lambda *a: a[1](a[0]))(X, m),
    "module": lambda m: nn.jit(m)(X),
    "module with keywords": lambda m: nn.jit(m)(x=X, scale=jnp.asarray(1.0)),
    "bound method": lambda m: nn.jit(m.forward)(X),
    "decorator with options": lambda m: nn.jit(static_argnums=2)(lambda m, x, k: m(x))(m, X, 3),
    "numpy input": lambda m: nn.jit(lambda m, x: m(x))(m, np.arange(3, dtype=np.float32)),
    "with None": lambda m: nn.jit(lambda m, x, mask=None: m(x))(m, X, None),
    "child of the argument": lambda m: nn.jit(lambda p, x: p.inner(x))(parent(m), X),
}


def parent(m):
    p = nn.Module()
    p.inner = m
    return p


@pytest.mark.parametrize("form", FORMS)
def test_modules_are_found_wherever_they_sit(form):
    m = Net()
    np.testing.assert_array_equal(np.asarray(FORMS[form](m)), 2 * np.arange(3))
    assert int(m.calls) == 1


def test_static_arguments_are_compiled_in():
    @nn.jit(static_argnames="mode")
    def f(m, x, mode="double"):
        return m(x) * 2 if mode == "double" else m(x)

    m = Net()
    np.testing.assert_array_equal(np.asarray(f(m, X, mode="double")), 4 * np.arange(3))
    np.testing.assert_array_equal(np.asarray(f(m, X, mode="single")), 2 * np.arange(3))
    np.testing.assert_array_equal(np.asarray(f(m, X)), 4 * np.arange(3))
    assert int(m.calls) == 3
    assert f.trace_count <= 3


def test_static_argnums_take_strings_and_tuples():
    f = nn.jit(lambda m, shape, x: m(x.reshape(shape)), static_argnums=(1,))
    m = Net()
    assert f(m, (3, 1), X).shape == (3, 1)
    assert f(m, (1, 3), X).shape == (1, 3)
    assert f(m, (3, 1), X).shape == (3, 1)
    assert f.trace_count == 2


def test_a_changed_list_as_static_argument_is_refused_or_seen():
    f = nn.jit(lambda m, k, x: m(x) * k[0], static_argnums=1)
    k = [1]
    try:
        f(Net(), k, X)
    except (TypeError, ValueError):
        return
    k[0] = 3
    np.testing.assert_array_equal(np.asarray(f(Net(), k, X)), 6 * np.arange(3))


def test_results_may_contain_modules_which_are_the_caller_s_own():
    a, b = Net(), Net()
    out, (again, d) = nn.jit(lambda a, b, x: (a(x), (b, {"a": a})))(a, b, X)
    assert again is b
    assert d["a"] is a
    assert int(a.calls) == 1


def test_a_module_built_inside_comes_out_as_a_module():
    @nn.jit
    def build(x):
        m = Net()
        m.w.value = x.sum()
        return m

    m = build(X)
    assert isinstance(m, Net)
    assert float(m.w) == 3.0
    m(X)
    assert int(m.calls) == 1


def test_no_retrace_for_values_and_one_for_shapes():
    f = nn.jit(lambda m, x: m(x))
    m = Net()
    for i in range(4):
        m.w.value = jnp.asarray(float(i))
        f(m, X + i)
    assert f.trace_count == 1
    f(m, jnp.ones(4))
    assert f.trace_count == 2
    f(m, X)
    assert f.trace_count == 2


def test_different_structures_share_one_function_without_mixing():
    f = nn.jit(lambda m, x: m(x))

    class Other(Net):
        def forward(self, x):
            return super().forward(x) + 100

    a, b = Net(), Other()
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(f(a, X)), 2 * np.arange(3))
        np.testing.assert_array_equal(np.asarray(f(b, X)), 2 * np.arange(3) + 100)
    assert f.trace_count == 2
    assert int(a.calls) == int(b.calls) == 2


def test_a_write_that_depends_on_a_branch_is_right_in_each_compilation():
    @nn.jit(static_argnums=2)
    def f(m, x, write):
        if write:
            m.w.value = m.w + 1
        return m.w * x

    m = Net()
    f(m, X, False)
    assert float(m.w) == 2.0
    f(m, X, True)
    assert float(m.w) == 3.0
    f(m, X, False)
    assert float(m.w) == 3.0


def test_a_write_of_the_value_that_is_there_is_no_change():
    m = Net()

    @nn.jit
    def f(m):
        m.w.value = m.w.value
        m.calls = m.calls

    f(m)
    assert float(m.w) == 2.0


def test_swapping_two_parameters_inside_is_swapped_outside():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(jnp.asarray(1.0))
            self.b = nn.Parameter(jnp.asarray(2.0))

    m = Pair()

    @nn.jit
    def swap(m):
        m.a.value, m.b.value = m.b.value, m.a.value

    swap(m)
    assert (float(m.a), float(m.b)) == (2.0, 1.0)
    swap(m)
    assert (float(m.a), float(m.b)) == (1.0, 2.0)
    assert swap.trace_count == 1


def test_a_constant_written_inside_is_written():
    m = Net()

    @nn.jit
    def reset(m):
        m.calls = np.asarray(7, np.int32)
        m.w.value = 3.0

    try:
        reset(m)
    except (TypeError, nn.StatefulnnError):
        reset = nn.jit(lambda m: setattr(m, "calls", jnp.asarray(7, jnp.int32)))
        reset(m)
    assert int(m.calls) == 7
    reset(m)
    assert int(m.calls) == 7


def test_donation_replaces_every_array_of_the_module():
    m = Net()
    old = m.w.value

    @nn.jit(donate=0)
    def step(m, x):
        m(x)
        m.w.value = m.w * 2
        return m.w * 1

    for i in range(1, 4):
        step(m, X)
        assert float(m.w) == 2.0 * 2**i
        assert int(m.calls) == i
    del old
    assert step.trace_count == 1


def test_arguments_to_donate_may_be_named():
    m = Net()

    @nn.jit(donate=("m",), static_argnums="times")
    def step(m, x, times):
        for _ in range(times):
            m.w.value = m.w * 2
        return x

    old = m.w.value
    step(m, X, 3)
    assert float(m.w) == 16.0 and old.is_deleted()
    assert not X.is_deleted()
    with pytest.raises(ValueError, match="donate='model', and it has no such argument"):
        nn.jit(lambda m, x: m(x), donate="model")


def test_donating_the_same_module_twice_in_one_call_is_no_crash():
    m = Net()
    f = nn.jit(lambda a, b, x: a(x) + b(x), donate=(0, 1))
    np.testing.assert_array_equal(np.asarray(f(m, m, X)), 4 * np.arange(3))
    assert int(m.calls) == 2
    assert float(m.w) == 2.0


def test_donating_an_array_argument():
    f = nn.jit(lambda m, x: m(x), donate=1)
    x = jnp.arange(3.0) + 0
    np.testing.assert_array_equal(np.asarray(f(Net(), x)), 2 * np.arange(3))


def test_a_jitted_step_writes_while_another_thread_reads():
    m = Net()
    f = nn.jit(lambda m, x: m.w * x)
    g = nn.jit(lambda m: setattr(m.w, "value", m.w + 1))
    f(m, X)
    g(m)
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            seen.append(float(f(m, jnp.ones(3))[0]))

    t = threading.Thread(target=read)
    t.start()
    for _ in range(50):
        g(m)
    stop.set()
    t.join()
    assert float(m.w) == 53.0
    assert all(s == int(s) for s in seen)
    assert sorted(seen) == seen


def test_threads_with_models_of_their_own():
    f = nn.jit(lambda m, x: m(x))

    def work(i):
        m = Net(float(i))
        for _ in range(5):
            out = f(m, X)
        return np.asarray(out), int(m.calls)

    with ThreadPoolExecutor(4) as pool:
        for i, (out, calls) in enumerate(pool.map(work, range(8))):
            np.testing.assert_array_equal(out, i * np.arange(3))
            assert calls == 5


def test_an_exception_in_the_traced_function_is_the_user_s_own():
    class Mine(Exception):
        pass

    @nn.jit
    def f(m, x):
        m(x)
        raise Mine("text")

    m = Net()
    for _ in range(2):
        with pytest.raises(Mine, match="text"):
            f(m, X)
    assert int(m.calls) == 0


def test_recursion_on_one_jitted_function():
    @nn.jit(static_argnums=2)
    def f(m, x, depth):
        return m(x) if depth == 0 else f(m, m(x), depth - 1)

    m = Net()
    np.testing.assert_array_equal(np.asarray(f(m, X, 2)), 8 * np.arange(3))
    assert int(m.calls) == 3


def test_a_python_scalar_argument_does_not_retrace():
    f = nn.jit(lambda m, x, s: m(x) * s)
    m = Net()
    for s in (1.0, 2.0, 3.0):
        np.testing.assert_array_equal(np.asarray(f(m, X, s)), 2 * s * np.arange(3))
    assert f.trace_count == 1


def test_an_empty_batch_and_bfloat16():
    m = Net()
    assert nn.jit(lambda m, x: m(x))(m, jnp.zeros((0, 3))).shape == (0, 3)
    m.bfloat16()
    out = nn.jit(lambda m, x: m(x))(m, jnp.ones(2, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


def test_x64_on_and_off_are_two_compilations_with_the_right_dtypes():
    f = nn.jit(lambda m, x: m(x))
    m = Net()
    assert f(m, np.arange(3.0)).dtype == jnp.float32
    with in_float64():
        d = Net().double()
        assert f(d, np.arange(3.0)).dtype == jnp.float64
        assert int(d.calls) == 1
    assert f(m, np.arange(3.0)).dtype == jnp.float32
    assert int(m.calls) == 2


def test_a_function_without_modules_is_compiled_too():
    f = nn.jit(lambda x: x * 2)
    np.testing.assert_array_equal(np.asarray(f(X)), 2 * np.arange(3))
    f(X)
    assert f.trace_count == 1


def test_a_module_with_no_arrays_at_all():
    class Empty(nn.Module):
        def forward(self, x):
            return x + 1

    np.testing.assert_array_equal(np.asarray(nn.jit(Empty())(X)), np.arange(3) + 1)


def test_the_optimizer_and_the_model_share_boxes_in_one_call():
    import optax

    m = Net()
    opt = nn.Optimizer(m, optax.sgd(0.05))

    @nn.jit
    def step(m, opt, x):
        loss, grads = nn.value_and_grad(lambda m, x: (m(x) ** 2).sum())(m, x)
        opt.step(grads)
        return loss

    w = 2.0
    for _ in range(3):
        assert float(step(m, opt, X)) == pytest.approx(5 * w * w, rel=1e-5)
        w -= 0.05 * 2 * w * 5
        assert float(m.w) == pytest.approx(w, rel=1e-5)
    assert int(m.calls) == 3
    assert step.trace_count == 1


def test_the_optimizer_alone_finds_its_module():
    import optax

    m = Net()
    opt = nn.Optimizer(m, optax.sgd(0.1))
    nn.jit(lambda opt: opt.step({"w": jnp.asarray(1.0)}))(opt)
    assert float(m.w) == pytest.approx(1.9)
