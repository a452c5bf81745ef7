"""Corners where state meets Python: hooks, closures, copies, interrupts, debug modes."""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Net(nn.Module):
    def __init__(self, w=2.0):
        super().__init__()
        self.w = nn.Parameter(jnp.full(2, w))
        self.register_buffer("calls", jnp.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.w


class ReadOnly(nn.Module):
    def __init__(self, w=2.0):
        super().__init__()
        self.w = nn.Parameter(jnp.full(2, w))

    def forward(self, x):
        return x * self.w


X = jnp.ones(2)


def test_casting_under_nn_jit_is_written_back():
    m = Net()
    nn.jit(lambda m: m.half() and None)(m)
    assert m.w.dtype == jnp.float16
    np.testing.assert_array_equal(np.asarray(m.w), [2.0, 2.0])


def test_load_state_dict_under_nn_jit_is_written_back():
    m = Net()
    box = m.w
    nn.jit(lambda m, sd: m.load_state_dict(sd) and None)(
        m, {"w": jnp.full(2, 7.0), "calls": jnp.asarray(3.0)}
    )
    assert m.w is box
    np.testing.assert_array_equal(np.asarray(m.w), [7.0, 7.0])
    assert float(m.calls) == 3.0


def test_a_state_dict_comes_out_of_nn_jit():
    m = Net()
    state = nn.jit(lambda m: m.state_dict())(m)
    assert list(state) == ["w", "calls"]
    Net(0.0).load_state_dict(state)


def test_a_box_as_an_argument_is_written_back_and_comes_out_as_itself():
    p = nn.Parameter(jnp.ones(2))

    def f(p):
        p.value = p * 2
        return p

    assert nn.jit(f)(p) is p
    np.testing.assert_array_equal(np.asarray(p), [2.0, 2.0])


def test_a_module_and_its_own_box_are_one_box_inside():
    m = Net()

    def f(m, p):
        p.value = p * 2
        return m.w.value

    np.testing.assert_array_equal(np.asarray(nn.jit(f)(m, m.w)), [4.0, 4.0])


def test_a_generator_as_an_argument_advances():
    g = nn.Generator(0)
    expected = nn.Generator(0)
    key = nn.jit(lambda g: jax.random.key_data(g.next_key()))(g)
    np.testing.assert_array_equal(np.asarray(key), jax.random.key_data(expected.next_key()))
    np.testing.assert_array_equal(np.asarray(g.get_state()), np.asarray(expected.get_state()))


def test_a_module_in_a_registered_dataclass_is_found():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Train:
        model: object
        x: object

    m = Net()
    nn.jit(lambda t: t.model(t.x))(Train(m, X))
    assert float(m.calls) == 1


def test_a_module_as_a_static_argument_is_refused():
    with pytest.raises(nn.StatefulnnError):
        nn.jit(lambda m, x: m(x), static_argnums=0)(ReadOnly(), X)


@pytest.mark.parametrize(
    "wrap",
    [lambda f, m: functools.partial(f, m), lambda f, m: lambda x: f(m, x)],
    ids=["partial", "closure"],
)
def test_a_module_bound_into_the_compiled_function_warns_when_it_changes(wrap):
    m = ReadOnly()
    f = nn.jit(wrap(lambda m, x: m(x), m))
    f(X)
    with pytest.warns(nn.StaleCaptureWarning, match="w"):
        m.w.value = jnp.zeros(2)


def test_a_bound_method_kept_as_an_attribute_follows_the_clone():
    class Net(ReadOnly):
        def __init__(self):
            super().__init__()
            self.act = self.helper

        def helper(self, x):
            return x * self.w

        def forward(self, x):
            return self.act(x)

    m = Net()
    f = nn.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])
    m.w.value = m.w * 5
    np.testing.assert_array_equal(np.asarray(f(m, X)), [10.0, 10.0])
    assert copy.deepcopy(m).act.__self__ is not m
    np.testing.assert_array_equal(np.asarray(nn.grad(lambda m: m(X).sum())(m)["w"]), [1.0, 1.0])


