"""Deep Q-learning finds its way over slippery ice: a target network that follows by `nn.lerp_`.

From any free cell of a grid the way leads to the goal, past walls and around holes; one step in five slips to
a side. The network learns from steps alone what each action is worth. Since the grid is small, the best
policy is known, by value iteration; the picture shows both. About ten seconds on two cores.

    python examples/dqn_gridworld.py [--steps 6000] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F

GRID = """\
.......G
.##.O...
.#..O.#.
.#.#..#.
......#.
.O.##...
.O....O.
........"""
MAP = np.array([list(row) for row in GRID.splitlines()])
CELLS, SIDE = MAP.size, len(MAP)
MOVES = np.array([[-1, 0], [0, 1], [1, 0], [0, -1]])  # up, right, down, left
SLIP, DISCOUNT, FOLLOW = 0.2, 0.95, 0.02
WALKERS, MEMORY = 16, 50_000
FREE = np.flatnonzero(MAP.ravel() == ".")  # cells to walk on


def neighbours() -> np.ndarray:
    """Return where each move leads from each cell, (CELLS, 4): who runs into a wall stays."""
    cells = np.stack(np.divmod(np.arange(CELLS), SIDE), -1)
    to = cells[:, None] + MOVES  # (CELLS, 4, 2)
    inside = ((to >= 0) & (to < SIDE)).all(-1)
    to = np.where(inside, to[..., 0] * SIDE + to[..., 1], np.arange(CELLS)[:, None])
    return np.where(MAP.ravel()[to] == "#", np.arange(CELLS)[:, None], to)


LEADS_TO = neighbours()
REWARD = np.select([MAP == "G", MAP == "O"], [1.0, -1.0], 0.0).ravel().astype(np.float32)
ENDS = (MAP.ravel() == "G") | (MAP.ravel() == "O")
TURNS = np.array([0, 1, -1])  # straight on, or to one of both sides
CHANCES = np.array([1 - SLIP, SLIP / 2, SLIP / 2])


class Steps(NamedTuple):
    """Steps that were taken, an array of each kind."""

    cells: np.ndarray
    actions: np.ndarray
    after: np.ndarray


def walk(rng: np.random.Generator, cells: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Return where steps lead to, on ice."""
    return LEADS_TO[cells, (actions + rng.choice(TURNS, len(cells), p=CHANCES)) % 4]


def worth(values: np.ndarray) -> np.ndarray:
    """Return what each action is worth (CELLS, 4), if cells are worth `values` (CELLS,)."""
    later = REWARD + DISCOUNT * np.where(ENDS, 0, values)
    outcomes = LEADS_TO[:, (np.arange(4)[:, None] + TURNS) % 4]  # (CELLS, 4, 3)
    return later[outcomes] @ CHANCES


def best_values() -> np.ndarray:
    """Return what the best actions are worth (CELLS,), by value iteration."""
    values = np.zeros(CELLS)
    for _ in range(300):
        values = worth(values).max(-1)
    return values


def values_of(policy: np.ndarray) -> np.ndarray:
    """Return what each cell is worth to one who takes the actions of a policy (CELLS,)."""
    values = np.zeros(CELLS)
    for _ in range(300):
        values = worth(values)[np.arange(CELLS), policy]
    return values


class QNetwork(nn.Module):
    """Source: Mnih et al., Human-level control through deep reinforcement learning, 2015."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.rows = nn.Embedding(SIDE, hidden)
        self.columns = nn.Embedding(SIDE, hidden)
        self.layers = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 4),
        )  # fmt: skip

    def forward(self, cells):
        return self.layers(self.rows(cells // SIDE) + self.columns(cells % SIDE))  # (N,) -> (N, 4)


@nn.jit
def train_step(model: QNetwork, target: QNetwork, opt: nn.Optimizer, steps: Steps) -> jax.Array:
    """One step; the model chooses what comes after, the target values it (van Hasselt et al. 2016)."""
    best = model(steps.after).argmax(-1, keepdims=True)
    later = jnp.take_along_axis(target(steps.after), best, -1)[:, 0]
    goal = jnp.asarray(REWARD)[steps.after] + DISCOUNT * ~jnp.asarray(ENDS)[steps.after] * later

    def loss_of(model):
        values = jnp.take_along_axis(model(steps.cells), steps.actions[:, None], -1)[:, 0]
        return F.mse_loss(values, goal)

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    nn.lerp_(target, model, FOLLOW)
    return loss


@nn.jit
def values(model: QNetwork, cells) -> jax.Array:
    return model(cells)


def explore(rng: np.random.Generator, model: QNetwork, cells: np.ndarray, chance: float) -> Steps:
    """Take the best actions, and some by chance."""
    greedy = np.asarray(values(model, cells)).argmax(-1)
    by_chance = rng.random(len(cells)) < chance
    actions = np.where(by_chance, rng.integers(0, 4, len(cells)), greedy)
    return Steps(cells, actions, walk(rng, cells, actions))


def draw(shown: dict[str, tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    """Save a picture of policies and of what cells are worth."""
    figure = Figure(figsize=(4 * len(shown), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown))
    y, x = np.divmod(FREE, SIDE)
    for axis, (title, (policy, worths)) in zip(axes, shown.items(), strict=True):
        field = np.where(MAP.ravel() == ".", worths, np.nan).reshape(SIDE, SIDE)
        axis.imshow(field, vmin=0, vmax=1)
        down, right = 0.6 * MOVES[policy[FREE]].T
        axis.quiver(
            x - right / 2, y - down / 2, right, down, color="w",
            angles="xy", scale_units="xy", scale=1, width=0.008,
        )  # fmt: skip
        for cell in np.flatnonzero(MAP.ravel() != "."):
            letter = MAP.ravel()[cell].replace("#", "■")
            axis.text(cell % SIDE, cell // SIDE, letter, ha="center", va="center", fontsize=14)
        axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(axes[-1].images[0], ax=axes, label="worth")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, save the picture; print and return the mean worth of free cells by policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/dqn_gridworld.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = QNetwork()
    target = copy.deepcopy(model)
    opt = nn.Optimizer(model, optax.adam(optax.linear_schedule(1e-3, 0.0, args.steps)))
    memory, cells = Steps(*(np.zeros((0,), np.int64) for _ in range(3))), rng.choice(FREE, WALKERS)
    for step in tqdm(range(args.steps), desc="training", unit="step"):
        taken = explore(rng, model, cells, chance=max(0.5, 1 - step / args.steps))
        memory = Steps(*(np.append(m, t)[-MEMORY:] for m, t in zip(memory, taken, strict=True)))
        over = ENDS[taken.after] | (rng.random(WALKERS) < 0.02)
        cells = np.where(over, rng.choice(FREE, WALKERS), taken.after)
        rows = rng.integers(0, len(memory.cells), args.batch_size)
        train_step(model, target, opt, Steps(*(kind[rows] for kind in memory)))

    learned = np.asarray(values(model, np.arange(CELLS))).argmax(-1)
    best = best_values()
    policies = {
        "DQN": learned,
        "value iteration": worth(best).argmax(-1),
        "random": rng.integers(0, 4, CELLS),
    }
    means = {name: float(values_of(policy)[FREE].mean()) for name, policy in policies.items()}
    for name, mean in means.items():
        print(f"{name}: a free cell is worth {mean:.3f}")
    shown = {
        "DQN": (learned, np.asarray(values(model, np.arange(CELLS))).max(-1)),
        "value iteration": (policies["value iteration"], best),
    }
    draw(shown, args.picture)
    print(f"picture: {args.picture}")
    return means


if __name__ == "__main__":
    main()
