"""Law 5: no tracer escapes into a box or an attribute that its trace does not own."""

from __future__ import annotations

import threading
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray(2.0))
        self.register_buffer("last", jnp.zeros(()))

    def forward(self, x):
        self.last = jnp.sum(x * self.w)  # the line that writes
        return x * self.w


def check_clean(m):
    for name, box in [*m._parameters.items(), *m._buffers.items()]:
        assert not isinstance(box.value, jax.core.Tracer), name
    for name, value in vars(m).items():
        assert not isinstance(value, jax.core.Tracer), name
    assert float(m.w) == 2.0
    assert float(m.last) == 0.0


X = jnp.asarray([1.0, 2.0])

TRACED = {
    "jax.jit": lambda f: jax.jit(f)(X),
    "jax.grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "jax.value_and_grad": lambda f: jax.value_and_grad(lambda x: f(x).sum())(X),
    "jax.vmap": lambda f: jax.vmap(f)(X),
    "jax.jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jax.vjp": lambda f: jax.vjp(f, X),
    "jax.checkpoint": lambda f: jax.checkpoint(f)(X),
    "lax.scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, X),
    "lax.map": lambda f: jax.lax.map(f, X),
    "lax.cond": lambda f: jax.lax.cond(True, f, f, X),
    "lax.while_loop": lambda f: jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, f(c[1])), (0, X)
    ),
    "lax.fori_loop": lambda f: jax.lax.fori_loop(0, 2, lambda i, c: f(c), X),
    "jax.hessian": lambda f: jax.hessian(lambda x: f(x).sum())(X),
    "jax.eval_shape": lambda f: jax.eval_shape(f, X),
    "nn.jit": lambda f: nn.jit(lambda x: f(x))(X),
    "nn.remat": lambda f: nn.remat(lambda x: f(x))(X),
    "nn.vmap": lambda f: nn.vmap(lambda x: f(x))(X),
    "nn.jit inside jax.jit": lambda f: jax.jit(lambda x: nn.jit(f)(x))(X),
    "jit inside nn.jit": lambda f: nn.jit(lambda x: jax.jit(f)(x))(X),
}


@pytest.mark.parametrize("how", TRACED)
def test_a_traced_write_to_a_module_captured_by_closure_raises(how):
    m = Net()
    with pytest.raises(nn.TraceLeakError, match="last"):
        TRACED[how](m)
    check_clean(m)


@pytest.mark.parametrize("how", ["jax.jit", "jax.grad", "jax.vmap", "lax.scan"])
def test_a_traced_write_to_a_parameter_captured_by_closure_raises(how):
    m = Net()

    def f(x):
        m.w.value = x.sum()
        return x

    with pytest.raises(nn.TraceLeakError, match="w"):
        TRACED[how](f)
    check_clean(m)


def test_the_error_points_at_the_line_that_writes():
    m = Net()
    with pytest.raises(nn.TraceLeakError) as info:
        jax.jit(m)(X)
    lines = [f.line for f in traceback.extract_tb(info.value.__traceback__)]
    assert any("the line that writes" in (line or "") for line in lines)


@pytest.mark.parametrize("how", ["jax.jit", "jax.grad", "jax.vmap", "lax.scan", "nn.jit"])
def test_a_tracer_put_into_a_plain_attribute_raises_at_that_line(how):
    m = Net()

    def f(x):
        m.debug = x * 2
        return x

    with pytest.raises(nn.TraceLeakError, match="debug"):
        TRACED[how](f)
    check_clean(m)
    assert not hasattr(m, "debug")


@pytest.mark.parametrize(
    "wrap",
    [lambda x: [x], lambda x: {"a": (x,)}, lambda x: (1, [x])],
    ids=["list", "dict", "tuple"],
)
def test_a_tracer_inside_a_container_put_into_an_attribute_raises(wrap):
    m = Net()

    def f(x):
        m.debug = wrap(x)
        return x

    with pytest.raises(nn.TraceLeakError, match="debug"):
        jax.jit(f)(X)
    assert not hasattr(m, "debug")


def test_a_tracer_registered_as_a_new_buffer_or_parameter_of_an_outside_module_raises():
    m = Net()

    def buffer(x):
        m.register_buffer("fresh", x)
        return x

    def parameter(x):
        m.fresh = nn.Parameter(x)
        return x

    for f in (buffer, parameter):
        with pytest.raises(nn.StatefulnnError, match="fresh"):
            jax.jit(f)(X)
        assert not hasattr(m, "fresh")
    check_clean(m)


@pytest.mark.parametrize("how", ["jax.jit", "lax.scan", "lax.cond", "jax.checkpoint", "nn.jit"])
def test_a_concrete_write_to_an_outside_box_under_a_staged_trace_raises(how):
    m = Net()

    def f(x):
        m.last = np.asarray(5.0, np.float32)
        return x

    with pytest.raises(nn.TraceLeakError, match="last"):
        TRACED[how](f)
    check_clean(m)


def test_a_concrete_write_under_an_autodiff_trace_happens():
    m = Net()

    def f(x):
        m.last = np.asarray(5.0, np.float32)
        return x.sum()

    jax.grad(f)(X)
    assert float(m.last) == 5.0


