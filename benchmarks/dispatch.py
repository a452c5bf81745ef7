"""What a call costs: statefulnn beside raw JAX, flax.nnx, equinox and torch, in one run.

    python benchmarks/dispatch.py --json results.json --markdown results.md
    python benchmarks/dispatch.py --quick

On a CPU the calls are timed with `jax_cpu_enable_async_dispatch` off: JAX otherwise hands the
computation to another thread, and waking that thread takes longer than the dispatch of a small model,
for everybody alike (`--handoff` leaves it on; whether calls wait is measured in a process of its own,
with JAX's default). Runs on the platform JAX chooses; `JAX_PLATFORMS=cpu` forces the CPU. What is not
installed is left out, with a line that says so. README.md beside this file says how to read the
numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _contenders  # noqa: E402
import _probes  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from _harness import Timing, measure, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

OURS_FORWARD = ["nn.jit(model)(x)", "nn.jit(f)(model, x)"]
OURS_STEP = ["nn.jit, hand-written Adam", "nn.jit, nn.Optimizer"]


def _cases(report: Report, kind: str, n: int) -> list[Any]:
    """The cases of every installed contender, warmed up, after checking that they compute the same."""
    cases = []
    for make in getattr(_contenders, kind.upper()):
        try:
            found = make(n)
            for case in found:
                # As many calls for each, so that the checks below compare the same step.
                for _ in range(3):
                    jax.block_until_ready(case.call())
        except ImportError as error:
            report.leave_out(f"{make.__name__} is left out: {error}")
            continue
        cases += found
    expected = None
    for case in cases:
        value = np.asarray(jax.tree.leaves(case.check())[-1])
        expected = value if expected is None else expected
        # Adam divides by the square root of a small number: float32 rounding is seen in the fourth digit.
        np.testing.assert_allclose(value, expected, rtol=2e-3, atol=1e-4, err_msg=case.label)
    return cases


def run_dispatch(
    report: Report, kind: str, sizes: Sequence[int], seconds: float
) -> dict[int, dict[str, Timing]]:
    """Measures one kind of call at every size and adds its table."""
    results: dict[int, dict[str, Timing]] = {}
    for n in sizes:
        cases = _cases(report, kind, n)
        timings = measure(cases, seconds=seconds, description=f"{kind}, {n} tensors")
        results[n] = {t.label: t for t in timings}
    labels = list(dict.fromkeys(label for byn in results.values() for label in byn))
    rows = []
    for label in labels:
        cells = [label]
        for n in sizes:
            t = results[n].get(label)
            cells.append(
                "-" if t is None else f"{t.returned:.1f} ({t.ratio:.2f}x, {t.difference:+.1f})"
            )
        rows.append(cells)
    titles = {
        "forward": "Forward, read-only",
        "step": "Train step: loss, gradient, Adam",
        "feedback": "The model returned by the compiled call and fed back",
    }
    report.section(
        titles[kind],
        table([f"tensors: {sizes[0]}" if len(sizes) == 1 else "", *map(str, sizes)], rows),
        "Microseconds a call until it returned (ratio to the flat list, difference to it).",
    )
    report.numbers[kind] = {
        str(n): [t.row() for t in by_label.values()] for n, by_label in results.items()
    }
    return results


def _dispatch_targets(
    report: Report, what: str, results: dict[int, dict[str, Timing]], labels: list[str]
) -> None:
    for label in labels:
        for n, timings in results.items():
            t = timings.get(label)
            name = f"{what}, {n} tensors: {label}"
            if n < 64:
                report.target(name, t and t.difference, 8, " µs")
            else:
                report.target(name, t and t.ratio, 1.15 if n >= 128 else 1.25, "x")


def _faster_targets(
    report: Report, what: str, results: dict[int, dict[str, Timing]], labels: list[str]
) -> None:
    for n, timings in results.items():
        other = timings.get("nnx.jit_partial")
        if n < 64 or other is None:
            continue
        for label in labels:
            t = timings.get(label)
            value = None if t is None else t.returned / other.returned
            report.target(f"{what}, {n} tensors: {label} beside nnx.jit_partial", value, 1, "x")


def _rows_table(rows: list[dict[str, Any]]) -> str:
    header = list(rows[0])
    return table(["", *header[1:]], [[str(row[key]) for key in header] for row in rows])


def _ratio_of(rows: list[dict[str, Any]], label: str) -> float | None:
    return next((row["ratio"] for row in rows if row["label"] == label), None)


def part_dispatch(report: Report, quick: bool) -> None:
    """The cost of a compiled call."""
    sizes = [8, 64] if quick else [8, 64, 128, 256, 1024]
    seconds = 1.0 if quick else 6.0
    forward = run_dispatch(report, "forward", sizes, seconds)
    _dispatch_targets(report, "forward", forward, OURS_FORWARD)
    for n, timings in forward.items():
        t = timings.get("jax.jit(f)(model, x)")
        name = f"forward, {n} tensors: jax.jit(f)(model, x)"
        if n < 64:
            report.target(name, t and t.difference, 4, " µs")
        else:
            report.target(name, t and t.ratio, 1.15, "x")
    # XLA takes more than 20 GB on some CPUs to compile a step of 1,024 tensors, also one by hand.
    step = run_dispatch(report, "step", [n for n in sizes if n <= 256], seconds)
    _dispatch_targets(report, "train step", step, OURS_STEP)
    feedback = run_dispatch(report, "feedback", sizes, seconds / 2)
    for n, timings in feedback.items():
        t = timings.get("jax.jit(lambda m, x: (m, m(x)))")
        report.target(
            f"fed back, {n} tensors: jax.jit(lambda m, x: (m, m(x)))", t and t.ratio, 1.2, "x"
        )
    _faster_targets(report, "forward", forward, OURS_FORWARD)
    _faster_targets(report, "train step", step, OURS_STEP)


def part_invalidation(report: Report, quick: bool) -> None:
    """The cost of a call after something static changed."""
    modules = 50 if quick else 500
    try:
        rows = _probes.invalidation(modules, rounds=5 if quick else 40)
    except ImportError as error:
        report.leave_out(f"invalidation is left out: {error}")
        return
    report.numbers["invalidation"] = rows
    report.section(
        f"nn.jit(model)(x) with {modules} modules, after a change",
        _rows_table(rows),
        "8 tensors; microseconds of the one call after the change.",
    )


def part_async(report: Report, quick: bool) -> None:
    """Whether a call returns before its result is there."""
    on_cpu = jax.default_backend() == "cpu"
    size, length = (512, 8) if quick else (1024, 8) if on_cpu else (8192, 16)
    rounds = 5 if quick else 11
    # On a CPU in a process of its own, because this one may compute inside the call.
    measure_it = _probes.asynchrony_afresh if on_cpu else _probes.asynchrony
    rows = measure_it(size=size, length=length, rounds=rounds)
    report.numbers["asynchrony"] = rows
    report.section(
        "Asynchronous dispatch",
        _rows_table(rows),
        f"A chain of {length} products of ({size}, {size}) matrices.",
    )
    for label in ("nn.jit, read-only", "nn.jit, writes a buffer"):
        row = next((r for r in rows if r["label"] == label), None)
        share = None if row is None else row["returned_ms"] / row["done_ms"]
        report.target(f"asynchronous: {label} returns before its result is there", share, 0.5, "")


def part_eager(report: Report, quick: bool) -> None:
    """Eager layers."""
    for kind in ("Linear", "LayerNorm"):
        timings = _probes.eager(kind, seconds=1 if quick else 4)
        report.numbers[f"eager_{kind}"] = [t.row() for t in timings]
        report.section(
            f"Eager {kind}",
            table(
                ["", "µs", "ratio", "µs until done"],
                [
                    [t.label, f"{t.returned:.1f}", f"{t.ratio:.2f}x", f"{t.done:.1f}"]
                    for t in timings
                ],
            ),
            "64 features, a batch of 32.",
        )
        ours = next((t.ratio for t in timings if t.label == f"nn.{kind}"), None)
        if kind == "Linear":
            report.target("eager nn.Linear beside the bare jitted function", ours, 2, "x")


def part_trace(report: Report, quick: bool) -> None:
    """Trace time."""
    results = _probes.trace_time(50 if quick else 500, rounds=6 if quick else 7)
    report.numbers["trace"] = results
    for name, rows in results.items():
        report.section(
            f"Trace time, {name}",
            _rows_table(rows),
            "The first call from cold caches, less lowering and compilation.",
        )
        for label in ("nn.jit(f)(model, x)", "nn.jit(model)(x)", "jax.jit(f)(model, x)"):
            report.target(f"trace of {name}: {label}", _ratio_of(rows, label), 1.5, "x")


def part_construction(report: Report, quick: bool) -> None:
    """Construction."""
    blocks = 2 if quick else 12
    rows = _probes.construction(blocks=blocks, width=128, rounds=1 if quick else 3)
    report.numbers["construction"] = rows
    report.section(
        f"Construction of a transformer of {blocks} blocks",
        _rows_table(rows),
        "Width 128, in a fresh process and once more in the same one.",
    )


def part_import(report: Report, quick: bool) -> None:
    """Import time."""
    rows = _probes.import_time(rounds=2 if quick else 9)
    report.numbers["import"] = rows
    report.section("Import", _rows_table(rows), "In fresh processes.")
    report.target("import statefulnn beside import jax", _ratio_of(rows, "statefulnn"), 1.2, "x")


PARTS: dict[str, Callable[[Report, bool], None]] = {
    "dispatch": part_dispatch,
    "invalidation": part_invalidation,
    "async": part_async,
    "eager": part_eager,
    "trace": part_trace,
    "construction": part_construction,
    "import": part_import,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    options = arguments(__doc__ or "", list(PARTS)).parse_args(argv)
    packages = ["statefulnn", "flax.nnx", "equinox", "torch", "optax"]
    return run(PARTS, options, title="Dispatch", mark="table", packages=packages)


if __name__ == "__main__":
    sys.exit(main())
