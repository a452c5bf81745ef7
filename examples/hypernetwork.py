"""A hypernetwork: one network that writes the weights of another, from a few points of a task.

A task is y = A sin(x - phase), A in [0.1, 5], phase in [0, pi], x in [-5, 5], as in `maml_sinusoid.py`. The
hypernetwork reads ten points in any order (an average over points, Zaheer et al. 2017) and returns every
weight and bias of a network 1-40-40-1 (Ha, Dai and Le 2017), which `nn.functionalize` runs with them. It
learns from the error of that network on other points of the task. A new task costs one forward pass.

It is compared with networks 1-40-40-1 without a hypernetwork: one trained on all tasks together, the same
after ten gradient steps on the task, and one trained from scratch on the ten points alone.

    python examples/hypernetwork.py [--steps 20000] [--seed 0] [--picture out/hypernetwork.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import statefulnn as nn
import statefulnn.functional as F

POINTS, TASKS = 10, 25
WAYS = {
    "hypernetwork": "hypernetwork",
    "all tasks": "trained on all tasks",
    "10 gradient steps": "the same, 10 gradient steps",
    "from scratch": "from scratch, 500 Adam steps",
}


class Target(nn.Module):
    def __init__(self, hidden: int = 40):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(1, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))  # (K, 1) -> (K, 1)


class Hypernetwork(nn.Module):
    """From the points of a task to a dict of arrays, like the one it is given.

    Args:
        weights: the target's parameters by name. They are the weights it gives to every task at first.
    """

    def __init__(self, weights: dict, hidden: int = 64):
        super().__init__()
        flat, self.unflatten = ravel_pytree(weights)
        self.points = nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.task = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, flat.size)
        nn.init.normal_(self.head.weight, std=1e-3)
        self.head.bias.value = flat

    def forward(self, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        points = self.points(jnp.concatenate([x, y], -1))  # (K, 2) -> (K, hidden)
        return self.unflatten(self.head(self.task(points.mean(0))))


nn.manual_seed(0)
run, initial = nn.functionalize(Target())  # run(weights, x) -> y
write, hyper_initial = nn.functionalize(Hypernetwork(initial))  # write(hyper, x, y) -> weights


def mse(weights: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return F.mse_loss(run(weights, x), y)


def sample_tasks(key: jax.Array, tasks: int, points: int) -> tuple[jax.Array, jax.Array]:
    """Draw x and y, each (tasks, points, 1)."""
    u = jax.random.uniform(key, (tasks, points + 2, 1))
    amplitude, phase, x = 0.1 + 4.9 * u[:, :1], jnp.pi * u[:, 1:2], 10 * u[:, 2:] - 5
    return x, amplitude * jnp.sin(x - phase)


def hyper_loss(hyper: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """Read the first points of a task, judge the network they make on the others."""
    return mse(write(hyper, x[:POINTS], y[:POINTS]), x[POINTS:], y[POINTS:])


def train(
    loss: Callable, start: dict, steps: int, seed: int, label: str
) -> tuple[dict, np.ndarray]:
    """Minimise the mean of a loss over random tasks; return the parameters and the losses."""
    tasks_loss = nn.meta.over_tasks(loss)
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    def step(carry, key):
        params, slots = carry
        loss, grads = jax.value_and_grad(tasks_loss)(params, *sample_tasks(key, TASKS, 2 * POINTS))
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(params, updates), slots), loss

    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), losses = nn.meta.loop(
        step, (start, tx.init(start)), keys, chunk=250, progress=label
    )
    return params, losses


def networks(hyper: dict, average: dict, x: jax.Array, y: jax.Array) -> dict[str, dict]:
    """Return the weights that each way makes of the points x and y, (K, 1), of a task."""
    fit = partial(nn.meta.adapt, run, loss=F.mse_loss, data=(x, y))
    return {
        "hypernetwork": write(hyper, x, y),
        "all tasks": average,
        "10 gradient steps": fit(average, lr=0.01, steps=10).params,
        "from scratch": fit(initial, optimizer=nn.meta.adam(0.01), steps=500).params,
    }


@partial(jax.jit, static_argnames="tasks")
def predict(hyper: dict, average: dict, tasks: int) -> tuple[jax.Array, jax.Array, dict]:
    """Return x and y of new tasks, and by way what its networks say, each (tasks, POINTS + 100, 1)."""

    def one_task(x, y):
        made = networks(hyper, average, x[:POINTS], y[:POINTS])
        return {way: run(weights, x) for way, weights in made.items()}

    x, y = sample_tasks(jax.random.key(2017), tasks, POINTS + 100)
    return x, y, jax.vmap(one_task)(x, y)


def draw(x, y, guesses: dict, losses: np.ndarray, file: Path, tasks: int = 3) -> None:
    """Save a picture of the training loss and of the networks made for the first tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * (tasks + 1), 3.2), layout="constrained")
    first, *axes = figure.subplots(1, tasks + 1)
    width = max(1, len(losses) // 100)
    first.semilogy(losses[: len(losses) // width * width].reshape(-1, width).mean(1))
    first.set(xlabel=f"training step / {width}", ylabel="MSE of the hypernetwork's networks")
    for task, axis in enumerate(axes):
        order = np.argsort(x[task, :, 0])  # random points, in the order of a curve
        axis.plot(x[task, order], y[task, order], "k", lw=4, alpha=0.2, label="task")
        axis.plot(x[task, :POINTS], y[task, :POINTS], "k^", label=f"{POINTS} points given")
        for way, label in WAYS.items():
            width = 2 if way == "hypernetwork" else 1
            axis.plot(x[task, order], guesses[way][task, order], lw=width, label=label)
        axis.set_ylim(-6, 6)
    axes[0].legend(fontsize=6)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Train, print the table, save the picture; return the errors on new tasks by way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=20_000, help="training steps, of 25 tasks each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/hypernetwork.png"))
    args = parser.parse_args(argv)

    hyper, losses = train(hyper_loss, hyper_initial, args.steps, args.seed, "hypernetwork")
    average, _ = train(mse, initial, max(1000, args.steps // 4), args.seed, "all tasks together")
    x, y, guesses = jax.tree.map(np.asarray, predict(hyper, average, 200))
    new = slice(POINTS, None)
    errors = {way: ((guesses[way] - y) ** 2)[:, new].mean((1, 2)) for way in WAYS}

    sizes = [sum(p.size for p in params.values()) for params in (initial, hyper_initial)]
    print(f"a network of {sizes[0]} weights, written by one of {sizes[1]} ({args.steps} steps)")
    print(f"{f'MSE on 200 new tasks, {POINTS} points given':42}{'mean':>8}{'median':>8}")
    for way, label in WAYS.items():
        print(f"{label:42}{errors[way].mean():8.3f}{np.median(errors[way]):8.3f}")
    draw(x, y, guesses, losses, args.picture)
    print(f"picture: {args.picture}")
    return errors


if __name__ == "__main__":
    main()
