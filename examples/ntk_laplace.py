"""Curvature at work: error bars from the Laplace approximation, training predicted by the tangent kernel.

Part one is the regression example of the Laplace library (Daxberger et al. 2021): y = sin(x) plus noise
of 0.3 at 150 points of [0, 8], a network 1-50-1 with tanh. After training, the marginal likelihood finds
the noise and the prior precision without any validation data; their library finds about 0.28 and 0.10.

Part two trains a wide network and its linearised model by gradient descent side by side, and predicts
both from the empirical tangent kernel Θ alone, with no training (Lee et al. 2019): after t steps of rate
η the outputs on the n training points are ``f0 + (1 - (1 - η Θ / n)ᵗ) (y - f0)``.

    python examples/ntk_laplace.py [--seed 0] [--width 1024] [--picture out/ntk_laplace.png]

Half a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature

NOISE, POINTS, EPOCHS = 0.3, 150, 1000
LIBRARY = {"sigma": 0.28, "prior precision": 0.10}  # docs/regression_example.md of Laplace
CHUNK = 50  # steps in one compiled call


def noisy_sine(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw x and y, each (150, 1)."""
    a, b = jax.random.split(key)
    x = jax.random.uniform(a, (POINTS, 1), maxval=8.0)
    return x, jnp.sin(x) + NOISE * jax.random.normal(b, x.shape)


def train_map(fn, params: dict, x: jax.Array, y: jax.Array, label: str) -> dict:
    """Minimise the squared error with Adam, whole batches."""
    tx = optax.adam(1e-2)

    @jax.jit
    def chunk(carry):
        def step(carry, _):
            params, slots = carry
            loss, grads = jax.value_and_grad(lambda p: F.mse_loss(fn(p, x), y))(params)
            updates, slots = tx.update(grads, slots)
            return (optax.apply_updates(params, updates), slots), loss

        return jax.lax.scan(step, carry, length=CHUNK)

    carry = params, tx.init(params)
    with tqdm(total=EPOCHS, desc=label, unit="step") as progress:
        for _ in range(EPOCHS // CHUNK):
            carry, losses = chunk(carry)
            progress.set_postfix(loss=f"{float(losses[-1]):.4f}")
            progress.update(CHUNK)
    return carry[0]


def laplace(seed: int) -> tuple[curvature.Laplace, jax.Array, jax.Array]:
    """Train the network, fit the posterior, choose noise and prior by the marginal likelihood."""
    nn.manual_seed(seed)
    fn, params = nn.functionalize(nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)))
    x, y = noisy_sine(jax.random.key(seed))
    trained = train_map(fn, params, x, y, "network 1-50-1")
    posterior = curvature.Laplace.fit((fn, trained), x, y, likelihood="regression")
    return posterior.maximize_evidence(), x, y


def coverage(posterior: curvature.Laplace, seed: int) -> float:
    """Return the share of new points within two standard deviations of the mean; 95 % are wanted."""
    x, y = noisy_sine(jax.random.key(seed + 1_000))
    mean, variance = posterior.predict(x)
    return float((jnp.abs(y - mean) < 2 * jnp.sqrt(variance)).mean())


