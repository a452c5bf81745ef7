"""A deep equilibrium network reads digits: one layer, called until its output no longer changes.

The hidden state z of an image solves ``z = tanh(W z + U x + b)`` (Bai, Kolter, Koltun 2019). The rows of W
are kept so small that there is one solution, which the iteration finds (El Ghaoui et al. 2021). The gradient
is that of the solution: its memory does not grow with the number of iterations, as that of a gradient through
the iteration does.

    python examples/deq_digits.py [--epochs 20] [--seed 0] [--picture out/deq_digits.png]

About a quarter of a minute on two cores.
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
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F

HIDDEN, BATCH, LARGEST = 64, 64, 0.9  # LARGEST: what the absolute values of a row of W may sum to


class Cell(nn.Module):
    """``tanh(W z + x)``, a contraction of z."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.1 * jax.random.normal(nn.next_key(), (HIDDEN, HIDDEN)))

    def forward(self, z: jax.Array, x: jax.Array) -> jax.Array:
        sums = jnp.abs(self.W.value).sum(1, keepdims=True)
        return jnp.tanh(z @ (self.W * jnp.minimum(1.0, LARGEST / sums)).T + x)


class DEQ(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(64, HIDDEN)
        self.solution = nn.meta.FixedPoint(Cell(), tol=1e-4)
        self.out = nn.Linear(HIDDEN, 10)

    def forward(self, images: jax.Array) -> jax.Array:
        return self.out(self.solution(self.read(images)))  # (N, 64) -> (N, 10)

    def unrolled(self, images: jax.Array, steps: int) -> jax.Array:
        """The same with a fixed number of calls of the cell, for comparison."""
        x = self.read(images)
        z = jnp.zeros_like(x)
        for _ in range(steps):
            z = self.solution.cell(z, x)
        return self.out(z)


def load_data() -> tuple[jax.Array, ...]:
    """Return train images (1347, 64) in [0, 1], test images (450, 64), train labels, test labels."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return tuple(map(jnp.asarray, split))


@nn.jit
def step(model: DEQ, optimizer: nn.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    loss, grads = nn.value_and_grad(lambda m: F.cross_entropy(m(images), labels))(model)
    optimizer.step(grads)
    return loss


def memory(model: DEQ, images: jax.Array, labels: jax.Array, steps: int | None) -> int:
    """Return the bytes that a gradient needs: of the solution, or through so many steps."""

    def loss(model: DEQ) -> jax.Array:
        out = model(images) if steps is None else model.unrolled(images, steps)
        return F.cross_entropy(out, labels)

    compiled = nn.jit(lambda m: nn.grad(loss)(m)).lower(model).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def draw(losses: list[float], depths: list[int], unrolled: list[int], own: int, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    right.plot(depths, np.divide(unrolled, 1e6), "o-", label="through the iteration")
    right.axhline(own / 1e6, c="k", ls=":", label="of the solution")
    right.set(xlabel="iterations", ylabel="MB", title="memory of a gradient")
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare gradients and memory with the unrolled iteration; return the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/deq_digits.png"))
    args = parser.parse_args(argv)
    train_x, test_x, train_y, test_y = load_data()
    nn.manual_seed(args.seed)
    model = DEQ()
    optimizer = nn.Optimizer(model, optax.adam(3e-3))
    rng, losses = np.random.default_rng(args.seed), []
    for _ in tqdm(range(args.epochs), desc="training", unit="epoch"):
        order = rng.permutation(len(train_y))
        for chosen in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
            losses.append(float(step(model, optimizer, train_x[chosen], train_y[chosen])))

    few = train_x[:BATCH], train_y[:BATCH]
    exact = nn.grad(lambda m: F.cross_entropy(m(few[0]), few[1]))(model)
    through = nn.grad(lambda m: F.cross_entropy(m.unrolled(few[0], 100), few[1]))(model)
    size = lambda grads: float(jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads))))
    depths = [10, 20, 40, 80]
    unrolled, own = [memory(model, *few, n) for n in depths], memory(model, *few, None)
    numbers = {
        "accuracy": float((model(test_x).argmax(-1) == test_y).mean()),
        "difference": size(jax.tree.map(jnp.subtract, exact, through)) / size(through),
        "memory beside 80 steps": own / unrolled[-1],
    }
    draw(losses, depths, unrolled, own, args.picture)
    print(
        f"accuracy {numbers['accuracy']:.1%}; the gradient differs from that through 100 iterations by "
        f"{numbers['difference']:.1e}, and needs {numbers['memory beside 80 steps']:.0%} of the memory of "
        f"80; picture in {args.picture}"
    )
    return numbers


if __name__ == "__main__":
    main()
