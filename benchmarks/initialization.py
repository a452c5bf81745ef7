"""Evidence for the versions of initial values: signals and gradients by depth, and training curves.

    python benchmarks/initialization.py            # writes docs/images/init_*.png and prints the numbers

Needs the extra `examples` (scikit-learn, matplotlib, optax, tqdm).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

IMAGES = Path(__file__).parent.parent / "docs" / "images"
VERSIONS = {"torch": "tab:orange", "2026.1": "tab:blue"}
DEPTH = 50
EPOCHS, BATCH, SEEDS = 40, 64, 5


def mlp(depth: int, width: int = 256, inputs: int = 256, outputs: int = 256) -> nn.Sequential:
    """Stack Linear and ReLU."""
    layers: list[nn.Module] = []
    for i in range(depth - 1):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def cnn(depth: int, width: int = 32) -> nn.Sequential:
    """Stack 3x3 convolutions and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def sizes_by_depth(model: nn.Sequential, x: jax.Array) -> tuple[list[float], list[float]]:
    """Return the mean square after each layer with weights, and that of the gradient there.

    The gradient is that of the output against random noise, taken by adding a zero after each layer.
    """
    weighted = [i for i, m in enumerate(model) if not isinstance(m, nn.ReLU)]

    def run(zeros: list[jax.Array], model: nn.Sequential) -> tuple[jax.Array, list[jax.Array]]:
        seen, y = [], x
        for i, layer in enumerate(model):
            y = layer(y)
            if i in weighted:
                y = y + zeros[len(seen)]
                seen.append(y)
        noise = jax.random.normal(jax.random.key(1), y.shape)
        return (y * noise).sum(), seen

    shapes = jax.eval_shape(lambda m: run([jnp.zeros(())] * len(weighted), m)[1], model)
    zeros = [jnp.zeros(s.shape) for s in shapes]
    slopes, seen = jax.jit(jax.grad(run, has_aux=True))(zeros, model)
    # In double precision: the squares of torch's gradients are below the smallest float32.
    mean_square = lambda arrays: [float((np.asarray(a, np.float64) ** 2).mean()) for a in arrays]
    return mean_square(seen), mean_square(slopes)


def plot_depth() -> None:
    """Draw signal and gradient by depth."""
    rng = np.random.default_rng(0)
    models = {
        f"MLP, {DEPTH} x 256": (mlp, (64, 256)),
        f"CNN, {DEPTH} x 32 channels": (cnn, (4, 32, 16, 16)),
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
    for column, (title, (build, shape)) in enumerate(models.items()):
        x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, colour in VERSIONS.items():
            nn.manual_seed(0)
            with nn.init.version(name):
                signal, slope = sizes_by_depth(build(DEPTH), x)
            for row, values in enumerate((signal, slope)):
                axes[row, column].semilogy(
                    range(1, len(values) + 1), values, color=colour, label=name
                )
            print(
                f"{title:22s} {name:7s} signal: first {signal[0]:.2e}, last {signal[-1]:.2e}; "
                f"gradient: first {slope[0]:.2e}, last {slope[-1]:.2e}"
            )
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("layer")
    axes[0, 0].set_ylabel("mean square of the signal")
    axes[1, 0].set_ylabel("mean square of the gradient")
    axes[0, 0].legend(title="nn.init.version")
    figure.tight_layout()
    figure.savefig(IMAGES / "init_depth.png", dpi=110)


def train(version: str, depth: int, data: tuple[np.ndarray, ...]) -> np.ndarray:
    """Train networks from several seeds at once; return the loss of each epoch, (epochs, seeds)."""
    x, y, test_x, test_y = data
    models = []
    for seed in range(SEEDS):
        nn.manual_seed(seed)
        with nn.init.version(version):
            models.append(mlp(depth, 64, 64, 10))
    params, _ = nn.stack_module_state(models)
    fn, _ = nn.functionalize(models[0])
    optimizer = optax.adam(1e-3)
    states = jax.vmap(optimizer.init)(params)

    def loss_of(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        return F.cross_entropy(fn(params, x), y)

    def step(carry: tuple, batch: tuple) -> tuple:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    @jax.vmap
    def epoch(params: dict, state: tuple, batches: tuple) -> tuple:
        (params, state), losses = jax.lax.scan(step, (params, state), batches)
        correct = (fn(params, test_x).argmax(1) == test_y).mean()
        return params, state, losses.mean(), correct

    rng = np.random.default_rng(0)
    count = len(x) // BATCH
    curve = []
    accuracy = None
    for _ in tqdm(range(EPOCHS), desc=f"{version}, depth {depth}", leave=False):
        order = np.stack([rng.permutation(len(x))[: count * BATCH] for _ in range(SEEDS)])
        batches = tuple(a[order].reshape(SEEDS, count, BATCH, *a.shape[1:]) for a in (x, y))
        params, states, losses, accuracy = epoch(params, states, batches)
        curve.append(np.asarray(losses))
    print(
        f"digits, depth {depth}, {version:7s} last loss {np.median(curve[-1]):.4f}, test accuracy "
        f"{100 * np.median(accuracy):.1f} % (median of {SEEDS} seeds; {math.log(10):.3f} is chance)"
    )
    return np.stack(curve)


def plot_training() -> None:
    """Draw training curves on the digits."""
    digits = load_digits()
    x = (digits.data / 16 - 0.3).astype(np.float32) / 0.38  # mean 0, variance 1
    y = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    data = (x[:1347], y[:1347], x[1347:], y[1347:])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, depth in zip(axes, (20, 50), strict=True):
        for version, colour in VERSIONS.items():
            curve = train(version, depth, data)
            axis.plot(range(1, EPOCHS + 1), np.median(curve, 1), color=colour, label=version)
            axis.fill_between(
                range(1, EPOCHS + 1), curve.min(1), curve.max(1), color=colour, alpha=0.2
            )
        axis.axhline(math.log(10), color="grey", linestyle=":", label="chance")
        axis.set_title(f"digits, MLP of {depth} layers, Adam 1e-3")
        axis.set_xlabel("epoch")
    axes[0].set_ylabel("training loss (median and range)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(IMAGES / "init_training.png", dpi=110)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    IMAGES.mkdir(exist_ok=True)
    plot_depth()
    plot_training()
