"""MAML on sinusoid regression (Finn et al. 2017, section 5.1), with `functionalize`.

A task is y = A sin(x - phase), A in [0.1, 5], phase in [0, pi], x in [-5, 5]. MAML learns weights from
which one gradient step on a few points fits a new task. The defaults are a shortened run of well under
a minute on two cores; the paper's length is `--steps 70000`.

    python examples/maml_sinusoid.py
    python examples/maml_sinusoid.py --steps 70000

Settings of the paper and of the code published with it: network 1-40-40-1 with ReLU, truncated normal
weights (std 0.01), 10 support and 10 query points, 25 tasks a meta-batch, one inner step of 0.001, Adam
with 1e-3, second order. Tested on 600 tasks with 5 points, 1, 5 and 10 gradient steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F

SHOTS, TASKS, INNER_LR, STEPS_TO_SHOW = 10, 25, 0.001, (1, 5, 10)
FINN = {"MAML": (0.67, 0.38, 0.35), "pretrained": (2.41, 2.23, 2.19)}  # table 2, 5-shot MSE
CHUNK = 500  # meta-steps in one compiled call


class Regressor(nn.Module):
    def __init__(self, hidden: int = 40):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        for name, p in self.named_parameters():
            if name.endswith("weight"):
                nn.init.trunc_normal_(p, std=0.01, a=-0.02, b=0.02)
            else:
                nn.init.zeros_(p)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.net(x)  # (K, 1) -> (K, 1)


def sample_tasks(key: jax.Array, tasks: int, points: int) -> tuple[jax.Array, jax.Array]:
    """Draw x and y, each (tasks, points, 1)."""
    a, b, c = jax.random.split(key, 3)
    amplitude = jax.random.uniform(a, (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(b, (tasks, 1, 1), maxval=jnp.pi)
    x = jax.random.uniform(c, (tasks, points, 1), minval=-5.0, maxval=5.0)
    return x, amplitude * jnp.sin(x - phase)


# The model as a pure function of its parameters: everything below is ordinary JAX.
nn.manual_seed(0)
model = Regressor()
fn, initial = nn.functionalize(model)  # fn(params, x) -> y; params: dict name -> array


def mse(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return F.mse_loss(fn(params, x), y)


def inner_step(params: dict, x: jax.Array, y: jax.Array, lr: float = INNER_LR) -> dict:
    grads = jax.grad(mse)(params, x, y)
    return jax.tree.map(lambda p, g: p - lr * g, params, grads)


def maml_loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """Adapt to each task on its first points, judge on the others."""

    def one_task(x, y):
        adapted = inner_step(params, x[:SHOTS], y[:SHOTS])
        return mse(adapted, x[SHOTS:], y[SHOTS:])

    return jax.vmap(one_task)(x, y).mean()


def pretrain_loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """The baseline of the paper: one network for all tasks at once."""
    return mse(params, x.reshape(-1, 1), y.reshape(-1, 1))


def train(loss, steps: int, seed: int, label: str) -> dict:
    """Minimise a loss over batches of tasks, and return the parameters."""
    tx = optax.adam(1e-3)

    def step(carry, key):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params, *sample_tasks(key, TASKS, 2 * SHOTS))
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    chunk = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry = (initial, tx.init(initial))
    keys = jax.random.split(jax.random.key(seed), steps)
    with tqdm(total=steps, desc=label, unit="step", unit_scale=True) as progress:
        for start in range(0, steps, CHUNK):
            carry, losses = chunk(carry, keys[start : start + CHUNK])
            progress.set_postfix(loss=f"{float(losses.mean()):.3f}")
            progress.update(len(losses))
    return carry[0]


def adaptation(params: dict, x: jax.Array, y: jax.Array, shots: int, lr: float) -> list[dict]:
    """Return the parameters before, and after each of ten steps on the first points of one task."""
    path = [params]
    for _ in range(max(STEPS_TO_SHOW)):
        path.append(inner_step(path[-1], x[:shots], y[:shots], lr))
    return path


def evaluate(params: dict, lr: float, tasks: int = 600, shots: int = 5) -> np.ndarray:
    """Return the MSE of each new task on 100 other points, (tasks, 11): before, after 1 to 10 steps."""

    def one_task(x, y):
        path = adaptation(params, x, y, shots, lr)
        return jnp.stack([mse(p, x[shots:], y[shots:]) for p in path])

    x, y = sample_tasks(jax.random.key(2017), tasks, shots + 100)
    return np.asarray(jax.jit(jax.vmap(one_task))(x, y))


def draw(params: dict, file: Path, tasks: int = 3, shots: int = 5) -> None:
    """Save a picture of a few tasks before adaptation and after 1 and 10 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = jnp.linspace(-5, 5, 200)[:, None]
    figure, axes = plt.subplots(1, tasks, figsize=(4 * tasks, 3), sharey=True)
    for axis, key in zip(axes, jax.random.split(jax.random.key(7), tasks), strict=True):
        a, b, c = jax.random.split(key, 3)
        amplitude = jax.random.uniform(a, minval=1.0, maxval=5.0)
        phase = jax.random.uniform(b, maxval=jnp.pi)
        x = jax.random.uniform(c, (shots, 1), minval=-5.0, maxval=5.0)
        path = adaptation(params, x, amplitude * jnp.sin(x - phase), shots, INNER_LR)
        axis.plot(grid, amplitude * jnp.sin(grid - phase), "k", lw=1, label="task")
        axis.plot(x, amplitude * jnp.sin(x - phase), "k^", label=f"{shots} points given")
        for steps, style in ((0, ":"), (1, "--"), (10, "-")):
            axis.plot(grid, fn(path[steps], grid), style, label=f"{steps} steps" if steps != 1 else "1 step")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Train both, print the table, save the picture; return the errors by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40_000, help="meta-steps (70000 in the paper)")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--picture", type=Path, default=Path("out/maml_sinusoid.png"))
    args = parser.parse_args(argv)

    adapted = train(maml_loss, args.steps, args.seed, "MAML")
    pretrained = train(pretrain_loss, args.steps // 4, args.seed, "pretrained")
    # The baseline gets the larger step of the paper's text, which is better for it.
    errors = {"MAML": evaluate(adapted, INNER_LR), "pretrained": evaluate(pretrained, 0.01)}

    print(f"post-adaptation MSE on {len(errors['MAML'])} new tasks, 5 points given")
    print(f"{'gradient steps':26}" + "".join(f"{s:>8}" for s in STEPS_TO_SHOW))
    for name, error in errors.items():
        chosen = error[:, list(STEPS_TO_SHOW)]
        print(f"{name + ', mean':26}" + "".join(f"{v:8.2f}" for v in chosen.mean(0)))
        print(f"{name + ', median':26}" + "".join(f"{v:8.2f}" for v in np.median(chosen, 0)))
        print(f"{name + ', Finn et al.':26}" + "".join(f"{v:8.2f}" for v in FINN[name]))
    if args.steps < 70_000:
        print(f"({args.steps} meta-steps; the paper trains 70000, `--steps 70000` does)")

    draw(adapted, args.picture)
    print(f"picture of three tasks: {args.picture}")
    return errors


if __name__ == "__main__":
    main()
