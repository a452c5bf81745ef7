"""Law 3: stateful transforms are split, a plain transform, write-back; they nest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Net(nn.Module):
    """y = w * x, counts its calls and sums what it saw."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray(3.0))
        self.register_buffer("calls", jnp.zeros((), jnp.int32))
        self.register_buffer("seen", jnp.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        self.seen = self.seen + jnp.sum(x)
        return self.w * x


def loss(m, x):
    return jnp.sum(m(x) ** 2)


X = jnp.asarray([1.0, 2.0])
FORWARD = np.asarray([3.0, 6.0])
GRAD = 2 * 3.0 * 5.0  # d/dw of sum((w x)^2) = 2 w sum(x^2)


def check(m, calls):
    assert int(m.calls) == calls
    assert float(m.seen) == calls * 3.0
    assert not isinstance(m._buffers["seen"].value, jax.core.Tracer)


FORWARD_WRAPS = {
    "jit": nn.jit,
    "remat": nn.remat,
    "jit of jit": lambda f: nn.jit(nn.jit(f)),
    "jit of remat": lambda f: nn.jit(nn.remat(f)),
    "remat of jit": lambda f: nn.remat(nn.jit(f)),
    "remat of remat": lambda f: nn.remat(nn.remat(f)),
    "jit twice deep": lambda f: nn.jit(lambda m, x: nn.jit(lambda m, x: nn.jit(f)(m, x))(m, x)),
}


@pytest.mark.parametrize("wrap", FORWARD_WRAPS)
def test_outputs_and_state_are_those_of_the_plain_call(wrap):
    m = Net()
    f = FORWARD_WRAPS[wrap](lambda m, x: m(x))
    for i in (1, 2, 3):
        np.testing.assert_array_equal(np.asarray(f(m, X)), FORWARD)
        check(m, i)


GRAD_WRAPS = {
    "grad": nn.grad,
    "grad of jit": lambda f: nn.grad(nn.jit(f)),
    "jit of grad": lambda f: nn.jit(nn.grad(f)),
    "grad of remat": lambda f: nn.grad(nn.remat(f)),
    "jit of grad of remat": lambda f: nn.jit(nn.grad(nn.remat(f))),
    "remat of grad": lambda f: nn.remat(nn.grad(f)),
    "jit of grad of jit": lambda f: nn.jit(nn.grad(nn.jit(f))),
    "value_and_grad": lambda f: lambda m, x: nn.value_and_grad(f)(m, x)[1],
    "value_and_grad, aux": lambda f: (
        lambda m, x: nn.grad(lambda m, x: (f(m, x), "aux"), has_aux=True)(m, x)[0]
    ),
}


@pytest.mark.parametrize("wrap", GRAD_WRAPS)
def test_gradients_are_right_and_the_state_advances_once_a_call(wrap):
    m = Net()
    f = GRAD_WRAPS[wrap](loss)
    for i in (1, 2):
        grads = f(m, X)
        assert list(grads) == ["w"]
        assert float(grads["w"]) == pytest.approx(GRAD)
        check(m, i)
    assert float(m.w) == 3.0


def test_a_train_step_trains():
    m = Net()

    @nn.jit
    def step(m, x):
        value, grads = nn.value_and_grad(loss)(m, x)
        m.w.value = m.w - 0.01 * grads["w"]
        return value

    w = 3.0
    for i in range(1, 4):
        assert float(step(m, X)) == pytest.approx(5 * w * w, rel=1e-5)
        w -= 0.01 * 2 * w * 5
        check(m, i)
        assert float(m.w) == pytest.approx(w, rel=1e-5)
    assert step.trace_count == 1


def test_nn_grad_of_a_function_that_calls_nn_grad():
    """The gradient of w's gradient: d/dw of (2 w s)^2 = 8 w s^2 with s = sum(x^2)."""
    m = Net()

    def squared_gradient(m, x):
        return nn.grad(loss)(m, x)["w"] ** 2

    assert float(nn.grad(squared_gradient)(m, X)["w"]) == pytest.approx(8 * 3 * 25, rel=1e-5)
    check(m, 1)


def test_nn_grad_inside_nn_grad_of_another_module():
    teacher, student = Net(), Net()

    def outer(student, teacher, x):
        g = nn.grad(loss)(teacher, x)["w"]
        return jnp.sum(student(x)) * g

    grads = nn.jit(nn.grad(outer))(student, teacher, X)
    assert float(grads["w"]) == pytest.approx(3.0 * GRAD)
    check(student, 1)
    check(teacher, 1)


RAW = {
    "jax.jit": lambda f: jax.jit(f),
    "jax.vmap of one": lambda f: (
        lambda m, x: jax.tree.map(lambda v: v[0], jax.vmap(f, in_axes=(None, 0))(m, x[None]))
    ),
    "jax.checkpoint": lambda f: jax.checkpoint(f),
    "lax.cond": lambda f: lambda m, x: jax.lax.cond(True, f, f, m, x),
}
INNER = {
    "nn.jit": lambda m, x: (nn.jit(lambda m, x: m(x))(m, x), m),
    "nn.remat": lambda m, x: (nn.remat(lambda m, x: m(x))(m, x), m),
    "nn.grad": lambda m, x: (nn.grad(loss)(m, x)["w"] * jnp.ones(2), m),
    "plain": lambda m, x: (m(x), m),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("raw", RAW)
def test_stateful_transforms_run_inside_raw_ones_on_nn_mutable_clones(raw, inner):
    m = Net()

    def f(m, x):
        return INNER[inner](nn.mutable(m), x)

    out, new = RAW[raw](f)(m, X)
    np.testing.assert_allclose(np.asarray(out), [GRAD] * 2 if inner == "nn.grad" else FORWARD)
    check(new, 1)
    check(m, 0)


@pytest.mark.parametrize("raw", [r for r in RAW if r != "lax.cond"])
def test_raw_transforms_run_inside_stateful_ones(raw):
    m = Net()

    @nn.jit
    def step(m, x):
        def pure(params, x):
            return nn.functional_call(m, params, (x,), mutable=True)[0]

        return m(x) + RAW[raw](pure)({"w": m.w.value * 2}, x)

    np.testing.assert_allclose(np.asarray(step(m, X)), 3 * FORWARD)
    check(m, 1)


def test_nn_vmap_inside_nn_jit_inside_nn_grad():
    m = Net()

    def batch_loss(m, xs):
        return nn.jit(lambda m, xs: nn.vmap(lambda m, x: m.w * x, in_axes=(None, 0))(m, xs))(
            m, xs
        ).sum()

    grads = nn.grad(batch_loss)(m, jnp.arange(4.0))
    assert float(grads["w"]) == 6.0


def test_nn_scan_carries_the_state_through_the_loop():
    m = Net()

    def body(carry, x):
        m, total = carry
        y = m(x)
        return (m, total + y.sum()), y

    (again, total), ys = nn.scan(body, (m, jnp.zeros(())), jnp.stack([X, X, X]))
    assert again is m
    assert float(total) == 27.0
    np.testing.assert_array_equal(np.asarray(ys), np.stack([FORWARD] * 3))
    check(m, 3)


@pytest.mark.parametrize("wrap", [nn.jit, nn.grad, nn.remat, nn.value_and_grad])
def test_an_exception_in_the_middle_leaves_state_and_boxes_as_they_were(wrap):
    m = Net()

    def fails(m, x):
        m(x)
        m.w.value = m.w * 2
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        wrap(fails)(m, X)
    check(m, 0)
    assert float(m.w) == 3.0
    np.testing.assert_array_equal(np.asarray(nn.jit(lambda m, x: m(x))(m, X)), FORWARD)
    check(m, 1)


def test_decorators_keep_name_and_docstring():
    @nn.jit
    def train_step(m, x):
        """Train."""
        return m(x)

    @nn.grad
    def the_loss(m, x):
        """Lose."""
        return loss(m, x)

    assert train_step.__name__ == "train_step"
    assert train_step.__doc__ == "Train."
    assert the_loss.__doc__.startswith("Lose.") or the_loss.__wrapped__.__doc__ == "Lose."


def test_nn_jit_on_a_module_is_a_callable_that_writes_state_back():
    m = Net()
    fast = nn.jit(m)
    np.testing.assert_array_equal(np.asarray(fast(X)), FORWARD)
    np.testing.assert_array_equal(np.asarray(fast(X)), FORWARD)
    check(m, 2)


def test_nn_jit_on_a_bound_method_writes_state_back():
    class Two(Net):
        def twice(self, x):
            return self(self(x))

    m = Two()
    np.testing.assert_array_equal(np.asarray(nn.jit(m.twice)(X)), 3 * FORWARD)
    assert int(m.calls) == 2
