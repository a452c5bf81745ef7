"""nn.while_loop, nn.fori_loop, nn.map and nn.associative_scan, against Python loops and jax.lax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from tests.quick import diagonal

X = jnp.asarray([[0.3, -0.2], [0.1, 0.8], [-0.5, 0.4]])


class Counter(nn.Module):
    """A parameter that is read, and buffers that a forward writes."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray([[0.5, -0.3], [0.2, 0.9]]))
        self.register_buffer("n", jnp.zeros((), jnp.int32))
        self.register_buffer("mean", jnp.zeros(2))

    def forward(self, x):
        self.n = self.n + 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return jnp.tanh(x @ self.w.value) + self.mean

    def step(self, x):
        return self(x)

    def unfinished(self, x):
        return self.n < 3


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Counter()
        self.b = self.a
        self.w = self.a.w

    def forward(self, x):
        self.w.value = self.w * 0.9
        return self.b(self.a(x))


def by_while(m, x, n):
    def body(val):
        i, m, x = val
        return i + 1, m, m(x)

    return nn.while_loop(lambda val: val[0] < n, body, (0, m, x))[1:]


def by_fori(m, x, n):
    return nn.fori_loop(0, n, lambda i, val: (val[0], val[0](val[1])), (m, x))


def by_traced_fori(m, x, n):
    upper = jnp.asarray(n, jnp.int32)
    return nn.fori_loop(jnp.int32(0), upper, lambda i, val: (val[0], val[0](val[1])), (m, x))


def by_scan(m, x, n):
    return nn.scan(lambda val, _: ((val[0], val[0](val[1])), None), (m, x), length=n)[0]


LOOPS = {"while": by_while, "fori": by_fori, "fori, traced": by_traced_fori, "scan": by_scan}
MODULES = {
    "buffers": Counter,
    "ties": Tied,
    "BatchNorm": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
}


def twins(make):
    m, n = make(), make()
    n.load_state_dict(m.state_dict())
    return m, n


def repeated(m, x, n):
    for _ in range(n):
        x = m(x)
    return x


def assert_same_state(m, n):
    for name, value in n.state_dict().items():
        got = m.state_dict()[name]
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "loop, make, how", diagonal(2, list(LOOPS), list(MODULES), ["eager", "nn.jit"])
)
def test_a_loop_with_a_module_in_the_carry_is_the_loop_in_python(loop, make, how):
    m, n = twins(MODULES[make])
    f = lambda m, x: LOOPS[loop](m, x, 3)
    again, out = (f if how == "eager" else nn.jit(f))(m, X)
    assert again is m
    np.testing.assert_allclose(out, repeated(n, X, 3), rtol=1e-4, atol=1e-5)
    assert_same_state(m, n)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
def test_no_steps_change_nothing(loop, wrap):
    m = Counter()
    f = lambda m, x: loop(m, x, 0)
    again, out = (f if wrap is None else wrap(f))(m, X)
    assert again is m and int(m.n) == 0
    np.testing.assert_array_equal(out, X)
    np.testing.assert_array_equal(m.mean, np.zeros(2))


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_no_steps_without_compiled_code_change_nothing(loop):
    m = Counter()
    with jax.disable_jit():
        if loop is not by_scan and loop is not by_fori:  # JAX has no scan of length 0 there
            np.testing.assert_array_equal(loop(m, X, 0)[1], X)
        n = Counter()
        np.testing.assert_allclose(loop(m, X, 2)[1], repeated(n, X, 2), rtol=1e-5)
    assert int(m.n) == 2


@pytest.mark.parametrize("loop", [by_fori, by_scan], ids=["fori", "scan"])
@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
def test_the_gradient_through_a_loop_of_known_length_is_that_of_the_loop_in_python(loop, wrap):
    m, n = Counter(), Counter()
    f = nn.grad(lambda m, x: (loop(m, x, 3)[1] ** 2).sum())
    got = (f if wrap is None else wrap(f))(m, X)

    def plain(w):
        x, mean = X, jnp.zeros(2)
        for _ in range(3):
            mean = 0.9 * mean + 0.1 * x.mean(0)
            x = jnp.tanh(x @ w) + mean
        return (x**2).sum()

    np.testing.assert_allclose(got["w"], jax.grad(plain)(n.w.value), rtol=1e-4)
    assert int(m.n) == 3


