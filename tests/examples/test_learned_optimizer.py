"""The learned optimizer is a differentiable optax transformation, and beats tuned ones."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import learned_optimizer as example
import statefulnn as nn

pytestmark = pytest.mark.compiled_with_care


def some_theta(seed: int = 0) -> dict:
    nn.manual_seed(seed)
    return nn.functionalize(example.Rule())[1]


def one(tasks: tuple, i: int = 0) -> tuple:
    return jax.tree.map(lambda v: jnp.asarray(v[i]), tasks)


def test_targets_are_a_function_of_the_inputs_that_a_student_can_represent():
    start, x, y = example.sample_tasks(0, 50)
    assert x.shape == (50, 100, 16, 2) and y.shape == (50, 100, 16, 1)
    assert {name: v.shape[1:] for name, v in start.items()} == {
        "0.weight": (8, 2), "0.bias": (8,), "2.weight": (1, 8), "2.bias": (1,),
    }  # fmt: skip
    for points, values in zip(x, y, strict=True):
        _, where = np.unique(points.reshape(-1, 2), axis=0, return_inverse=True)
        assert where.max() < example.POINTS
        for point in range(0, where.max(), 7):
            assert np.ptp(values.reshape(-1)[where.ravel() == point]) == 0.0


def test_a_piece_after_a_piece_is_what_optax_does_step_by_step():
    theta, task = some_theta(), one(example.sample_tasks(0, 1))
    run = example.begin(task)
    piece = jax.jit(example.piece)
    first, run = piece(theta, run)
    second, run = piece(theta, run)
    tx, (params, x, y) = example.learned(theta), task
    slots, logs = tx.init(params), []
    step = jax.jit(jax.value_and_grad(lambda p, x, y: jnp.mean((example.student(p, x) - y) ** 2)))
    update = jax.jit(tx.update)
    for i in range(20):
        value, grads = step(params, x[i], y[i])
        updates, slots = update(grads, slots, params)
        params = optax.apply_updates(params, updates)
        logs.append(np.log(value + example.FLOOR))
    np.testing.assert_allclose([first, second], np.reshape(logs, (2, 10)).mean(1), rtol=1e-3)
    for name in params:
        np.testing.assert_allclose(run.params[name], params[name], rtol=1e-2, atol=1e-3)


def test_its_updates_do_not_depend_on_the_order_or_shape_of_the_parameters():
    tx = example.learned(some_theta())
    first_update = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    g = jnp.array([0.3, -2.0, 0.0, 1e-9, 5.0, 0.1])
    flat = first_update({"w": g})
    parts = {"a": g[3:].reshape(3, 1), "b": g[:3]}
    split = first_update(parts)
    np.testing.assert_allclose(flat["w"], np.r_[split["b"], split["a"][:, 0]], rtol=1e-5)
    assert np.isfinite(flat["w"]).all()


def test_pairs_that_are_through_start_again_and_others_go_on():
    tasks = jax.tree.map(lambda v: jnp.asarray(v[: example.PAIRS]), example.sample_tasks(0, 60))
    pes = nn.meta.pes_init(example.begin(one(tasks)), jnp.zeros(3), example.PAIRS)
    done = 50 * (1 + jnp.arange(2 * example.PAIRS) % 2)  # every other pair is at step 100
    pes = nn.meta.PES(pes.states._replace(done=done), pes.sums + 1.0)
    after = jax.jit(example.restart)(tasks, pes)
    np.testing.assert_array_equal(after.states.done, jnp.where(done == 100, 0, 50))
    np.testing.assert_array_equal(after.sums[:, 0], jnp.arange(example.PAIRS) % 2 == 0)
    np.testing.assert_array_equal(after.states.task[1][1], tasks[1][1])
    np.testing.assert_array_equal(after.states.task[1][example.PAIRS + 1], tasks[1][1])  # its twin
    np.testing.assert_array_equal(after.states.task[1][2], tasks[1][0])


def ratio(results: dict, ours: str, theirs: str) -> float:
    """How much lower the loss is over whole runs, by the geometric mean over tasks."""
    return 10 ** (results[theirs].mean() - results[ours].mean())


@pytest.mark.long
def test_evolution_finds_the_gradient_of_backpropagation_on_the_first_piece(monkeypatch):
    # At the first piece nothing is truncated yet; both see the same function of theta. Of 210 numbers
    # 300 pairs estimate the direction up to a cosine of about (1 + 210 / 300)^-1/2 = 0.77.
    monkeypatch.setattr(example, "SIGMA", 0.01)
    theta, as_dict = ravel_pytree(some_theta())
    pes = nn.meta.pes_init(example.begin(one(example.sample_tasks(0, 1))), theta, pairs=300)

    @jax.jit
    def both(theta, key):
        advance = lambda theta, run: example.piece(as_dict(theta), run)
        return [example.gradient(way, advance, theta, pes, key)[1] for way in ("pes", "truncated")]

    estimate, exact = map(np.asarray, both(theta, jax.random.key(0)))
    cosine = estimate @ exact / np.linalg.norm(estimate) / np.linalg.norm(exact)
    assert cosine > 0.6
    assert 0.7 < estimate @ exact / (exact @ exact) < 1.3


def test_a_short_run_beats_sgd_and_adam_on_new_tasks(capsys):
    results = example.main(["--gradient", "truncated", "--steps", "300", "--picture", "a/b.png"])
    ours = "learned, truncated"
    assert all(v.shape == (256, example.HORIZON) for v in results.values())
    assert all(np.isfinite(v).all() for v in results.values())
    # All start from the same weights.
    assert np.ptp([v[:, 0].mean() for v in results.values()]) < 1e-4
    assert ratio(results, ours, "SGD") > 1.5
    assert ratio(results, ours, "Adam") > 1.05
    assert f"{10 ** results[ours].mean():.4f}" in capsys.readouterr().out
    assert Path("a/b.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_runs_beat_adam_and_truncated_gradients_its_schedule_as_well(seed):
    results = example.main(["--seed", str(seed)])
    for way, margin in {"learned, pes": 1.05, "learned, truncated": 1.4}.items():
        assert ratio(results, way, "SGD") > 1.5
        assert ratio(results, way, "Adam") > margin
    assert ratio(results, "learned, truncated", "Adam, cosine") > 1.03
