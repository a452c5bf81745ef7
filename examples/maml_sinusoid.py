"""Six ways to meta-learn sinusoid regression (Finn et al. 2017, section 5.1), with `nn.meta`.

A task is y = A sin(x - phase), A in [0.1, 5], phase in [0, pi], x in [-5, 5]. Meta-learning finds weights
from which a few gradient steps on a few points fit a new task. The default is a shortened run of MAML and
of the paper's baseline, under a minute on two cores; the paper's length is `--steps 70000`.

    python examples/maml_sinusoid.py [--algorithm all] [--steps 70000] [--seed 0]

Settings of the paper and of the code published with it: network 1-40-40-1 with ReLU, truncated normal
weights (std 0.01), 10 points to learn from and 10 to judge on, 25 tasks a meta-step, one inner step of
0.001, Adam with 1e-3, second order; tested on 600 tasks with 5 points.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import statefulnn as nn
import statefulnn.functional as F

POINTS, TASKS, INNER_LR = 10, 25, 0.001
SHOWN = [1, 5, 10]  # gradient steps on a new task
FINN = {"MAML": [0.67, 0.38, 0.35], "pretrained": [2.41, 2.23, 2.19]}  # table 2, 5-shot MSE


class Regressor(nn.Module):
    def __init__(self, hidden: int = 40):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(1, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)
        for layer in (self.fc1, self.fc2, self.out):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))  # (K, 1) -> (K, 1)


nn.manual_seed(0)
fn, initial = nn.functionalize(Regressor())  # fn(params, x) -> y; params: dict name -> array


def mse(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return F.mse_loss(fn(params, x), y)


def sample_tasks(key: jax.Array, tasks: int, points: int) -> tuple[jax.Array, jax.Array]:
    """Draw x and y, each (tasks, points, 1)."""
    a, b, c = jax.random.split(key, 3)
    amplitude = jax.random.uniform(a, (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(b, (tasks, 1, 1), maxval=jnp.pi)
    x = jax.random.uniform(c, (tasks, points, 1), minval=-5.0, maxval=5.0)
    return x, amplitude * jnp.sin(x - phase)


# --------------------------------------------------------------------------------------------------
# What a task costs, for each algorithm: (meta-parameters, progress from 0 to 1, support, query) -> loss


def adapted_loss(options: Callable, meta: dict, progress, support: tuple, query: tuple):
    """Adapt to a task on its first points, judge on the others."""
    adapted = nn.meta.adapt(fn, meta["params"], F.mse_loss, support, **options(meta))
    return mse(adapted.params, *query)


def multi_step_loss(options: Callable, meta: dict, progress, support: tuple, query: tuple):
    """Judge after every inner step: all alike at first, later only the last one (MAML++)."""
    adapted = nn.meta.adapt(
        fn, meta["params"], F.mse_loss, support, keep_path=True, **options(meta)
    )
    after = {name: path[1:] for name, path in adapted.path.items()}
    losses = jax.vmap(mse, in_axes=(0, None, None))(after, *query)
    return nn.meta.multi_step_weights(len(losses), progress / 0.15) @ losses


def reptile(shared: tuple, support: tuple, query: tuple) -> tuple[jax.Array, dict]:
    """Adapt on all points; the meta-gradient is the way back. No outer loss, so nothing to derive."""
    meta, _ = shared
    everything = tuple(map(jnp.concatenate, zip(support, query, strict=True)))
    adapted = nn.meta.adapt(fn, meta["params"], F.mse_loss, everything, lr=0.01, steps=10)
    grads = {"params": nn.meta.reptile_gradient(meta["params"], adapted.params)}
    return adapted.losses[-1], grads


def joint_loss(meta: dict, progress, support: tuple, query: tuple) -> jax.Array:
    """The paper's baseline: one network for all tasks together."""
    return (mse(meta["params"], *support) + mse(meta["params"], *query)) / 2


class Algorithm(NamedTuple):
    """The meta-parameters, and the options of `nn.meta.adapt` that a task starts with."""

    start: dict
    options: Callable[[dict], dict]
    task_loss: Callable | None = None


def fixed(**options) -> Callable:
    return lambda meta: options


def learned(meta: dict) -> dict:
    return {"lr": meta["lr"]}


def learned_per_step(meta: dict) -> dict:
    """Rates of each step and array, in units of the usual one, so that Adam's steps suit them."""
    return {"lr": jax.tree.map(lambda rate: INNER_LR * rate, meta["lr"]), "steps": STEPS}


STEPS = 5  # of MAML++
rates = partial(nn.meta.learning_rates, initial)
ALGORITHMS = {
    "MAML": Algorithm({"params": initial}, fixed(lr=INNER_LR)),
    "FOMAML": Algorithm({"params": initial}, fixed(lr=INNER_LR, first_order=True)),
    "ANIL": Algorithm({"params": initial}, fixed(lr=0.01, only="out.*")),
    "Meta-SGD": Algorithm({"params": initial, "lr": rates(INNER_LR)}, learned),
    "MAML++": Algorithm(
        {"params": initial, "lr": rates(1.0, each="array", steps=STEPS)},
        learned_per_step,
        partial(multi_step_loss, learned_per_step),
    ),
    "Reptile": Algorithm({"params": initial}, fixed(lr=0.01)),
    # The baseline takes the step size of the paper's text, ten times as large: better for it.
    "pretrained": Algorithm({"params": initial}, fixed(lr=0.01), joint_loss),
}


