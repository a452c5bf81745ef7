"""What autocast costs: trace time and compiled calls beside the same model without it and with casts by hand.

    python benchmarks/amp.py --json results.json --markdown results.md
    python benchmarks/amp.py --quick

Runs on the platform JAX chooses; `JAX_PLATFORMS=cpu` forces the CPU. An eager call is timed with autocast
off, beside the function as it is without a rule. (That of a layer such as nn.Linear is inside of compiled
code, where it costs nothing.)
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from _harness import Case, Timing, measure, table  # noqa: E402
from _probes import _trace_seconds  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402

LOW = jnp.bfloat16


def net(layers: int, width: int = 64) -> nn.Module:
    """Linear layers with norms between them."""
    return nn.Sequential(
        *(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.LayerNorm(width)))
    )


def loss_fn(model: nn.Module, x: jax.Array) -> jax.Array:
    return F.mse_loss(model(x), x)


def with_autocast(model: nn.Module, x: jax.Array) -> jax.Array:
    with nn.amp.autocast(LOW):
        return loss_fn(model, x)


def by_hand(model: Any, x: jax.Array) -> jax.Array:
    h = x
    for layer in model:
        if isinstance(layer, nn.Linear):
            h = F.linear(h.astype(LOW), layer.weight.astype(LOW), layer.bias.astype(LOW))
        else:
            h = layer(h.astype(jnp.float32))
    return F.mse_loss(h.astype(jnp.float32), x)


CONTENDERS: dict[str, Callable] = {
    "float32": loss_fn,
    "casts by hand": by_hand,
    "nn.amp.autocast": with_autocast,
}


def part_trace(report: Report, quick: bool) -> None:
    """Trace time of a loss and its gradient."""
    layers = 10 if quick else 100
    x, model = jnp.ones((8, 64)), net(layers)
    warnings.simplefilter("ignore", nn.RetraceWarning)  # to trace anew is what is measured
    samples: dict[str, list[float]] = {label: [] for label in CONTENDERS}
    for number in range(4 if quick else 10):
        for label in random.Random(number).sample(sorted(CONTENDERS), len(CONTENDERS)):
            step = nn.jit(nn.value_and_grad(CONTENDERS[label]))
            seconds = _trace_seconds(lambda step=step: step(model, x))
            if number:  # the first round pays for lazy imports
                samples[label].append(seconds)
    least = {label: min(values) for label, values in samples.items()}
    report.numbers["trace"] = samples
    rows = [[label, f"{1e3 * t:.1f}", f"{t / least['float32']:.2f}x"] for label, t in least.items()]
    report.section(
        f"Trace time, {layers} Linear layers with norms",
        table(["", "ms", "ratio"], rows),
        "The first call of a loss and its gradient from cold caches, less lowering and compilation.",
    )
    for other in ("float32", "casts by hand"):
        ratio = least["nn.amp.autocast"] / least[other]
        report.target(f"trace under autocast beside {other}", ratio, 1.1, "x")


def _timings(report: Report, title: str, note: str, cases: list[Case], quick: bool) -> list[Timing]:
    for case in cases:
        jax.block_until_ready(case.call())
    timings = measure(cases, seconds=1 if quick else 6, description=title)
    report.numbers[title] = [t.row() for t in timings]
    rows = [[t.label, f"{t.returned:.1f}", f"{t.ratio:.2f}x"] for t in timings]
    report.section(title, table(["", "µs", "ratio"], rows), note)
    return timings


def part_call(report: Report, quick: bool) -> None:
    """A compiled call, and an eager one without autocast."""
    x, model = jnp.ones((8, 64)), net(10)
    steps = {
        label: nn.jit(nn.value_and_grad(f)) for label, f in CONTENDERS.items() if f is not loss_fn
    }
    cases = [Case(label, lambda step=step: step(model, x)) for label, step in steps.items()]
    timings = _timings(report, "A compiled call", "Ten layers, with gradients.", cases, quick)
    report.target("compiled call, autocast beside casts by hand", timings[-1].ratio, 1.02, "x")

    plain = F.softmax.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    cases = [
        Case("the function without its rule", lambda: plain(x, -1)),
        Case("F.softmax", lambda: F.softmax(x, -1)),
    ]
    timings = _timings(report, "An eager call, autocast off", "A batch of 8.", cases, quick)
    report.target("eager call beside that without a rule", timings[-1].ratio, 1.03, "x")


PARTS: dict[str, Callable[[Report, bool], None]] = {"trace": part_trace, "call": part_call}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    options = arguments(__doc__ or "", list(PARTS)).parse_args(argv)
    return run(PARTS, options, title="Low precision", mark="amp", packages=["statefulnn"])


if __name__ == "__main__":
    sys.exit(main())
