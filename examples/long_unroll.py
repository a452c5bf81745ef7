"""Gradients through 400 steps of training: their memory, and a learned schedule of learning rates.

A small network is trained for 400 steps. The outer problem learns the learning rates of these steps, a
curve through 20 points, for a low loss in the end. The example shows

(a) what the backward pass keeps with each setting of `checkpoint`, and what that costs in time;
(b) how well cheaper gradients point in the direction of the exact one: truncated to the last steps, by
    evolution strategies (ES), and by persistent ones that see 20 steps at a time (PES);
(c) the loss after training with the learned schedule beside the best constant rate.

    python examples/long_unroll.py [--steps 400] [--outer-steps 60] [--picture out/long_unroll.png]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import statefulnn as nn
import statefulnn.functional as F

KNOTS = 5
nn.manual_seed(0)
fn, initial = nn.functionalize(
    nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
)
X = jnp.linspace(-3, 3, 64)[:, None]
Y = jnp.sin(3 * X) * jnp.exp(-0.3 * X)


def rates(knots: jax.Array, steps: int) -> jax.Array:
    """Return one learning rate a step, (steps,), from their logarithms at five points, (5,)."""
    at = jnp.linspace(0, KNOTS - 1, steps)
    return jnp.exp(jnp.interp(at, jnp.arange(KNOTS), knots))


def trained_loss(knots: jax.Array, steps: int, checkpoint="sqrt", truncate=None) -> jax.Array:
    """Train with a schedule; return the loss at the end."""
    lr = nn.meta.PerStep(rates(knots, steps))
    adapted = nn.meta.adapt(
        fn,
        initial,
        F.mse_loss,
        (X, Y),
        lr=lr,
        steps=steps,
        checkpoint=checkpoint,
        truncate=truncate,
    )
    return F.mse_loss(fn(adapted.params, X), Y)


START = jnp.full(KNOTS, jnp.log(0.02))


def memory_and_time(steps: int) -> dict[str, dict[str, float]]:
    """Return the temporary memory and the time of a gradient for each setting of `checkpoint`."""
    compiled, grads, seconds = {}, {}, {}
    for checkpoint in ("none", "all", "sqrt"):
        gradient = jax.jit(jax.grad(partial(trained_loss, steps=steps, checkpoint=checkpoint)))
        compiled[checkpoint] = gradient.lower(START).compile()
        grads[checkpoint] = np.asarray(compiled[checkpoint](START))
        seconds[checkpoint] = []
    for _ in range(9):  # in turns: other work on the machine slows all of them
        for checkpoint, gradient in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(gradient(START))
            seconds[checkpoint].append(time.perf_counter() - begin)
    scale = np.abs(grads["none"]).max()
    return {
        checkpoint: {
            "memory": gradient.memory_analysis().temp_size_in_bytes,
            "time": statistics.median(
                a / b for a, b in zip(seconds[checkpoint], seconds["none"], strict=True)
            ),
            "error": float(np.abs(grads[checkpoint] - grads["none"]).max() / scale),
        }
        for checkpoint, gradient in compiled.items()
    }


def pes_direction(steps: int, pairs: int = 256, sigma: float = 0.03) -> jax.Array:
    """Return the gradient of the loss in the end, added up over the pieces of one run, by PES."""
    piece = steps // 4

    def unroll(knots, state):
        params, done = state
        at = jax.lax.dynamic_slice_in_dim(rates(knots, steps), done, piece)
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (X, Y), lr=nn.meta.PerStep(at), steps=piece)
        last = done + piece == steps
        return F.mse_loss(fn(adapted.params, X), Y) * last, (adapted.params, done + piece)

    pes = nn.meta.pes_init((initial, jnp.zeros((), jnp.int32)), START, pairs)

    def step(carry, key):
        total, pes = carry
        _, grads, pes = nn.meta.pes_gradient(unroll, START, pes, key=key, sigma=sigma)
        return (total + grads, pes), None

    keys = jax.random.split(jax.random.key(1), steps // piece)
    (total, _), _ = nn.meta.loop(step, (jnp.zeros(KNOTS), pes), keys, chunk=len(keys))
    return total


def directions(steps: int) -> dict[str, float]:
    """Return the cosine between each cheaper gradient and the exact one."""
    exact = jax.jit(jax.grad(partial(trained_loss, steps=steps)))(START)
    cheaper = {
        f"last {k} steps": jax.jit(jax.grad(partial(trained_loss, steps=steps, truncate=k)))(START)
        for k in (steps // 40, steps // 4)
    }
    es = partial(nn.meta.es_gradient, partial(trained_loss, steps=steps), sigma=0.03, pairs=64)
    cheaper["ES, 64 pairs"] = jax.jit(lambda key: es(START, key=key)[1])(jax.random.key(0))
    cheaper["PES, 256 pairs"] = pes_direction(steps)
    norm = jnp.linalg.norm
    return {n: float(g @ exact / norm(g) / norm(exact)) for n, g in cheaper.items()}


def learn_schedule(steps: int, outer_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the learned schedule, (steps,), and the loss after training at each outer step."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))

    def step(carry, _):
        knots, slots = carry
        loss, grads = jax.value_and_grad(partial(trained_loss, steps=steps))(knots)
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(knots, updates), slots), (loss, knots)

    _, (losses, knots) = nn.meta.loop(
        step, (START, tx.init(START)), length=outer_steps, chunk=10, progress="schedule"
    )
    return np.asarray(rates(knots[losses.argmin()], steps)), losses


def best_constant(steps: int) -> tuple[float, float]:
    """Return the best of 40 constant learning rates, and its loss after training."""
    tried = jnp.geomspace(0.005, 0.5, 40)
    losses = jax.jit(jax.vmap(lambda lr: trained_loss(jnp.full(KNOTS, jnp.log(lr)), steps)))(tried)
    best = int(jnp.nanargmin(losses))
    return float(tried[best]), float(losses[best])


def draw(
    schedule: np.ndarray, losses: np.ndarray, constant: tuple[float, float], file: Path
) -> None:
    """Save a picture of the schedule and of the loss over outer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(schedule, label="learned")
    left.axhline(constant[0], color="k", ls=":", label="best constant")
    left.set(xlabel="step of training", ylabel="learning rate")
    right.semilogy(losses)
    right.axhline(constant[1], color="k", ls=":", label="best constant")
    right.set(xlabel="outer step", ylabel="loss after training")
    left.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict:
    """Measure, learn a schedule, print and save a picture; return the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=400, help="steps of training, a multiple of four"
    )
    parser.add_argument("--outer-steps", type=int, default=60)
    parser.add_argument("--picture", type=Path, default=Path("out/long_unroll.png"))
    args = parser.parse_args(argv)

    table = memory_and_time(args.steps)
    print(f"{'checkpoint':12}{'memory':>12}{'time':>8}{'difference of the gradient':>30}")
    for name, row in table.items():
        print(f"{name:12}{row['memory'] / 1e6:9.2f} MB{row['time']:7.2f}x{row['error']:30.1e}")
    cosines = directions(args.steps)
    print("\ncosine with the exact gradient")
    for name, cosine in cosines.items():
        print(f"{name:24}{cosine:6.3f}")
    constant = best_constant(args.steps)
    schedule, losses = learn_schedule(args.steps, args.outer_steps)
    print(
        f"\nloss after training: best constant rate ({constant[0]:.3f}) {constant[1]:.5f}, "
        f"learned schedule {losses.min():.5f}"
    )
    draw(schedule, losses, constant, args.picture)
    print(f"picture: {args.picture}")
    return {
        "table": table,
        "cosines": cosines,
        "constant": constant[1],
        "learned": float(losses.min()),
    }


if __name__ == "__main__":
    main()
