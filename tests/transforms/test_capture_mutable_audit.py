"""nn.capture, nn.mutable, nn.audit."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Scale(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray(w))
        self.register_buffer("calls", jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.w


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Scale(2.0)
        self.b = nn.Module()
        self.b.inner = Scale(3.0)
        self.unused = Scale(9.0)

    def forward(self, x):
        return self.a(self.b.inner(self.a(x)))

    def short(self, x):
        return self.a(x)


def test_it_returns_the_output_and_the_outputs_by_dotted_name():
    out, found = nn.capture(Net())(jnp.asarray(1.0))
    assert float(out) == 12.0
    assert float(found["b.inner"]) == 6.0
    assert "unused" not in found


def test_a_module_called_twice_gives_a_tuple_in_order():
    _, found = nn.capture(Net())(jnp.asarray(1.0))
    assert isinstance(found["a"], tuple)
    assert [float(v) for v in found["a"]] == [2.0, 12.0]


def test_names_choose():
    _, found = nn.capture(Net(), names=["b.inner"])(jnp.asarray(1.0))
    assert list(found) == ["b.inner"]


def test_another_method():
    out, found = nn.capture(Net(), method="short")(jnp.asarray(1.0))
    assert float(out) == 2.0
    assert float(found["a"]) == 2.0


def test_it_leaves_no_hook_and_no_attribute_behind():
    m = Net()
    before = nn.split(m)[0]
    nn.capture(m)(jnp.asarray(1.0))
    assert nn.split(m)[0] is before


def test_it_leaves_nothing_behind_after_an_exception():
    class Fails(Net):
        def forward(self, x):
            self.a(x)
            raise ValueError("later")

    m = Fails()
    before = nn.split(m)[0]
    with pytest.raises(ValueError, match="later"):
        nn.capture(m)(jnp.asarray(1.0))
    assert nn.split(m)[0] is before
    seen = []
    m.a.register_forward_hook(lambda *a: seen.append(1))
    m.a(1.0)
    assert seen == [1]


@pytest.mark.parametrize("how", ["nn.jit", "nn.grad", "jax.grad of x"])
def test_it_works_under_transforms(how):
    m = Net()
    if how == "nn.jit":
        out, found = nn.jit(lambda m, x: nn.capture(m)(x))(m, jnp.asarray(1.0))
        assert float(found["b.inner"]) == 6.0
        assert int(m.a.calls) == 2
    elif how == "nn.grad":
        grads, found = nn.grad(lambda m, x: nn.capture(m)(x), has_aux=True)(m, jnp.asarray(1.0))
        assert float(grads["a.w"]) == 12.0  # d/da of a * b * a
        assert float(found["b.inner"]) == 6.0
    else:
        m.eval()
        fn, params, state = nn.functionalize(m, mutable=True)
        g = jax.grad(lambda p: fn(p, state, jnp.asarray(1.0))[0])(params)
        assert float(g["b.inner.w"]) == 4.0


def test_the_captured_output_is_the_one_after_forward_hooks():
    m = Net()
    m.b.inner.register_forward_hook(lambda mod, args, out: out + 1)
    _, found = nn.capture(m)(jnp.asarray(1.0))
    assert float(found["b.inner"]) == 7.0


def test_a_shared_submodule_is_reported_under_its_first_name():
    m = Net()
    m.c = m.b.inner
    _, found = nn.capture(m)(jnp.asarray(1.0))
    assert float(found["b.inner"]) == 6.0


def test_a_submodule_called_inside_an_inner_transform_does_not_leak():
    class Inner(Net):
        def forward(self, x):
            return jax.vmap(lambda v: v * self.a.w)(x) + self.b.inner(x)

    out, found = nn.capture(Inner())(jnp.ones(2))
    np.testing.assert_array_equal(np.asarray(found["b.inner"]), [3.0, 3.0])

    class Leaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Identity()

        def forward(self, x):
            return jax.vmap(lambda v: self.a(v))(x)

    with pytest.raises(nn.TraceLeakError, match="a"):
        nn.capture(Leaks())(jnp.ones(2))


def test_mutable_outside_a_trace_is_an_independent_copy():
    m = Net()
    c = nn.mutable(m)
    assert c is not m
    c.a.w.value = jnp.asarray(5.0)
    c.eval()
    assert float(m.a.w) == 2.0
    assert m.training


def test_mutable_keeps_ties():
    m = Net()
    m.tied = m.a
    assert nn.mutable(m).tied is not m.a
    c = nn.mutable(m)
    assert c.tied is c.a


def test_mutable_in_raw_jit_returns_what_was_written():
    @jax.jit
    def f(m, x):
        m = nn.mutable(m)
        y = m(x)
        return m, y

    m = Net()
    new, y = f(m, jnp.asarray(1.0))
    assert float(y) == 12.0
    assert int(new.a.calls) == 2
    assert int(m.a.calls) == 0


def test_mutable_in_a_raw_scan_as_carry():
    def body(m, x):
        m = nn.mutable(m)
        return m, m(x)

    m, ys = jax.lax.scan(body, Net(), jnp.ones(3))
    assert int(m.a.calls) == 6
    np.testing.assert_array_equal(np.asarray(ys), [12.0] * 3)


def test_mutable_under_raw_grad_differentiates_what_was_written():
    def f(m):
        m = nn.mutable(m)
        m.a.w.value = m.a.w * 3
        return m.short(jnp.asarray(1.0))

    g = jax.grad(lambda w: f(_with(w)))(2.0)
    assert float(g) == 3.0


def _with(w):
    m = nn.mutable(Net())
    m.a.w.value = jnp.asarray(w) * 1.0
    return m


def test_mutable_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="[Mm]odule"):
        nn.mutable(jnp.ones(1))


def test_audit_names_unused_frozen_and_zero_gradient_parameters():
    m = Net()
    m.b.inner.w.requires_grad = False
    m.zero = nn.Parameter(jnp.zeros(()))
    report = nn.audit(m, jnp.asarray(1.0))
    assert report.frozen == ["b.inner.w"]
    assert set(report.unused) == {"unused.w", "zero"}
    assert "a.w" not in {*report.unused, *report.zero_grad, *report.frozen}


def test_audit_leaves_the_model_as_it_was():
    m = Net()
    before = nn.split(m)
    nn.audit(m, jnp.asarray(1.0))
    assert nn.split(m)[0] is before[0]
    assert int(m.a.calls) == 0
    for x, y in zip(before[1], nn.split(m)[1], strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class Dropped(nn.Module):
    """The output of `a` is dropped, in the same transformed function that computes the other one."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b, self.c = Scale(2.0), Scale(3.0), Scale(5.0)

    def forward(self, x):
        def both(model, x):
            return model.a(x), model.b(x)

        if self.how == "remat":
            return nn.remat(both)(self, x)[1]
        if self.how == "checkpoint":
            products = jax.checkpoint(lambda a, b, x: (a * x, b * x))
            return products(self.a.w.value, self.b.w.value, x)[1]
        if self.how == "cond":
            other = lambda model, x: (x, model.c(x))
            return nn.cond(x > 0, both, other, self, x)[1]
        if self.how == "remat in cond":
            return nn.cond(x > 0, nn.remat(both), lambda model, x: (x, model.c(x)), self, x)[1]
        return nn.scan(lambda model, x: (model, both(model, x)), self, x[None])[1][1][0]


