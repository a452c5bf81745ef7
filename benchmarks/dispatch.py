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

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

OURS_FORWARD = ["nn.jit(model)(x)", "nn.jit(f)(model, x)"]
OURS_STEP = ["nn.jit, hand-written Adam", "nn.jit, nn.Optimizer"]


@dataclass
class Target:
    """One promise and whether this run kept it."""

    what: str
    measured: str
    limit: str
    passed: bool


class Report:
    """Collects what was measured: sections for people, numbers for the JSON file, targets."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.numbers: dict[str, Any] = {}
        self.targets: list[Target] = []
        self.left_out: list[str] = []

    def section(self, title: str, body: str, note: str = "") -> None:
        """Adds a section and prints it."""
        parts = [f"## {title}", *([note] if note else []), body]
        self.text.append("\n\n".join(parts))
        print("\n" + self.text[-1], flush=True)

    def target(self, what: str, value: float | None, limit: float, unit: str) -> None:
        """Adds a promise: `value` is at most `limit`; None says that it was not measured."""
        measured = "not measured" if value is None else f"{value:.2f}{unit}"
        self.targets.append(
            Target(what, measured, f"at most {limit:g}{unit}", value is not None and value <= limit)
        )


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    packages = {}
    for name in ("jax", "jaxlib", "numpy", "flax", "equinox", "optax", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "packages": packages,
    }


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
            line = f"{make.__name__} is left out: {error}"
            if line not in report.left_out:
                report.left_out.append(line)
                print(line, flush=True)
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
    step = run_dispatch(report, "step", sizes, seconds)
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
        report.left_out.append(f"invalidation is left out: {error}")
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


def _write_markdown(path: Path, report: Report) -> None:
    """Writes the tables to a file; in one that has the two marks, only between these."""
    facts = report.numbers["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    where = (
        f"{facts['platform']} ({facts['device']}), {facts['cores']} cores, Python {facts['python']}"
    )
    intro = [f"{where}; {packages}.", *(f"{line}." for line in report.left_out)]
    body = "\n\n".join([*intro, *report.text])
    begin, end = "<!-- table: begin -->", "<!-- table: end -->"
    page = path.read_text() if path.exists() else ""
    if begin in page and end in page:
        before, after = page.split(begin)[0], page.split(end)[1]
        path.write_text(f"{before}{begin}\n{body}\n{end}{after}")
    else:
        path.write_text(f"# Dispatch\n\n{body}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: small sizes, few rounds")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", help="run these parts only")
    parser.add_argument(
        "--handoff", action="store_true", help="CPU: leave the computation to JAX's other thread"
    )
    parser.add_argument("--strict", action="store_true", help="fail if a target is missed")
    options = parser.parse_args(argv)
    if not options.handoff:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    report = Report()
    report.numbers["machine"] = machine()
    print(f"machine: {json.dumps(report.numbers['machine'])}")
    load, cores = report.numbers["machine"]["load"], report.numbers["machine"]["cores"]
    if load and cores and load[0] > 0.5 * cores:
        print(f"the machine is busy (load {load[0]} on {cores} cores): expect noise")
    for name in ("statefulnn", "flax.nnx", "equinox", "torch", "optax"):
        for package, error in _probes.uninstalled([name]).items():
            report.left_out.append(f"{package} is left out: {error}")
            print(report.left_out[-1])
    report.numbers["handoff"] = options.handoff
    start = time.perf_counter()
    for name in options.only or PARTS:
        PARTS[name](report, options.quick)
    report.numbers["seconds"] = round(time.perf_counter() - start, 1)
    report.numbers["left_out"] = report.left_out
    report.numbers["targets"] = [vars(t) for t in report.targets]
    missed = sum(not t.passed for t in report.targets)
    report.section(
        f"Targets: {len(report.targets) - missed} of {len(report.targets)} kept",
        table(
            ["", "measured", "target", ""],
            [[t.what, t.measured, t.limit, "pass" if t.passed else "MISS"] for t in report.targets],
        ),
    )
    print(f"\n{report.numbers['seconds']} s")
    if options.json:
        options.json.write_text(json.dumps(report.numbers, indent=1) + "\n")
    if options.markdown:
        _write_markdown(options.markdown, report)
    return int(bool(missed and options.strict))


if __name__ == "__main__":
    sys.exit(main())
