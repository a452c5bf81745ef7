"""An ensemble of networks that say how sure they are, on data with a gap: noise learned, ignorance shown.

Each network gives a mean and a variance, and so learns the noise, which grows with x. Where there are no data
the networks disagree, and together they know that they do not know. About ten seconds on two cores.

    python examples/ensemble_gap.py [--members 10] [--steps 1500] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F


class Member(nn.Module):
    """Source: Lakshminarayanan, Pritzel and Blundell, Simple and scalable uncertainty, 2017."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        first = nn.Linear(1, hidden)
        nn.init.normal_(first.weight, std=2.0)
        self.layers = nn.Sequential(
            first, nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2)
        )

    def forward(self, x):
        """Return mean and variance of y (N, 1) for x (N, 1)."""
        mean, raw = jnp.split(self.layers(x), 2, axis=-1)
        return mean, F.softplus(raw) + 1e-4


@nn.jit
def train_step(ensemble: nn.Ensemble, opt: nn.Optimizer, x, y) -> jax.Array:
    """One step of every member; return the losses (n,)."""

    def loss_of(ensemble):
        mean, variance = ensemble(x)  # each (n, N, 1)
        losses = F.gaussian_nll_loss(mean, y, variance, reduction="none").mean((1, 2))
        return losses.sum(), losses

    (_, losses), grads = nn.value_and_grad(loss_of, has_aux=True)(ensemble)
    opt.step(grads)
    return losses


@nn.jit
def predict(ensemble: nn.Ensemble, x) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the members' means (n, N, 1), the noise they see and their disagreement (N, 1)."""
    means, variances = ensemble(x)
    return means, jnp.sqrt(variances.mean(0)), means.std(0)


def noise(x: np.ndarray) -> np.ndarray:
    """Return the standard deviation of y at x."""
    return 0.1 * np.exp(x / 2)


def draw_data(rng: np.random.Generator, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw x (points, 1) from -2 to -0.5 and from 0.5 to 2, and y, a sine with noise."""
    x = rng.uniform(0.5, 2, (points, 1)) * rng.choice([-1, 1], (points, 1))
    y = np.sin(3 * x) + noise(x) * rng.normal(size=x.shape)
    return x.astype(np.float32), y.astype(np.float32)


def draw(ensemble: nn.Ensemble, x: np.ndarray, y: np.ndarray, file: Path) -> None:
    """Save a picture of the points, the members, and two standard deviations."""
    line = np.linspace(-3, 3, 200, dtype=np.float32)[:, None]
    means, seen, apart = map(np.asarray, predict(ensemble, line))
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
    """Train, print what the ensemble knows, save the picture; return the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/ensemble_gap.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    x, y = draw_data(np.random.default_rng(args.seed), 300)
    ensemble = nn.Ensemble(Member, args.members)
    opt = nn.Optimizer(ensemble, optax.adam(5e-3))
    for _ in range(args.steps):
        train_step(ensemble, opt, x, y)

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