class Looped(nn.Module):
    """A module whose forward is a loop over calls of another."""

    def __init__(self, loop, core=None, steps=2):
        super().__init__()
        self.core, self.loop, self.steps = core or Counter(), loop, steps

    def forward(self, x):
        return self.loop(self.core, x, self.steps)[1]


def test_forward_mode_passes_a_while_loop_and_reverse_mode_says_why_not():
    m = Looped(by_while)
    fn, params, state = nn.functionalize(m, mutable=True)
    f = lambda w: fn({"core.w": w}, state, X)[0]
    w, t, eps = params["core.w"], jnp.ones((2, 2)), 1e-2
    _, got = jax.jvp(f, (w,), (t,))
    numeric = (f(w + eps * t) - f(w - eps * t)) / (2 * eps)
    np.testing.assert_allclose(got, numeric, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        nn.grad(lambda m: m(X).sum())(m)
    assert int(m.core.n) == 0


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_lanes_of_nn_vmap_loop_on_their_own(loop):
    pairs = [twins(Counter) for _ in range(3)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *(m for m, _ in pairs))
    xs = jnp.stack([X, X + 1, X * 2])
    out = nn.vmap(lambda m, x: loop(m, x, 2)[1])(stacked, xs)
    for i, (_, n) in enumerate(pairs):
        np.testing.assert_allclose(out[i], repeated(n, xs[i], 2), rtol=1e-5)
        assert_same_state(jax.tree.map(lambda v, i=i: v[i], stacked), n)


def test_lanes_may_take_different_numbers_of_steps():
    stacked = jax.tree.map(lambda *v: jnp.stack(v), Counter(), Counter(), Counter())
    steps = jnp.asarray([0, 3, 1], jnp.int32)
    by_n = lambda m, n: nn.fori_loop(0, n, lambda i, m: (m(X), m)[1], m).n
    np.testing.assert_array_equal(nn.vmap(by_n)(stacked, steps), steps)
    np.testing.assert_array_equal(stacked.n, steps)


def test_lanes_that_share_a_module_must_agree():
    m = Counter()
    with pytest.raises(nn.StateWriteError, match="mean"):
        nn.vmap(lambda m, x: by_while(m, x, 2)[1], in_axes=(None, 0))(m, jnp.stack([X, X + 1]))
    assert int(m.n) == 0


@pytest.mark.parametrize("outer, inner", diagonal(3, list(LOOPS), list(LOOPS)))
def test_loops_nest_and_compile_once(outer, inner):
    m, n = Looped(LOOPS[inner]), Counter()
    f = nn.jit(lambda m, x: LOOPS[outer](m, x, 3)[1])
    for _ in range(2):
        np.testing.assert_allclose(f(m, X), repeated(n, X, 6), rtol=1e-4, atol=1e-5)
    assert_same_state(m.core, n)
    assert f.trace_count == 1


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_state_may_be_donated(loop):
    m, n = twins(Counter)
    f = nn.jit(lambda m, x: loop(m, x, 2)[1], donate=0)
    for _ in range(2):
        np.testing.assert_allclose(f(m, X), repeated(n, X, 2), rtol=1e-5)
    assert_same_state(m, n)
    assert f.trace_count == 1


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_dropout_differs_from_step_to_step_and_the_generator_goes_on(loop):
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.register_buffer("masks", jnp.zeros((4, 64)))

        def forward(self, i):
            self.masks = self.masks.at[i].set(self.drop(jnp.ones(64)))
            return i + 1

    m = Masks()
    f = nn.jit(lambda m, i: loop(m, i, 2)[1])
    f(m, jnp.asarray(0))
    f(m, jnp.asarray(2))
    assert len({row.tobytes() for row in np.asarray(m.masks)}) == 4
    nn.manual_seed(0)
    eager = Masks()
    for i in range(4):
        eager(i)
    np.testing.assert_array_equal(m.masks, eager.masks)  # seeded alike, by the tests' settings
    assert f.trace_count == 1


def test_a_fori_loop_passes_the_index_and_goes_between_its_bounds():
    m = Counter()
    step = lambda i, val: (val[0], val[1].at[i].set(i))
    for lower, upper in [(2, 5), (jnp.int32(2), jnp.int32(5)), (np.int32(2), 5)]:
        _, seen = nn.fori_loop(lower, upper, step, (m, jnp.zeros(6, jnp.int32)))
        expected = jax.lax.fori_loop(2, 5, lambda i, a: a.at[i].set(i), jnp.zeros(6, jnp.int32))
        np.testing.assert_array_equal(seen, expected)
    _, seen = nn.fori_loop(0, 6, step, (m, jnp.zeros(6, jnp.int32)), unroll=2)
    np.testing.assert_array_equal(seen, np.arange(6))


def test_the_condition_of_a_while_loop_sees_what_the_body_wrote():
    m = Counter()
    again, x = nn.while_loop(lambda val: val[0].n < 4, lambda val: (val[0], val[0](val[1])), (m, X))
    assert again is m and int(m.n) == 4
    np.testing.assert_allclose(x, repeated(Counter(), X, 4), rtol=1e-5)


@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
def test_methods_of_one_module_are_a_loop(wrap):
    m = Counter()
    f = lambda m, x: nn.while_loop(m.unfinished, m.step, x)
    out = (f if wrap is None else wrap(f))(m, X)
    np.testing.assert_allclose(out, repeated(Counter(), X, 3), rtol=1e-5)
    assert int(m.n) == 3


@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
def test_a_condition_that_writes_is_refused_by_name(wrap):
    m = Counter()

    def writes(val):
        val[0].n = val[0].n + 1
        return val[0].n < 3

    f = lambda m: nn.while_loop(writes, lambda val: val, (m, X))
    with pytest.raises(nn.StateWriteError, match=r"\.n' \(Buffer\)[\s\S]*write in the body"):
        (f if wrap is None else wrap(f))(m)
    assert int(m.n) == 0


def test_a_condition_that_draws_or_flips_a_flag_is_refused():
    m = Counter()
    with pytest.raises(nn.MissingRngError):
        nn.while_loop(lambda m: jax.random.uniform(nn.next_key()) < 0.5, lambda m: m, m)
    with pytest.raises(nn.StateWriteError, match="training"):
        nn.while_loop(lambda m: m.eval().n < 1, lambda m: m, m)
    assert m.training


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_step_that_changes_structure_raises_and_leaves_the_module(loop):
    class Bad(Counter):
        def forward(self, x):
            self.note = 1
            return x

    m = Bad()
    with pytest.raises(nn.StructureChangeError, match="note"):
        loop(m, X, 2)
    assert not hasattr(m, "note")


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_step_that_changes_a_dtype_is_refused_by_name(loop):
    class Bad(Counter):
        def forward(self, x):
            self.n = self.n.astype(jnp.float32)
            return x

    m = Bad()
    with pytest.raises(nn.StructureChangeError, match=r"\.n' float32\[\]; it was int32\[\]"):
        loop(m, X, 2)
    assert m.n.dtype == jnp.int32


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_write_to_a_module_from_outside_raises(loop):
    outside = Counter()

    class Calls(nn.Module):
        def forward(self, x):
            return outside(x)

    with pytest.raises(nn.TraceLeakError, match="'n' "):
        loop(Calls(), X, 2)
    assert int(outside.n) == 0


def test_a_step_that_returns_other_modules_is_refused():
    other = Counter()
    for run in (
        lambda m: nn.fori_loop(0, 2, lambda i, m: other, m),
        lambda m: nn.while_loop(lambda m: m.n < 2, lambda m: other, m),
        lambda m: nn.fori_loop(0, 2, lambda i, m: (m, m), m),
    ):
        with pytest.raises(nn.StructureChangeError, match="return the same modules"):
            run(Counter())


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_under_a_raw_jax_jit_a_module_is_read_and_a_write_raises(loop):
    linear = nn.Linear(2, 2)
    got = jax.jit(lambda m, x: loop(m, x, 2)[1])(linear, X)
    np.testing.assert_allclose(got, repeated(linear, X, 2), rtol=1e-5, atol=1e-6)
    with pytest.raises(nn.StateWriteError, match="'n' |mean"):
        jax.jit(lambda m, x: loop(m, x, 2)[1])(Counter(), X)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_pure_call_around_a_loop_returns_its_state(loop):
    m, n = Looped(loop), Counter()
    fn, params, state = nn.functionalize(m, mutable=True)
    out, new = jax.jit(fn)(params, state, X)
    np.testing.assert_allclose(out, repeated(n, X, 2), rtol=1e-5)
    np.testing.assert_allclose(new["core.mean"], n.mean, rtol=1e-5)
    assert int(m.core.n) == 0


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_two_modules_that_share_a_submodule_in_one_carry(loop):
    class User(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, x):
            return self.shared(x)

    class Both(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.a, self.b = nn.Ref(a), nn.Ref(b)

        def forward(self, x):
            return self.b(self.a(x))

    shared, n = Counter(), Counter()
    loop(Both(User(shared), User(shared)), X, 2)
    repeated(n, X, 4)
    assert_same_state(shared, n)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_model_and_its_optimizer_train_in_a_loop(loop):
    class Train(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 1)
            self.optimizer = nn.Optimizer(self.model, optax.adam(1e-2))

        def forward(self, x):
            self.optimizer.step(nn.grad(lambda m: (m(x) ** 2).mean())(self.model))
            return x

    m = Train()
    params = {name: p.value for name, p in m.model.named_parameters()}
    nn.jit(lambda m: loop(m, X, 5)[1])(m)

    tx = optax.adam(1e-2)
    state = tx.init(params)
    loss = lambda p: ((X @ p["weight"].T + p["bias"]) ** 2).mean()
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        for _ in range(5):
            updates, state = tx.update(jax.grad(loss)(params), state)
            params = optax.apply_updates(params, updates)
    for name, p in m.model.named_parameters():
        np.testing.assert_allclose(p, params[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loop", [by_fori, by_scan], ids=["fori", "scan"])
def test_a_backward_hook_acts_at_every_step(loop):
    m, x = nn.Linear(2, 2), X
    m.register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))
    got = nn.grad(lambda x: loop(m, x, 3)[1].sum())(x)
    w = np.asarray(m.weight)
    expected = np.ones((3, 2)) @ w @ w @ w * 8  # each of three steps doubles what it hands back
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_jax_s_own_leak_checker_finds_nothing():
    with jax.checking_leaks():
        m = Counter()
        for loop in LOOPS.values():
            nn.jit(lambda m, x, loop=loop: loop(m, x, 2)[1])(m, X)
            loop(m, X, 1)
        nn.map(m, XS)
        nn.cond(True, m, m.step, X)
        nn.associative_scan(Affine(), (X, X))
    assert int(m.n) == 3 * len(LOOPS) + len(XS) + 1


# --------------------------------------------------------------------------------------------------
# nn.map

XS = jnp.arange(42.0).reshape(7, 3, 2) / 10


class Calls(nn.Module):
    """Counts its calls; combines two arguments."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", jnp.zeros((), jnp.int32))

    def forward(self, a, b=0.0):
        self.calls = self.calls + 1
        return a + b


@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
def test_a_map_of_a_module_is_the_loop_over_calls(wrap):
    for attribute in ("forward", None):
        m, n = Counter(), Counter()
        f = lambda m, xs, a=attribute: nn.map(m if a is None else getattr(m, a), xs)
        got = (f if wrap is None else wrap(f))(m, XS)
        np.testing.assert_allclose(got, jnp.stack([n(x) for x in XS]), rtol=1e-5)
        assert_same_state(m, n)


@pytest.mark.parametrize("batch_size", [None, 0, 1, 2, 3, 7, 9])
def test_a_map_is_that_of_jax_for_any_size_of_batch(batch_size):
    m = nn.Linear(2, 4)
    got = nn.jit(lambda m, xs: nn.map(m, xs, batch_size=batch_size))(m, XS)
    plain = lambda x: x @ m.weight.T + m.bias.value
    expected = jax.lax.map(plain, XS, batch_size=batch_size)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    tree = nn.map(lambda x: {"a": x.sum(), "b": (x, None)}, XS, batch_size=batch_size)
    np.testing.assert_allclose(tree["a"], XS.sum((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(tree["b"][0], XS)


@pytest.mark.parametrize("batch_size", [None, 2, 7])
@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
def test_a_map_over_stacked_modules_writes_into_the_stack(batch_size, wrap):
    modules = [Counter() for _ in range(5)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *modules)
    f = lambda ms, xs: nn.map(lambda by: (by[0], by[0](by[1])), (ms, xs), batch_size=batch_size)
    again, got = (f if wrap is None else wrap(f))(stacked, XS[:5])
    assert again is stacked
    expected = [m(x) for m, x in zip(modules, XS[:5], strict=True)]
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-5)
    for i, m in enumerate(modules):
        assert_same_state(jax.tree.map(lambda v, i=i: v[i], stacked), m)


@pytest.mark.parametrize("batch_size", [None, 0, 2])
def test_a_map_over_nothing_gives_nothing(batch_size):
    m = Calls()
    got = nn.map(m, XS[:0], batch_size=batch_size)
    assert got.shape == (0, 3, 2) and int(m.calls) == 0


def test_a_batch_writes_what_its_calls_agree_on_and_refuses_the_rest():
    calls = Calls()
    nn.map(calls, XS, batch_size=2)
    assert int(calls.calls) == 4  # three whole ones and a rest
    m = Counter()
    with pytest.raises(nn.StateWriteError, match="mean"):
        nn.map(m, XS, batch_size=2)
    assert int(m.n) == 0


@pytest.mark.parametrize("batch_size", [None, 2, 7])
def test_each_call_of_a_map_has_its_own_dropout(batch_size):
    drop = nn.Dropout(0.5)
    f = nn.jit(lambda m, xs: nn.map(m, xs, batch_size=batch_size))
    masks = [*np.asarray(f(drop, jnp.ones((7, 64)))), *np.asarray(f(drop, jnp.ones((7, 64))))]
    assert len({row.tobytes() for row in masks}) == 14
    assert f.trace_count == 1


@pytest.mark.parametrize("batch_size", [None, 2])
def test_keys_are_mapped_over_as_other_arrays(batch_size):
    keys = jax.random.split(jax.random.key(0), 5)
    got = nn.map(lambda key: jax.random.uniform(key), keys, batch_size=batch_size)
    np.testing.assert_array_equal(got, [jax.random.uniform(key) for key in keys])


def test_the_gradient_through_a_map_is_the_sum_over_its_calls():
    m = nn.Linear(2, 1)
    for batch_size in (None, 3):
        f = lambda m, b=batch_size: (nn.map(m, XS, batch_size=b) ** 2).sum()
        got = nn.grad(f)(m)
        plain = lambda w, b: ((XS @ w.T + b) ** 2).sum()
        expected = jax.grad(plain, argnums=(0, 1))(m.weight.value, m.bias.value)
        np.testing.assert_allclose(got["weight"], expected[0], rtol=1e-4)
        np.testing.assert_allclose(got["bias"], expected[1], rtol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_map_refuses_a_write_from_outside_and_a_change_of_structure(batch_size):
    m = Counter()
    with pytest.raises(nn.TraceLeakError, match="'n' "):
        nn.map(lambda x: m(x), XS, batch_size=batch_size)
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), m)
    with pytest.raises(nn.StructureChangeError, match="training"):
        nn.map(lambda m: m.eval().n, stacked, batch_size=batch_size)
    assert int(m.n) == 0 and stacked.training


def test_python_s_own_map_is_not_shadowed():
    names: dict = {}
    exec("from statefulnn import *", names)
    assert "map" not in names and "scan" in names
    assert "map" in dir(nn) and callable(nn.map)


# --------------------------------------------------------------------------------------------------
# nn.associative_scan


class Affine(nn.Module):
    """Combines (a, b) and (c, d) as the maps x -> a x + b and x -> c x + d, times a factor."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(jnp.asarray(0.9))

    def forward(self, first, second):
        a, b = first
        c, d = second
        return a * c, (c * b + d) * self.factor / self.factor


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
def test_an_associative_scan_is_that_of_jax(reverse, axis, wrap):
    elems = (XS[..., 0] / 5, XS[..., 1])
    m = Affine()
    plain = lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1])
    expected = jax.lax.associative_scan(plain, elems, reverse, axis)
    as_module = lambda m, e: nn.associative_scan(m, e, reverse, axis)
    as_closure = lambda m, e: nn.associative_scan(lambda p, q: m(p, q), e, reverse, axis)
    for f in (as_module, as_closure):
        got = (f if wrap is None else wrap(f))(m, elems)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_gradient_passes_an_associative_scan():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(jnp.asarray(0.5))

        def forward(self, a, b):
            return self.k * a * b

    xs = jnp.asarray([1.0, 2.0, 3.0])
    m = Scaled()
    got = nn.grad(lambda m: nn.associative_scan(m, xs)[-1])(m)["k"]
    np.testing.assert_allclose(got, 2 * 0.5 * 6.0, rtol=1e-6)  # of k**2 * 1 * 2 * 3
    in_lanes = nn.vmap(lambda m, x: nn.associative_scan(m, x), in_axes=(None, 0))
    np.testing.assert_allclose(in_lanes(m, jnp.stack([xs, xs]))[1], [1.0, 1.0, 1.5], rtol=1e-6)


