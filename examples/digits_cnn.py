"""A CNN with BatchNorm and Dropout on handwritten digits: classes, one compiled train step.

The 1,797 images of 8 x 8 pixels ship with scikit-learn; a quarter is kept for the test. About half a
minute on two cores, 99 % test accuracy.

    python examples/digits_cnn.py
    python examples/digits_cnn.py --epochs 20 --seed 1 --save digits.npz
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F


class DigitsCNN(nn.Module):
    """Two convolutions, a pooling, one more convolution, and a head of two linear layers."""

    def __init__(self, dropout: float = 0.3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * 2 * 2, 64),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, 10),
        )

    def forward(self, images: jax.Array) -> jax.Array:
        x = self.features(images)  # (N, 1, 8, 8) -> (N, 64, 2, 2)
        return self.head(x)  # (N, 10)


@nn.jit
def train_step(model: nn.Module, opt: nn.Optimizer, images, labels) -> jax.Array:
    """One step; weights, running statistics, dropout's generator and Adam's slots change in place."""

    def loss_of(model):
        return F.cross_entropy(model(images), labels)

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    return loss


@nn.jit
def predict(model: nn.Module, images) -> jax.Array:
    return model(images).argmax(-1)


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return train images (1347, 1, 8, 8) in [0, 1], test images, train labels, test labels."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)


def main(argv: list[str] | None = None) -> float:
    """Train, print, and return the test accuracy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FILE", help="write the weights to this .npz file")
    args = parser.parse_args(argv)

    train_x, test_x, train_y, test_y = load_data()
    steps_per_epoch = len(train_x) // args.batch_size

    nn.manual_seed(args.seed)
    model = DigitsCNN()
    schedule = optax.cosine_onecycle_schedule(args.epochs * steps_per_epoch, args.lr)
    opt = nn.Optimizer(model, optax.adamw(schedule, weight_decay=1e-2))

    order = np.random.default_rng(args.seed)
    progress = tqdm(range(args.epochs), desc="digits", unit="epoch")
    for _ in progress:
        model.train()
        shuffled = order.permutation(len(train_x))
        losses = []
        for i in range(steps_per_epoch):
            batch = shuffled[i * args.batch_size : (i + 1) * args.batch_size]
            losses.append(train_step(model, opt, train_x[batch], train_y[batch]))
        progress.set_postfix(loss=f"{float(jnp.mean(jnp.stack(losses))):.4f}")

    model.eval()  # running statistics instead of the batch's, no dropout
    correct = np.asarray(predict(model, test_x)) == test_y
    accuracy = float(correct.mean())
    print(f"test accuracy {accuracy:.2%} ({correct.sum()} of {len(test_y)} images)")
    if args.save:
        np.savez(args.save, **model.state_dict())
        print(f"weights saved to {args.save}")
    return accuracy


if __name__ == "__main__":
    main()
