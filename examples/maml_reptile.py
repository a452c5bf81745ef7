"""MAML and Reptile on sinusoids: one gradient through the inner steps, one that needs no gradient.

A task is y = A sin(x - phase). Both learn weights from which a few gradient steps on ten points fit a new
task; examples/maml_sinusoid.py has the paper's settings and more algorithms. About 20
seconds on two cores.

    python examples/maml_reptile.py [--steps 3000] [--seed 0]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F

POINTS, TASKS, INNER_LR, INNER_STEPS = 10, 16, 0.02, 5


def sample_tasks(rng: np.random.Generator, tasks: int, points: int) -> tuple:
    """Draw x and y, each (tasks, points, 1)."""
    amplitude, phase = rng.uniform(0.1, 5, (tasks, 1, 1)), rng.uniform(0, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5, 5, (tasks, points, 1))
    return x.astype(np.float32), (amplitude * np.sin(x - phase)).astype(np.float32)


nn.manual_seed(0)
fn, initial = nn.functionalize(
    nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
)


def adapted(params: dict, x, y) -> dict:
    """Return the weights after a few gradient steps on one task."""
    return nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=INNER_LR, steps=INNER_STEPS).params


def maml_gradient(params: dict, x, y) -> dict:
    """Source: Finn, Abbeel and Levine, Model-agnostic meta-learning, 2017."""

    def loss_of(params):
        def one_task(x, y):
            new = adapted(params, x[:POINTS], y[:POINTS])
            return F.mse_loss(fn(new, x[POINTS:]), y[POINTS:])

        return jax.vmap(one_task)(x, y).mean()

    return jax.grad(loss_of)(params)


def reptile_gradient(params: dict, x, y) -> dict:
    """Source: Nichol, Achiam and Schulman, On first-order meta-learning algorithms, 2018."""
    new = jax.vmap(adapted, in_axes=(None, 0, 0))(params, x, y)
    return nn.meta.reptile_gradient(params, jax.tree.map(lambda p: p.mean(0), new))


def train(meta_gradient, lr: float, steps: int, seed: int) -> dict:
    """Meta-train on random tasks; return the weights to start from."""
    rng, tx = np.random.default_rng(seed), optax.adam(lr)

    @jax.jit
    def step(params, slots, x, y):
        updates, slots = tx.update(meta_gradient(params, x, y), slots)
        return optax.apply_updates(params, updates), slots

    params, slots = initial, tx.init(initial)
    for _ in range(steps):
        params, slots = step(params, slots, *sample_tasks(rng, TASKS, 2 * POINTS))
    return params


@jax.jit
def errors(params: dict, x, y) -> jax.Array:
    """Return the error of each task on other points than those it was adapted on."""

    def one_task(x, y):
        return F.mse_loss(fn(adapted(params, x[:POINTS], y[:POINTS]), x[POINTS:]), y[POINTS:])

    return jax.vmap(one_task)(x, y)


def draw(found: dict[str, dict], seed: int, file: Path) -> None:
    """Save a picture of one new task, before and after the steps on its points."""
    x, y = (a[0] for a in sample_tasks(np.random.default_rng(seed), 1, 300))
    order = np.argsort(x[:, 0])
    figure = Figure(figsize=(4 * len(found), 3), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    for axis, (name, params) in zip(axes, found.items(), strict=True):
        new = jax.jit(adapted)(params, x[:POINTS], y[:POINTS])
        axis.plot(x[order], y[order], "k", lw=1, label="task")
        axis.plot(x[:POINTS], y[:POINTS], "k^", label="points given")
        axis.plot(x[order], fn(params, x[order]), "C0:", label="before")
        axis.plot(x[order], fn(new, x[order]), "C1", label=f"after {INNER_STEPS} steps")
        axis.set_title(name)
    axes[0].legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with both, print the errors, save the picture; return the errors on new tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/maml_reptile.png"))
    args = parser.parse_args(argv)

    learn = partial(train, steps=args.steps, seed=args.seed)
    found = {
        "not meta-trained": initial,
        "MAML": learn(maml_gradient, 1e-3),
        "Reptile": learn(reptile_gradient, 1e-3),
    }
    new_tasks = sample_tasks(np.random.default_rng(args.seed + 1), 500, 100)
    scores = {name: float(errors(params, *new_tasks).mean()) for name, params in found.items()}
    for name, error in scores.items():
        print(f"{name}: error {error:.2f} after {INNER_STEPS} steps on {POINTS} points")
    draw(found, args.seed + 2, args.picture)
    print(f"picture: {args.picture}")
    return scores


if __name__ == "__main__":
    main()
