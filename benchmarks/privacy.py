"""Clipped sums of the gradients of examples beside a plain gradient: time and memory, in one run.

    python benchmarks/privacy.py --markdown results.md
    python benchmarks/privacy.py --quick

Each network has three compiled functions: the plain gradient of the mean loss, ghost clipping, and clipping
of explicit gradients of examples. Times are of interleaved rounds; memory is what XLA says of temporary
arrays.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from _harness import Case, measure, progress, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """A dense network, a small CNN, and the CNN of opacus's MNIST example, with shapes of batches."""
    return {
        "MLP 784-512-512-10, 256 images": (
            nn.Sequential(
                nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
            ),
            (256, 784),
        ),
        "CNN of 16 and 32 channels, 64 images": (
            nn.Sequential(
                nn.Conv2d(1, 16, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * 49, 10),
            ),
            (64, 1, 28, 28),
        ),
        "CNN of opacus's MNIST example, 64 images": (
            nn.Sequential(
                nn.Conv2d(1, 16, 8, stride=2, padding=3),
                nn.ReLU(),
                nn.MaxPool2d(2, 1),
                nn.Conv2d(16, 32, 4, stride=2),
                nn.ReLU(),
                nn.MaxPool2d(2, 1),
                nn.Flatten(),
                nn.Linear(512, 32),
                nn.ReLU(),
                nn.Linear(32, 10),
            ),
            (64, 1, 28, 28),
        ),
    }


def contenders(model: nn.Module, x: Any, y: Any) -> tuple[dict[str, Callable], dict[str, Any]]:
    """The three functions of the parameters, and these."""
    fn, params = nn.functionalize(model)

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return F.cross_entropy(model(x[None])[0], y)

    def ghost(params: dict[str, Any], x: Any, y: Any) -> Any:
        twin = nn.merge(*nn.split(model))
        for name, value in params.items():
            twin.get_parameter(name).value = value
        return nn.curvature.ghost_clip(loss, 1.0)(twin, x, y).gradients

    def explicit(params: dict[str, Any], x: Any, y: Any) -> Any:
        one = lambda p, x, y: F.cross_entropy(fn(p, x[None])[0], y)
        return nn.curvature.clip_per_example(
            jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y), 1.0
        ).gradients

    plain = jax.grad(lambda p, x, y: F.cross_entropy(fn(p, x), y))
    return {"plain gradient": plain, "ghost": ghost, "gradients of examples": explicit}, params


def compare(report: Report, quick: bool) -> None:
    """Add a table for all networks."""
    rows = []
    for title, (model, shape) in progress(networks().items(), "networks"):
        x = jax.random.normal(jax.random.key(0), shape)
        y = jnp.arange(shape[0]) % 10
        functions, params = contenders(model, x, y)
        programs = {
            n: jax.jit(f).lower(params, x, y).compile()
            for n, f in functions.items()
            if not (quick and n == "gradients of examples")
        }
        cases = [Case(n, functools.partial(p, params, x, y)) for n, p in programs.items()]
        timings = measure(cases, seconds=1 if quick else 15, description=title)
        memory = [p.memory_analysis().temp_size_in_bytes for p in programs.values()]
        report.numbers[title] = [
            t.row() | {"bytes": m} for t, m in zip(timings, memory, strict=True)
        ]
        report.target(f"{title}: time", timings[1].ratio_done, 1.5, "x")
        report.target(f"{title}: bytes", memory[1] / memory[0], 1.5, "x")
        for t, m in zip(timings, memory, strict=True):
            row = [f"{t.done / 1e3:.1f}", f"{t.ratio_done:.2f}x", f"{m / 1e6:.1f}"]
            rows.append([f"{title}: {t.label}", *row, f"{m / memory[0]:.2f}x"])
    header = ["", "ms", "beside the plain one", "MB", "beside the plain one"]
    report.section("Clipped gradients", table(header, rows), "")


PARTS = {"clipping": compare}


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__ or "", list(PARTS)).parse_args(argv)
    return run(PARTS, options, title="Private gradients", mark="privacy", packages=())


if __name__ == "__main__":
    sys.exit(main())
