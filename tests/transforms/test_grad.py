"""nn.grad and nn.value_and_grad against formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.precision import in_float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray([1.0, 2.0]))
        self.b = nn.Parameter(jnp.asarray(0.5))
        self.frozen = nn.Parameter(jnp.asarray(3.0), requires_grad=False)
        self.register_buffer("calls", jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.calls = self.calls + 1
        return (self.w * x).sum() * self.frozen + self.b


X = jnp.asarray([4.0, 5.0])


def loss(m, x):
    return m(x) ** 2


OUT = (4 + 10) * 3 + 0.5
W, B = 2 * OUT * 3 * np.asarray([4.0, 5.0]), 2 * OUT


def test_the_result_is_a_dict_of_the_trainable_names():
    grads = nn.grad(loss)(Net(), X)
    assert type(grads) is dict
    assert set(grads) == {"w", "b"}
    np.testing.assert_allclose(np.asarray(grads["w"]), W)
    np.testing.assert_allclose(np.asarray(grads["b"]), B)


def test_value_and_grad_gives_both():
    value, grads = nn.value_and_grad(loss)(Net(), X)
    assert float(value) == pytest.approx(OUT**2)
    np.testing.assert_allclose(np.asarray(grads["w"]), W)


def test_aux_comes_along():
    def with_aux(m, x):
        y = m(x)
        return y**2, {"y": y, "text": "hello"}

    (value, aux), grads = nn.value_and_grad(with_aux, has_aux=True)(Net(), X)
    assert float(aux["y"]) == OUT
    assert aux["text"] == "hello"
    assert float(value) == pytest.approx(OUT**2)
    grads2, aux2 = nn.grad(with_aux, has_aux=True)(Net(), X)
    assert float(aux2["y"]) == OUT
    np.testing.assert_array_equal(np.asarray(grads["w"]), np.asarray(grads2["w"]))


def test_argnums_picks_another_argument():
    def f(x, m):
        return m(x) ** 2

    np.testing.assert_allclose(np.asarray(nn.grad(f, argnums=1)(X, Net())["w"]), W)


def test_argnums_may_be_an_array_argument():
    g = nn.grad(loss, argnums=1)(Net(), X)
    np.testing.assert_allclose(np.asarray(g), 2 * OUT * 3 * np.asarray([1.0, 2.0]))


def test_several_argnums_give_a_tuple():
    g_m, g_x = nn.grad(loss, argnums=(0, 1))(Net(), X)
    np.testing.assert_allclose(np.asarray(g_m["w"]), W)
    np.testing.assert_allclose(np.asarray(g_x), 2 * OUT * 3 * np.asarray([1.0, 2.0]))


def test_two_modules_that_share_a_parameter():
    a, b = Net(), Net()
    b.w = a.w
    g_a, g_b = nn.grad(lambda a, b: a(X) + b(X), argnums=(0, 1))(a, b)
    total = 2 * 3 * np.asarray([4.0, 5.0])
    # One parameter, one gradient: wherever it is reported, it is the sum.
    for g in (g_a, g_b):
        if "w" in g:
            np.testing.assert_allclose(np.asarray(g["w"]), total)
    assert "w" in g_a or "w" in g_b


def test_another_module_s_state_advances_but_gets_no_gradient():
    student, teacher = Net(), Net()
    grads = nn.grad(lambda s, t: (s(X) - t(X) + 1) ** 2)(student, teacher)
    np.testing.assert_allclose(np.asarray(grads["b"]), 2.0)
    assert int(teacher.calls) == int(student.calls) == 1


def test_modules_in_containers_of_the_first_argument():
    a, b = Net(), Net()
    grads = nn.grad(lambda d: d["a"](X) * 2 + d["b"](X))({"a": a, "b": b})
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_flatten_with_path(grads)[0]}
    values = sorted(float(v) for k, v in flat.items() if v.shape == ())
    assert values == [1.0, 2.0]


@pytest.mark.parametrize(
    "bad", [lambda m: m(X) * jnp.ones(2), lambda m: (m(X), 1), lambda m: None, lambda m: "x"]
)
def test_a_loss_that_is_no_scalar_is_a_type_error(bad):
    with pytest.raises((TypeError, ValueError)):
        nn.grad(bad)(Net())


def test_an_integer_loss_is_a_type_error():
    with pytest.raises(TypeError):
        nn.grad(lambda m: m(X).astype(jnp.int32))(Net())


def test_a_loss_that_reads_the_outer_model_raises():
    m = Net()
    with pytest.raises(nn.UnusedModuleError) as info:
        nn.grad(lambda model: (m.w.value**2).sum())(m)
    assert "Instead:" in str(info.value)


def test_a_parameter_that_is_not_used_gets_zero():
    grads = nn.grad(lambda m: m.b * 2.0)(Net())
    np.testing.assert_array_equal(np.asarray(grads["w"]), [0.0, 0.0])
    assert float(grads["b"]) == 2.0


def test_requires_grad_decides_at_each_call():
    m = Net()
    f = nn.grad(loss)
    m.b.requires_grad = False
    assert set(f(m, X)) == {"w"}
    m.b.requires_grad = True
    m.frozen.requires_grad_(True)
    grads = f(m, X)
    assert set(grads) == {"w", "b", "frozen"}
    np.testing.assert_allclose(np.asarray(grads["frozen"]), 2 * OUT * 14)


def test_freezing_inside_the_loss_is_an_error():
    m = Net()

    def f(m):
        m.requires_grad_(False)
        return m(X)

    with pytest.raises(nn.StatefulnnError):
        nn.grad(f)(m)
    assert m.w.requires_grad


def test_the_parameter_s_value_may_be_written_inside_the_loss():
    """What the write does to later reads is differentiated; the new value is written back."""
    m = Net()

    def f(m):
        m.w.value = m.w * 2
        return m(X)

    grads = nn.grad(f)(m)
    np.testing.assert_allclose(np.asarray(grads["w"]), 2 * 3 * np.asarray([4.0, 5.0]))
    np.testing.assert_array_equal(np.asarray(m.w), [2.0, 4.0])


def test_a_module_without_gradient_inside_still_writes_state():
    m = Net()
    nn.grad(lambda m: m.b * 1.0 + 0 * m(X))(m)
    assert int(m.calls) == 1


def test_the_hessian_diagonal_by_nesting():
    """d2/db2 of (s + b)^2 is 2."""
    m = Net()
    second = nn.grad(lambda m: nn.grad(loss)(m, X)["b"])(m)
    assert float(second["b"]) == pytest.approx(2.0)
    np.testing.assert_allclose(np.asarray(second["w"]), 2 * 3 * np.asarray([4.0, 5.0]))


def test_bfloat16_gradients_have_the_parameter_s_dtype():
    m = Net().bfloat16()
    grads = nn.grad(lambda m: m(X.astype(jnp.bfloat16)))(m)
    assert {g.dtype for g in grads.values()} == {jnp.dtype("bfloat16")}


def test_complex_outputs_are_refused():
    with pytest.raises(TypeError):
        nn.grad(lambda m: jax.lax.complex(m(X), m(X)))(Net())


def test_it_agrees_with_finite_differences_in_float64():
    with in_float64():
        m = Net().double()
        x = X.astype(jnp.float64)

        def f(m):
            return jnp.sin(m(x) / 10) * m.w[0]

        grads = nn.grad(f)(m)
        eps = 1e-6
        for name, index in (("w", 0), ("w", 1), ("b", ())):
            p = m.get_parameter(name)
            base = p.value
            values = []
            for s in (1, -1):
                p.value = base.at[index].add(s * eps)
                values.append(float(f(m)))
            p.value = base
            numeric = (values[0] - values[1]) / (2 * eps)
            np.testing.assert_allclose(float(grads[name][index]), numeric, rtol=1e-6)
