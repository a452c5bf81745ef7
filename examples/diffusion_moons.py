"""A diffusion model of two moons, with averaged weights: a second module that follows the first.

The network learns to tell the noise in a noisy point; from noise alone it leads back to the moons, step by
step. The average of the weights over the last steps draws better points than the last weights do. About 20
seconds on two cores.

    python examples/diffusion_moons.py [--steps 8000] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F

TIMES, DECAY, SPREAD = 100, 0.995, 0.05
SIGNAL = np.cos(np.linspace(0, np.pi / 2, TIMES + 2)[:-1], dtype=np.float32)  # the data's share
NOISE = np.sqrt(1 - SIGNAL**2)  # at time 0 there is none
CENTRES = np.array([[-0.5, -0.25], [0.5, 0.25]], np.float32)


class Denoiser(nn.Module):
    """Source: Ho, Jain and Abbeel, Denoising diffusion probabilistic models, 2020."""

    def __init__(self, hidden: int = 128, waves: int = 8):
        super().__init__()
        self.register_buffer("rates", np.pi * jnp.arange(1, waves + 1) / TIMES, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(2 + 2 * waves, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, points, times):
        """Return the noise in points (N, 2) at times (N,)."""
        angles = times[:, None] * self.rates
        return self.layers(jnp.concatenate([points, jnp.sin(angles), jnp.cos(angles)], -1))


@nn.jit
def train_step(model: Denoiser, average: Denoiser, opt: nn.Optimizer, points) -> jax.Array:
    """One step of the model; its average follows."""
    times = jax.random.randint(nn.next_key(), (len(points),), 1, TIMES + 1)
    noise = jax.random.normal(nn.next_key(), points.shape)
    signal, share = jnp.asarray(SIGNAL)[times, None], jnp.asarray(NOISE)[times, None]

    def loss_of(model):
        return F.mse_loss(model(signal * points + share * noise, times), noise)

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.value = DECAY * slow + (1 - DECAY) * fast
    return loss


@nn.jit
def sample(model: Denoiser, noise) -> jax.Array:
    """Lead noise (N, 2) to points (N, 2); source: Song, Meng and Ermon, DDIM, 2021."""
    signal, share = jnp.asarray(SIGNAL), jnp.asarray(NOISE)

    def back(i, points):
        time = TIMES - i
        noise = model(points, jnp.full(len(points), time))
        clean = (points - share[time] * noise) / signal[time]
        return signal[time - 1] * clean + share[time - 1] * noise

    return nn.fori_loop(0, TIMES, back, noise)


def moons(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw points (size, 2) along two half circles of radius 1."""
    lower = rng.integers(0, 2, size)
    angle = np.pi * (rng.random(size) + lower)
    points = np.stack([np.cos(angle), np.sin(angle)], -1) + CENTRES[lower]
    return (points + SPREAD * rng.normal(size=(size, 2))).astype(np.float32)


def distances(points: np.ndarray) -> np.ndarray:
    """Return how far points (N, 2) are from each half circle, (N, 2)."""
    x, y = np.moveaxis(points[:, None] - CENTRES, -1, 0)  # each (N, 2)
    y = y * np.array([1, -1])  # the lower moon turned up
    ends = np.hypot(np.abs(x) - 1, y)
    return np.where(y > 0, np.abs(np.hypot(x, y) - 1), ends)


def draw(shown: dict[str, np.ndarray], file: Path) -> None:
    """Save a picture of several sets of points."""
    figure = Figure(figsize=(4 * len(shown), 3), layout="constrained")
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True)
    for axis, (title, points) in zip(axes, shown.items(), strict=True):
        axis.plot(*points[:1000].T, ".", ms=2)
        axis.set(title=title, aspect="equal", xlim=(-2, 2), ylim=(-1.5, 1.5))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Train, print the distances, save the picture; return the points of data and models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/diffusion_moons.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = Denoiser()
    average = copy.deepcopy(model)
    opt = nn.Optimizer(model, optax.adam(2e-3))
    for _ in range(args.steps):
        train_step(model, average, opt, moons(rng, args.batch_size))

    noise = rng.normal(size=(5000, 2)).astype(np.float32)
    shown = {
        "data": moons(rng, 5000),
        "last weights": np.asarray(sample(model, noise)),
        "averaged weights": np.asarray(sample(average, noise)),
    }
    for name, points in shown.items():
        print(f"{name}: mean distance from the moons {distances(points).min(1).mean():.4f}")
    draw(shown, args.picture)
    print(f"picture: {args.picture}")
    return shown


if __name__ == "__main__":
    main()
