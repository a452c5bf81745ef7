"""A classifier whose training goes on from the last checkpoint, in torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Classifier(nn.Sequential):
    def __init__(self, hidden: int = 128, dropout: float = 0.2):
        super().__init__(
            nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, 10),
        )  # fmt: skip


def train_step(model: nn.Module, opt: torch.optim.Optimizer, images, labels) -> Tensor:
    opt.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    opt.step()
    return loss.detach()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> np.ndarray:
    return model(images).argmax(-1).numpy()


def load_data() -> list[Tensor]:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = [part[rows] for part in (images, labels) for rows in (order[:1347], order[1347:])]
    return [torch.from_numpy(part) for part in parts]


def train_epoch(model, opt, images, labels, batch_size: int, order: np.ndarray) -> float:
    model.train()
    losses = []
    for start in range(0, len(order) - batch_size + 1, batch_size):
        batch = order[start : start + batch_size]
        losses.append(train_step(model, opt, images[batch], labels[batch]))
    model.eval()
    return float(np.mean(losses))


def draw(losses: list[float], resumed: int, file: Path) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.semilogy(losses, "o-")
    if resumed:
        axis.axvline(resumed - 0.5, color="0.5", ls="--", label="resumed")
        axis.legend()
    axis.set(xlabel="epoch", ylabel="loss")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("out/resume_digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/resume_digits.png"))
    args = parser.parse_args(argv)

    images, test_images, labels, test_labels = load_data()
    torch.manual_seed(args.seed)
    model = Classifier()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    first, losses = 0, []
    file = args.folder / "last.pt"
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        torch.set_rng_state(saved["masks"])
        first, losses = saved["epoch"] + 1, saved["losses"]
        print(f"resumed at epoch {first}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(first, args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(images))
        losses.append(train_epoch(model, opt, images, labels, args.batch_size, order))
        saved = {"model": model.state_dict(), "opt": opt.state_dict(), "epoch": epoch}
        saved |= {"masks": torch.get_rng_state(), "losses": losses}
        torch.save(saved, args.folder / "new.pt")
        (args.folder / "new.pt").replace(file)

    accuracy = np.mean(predict(model.eval(), test_images) == test_labels.numpy())
    print(f"loss {losses[-1]:.4f}, test accuracy {accuracy:.2%}")
    draw(losses, first, args.picture)
    print(f"picture: {args.picture}")
    return model


if __name__ == "__main__":
    main()
