"""A diffusion model of two moons, with averaged weights, in torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

TIMES, DECAY, SPREAD = 100, 0.995, 0.05
SIGNAL = torch.cos(torch.linspace(0, np.pi / 2, TIMES + 2)[:-1])
NOISE = torch.sqrt(1 - SIGNAL**2)
CENTRES = np.array([[-0.5, -0.25], [0.5, 0.25]], np.float32)


class Denoiser(nn.Module):
    rates: Tensor

    def __init__(self, hidden: int = 128, waves: int = 8):
        super().__init__()
        self.register_buffer("rates", torch.pi * torch.arange(1, waves + 1) / TIMES, False)
        self.layers = nn.Sequential(
            nn.Linear(2 + 2 * waves, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, points, times):
        angles = times[:, None] * self.rates
        return self.layers(torch.cat([points, angles.sin(), angles.cos()], -1))


def train_step(model, average, opt: torch.optim.Optimizer, points: Tensor) -> Tensor:
    times = torch.randint(1, TIMES + 1, (len(points),))
    noise = torch.randn_like(points)
    signal, share = SIGNAL[times, None], NOISE[times, None]
    opt.zero_grad()
    loss = F.mse_loss(model(signal * points + share * noise, times), noise)
    loss.backward()
    opt.step()
    average.update_parameters(model)
    return loss.detach()


@torch.no_grad()
def sample(model, points: Tensor) -> np.ndarray:
    for time in range(TIMES, 0, -1):
        noise = model(points, torch.full((len(points),), time))
        clean = (points - NOISE[time] * noise) / SIGNAL[time]
        points = SIGNAL[time - 1] * clean + NOISE[time - 1] * noise
    return points.numpy()


def moons(rng: np.random.Generator, size: int) -> np.ndarray:
    lower = rng.integers(0, 2, size)
    angle = np.pi * (rng.random(size) + lower)
    points = np.stack([np.cos(angle), np.sin(angle)], -1) + CENTRES[lower]
    return (points + SPREAD * rng.normal(size=(size, 2))).astype(np.float32)


def distances(points: np.ndarray) -> np.ndarray:
    x, y = np.moveaxis(points[:, None] - CENTRES, -1, 0)
    y = y * np.array([1, -1])
    ends = np.hypot(np.abs(x) - 1, y)
    return np.where(y > 0, np.abs(np.hypot(x, y) - 1), ends)


def draw(shown: dict[str, np.ndarray], file: Path) -> None:
    figure = Figure(figsize=(4 * len(shown), 3), layout="constrained")
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True)
    for axis, (title, points) in zip(axes, shown.items(), strict=True):
        axis.plot(*points[:1000].T, ".", ms=2)
        axis.set(title=title, aspect="equal", xlim=(-2, 2), ylim=(-1.5, 1.5))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/diffusion_moons.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = Denoiser()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(args.steps):
        points = torch.from_numpy(moons(rng, args.batch_size))
        train_step(model, average, opt, points)

    noise = torch.randn(5000, 2)
    shown = {
        "data": moons(rng, 5000),
        "last weights": sample(model, noise),
        "averaged weights": sample(average, noise),
    }
    for name, points in shown.items():
        print(f"{name}: mean distance from the moons {distances(points).min(1).mean():.4f}")
    draw(shown, args.picture)
    print(f"picture: {args.picture}")
    return shown


if __name__ == "__main__":
    main()
