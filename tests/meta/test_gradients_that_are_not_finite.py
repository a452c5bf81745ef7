"""Optimizers without a derivative, and gradients that are not finite: each is said, with its names."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
import statefulnn.functional as F
from tests.quick import diagonal, quickly

FN, PARAMS = nn.functionalize(nn.Linear(3, 1))
DATA = jnp.ones((5, 3)), jnp.ones((5, 1))


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax relies on JAX's own promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def adapted(optimizer, steps, **options):
    return nn.meta.adapt(FN, PARAMS, F.mse_loss, DATA, optimizer=optimizer, steps=steps, **options)


def delayed(transformation, steps):
    """Start a transformation after some steps."""
    started = optax.schedules.join_schedules([lambda _: 0.0, lambda _: 1.0], [steps])
    return optax.chain(transformation, optax.scale_by_schedule(started))


# --------------------------------------------------------------------------------------------------
# An optimizer is tried for as many steps as the loop takes


LATE = {
    "warm-up": optax.sgd(optax.linear_schedule(0.0, 0.1, 3)),
    "warm-up of adamw": optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6), eps_root=1e-8
    ),
    "delayed": delayed(optax.sgd(0.1), 4),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation(),
    "no steps at all": optax.sgd(0.0),
}


@pytest.mark.parametrize("name, steps", diagonal(2, list(LATE), [2, 6]))
def test_first_steps_of_zero_say_nothing_about_the_derivative(name, steps):
    assert jnp.isfinite(adapted(LATE[name], steps).params["weight"]).all()


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (optax.MultiSteps(optax.sign_sgd(0.1), 3).gradient_transformation(), "zero everywhere"),
        (delayed(optax.sign_sgd(0.1), 4), "zero everywhere"),
        (delayed(optax.adam(0.1), 4), "not finite"),
    ],
    ids=["MultiSteps of signs", "delayed signs", "delayed adam"],
)
def test_what_has_no_derivative_is_found_in_later_steps_too(optimizer, message):
    with pytest.raises(nn.NotDifferentiableError, match=message):
        adapted(optimizer, 6)


TRACED = {
    "adam": (optax.adam, "not finite"),
    "rmsprop": (lambda rate: optax.rmsprop(rate, eps=0.0), "not finite"),
    "b1": (lambda rate: optax.adam(0.1, b1=rate), "not finite"),
    "eps": (lambda rate: optax.adam(0.1, eps=rate), "not finite"),
    "sign_sgd": (optax.sign_sgd, "zero everywhere"),
}
WRAPS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "grad": jax.grad,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
}


@pytest.mark.parametrize("name, wrap", diagonal(4, list(TRACED), list(WRAPS)))
def test_an_optimizer_with_a_traced_hyperparameter_is_tried_as_well(name, wrap):
    make, message = TRACED[name]
    with pytest.raises(nn.NotDifferentiableError, match=message):
        WRAPS[wrap](lambda rate: adapted(make(rate), 3).losses[-1])(jnp.asarray(0.1))


@pytest.mark.parametrize(
    "make", [optax.sgd, nn.meta.adam, lambda r: optax.adam(0.1, b2=r, eps_root=1e-8)]
)
def test_a_smooth_one_with_a_traced_hyperparameter_passes(make):
    value = lambda rate: adapted(make(rate), 3).losses[-1]
    both, h = quickly(jax.value_and_grad(value)), 1e-2
    expected = (both(0.3 + h)[0] - both(0.3 - h)[0]) / (2 * h)
    np.testing.assert_allclose(both(0.3)[1], expected, rtol=0.05, atol=1e-4)


def test_an_optimizer_of_a_trace_is_not_kept_alive():
    with jax.checking_leaks():
        jax.jit(lambda rate: adapted(optax.sgd(rate), 2).losses[-1])(0.1)


def of_shapes(rule, of_bias=lambda g: -0.1 * g):
    """An optimizer that needs the parameters' own shapes: those of ``nn.Linear(3, 2)``."""

    def update(grads, state, params=None):
        assert grads["weight"].shape == (2, 3) and grads["bias"].shape == (2,)
        return {"weight": rule(grads["weight"]), "bias": of_bias(grads["bias"])}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def through(optimizer, first_order=False):
    """The gradient of the loss after two inner steps, by the parameters at the start."""
    fn, params = nn.functionalize(nn.Linear(3, 2))
    x, y = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), jnp.ones((4, 2))
    value = lambda out, target: jnp.mean((out - target) ** 2)

    def loss(params):
        adapted = nn.meta.adapt(
            fn, params, value, (x, y), optimizer=optimizer, steps=2, first_order=first_order
        )
        return value(fn(adapted.params, x), y)

    return loss, params


