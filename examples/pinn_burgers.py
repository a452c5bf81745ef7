"""Burgers' equation solved by a network: derivatives of a module by its inputs, then by its weights.

    u_t + u u_x = nu u_xx,   u(0, x) = -sin(pi x),   u(t, -1) = u(t, 1) = 0

A wave steepens into a front at x = 0. The network knows the equation and no solution; the exact one, by the
formula of Cole and Hopf, tells how well it did. About 20 seconds on two cores.

    python examples/pinn_burgers.py [--steps 3000] [--seed 0]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn

NU = 0.05 / np.pi


class Solution(nn.Module):
    """Source: Raissi, Perdikaris and Karniadakis, Physics-informed neural networks, 2019.

    The initial and the boundary values are built in, so the equation is all that is left to learn.
    """

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
            nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, t, x):
        """Return u at one point."""
        free = self.layers(jnp.stack([t, x]))[0]
        return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * free


def residual(u: nn.Module, t, x) -> jax.Array:
    """Return by how much u misses the equation at a point."""
    u_t, u_x = jax.grad(u, 0), jax.grad(u, 1)
    u_xx = jax.grad(u_x, 1)
    return u_t(t, x) + u(t, x) * u_x(t, x) - NU * u_xx(t, x)


@nn.jit
def train_step(model: nn.Module, opt: nn.Optimizer, t, x) -> jax.Array:
    def loss_of(model):
        return jnp.mean(jax.vmap(partial(residual, model))(t, x) ** 2)

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    return loss


def exact(t: np.ndarray, x: np.ndarray, nodes: int = 100) -> np.ndarray:
    """Return the solution, by quadrature in the formula of Cole and Hopf (t > 0)."""
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - 2 * np.sqrt(NU * t[..., None]) * z
    weights = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * NU))
    return -(weights * np.sin(np.pi * y)).sum(-1) / weights.sum(-1)


def draw(x: np.ndarray, found: dict[float, np.ndarray], file: Path) -> None:
    """Save a picture of the wave at several times."""
    figure = Figure(figsize=(4 * len(found), 3), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    for axis, (t, u) in zip(axes, found.items(), strict=True):
        axis.plot(x, exact(np.full_like(x, t), x), "0.7", lw=4, label="exact")
        axis.plot(x, u, "C1--", label="network")
        axis.set(title=f"t = {t}", xlabel="x")
    axes[0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> float:
    """Train, print and return the relative error of the solution, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--points", type=int, default=1000, help="new ones at each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/pinn_burgers.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    model = Solution()
    opt = nn.Optimizer(model, optax.adam(optax.cosine_decay_schedule(5e-3, args.steps)))
    rng = np.random.default_rng(args.seed)
    for _ in range(args.steps):
        t = rng.uniform(0, 1, args.points).astype(np.float32)
        x = rng.uniform(-1, 1, args.points).astype(np.float32)
        train_step(model, opt, t, x)

    x = np.linspace(-1, 1, 201, dtype=np.float32)
    solve = nn.jit(nn.vmap(lambda model, t, x: model(t, x), in_axes=(None, None, 0)))
    found = {t: np.asarray(solve(model, t, x)) for t in (0.25, 0.5, 0.75, 1.0)}
    truth = np.stack([exact(np.full_like(x, t), x) for t in found])
    error = float(np.linalg.norm(np.stack([*found.values()]) - truth) / np.linalg.norm(truth))
    print(f"relative error of the solution: {error:.4f}")
    draw(x, found, args.picture)
    print(f"picture: {args.picture}")
    return error


if __name__ == "__main__":
    main()
