"""A variational autoencoder on handwritten digits, in torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn


class VAE(nn.Module):
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
        mean, logvar = self.encoder(images).chunk(2, dim=-1)
        noise = torch.randn_like(mean)
        return self.decoder(mean + noise * torch.exp(0.5 * logvar)), mean, logvar


def negative_bound(model: nn.Module, images: Tensor) -> Tensor:
    logits, mean, logvar = model(images)
    ink = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    divergence = -0.5 * torch.sum(1 + logvar - mean**2 - logvar.exp())
    return (ink + divergence) / len(images)


def train_step(model: nn.Module, opt: torch.optim.Optimizer, images: Tensor) -> Tensor:
    opt.zero_grad()
    loss = negative_bound(model, images)
    loss.backward()
    opt.step()
    return loss.detach()


def load_data() -> tuple[np.ndarray, np.ndarray]:
    images, _ = load_digits(return_X_y=True)
    mixed = np.random.default_rng(0).permutation((images / 16).astype(np.float32))
    return mixed[:1347], mixed[1347:]


def independent_pixels(train: np.ndarray, test: np.ndarray) -> float:
    p = train.mean(0).clip(1e-3, 1 - 1e-3)
    return float(-(test * np.log(p) + (1 - test) * np.log(1 - p)).sum(1).mean())


@torch.no_grad()
def draw(model: VAE, test: np.ndarray, file: Path) -> None:
    again = torch.sigmoid(model(torch.from_numpy(test[:60]))[0]).numpy()
    side = np.linspace(-2, 2, 12, dtype=np.float32)
    codes = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    plane = torch.sigmoid(model.decoder(torch.from_numpy(codes))).numpy()
    shown = {"images": test[:60], "from their codes": again, "the plane of codes": plane}
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[6, 6, 12])
    for axis, (title, images) in zip(axes, shown.items(), strict=True):
        columns = 6 if len(images) == 60 else 12
        rows = images.reshape(-1, columns, 8, 8).transpose(0, 2, 1, 3)
        axis.imshow(rows.reshape(-1, 8 * columns), cmap="gray_r")
        axis.set_title(title)
        axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/vae_digits.png"))
    args = parser.parse_args(argv)

    train, test = load_data()
    torch.manual_seed(args.seed)
    model = VAE()
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    images = torch.from_numpy(train)
    for _ in range(args.epochs):
        order = torch.randperm(len(train))
        for start in range(0, len(train) - args.batch_size + 1, args.batch_size):
            train_step(model, opt, images[order[start : start + args.batch_size]])

    with torch.no_grad():
        nats = {
            "VAE": negative_bound(model, torch.from_numpy(test)).item(),
            "independent pixels": independent_pixels(train, test),
        }
    for name, value in nats.items():
        print(f"{name}: {value:.2f} nats per new image")
    draw(model, test, args.picture)
    print(f"picture: {args.picture}")
    return nats


if __name__ == "__main__":
    main()
