"""A small learned optimizer, meta-trained in two ways, against tuned SGD and Adam.

A network looks at features of each parameter (its gradient, running means and scale, the time) and says
how the parameter moves. It learns on random regression tasks from pieces of 10 of their 100 steps, by

    truncated   backpropagation through a piece: little noise, but blind to what comes after it
    pes         persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021): from values of the
                loss alone, an estimate of the gradient of the whole run, without that bias, with noise

The others get the best learning rate and momentum of a grid on tasks it was trained on, for the same
objective: the log loss over the whole run. All are compared on new tasks.

    python examples/learned_optimizer.py [--gradient both] [--steps 2000] [--seed 0]

Loss on 256 new tasks after 2000 meta-steps, geometric means over tasks and over the whole run or its last
10 steps, seeds 0 / 1 / 2:

                          whole run                last 10
    learned, truncated    .0099 / .0109 / .0110    .0042 / .0045 / .0048
    learned, pes          .0131 / .0159 / .0134    .0047 / .0068 / .0051
    Adam, cosine decay    .0118 for each           .0044
    Adam                  .0176 for each           .0087
    SGD with momentum     .0291 / .0291 / .0282    .0152 / .0152 / .0133

Runs this short and smooth are no trouble for truncated backpropagation, and the noise of PES shows: it
beats Adam, but not Adam with a schedule.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import statefulnn as nn
import statefulnn.functional as F

HORIZON, PIECE, PAIRS, SIGMA, OUTER_LR = 100, 10, 40, 0.03, 1e-2
POINTS, BATCH, FLOOR = 64, 16, 1e-6
DECAYS = jnp.array([0.5, 0.9, 0.99])


# --------------------------------------------------------------------------------------------------
# Tasks: a small network fits a random one from minibatches


student, _ = nn.functionalize(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))


def sample_tasks(seed: int, tasks: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return weights to start from, and minibatches x (tasks, 100, 16, 2) and y (tasks, 100, 16, 1)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal((tasks, *shape), np.float32)

    def weights(scale):
        body = {"0.weight": scale * normal(8, 2), "0.bias": scale * normal(8)}
        return {**body, "2.weight": normal(1, 8) / 8**0.5, "2.bias": np.zeros((tasks, 1), "f4")}

    x = normal(POINTS, 2)
    y = np.asarray(jax.vmap(student)(weights(2.0), x))
    which = np.arange(tasks)[:, None, None], rng.integers(0, POINTS, (tasks, HORIZON, BATCH))
    return weights(1.0), x[which], y[which]


def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return F.mse_loss(student(params, x), y)


# --------------------------------------------------------------------------------------------------
# The learned optimizer, as an optax transformation: usable wherever Adam is


class Rule(nn.Module):
    """From the features of a parameter to its step: a direction, and the logarithm of a size."""

    def __init__(self, hidden: int = 16):
        super().__init__()
        self.hidden = nn.Linear(2 * len(DECAYS) + 4, hidden)
        self.out = nn.Linear(hidden, 2)

    def forward(self, features: jax.Array) -> jax.Array:  # (P, 10) -> (P,)
        direction, size = self.out(F.relu(self.hidden(features))).T
        return 0.05 * direction * jnp.exp(size)


class Slots(NamedTuple):
    means: jax.Array  # of the gradient, over about 2, 10 and 100 steps, (3, P)
    square: jax.Array  # its mean square, (P,)
    count: jax.Array


rule, _ = nn.functionalize(Rule())


def learned(theta: dict) -> optax.GradientTransformation:
    """Return the optimizer with these meta-parameters; its updates are differentiable by them."""

    def init(params: dict) -> Slots:
        flat, _ = ravel_pytree(params)
        return Slots(jnp.zeros((len(DECAYS), flat.size)), jnp.zeros(flat.size), jnp.zeros(()))

    def update(grads: dict, slots: Slots, params: dict | None = None) -> tuple[dict, Slots]:
        g, as_dict = ravel_pytree(grads)
        count = slots.count + 1
        means = slots.means + (1 - DECAYS[:, None]) * (g - slots.means)
        square = slots.square + (1 - DECAYS[-1]) * (g**2 - slots.square)
        # The scale of the gradient is divided out, as in Adam, and told beside.
        unbiased = means / (1 - DECAYS**count)[:, None]
        scale = jnp.sqrt(square / (1 - DECAYS[-1] ** count) + 1e-12)
        told = jnp.log(jnp.stack([scale, jnp.abs(g) + 1e-6])) / 5
        time = jnp.broadcast_to(jnp.tanh(count / jnp.array([[10.0], [100.0]])), (2, g.size))
        features = jnp.concatenate([unbiased / scale, jnp.tanh(10 * unbiased), told, time])
        step = rule(theta, jnp.clip(features, -5.0, 5.0).T)
        return as_dict(-step), Slots(means, square, count)

    return optax.GradientTransformation(init, update)


# --------------------------------------------------------------------------------------------------
# Meta-training: every pair of particles has its own task, at its own place in the run


class Run(NamedTuple):
    task: tuple[dict, jax.Array, jax.Array]
    params: Any
    slots: Any
    done: jax.Array  # inner steps so far


def begin(task: tuple[dict, jax.Array, jax.Array]) -> Run:
    return Run(task, task[0], learned({}).init(task[0]), jnp.zeros((), jnp.int32))


def piece(theta: dict, run: Run) -> tuple[jax.Array, Run]:
    """Go on with a training run for a few steps; return the mean of its log losses, and the run."""
    tx, (_, x, y) = learned(theta), run.task

    def step(carry, i):
        params, slots = carry
        value, grads = jax.value_and_grad(loss)(params, x[i], y[i])
        updates, slots = tx.update(grads, slots, params)
        return (optax.apply_updates(params, updates), slots), jnp.log(value + FLOOR)

    carry = run.params, run.slots
    (params, slots), losses = jax.lax.scan(step, carry, run.done + jnp.arange(PIECE))
    return losses.mean(), Run(run.task, params, slots, run.done + PIECE)


def gradient(
    way: str, advance: Callable, theta: jax.Array, pes: nn.meta.PES, key: jax.Array
) -> tuple:
    """Return (mean loss of a piece, the gradient by theta, the particles after it)."""
    if way == "pes":
        return nn.meta.pes_gradient(advance, theta, pes, key=key, sigma=SIGMA)

    def truncated(theta):
        losses, states = jax.vmap(advance, in_axes=(None, 0))(theta, pes.states)
        return losses.mean(), states

    (value, states), grads = jax.value_and_grad(truncated, has_aux=True)(theta)
    return value, grads, nn.meta.PES(states, pes.sums)


def restart(tasks: tuple, pes: nn.meta.PES) -> nn.meta.PES:
    """Give the pairs that are through a new task, and forget what perturbed them."""
    fresh = jax.tree.map(lambda v: jnp.concatenate([v, v]), jax.vmap(begin)(tasks))
    through = pes.states.done >= HORIZON

    def renew(new, old):
        chosen = through[: len(old)].reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(chosen, new, old)

    sums = jax.tree.map(lambda v: renew(jnp.zeros_like(v), v), pes.sums)
    return nn.meta.PES(jax.tree.map(renew, fresh, pes.states), sums)


def meta_train(way: str, steps: int, seed: int) -> dict:
    """Return the meta-parameters after so many pieces."""
    nn.manual_seed(seed)
    _, params = nn.functionalize(Rule())
    theta, as_dict = ravel_pytree(params)  # one array: one draw for a perturbation
    advance = lambda theta, run: piece(as_dict(theta), run)
    tasks = jax.tree.map(jnp.asarray, sample_tasks(seed, 1000))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(OUTER_LR, steps))
    )
    pes = nn.meta.pes_init(begin(jax.tree.map(lambda v: v[0], tasks)), theta, PAIRS)
    # The first runs are cut to different lengths: later all phases of a run are there at any time.
    phase = PIECE * (jnp.arange(2 * PAIRS) % PAIRS % (HORIZON // PIECE))
    pes = pes._replace(states=pes.states._replace(done=phase))

    def step(carry, x):
        (theta, slots, pes), (noise, which) = carry, x
        pes = restart(jax.tree.map(lambda v: v[which], tasks), pes)
        value, grads, pes = gradient(way, advance, theta, pes, noise)
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(theta, updates), slots, pes), value

    carry = theta, tx.init(theta), pes
    which = np.random.default_rng(seed).integers(0, 1000, (steps, PAIRS))
    xs = jax.random.split(jax.random.key(seed), steps), which
    (theta, _, _), _ = nn.meta.loop(step, carry, xs, chunk=100, progress=way)
    return as_dict(theta)


# --------------------------------------------------------------------------------------------------
# Comparison


def curves(tx: optax.GradientTransformation, tasks: tuple) -> jax.Array:
    """Train on tasks; return the log10 of the loss at each step, (tasks, 100)."""

    def one_task(start, x, y):
        adapted = nn.meta.adapt(
            student,
            start,
            F.mse_loss,
            (x, y),
            optimizer=tx,
            steps=HORIZON,
            batches=True,
            first_order=True,
        )
        return jnp.log10(adapted.losses + FLOOR)

    return jax.vmap(one_task)(*tasks)


GRID = 10.0 ** np.arange(-3.0, 0.1, 0.25)
BASELINES = {
    "SGD": lambda lr, momentum: optax.sgd(lr, momentum),
    "Adam": lambda lr, momentum: optax.adam(lr, momentum),
    "Adam, cosine": lambda lr, momentum: optax.adam(
        optax.cosine_decay_schedule(lr, HORIZON), momentum
    ),
}


def tune(name: str, tasks: tuple) -> optax.GradientTransformation:
    """Return the optimizer of the grid that is best over whole runs, and its settings."""
    grid = jnp.array(list(itertools.product(GRID, [0.0, 0.5, 0.9]))).T
    make = BASELINES[name]
    score = jax.jit(jax.vmap(lambda lr, b: curves(make(lr, b), tasks).mean()))(*grid)
    best = int(jnp.nanargmin(score))  # large rates diverge
    lr, momentum = map(float, grid[:, best])
    print(f"{name}: learning rate {lr:.3g}, momentum {momentum}")
    return make(lr, momentum)


def draw(results: dict[str, np.ndarray], file: Path) -> None:
    """Save a picture of the mean curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for name, logs in results.items():
        axis.semilogy(10 ** logs.mean(0), label=name)
    axis.set(xlabel="step", ylabel="loss, geometric mean over new tasks")
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Meta-train, tune the others, compare; return log10 of the losses on new tasks by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="meta-steps: pieces of 10 steps")
    parser.add_argument("--gradient", choices=["pes", "truncated", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/learned_optimizer.png"))
    args = parser.parse_args(argv)

    optimizers = {
        f"learned, {way}": learned(meta_train(way, args.steps, args.seed))
        for way in (["pes", "truncated"] if args.gradient == "both" else [args.gradient])
    }
    known = jax.tree.map(lambda v: v[:100], sample_tasks(args.seed, 1000))
    new = sample_tasks(2017, 256)
    optimizers |= {name: tune(name, known) for name in BASELINES}
    results = {
        name: np.asarray(jax.jit(partial(curves, tx))(new)) for name, tx in optimizers.items()
    }
    print(f"{'loss on 256 new tasks':24}{'whole run':>12}{'last 10':>12}  (geometric means)")
    for name, logs in results.items():
        print(f"{name:24}{10 ** logs.mean():12.4f}{10 ** logs[:, -10:].mean():12.4f}")
    draw(results, args.picture)
    print(f"picture: {args.picture}")
    return results


if __name__ == "__main__":
    main()
