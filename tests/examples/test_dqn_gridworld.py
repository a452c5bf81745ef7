"""Deep Q-learning finds the goal on slippery ice; what cells are worth is what walks bring."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import optax
import pytest

import dqn_gridworld as example
import statefulnn as nn


@pytest.mark.long
def test_it_learns_a_policy_near_the_best(capsys):
    means = example.main(["--steps", "800", "--picture", "pictures/grid.png"])
    assert means["DQN"] > 0.5 * means["value iteration"]
    assert Path("pictures/grid.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"DQN: a free cell is worth {means['DQN']:.3f}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_at_full_length_it_is_the_best_but_for_a_tenth(seed):
    means = example.main(["--seed", str(seed)])
    assert means["DQN"] > 0.9 * means["value iteration"]


def test_moves_stop_at_walls_and_at_the_edge():
    to = example.LEADS_TO
    assert to[0].tolist() == [0, 1, 8, 0]  # a corner: up and left stay
    assert to[1].tolist() == [1, 2, 1, 0]  # a wall below
    assert to[63].tolist() == [55, 63, 63, 62]


def test_no_other_policy_has_more_worth_than_value_iteration():
    best = example.best_values()
    policy = example.worth(best).argmax(-1)
    np.testing.assert_allclose(example.values_of(policy), best, atol=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(5):
        other = np.where(rng.random(example.CELLS) < 0.1, rng.integers(0, 4, example.CELLS), policy)
        assert (example.values_of(other) <= best + 1e-6).all()


def test_worth_is_the_mean_of_what_walks_bring():
    rng = np.random.default_rng(0)
    best = example.best_values()
    policy, start, walks = example.worth(best).argmax(-1), 56, 4000
    cells, brought, alive = np.full(walks, start), np.zeros(walks), np.ones(walks, bool)
    for t in range(200):
        cells = example.walk(rng, cells, policy[cells])
        brought += alive * example.DISCOUNT**t * example.REWARD[cells]
        alive &= ~example.ENDS[cells]
    assert brought.mean() == pytest.approx(best[start], abs=5 * brought.std() / np.sqrt(walks))


def test_a_step_goes_towards_the_bellman_target_and_the_target_network_follows():
    nn.manual_seed(0)
    model, target = example.QNetwork(hidden=8), example.QNetwork(hidden=8)
    steps = example.Steps(np.array([0, 5, 6, 14]), np.array([1, 0, 1, 0]), np.array([1, 4, 7, 6]))
    best = np.asarray(model(steps.after)).argmax(-1)
    later = np.asarray(target(steps.after))[np.arange(4), best]
    goal = np.array([0, 0, 1, 0]) + example.DISCOUNT * np.array([1, 1, 0, 1]) * later
    said = np.asarray(model(steps.cells))[np.arange(4), steps.actions]
    before = copy.deepcopy(target.state_dict())
    loss = example.train_step(model, target, nn.Optimizer(model, optax.sgd(0.1)), steps)
    assert float(loss) == pytest.approx(((said - goal) ** 2).mean(), rel=1e-5)
    trained = model.state_dict()
    for name, value in target.state_dict().items():
        expected = 0.98 * np.asarray(before[name]) + 0.02 * np.asarray(trained[name])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
