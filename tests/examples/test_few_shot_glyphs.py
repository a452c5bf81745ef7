"""The glyphs example learns to adapt, under each policy of batch normalisation."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import few_shot_glyphs as few_shot
import statefulnn as nn

pytestmark = pytest.mark.compiled_with_care

CHANCE = 1 / few_shot.WAYS


def test_samples_of_a_class_are_more_alike_than_others_but_pixels_do_not_solve_a_task():
    rng = np.random.default_rng(0)
    glyphs = few_shot.draw_glyphs(rng, 40)
    chosen = few_shot.choose_tasks(rng, 40, 200)
    (x, y), (xq, yq) = few_shot.take(glyphs, chosen)
    assert x.shape == (200, 5, 1, 16, 16) and xq.shape == (200, 25, 1, 16, 16)
    x, xq = (np.asarray(v).reshape(*v.shape[:2], -1) for v in (x, xq))
    nearest = ((xq[:, :, None] - x[:, None]) ** 2).sum(-1).argmin(-1)  # labels are 0 to 4 in order
    assert 1.5 * CHANCE < (nearest == np.asarray(yq)).mean() < 0.55
    np.testing.assert_array_equal(y, np.tile(np.arange(5), (200, 1)))


def test_a_task_has_five_different_classes_and_judges_on_other_samples():
    chosen = few_shot.choose_tasks(np.random.default_rng(0), 20, 100)
    assert chosen.shape == (100, 5, 1 + 6)
    for task in chosen:
        assert len(set(task[:, 0])) == 5
        assert all(len(set(row[1:])) == 6 for row in task)


def test_images_are_taken_with_the_label_of_their_class():
    glyphs = 100 * jnp.arange(20)[:, None] + jnp.arange(few_shot.SAMPLES)
    glyphs = jnp.broadcast_to(glyphs[..., None, None, None], (20, few_shot.SAMPLES, 1, 2, 2))
    chosen = few_shot.choose_tasks(np.random.default_rng(0), 20, 3)
    (x, y), (xq, yq) = few_shot.take(glyphs, chosen)
    for images, labels in ((x, y), (xq, yq)):
        classes = np.asarray(images)[..., 0, 0, 0] // 100
        for task, where, label in zip(chosen, classes, np.asarray(labels), strict=True):
            np.testing.assert_array_equal(where, task[label, 0])


def test_frozen_statistics_are_those_of_the_training_glyphs_and_stay():
    glyphs = few_shot.draw_glyphs(np.random.default_rng(0), 10)
    learn, judge, (params, state) = few_shot.start("frozen", 0, glyphs)
    x = glyphs[:, :5].reshape(50, 1, 16, 16)
    nn.manual_seed(0)
    mean = np.asarray(few_shot.Net().conv1(x)).mean((0, 2, 3))
    np.testing.assert_allclose(state["norm1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    for fn in (learn, judge):
        _, after = fn(params, state, x)
        for name, value in state.items():
            np.testing.assert_array_equal(after[name], value)


def test_policies_differ_in_who_has_statistics():
    glyphs = few_shot.draw_glyphs(np.random.default_rng(0), 10)
    x, y = glyphs[:5, 0], jnp.arange(5)

    def run(policy, way):
        learn, judge, shared = few_shot.start(policy, 0, glyphs)
        task = lambda shared, data: few_shot.one_task(learn, judge, shared, data, data)
        return way(task)(shared, (x, y))[1][1]

    shapes = lambda task: lambda *args: jax.eval_shape(task, *args)
    assert run("batch only", shapes) == {}
    assert run("per task", shapes)["norm1.running_mean"].shape == (16,)
    rows = run("per step", jax.jit)["norm1.running_mean"].rows
    assert rows.shape == (few_shot.INNER_STEPS, 16)
    # Momentum 0.1 from zero: the first step's row is a tenth of the mean of its own activations.
    nn.manual_seed(0)
    mean = np.asarray(few_shot.Net().conv1(x)).mean((0, 2, 3))
    np.testing.assert_allclose(rows[0], 0.1 * mean, rtol=1e-4, atol=1e-5)
    # The weights move in between, so the next step sees other activations.
    assert np.abs(rows[0] - rows[1]).max() > 1e-4


def test_a_short_run_learns_to_adapt_and_shows_the_error_without_a_policy(capsys):
    scores = few_shot.main(
        ["--policy", "batch only", "--steps", "100", "--tasks", "200", "--picture", "a/b.png"]
    )
    untrained, trained = (scores[name].mean() for name in ("batch only, untrained", "batch only"))
    assert 1.25 * CHANCE < untrained < 0.4
    assert trained > untrained + 0.07
    printed = capsys.readouterr().out
    assert "wrote to 'norm1.running_mean'" in printed and "with_batch_norm" in printed
    assert f"{100 * trained:.1f}" in printed and f"{100 * untrained:.1f}" in printed
    assert Path("a/b.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.long
@pytest.mark.parametrize("seed", [0])
def test_every_policy_learns_to_adapt_in_the_full_run(seed):
    scores = few_shot.main(["--seed", str(seed)])
    mean = {name: score.mean() for name, score in scores.items()}
    for policy in few_shot.POLICIES:
        assert mean[f"{policy}, untrained"] < 0.4
        assert mean[policy] > mean[f"{policy}, untrained"] + 0.1
    assert mean["batch only"] > 0.5