def test_a_method_of_a_child_kept_as_an_attribute_follows_the_clone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ReadOnly()
            self.fn = self.inner.forward

        def forward(self, x):
            return self.fn(x)

    m = Outer()
    np.testing.assert_array_equal(
        np.asarray(nn.grad(lambda m: m(X).sum())(m)["inner.w"]), [1.0, 1.0]
    )


def test_a_method_of_a_module_that_is_nowhere_registered_raises():
    m = nn.Module()
    with pytest.raises(nn.RegistrationError):
        m.fn = ReadOnly().forward
        nn.split(m)


@pytest.mark.parametrize("kind", ["parameter", "module"])
def test_a_member_of_the_class_is_registered_or_refused(kind):
    with pytest.raises(nn.StatefulnnError):

        class Net(nn.Module):
            member = nn.Parameter(X) if kind == "parameter" else ReadOnly()

        nn.split(Net())


def test_a_plain_array_put_into_the_registry_is_a_buffer_or_refused_by_us():
    m = Net()
    try:
        m._buffers["calls"] = jnp.asarray(5.0)
        nn.split(m)
    except nn.StatefulnnError:
        return
    assert float(m.calls) == 5.0
    assert float(nn.merge(*nn.split(m)).calls) == 5.0


def test_a_traced_box_put_into_the_registry_of_an_outside_module_raises():
    m = Net()

    def f(x):
        m._buffers["calls"] = nn.Buffer(x.sum())
        return x

    with pytest.raises(nn.StatefulnnError):
        jax.jit(f)(X)
    assert not isinstance(m.calls, jax.core.Tracer)


class CachedProperty(ReadOnly):
    @functools.cached_property
    def table(self):
        return jnp.sin(self.w.value)

    def forward(self, x):
        return x * self.table


def test_a_cached_property_leaves_no_tracer_in_the_module_under_raw_jit():
    m = CachedProperty()
    try:
        jax.jit(m)(X)
    except nn.StatefulnnError:
        pass
    assert not isinstance(m.__dict__.get("table"), jax.core.Tracer)


def test_a_cached_property_is_of_the_clone_under_nn_jit():
    m = CachedProperty()
    f = nn.jit(lambda m, x: m(x))
    np.testing.assert_allclose(np.asarray(f(m, X)), np.sin([2.0, 2.0]), rtol=1e-6)
    m.w.value = m.w * 2
    np.testing.assert_allclose(np.asarray(f(m, X)), np.sin([4.0, 4.0]), rtol=1e-6)


def test_under_disable_jit_everything_still_writes_back():
    with jax.disable_jit():
        m = Net()
        nn.jit(lambda m, x: m(x))(m, X)
        grads = nn.jit(nn.grad(lambda m, x: m(x).sum()))(m, X)
    assert float(m.calls) == 2
    np.testing.assert_array_equal(np.asarray(grads["w"]), [1.0, 1.0])


def test_jax_s_own_leak_checker_finds_nothing():
    with jax.checking_leaks():
        m = Net()
        nn.jit(lambda m, x: m(x))(m, X)
        nn.jit(nn.grad(lambda m, x: m(x).sum()))(m, X)
        nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, jnp.ones((3, 2)))
        nn.remat(lambda m, x: m(x))(m, X)
        nn.functional_call(m, {"w": X}, (X,), mutable=True)
        jax.jit(lambda m: nn.mutable(m))(m)
        nn.scan(lambda m, x: (m, m(x)), m, jnp.ones((2, 2)))
    assert float(m.calls) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_in_the_middle_leaves_everything_usable(error):
    m = Net()

    def f(m, x):
        m(x)
        raise error

    with pytest.raises(error):
        nn.jit(f)(m, X)
    assert float(m.calls) == 0
    nn.jit(lambda m, x: m(x))(m, X)
    assert float(m.calls) == 1


