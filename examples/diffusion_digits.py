"""Diffusion draws handwritten digits, each as asked for; `nn.AveragedModel` follows the training.

The network learns to tell the noise in a noisy image, given the digit; from noise alone it leads back to
images. The average of the weights draws digits that are nearer to new ones than those of the last weights, in
Fréchet distance; the other number is the share that a nearest-neighbour classifier reads as what was asked
for. About a minute on two cores.

    python examples/diffusion_digits.py [--steps 6000] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F

TIMES, DECAY = 50, 0.998
SIGNAL = np.cos(np.linspace(0, np.pi / 2, TIMES + 2)[:-1], dtype=np.float32)  # the data's share
NOISE = np.sqrt(1 - SIGNAL**2)  # at time 0 there is none


class Denoiser(nn.Module):
    """Source: Ho, Jain and Abbeel, Denoising diffusion probabilistic models, 2020."""

    def __init__(self, hidden: int = 256, blocks: int = 3):
        super().__init__()
        self.inside = nn.Linear(64, hidden)
        self.times = nn.Embedding(TIMES + 1, hidden)
        self.digits = nn.Embedding(10, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.outside = nn.Linear(hidden, 64)

    def forward(self, images, times, digits):
        """Return the noise in images (N, 64) of digits (N,) at times (N,)."""
        given = self.times(times) + self.digits(digits)
        x = self.inside(images)
        for block in self.blocks:
            x = x + block(x + given)
        return self.outside(x)


def moving(averaged: jax.Array, current: jax.Array, updates) -> jax.Array:
    """A moving average whose memory is short at first, so that it forgets the weights of the start."""
    decay = jnp.minimum(DECAY, (1 + updates) / (10 + updates))
    return decay * averaged + (1 - decay) * current


@nn.jit
def train_step(model: Denoiser, average: nn.AveragedModel, opt, images, digits) -> jax.Array:
    """One step of the model; its average follows."""
    times = jax.random.randint(nn.next_key(), (len(images),), 1, TIMES + 1)
    noise = jax.random.normal(nn.next_key(), images.shape)
    noisy = jnp.asarray(SIGNAL)[times, None] * images + jnp.asarray(NOISE)[times, None] * noise
    loss, grads = nn.value_and_grad(lambda m: F.mse_loss(m(noisy, times, digits), noise))(model)
    opt.step(grads)
    average.update_parameters(model)
    return loss


@nn.jit
def sample(model: nn.Module, noise, digits) -> jax.Array:
    """Lead noise (N, 64) to images of digits (N,); source: Song, Meng and Ermon, DDIM, 2021."""
    signal, share = jnp.asarray(SIGNAL), jnp.asarray(NOISE)

    def back(i, images):
        time = TIMES - i
        noise = model(images, jnp.full(len(images), time), digits)
        clean = jnp.clip((images - share[time] * noise) / signal[time], -1, 1)
        noise = (images - signal[time] * clean) / share[time]
        return signal[time - 1] * clean + share[time - 1] * noise

    return nn.fori_loop(0, TIMES, back, noise)


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images to train on (1347, 64) and their digits, and new images (450, 64) and theirs."""
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, digits = (images / 8 - 1).astype(np.float32)[order], digits.astype(np.int32)[order]
    return images[:1347], digits[:1347], images[1347:], digits[1347:]


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Fréchet distance of two normal distributions with the moments of images (N, 64)."""
    means = [x.mean(0) for x in (one, other)]
    a, b = (np.cov(x.astype(float), rowvar=False) for x in (one, other))
    # The trace of the root of a b, whose eigenvalues are real and not negative.
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(a + b) - 2 * root)


def draw(shown: dict[str, np.ndarray], file: Path) -> None:
    """Save a picture of ten images of each digit, a row for each."""
    figure = Figure(figsize=(3.6 * len(shown), 3.9), layout="constrained")
    for axis, (title, images) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        apart = np.pad(
            images.reshape(10, 10, 8, 8), ((0, 0),) * 2 + ((1, 1),) * 2, constant_values=-1
        )
        axis.imshow(apart.swapaxes(1, 2).reshape(100, 100), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Train, print and return the share read right and the distance for both, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--drawn", type=int, default=1000, help="how many images to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/diffusion_digits.png"))
    args = parser.parse_args(argv)

    images, digits, new, of_new = load_data()
    nn.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = Denoiser()
    average = nn.AveragedModel(model, avg_fn=moving)
    opt = nn.Optimizer(model, optax.adam(1e-3))
    for _ in tqdm(range(args.steps), desc="training", unit="step"):
        rows = rng.integers(0, len(images), args.batch_size)
        train_step(model, average, opt, images[rows], digits[rows])

    each = max(10, args.drawn // 10)
    asked = np.repeat(np.arange(10, dtype=np.int32), each)
    noise = rng.normal(size=(len(asked), 64)).astype(np.float32)
    reader = KNeighborsClassifier(3).fit(images, digits)
    some = np.concatenate([np.flatnonzero(of_new == d)[:10] for d in range(10)])
    shown, results = {"new images": new[some]}, {}
    for name, network in (("last weights", model), ("averaged weights", average)):
        drawn = np.asarray(sample(network, noise, asked))
        results[name] = float((reader.predict(drawn) == asked).mean()), frechet(drawn, new)
        print(f"{name}: {results[name][0]:.1%} read right, distance {results[name][1]:.2f}")
        shown[name] = drawn.reshape(10, each, 64)[:, :10].reshape(100, 64)
    draw(shown, args.picture)
    print(f"picture: {args.picture}")
    return results


if __name__ == "__main__":
    main()
