"""A GAN whose critic has spectral norm, on a ring of eight Gaussians: two modules in one compiled step.

A generator that gives up some of the eight is the usual failure. Spectral norm keeps the critic from
changing faster than its input (Miyato et al. 2018). About 20 seconds on two cores.

    python examples/gan_ring.py [--steps 6000] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.utils.parametrizations import spectral_norm

NOISE, MODES, SPREAD, RADIUS = 8, 8, 0.1, 2.0
ANGLES = 2 * np.pi * np.arange(MODES) / MODES
CENTRES = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1).astype(np.float32)  # (8, 2)


class Generator(nn.Module):
    def __init__(self, hidden: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(NOISE, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, size: int) -> jax.Array:
        """Draw points (size, 2)."""
        return self.layers(jax.random.normal(nn.next_key(), (size, NOISE)))


class Critic(nn.Module):
    """Source: Miyato et al., Spectral normalization for generative adversarial networks, 2018."""

    def __init__(self, hidden: int = 64, scale: float = 4.0):
        super().__init__()
        self.scale = scale  # of the logits: how fast they may change
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(2, hidden)), nn.LeakyReLU(0.1),
            spectral_norm(nn.Linear(hidden, hidden)), nn.LeakyReLU(0.1),
            spectral_norm(nn.Linear(hidden, 1)),
        )  # fmt: skip

    def forward(self, points):
        return self.scale * self.layers(points)[:, 0]  # (N, 2) -> (N,)


@nn.jit
def train_step(generator, critic, generator_opt, critic_opt, points) -> tuple:
    """A step of the critic, then one of the generator; return both losses."""

    def critic_loss(critic):
        fake = jax.lax.stop_gradient(generator(len(points)))
        return (F.softplus(-critic(points)) + F.softplus(critic(fake))).mean()

    def generator_loss(generator):
        return F.softplus(-critic(generator(len(points)))).mean()

    of_critic, grads = nn.value_and_grad(critic_loss)(critic)
    critic_opt.step(grads)
    of_generator, grads = nn.value_and_grad(generator_loss)(generator)
    generator_opt.step(grads)
    return of_critic, of_generator


def ring(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw points (size, 2) around the eight centres."""
    centres = CENTRES[rng.integers(0, MODES, size)]
    return centres + SPREAD * rng.normal(size=(size, 2)).astype(np.float32)


def scores(points: np.ndarray) -> dict[str, float]:
    """Return how many centres have points, and the share of points within four spreads of a centre."""
    distances = np.linalg.norm(points[:, None] - CENTRES, axis=-1)  # (N, 8)
    nearest, near = distances.argmin(1), distances.min(1) < 4 * SPREAD
    counts = np.bincount(nearest[near], minlength=MODES)
    found = counts > len(points) / MODES / 10  # a tenth of its share
    return {"modes": int(found.sum()), "near": float(near.mean())}


def draw(generator: Generator, critic: Critic, points: np.ndarray, file: Path) -> None:
    """Save a picture of points, drawn points, and what the critic thinks of the plane."""
    side = np.linspace(-3, 3, 100, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    values = np.asarray(critic(grid)).reshape(len(side), -1)
    shown = {"data": points, "generated": np.asarray(generator(len(points)))}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (title, drawn) in zip(axes, shown.items(), strict=True):
        axis.contourf(side, side, values, 12, cmap="Blues")
        axis.plot(*drawn.T, "C1.", ms=2)
        axis.set(title=title, aspect="equal")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, print the scores, save the picture; return the scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/gan_ring.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    generator, critic = Generator(), Critic()
    generator_opt = nn.Optimizer(generator, optax.adam(5e-4, b1=0.5))
    critic_opt = nn.Optimizer(critic, optax.adam(2e-3, b1=0.5))
    for _ in range(args.steps):
        points = ring(rng, args.batch_size)
        train_step(generator, critic, generator_opt, critic_opt, points)

    critic.eval()
    result = scores(np.asarray(generator(5000)))
    print(f"modes found {result['modes']} of {MODES}, near a centre {result['near']:.1%}")
    draw(generator, critic, ring(rng, 1000), args.picture)
    print(f"picture: {args.picture}")
    return result


if __name__ == "__main__":
    main()
