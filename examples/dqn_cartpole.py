"""Deep Q-learning balances a pole: a network that acts, one that sets its targets, and a memory.

The cart and the pole follow the equations of motion of Barto, Sutton and Anderson (1983); a push to the left
or to the right, fifty times a second, keeps the pole up, for ten seconds at most. About
20 seconds on two cores.

    python examples/dqn_cartpole.py [--steps 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F

GRAVITY, CART, POLE, HALF, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
SIZES = np.array([2.4, 2.0, 0.21, 2.0], np.float32)  # of a state's numbers, roughly
LIMITS = np.array([2.4, np.radians(12)])  # of the cart's place and the pole's angle
LONGEST, CARTS, MEMORY, DISCOUNT, PERIOD = 500, 8, 50_000, 0.99, 100


class Carts:
    """Several carts at once: states (n, 4) of place, speed, angle and angular speed."""

    def __init__(self, rng: np.random.Generator, carts: int):
        self.rng = rng
        self.states = self.start(carts)
        self.ages = np.zeros(carts, int)

    def start(self, carts: int) -> np.ndarray:
        return self.rng.uniform(-0.05, 0.05, (carts, 4)).astype(np.float32)

    def push(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Push left (0) or right (1); return the new states, what fell, and what is over.

        Carts whose time is over start anew.
        """
        speed, angle, turning = self.states[:, 1:].T
        force, mass = FORCE * (2 * actions - 1), CART + POLE
        pull = (force + POLE * HALF * turning**2 * np.sin(angle)) / mass
        lean = GRAVITY * np.sin(angle) - np.cos(angle) * pull
        turned = lean / (HALF * (4 / 3 - POLE * np.cos(angle) ** 2 / mass))
        pushed = pull - POLE * HALF * turned * np.cos(angle) / mass
        change = np.stack([speed, pushed, turning, turned], 1)
        new = (self.states + SECONDS * change).astype(np.float32)
        fell = np.any(np.abs(new[:, [0, 2]]) > LIMITS, axis=1)
        self.ages += 1
        over = fell | (self.ages == LONGEST)
        self.states = np.where(over[:, None], self.start(len(new)), new)
        self.ages[over] = 0
        return new, fell, over


class Memory:
    """The last transitions, written over from the oldest on."""

    def __init__(self, size: int):
        shapes = ((4,), np.float32), ((), np.int32), ((4,), np.float32), ((), np.float32)
        self.arrays = [np.zeros((size, *shape), dtype) for shape, dtype in shapes]
        self.written = 0

    def add(self, *transitions: np.ndarray) -> None:
        rows = (self.written + np.arange(len(transitions[0]))) % len(self.arrays[0])
        for array, new in zip(self.arrays, transitions, strict=True):
            array[rows] = new
        self.written += len(rows)

    def draw(self, rng: np.random.Generator, size: int) -> list[np.ndarray]:
        rows = rng.integers(0, min(self.written, len(self.arrays[0])), size)
        return [array[rows] for array in self.arrays]


class QNetwork(nn.Module):
    """Source: Mnih et al., Human-level control through deep reinforcement learning, 2015."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, states):
        return self.layers(states / SIZES)  # (N, 4) -> (N, 2)


@nn.jit
def train_step(model, target, opt, states, actions, after, fell) -> jax.Array:
    """One step; the model chooses what comes after, the target values it (van Hasselt et al. 2016)."""
    best = model(after).argmax(-1, keepdims=True)
    values = jnp.take_along_axis(target(after), best, -1)[:, 0]
    goal = -fell + DISCOUNT * (1 - fell) * values

    def loss_of(model):
        values = jnp.take_along_axis(model(states), actions[:, None], -1)[:, 0]
        return F.smooth_l1_loss(values, goal)

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    return loss


@nn.jit
def best_actions(model: nn.Module, states) -> jax.Array:
    return model(states).argmax(-1)


def play(model: nn.Module | None, rng: np.random.Generator, carts: int = 20) -> float:
    """Return how many pushes poles stay up for; without a model the pushes are random."""
    env, alive, pushes = Carts(rng, carts), np.ones(carts, bool), 0
    for _ in range(LONGEST):
        pushes += alive.sum()
        chosen = best_actions(model, env.states) if model else rng.integers(0, 2, carts)
        alive &= ~env.push(np.asarray(chosen))[2]
    return float(pushes / carts)


def draw(steps: list[int], scores: list[float], chance: float, file: Path) -> None:
    """Save a picture of the pushes a pole stays up for, by the length of the training."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, scores, "o-", label="DQN, mean of 20 carts")
    axis.axhline(chance, color="0.5", ls="--", label="pushes at random")
    axis.set(xlabel="training steps", ylabel="pushes", ylim=(0, LONGEST + 10))
    axis.legend(loc="center right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, print and return the pushes that poles stay up for, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/dqn_cartpole.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model, target, best = QNetwork(), QNetwork(), QNetwork()
    opt = nn.Optimizer(model, optax.adam(optax.linear_schedule(1e-3, 1e-4, args.steps)))
    env, memory = Carts(rng, CARTS), Memory(MEMORY)
    chance = play(None, rng)
    steps, scores = [], []
    for step in range(args.steps):
        if step % PERIOD == 0:
            target.load_state_dict(model.state_dict())
        states = env.states
        greedy = rng.random(CARTS) > max(0.05, 1 - 4 * step / args.steps)
        actions = np.where(greedy, best_actions(model, states), rng.integers(0, 2, CARTS))
        after, fell, _ = env.push(actions)
        memory.add(states, actions, after, fell)
        train_step(model, target, opt, *memory.draw(rng, args.batch_size))
        if (step + 1) % max(1, args.steps // 10) == 0:
            steps.append(step + 1)
            scores.append(play(model, rng))
            print(f"step {step + 1}: up for {scores[-1]:.0f} pushes")
            if scores[-1] == max(scores):
                best.load_state_dict(model.state_dict())

    score = play(best, rng)
    print(f"new poles, with the best weights: {score:.0f} pushes; at random: {chance:.0f}")
    draw(steps, scores, chance, args.picture)
    print(f"picture: {args.picture}")
    return {"DQN": score, "random": chance}


if __name__ == "__main__":
    main()