def test_a_hook_that_registers_a_hook_inside_a_trace_raises_and_changes_nothing():
    m = Net()
    m.register_forward_hook(lambda mod, a, o: mod.register_forward_hook(lambda *a: None) and None)
    with pytest.raises(nn.StatefulnnError):
        nn.jit(lambda m, x: m(x))(m, X)
    assert len(m._forward_hooks) == 1


def test_a_hook_that_writes_another_module_raises():
    m, other = ReadOnly(), Net()
    m.register_forward_hook(lambda mod, a, o: other(o))
    with pytest.raises(nn.StatefulnnError, match="calls"):
        nn.jit(lambda m, x: m(x))(m, X)
    assert float(other.calls) == 0


def test_a_hook_may_change_a_buffer_of_its_own_module():
    m = Net()

    def count(module, args, out):
        module.calls = module.calls + 10

    m.register_forward_hook(count)
    nn.jit(lambda m, x: m(x))(m, X)
    assert float(m.calls) == 11


def test_hooks_run_at_trace_time_only_under_jit():
    calls = []
    m = ReadOnly()
    m.register_forward_hook(lambda mod, a, o: calls.append(1))
    f = nn.jit(lambda m, x: m(x))
    for _ in range(3):
        f(m, X)
    assert len(calls) == 1


def test_writes_to_an_outside_module_s_structure_under_a_staged_trace_raise():
    m = Net()
    changes = [
        lambda: m.eval(),
        lambda: m.requires_grad_(False),
        lambda: setattr(m, "p", nn.Parameter(np.ones(2, np.float32))),
        lambda: m.register_forward_hook(lambda *a: None),
        lambda: m.register_buffer("b", np.ones(2, np.float32)),
        lambda: m.add_module("child", nn.Module()),
    ]
    before = nn.split(m)[0]
    for change in changes:
        with pytest.raises(nn.TraceLeakError):
            jax.jit(lambda x, change=change: (change(), x)[1])(X)
        assert nn.split(m)[0] is before


@pytest.mark.parametrize("aux", ["module", "box", "nest"])
def test_modules_in_the_auxiliary_output_are_the_caller_s_own(aux):
    m = Net()
    pick = {"module": lambda m: m, "box": lambda m: m.w, "nest": lambda m: {"a": (m, 1)}}[aux]
    grads, out = nn.grad(lambda m: (m(X).sum(), pick(m)), has_aux=True)(m)
    np.testing.assert_array_equal(np.asarray(grads["w"]), [1.0, 1.0])
    expected = pick(m)
    if aux == "nest":
        assert out["a"][0] is m
        assert int(out["a"][1]) == 1
    else:
        assert out is expected


@pytest.mark.parametrize("transform", ["nn.jit", "nn.remat", "nn.vmap"])
def test_modules_in_the_output_are_the_caller_s_own(transform):
    m = Net()

    def f(m, x):
        return m(x), m

    if transform == "nn.vmap":
        _, out = nn.vmap(f, in_axes=(None, 0))(m, jnp.ones((3, 2)))
    else:
        _, out = getattr(nn, transform.removeprefix("nn."))(f)(m, X)
    assert out is m
    assert float(m.calls) == 1


N = 4096  # large and aligned: where jax would rather share numpy's memory than copy it


@pytest.mark.parametrize(
    "take",
    [
        lambda m, a: setattr(m, "w", nn.Parameter(a)),
        lambda m, a: setattr(m.w, "value", a),
        lambda m, a: m.register_buffer("w2", a),
        lambda m, a: setattr(m, "b", a),
        lambda m, a: m.load_state_dict({"w": a, "b": a}),
        lambda m, a: m.load_state_dict({"w": a, "b": a}, assign=True),
    ],
    ids=["Parameter", "value", "register_buffer", "buffer", "load_state_dict", "assign"],
)
def test_numpy_memory_is_never_shared(take):
    m = nn.Module()
    m.w = nn.Parameter(jnp.ones(N))
    m.b = nn.Buffer(jnp.ones(N))
    array = np.zeros(N, np.float32)
    take(m, array)
    array[:] = 5.0
    assert not any(bool((v == 5.0).any()) for v in m.state_dict().values())


