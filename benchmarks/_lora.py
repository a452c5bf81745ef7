"""What adapters cost beside the base model, in a compiled forward pass and in a gradient.

python benchmarks/_lora.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from _harness import Case, Timing, measure, table

import statefulnn as nn


def lora_cases(width: int, inputs: int) -> dict[str, list[Case]]:
    """Four pairs of Linear layers, `width` to four times that and back, with adapters; the base first."""

    def net(change: Callable[[Any], Any] = lambda m: None) -> Any:
        nn.manual_seed(0)
        pairs = [
            (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(4)
        ]
        model = nn.Sequential(*(layer for pair in pairs for layer in pair)).eval()
        change(model)
        return model

    def merged(model: Any) -> None:
        nn.lora.attach(model, "*", rank=8)
        nn.lora.merge(model)

    nets = {
        "base": net(),
        "adapters": net(lambda m: nn.lora.attach(m, "*", rank=8)),
        "merged": net(merged),
        "DoRA": net(lambda m: nn.lora.attach(m, "*", rank=8, variant="dora")),
    }
    x = jax.random.normal(jax.random.key(0), (inputs, width))
    run = nn.jit(lambda model, x: model(x))
    gradient = nn.jit(nn.grad(lambda model, x: (model(x) ** 2).sum()))
    case = lambda function, label: Case(label, lambda: function(nets[label], x))
    return {
        f"forward, {inputs} x {width}": [case(run, label) for label in nets],
        f"gradient, {inputs} x {width}": [case(gradient, n) for n in ("base", "adapters", "DoRA")],
    }


def lora_timings(quick: bool = False) -> dict[str, list[Timing]]:
    """Return the timings by title.

    Args:
        quick: whether to measure for three seconds each instead of twenty.
    """
    return {
        title: measure(cases, seconds=3 if quick else 20, description=title)
        for title, cases in lora_cases(768, 512).items()
    }


if __name__ == "__main__":
    for title, timings in lora_timings().items():
        print(title)
        rows = [(t.label, f"{t.done / 1000:.0f} ms", f"{t.ratio_done:.2f}") for t in timings]
        print(table(("", "time", "beside the base"), rows))
