"""nn.vmap against loops, formulas and torch.func.vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.core.generator import next_key


class Net(nn.Module):
    def __init__(self, w=2.0):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray([w, w + 1]))
        self.register_buffer("calls", jnp.zeros((), jnp.int32))
        self.register_buffer("seen", jnp.zeros(2))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.w

    def remember(self, x):
        self.seen = self.seen + x
        return x * self.w


XS = jnp.arange(6.0).reshape(3, 2)
EXPECTED = np.arange(6.0).reshape(3, 2) * [2.0, 3.0]

FORMS = {
    "in_axes tuple": lambda m: nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, XS),
    "module itself": lambda m: nn.vmap(m)(XS),
    "closure of values": lambda m: nn.vmap(lambda x: x * m.w)(XS),
    "out_axes": lambda m: nn.vmap(lambda m, x: m(x), in_axes=(None, 0), out_axes=1)(m, XS).T,
    "in_axes 1": lambda m: nn.vmap(lambda m, x: m(x), in_axes=(None, 1))(m, XS.T),
    "negative axis": lambda m: nn.vmap(lambda m, x: m(x), in_axes=(None, -1))(m, XS.T),
    "decorator": lambda m: nn.vmap(in_axes=(None, 0))(lambda m, x: m(x))(m, XS),
    "under nn.jit": lambda m: nn.jit(nn.vmap(lambda m, x: m(x), in_axes=(None, 0)))(m, XS),
    "nested": lambda m: nn.vmap(
        lambda m, xs: nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, xs), in_axes=(None, 0)
    )(m, XS[None])[0],
    "in_axes in a dict": lambda m: nn.vmap(
        lambda d: d["m"](d["x"]), in_axes=({"m": None, "x": 0},)
    )({"m": m, "x": XS}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_output_is_that_of_a_loop(form):
    np.testing.assert_array_equal(np.asarray(FORMS[form](Net())), EXPECTED)


def test_a_shared_module_takes_a_write_that_is_the_same_in_all_lanes():
    m = Net()
    nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, XS)
    assert int(m.calls) == 1


def test_a_write_that_differs_between_lanes_to_a_shared_module_raises():
    m = Net()
    with pytest.raises(nn.StateWriteError, match="seen"):
        nn.vmap(lambda m, x: m.remember(x), in_axes=(None, 0))(m, XS)
    np.testing.assert_array_equal(np.asarray(m.seen), [0.0, 0.0])


def stacked(n=3):
    models = [Net(float(i)) for i in range(n)]
    moduledef = nn.split(models[0])[0]
    leaves = [jnp.stack(v) for v in zip(*(nn.split(m)[1] for m in models), strict=True)]
    return nn.merge(moduledef, leaves)


def test_a_stack_of_modules_runs_member_by_member_and_keeps_their_state():
    m = stacked()
    out = nn.vmap(lambda m, x: m.remember(x))(m, XS)
    expected = np.stack([np.asarray(XS[i]) * [i, i + 1] for i in range(3)])
    np.testing.assert_array_equal(np.asarray(out), expected)
    np.testing.assert_array_equal(np.asarray(m.seen), np.asarray(XS))
    assert m.calls.shape == (3,)


def test_a_train_step_over_a_stack_trains_each_member():
    m = stacked()

    @nn.jit
    @nn.vmap
    def step(m, x):
        value, grads = nn.value_and_grad(lambda m, x: (m(x) ** 2).sum())(m, x)
        m.w.value = m.w - 0.1 * grads["w"]
        return value

    before = np.asarray(m.w)
    step(m, XS)
    expected = before - 0.1 * 2 * before * np.asarray(XS) ** 2
    np.testing.assert_allclose(np.asarray(m.w), expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(m.calls), [1, 1, 1])


def test_axis_size_alone_makes_an_ensemble():
    class Member(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jax.random.normal(next_key(), (4,)))

        def forward(self, x):
            return x * self.w

    m = nn.vmap(Member, axis_size=3)()
    assert isinstance(m, Member)
    assert m.w.shape == (3, 4)
    assert len({tuple(r) for r in np.asarray(m.w)}) == 3
    out = nn.vmap(lambda m, x: m(x), in_axes=(0, None))(m, jnp.ones(4))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(m.w))


def test_axis_name_serves_collectives():
    m = Net()
    out = nn.vmap(
        lambda m, x: m(x) - jax.lax.pmean(m(x), "batch"), in_axes=(None, 0), axis_name="batch"
    )(m, XS)
    np.testing.assert_allclose(np.asarray(out), EXPECTED - EXPECTED.mean(0), rtol=1e-6)


def test_batch_statistics_by_collective_are_a_legal_write():
    """A pmean is the same in all lanes, so a shared module may keep it."""
    m = Net()

    def f(m, x):
        m.seen = jax.lax.pmean(x, "batch")
        return x

    nn.vmap(f, in_axes=(None, 0), axis_name="batch")(m, XS)
    np.testing.assert_allclose(np.asarray(m.seen), np.asarray(XS).mean(0))


def test_per_sample_gradients():
    m = Net()
    grads = nn.vmap(nn.grad(lambda m, x: (m(x) ** 2).sum()), in_axes=(None, 0))(m, XS)
    np.testing.assert_allclose(
        np.asarray(grads["w"]), 2 * np.asarray([2.0, 3.0]) * np.asarray(XS) ** 2, rtol=1e-6
    )


def test_lanes_of_different_sizes_are_an_error():
    with pytest.raises((ValueError, nn.StatefulnnError)):
        nn.vmap(lambda x, y: x + y)(jnp.ones(2), jnp.ones(3))


def test_an_exception_leaves_the_modules_alone():
    m = Net()

    def f(m, x):
        m(x)
        raise ValueError("lane")

    with pytest.raises(ValueError, match="lane"):
        nn.vmap(f, in_axes=(None, 0))(m, XS)
    assert int(m.calls) == 0


def test_a_batch_of_size_zero():
    out = nn.vmap(lambda m, x: m.w * x, in_axes=(None, 0))(Net(), jnp.zeros((0, 2)))
    assert out.shape == (0, 2)


def test_an_argument_may_be_none():
    f = nn.vmap(lambda m, x, y: m(x) if y is None else y, in_axes=(None, 0, None))
    assert f(nn.Linear(2, 2), jnp.ones((3, 2)), None).shape == (3, 2)
    g = nn.vmap(lambda d: d["x"] if d["mask"] is None else d["mask"])
    assert g({"x": jnp.ones((3, 2)), "mask": None}).shape == (3, 2)
