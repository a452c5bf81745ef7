"""A gradient by copies of parameters, of a function that reads the module itself, is zero: that is said."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn

X = jnp.ones((4, 2))
TEACHER = nn.Linear(2, 1)
SAID = r"(?s)copies of parameters that the function never reads.*'weight' \(Parameter\).*nn\.grad\("


def loss(m, x=X):
    return (m(x) ** 2).sum()


def named(m):
    return dict(m.named_parameters())


WAYS = {
    "dict": (jax.grad, named),
    "list": (jax.grad, lambda m: list(m.parameters())),
    "one": (jax.grad, lambda m: m.weight),
    "value and gradient": (jax.value_and_grad, named),
    "vjp": (lambda f: lambda q: jax.vjp(f, q)[1](jnp.ones(())), named),
    "with more": (lambda f: jax.grad(lambda both: f(both[0]) * both[1]), lambda m: (named(m), 2.0)),
    "several": (lambda f: lambda q: jax.grad(lambda t, q: t * f(q), (0, 1))(2.0, q), named),
}


@pytest.mark.parametrize("way", WAYS)
def test_torch_s_idiom_with_a_captured_module_warns(way):
    model = nn.Linear(2, 1)
    derivative, arguments = WAYS[way]
    with pytest.warns(nn.UntrainedLeavesWarning, match=SAID) as said:
        derivative(lambda q: loss(model))(arguments(model))
    assert len(said) == 1
    assert said[0].filename == __file__


def test_a_jitted_loss_and_a_functional_one_of_the_captured_module_warn_too():
    model = nn.Linear(2, 1)
    for inner in (lambda: nn.jit(loss)(model), lambda: nn.functional_call(model, {}, X).sum()):
        with pytest.warns(nn.UntrainedLeavesWarning, match="never reads"):
            jax.grad(lambda q, inner=inner: inner())(named(model))


def anchored(model):
    """The copies and the module itself, which is where they started."""

    def f(q):
        start = sum(((q[n].value - p.value) ** 2).sum() for n, p in model.named_parameters())
        return start + (nn.functional_call(model, q, X) ** 2).sum()

    return f


HONEST = {
    "functional_call": lambda m: lambda q: nn.functional_call(m, q, X).sum(),
    "an anchor": anchored,
    "a frozen teacher": lambda m, t=TEACHER: (
        lambda q: ((nn.functional_call(m, q, X) - t(X)) ** 2).sum()
    ),
    "a penalty alone": lambda m: lambda q: sum((p.value**2).sum() for p in q.values()),
    "another model's copies": lambda m: lambda q: loss(TEACHER),
    "a part": lambda m: lambda q: nn.functional_call(m, {"weight": q["weight"]}, X).sum(),
}


@pytest.mark.parametrize("how", HONEST)
@pytest.mark.parametrize("derivative", [jax.grad, lambda f: jax.jit(jax.grad(f))])
def test_honest_programs_do_not_warn(how, derivative):
    model = nn.Linear(2, 1)
    grads = derivative(HONEST[how](model))(named(model))  # warnings are errors here
    assert set(grads) == {"weight", "bias"}


def test_a_function_that_failed_leaves_no_warning_behind():
    model = nn.Linear(2, 1)

    def failing(q):
        loss(model)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        jax.grad(failing)(named(model))
    moved = jax.tree.map(lambda p: p + 1, named(model))
    np.testing.assert_array_equal(moved["bias"].value, model.bias + 1)


def test_nested_gradients_are_told_apart():
    model = nn.Linear(2, 1)
    inner = lambda q: nn.functional_call(model, q, X).sum()
    outer = lambda q: sum((g.value**2).sum() for g in jax.grad(inner)(q).values())
    jax.grad(outer)(named(model))
    with pytest.warns(nn.UntrainedLeavesWarning, match="never reads"):
        jax.grad(lambda q: jax.grad(lambda t: t * loss(model))(2.0))(named(model))