def test_a_module_argument_that_jax_grad_does_not_differentiate_is_the_users_own():
    m = Net()

    def f(x, m):
        return m(x).sum()

    with pytest.raises(nn.TraceLeakError, match="last"):
        jax.grad(f)(X, m)
    check_clean(m)


@pytest.mark.parametrize("wrap", [nn.jit, nn.grad, nn.value_and_grad, nn.remat])
def test_no_tracer_stays_when_a_stateful_transform_fails(wrap):
    m = Net()

    def f(m, x):
        m(x)
        m.w.value = m.w.value * x.sum()
        raise KeyError("later")

    with pytest.raises(KeyError):
        wrap(f)(m, X)
    check_clean(m)


def test_nn_jit_refuses_to_write_a_closure_module_while_its_argument_is_fine():
    inside, outside = Net(), Net()

    @nn.jit
    def f(m, x):
        m(x)
        return outside(x)

    with pytest.raises(nn.TraceLeakError, match="last"):
        f(inside, X)
    check_clean(inside)
    check_clean(outside)


def test_a_clone_that_is_kept_after_the_call_holds_no_writable_state_of_the_user():
    m = Net()
    kept = []

    @nn.jit
    def f(m, x):
        kept.append(m)
        return m(x)

    f(m, X)
    assert float(m.last) == 6.0
    assert not isinstance(m._buffers["last"].value, jax.core.Tracer)
    if kept[0] is not m:
        with pytest.raises((jax.errors.JAXTypeError, nn.StatefulnnError)):
            float(kept[0].last) + 0.0


def test_a_failed_write_in_one_thread_does_not_disturb_another():
    m, other = Net(), Net()
    errors = []

    def bad():
        try:
            jax.jit(m)(X)
        except nn.TraceLeakError as e:
            errors.append(e)

    threads = [threading.Thread(target=bad) for _ in range(4)]
    for t in threads:
        t.start()
    for _ in range(10):
        other(X)
    for t in threads:
        t.join()
    assert len(errors) == 4
    check_clean(m)
    assert float(other.last) == 6.0


def test_writing_a_tracer_of_an_inner_trace_into_a_box_of_an_outer_one_raises():
    m = Net()

    @nn.jit
    def f(m, x):
        def inner(v):
            m.last = v * 2  # the outer clone, an inner tracer
            return v

        return jax.vmap(inner)(x)

    with pytest.raises(nn.TraceLeakError, match="last"):
        f(m, X)
    check_clean(m)


def test_writing_an_outer_tracer_into_an_outer_box_inside_an_inner_autodiff_trace_is_fine():
    m = Net()

    @nn.jit
    def f(m, x):
        def inner(v):
            m.last = x.sum()
            return (v * m.w).sum()

        return jax.grad(inner)(x)

    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])
    assert float(m.last) == 3.0


def test_a_forward_hook_that_stores_its_output_under_vmap_raises():
    m = nn.Module()
    m.forward = lambda x: x * 2
    m.add_module("inner", Net().eval())

    class Keep(nn.Module):
        def forward(self, x):
            return x * 2

    k = Keep()
    k.register_forward_hook(lambda module, args, out: setattr(module, "activation", out))
    with pytest.raises(nn.TraceLeakError, match="activation"):
        jax.vmap(k)(X)
    assert not hasattr(k, "activation")


def test_manual_seed_inside_a_staged_trace_raises():
    before = np.asarray(nn.default_generator.get_state())

    @jax.jit
    def f(x):
        nn.manual_seed(3)
        return x

    with pytest.raises(nn.StatefulnnError):
        f(X)
    np.testing.assert_array_equal(np.asarray(nn.default_generator.get_state()), before)


BUILT_INSIDE = {
    "jax.grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "jax.vmap": lambda f: jax.vmap(f)(X),
    "jax.jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jax.jit": lambda f: jax.jit(f)(X),
    "lax.scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, X),
    "nn.vmap": lambda f: nn.vmap(lambda x: f(x))(X),
    "nn.jit": lambda f: nn.jit(f)(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(X),
}


@pytest.mark.parametrize("how", BUILT_INSIDE)
def test_a_module_built_inside_a_trace_may_be_written_there(how):
    seen = []

    def f(x):
        m = Net()
        m.w.value = jnp.ones(()) * x.sum()
        m(x)
        seen.append(m.last.shape)
        return m.w * x

    BUILT_INSIDE[how](f)
    assert seen


def test_a_module_built_inside_a_gradient_passes_the_gradient_through_its_parameter():
    def f(w):
        m = Net()
        m.w.value = w * 3
        return m(jnp.asarray(2.0))

    assert float(jax.grad(f)(1.0)) == 6.0


def test_a_generator_seeded_on_the_host_is_not_left_with_a_tracer():
    nn.manual_seed(0)
    model, x = nn.Linear(2, 1), jnp.ones((3, 2))
    jax.jit(lambda m, x: nn.grad(lambda m, x: m(x).sum())(m, x))(model, x)
    first = nn.next_key()
    nn.manual_seed(0)
    nn.Linear(2, 1)
    assert (jax.random.key_data(first) == jax.random.key_data(nn.next_key())).all()
