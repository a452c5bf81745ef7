"""What the gradients of single examples are good for: privacy, batch size, wrong labels.

A small CNN on the 1,797 handwritten digits of scikit-learn, three times:

1. DP-SGD (Abadi et al. 2016): each example's gradient is clipped to norm 1, and noise added to the sum.
2. The gradient noise scale (McCandlish et al. 2018) during ordinary training: how large a batch pays.
   It grows as the loss falls.
3. Five per cent of the labels are replaced by wrong ones. Their examples have the largest gradients early
   in training (Paul et al. 2021, the GraNd score).

    python examples/per_sample_gradients.py [--epochs 40] [--seed 0] [--picture out/per_sample_gradients.png]

About a minute on two cores. How private such a run is, in (ε, δ), `nn.curvature.privacy_spent` tells for
batches that are drawn independently; here they are drawn without replacement.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature

MAX_NORM, NOISE_MULTIPLIER, LOT = 1.0, 1.0, 256
BATCH, FLIPPED, EARLY = 64, 0.05, 8  # EARLY: epochs over which the gradients' norms are averaged


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.out = nn.Linear(32 * 2 * 2, 10)

    def forward(self, images: jax.Array) -> jax.Array:
        x = F.max_pool2d(F.tanh(self.conv1(images)), 2)  # (N, 1, 8, 8) -> (N, 16, 4, 4)
        x = F.max_pool2d(F.tanh(self.conv2(x)), 2)  # (N, 32, 2, 2)
        return self.out(x.reshape(x.shape[0], -1))  # (N, 10)


def load_data() -> tuple[jax.Array, ...]:
    """Return train images (1347, 1, 8, 8) in [0, 1], test images, train labels, test labels."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int32)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return tuple(map(jnp.asarray, split))


nn.manual_seed(0)
fn, _ = nn.functionalize(CNN())  # fn(params, images) -> logits


def initial(seed: int) -> dict:
    """Return the weights of a new network, a dict name -> array."""
    nn.manual_seed(seed)
    return nn.functionalize(CNN())[1]


def loss(params: dict, image: jax.Array, label: jax.Array) -> jax.Array:
    """The loss of one example: an image (1, 8, 8) and a label ()."""
    return F.cross_entropy(fn(params, image[None]), label[None])


per_sample_gradients = nn.func.per_sample_grad(loss)  # (params, images, labels): arrays (N, ...)


def plain_gradients(params: dict, images: jax.Array, labels: jax.Array, key: jax.Array) -> dict:
    return jax.grad(lambda p: F.cross_entropy(fn(p, images), labels))(params)


def private_gradients(params: dict, images: jax.Array, labels: jax.Array, key: jax.Array) -> dict:
    private = curvature.dp_gradients(loss, MAX_NORM, NOISE_MULTIPLIER)
    return private(params, images, labels, rng=key)


PRIVATE = {"gradients": private_gradients, "batch": LOT, "lr": 0.5}
PLAIN = {"gradients": plain_gradients, "batch": BATCH, "lr": 0.1}


