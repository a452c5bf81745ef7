"""What the curvature of a small network tells: which labels are wrong, and how its loss is curved.

A network 64-32-10 learns the digits of scikit-learn, of which five per cent have wrong labels, up to a
minimum of the loss with a small penalty on the weights.

1. Influence functions (Koh, Liang 2017): examples whose removal would lower the loss on clean digits the
   most are those with wrong labels.
2. The spectrum of the Hessian: most of its 2,410 eigenvalues lie near the penalty, and a few stand out,
   about one for each class less one (Sagun et al. 2017, Papyan 2019).

    python examples/mislabelled_digits.py [--steps 1500] [--seed 0] [--picture out/mislabelled_digits.png]

About half a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature

WRONG, PENALTY, TOP = 0.05, 1e-2, 20


def load_data() -> tuple[jax.Array, ...]:
    """Return train images (1347, 64) in [0, 1], test images (450, 64), train labels, test labels."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return tuple(map(jnp.asarray, split))


def with_wrong_labels(labels: jax.Array, seed: int) -> tuple[jax.Array, np.ndarray]:
    """Return labels of which some are replaced by another class, and whether each was, (N,)."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), round(WRONG * len(labels)), replace=False)
    noisy, wrong = np.array(labels), np.zeros(len(labels), bool)
    noisy[chosen] = (noisy[chosen] + rng.integers(1, 10, len(chosen))) % 10
    wrong[chosen] = True
    return jnp.asarray(noisy), wrong


def train(images: jax.Array, labels: jax.Array, steps: int, seed: int) -> nn.Module:
    """Return a network at a minimum of the mean loss and its penalty: all examples in each step."""
    nn.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    fn, params = nn.functionalize(model)
    rule = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def penalised(params: dict) -> jax.Array:
        penalty = sum((p**2).sum() for p in jax.tree.leaves(params))
        return F.cross_entropy(fn(params, images), labels) + PENALTY / 2 * penalty

    def step(carry, _):
        params, slots = carry
        updates, slots = rule.update(jax.grad(penalised)(params), slots)
        return (optax.apply_updates(params, updates), slots), None

    carry = params, rule.init(params)
    (params, _), _ = nn.meta.loop(step, carry, length=steps, chunk=100, progress="training")
    model.load_state_dict(params)
    return model


def draw(images, noisy, scores, wrong, density, top, file: Path, shown: int = 24) -> None:
    """Save a picture: the spectrum, and the digits with the lowest influence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2, 3])
    axis = left.subplots()
    at = np.linspace(-0.5, float(top[0]) * 1.1, 800)
    axis.plot(at, np.asarray(density.density(at, width=0.03)))
    axis.plot(top, np.full(len(top), 1e-4), "k|")
    axis.set(xlabel="eigenvalue", yscale="log", ylim=(1e-5, None), title="Hessian, density")
    right.suptitle("lowest influence: the label given, red if it was made wrong", fontsize=9)
    for axis, i in zip(right.subplots(3, shown // 3).flat, np.argsort(scores)[:shown], strict=True):
        axis.imshow(images[i].reshape(8, 8), cmap="gray_r")
        axis.set_title(int(noisy[i]), color="red" if wrong[i] else "black", fontsize=9)
        axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, score the examples, look at the spectrum; print the numbers and return them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/mislabelled_digits.png"))
    args = parser.parse_args(argv)
    train_x, test_x, train_y, test_y = load_data()
    noisy, wrong = with_wrong_labels(train_y, args.seed)
    model = train(train_x, noisy, args.steps, args.seed)

    scores = np.asarray(
        curvature.influence(
            model, F.cross_entropy, (train_x, noisy), (test_x, test_y), damping=PENALTY
        )
    )
    lowest = np.argsort(scores)[: wrong.sum()]
    hessian = curvature.hessian(model, F.cross_entropy, (train_x, noisy)).damped(PENALTY)
    key = jax.random.key(args.seed)
    top = np.asarray(curvature.eigenpairs(hessian, TOP, rng=key).values)
    density = curvature.spectral_density(hessian, samples=4, steps=60, rng=key)
    numbers = {
        "accuracy": float((model(test_x).argmax(-1) == test_y).mean()),
        "precision": float(wrong[lowest].mean()),
        "largest": float(top[0]),
        "outliers": int((top > 0.2 * top[0]).sum()),
        "near zero": float((density.weights * (abs(density.nodes) < 0.1)).sum(-1).mean()),
    }
    draw(train_x, noisy, scores, wrong, density, top, args.picture)
    print(
        f"accuracy on clean digits {numbers['accuracy']:.1%}; of the {wrong.sum()} examples with the "
        f"lowest influence {numbers['precision']:.0%} have wrong labels\n"
        f"largest eigenvalue {numbers['largest']:.2f}; {numbers['outliers']} of {hessian.shape[0]} are "
        f"above a fifth of it, {numbers['near zero']:.1%} below 0.1; picture: {args.picture}"
    )
    return numbers


if __name__ == "__main__":
    main()
