"""Implicit MAML learns to adapt, and its meta-gradient solves the damped equation of the paper."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import implicit_maml as example
import statefulnn as nn
from tests.quick import quickly

pytestmark = pytest.mark.compiled_with_care


def meta_gradient(damping, steps, meta, *task):
    return jax.grad(partial(example.task_loss, example.implicit(damping, steps)))(meta, *task)


def test_the_meta_gradient_solves_the_damped_system():
    @quickly
    def sides(meta, x, y, x_new, y_new):
        found = meta_gradient(example.DAMPING, 30, meta, x, y, x_new, y_new)
        p = example.descend(meta, meta, x, y)
        _, product = jax.jvp(jax.grad(lambda p: example.mse(p, x, y)), (p,), (found,))
        shift = example.PROXIMAL + example.DAMPING
        left = jax.tree.map(lambda hv, v: hv + shift * v, product, found)
        return left, jax.grad(example.mse)(p, x_new, y_new)

    meta = jax.tree.map(lambda p: p[0], example.starts(1))
    left, gradient = sides(meta, *example.sample_tasks(1))
    for name, value in gradient.items():
        right = example.PROXIMAL * value
        np.testing.assert_allclose(left[name], right, rtol=1e-3, atol=1e-3 * abs(right).max())


@pytest.mark.long
def test_without_damping_the_system_is_indefinite_and_says_so():
    meta = jax.tree.map(lambda p: p[0], example.starts(1))
    tasks = example.sample_tasks(1, 20)
    of_tasks = nn.jit(jax.vmap(partial(meta_gradient, 0.0, 5, meta)))
    with pytest.raises(nn.ConvergenceError, match=r"not positive definite[\s\S]*damping"):
        of_tasks(*tasks)


def test_a_short_run_learns_what_plain_training_cannot(capsys):
    options = ["--algorithm", "implicit MAML", "--steps", "200", "--lr", "3e-3", "--seeds", "1"]
    errors = example.main([*options, "--picture", "pictures/maml.png"])
    ((before, after),) = errors["implicit MAML"]
    assert after < 0.5 * before
    # One network for all tasks ends at about 3, and at 1.9 once adapted.
    assert after < 1.5 < errors["implicit MAML, untrained"].min()
    assert Path("pictures/maml.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "after adaptation" in capsys.readouterr().out


@pytest.mark.long
def test_three_seeds_beat_maml_and_plain_training(tmp_path):
    errors = example.main(["--picture", str(tmp_path / "maml.png")])
    implicit, maml, plain = (errors[name][:, 1] for name in ("implicit MAML", "MAML", "plain"))
    assert (implicit < 0.35).all()
    assert (implicit < 0.6 * maml).all() and (maml < 0.6 * plain).all()
