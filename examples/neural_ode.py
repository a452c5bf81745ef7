"""A neural ODE: dx/dt = model(x, t), fitted to a spiral; three ways to the gradient of its solution.

The solver is the classical Runge-Kutta method of order 4 with fixed steps, in one `jax.lax.scan`. Its
gradient by the weights:

    direct          backpropagation through the solver: exact for the steps taken, keeps all of them
    checkpointed    the same numbers; keeps about 2 sqrt(steps) states and computes each step twice
    adjoint         solves the adjoint equation backwards in time (Chen et al. 2018): keeps only the end,
                    and its gradient differs by the error of the solver, which is of order 4 in the step

The adjoint has to find the way back from the end. Where trajectories come together, as on this spiral, the
way back pushes them apart, so it needs steps small enough for that.

    python examples/neural_ode.py [--steps 3000] [--gradient adjoint] [--picture out/neural_ode.png]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import statefulnn as nn
import statefulnn.functional as F

SPIRAL = np.array([[-0.1, 2.0], [-2.0, -0.1]])  # dx/dt = SPIRAL @ x^3
START, END, OBSERVED = np.array([2.0, 0.0]), 15.0, 300  # observations at even times up to END
SEGMENT, BATCH = 10, 32  # it is trained on pieces of that many observations


class Field(nn.Module):
    def __init__(self, hidden: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.out = nn.Linear(hidden, 2)
        nn.init.normal_(self.out.weight, std=0.01)

    def forward(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.out(self.layers(x))  # (N, 2) -> (N, 2); this field does not change with t


# --------------------------------------------------------------------------------------------------
# Solvers: x(t1) from x(t0), both any pytree, for dx/dt = f(params, x, t)


def rk4_step(f: Callable, params: dict, x, t: jax.Array, h: jax.Array):
    """Return x after one Runge-Kutta step from t to t + h."""
    move = lambda k, h: jax.tree.map(lambda x, k: x + h * k, x, k)
    k1 = f(params, x, t)
    k2 = f(params, move(k1, h / 2), t + h / 2)
    k3 = f(params, move(k2, h / 2), t + h / 2)
    k4 = f(params, move(k3, h), t + h)
    return jax.tree.map(
        lambda x, k1, k2, k3, k4: x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), x, k1, k2, k3, k4
    )


def direct(f: Callable, steps: int, params: dict, x, t0, t1):
    h = (t1 - t0) / steps
    step = lambda x, i: (rk4_step(f, params, x, t0 + i * h, h), None)
    return jax.lax.scan(step, x, jnp.arange(steps))[0]


def checkpointed(f: Callable, steps: int, params: dict, x, t0, t1):
    """As `direct`, in parts of about sqrt(steps) steps, each of which keeps its start only."""
    parts = next(n for n in range(math.isqrt(steps), 0, -1) if steps % n == 0)
    h = (t1 - t0) / parts
    part = jax.checkpoint(
        lambda params, x, i: direct(f, steps // parts, params, x, t0 + i * h, t0 + (i + 1) * h)
    )
    return jax.lax.scan(lambda x, i: (part(params, x, i), None), x, jnp.arange(parts))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def adjoint(f: Callable, steps: int, params: dict, x, t0, t1):
    return direct(f, steps, params, x, t0, t1)


def adjoint_forward(f, steps, params, x, t0, t1):
    end = direct(f, steps, params, x, t0, t1)
    return end, (params, end, t0, t1)


def adjoint_backward(f, steps, kept, cotangent):
    """Solve for (x, a, g) from t1 to t0: dx/dt = f, da/dt = -a df/dx, dg/dt = -a df/dparams."""
    params, end, t0, t1 = kept

    def augmented(params, state, t):
        x, a, _ = state
        velocity, pullback = jax.vjp(lambda params, x: f(params, x, t), params, x)
        by_params, by_x = jax.tree.map(jnp.negative, pullback(a))
        return velocity, by_x, by_params

    nothing = jax.tree.map(jnp.zeros_like, params)
    start, a, g = direct(augmented, steps, params, (end, cotangent, nothing), t1, t0)
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    return g, a, -dot(a, f(params, start, t0)), dot(cotangent, f(params, end, t1))


adjoint.defvjp(adjoint_forward, adjoint_backward)
SOLVERS = {"direct": direct, "checkpointed": checkpointed, "adjoint": adjoint}


def trajectory(solve: Callable, params: dict, x: jax.Array, times: jax.Array) -> jax.Array:
    """Return x (..., 2) at all times, (T, ..., 2); `solve` goes from one to the next."""

    def onward(x, interval):
        x = solve(params, x, *interval)
        return x, x

    _, xs = jax.lax.scan(onward, x, (times[:-1], times[1:]))
    return jnp.concatenate([x[None], xs])


def observations() -> tuple[jax.Array, jax.Array]:
    """Return the times (T,) and the true states (T, 2)."""
    true = lambda params, x, t: SPIRAL @ x**3
    times = jnp.linspace(0.0, END, OBSERVED + 1)
    return times, jax.jit(partial(trajectory, partial(direct, true, 20), {}))(START, times)


# --------------------------------------------------------------------------------------------------
# Training


def train(
    field: Callable, params: dict, data: tuple, way: str, steps: int, seed: int
) -> tuple[dict, np.ndarray]:
    """Fit random pieces of the observed trajectory; return the weights and the losses."""
    times, states = data
    solve = partial(SOLVERS[way], field, 2)
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def loss(params, starts):
        pieces = starts + jnp.arange(SEGMENT + 1)[:, None]  # (SEGMENT + 1, BATCH)
        # All pieces at the same times: the field does not depend on when they were observed.
        guess = trajectory(solve, params, states[starts], times[: SEGMENT + 1])
        return F.mse_loss(guess, states[pieces])

    def step(carry, starts):
        params, slots = carry
        value, grads = jax.value_and_grad(loss)(params, starts)
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(params, updates), slots), value

    starts = np.random.default_rng(seed).integers(0, OBSERVED - SEGMENT, (steps, BATCH))
    (params, _), losses = nn.meta.loop(
        step, (params, tx.init(params)), starts, chunk=100, progress=f"{way} gradient"
    )
    return params, losses


def fit_errors(field: Callable, params: dict, data: tuple) -> tuple[dict[str, float], np.ndarray]:
    """Return the errors of the fit, relative to what is fitted, and the trajectory from the start."""
    times, states = data
    path = jax.jit(partial(trajectory, partial(direct, field, 4)))(params, states[0], times)
    guess = field(params, states, 0.0)
    true = states**3 @ SPIRAL.T
    apart = lambda a, b: float(jnp.sqrt(((a - b) ** 2).sum() / (b**2).sum()))
    return {"trajectory": apart(path, states), "field": apart(guess, true)}, np.asarray(path)


# --------------------------------------------------------------------------------------------------
# The three gradients


def compare(field: Callable, params: dict, starts, lengths: list[int], end: float = 1.0) -> dict:
    """Return by way and number of steps how far each gradient is from the direct one, and its memory.

    The loss is the squared distance of x(end) from the origin, for all `starts` (N, 2), in float64.
    """

    def loss(params, starts, solve):
        return (solve(params, starts, 0.0, end) ** 2).sum(-1).mean()

    with jax.enable_x64(True):
        params, starts = jax.tree.map(lambda v: np.asarray(v, np.float64), (params, starts))
        table: dict = {"difference": {}, "bytes": {}}
        for steps in lengths:
            gradients = {}
            for way, solver in SOLVERS.items():
                compiled = (
                    jax.jit(jax.grad(loss), static_argnums=2)
                    .lower(params, starts, partial(solver, field, steps))
                    .compile()
                )
                table["bytes"][way, steps] = compiled.memory_analysis().temp_size_in_bytes
                gradients[way] = ravel_pytree(compiled(params, starts))[0]
            exact = gradients["direct"]
            for way, gradient in gradients.items():
                apart = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
                table["difference"][way, steps] = float(apart)
    return table


def draw(field: Callable, params: dict, states, path, table: dict, file: Path) -> None:
    """Save a picture: trajectories in the fitted vector field, and what the gradients cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    side = jnp.linspace(-2.2, 2.2, 20)
    grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    arrows = field(params, grid, 0.0)
    arrows /= jnp.linalg.norm(arrows, axis=1, keepdims=True) + 1e-9
    left.quiver(*grid.T, *arrows.T, color="0.7")
    left.plot(*states.T, "k.", ms=3, label="observed")
    left.plot(*path.T, "C1", label="neural ODE, from the first point")
    left.set_aspect("equal")
    left.legend(loc="upper right", fontsize=8)
    for way in SOLVERS:
        sizes = {n: size for (w, n), size in table["bytes"].items() if w == way}
        right.loglog(list(sizes), [v / 1024 for v in sizes.values()], "o-", label=way)
    right.set(xlabel="solver steps", ylabel="temporary memory of the gradient, KiB")
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> dict:
    """Train, compare the gradients, save the picture; return the errors and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--gradient", choices=list(SOLVERS), default="adjoint")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/neural_ode.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    field, params = nn.functionalize(Field())  # field(params, x, t) -> dx/dt
    data = observations()
    params, losses = train(field, params, data, args.gradient, args.steps, args.seed)
    errors, path = fit_errors(field, params, data)
    print(f"training loss {losses[0]:.4f} -> {losses[-1]:.6f} ({args.steps} steps)")
    print(f"relative error: trajectory {errors['trajectory']:.4f}, field {errors['field']:.4f}")

    table = compare(field, params, data[1][::19], args.lengths)
    print(f"{'gradient through':20}" + "".join(f"{n:>12} steps" for n in args.lengths))
    for way in SOLVERS:
        cells = (f"{table['bytes'][way, n] / 1024:.0f} KiB" for n in args.lengths)
        print(f"{way:20}" + "".join(f"{cell:>18}" for cell in cells))
        if way != "direct":
            cells = (f"{table['difference'][way, n]:.1e}" for n in args.lengths)
            print(f"{'  from direct':20}" + "".join(f"{cell:>18}" for cell in cells))
    draw(field, params, data[1], path, table, args.picture)
    print(f"picture: {args.picture}")
    return {**errors, **table}


if __name__ == "__main__":
    main()
