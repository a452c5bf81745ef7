"""Data hyper-cleaning: a weight for each training example, learned so that wrong labels count for nothing.

Half of the training digits have wrong labels; a few hundred others are known to be right. The outer problem
chooses a weight between 0 and 1 for each training example; the inner one fits softmax regression to the
weighted examples by 50 steps of gradient descent; the gradient of the loss on the right labels goes through
all of these steps (Franceschi et al. 2017, section 5.1, on MNIST).

    python examples/hyper_cleaning.py [--wrong 0.5] [--steps 200] [--picture out/hyper_cleaning.png]

It prints the accuracy with all weights alike, with those learned, and with those of an oracle that knows the
wrong labels: 86.4, 90.8 and 90.6 % on test digits with seed 0. The area under the curve (AUC) of the weights
as a detector of wrong labels is 0.97. About ten seconds on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import statefulnn as nn
import statefulnn.functional as F

INNER_LR, INNER_STEPS, PENALTY, OUTER_LR = 1.0, 50, 1e-3, 0.1
fn, initial = nn.functionalize(nn.Linear(64, 10))  # fn(params, x) -> logits
START = jax.tree.map(jnp.zeros_like, initial)


class Data(NamedTuple):
    """Images (N, 64) in [0, 1] and labels of each part, and which training labels are wrong, (997,)."""

    train: tuple[jax.Array, jax.Array]
    valid: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    wrong: np.ndarray


def load_data(share: float, seed: int) -> Data:
    """Return 997 digits, of which `share` have another label, 300 to judge the weights on, 500 to test."""
    x, y = load_digits(return_X_y=True)
    images, labels = (x / 16).astype(np.float32), y.astype(np.int32)
    x, test_x, y, test_y = train_test_split(images, labels, test_size=500, random_state=seed)
    x, valid_x, y, valid_y = train_test_split(x, y, test_size=300, random_state=seed)
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(y), bool)
    wrong[rng.choice(len(y), round(share * len(y)), replace=False)] = True
    noisy = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    pair = lambda x, y: (jnp.asarray(x), jnp.asarray(y, jnp.int32))
    return Data(pair(x, noisy), pair(valid_x, valid_y), pair(test_x, test_y), wrong)


def weighted_loss(params: dict, logits: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The inner objective; an example has the weight ``sigmoid(logit)``."""
    each = F.cross_entropy(fn(params, x), y, reduction="none")
    penalty = sum((p**2).sum() for p in jax.tree.leaves(params))
    return (jax.nn.sigmoid(logits) * each).mean() + PENALTY * penalty


def fit(logits: jax.Array, train: tuple, steps: int = INNER_STEPS) -> dict:
    """Return the parameters of softmax regression to the weighted examples."""
    return nn.meta.adapt(
        None, START, weighted_loss, (logits, *train), lr=INNER_LR, steps=steps
    ).params


def outer_loss(
    logits: jax.Array, train: tuple, valid: tuple, steps: int = INNER_STEPS
) -> jax.Array:
    x, y = valid
    return F.cross_entropy(fn(fit(logits, train, steps), x), y)


def clean(data: Data, steps: int) -> tuple[jax.Array, np.ndarray]:
    """Return the logits of the weights, and the loss on the right labels before each outer step."""
    tx = optax.adam(OUTER_LR)

    def step(carry, _):
        logits, slots = carry
        loss, grads = jax.value_and_grad(outer_loss)(logits, data.train, data.valid)
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(logits, updates), slots), loss

    start = jnp.zeros(len(data.wrong))
    (logits, _), losses = nn.meta.loop(
        step, (start, tx.init(start)), length=steps, chunk=25, progress="cleaning"
    )
    return logits, losses


def draw(losses: np.ndarray, weights: np.ndarray, wrong: np.ndarray, file: Path) -> None:
    """Save a picture of the loss on the right labels, and of the weights of right and wrong ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses)
    left.set(xlabel="outer step", ylabel="validation loss")
    bins = np.linspace(0, 1, 41)
    right.hist(weights[~wrong], bins, alpha=0.6, label="right labels")
    right.hist(weights[wrong], bins, alpha=0.6, label="wrong labels")
    right.set(xlabel="weight", ylabel="examples")
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Learn the weights, print the table, save the picture; return the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wrong", type=float, default=0.5, help="share of wrong labels")
    parser.add_argument("--steps", type=int, default=200, help="outer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/hyper_cleaning.png"))
    args = parser.parse_args(argv)

    data = load_data(args.wrong, args.seed)
    learned, losses = clean(data, args.steps)

    @jax.jit
    def accuracies(logits: jax.Array) -> list[jax.Array]:
        params = fit(logits, data.train)
        return [(fn(params, x).argmax(-1) == y).mean() for x, y in (data.valid, data.test)]

    rows = {
        "all alike": jnp.zeros(len(data.wrong)),
        "learned": learned,
        "oracle": jnp.where(data.wrong, -jnp.inf, jnp.inf),
    }
    numbers = {}
    print(f"{'accuracy with weights':24}{'validation':>12}{'test':>8}")
    for name, logits in rows.items():
        valid, test = map(float, accuracies(logits))
        numbers |= {f"{name}, validation": valid, f"{name}, test": test}
        print(f"{name:24}{valid:12.1%}{test:8.1%}")
    weights = np.asarray(jax.nn.sigmoid(learned))
    numbers["AUC"] = float(roc_auc_score(data.wrong, -weights))
    draw(losses, weights, data.wrong, args.picture)
    print(
        f"AUC of the weights for wrong labels {numbers['AUC']:.3f}; mean weight of right ones "
        f"{weights[~data.wrong].mean():.2f}, of wrong ones {weights[data.wrong].mean():.2f}; "
        f"picture: {args.picture}"
    )
    return numbers


if __name__ == "__main__":
    main()
