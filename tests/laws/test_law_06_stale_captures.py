"""Law 6: a module read as a constant of compiled code warns once when it is written later."""

from __future__ import annotations

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Module()
        self.fc.weight = nn.Parameter(jnp.asarray([2.0, 3.0]))
        self.register_buffer("shift", jnp.zeros(2))

    def forward(self, x):
        return x * self.fc.weight + self.shift


X = jnp.ones(2)

STAGED = {
    "jax.jit": lambda f: jax.jit(f)(X),
    "nn.jit": lambda f: nn.jit(lambda x: f(x))(X),
    "jax.checkpoint": lambda f: jax.checkpoint(f)(X),
    "checkpoint under grad": lambda f: jax.grad(jax.checkpoint(lambda x: f(x).sum()))(X),
    "lax.scan": lambda f: jax.lax.scan(lambda c, x: (f(c), None), X, None, length=2),
    "lax.cond": lambda f: jax.lax.cond(True, f, f, X),
    "lax.while_loop": lambda f: jax.lax.while_loop(
        lambda c: c[0] < 1, lambda c: (c[0] + 1, f(c[1])), (0, X)
    ),
    "lax.map": lambda f: jax.lax.map(f, jnp.ones((3, 2))),
    "grad inside jit": lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(X),
    "vmap inside jit": lambda f: jax.jit(jax.vmap(f))(jnp.ones((3, 2))),
}
EAGER = {
    "plain": lambda f: f(X),
    "jax.grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "jax.vmap": lambda f: jax.vmap(f)(jnp.ones((3, 2))),
    "jax.jvp": lambda f: jax.jvp(f, (X,), (X,)),
}


def write(m):
    m.fc.weight.value = m.fc.weight + 1


@pytest.mark.parametrize("how", STAGED)
def test_reading_is_legal_and_silent(how):
    STAGED[how](Net())


@pytest.mark.parametrize("how", STAGED)
def test_a_later_write_warns_and_names_the_parameter(how):
    m = Net()
    STAGED[how](m)
    with pytest.warns(nn.StaleCaptureWarning, match=r"fc\.weight"):
        write(m)
    np.testing.assert_array_equal(np.asarray(m.fc.weight), [3.0, 4.0])


def test_the_message_names_where_it_was_captured():
    m = Net()
    jax.jit(m)(X)
    with pytest.warns(nn.StaleCaptureWarning, match=os.path.basename(__file__)):
        write(m)


def test_the_warning_points_at_the_line_that_writes():
    m = Net()
    jax.jit(m)(X)
    with pytest.warns(nn.StaleCaptureWarning) as record:
        write(m)
    assert os.path.basename(record[0].filename) == os.path.basename(__file__)


def test_it_warns_once():
    m = Net()
    jax.jit(m)(X)
    with pytest.warns(nn.StaleCaptureWarning):
        write(m)
    write(m)
    write(m)


def test_it_warns_again_after_another_capture():
    m = Net()
    jax.jit(m)(X)
    with pytest.warns(nn.StaleCaptureWarning):
        write(m)
    jax.jit(lambda x: m(x) + 1)(X)
    with pytest.warns(nn.StaleCaptureWarning):
        write(m)


def test_a_buffer_warns_too():
    m = Net()
    jax.jit(m)(X)
    with pytest.warns(nn.StaleCaptureWarning, match="shift"):
        m.shift = jnp.ones(2)


@pytest.mark.parametrize("how", EAGER)
def test_reading_outside_staged_code_leaves_no_warning(how):
    m = Net()
    EAGER[how](m)
    write(m)


@pytest.mark.parametrize("how", ["nn.jit", "jax.jit", "nn.grad", "functional_call", "nn.remat"])
def test_a_module_passed_as_an_argument_leaves_no_warning(how):
    m = Net()
    if how == "nn.jit":
        nn.jit(lambda m, x: m(x))(m, X)
    elif how == "jax.jit":
        jax.jit(lambda m, x: m(x))(m, X)
    elif how == "nn.grad":
        nn.jit(nn.grad(lambda m, x: m(x).sum()))(m, X)
    elif how == "nn.remat":
        nn.remat(lambda m, x: m(x))(m, X)
    else:
        params = {n: p.value for n, p in m.named_parameters()}
        buffers = dict(m.named_buffers())
        jax.jit(lambda p, b: nn.functional_call(m, (p, b), (X,)))(params, buffers)
    write(m)
    m.shift = jnp.ones(2)


def test_an_untouched_box_of_a_captured_module_leaves_no_warning():
    m = Net()
    jax.jit(lambda x: x * m.fc.weight)(X)
    m.shift = jnp.ones(2)


def test_a_functional_call_that_takes_the_module_s_own_values_is_a_capture():
    m = Net()
    jax.jit(lambda x: nn.functional_call(m, {}, (x,)))(X)
    with pytest.warns(nn.StaleCaptureWarning, match=r"fc\.weight"):
        write(m)


def test_a_frozen_teacher_never_warns_while_the_student_trains():
    teacher, student = Net(), Net()

    @nn.jit
    def step(student, x):
        grads = nn.grad(lambda s: jnp.sum((s(x) - 2 * teacher(x)) ** 2))(student)
        student.fc.weight.value = student.fc.weight - 0.1 * grads["fc.weight"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(student, X)
    assert float(student.fc.weight[0]) > 2.0


def test_eval_after_a_capture_by_closure_is_not_silent():
    class Mode(Net):
        def forward(self, x):
            return x * (2.0 if self.training else 1.0)

    m = Mode()
    f = jax.jit(m)
    np.testing.assert_array_equal(np.asarray(f(X)), [2.0, 2.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        m.eval()
        again = np.asarray(f(X))
    assert caught or again[0] == 1.0, "an old mode for ever, and no word of it"


def test_load_state_dict_after_a_capture_warns():
    m = Net()
    jax.jit(m)(X)
    state = {k: v + 1 for k, v in m.state_dict().items()}
    with pytest.warns(nn.StaleCaptureWarning):
        m.load_state_dict(state)


def test_nn_jit_writing_back_to_a_captured_module_warns():
    m = Net()
    jax.jit(m)(X)

    @nn.jit
    def step(m):
        m.fc.weight.value = m.fc.weight * 2

    with pytest.warns(nn.StaleCaptureWarning, match=r"fc\.weight"):
        step(m)
    np.testing.assert_array_equal(np.asarray(m.fc.weight), [4.0, 6.0])


def test_shape_and_dtype_alone_are_no_capture():
    m = Net()
    jax.jit(lambda x: x.reshape(m.fc.weight.shape).astype(m.fc.weight.dtype))(X)
    write(m)