@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
@pytest.mark.parametrize("as_closure", [False, True], ids=["module", "closure"])
def test_a_write_in_an_associative_scan_is_refused_by_name(wrap, as_closure):
    m = Calls()

    def f(m, xs):
        return nn.associative_scan((lambda a, b: m(a, b)) if as_closure else m, xs)

    with pytest.raises(nn.StateWriteError, match=r"calls' \(Buffer\)[\s\S]*order"):
        (f if wrap is None else wrap(f))(m, jnp.ones(5))
    assert int(m.calls) == 0


def test_a_draw_in_an_associative_scan_is_refused():
    drop = nn.Dropout(0.5)
    for fn in (lambda a, b: drop(a + b), lambda a, b: a + jax.random.uniform(nn.next_key())):
        with pytest.raises(nn.MissingRngError):
            nn.associative_scan(fn, jnp.ones(5))


@pytest.mark.parametrize("change", ["dtype", "shape"])
@pytest.mark.parametrize("loop", ["scan", "while_loop", "fori_loop"])
def test_an_array_of_the_carry_that_changes_is_refused_by_its_path(loop, change):
    layer = nn.Linear(2, 2)
    new = (lambda v: v.astype(jnp.float16)) if change == "dtype" else (lambda v: v[None])
    step = lambda c: (c[0], {"h": new(c[1]["h"])})
    init = (layer, {"h": jnp.zeros(3)})
    with pytest.raises(nn.StructureChangeError, match=r"carry\[1\]\['h'\]"):
        if loop == "scan":
            nn.scan(lambda c, x: (step(c), None), init, jnp.ones(2))
        elif loop == "while_loop":
            nn.while_loop(lambda c: c[1]["h"].sum() > 0, step, init)
        else:
            nn.fori_loop(0, 2, lambda i, c: step(c), init)


def test_a_python_number_in_the_carry_takes_the_dtype_of_what_comes_back():
    layer = nn.Linear(2, 2)
    (_, total), _ = nn.scan(lambda c, x: ((c[0], c[1] + x), None), (layer, 0), jnp.ones(3))
    assert total == 3.0 and total.dtype == jnp.float32


@pytest.mark.parametrize("size", [-1, 1.5, "2"])
def test_a_batch_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="batch_size"):
        nn.map(nn.Linear(2, 2), jnp.ones((4, 2)), batch_size=size)
