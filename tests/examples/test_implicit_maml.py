"""Implicit MAML learns to adapt, and its meta-gradient solves the damped equation of the paper."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicit_maml as example
from tests.quick import quickly


def one_task():
    """Return initial parameters, and a task of a large amplitude."""
    data = example.sample_tasks(jax.random.key(1), 20)
    largest = int(jnp.abs(data[1]).max((1, 2)).argmax())
    return jax.tree.map(lambda p: p[0], example.starts(1)), tuple(v[largest] for v in data)


def meta_gradient(damping, steps, meta, *task):
    return quickly(jax.grad(partial(example.task_loss, example.implicit(damping, steps))))(
        meta, *task
    )


def test_the_meta_gradient_solves_the_damped_system():
    meta, (x, y, x_new, y_new) = one_task()
    found = meta_gradient(example.DAMPING, 30, meta, x, y, x_new, y_new)

    @quickly
    def sides(meta, v):
        p = example.descend(meta, meta, x, y)
        _, hv = jax.jvp(jax.grad(lambda p: example.mse(p, x, y)), (p,), (v,))
        shift = example.PROXIMAL + example.DAMPING
        left = jax.tree.map(lambda hv, v: hv + shift * v, hv, v)
        g = jax.grad(example.mse)(p, x_new, y_new)
        return left, jax.tree.map(lambda g: example.PROXIMAL * g, g)

    left, right = sides(meta, found)
    for name, value in right.items():
        np.testing.assert_allclose(left[name], value, rtol=1e-3, atol=1e-3 * abs(value).max())


@pytest.mark.long
def test_without_damping_the_system_is_indefinite_and_says_so():
    meta, task = one_task()
    with pytest.raises(RuntimeError, match=r"not positive definite[\s\S]*damping"):
        meta_gradient(0.0, 5, meta, *task)


def test_a_short_run_learns_what_plain_training_cannot(capsys):
    options = ["--algorithm", "implicit MAML", "--steps", "200", "--lr", "3e-3", "--seeds", "1"]
    errors = example.main([*options, "--picture", "pictures/maml.png"])
    ((before, after),) = errors["implicit MAML"]
    assert after < 0.5 * before
    # One network for all tasks is far from it, even adapted: tasks have a variance of 4.2 in the mean.
    assert after < 1.5 < errors["implicit MAML, untrained"].min()
    assert Path("pictures/maml.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "after adaptation" in capsys.readouterr().out


@pytest.mark.long
def test_three_seeds_beat_maml_and_plain_training(tmp_path):
    errors = example.main(["--picture", str(tmp_path / "maml.png")])
    implicit, maml, plain = (errors[name][:, 1] for name in ("implicit MAML", "MAML", "plain"))
    assert (implicit < 0.35).all()
    assert (implicit < 0.6 * maml).all() and (maml < 0.6 * plain).all()
