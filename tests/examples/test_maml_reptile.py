"""MAML and Reptile both prepare for new tasks, by gradients that finite differences and formulas give."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import maml_reptile as example
import statefulnn.functional as F

# y = A sin(x - phase): the best guess that knows x and not the task is the mean over tasks,
# E[A] E[sin(x - phase)] = -(2 / pi) E[A] cos x, whose error is E[A^2] / 2 - E[that^2].
MEAN, SQUARE = (0.1 + 5) / 2, (5**3 - 0.1**3) / (3 * 4.9)
COS_SQUARE = 0.5 + np.sin(10) / 20
WITHOUT_THE_POINTS = SQUARE / 2 - (2 / np.pi * MEAN) ** 2 * COS_SQUARE


@pytest.mark.long
def test_both_beat_the_best_guess_without_points(capsys):
    scores = example.main(["--steps", "300", "--picture", "pictures/maml.png"])
    assert scores["MAML"] < WITHOUT_THE_POINTS / 2 and scores["Reptile"] < WITHOUT_THE_POINTS / 2
    assert scores["not meta-trained"] > scores["Reptile"]
    assert Path("pictures/maml.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"MAML: error {scores['MAML']:.2f}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_at_full_length_hardly_any_error_is_left(seed):
    scores = example.main(["--seed", str(seed)])
    assert max(scores["MAML"], scores["Reptile"]) < WITHOUT_THE_POINTS / 5


def test_the_guess_without_points_is_the_best_one():
    x, y = example.sample_tasks(np.random.default_rng(0), 20_000, 10)
    guess = -2 / np.pi * MEAN * np.cos(x)
    assert ((y - guess) ** 2).mean() == pytest.approx(WITHOUT_THE_POINTS, rel=0.03)


def test_adapting_is_gradient_descent():
    x, y = (a[0] for a in example.sample_tasks(np.random.default_rng(0), 1, 10))
    expected = example.initial
    loss = lambda params: F.mse_loss(example.fn(params, x), y)
    for _ in range(example.INNER_STEPS):
        grads = jax.grad(loss)(expected)
        expected = jax.tree.map(lambda p, g: p - example.INNER_LR * g, expected, grads)
    found = example.adapted(example.initial, x, y)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_reptiles_gradient_is_the_mean_way_back():
    tasks = example.sample_tasks(np.random.default_rng(0), 3, 20)
    ends = [example.adapted(example.initial, x, y) for x, y in zip(*tasks, strict=True)]
    found = example.reptile_gradient(example.initial, *tasks)
    for name, value in example.initial.items():
        expected = value - np.mean([end[name] for end in ends], 0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
