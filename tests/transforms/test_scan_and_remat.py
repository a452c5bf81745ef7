"""nn.scan and nn.remat against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray(0.5))
        self.register_buffer("steps", jnp.zeros((), jnp.int32))

    def forward(self, h, x):
        self.steps = self.steps + 1
        return jnp.tanh(self.w * h + x)


XS = jnp.asarray([0.1, -0.4, 0.7])


def step(carry, x):
    m, h = carry
    h = m(h, x)
    return (m, h), h


def loop(m, h, xs):
    out = []
    for x in xs:
        h = m(h, x)
        out.append(h)
    return h, jnp.stack(out)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_the_loop(jit, reverse):
    m, n = Cell(), Cell()

    def f(m):
        (m, h), ys = nn.scan(step, (m, jnp.zeros(())), XS, reverse=reverse)
        return h, ys

    h, ys = (nn.jit(f) if jit else f)(m)
    order = XS[::-1] if reverse else XS
    expected, outs = loop(n, jnp.zeros(()), order)
    np.testing.assert_allclose(float(h), float(expected), rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(ys), np.asarray(outs[::-1] if reverse else outs), rtol=1e-6
    )
    assert int(m.steps) == 3


def test_the_module_in_the_carry_that_comes_out_is_the_caller_s_own():
    m = Cell()
    (again, _), _ = nn.scan(step, (m, jnp.zeros(())), XS)
    assert again is m


def test_a_length_without_inputs():
    m = Cell()
    (m2, h), ys = nn.scan(lambda c, _: step(c, 0.0), (m, jnp.ones(())), None, length=4)
    assert ys.shape == (4,)
    assert int(m.steps) == 4


def test_training_steps_in_a_scan():
    m = Cell()

    def train(m, x):
        grads = nn.grad(lambda m: (m(1.0, x) - 1.0) ** 2)(m)
        m.w.value = m.w - 0.1 * grads["w"]
        return m, m.w.value

    _, ws = nn.scan(train, m, XS)
    w = 0.5
    for x in np.asarray(XS):
        t = np.tanh(w + x)
        w -= 0.1 * 2 * (t - 1) * (1 - t * t)
    np.testing.assert_allclose(float(m.w), w, rtol=1e-5)
    np.testing.assert_allclose(float(ws[-1]), w, rtol=1e-5)
    assert int(m.steps) == 3


@pytest.mark.parametrize("how", ["scan", "remat", "scan of remat"])
def test_the_gradient_through_it_is_that_of_the_loop(how):
    def scanned(m):
        return nn.scan(step, (m, jnp.zeros(())), XS)[0][1]

    def rematted(m):
        f = nn.remat(lambda m, h, x: m(h, x))
        h = jnp.zeros(())
        for x in XS:
            h = f(m, h, x)
        return h

    def both(m):
        body = nn.remat(step)
        return nn.scan(body, (m, jnp.zeros(())), XS)[0][1]

    f = {"scan": scanned, "remat": rematted, "scan of remat": both}[how]
    m = Cell()
    got = nn.grad(f)(m)["w"]
    expected = nn.grad(lambda m: loop(m, jnp.zeros(()), XS)[0])(Cell())["w"]

    def plain(w):
        h = 0.0
        for x in XS:
            h = jnp.tanh(w * h + x)
        return h

    np.testing.assert_allclose(float(got), float(jax.grad(plain)(0.5)), rtol=1e-5)
    np.testing.assert_allclose(float(got), float(expected), rtol=1e-5)
    assert int(m.steps) == 3


def test_a_step_that_returns_no_pair_is_a_type_error():
    with pytest.raises(TypeError, match="carry"):
        nn.scan(lambda m, x: m, Cell(), XS)


def test_a_step_that_changes_the_module_of_the_carry_raises():
    with pytest.raises((nn.StatefulnnError, TypeError)):
        nn.scan(lambda m, x: (Cell(), x), Cell(), XS)


def test_a_step_that_changes_a_static_raises_and_leaves_the_module():
    m = Cell()

    def bad(m, x):
        m.note = 1
        return m, x

    with pytest.raises(nn.StatefulnnError, match="note"):
        nn.scan(bad, m, XS)
    assert not hasattr(m, "note")


def test_a_carry_whose_dtype_changes_is_an_error_not_a_cast():
    with pytest.raises((TypeError, nn.StatefulnnError)):
        nn.scan(lambda c, x: ((c[0], c[1].astype(jnp.int32)), x), (Cell(), jnp.zeros(())), XS)


def test_a_module_only_read_by_closure_in_a_scan_is_a_constant_and_later_warns():
    m = Cell()
    m.eval()
    nn.scan(lambda c, x: (c * m.w, x), jnp.ones(()), XS)
    with pytest.warns(nn.StaleCaptureWarning, match="w"):
        m.w.value = jnp.asarray(0.1)


def test_remat_stores_less_and_computes_the_forward_twice():
    """The jaxpr of the gradient contains a remat of the module's body."""
    m = Cell()
    text = str(
        jax.make_jaxpr(
            lambda w: jax.grad(
                lambda w: nn.remat(
                    lambda h: nn.functional_call(m, {"w": w}, (h, 0.1), mutable=True)[0]
                )(1.0)
            )(w)
        )(0.5)
    )
    assert "remat" in text or "checkpoint" in text


def test_remat_as_a_decorator_writes_state_back():
    @nn.remat
    def f(m, h, x):
        return m(h, x)

    m = Cell()
    np.testing.assert_allclose(float(f(m, jnp.zeros(()), 0.3)), np.tanh(0.3), rtol=1e-6)
    assert int(m.steps) == 1


def test_remat_of_a_module_itself_loses_nothing():
    m = Cell()
    try:
        nn.remat(m)(jnp.zeros(()), 0.3)
    except nn.StatefulnnError:
        assert int(m.steps) == 0
    else:
        assert int(m.steps) == 1
