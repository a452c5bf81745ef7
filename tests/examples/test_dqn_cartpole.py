"""Deep Q-learning keeps poles up that follow the equations of motion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optax
import pytest

import dqn_cartpole as example
import statefulnn as nn


def test_it_keeps_poles_up_much_longer_than_pushes_at_random(capsys):
    scores = example.main(["--steps", "1000", "--picture", "pictures/dqn.png"])
    assert scores["DQN"] > 3 * scores["random"]
    assert Path("pictures/dqn.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{scores['DQN']:.0f} pushes; at random" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_that_does_not_hang_on_the_seed(seed):
    scores = example.main(["--seed", str(seed)])
    assert scores["DQN"] > 5 * scores["random"]


def test_the_motion_is_that_of_the_lagrangian():
    """Of a cart and a uniform rod: both accelerations solve two linear equations."""
    rng = np.random.default_rng(0)
    carts = example.Carts(rng, 6)
    carts.states = rng.uniform(-0.1, 0.1, (6, 4)).astype(np.float32)
    before, actions = carts.states.astype(float), np.array([0, 1, 0, 1, 0, 1])
    after = carts.push(actions)[0]
    m, half, total = example.POLE, example.HALF, example.CART + example.POLE
    for row, new, action in zip(before, after, actions, strict=True):
        _, speed, angle, turning = row
        push = example.FORCE if action else -example.FORCE
        matrix = [
            [total, m * half * np.cos(angle)],
            [m * half * np.cos(angle), m * half**2 * 4 / 3],
        ]
        forces = [
            push + m * half * turning**2 * np.sin(angle),
            m * half * example.GRAVITY * np.sin(angle),
        ]
        pushed, turned = np.linalg.solve(matrix, forces)
        change = np.array([speed, pushed, turning, turned])
        np.testing.assert_allclose(new, row + example.SECONDS * change, rtol=1e-5, atol=1e-6)


def test_what_fell_or_is_over_starts_anew():
    carts = example.Carts(np.random.default_rng(0), 3)
    carts.states[0, 2] = 0.3  # beyond twelve degrees
    carts.ages[1] = example.LONGEST - 1
    _, fell, over = carts.push(np.zeros(3, int))
    assert fell.tolist() == [True, False, False] and over.tolist() == [True, True, False]
    assert carts.ages.tolist() == [0, 0, 1]
    assert np.abs(carts.states[0]).max() <= 0.05


def test_the_memory_forgets_the_oldest():
    memory = example.Memory(4)
    for start in (0, 3):
        numbers = np.arange(start, start + 3)
        memory.add(numbers[:, None] + np.zeros(4), numbers, numbers[:, None] + np.zeros(4), numbers)
    states, actions, _, _ = memory.draw(np.random.default_rng(0), 200)
    assert set(actions.tolist()) == {2, 3, 4, 5}
    np.testing.assert_array_equal(states[:, 0], actions)


def test_a_step_goes_towards_the_bellman_target():
    nn.manual_seed(0)
    model, target = example.QNetwork(), example.QNetwork()
    rng = np.random.default_rng(0)
    states, after = rng.normal(size=(2, 5, 4)).astype(np.float32)
    actions, fell = np.array([0, 1, 1, 0, 1], np.int32), np.array([0, 0, 1, 0, 1], np.float32)
    rows = np.arange(5)
    best = np.asarray(model(after)).argmax(1)
    goal = -fell + example.DISCOUNT * (1 - fell) * np.asarray(target(after))[rows, best]
    miss = np.abs(np.asarray(model(states))[rows, actions] - goal)
    expected = np.where(miss < 1, miss**2 / 2, miss - 0.5).mean()
    before = target.state_dict()
    opt = nn.Optimizer(model, optax.sgd(0.1))
    losses = [
        example.train_step(model, target, opt, states, actions, after, fell) for _ in range(2)
    ]
    assert float(losses[0]) == pytest.approx(expected, rel=1e-5)
    assert float(losses[1]) < float(losses[0])
    for name, value in target.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
