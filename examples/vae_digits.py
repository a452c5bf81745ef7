"""A variational autoencoder on handwritten digits: noise that `nn.jit` carries on from step to step.

An image becomes two numbers and their uncertainty, and an image again. The bound on the log likelihood of
new images is compared with that of pixels that know nothing of each other. About ten seconds on two cores.

    python examples/vae_digits.py [--epochs 200] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import statefulnn as nn
import statefulnn.functional as F


class VAE(nn.Module):
    """Source: Kingma and Welling, Auto-encoding variational Bayes, 2014."""

    def __init__(self, latent: int = 2, hidden: int = 256):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, 64),
        )  # fmt: skip

    def forward(self, images):
        """Return logits of the pixels (N, 64), and mean and log variance of the code (N, latent)."""
        mean, logvar = jnp.split(self.encoder(images), 2, axis=-1)
        noise = jax.random.normal(nn.next_key(), mean.shape)
        return self.decoder(mean + noise * jnp.exp(0.5 * logvar)), mean, logvar


def negative_bound(model: nn.Module, images) -> jax.Array:
    """Return the bound on -log p(images), in nats per image; a pixel is a probability of ink."""
    logits, mean, logvar = model(images)
    ink = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    divergence = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar))
    return (ink + divergence) / len(images)


@nn.jit
def train_step(model: nn.Module, opt: nn.Optimizer, images) -> jax.Array:
    loss, grads = nn.value_and_grad(negative_bound)(model, images)
    opt.step(grads)
    return loss


def load_data() -> tuple[np.ndarray, np.ndarray]:
    """Return images to train on (1347, 64) and to test on (450, 64), from 0 to 1."""
    images, _ = load_digits(return_X_y=True)
    mixed = np.random.default_rng(0).permutation((images / 16).astype(np.float32))
    return mixed[:1347], mixed[1347:]


def independent_pixels(train: np.ndarray, test: np.ndarray) -> float:
    """Return -log p of a model that knows each pixel's mean, and no relation between pixels."""
    p = train.mean(0).clip(1e-3, 1 - 1e-3)
    return float(-(test * np.log(p) + (1 - test) * np.log(1 - p)).sum(1).mean())


def draw(model: VAE, test: np.ndarray, file: Path) -> None:
    """Save a picture: new images, the same from their codes, and what lies in the plane of codes."""
    again = jax.nn.sigmoid(nn.jit(model)(test[:60])[0])
    side = np.linspace(-2, 2, 12, dtype=np.float32)
    codes = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    plane = jax.nn.sigmoid(model.decoder(codes))
    shown: dict[str, Any] = {
        "images": test[:60],
        "from their codes": again,
        "the plane of codes": plane,
    }
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[6, 6, 12])
    for axis, (title, images) in zip(axes, shown.items(), strict=True):
        columns = 6 if len(images) == 60 else 12
        rows = np.asarray(images).reshape(-1, columns, 8, 8).transpose(0, 2, 1, 3)
        axis.imshow(rows.reshape(-1, 8 * columns), cmap="gray_r")
        axis.set_title(title)
        axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, print the bounds, save the picture; return the nats per new image."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/vae_digits.png"))
    args = parser.parse_args(argv)

    train, test = load_data()
    nn.manual_seed(args.seed)
    model = VAE()
    opt = nn.Optimizer(model, optax.adam(2e-3))
    rng = np.random.default_rng(args.seed)
    for _ in range(args.epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(train) - args.batch_size + 1, args.batch_size):
            train_step(model, opt, train[order[start : start + args.batch_size]])

    nats = {
        "VAE": float(nn.jit(negative_bound)(model, test)),
        "independent pixels": independent_pixels(train, test),
    }
    for name, value in nats.items():
        print(f"{name}: {value:.2f} nats per new image")
    draw(model, test, args.picture)
    print(f"picture: {args.picture}")
    return nats


if __name__ == "__main__":
    main()