@pytest.mark.parametrize("how", ["remat", "checkpoint", "cond", "remat in cond", "scan"])
def test_audit_sees_what_is_dropped_inside_of_a_transformed_function(how):
    model = Dropped(how).eval()
    report = nn.audit(model, jnp.asarray(1.0))
    with_c = how in ("cond", "remat in cond")
    assert report.unused == (["a.w"] if with_c else ["a.w", "c.w"])
    assert report.zero_grad == (["c.w"] if with_c else [])  # of the branch that did not run
    assert report.used == ["b.w"]


def test_audit_follows_a_parameter_through_the_carry_of_a_scan():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.asarray(2.0))

        def forward(self, x):
            # It enters the first of three carries, and the output is the last one, two steps later.
            step = lambda c, _: ((c[0] * 1.0, c[0], c[1]), None)
            return jax.lax.scan(step, (self.w.value, x, x), None, length=3)[0][2]

    report = nn.audit(Net(), jnp.asarray(1.0))
    assert report.used == ["w"]


OUTSIDE = nn.Linear(3, 3)


class Strange(nn.Module):
    """Uses layers and arrays in ways that register nothing."""

    def __init__(self, how):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.teacher = nn.Ref(OUTSIDE) if how == "referred" else nn.Linear(3, 3)
        self.scale = jnp.full(3, 2.0)
        self.unused = jnp.full(3, 3.0)
        self.steps = jnp.arange(3)
        self.how = how

    def forward(self, x):
        x = x[:, self.steps] + self.teacher(x)
        if self.how == "built":
            x = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))(nn.Linear(3, 3)(nn.ReLU()(x)))
        elif self.how == "outside":
            x = OUTSIDE(OUTSIDE(x))
        elif self.how == "constant":
            x = x * self.scale
        elif self.how == "hypernetwork, written":
            layer = nn.Linear(3, 3, bias=False)
            layer.weight.value = self.teacher.weight + 1
            x = layer(x)
        elif self.how == "hypernetwork, called":
            layer = nn.Linear(3, 3, bias=False)
            x = nn.functional_call(layer, {"weight": self.teacher.weight + 1}, (x,))
        elif self.how == "remat":
            x = nn.remat(lambda layer, x: layer(x))(self.teacher, x)
        return self.head(x)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("built", {"built": ["Linear(in_features=3, out_features=3, bias=True)", "Sequential"]}),
        ("outside", {"outside": ["Linear(in_features=3, out_features=3, bias=True)"]}),
        ("constant", {"constants": ["scale"]}),
        ("referred", {}),
        ("hypernetwork, written", {}),
        ("hypernetwork, called", {}),
        ("remat", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_audit_lists_what_the_call_uses_and_the_model_does_not_have(how, found):
    report = nn.audit(Strange(how), jnp.ones((2, 3)))
    lists = {name: getattr(report, name) for name in ("built", "outside", "constants")}
    assert lists == {"built": [], "outside": [], "constants": [], **found}
    assert report.ok == ("built" not in found)
    for names in found.values():
        assert ", ".join(names) in str(report)
        assert "<pre>" in report._repr_html_()
    with warnings.catch_warnings():  # the audit compiles nothing: what it read may change
        warnings.simplefilter("error")
        OUTSIDE.weight.value = OUTSIDE.weight + 1
