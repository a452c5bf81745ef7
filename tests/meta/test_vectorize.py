"""Tasks side by side, one after the other and in chunks give the same numbers, in all derivatives."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from tests.quick import diagonal, first, quickly

WAYS = ["vmap", "loop", 2, "auto"]
PARAMS = {"a": jnp.arange(1.0, 4.0), "b": jnp.asarray([0.5])}
X = jnp.linspace(-1.0, 1.0, 15).reshape(5, 3)
COUNTS = jnp.arange(5.0)


def number(p: dict, x: Any, n: Any) -> Any:
    return jnp.sin(p["a"] * x).sum() * p["b"][0] + n * p["b"][0] ** 2


def several(p: dict, x: Any, n: Any) -> Any:
    return {"v": jnp.sin(p["a"] * x), "w": p["b"] * n}


def total(task: Callable, vectorize: Any, **options: Any) -> Callable:
    run = nn.meta.over_tasks(task, reduce=None, vectorize=vectorize, **options)
    return lambda p, x: sum((leaf**2).sum() for leaf in jax.tree.leaves(run(p, x, COUNTS)))


DERIVATIVES = {
    "value": lambda f: f(PARAMS, X),
    "gradient by both": lambda f: jax.grad(f, (0, 1))(PARAMS, X),
    "compiled": lambda f: jax.jit(jax.value_and_grad(f))(PARAMS, X),
    "forward": lambda f: jax.jvp(f, (PARAMS, X), (PARAMS, X)),
    "hessian": lambda f: jax.jit(jax.hessian(f))(PARAMS, X),
    "reverse over reverse": lambda f: jax.jit(jax.jacrev(jax.grad(f)))(PARAMS, X),
    "under vmap": lambda f: jax.vmap(jax.grad(f), (None, 0))(PARAMS, jnp.stack([X, 2 * X])),
}


@pytest.mark.parametrize(
    "way, task, derivative", diagonal(3, ["loop", 2], [number, several], list(DERIVATIVES))
)
def test_each_way_gives_the_sum_over_tasks(way, task, derivative):
    def by_hand(p: Any, x: Any) -> Any:
        outs = [task(p, x[i], COUNTS[i]) for i in range(5)]
        return sum((leaf**2).sum() for out in outs for leaf in jax.tree.leaves(out))

    found = DERIVATIVES[derivative](total(task, way))
    expected = quickly(lambda: DERIVATIVES[derivative](by_hand))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", first(3, WAYS))  # the last is one of the others, by its task
def test_what_comes_beside_a_result_has_gradients_too(way):
    def task(p: Any, x: Any, n: Any) -> Any:
        return number(p, x, n), {"seen": (p["a"] * x).sum(), "n": n.astype(int)}

    run = nn.meta.over_tasks(task, has_aux=True, vectorize=way)

    def loss(p: Any) -> Any:
        value, aux = run(p, X, COUNTS)
        return value + aux["seen"].sum(), aux["n"]

    def by_hand(p: Any) -> Any:
        return sum(number(p, X[i], COUNTS[i]) for i in range(5)) / 5 + (p["a"] * X).sum()

    found, numbers = quickly(jax.grad(loss, has_aux=True))(PARAMS)
    expected = quickly(jax.grad(by_hand))(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(
            np.asarray(found[name]), np.asarray(expected[name]), rtol=1e-5, atol=1e-6
        )
    assert numbers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("way", first(3, WAYS))  # the last is one of the others, by its task
def test_what_a_task_closes_over_is_differentiated(way):
    def loss(rate: Any) -> Any:
        def task(p: Any, x: Any) -> Any:
            out = nn.meta.adapt(None, p, lambda p, x: (p * x).sum() ** 2, (x,), lr=rate, steps=2)
            return (out.params**2).sum()

        return nn.meta.over_tasks(task, vectorize=way)(PARAMS["a"], X)

    both, step = quickly(jax.value_and_grad(loss)), 1e-3
    numeric = (both(0.05 + step)[0] - both(0.05 - step)[0]) / (2 * step)
    np.testing.assert_allclose(float(both(0.05)[1]), float(numeric), rtol=2e-3)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_each_way_gives_tasks_the_same_numbers(randomness):
    def task(p: Any, x: Any, rng: Any) -> Any:
        return (p["a"] * x * jax.random.normal(rng, (3,))).sum()

    outs = [
        nn.meta.over_tasks(task, reduce=None, randomness=randomness, vectorize=way)(
            PARAMS, X, rng=jax.random.key(3)
        )
        for way in WAYS
    ]
    for out in outs[1:]:
        np.testing.assert_allclose(np.asarray(out), np.asarray(outs[0]), rtol=1e-6)


def convolving(vectorize: Any) -> tuple[Callable, Any, tuple]:
    """Return the loss of two tasks that adapt a convolution, its parameters and data."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    rng = np.random.default_rng(0)
    bound = lambda shape: rng.uniform(-0.3, 0.3, shape).astype(np.float32)
    model.load_state_dict({k: bound(v.shape) for k, v in model.state_dict().items()})
    fn, params = nn.functionalize(model)

    def one(params: Any, x: Any, y: Any) -> Any:
        out = nn.meta.adapt(fn, params, F.cross_entropy, (x, y), lr=0.1)
        return F.cross_entropy(fn(out.params, x), y)

    data = rng.standard_normal((2, 4, 1, 6, 6)).astype(np.float32), rng.integers(0, 2, (2, 4))
    return nn.meta.over_tasks(one, vectorize=vectorize), params, data