@pytest.mark.parametrize(
    "rule, message",
    [
        (lambda g: -0.1 * jnp.sign(g), "zero everywhere"),
        (lambda g: -0.1 * jnp.sqrt(jnp.abs(g)), "not finite"),
    ],
    ids=["signs", "roots"],
)
def test_an_optimizer_that_needs_the_shapes_is_tried_in_them(rule, message):
    loss, params = through(of_shapes(rule, rule))
    with pytest.raises(nn.NotDifferentiableError, match=message):
        jax.grad(loss)(params)
    loss, params = through(of_shapes(rule, rule), first_order=True)
    for name, gradient in jax.grad(loss)(params).items():
        assert jnp.isfinite(gradient).all(), name


@pytest.mark.parametrize(
    "rule",
    [
        lambda g: -0.1 * (g - g.mean(1, keepdims=True)),
        lambda g: -0.1 * g / jnp.sqrt((g**2).sum() + 1e-3),
    ],
    ids=["centred", "of one length"],
)
def test_a_smooth_optimizer_that_needs_the_shapes_passes(rule):
    loss, params = through(of_shapes(rule))
    grads, h = jax.grad(loss)(params), 1e-2
    for name, i in (("weight", (1, 2)), ("bias", (0,))):
        moved = [loss({**params, name: params[name].at[i].add(s)}) for s in (h, -h)]
        np.testing.assert_allclose(grads[name][i], (moved[0] - moved[1]) / (2 * h), atol=1e-3)


def test_an_error_of_the_user_s_optimizer_comes_out_with_a_note():
    def broken_update(grads, state, params=None):
        raise KeyError("missing")

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), broken_update)
    loss, params = through(optimizer)
    with pytest.raises(KeyError, match="missing") as caught:
        loss(params)
    assert "broken_update" in caught.value.__notes__[0]


# --------------------------------------------------------------------------------------------------
# Gradients on their way back


def root(shared, x):
    """Finite at zero; its derivative by w is not."""
    return jnp.sqrt(shared["w"] * x).sum() + (shared["b"] ** 2).sum()


def adapted_root(shared, x):
    """Of an inner loss whose second derivative is 0 / 0 where x is zero, and whose gradient is zero."""
    inner = lambda w, x: ((w * x) ** 1.5).sum()
    out = nn.meta.adapt(None, shared["w"], inner, (x,), lr=0.1, steps=2)
    return out.params.sum() + (shared["b"] ** 2).sum()


