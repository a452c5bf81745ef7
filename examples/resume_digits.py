"""A classifier whose training may stop at any time: the next run goes on from the last checkpoint.

Weights, running statistics, the optimizer's numbers, dropout's generator and the losses so far are saved
after each epoch; a run that was interrupted ends with the very weights of one that was not. About ten
seconds on two cores. Stop it with Ctrl-C, and start it again.

    python examples/resume_digits.py [--epochs 20] [--folder out/resume_digits] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import statefulnn as nn
import statefulnn.functional as F


class Classifier(nn.Sequential):
    def __init__(self, hidden: int = 128, dropout: float = 0.2):
        super().__init__(
            nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, 10),
        )  # fmt: skip


@nn.jit
def train_step(model: nn.Module, opt: nn.Optimizer, images, labels) -> jax.Array:
    loss, grads = nn.value_and_grad(lambda m: F.cross_entropy(m(images), labels))(model)
    opt.step(grads)
    return loss


@nn.jit
def predict(model: nn.Module, images) -> jax.Array:
    return model(images).argmax(-1)


def load_data() -> list[np.ndarray]:
    """Return images to train on (1347, 64) and to test on (450, 64), and the labels of both."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    return [part[rows] for part in (images, labels) for rows in (order[:1347], order[1347:])]


def train_epoch(model, opt, images, labels, batch_size: int, order: np.ndarray) -> float:
    model.train()
    losses = []
    for start in range(0, len(order) - batch_size + 1, batch_size):
        batch = order[start : start + batch_size]
        losses.append(train_step(model, opt, images[batch], labels[batch]))
    model.eval()
    return float(np.mean(losses))


def draw(losses: list[float], resumed: int, file: Path) -> None:
    """Save a picture of the losses, with a line where this run went on."""
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
    """Train from where the last run ended, print the accuracy, save the picture; return the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("out/resume_digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/resume_digits.png"))
    args = parser.parse_args(argv)

    images, test_images, labels, test_labels = load_data()
    nn.manual_seed(args.seed)
    model = Classifier()
    opt = nn.Optimizer(model, optax.adamw(1e-3, weight_decay=1e-2))
    first, losses = 0, []
    with nn.Checkpointer(args.folder, keep_last=2) as checkpointer:
        if checkpointer.latest_step() is not None:
            restored = checkpointer.restore(model=model, opt=opt, masks=nn.default_generator)
            first, losses = restored.step + 1, restored.data["extra"]["losses"]
            print(f"resumed at epoch {first}")
        for epoch in range(first, args.epochs):
            order = np.random.default_rng([args.seed, epoch]).permutation(len(images))
            losses.append(train_epoch(model, opt, images, labels, args.batch_size, order))
            checkpointer.save(
                epoch, model=model, opt=opt, masks=nn.default_generator, extra={"losses": losses}
            )

    accuracy = np.mean(predict(model.eval(), test_images) == test_labels)
    print(f"loss {losses[-1]:.4f}, test accuracy {accuracy:.2%}")
    draw(losses, first, args.picture)
    print(f"picture: {args.picture}")
    return model


if __name__ == "__main__":
    main()
