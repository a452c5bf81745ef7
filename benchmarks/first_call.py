"""The first call of a train step, which traces and compiles, beside hand-written JAX and flax.nnx.

    python benchmarks/first_call.py            # about 4 minutes
    python benchmarks/first_call.py --quick    # a smoke run

Three networks of examples/ (ResNet-18, a GPT-2 of six blocks, a language model of two LSTMs), each with
AdamW: the parts of the first call from empty caches, and the step itself, in one run, interleaved.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import _first_call as others  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from _harness import Case, measure, progress, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import gpt2  # noqa: E402
import lstm_lm  # noqa: E402
import resnet  # noqa: E402
import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402

TX = optax.adamw(1e-4)


@dataclass
class Network:
    """One network: ours, the forward by hand, flax's, and a batch."""

    model: nn.Module
    by_hand: Callable
    nnx: Callable[[], Any]
    x: jax.Array
    labels: jax.Array


def networks(quick: bool) -> dict[str, Network]:
    """Return the networks by name."""
    draw = np.random.default_rng(0)
    images = jnp.asarray(draw.normal(size=(8, 3, 64, 64) if quick else (8, 3, 112, 112)), "float32")
    config = gpt2.GPT2Config(2000, 64, 192, 6, 6, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    tokens = jnp.asarray(draw.integers(2000, size=(8, 64)))
    return {
        "ResNet-18": Network(
            resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], 10),
            others.resnet18,
            lambda: others.nnx_resnet18(10),
            images,
            jnp.asarray(draw.integers(10, size=8)),
        ),
        "GPT-2, 6 blocks": Network(
            gpt2.GPT2LMHeadModel(config),
            others.gpt(6),
            lambda: others.nnx_gpt(2000, 64, 192, 6, 6),
            tokens,
            tokens,
        ),
        "LSTM language model": Network(
            lstm_lm.RNNModel(2000, 192, 192, 2, dropout=0),
            others.lstm,
            lambda: others.nnx_lstm(2000, 192, 2),
            tokens.T,
            tokens.T,
        ),
    }


def loss_of(out: Any, labels: jax.Array) -> jax.Array:
    """The loss of everybody but us, as optax has it."""
    return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()


# Each of these returns a step that was never called: a function without arguments that does one update
# and returns the loss.


def ours(net: Network) -> Callable[[], jax.Array]:
    model = net.model
    opt = nn.Optimizer(model, TX)

    @nn.jit
    def step(model: Any, opt: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            out = model(x)
            out = out[0] if isinstance(out, tuple) else out
            return F.cross_entropy(out.reshape(-1, out.shape[-1]), labels.reshape(-1))

        value, grads = nn.value_and_grad(loss)(model)
        opt.step(grads)
        return value

    return lambda: step(model, opt, net.x, net.labels)


def by_hand(net: Network) -> Callable[[], jax.Array]:
    params = {name: p.value for name, p in net.model.named_parameters()}
    state = dict(net.model.named_buffers())

    @jax.jit
    def step(p: dict, state: dict, slots: Any, x: jax.Array, labels: jax.Array) -> tuple:
        def loss(p: dict) -> tuple:
            out, new = net.by_hand(p, state, x)
            return loss_of(out, labels), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(p)
        updates, slots = TX.update(grads, slots, p)
        return optax.apply_updates(p, updates), state, slots, value

    kept = [params, state, TX.init(params)]

    def call() -> jax.Array:
        *kept[:], value = step(*kept, net.x, net.labels)
        return value

    return call


def in_nnx(net: Network) -> Callable[[], jax.Array]:
    from flax import nnx

    model = net.nnx()
    opt = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, opt: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        value, grads = nnx.value_and_grad(lambda m: loss_of(m(x), labels))(model)
        opt.update(model, grads)
        return value

    return lambda: step(model, opt, net.x, net.labels)


CONTENDERS = {"hand-written JAX": by_hand, "statefulnn": ours, "flax.nnx": in_nnx}
# First call and step, as multiples of the hand-written ones.
TARGETS = {"ResNet-18": 0.9, "GPT-2, 6 blocks": 1.0, "LSTM language model": 1.0}


def first_call(make: Callable[[], Callable[[], jax.Array]]) -> tuple[float, Callable, float]:
    """Return the seconds of the first call from empty caches, the step, and its loss."""
    step = make()
    jax.clear_caches()
    start = time.perf_counter()
    loss = jax.block_until_ready(step())
    return time.perf_counter() - start, step, float(loss)


def part_first_call(report: Report, quick: bool) -> None:
    """First calls and steps of each network."""
    for name, net in networks(quick).items():
        initial = net.model.state_dict()
        seconds: dict[str, list[float]] = {who: [] for who in CONTENDERS}
        steps, losses = {}, {}
        for _ in progress(range(1 if quick else 3), f"first calls, {name}"):
            for who, make in CONTENDERS.items():
                net.model.load_state_dict(initial)
                spent, steps[who], losses[who] = first_call(functools.partial(make, net))
                seconds[who].append(spent)
        if abs(losses["statefulnn"] - losses["hand-written JAX"]) > 1e-4:
            raise AssertionError(f"{name}: the losses differ, {losses}")
        cases = [Case(who, step) for who, step in steps.items()]
        timings = measure(cases, seconds=2 if quick else 20, description=f"steps, {name}")
        first = {who: statistics.median(s) for who, s in seconds.items()}
        base = first["hand-written JAX"]
        report.numbers[name] = {"first": seconds, "step": [t.row() for t in timings]}
        report.section(
            f"First call and step of {name}",
            table(
                ["", "first call, s", "ratio", "step, ms", "ratio"],
                [
                    [
                        t.label,
                        f"{first[t.label]:.2f}",
                        f"{first[t.label] / base:.2f}x",
                        f"{t.done / 1e3:.1f}",
                        f"{t.ratio_done:.2f}x",
                    ]
                    for t in timings
                ],
            ),
        )
        report.target(f"first call of {name}", first["statefulnn"] / base, 1.1, "x")
        report.target(f"step of {name}", timings[1].ratio_done, TARGETS[name], "x")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    parts = {"first_call": part_first_call}
    options = arguments(__doc__ or "", list(parts)).parse_args(argv)
    packages = ["statefulnn", "flax.nnx", "optax"]
    return run(parts, options, title="First call", mark="first call", packages=packages)


if __name__ == "__main__":
    sys.exit(main())