def test_tasks_that_convolve_are_a_loop_on_one_cpu_and_give_the_same_gradients():
    found = {}
    for way in ("auto", "vmap"):
        loss, params, data = convolving(way)
        compiled = jax.jit(jax.grad(loss)).lower(params, *data).compile()
        found[way] = compiled(params, *data)
        turns = re.findall(r'known_trip_count":\{"n":"(\d+)"', compiled.as_text())
        assert ("2" in turns) == (way == "auto" and jax.device_count() == 1)
        assert " convolution(" not in compiled.as_text()
    for name, value in found["vmap"].items():
        np.testing.assert_allclose(np.asarray(found["auto"][name]), np.asarray(value), atol=1e-5)


@pytest.mark.parametrize("way", first(1, ["loop", 2]))
def test_the_memory_of_a_loop_is_that_of_its_turn(way):
    def temporary(way: Any, tasks: int) -> int:
        loss, params, (x, y) = convolving(way)
        data = np.repeat(x, tasks, 0), np.repeat(y, tasks, 0)
        compiled = jax.jit(jax.grad(loss)).lower(params, *data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(way, 2), temporary(way, 16)
    gradients = 4 * 28 * sum(v.size for v in jax.tree.leaves(convolving(way)[1]))
    assert many - few <= 2 * gradients + 4 * 32 * 200  # and the labels, results ... of each task


@pytest.mark.parametrize("way", ["loop", 2])
def test_a_gradient_that_is_not_finite_is_reported_with_its_task(way):
    run = nn.meta.over_tasks(lambda p, x: jnp.sqrt((p * x) ** 2).sum(), vectorize=way)
    x = jnp.arange(1.0, 16.0).reshape(5, 3)
    gradient = jax.jit(jax.grad(run))
    with pytest.warns(nn.DivergenceWarning, match=r"task 3 of 5 diverged: the gradient by shared"):
        jax.block_until_ready(gradient(jnp.ones(3), x.at[3].set(0.0)))
        jax.effects_barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.block_until_ready(gradient(jnp.ones(3), x))
        jax.effects_barrier()


@pytest.mark.parametrize("wrong", ["side by side", 0, -1, 1.5])
def test_another_way_is_refused(wrong):
    with pytest.raises(ValueError, match="vectorize"):
        nn.meta.over_tasks(number, vectorize=wrong)