def meta_gradient(name: str) -> Callable:
    """Return a function ``(meta, progress, support, query) -> (loss, gradient)`` over all tasks."""
    algorithm = ALGORITHMS[name]
    if name == "Reptile":
        tasks = nn.meta.over_tasks(reptile)
        return lambda meta, progress, support, query: tasks((meta, progress), support, query)
    task_loss = algorithm.task_loss or partial(adapted_loss, algorithm.options)
    tasks = nn.meta.over_tasks(lambda shared, *task: task_loss(*shared, *task))
    return jax.value_and_grad(
        lambda meta, progress, support, query: tasks((meta, progress), support, query)
    )


def split(x: jax.Array, y: jax.Array, points: int = POINTS) -> tuple[tuple, tuple]:
    """Return the points to learn from and those to judge on; tasks come first."""
    return (x[:, :points], y[:, :points]), (x[:, points:], y[:, points:])


def train(name: str, steps: int, seed: int) -> dict:
    """Meta-train on random batches of tasks; return the meta-parameters."""
    gradient, tx = meta_gradient(name), optax.adam(1e-3)

    def step(carry, x):
        (meta, slots), (key, progress) = carry, x
        tasks = split(*sample_tasks(key, TASKS, 2 * POINTS))
        loss, grads = gradient(meta, progress, *tasks)
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(meta, updates), slots), loss

    start = ALGORITHMS[name].start
    xs = jax.random.split(jax.random.key(seed), steps), jnp.linspace(0.0, 1.0, steps)
    (meta, _), _ = nn.meta.loop(step, (start, tx.init(start)), xs, chunk=500, progress=name)
    return meta


# --------------------------------------------------------------------------------------------------
# New tasks


def adaptation(name: str, meta: dict, x: jax.Array, y: jax.Array) -> dict:
    """Return the parameters after 0 to 10 gradient steps on one task, stacked along a first axis."""
    options = {**ALGORITHMS[name].options(meta), "steps": max(SHOWN), "keep_path": True}
    if name == "MAML++":  # after the steps it was trained for, the rate of the last one
        options["lr"] = {
            n: nn.meta.PerStep(jnp.pad(r.rows, (0, max(SHOWN) - STEPS), mode="edge"))
            for n, r in options["lr"].items()
        }
    return nn.meta.adapt(fn, meta["params"], F.mse_loss, (x, y), **options).path


@partial(jax.jit, static_argnames=("name", "tasks", "points"))
def evaluate(name: str, meta: dict, tasks: int = 600, points: int = 5) -> jax.Array:
    """Return the MSE on 100 other points of each task, (tasks, 11): after 0 to 10 gradient steps."""

    def one_task(x, y):
        path = adaptation(name, meta, x[:points], y[:points])
        return jax.vmap(mse, in_axes=(0, None, None))(path, x[points:], y[points:])

    return jax.vmap(one_task)(*sample_tasks(jax.random.key(2017), tasks, points + 100))


def draw(name: str, meta: dict, file: Path, tasks: int = 4, points: int = 5) -> None:
    """Save a picture of a few tasks before adaptation, and after 1 and 10 steps."""
    from matplotlib.figure import Figure

    @jax.jit
    def curves(x, y):  # (300, 1) -> (11, 300, 1)
        path = adaptation(name, meta, x[:points], y[:points])
        return jax.vmap(fn, in_axes=(0, None))(path, x)

    figure = Figure(figsize=(4 * tasks, 3), layout="constrained")
    axes = figure.subplots(1, tasks, sharey=True)
    for axis, x, y in zip(axes, *sample_tasks(jax.random.key(4), tasks, 300), strict=True):
        order = np.argsort(x[:, 0])  # random points, in the order of a curve
        axis.plot(x[order], y[order], "k", lw=1, label="task")
        axis.plot(x[:points], y[:points], "k^", label=f"{points} points given")
        path = curves(x, y)
        for steps, style in {0: ":", 1: "--", 10: "-"}.items():
            axis.plot(x[order], path[steps, order], style, label=f"gradient steps: {steps}")
    axes[0].legend(fontsize=7)
    axes[0].set_ylabel(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Train, print the table, save the picture; return the errors on new tasks by algorithm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = [*(n for n in ALGORITHMS if n != "pretrained"), "all"]
    parser.add_argument("--algorithm", choices=choices, default="MAML")
    parser.add_argument("--steps", type=int, default=40_000, help="meta-steps; 70000 in the paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/maml_sinusoid.png"))
    args = parser.parse_args(argv)

    names = choices[:-1] if args.algorithm == "all" else [args.algorithm]
    errors = {}
    for name in [*names, "pretrained"]:
        meta = train(name, args.steps // (4 if name == "pretrained" else 1), args.seed)
        errors[name] = np.asarray(evaluate(name, meta))
        if name == names[0]:
            draw(name, meta, args.picture)

    print(
        "MSE on 600 new tasks, 5 points given\n" + f"{'gradient steps':24}{'1':>8}{'5':>8}{'10':>8}"
    )
    for name, error in errors.items():
        rows = {"mean": error.mean(0)[SHOWN], "median": np.median(error, 0)[SHOWN]}
        if name in FINN:
            rows["Finn et al."] = FINN[name]
        for label, row in rows.items():
            print(f"{name + ', ' + label:24}" + "".join(f"{v:8.2f}" for v in row))
    if args.steps < 70_000:
        print(f"({args.steps} meta-steps; the paper's 70000: --steps 70000)")
    print(f"picture: {args.picture}")
    return errors


if __name__ == "__main__":
    main()
