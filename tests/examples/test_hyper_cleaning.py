"""Hyper-cleaning finds wrong labels, and its gradient through one inner step is the formula."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyper_cleaning as example


def check(numbers: dict[str, float]) -> None:
    assert numbers["AUC"] >= 0.93  # by chance: 0.5
    for part in ("validation", "test"):
        assert numbers[f"learned, {part}"] >= numbers[f"all alike, {part}"] + 0.015


def test_learned_weights_tell_wrong_labels_and_raise_the_accuracy(capsys):
    check(example.main(["--steps", "50", "--picture", "pictures/cleaning.png"]))
    assert Path("pictures/cleaning.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "oracle" in capsys.readouterr().out


def test_the_gradient_through_one_step_is_the_formula():
    data = example.load_data(0.5, seed=3)
    (x, y), (xv, yv) = (map(np.asarray, part) for part in (data.train, data.valid))
    logits = np.linspace(-2, 2, len(y), dtype="f")
    weights = 1 / (1 + np.exp(-logits))
    # The parameters start at zero, where each class has the probability 0.1 and the penalty no slope.
    cotangents = (0.1 - np.eye(10)[y]) / len(y)
    moved = -example.INNER_LR * (weights[:, None] * cotangents)
    out = xv @ (moved.T @ x).T + moved.sum(0)
    proba = np.exp(out) / np.exp(out).sum(1, keepdims=True)
    back = (proba - np.eye(10)[yv]) / len(yv)
    along = x @ (back.T @ xv).T + back.sum(0)  # of each example, how its step changes the loss
    formula = -example.INNER_LR * weights * (1 - weights) * (cotangents * along).sum(1)
    gradient = jax.jit(jax.grad(example.outer_loss), static_argnums=3)
    grads = gradient(jnp.asarray(logits), data.train, data.valid, 1)
    np.testing.assert_allclose(grads, formula, rtol=1e-4, atol=1e-6 * abs(formula).max())


def test_as_many_labels_are_wrong_as_asked_for_and_no_right_one_is_changed():
    noisy, right = example.load_data(0.4, seed=0), example.load_data(0.0, seed=0)
    changed = np.asarray(noisy.train[1] != right.train[1])
    np.testing.assert_array_equal(changed, noisy.wrong)
    assert noisy.wrong.sum() == round(0.4 * len(changed))
    np.testing.assert_array_equal(noisy.test[1], right.test[1])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_numbers_do_not_hang_on_the_seed(seed, tmp_path):
    check(example.main(["--seed", str(seed), "--picture", str(tmp_path / "cleaning.png")]))
