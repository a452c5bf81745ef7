"""Everything `make demo` shows: the digits, MAML, and what a compiled step costs beside raw JAX."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import digits_cnn
import maml_sinusoid
import statefulnn as nn
import statefulnn.functional as F

DEPTH, WIDTH, BATCH = 32, 16, 8
LR, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8


class ResidualMLP(nn.Module):
    """Many small layers: 64 tensors and little arithmetic, so that the cost of a call shows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])

    def forward(self, x):
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return x


@nn.jit
def train_step(model, opt, x, y):
    loss, grads = nn.value_and_grad(lambda m: F.mse_loss(m(x), y))(model)
    opt.step(grads)
    return loss


@jax.jit
def raw_train_step(params, mu, nu, count, x, y):
    """The same network and the same Adam, written by hand over flat lists of arrays."""

    def loss_of(params):
        h = x
        for w, b in zip(params[::2], params[1::2], strict=True):
            h = h + jnp.tanh(h @ w.T + b)
        return jnp.mean((h - y) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    count = count + 1
    step = count.astype(jnp.float32)
    mu = [B1 * m + (1 - B1) * g for m, g in zip(mu, grads, strict=True)]
    nu = [B2 * v + (1 - B2) * g * g for v, g in zip(nu, grads, strict=True)]
    params = [
        p - LR * (m / (1 - B1**step)) / (jnp.sqrt(v / (1 - B2**step)) + EPS)
        for p, m, v in zip(params, mu, nu, strict=True)
    ]
    return params, mu, nu, count, loss


def compare_with_raw_jax(rounds: int = 40, calls: int = 25) -> float:
    """Time both train steps in interleaved rounds, print the medians, and return their ratio."""
    nn.manual_seed(0)
    model = ResidualMLP()
    opt = nn.Optimizer(model, optax.adam(LR, B1, B2, EPS))
    x = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    y = jnp.sin(x)

    params = [p.value for p in model.parameters()]
    zeros = [jnp.zeros_like(p) for p in params]
    raw = (params, zeros, zeros, jnp.zeros((), jnp.int32))

    def run_ours():
        for _ in range(calls):
            loss = train_step(model, opt, x, y)
        return loss

    def run_raw():
        nonlocal raw
        for _ in range(calls):
            *raw, loss = raw_train_step(*raw, x, y)
        return loss

    times: dict = {run_ours: [], run_raw: []}
    losses = {}
    for round_number in range(rounds + 1):  # the first one compiles
        for run in (run_ours, run_raw) if round_number % 2 else (run_raw, run_ours):
            start = time.perf_counter()
            loss = jax.block_until_ready(run())
            times[run].append((time.perf_counter() - start) / calls * 1e6)
            losses.setdefault(run, float(loss))
    ours, theirs = (statistics.median(times[run][1:]) for run in (run_ours, run_raw))
    slots = 3 * len(params) + 1
    print(f"one train step over {slots} arrays (weights and Adam), median of {rounds} rounds")
    print(
        f"  raw jax.jit over flat lists  {theirs:6.0f} us, loss after {calls} steps {losses[run_raw]:.6f}"
    )
    print(
        f"  statefulnn, nn.jit           {ours:6.0f} us, loss after {calls} steps {losses[run_ours]:.6f}"
    )
    print(f"  ratio {ours / theirs:.2f}")
    return ours / theirs


def main() -> None:
    start = time.perf_counter()
    print("(a) a CNN on handwritten digits, examples/digits_cnn.py")
    digits_cnn.main([])
    print("\n(b) MAML on sinusoids, examples/maml_sinusoid.py")
    maml_sinusoid.main([])
    print("\n(c) the compiled step beside hand-written JAX")
    compare_with_raw_jax()
    print(f"\nall in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
