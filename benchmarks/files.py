"""What saving and loading a model cost, beside safetensors with torch and torch's own files.

    python benchmarks/files.py
    python benchmarks/files.py --quick --only load
    python benchmarks/files.py --folder /fast/disk

`safetensors.torch.load_file` maps the file: it returns at once and reads a page when it is first used.
`nn.load(..., mmap=True)` does that as well; `nn.load` alone reads everything into memory of its own, which is
what `load_file` and a copy of each tensor do. Files are in the page cache in every row, and memory comes
fresh from the system, as it does in a program that loads its model once: the C library keeps nothing that was
freed.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from _harness import Case, Timing, measure, table
from _report import Report, arguments, run

sys.path.insert(0, str(Path(__file__).parent.parent))

import statefulnn as nn  # noqa: E402

try:
    import safetensors.torch
    import torch
except ImportError:
    torch = None

MIB = 1 << 20
# From this size on, memory of the GNU C library is the system's own, and goes back to it.
FRESH = "MALLOC_MMAP_THRESHOLD_"
options: Any = None


def arrays_of(mebibytes: int) -> dict[str, np.ndarray]:
    """The names and shapes of transformer blocks of width 1024, float32: 48 MiB a block."""
    rng = np.random.default_rng(0)
    shapes = {
        "attn.c_attn.weight": (1024, 3072),
        "attn.c_attn.bias": (3072,),
        "attn.c_proj.weight": (1024, 1024),
        "ln_1.weight": (1024,),
        "mlp.c_fc.weight": (1024, 4096),
        "mlp.c_fc.bias": (4096,),
        "mlp.c_proj.weight": (4096, 1024),
    }
    blocks = max(1, round(mebibytes / 48))
    return {
        f"h.{i}.{name}": rng.standard_normal(shape, np.float32)
        for i in range(blocks)
        for name, shape in shapes.items()
    }


def folder() -> Any:
    """A folder for the files, removed at the end."""
    return tempfile.TemporaryDirectory(dir=options.folder)


def total(state: dict[str, Any]) -> float:
    """Reads every number once, the same way whoever holds them."""
    return float(sum(np.asarray(v).sum(dtype=np.float64) for v in state.values()))


def of_torch(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}


def section(report: Report, title: str, cases: list[Case], quick: bool) -> dict[str, Timing]:
    """Times the cases and adds their table."""
    timings = measure(
        cases, seconds=0, description=title, burst_us=1.0, fewest=3 if quick else 7, most=99
    )
    rows = [[t.label, f"{t.done / 1e6:.3f} s", f"{t.ratio_done:.2f}x"] for t in timings]
    report.section(title, table(["", "time", "beside the first"], rows))
    report.numbers[title] = [t.row() for t in timings]
    return {t.label: t for t in timings}


def part_save(report: Report, quick: bool) -> None:
    arrays = arrays_of(96 if quick else 1024)
    ours = {name: jnp.asarray(a) for name, a in arrays.items()}
    with folder() as place:
        cases = []
        if torch is not None:
            theirs = of_torch(arrays)
            cases += [
                Case(
                    "safetensors.torch.save_file",
                    lambda: safetensors.torch.save_file(theirs, f"{place}/t.safetensors"),
                )
            ]
        cases += [
            Case("nn.save", lambda: nn.save(ours, f"{place}/o.safetensors")),
            Case(
                "nn.save, files of 256 MB",
                lambda: nn.save(ours, f"{place}/many", max_shard_size="256MB"),
            ),
        ]
        timings = section(report, f"Saving {size(arrays)}", cases, quick)
    if torch is not None:
        ratio = timings["nn.save"].ratio_done
        report.target("save, time beside safetensors.torch", ratio, 1 / 0.9, "x")


def size(arrays: dict[str, np.ndarray]) -> str:
    return f"{sum(a.nbytes for a in arrays.values()) / MIB:,.0f} MiB"


def part_load(report: Report, quick: bool) -> None:
    arrays = arrays_of(96 if quick else 1024)
    with folder() as place:
        path = f"{place}/m.safetensors"
        nn.save(arrays, path)
        ours = [
            Case("nn.load, mapped", lambda: nn.load(path, mmap=True)),
            Case("nn.load", lambda: nn.load(path)),
        ]
        used = [
            Case("nn.load, mapped, and read", lambda: total(nn.load(path, mmap=True))),
            Case("nn.load, and read", lambda: total(nn.load(path))),
        ]
        if torch is not None:
            load = lambda: safetensors.torch.load_file(path)
            mapped = Case("load_file (mapped)", load)
            ours.insert(
                0, Case("load_file and clone", lambda: {n: v.clone() for n, v in load().items()})
            )
            ours.append(mapped)
            used.insert(0, Case("load_file and read", lambda: total(load())))
        timings = section(report, f"Loading {size(arrays)}", ours, quick)
        read = section(report, f"Loading {size(arrays)} and reading every number", used, quick)
    if torch is not None:
        report.target(
            "load into memory of its own, time beside load_file and clone",
            timings["nn.load"].ratio_done,
            1 / 0.9,
            "x",
        )
        report.target(
            "load mapped and read, time beside load_file and read",
            read["nn.load, mapped, and read"].ratio_done,
            1 / 0.9,
            "x",
        )


def part_torch(report: Report, quick: bool) -> None:
    if torch is None:
        return
    arrays = arrays_of(96 if quick else 500)
    for new, format in ((True, "zip"), (False, "legacy")):
        with folder() as place:
            path = f"{place}/m.pth"
            torch.save(of_torch(arrays), path, _use_new_zipfile_serialization=new)
            cases = [
                Case("torch.load", functools.partial(torch.load, path)),
                Case("nn.load", functools.partial(nn.load, path)),
            ]
            title = f"A file of torch.save of {size(arrays)}, {format} format"
            timings = section(report, title, cases, quick)
        ratio = timings["nn.load"].ratio_done
        report.target(f"{format} file of torch, time beside torch.load", ratio, 1.0, "x")


def part_many(report: Report, quick: bool) -> None:
    """Many small arrays: what counts is what each of them costs beside its bytes."""
    if torch is None:
        return
    import safetensors.flax

    took = {}
    for count in (1000, 4000) if quick else (5000, 20_000):
        arrays = {f"layers.{i}.weight": np.ones((4, 4), np.float32) for i in range(count)}
        with folder() as place:
            path, old = f"{place}/m.safetensors", f"{place}/m.pth"
            nn.save(arrays, path)
            torch.save(of_torch(arrays), old)
            of = lambda load, path=path, **options: functools.partial(load, path, **options)
            cases = [
                Case("safetensors.torch.load_file", of(safetensors.torch.load_file)),
                Case("safetensors.flax.load_file", of(safetensors.flax.load_file)),
                Case("nn.load", of(nn.load)),
                Case("nn.load, device='meta'", of(nn.load, device="meta")),
            ]
            timings = section(report, f"Loading {count:,} arrays of 64 bytes", cases, quick)
            took[count] = timings["nn.load"].done
            flax = timings["safetensors.flax.load_file"].done
            if count >= 4000:
                report.target(
                    f"{count:,} arrays, time beside safetensors.flax", took[count] / flax, 2.0, "x"
                )
                report.target(
                    f"{count:,} arrays, time beside safetensors.torch",
                    timings["nn.load"].ratio_done,
                    2.0,
                    "x",
                )
            cases = [
                Case("torch.load", functools.partial(torch.load, old)),
                Case("nn.load", functools.partial(nn.load, old)),
            ]
            section(report, f"A file of torch.save of {count:,} arrays of 64 bytes", cases, quick)
    few, many = took.values()
    report.target("four times as many arrays, time", many / few, 5.0, "x")


# How much more memory a process holds at most while it loads, beside the arrays.
MEMORY = """
    import gc, sys
    import jax, numpy as np
    import statefulnn as nn
    from pathlib import Path

    def now(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    jax.block_until_ready(jax.device_put(np.zeros(1)))
    nn.load(sys.argv[2])  # a small one: everything is imported
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = now("VmRSS")
    state = nn.load(sys.argv[1], mmap=sys.argv[3] == "mapped")
    total = sum(float(np.asarray(v).sum()) for v in state.values())
    print((now("VmHWM") - before) / sum(v.nbytes for v in state.values()))
"""


def part_memory(report: Report, quick: bool) -> None:
    if not os.path.exists("/proc/self/clear_refs"):
        report.leave_out("peak memory is left out: this system does not tell it")
        return
    arrays = arrays_of(96 if quick else 1024)
    rows = []
    with folder() as place:
        nn.save(arrays, f"{place}/m.safetensors")
        nn.save(arrays, f"{place}/many", max_shard_size="256MB")
        nn.save({"a": np.ones(3)}, f"{place}/small.safetensors")
        files = {"one file": ("m.safetensors", ""), "files of 256 MB": ("many", "")}
        files["one file, mapped"] = ("m.safetensors", "mapped")
        if torch is not None:
            torch.save(of_torch(arrays), f"{place}/m.pth")
            files["a file of torch.save"] = ("m.pth", "")
        for label, (file, how) in files.items():
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(MEMORY), f"{place}/{file}"]
                + [f"{place}/small.safetensors", how],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            )
            peak = float(done.stdout)
            rows.append([label, f"{peak:.3f}x"])
            report.target(f"peak memory, {label}, beside the arrays", peak, 1.15, "x")
    report.section(
        f"Peak memory while {size(arrays)} are loaded and read",
        table(["", "beside the arrays"], rows),
        "What the process holds more than before, at its highest, in a process of its own.",
    )
    report.numbers["memory"] = rows


PARTS = {
    "save": part_save,
    "load": part_load,
    "torch": part_torch,
    "many": part_many,
    "memory": part_memory,
}


def main(argv: list[str] | None = None) -> int:
    global options
    parser = arguments(__doc__ or "", list(PARTS))
    parser.add_argument(
        "--folder", help="where the files are written; a temporary folder otherwise"
    )
    options = parser.parse_args(argv)
    if argv is None and FRESH not in os.environ:  # the C library reads it when a process starts
        os.execve(
            sys.executable, [sys.executable, *sys.argv], {**os.environ, FRESH: str(128 << 10)}
        )
    packages = ("safetensors", "torch")
    return run(PARTS, options, title="Files", mark="files", packages=packages)


if __name__ == "__main__":
    sys.exit(main())