def test_parameters_that_start_as_one_array_can_be_donated():
    zero = jnp.zeros(2)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(zero), nn.Parameter(zero)

    m = Pair()

    def step(m):
        m.a.value = m.a + 1
        m.b.value = m.b + 2

    f = nn.jit(step, donate=0)
    f(m)
    f(m)
    np.testing.assert_array_equal(np.asarray(m.a), [2.0, 2.0])
    np.testing.assert_array_equal(np.asarray(m.b), [4.0, 4.0])


def test_two_boxes_that_get_one_array_inside_stay_two():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(jnp.zeros(2)), nn.Parameter(jnp.ones(2))

    m = Pair()
    f = nn.jit(lambda m: setattr(m.a, "value", m.b.value), donate=0)
    for _ in range(3):
        f(m)
    m.a.value = jnp.full(2, 5.0)
    np.testing.assert_array_equal(np.asarray(m.b), [1.0, 1.0])


def test_a_typed_key_may_be_a_buffer():
    m = nn.Module()
    m.register_buffer("key", jax.random.key(0))

    def f(m):
        m.key, k = jax.random.split(m.key)
        return jax.random.uniform(k)

    g = nn.jit(f)
    a, b = g(m), g(m)
    first, k1 = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(a), np.asarray(jax.random.uniform(k1)))
    assert float(a) != float(b)
    copy.deepcopy(m)


def test_a_write_inside_lax_cond_raises_where_it_would_be_lost():
    class Branch(Net):
        def forward(self, x):
            def write(x):
                self.calls = self.calls + 1
                return x * self.w

            return jax.lax.cond(x.sum() > 0, write, lambda x: x, x)

    m = Branch()
    for call in (m, nn.jit(m)):
        with pytest.raises(nn.TraceLeakError, match="calls"):
            call(X)
    assert float(m.calls) == 0


def test_a_target_network_made_inside_a_trace():
    def f(m):
        target = nn.mutable(m)
        target.w.value = target.w * 2
        return target

    m = Net()
    target = nn.jit(f)(m)
    assert target is not m
    np.testing.assert_array_equal(np.asarray(target.w), [4.0, 4.0])
    np.testing.assert_array_equal(np.asarray(m.w), [2.0, 2.0])


def test_layers_stacked_by_vmap_run_in_a_raw_scan():
    layers = nn.vmap(ReadOnly, axis_size=3)()
    out, _ = jax.lax.scan(lambda h, layer: (layer(h), None), X, layers)
    np.testing.assert_array_equal(np.asarray(out), [8.0, 8.0])


def test_layers_as_inputs_of_nn_scan_may_be_read_and_not_written():
    layers = nn.vmap(ReadOnly, axis_size=3)()
    out, _ = nn.scan(lambda h, layer: (layer(h), None), X, layers)
    np.testing.assert_array_equal(np.asarray(out), [8.0, 8.0])
    writing = nn.vmap(Net, axis_size=3)()
    try:
        nn.scan(lambda h, layer: (layer(h), None), X, writing)
    except nn.StateWriteError:
        np.testing.assert_array_equal(np.asarray(writing.calls), [0.0, 0.0, 0.0])
    else:
        np.testing.assert_array_equal(np.asarray(writing.calls), [1.0, 1.0, 1.0])


def test_a_vmapped_pure_function_keeps_a_state_for_each_lane():
    fn, params, state = nn.functionalize(Net(), mutable=True)
    states = jax.tree.map(lambda a: jnp.stack([a, a + 1]), state)
    _, new = jax.vmap(lambda s, x: fn(params, s, x))(states, jnp.ones((2, 2)))
    np.testing.assert_array_equal(np.asarray(new["calls"]), [1.0, 2.0])