SHARED = {"w": jnp.ones(2), "b": jnp.ones(3)}
TASKS = jnp.ones((4, 2)).at[2, 1].set(0.0)  # of which one touches the singular point
WAYS = {
    "eager": lambda f: f,
    "jax.jit": jax.jit,
    "nn.jit": nn.jit,
    "nn.meta.loop": lambda f: lambda s: nn.meta.loop(lambda c, _: (c, f(c)), s, length=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_not_finite_is_reported_with_task_and_name(way):
    gradient = WAYS[way](jax.grad(lambda s: nn.meta.over_tasks(adapted_root)(s, TASKS)))
    message = r"(?s)task 2 of 4 diverged: the gradient by shared\['w'\] is not finite.*Instead"
    with pytest.warns(nn.DivergenceWarning, match=message) as said:
        gradient(SHARED)
        jax.effects_barrier()
    assert len(said) == 1


def steps_of_python(shared, x):
    """As `adapted_root`, without `adapt`."""
    w = shared["w"]
    for _ in range(2):
        w = w - 0.1 * jax.grad(lambda w: ((w * x) ** 1.5).sum())(w)
    return w.sum() + (shared["b"] ** 2).sum()


def steps_of_scan(shared, x):
    step = lambda w, _: (w - 0.1 * jax.grad(lambda w: ((w * x) ** 1.5).sum())(w), None)
    return jax.lax.scan(step, shared["w"], length=2)[0].sum() + (shared["b"] ** 2).sum()


@pytest.mark.parametrize("task", [root, steps_of_python, steps_of_scan])
def test_without_adapt_the_way_to_learn_the_task_is_told_and_tells_it(task):
    gradient = lambda how: jax.jit(jax.grad(nn.meta.over_tasks(task, vectorize=how)))
    for how, who in (
        ("vmap", r"one of 4 tasks .* by shared\['w'\] is not(.|\n)*vectorize='loop'"),
        ("loop", r"task 2 of 4 .* by shared\['w'\] is not"),
    ):
        with pytest.warns(nn.DivergenceWarning, match=who):
            gradient(how)(SHARED, TASKS)
            jax.effects_barrier()


def test_a_result_that_is_not_finite_is_told_alone_with_its_inner_step():
    def one(w, x):
        loss = lambda v: (w * v) ** 4
        return loss(nn.meta.adapt(None, x, loss, (), lr=0.5, steps=8).params)

    # x <- x - 2 x^3 in float32: from 50 beyond 1e38 at the fourth step.
    losses, x = [], np.float64(50.0)
    while x**4 < np.finfo(np.float32).max:
        losses, x = [*losses, x**4], x - 2 * x**3
    message = (
        rf"tasks 1, 3 of 4 diverged.*not finite, nor is its inner loss from step {len(losses)} on"
    )
    with pytest.warns(nn.DivergenceWarning, match=message) as said:
        jax.jit(jax.grad(nn.meta.over_tasks(one)))(1.0, jnp.array([0.1, 50.0, 0.2, 0.6e2]))
        jax.effects_barrier()
    assert len(said) == 1


def test_finite_gradients_are_silent_and_those_of_the_mean():
    tasks = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)) + 0.1
    loss = lambda s, x: root(s, x)
    by_hand = lambda s: sum(loss(s, x) for x in tasks) / 4
    for derivative in (jax.grad, jax.hessian, jax.jacfwd, lambda f: jax.jacrev(jax.grad(f))):
        found = quickly(derivative(lambda s: nn.meta.over_tasks(loss)(s, tasks)))(SHARED)
        expected = quickly(derivative(by_hand))(SHARED)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_what_is_not_differentiated_is_not_looked_at():
    # The gradient by "w" is infinite, but nobody asks for it.
    def loss(b):
        return nn.meta.over_tasks(root)({"w": jnp.ones(2), "b": b}, TASKS)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wrap in (jax.grad, lambda f: jax.jit(jax.grad(f))):
            np.testing.assert_allclose(wrap(loss)(jnp.ones(3)), 2.0)
            jax.effects_barrier()
        gradient = jax.jit(
            lambda s: jax.grad(lambda b: nn.meta.over_tasks(root)({**s, "b": b}, TASKS))(s["b"])
        )
        np.testing.assert_allclose(gradient(SHARED), 2.0)
        jax.effects_barrier()


def test_report_false_looks_at_no_gradient():
    text = lambda report: str(
        jax.make_jaxpr(jax.grad(lambda s: nn.meta.over_tasks(root, report=report)(s, TASKS)))(
            SHARED
        )
    )
    assert "callback" in text(True)
    assert "callback" not in text(False)
