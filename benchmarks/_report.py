"""What the benchmarks share beside the timing: options, targets, and the tables on paper."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from _harness import table


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

    def leave_out(self, line: str) -> None:
        """Says once that something is not measured, and why."""
        if line not in self.left_out:
            self.left_out.append(line)
            print(line, flush=True)

    def target(self, what: str, value: float | None, limit: float, unit: str) -> None:
        """Adds a promise: `value` is at most `limit`; None says that it was not measured."""
        value = None if value is None else float(value)
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


def arguments(text: str, parts: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every benchmark has.

    Args:
        text: says what the benchmark is.
        parts: the names that `--only` takes.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: small sizes, few rounds")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--only", choices=parts, nargs="+", help="run these parts only")
    parser.add_argument(
        "--handoff", action="store_true", help="CPU: leave the computation to JAX's other thread"
    )
    parser.add_argument("--strict", action="store_true", help="fail if a target is missed")
    return parser


def uninstalled(names: Sequence[str]) -> dict[str, str]:
    """Which of the named packages cannot be imported, and why."""
    missing = {}
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            missing[name] = str(error)
    return missing


def run(
    parts: Mapping[str, Callable[[Report, bool], None]],
    options: argparse.Namespace,
    *,
    title: str,
    mark: str,
    packages: Sequence[str],
) -> int:
    """Runs the parts, writes what the options ask for and returns the exit status.

    Args:
        parts: by name; each takes the report and whether the run is a quick one.
        options: of a parser from `arguments`.
        title: the title of a page that `--markdown` makes.
        mark: in a page that has `<!-- mark: begin -->` and `end`, only what is between is replaced.
        packages: a line says which of these are not installed.
    """
    if not options.handoff:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    report = Report()
    report.numbers["machine"] = machine()
    print(f"machine: {json.dumps(report.numbers['machine'])}")
    load, cores = report.numbers["machine"]["load"], report.numbers["machine"]["cores"]
    if load and cores and load[0] > 0.5 * cores:
        print(f"the machine is busy (load {load[0]} on {cores} cores): expect noise")
    for package, error in uninstalled(packages).items():
        report.leave_out(f"{package} is left out: {error}")
    report.numbers["handoff"] = options.handoff
    start = time.perf_counter()
    for name in options.only or parts:
        parts[name](report, options.quick)
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
        _write_markdown(options.markdown, report, title, mark, bool(options.only))
    return int(bool(missed and options.strict))


def _sections(body: str) -> dict[str, str]:
    """Takes a text apart: by title, and what stands before the first one under ""."""
    before, *sections = re.split(r"^(?=## )", body, flags=re.MULTILINE)
    return {"": before.strip()} | {s.split("\n")[0]: s.strip() for s in sections}


def _completed(body: str, old: str) -> str:
    """Adds to the text of a run of some parts what an earlier text says of the others.

    A section stays where it was. So does a line of the targets, by what it promises.
    """
    new, found = _sections(body), _sections(old)
    is_targets = lambda title: title.startswith("## Targets: ")
    rows: dict[str, list[str]] = {}
    for sections in (found, new):
        for title in filter(is_targets, list(sections)):
            lines = sections.pop(title).split("\n")[4:]
            cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            rows |= {row[0]: row for row in cells}
    missed = sum(row[-1] != "pass" for row in rows.values())
    header = ["", "measured", "target", ""]
    targets = (
        f"## Targets: {len(rows) - missed} of {len(rows)} kept\n\n{table(header, rows.values())}"
    )
    return "\n\n".join([*(found | new).values(), targets])


def _write_markdown(path: Path, report: Report, title: str, mark: str, partial: bool) -> None:
    """Writes the tables to a file; in one that has the two marks, only between these.

    Args:
        partial: whether only some parts ran, and what the file says of the others is kept.
    """
    facts = report.numbers["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    where = (
        f"{facts['platform']} ({facts['device']}), {facts['cores']} cores, Python {facts['python']}"
    )
    intro = [f"{where}; {packages}.", *(f"{line}." for line in report.left_out)]
    body = "\n\n".join([*intro, *report.text])
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    page = path.read_text() if path.exists() else ""
    if begin in page and end in page:
        before, after = page.split(begin)[0], page.split(end)[1]
        if partial:
            body = _completed(body, page.split(begin)[1].split(end)[0])
        path.write_text(f"{before}{begin}\n{body}\n{end}{after}")
    elif page:
        raise SystemExit(f"{path} is a page without the line {begin!r}: nothing is written to it")
    else:
        path.write_text(f"# {title}\n\n{body}\n")