class Wide(nn.Module):
    """Two inputs, two hidden layers, in the scaling in which training has a limit of infinite width."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        for layer in (self.fc1, self.fc2, self.out):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)

    def forward(self, x: jax.Array) -> jax.Array:
        for layer in (self.fc1, self.fc2):  # (N, 2) -> (N, width)
            x = F.relu(self.scaled(layer, x, 2.0))
        return self.scaled(self.out, x, 1.0)  # (N, 1)

    @staticmethod
    def scaled(layer: nn.Linear, x: jax.Array, gain: float) -> jax.Array:
        # The weights are of size one, and so is what gradient descent does to each of them.
        return x @ layer.weight.T * (gain / x.shape[-1]) ** 0.5 + layer.bias


def circle(points: int) -> jax.Array:
    """Return points of the unit circle, (points, 2)."""
    angle = jnp.linspace(-jnp.pi, jnp.pi, points)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)


class Training:
    """Gradient descent on ``|f - y|² / 2n``, and what the tangent kernel says about it."""

    def __init__(self, model: nn.Module, steps: int):
        self.fn, self.start = nn.functionalize(model)
        self.steps = steps
        self.x, self.new = circle(12)[:-1], circle(101)
        self.y = self.x[:, :1] * self.x[:, 1:]  # a function of the angle a: sin(2 a) / 2
        kernel = jax.jit(
            lambda p, new, x: curvature.empirical_ntk((model, p), new, x, outputs="trace")
        )
        self.inside, self.across = (
            np.asarray(kernel(self.start, side, self.x), np.float64) for side in (self.x, self.new)
        )
        # Half of the largest rate at which gradient descent is stable.
        self.rate = float(len(self.x) / np.linalg.eigvalsh(self.inside)[-1])

    def outputs(self, linearised: bool) -> np.ndarray:
        """Train, and return the outputs on new points before each step, (steps, M)."""

        @jax.jit
        def chunk(params, start):  # the weights as arguments: as constants XLA would fold them
            fn = curvature.linearize_model((self.fn, start))[0] if linearised else self.fn

            def loss(params):
                return jnp.mean((fn(params, self.x) - self.y) ** 2) / 2

            def step(params, _):
                moved = jax.tree.map(lambda p, g: p - self.rate * g, params, jax.grad(loss)(params))
                return moved, fn(params, self.new)[:, 0]

            return jax.lax.scan(step, params, length=CHUNK)

        params, path = self.start, []
        label = "linearised model" if linearised else "wide network"
        with tqdm(total=self.steps, desc=label, unit="step") as progress:
            for _ in range(self.steps // CHUNK):
                params, outputs = chunk(params, self.start)
                path.append(outputs)
                progress.update(CHUNK)
        return np.concatenate(path)

    def predicted(self) -> np.ndarray:
        """Return the same without training: ``f_new + Θ(new, x) Θ⁻¹ (1 - (1 - η Θ / n)ᵗ) (y - f)``."""
        f, f_new = (np.asarray(self.fn(self.start, side))[:, 0] for side in (self.x, self.new))
        values, vectors = np.linalg.eigh(self.inside)
        learnt = 1 - (1 - self.rate * values / len(self.x)) ** np.arange(self.steps)[:, None]
        residual = vectors.T @ (np.asarray(self.y)[:, 0] - f)
        return f_new + (learnt * residual / values) @ (self.across @ vectors).T


def wide_network(width: int, seed: int, steps: int = 300) -> dict[str, np.ndarray]:
    """Train a wide network and its linearised model; predict both by kernel regression."""
    nn.manual_seed(seed)
    training = Training(Wide(width), steps)
    return {
        "network": training.outputs(linearised=False),
        "linearised": training.outputs(linearised=True),
        "kernel": training.predicted(),
    }


def differences(paths: dict[str, np.ndarray]) -> dict[str, float]:
    """Return how far kernel and linearised model are from each other, and the network from both.

    The largest difference of outputs over all steps and points, over the largest change of an output.
    """
    size = np.abs(paths["network"] - paths["network"][0]).max()
    apart = lambda a, b: float(np.abs(paths[a] - paths[b]).max() / size)
    return {
        "kernel and linearised": apart("kernel", "linearised"),
        "network and linearised": apart("network", "linearised"),
    }


def draw(posterior: curvature.Laplace, x, y, paths: dict[str, np.ndarray], file: Path) -> None:
    """Save a picture: the error bars, and the training of the wide network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = jnp.linspace(-2.0, 10.0, 300)[:, None]
    mean, variance = (np.asarray(v)[:, 0] for v in posterior.predict(grid))
    noise = 2 * float(posterior.sigma)
    left.plot(x[:, 0], y[:, 0], "k.", ms=3, label="data")
    left.plot(grid[:, 0], mean, label="mean")
    wide = 2 * np.sqrt(variance)
    left.fill_between(grid[:, 0], mean - wide, mean + wide, alpha=0.25, label="± 2 std")
    left.fill_between(
        grid[:, 0], mean - noise, mean + noise, alpha=0.25, label="± 2 σ, noise alone"
    )
    left.set(title="Laplace approximation", xlabel="x", ylim=(-4, 4))
    left.legend(fontsize=7)
    angle = np.linspace(-np.pi, np.pi, paths["kernel"].shape[1])
    for name, style in {"network": "-", "linearised": "--", "kernel": ":"}.items():
        for step in (0, 3, 30, -1):
            label = name if step == 0 else None
            right.plot(
                angle, paths[name][step], style, c=f"C{[0, 3, 30, -1].index(step)}", label=label
            )
    right.set(title="a wide network after 0, 3, 30 and all steps", xlabel="angle")
    right.legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run both parts, print the numbers, save the picture; return the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--picture", type=Path, default=Path("out/ntk_laplace.png"))
    args = parser.parse_args(argv)

    posterior, x, y = laplace(args.seed)
    numbers = {
        "sigma": float(posterior.sigma),
        "prior precision": float(posterior.prior_precision),
        "coverage": coverage(posterior, args.seed),
    }
    print(f"{'marginal likelihood':24}{'here':>8}{'library':>10}")
    for name, value in LIBRARY.items():
        print(f"{name:24}{numbers[name]:8.3f}{value:10.2f}")
    print(f"{numbers['coverage']:.1%} of new points within two standard deviations (95 % wanted)")

    paths = wide_network(args.width, args.seed)
    numbers |= differences(paths)
    print(
        f"a network of width {args.width} in training, largest difference over the largest change:"
    )
    for name in ("kernel and linearised", "network and linearised"):
        print(f"{name:24}{numbers[name]:8.1e}")
    draw(posterior, x, y, paths, args.picture)
    print(f"picture: {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
