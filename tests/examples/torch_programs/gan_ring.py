"""A GAN whose critic has spectral norm, on a ring of eight Gaussians, in torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

NOISE, MODES, SPREAD, RADIUS = 8, 8, 0.1, 2.0
ANGLES = 2 * np.pi * np.arange(MODES) / MODES
CENTRES = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1).astype(np.float32)


class Generator(nn.Module):
    def __init__(self, hidden: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(NOISE, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, size: int) -> Tensor:
        return self.layers(torch.randn(size, NOISE))


class Critic(nn.Module):
    def __init__(self, hidden: int = 64, scale: float = 4.0):
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(2, hidden)), nn.LeakyReLU(0.1),
            spectral_norm(nn.Linear(hidden, hidden)), nn.LeakyReLU(0.1),
            spectral_norm(nn.Linear(hidden, 1)),
        )  # fmt: skip

    def forward(self, points):
        return self.scale * self.layers(points)[:, 0]


def train_step(generator, critic, generator_opt, critic_opt, points) -> tuple:
    critic_opt.zero_grad()
    fake = generator(len(points)).detach()
    of_critic = (F.softplus(-critic(points)) + F.softplus(critic(fake))).mean()
    of_critic.backward()
    critic_opt.step()

    generator_opt.zero_grad()
    of_generator = F.softplus(-critic(generator(len(points)))).mean()
    of_generator.backward()
    generator_opt.step()
    return of_critic.detach(), of_generator.detach()


def ring(rng: np.random.Generator, size: int) -> np.ndarray:
    centres = CENTRES[rng.integers(0, MODES, size)]
    return centres + SPREAD * rng.normal(size=(size, 2)).astype(np.float32)


def scores(points: np.ndarray) -> dict[str, float]:
    distances = np.linalg.norm(points[:, None] - CENTRES, axis=-1)
    nearest, near = distances.argmin(1), distances.min(1) < 4 * SPREAD
    counts = np.bincount(nearest[near], minlength=MODES)
    found = counts > len(points) / MODES / 10
    return {"modes": int(found.sum()), "near": float(near.mean())}


@torch.no_grad()
def draw(generator: Generator, critic: Critic, points: np.ndarray, file: Path) -> None:
    side = np.linspace(-3, 3, 100, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    values = critic(torch.from_numpy(grid)).numpy().reshape(len(side), -1)
    shown = {"data": points, "generated": generator(len(points)).numpy()}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (title, drawn) in zip(axes, shown.items(), strict=True):
        axis.contourf(side, side, values, 12, cmap="Blues")
        axis.plot(*drawn.T, "C1.", ms=2)
        axis.set(title=title, aspect="equal")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/gan_ring.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    generator, critic = Generator(), Critic()
    generator_opt = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.999))
    critic_opt = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for _ in range(args.steps):
        points = torch.from_numpy(ring(rng, args.batch_size))
        train_step(generator, critic, generator_opt, critic_opt, points)

    critic.eval()
    with torch.no_grad():
        result = scores(generator(5000).numpy())
    print(f"modes found {result['modes']} of {MODES}, near a centre {result['near']:.1%}")
    draw(generator, critic, ring(rng, 1000), args.picture)
    print(f"picture: {args.picture}")
    return result


if __name__ == "__main__":
    main()
