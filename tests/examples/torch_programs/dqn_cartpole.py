"""Deep Q-learning balances a pole, in torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

GRAVITY, CART, POLE, HALF, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
SIZES = torch.tensor([2.4, 2.0, 0.21, 2.0])
LIMITS = np.array([2.4, np.radians(12)])  # of the cart's place and the pole's angle
LONGEST, CARTS, MEMORY, DISCOUNT, PERIOD = 500, 8, 50_000, 0.99, 100


class Carts:
    def __init__(self, rng: np.random.Generator, carts: int):
        self.rng = rng
        self.states = self.start(carts)
        self.ages = np.zeros(carts, int)

    def start(self, carts: int) -> np.ndarray:
        return self.rng.uniform(-0.05, 0.05, (carts, 4)).astype(np.float32)

    def push(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    def __init__(self, size: int):
        shapes = ((4,), np.float32), ((), np.int64), ((4,), np.float32), ((), np.float32)
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
    def __init__(self, hidden: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, states):
        return self.layers(states / SIZES)


def train_step(model, target, opt, states, actions, after, fell) -> Tensor:
    with torch.no_grad():
        best = model(after).argmax(-1, keepdim=True)
        goal = -fell + DISCOUNT * (1 - fell) * target(after).gather(-1, best)[:, 0]
    opt.zero_grad()
    values = model(states).gather(-1, actions[:, None])[:, 0]
    loss = F.smooth_l1_loss(values, goal)
    loss.backward()
    opt.step()
    return loss.detach()


@torch.no_grad()
def best_actions(model: nn.Module, states: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(states)).argmax(-1).numpy()


def play(model: nn.Module | None, rng: np.random.Generator, carts: int = 20) -> float:
    env, alive, pushes = Carts(rng, carts), np.ones(carts, bool), 0
    for _ in range(LONGEST):
        pushes += alive.sum()
        chosen = best_actions(model, env.states) if model else rng.integers(0, 2, carts)
        alive &= ~env.push(chosen)[2]
    return float(pushes / carts)


def draw(steps: list[int], scores: list[float], chance: float, file: Path) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, scores, "o-", label="DQN, mean of 20 carts")
    axis.axhline(chance, color="0.5", ls="--", label="pushes at random")
    axis.set(xlabel="training steps", ylabel="pushes", ylim=(0, LONGEST + 10))
    axis.legend(loc="center right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/dqn_cartpole.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model, target, best = QNetwork(), QNetwork(), QNetwork()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, args.steps)
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
        batch = map(torch.from_numpy, memory.draw(rng, args.batch_size))
        train_step(model, target, opt, *batch)
        schedule.step()
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
