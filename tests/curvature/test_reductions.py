"""Losses of a batch that are no mean of examples, and numbers that an operator or a fit cannot take.

The oracles are dense Hessians of the whole loss, and formulas in double precision.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.errors import DtypeError, ReductionError
from tests.quick import diagonal, first, quickly

WEIGHTS = jnp.array([0.2, 5.0, 1.0])
weighted = functools.partial(F.cross_entropy, weight=WEIGHTS)
summed = functools.partial(F.cross_entropy, reduction="sum")
X = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 0, 1, 2])
IGNORED = np.where(np.arange(7) == 3, -100, Y)


def model(zero=False):
    nn.manual_seed(0)
    linear = nn.Linear(2, 3)
    if zero:  # all examples have one loss, but not one gradient
        linear.weight.value = jnp.zeros((3, 2))
        linear.bias.value = jnp.zeros(3)
    return linear


def dense(m, loss, y):
    fn, params = nn.functionalize(m)
    names = [name for name, _ in m.named_parameters()]
    blocks = quickly(jax.hessian(lambda p: loss(fn(p, X), y)))(params)
    rows = [
        np.concatenate([np.reshape(blocks[a][b], (params[a].size, -1)) for b in names], 1)
        for a in names
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize("zero, size", diagonal(2, [False, True], [3, 1]))
def test_a_loss_that_weights_its_classes_is_not_put_together_from_batches(zero, size):
    m = model(zero)
    want = dense(m, weighted, Y)
    for make in (curvature.hessian, curvature.ggn):
        with pytest.raises(ReductionError, match="the mean of the losses") as met:
            make(m, weighted, (X, Y), batch_size=size)
        assert "batch_size=None" in str(met.value)
        # Both ways out that the message names.
        np.testing.assert_allclose(make(m, weighted, (X, Y)).to_dense(), want, atol=1e-6)
        total = functools.partial(weighted, reduction="sum")
        A = make(m, total, (X, Y), batch_size=size, reduction="sum")
        got = (1 / WEIGHTS[Y].sum()) * A
        np.testing.assert_allclose(got.to_dense(), want, atol=1e-6)


def test_labels_that_do_not_count_and_another_reduction_are_noticed():
    m = model()
    for loss, y, reduction in (
        (F.cross_entropy, IGNORED, "mean"),
        (summed, Y, "mean"),
        (F.cross_entropy, Y, "sum"),
    ):
        options: dict[str, Any] = {"reduction": reduction}
        with pytest.raises(ReductionError, match="hessian was given a loss"):
            curvature.hessian(m, loss, (X, y), batch_size=3, **options)
        with pytest.raises(ReductionError, match="kfac was given a loss"):
            curvature.kfac(m, loss, (X, y), **options)
    compiled = nn.jit(lambda m, v: curvature.hessian(m, summed, (X, Y), batch_size=3) @ v)
    with pytest.raises(ReductionError, match="hessian was given a loss"):
        compiled(m, jnp.ones(9))
    A = curvature.hessian(m, summed, (X, IGNORED), batch_size=3, reduction="sum")
    np.testing.assert_allclose(A.to_dense(), dense(m, summed, IGNORED), atol=1e-5)


@pytest.mark.parametrize("size", first(2, [3, 6, 1, 2]))
def test_one_example_of_another_weight_is_noticed_in_whatever_batch_it_is(size):
    for odd in (0, 6):
        labels = np.where(np.arange(7) == odd, 1, 0)
        with pytest.raises(ReductionError):
            curvature.ggn(model(), weighted, (X, labels), batch_size=size)
    # Equal weights cancel.
    A = curvature.ggn(model(), weighted, (X, np.zeros(7, int)), batch_size=size)
    want = dense(model(), F.cross_entropy, np.zeros(7, int))
    np.testing.assert_allclose(A.to_dense(), want, atol=1e-6)


def test_a_weighted_mean_over_a_perfect_fit_is_noticed():
    x, w = jnp.eye(4), jnp.array([1.0, 1.0, 5.0, 9.0])
    m = nn.Linear(4, 1)
    loss = lambda out, y: jnp.sum(y[1] * (out[:, 0] - y[0]) ** 2) / jnp.sum(y[1])
    with pytest.raises(ReductionError):
        curvature.ggn(m, loss, (x, (m(x)[:, 0], w)), batch_size=2)


def test_functions_of_single_examples_refuse_what_no_example_has():
    for loss, y in ((F.cross_entropy, IGNORED), (weighted, Y)):
        with pytest.raises(ReductionError, match="empirical_fisher was given a loss"):
            curvature.empirical_fisher(model(), loss, (X, y))
        for train, test in ((y, Y), (Y, y)):
            with pytest.raises(ReductionError, match="leave out the examples") as met:
                curvature.influence(model(), loss, (X, train), (X, test), damping=0.1)
            assert "influence was given" in str(met.value)
            assert "reduction=" not in str(met.value)


def test_an_operator_takes_no_complex_number():
    A = curvature.hessian(model(), F.cross_entropy, (X, Y))
    K = curvature.kfac(model(), F.cross_entropy, (X, Y))
    c: Any = 1j
    for bad in (lambda: A * c, lambda: c * A, lambda: A.damped(c), lambda: K.damped(c)):
        with pytest.raises(DtypeError, match="complex"):
            bad()
    with pytest.raises(DtypeError, match="complex"):
        jax.jit(lambda A, c: A * c)(A, c)


def test_a_classification_has_no_noise_and_a_rank_is_a_whole_number():
    fit = functools.partial(curvature.Laplace.fit, model(), X, Y, likelihood="classification")
    assert float(fit(sigma=1.0).sigma) == 1
    with pytest.raises(ValueError, match=r"sigma=0\.5 for a classification"):
        fit(sigma=0.5)
    wrong: tuple[Any, ...] = (2.5, 0, True)
    for rank in wrong:
        with pytest.raises(ValueError, match="rank="):
            fit(structure="lowrank", rank=rank)


@pytest.mark.parametrize("scale", first(3, [1e-30, 1.0, 1e36, 1e-22, 1e25]))
def test_the_noise_scale_does_not_depend_on_the_scale_of_the_gradients(scale):
    g = 1 + np.random.default_rng(0).normal(size=(6, 5))
    trace = g.var(0, ddof=1).sum()
    want = trace / ((g.mean(0) ** 2).sum() - trace / 6)
    scaled = {"a": jnp.asarray(scale * g[:, :3], jnp.float32), "b": jnp.asarray(scale * g[:, 3:])}
    scaled["b"] = scaled["b"].astype(jnp.float32)
    got = curvature.gradient_noise_scale(scaled)
    np.testing.assert_allclose(got.noise_scale, want, rtol=1e-5)
    if scale == 1.0:
        np.testing.assert_allclose(got.trace, trace, rtol=1e-5)

    # In blocks of different sizes of numbers, which are put into one unit.
    fn = lambda p, row: jnp.vdot(p, row, precision="highest")
    rows = jnp.concatenate([scaled["a"], scaled["b"]], 1)
    of = quickly(lambda p, rows: curvature.noise_scale_of(fn, p, rows, batch_size=2))
    blocks = of(jnp.zeros(5, jnp.float32), rows)
    np.testing.assert_allclose(blocks.noise_scale, want, rtol=1e-5)


def test_a_block_of_small_gradients_beside_large_ones_counts():
    g = np.array([[1e-20], [2e-20], [3.0], [4.0]], np.float32)
    of = quickly(lambda p, g: curvature.noise_scale_of(lambda p, g: p @ g, p, g, batch_size=2))
    got = of(jnp.zeros(1), jnp.asarray(g))
    mean, trace = g.mean(), g.var(ddof=1)
    np.testing.assert_allclose(got.trace, trace, rtol=1e-5)
    np.testing.assert_allclose(got.gradient_squared, mean**2 - trace / 4, rtol=1e-4)
