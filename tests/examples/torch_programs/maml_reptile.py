"""MAML and Reptile on sinusoids, in torch."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

POINTS, TASKS, INNER_LR, INNER_STEPS = 10, 16, 0.02, 5


def sample_tasks(rng: np.random.Generator, tasks: int, points: int) -> tuple:
    amplitude, phase = rng.uniform(0.1, 5, (tasks, 1, 1)), rng.uniform(0, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5, 5, (tasks, points, 1))
    y = amplitude * np.sin(x - phase)
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
initial = {name: p.detach() for name, p in model.named_parameters()}


def error(params: dict, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(functional_call(model, params, (x,)), y)


def adapted(params: dict, x: Tensor, y: Tensor) -> dict:
    for _ in range(INNER_STEPS):
        grads = grad(error)(params, x, y)
        params = {name: p - INNER_LR * grads[name] for name, p in params.items()}
    return params


def maml_gradient(params: dict, x: Tensor, y: Tensor) -> dict:
    def loss_of(params):
        def one_task(x, y):
            return error(adapted(params, x[:POINTS], y[:POINTS]), x[POINTS:], y[POINTS:])

        return vmap(one_task)(x, y).mean()

    return grad(loss_of)(params)


def reptile_gradient(params: dict, x: Tensor, y: Tensor) -> dict:
    new = vmap(adapted, in_dims=(None, 0, 0))(params, x, y)
    return {name: p - new[name].mean(0) for name, p in params.items()}


def train(meta_gradient, lr: float, steps: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    params = {name: p.clone() for name, p in initial.items()}
    opt = torch.optim.Adam(params.values(), lr=lr)
    for _ in range(steps):
        grads = meta_gradient(params, *sample_tasks(rng, TASKS, 2 * POINTS))
        for name, p in params.items():
            p.grad = grads[name]
        opt.step()
    return params


def errors(params: dict, x: Tensor, y: Tensor) -> Tensor:
    def one_task(x, y):
        return error(adapted(params, x[:POINTS], y[:POINTS]), x[POINTS:], y[POINTS:])

    return vmap(one_task)(x, y)


def draw(found: dict[str, dict], seed: int, file: Path) -> None:
    x, y = (a[0] for a in sample_tasks(np.random.default_rng(seed), 1, 300))
    order = x[:, 0].argsort()
    figure = Figure(figsize=(4 * len(found), 3), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    for axis, (name, params) in zip(axes, found.items(), strict=True):
        new = adapted(params, x[:POINTS], y[:POINTS])
        before, after = (functional_call(model, p, (x[order],)) for p in (params, new))
        axis.plot(x[order], y[order], "k", lw=1, label="task")
        axis.plot(x[:POINTS], y[:POINTS], "k^", label="points given")
        axis.plot(x[order], before, "C0:", label="before")
        axis.plot(x[order], after, "C1", label=f"after {INNER_STEPS} steps")
        axis.set_title(name)
    axes[0].legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
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
    scores = {name: errors(params, *new_tasks).mean().item() for name, params in found.items()}
    for name, score in scores.items():
        print(f"{name}: error {score:.2f} after {INNER_STEPS} steps on {POINTS} points")
    draw(found, args.seed + 2, args.picture)
    print(f"picture: {args.picture}")
    return scores


if __name__ == "__main__":
    main()