@jax.jit
def gradient_norms(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the norm of each example's gradient, (N,)."""
    gradients = per_sample_gradients(params, images, labels)
    squares = [jnp.sum(g**2, axis=range(1, g.ndim)) for g in jax.tree.leaves(gradients)]
    return jnp.sqrt(sum(squares))


@jax.jit
def noise_scale(params: dict, images: jax.Array, labels: jax.Array) -> curvature.NoiseScale:
    return curvature.noise_scale_of(loss, params, images, labels, batch_size=449)


@jax.jit
def accuracy(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    return (fn(params, images).argmax(-1) == labels).mean()


@functools.partial(jax.jit, static_argnames=("gradients", "batch", "lr"))
def epoch(carry, key: jax.Array, images, labels, *, gradients: Callable, batch: int, lr: float):
    """Train for one epoch in a shuffled order; `carry` is the weights and the momentum."""
    order, noise = jax.random.split(key)
    steps = len(labels) // batch
    shuffled = jax.random.permutation(order, len(labels))[: steps * batch].reshape(steps, batch)

    def step(carry, inputs):
        (params, slots), (chosen, key) = carry, inputs
        grads = gradients(params, images[chosen], labels[chosen], key)
        updates, slots = optax.sgd(lr, momentum=0.9).update(grads, slots)
        return (optax.apply_updates(params, updates), slots), None

    return jax.lax.scan(step, carry, (shuffled, jax.random.split(noise, steps)))[0]


def train(
    images,
    labels,
    epochs: int,
    seed: int,
    label: str,
    after_epoch: Callable = lambda params: None,
    **settings: Any,
) -> tuple[dict, list]:
    """Return the trained weights, and what `after_epoch` returned for each epoch."""
    params = initial(seed)
    seen, carry = [], (params, optax.sgd(settings["lr"], momentum=0.9).init(params))
    for key in tqdm(jax.random.split(jax.random.key(seed), epochs), desc=label, unit="epoch"):
        carry = epoch(carry, key, images, labels, **settings)
        seen.append(after_epoch(carry[0]))
    return carry[0], seen


def wrong_labels(labels: jax.Array, seed: int) -> tuple[jax.Array, np.ndarray]:
    """Return labels of which some are replaced by another class, and which ones."""
    rng = np.random.default_rng(seed)
    flipped = rng.choice(len(labels), round(FLIPPED * len(labels)), replace=False)
    noisy = np.array(labels)
    noisy[flipped] = (noisy[flipped] + rng.integers(1, 10, len(flipped))) % 10
    return jnp.asarray(noisy), flipped


def draw(images, noisy, scores, flipped, scales, file: Path, shown: int = 24) -> None:
    """Save a picture: the noise scale, and the examples with the largest gradients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2, 3])
    axis = left.subplots()
    axis.plot(range(1, len(scales) + 1), scales)
    axis.axhline(BATCH, ls=":", c="k", lw=1)
    axis.set(xlabel="epoch", ylabel="examples", yscale="log", title="gradient noise scale")
    right.suptitle("largest gradients: the label given, red if it was made wrong", fontsize=9)
    for axis, i in zip(
        right.subplots(3, shown // 3).flat, np.argsort(-scores)[:shown], strict=True
    ):
        axis.imshow(images[i, 0], cmap="gray_r")
        axis.set_title(int(noisy[i]), color="red" if i in flipped else "black", fontsize=9)
        axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the three parts, print the numbers, save the picture; return the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="of private training")
    parser.add_argument("--plain-epochs", type=int, default=15, help="of training without privacy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/per_sample_gradients.png"))
    args = parser.parse_args(argv)
    train_x, test_x, train_y, test_y = load_data()

    private, _ = train(train_x, train_y, args.epochs, args.seed, "private", **PRIVATE)
    plain, scales = train(
        train_x,
        train_y,
        args.plain_epochs,
        args.seed,
        "noise scale",
        lambda params: noise_scale(params, train_x, train_y),
        **PLAIN,
    )
    noisy, flipped = wrong_labels(train_y, args.seed)
    _, norms = train(
        train_x,
        noisy,
        EARLY,
        args.seed,
        "wrong labels",
        lambda params: gradient_norms(params, train_x, noisy),
        **PLAIN,
    )
    scores = np.mean(norms, axis=0)
    suspects = np.argsort(-scores)[: len(flipped)]
    third = len(scales) // 3
    # Estimates of single epochs are noisy.
    middle = lambda part: float(np.median([s.noise_scale for s in part]))
    numbers = {
        "private accuracy": float(accuracy(private, test_x, test_y)),
        "plain accuracy": float(accuracy(plain, test_x, test_y)),
        "first noise scale": middle(scales[:third]),
        "last noise scale": middle(scales[-third:]),
        "precision": float(np.isin(suspects, flipped).mean()),
    }
    print(
        f"test accuracy {numbers['private accuracy']:.1%} with gradients clipped to {MAX_NORM} and "
        f"noise {NOISE_MULTIPLIER} ({args.epochs} epochs in lots of {LOT}), "
        f"{numbers['plain accuracy']:.1%} without"
    )
    print(
        f"gradient noise scale {numbers['first noise scale']:.0f} examples in the first "
        f"{third} epochs, {numbers['last noise scale']:.0f} in the last"
    )
    print(
        f"{numbers['precision']:.1%} of the {len(flipped)} examples with the largest gradients have a "
        f"label that was made wrong ({FLIPPED:.0%} of all have)"
    )
    draw(train_x, noisy, scores, flipped, [s.noise_scale for s in scales], args.picture)
    print(f"picture: {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
