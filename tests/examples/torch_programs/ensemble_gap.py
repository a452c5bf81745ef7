"""An ensemble of networks that say how sure they are, in torch."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Member(nn.Module):
    def __init__(self, hidden: int = 32):
        super().__init__()
        first = nn.Linear(1, hidden)
        nn.init.normal_(first.weight, std=2.0)
        self.layers = nn.Sequential(
            first, nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2)
        )

    def forward(self, x):
        mean, raw = self.layers(x).chunk(2, dim=-1)
        return mean, F.softplus(raw) + 1e-4


class Ensemble:
    def __init__(self, members: int):
        models = [Member() for _ in range(members)]
        self.params, self.buffers = stack_module_state(models)
        self.base = copy.deepcopy(models[0]).to("meta")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def one(params, buffers):
            return functional_call(self.base, (params, buffers), (x,))

        return vmap(one)(self.params, self.buffers)


def train_step(ensemble: Ensemble, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad()
    mean, variance = ensemble(x)
    losses = F.gaussian_nll_loss(mean, y.expand_as(mean), variance, reduction="none").mean((1, 2))
    losses.sum().backward()
    opt.step()
    return losses.detach()


@torch.no_grad()
def predict(ensemble: Ensemble, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    means, variances = ensemble(torch.from_numpy(x))
    return means.numpy(), variances.mean(0).sqrt().numpy(), means.std(0, correction=0).numpy()


def noise(x: np.ndarray) -> np.ndarray:
    return 0.1 * np.exp(x / 2)


def draw_data(rng: np.random.Generator, points: int) -> tuple[np.ndarray, np.ndarray]:
    x = rng.uniform(0.5, 2, (points, 1)) * rng.choice([-1, 1], (points, 1))
    y = np.sin(3 * x) + noise(x) * rng.normal(size=x.shape)
    return x.astype(np.float32), y.astype(np.float32)


def draw(ensemble: Ensemble, x: np.ndarray, y: np.ndarray, file: Path) -> None:
    line = np.linspace(-3, 3, 200, dtype=np.float32)[:, None]
    means, seen, apart = predict(ensemble, line)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    mean, both = means.mean(0)[:, 0], np.hypot(seen, apart)[:, 0]
    for width, label in ((both, "noise and disagreement"), (seen[:, 0], "noise")):
        low, high = mean - 2 * width, mean + 2 * width
        axis.fill_between(line[:, 0], low, high, color="C0", alpha=0.2, label=label)
    axis.plot(line, means[:, :, 0].T, "C0", lw=0.5)
    axis.plot(x, y, "C3.", ms=4, label="data")
    axis.set(ylim=(-3, 3), xlabel="x", ylabel="y")
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/ensemble_gap.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    x, y = draw_data(np.random.default_rng(args.seed), 300)
    ensemble = Ensemble(args.members)
    opt = torch.optim.Adam(ensemble.params.values(), lr=5e-3)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(args.steps):
        train_step(ensemble, opt, inputs, targets)

    inside = np.linspace(0.5, 2, 50, dtype=np.float32)[:, None] * np.array([-1, 1], np.float32)
    _, seen, apart = predict(ensemble, inside.reshape(-1, 1))
    off = np.abs(np.log(seen[:, 0] / noise(inside.ravel())))
    numbers = {
        "noise, off by a factor of": float(np.exp(off.mean())),
        "disagreement on the data": float(apart.mean()),
        "disagreement in the gap": float(predict(ensemble, np.zeros((1, 1), np.float32))[2].mean()),
    }
    for name, number in numbers.items():
        print(f"{name} {number:.3f}")
    draw(ensemble, x, y, args.picture)
    print(f"picture: {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
