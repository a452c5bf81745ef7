"""Burgers' equation solved by a network, in torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

NU = 0.05 / np.pi


class Solution(nn.Module):
    def __init__(self, hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
            nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, t, x):
        free = self.layers(torch.stack([t, x], -1))[..., 0]
        return -torch.sin(torch.pi * x) + t * (1 - x**2) * free


def residual(model: nn.Module, t: Tensor, x: Tensor) -> Tensor:
    t, x = t.requires_grad_(), x.requires_grad_()
    u = model(t, x)
    u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return u_t + u * u_x - NU * u_xx


def train_step(model: nn.Module, opt: torch.optim.Optimizer, t: Tensor, x: Tensor) -> Tensor:
    opt.zero_grad()
    loss = torch.mean(residual(model, t, x) ** 2)
    loss.backward()
    opt.step()
    return loss.detach()


def exact(t: np.ndarray, x: np.ndarray, nodes: int = 100) -> np.ndarray:
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - 2 * np.sqrt(NU * t[..., None]) * z
    weights = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * NU))
    return -(weights * np.sin(np.pi * y)).sum(-1) / weights.sum(-1)


def draw(x: np.ndarray, found: dict[float, np.ndarray], file: Path) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/pinn_burgers.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    model = Solution()
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    for _ in range(args.steps):
        t, x = torch.rand(args.points), 2 * torch.rand(args.points) - 1
        train_step(model, opt, t, x)
        schedule.step()

    x = np.linspace(-1, 1, 201, dtype=np.float32)
    points = torch.from_numpy(x)
    with torch.no_grad():
        times = (0.25, 0.5, 0.75, 1.0)
        found = {t: model(torch.full_like(points, t), points).numpy() for t in times}
    truth = np.stack([exact(np.full_like(x, t), x) for t in found])
    error = float(np.linalg.norm(np.stack([*found.values()]) - truth) / np.linalg.norm(truth))
    print(f"relative error of the solution: {error:.4f}")
    draw(x, found, args.picture)
    print(f"picture: {args.picture}")
    return error


if __name__ == "__main__":
    main()
