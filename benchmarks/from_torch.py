"""What conversion from torch costs: the conversion itself, and a forward beside the same network by hand.

    python benchmarks/from_torch.py --json results.json --markdown results.md
    python benchmarks/from_torch.py --quick

ResNet-50 is torchvision's beside examples/resnet.py, GPT-2 (124M parameters) transformers' beside
examples/gpt2.py, with one set of random weights. Both forwards run under nn.jit, interleaved.

The part `many` converts twelve networks, each in a process of its own (`_converted.py`): the conversion
beside torch.export, its peak of memory, the forward beside torch, eager and compiled (inductor needs gcc).
It takes timm and diffusers as well; networks of packages that are not there are left out.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _harness import Case, measure, progress, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402

CONVERSION_SECONDS, FORWARD_RATIO = {"ResNet-50": 1.7, "GPT-2": 4.5}, 1.05
MANY = (
    "ResNet-50", "EfficientNet-B0", "MobileNetV3", "ConvNeXt-T", "Swin-T", "ViT-B/16", "BERT", "GPT-2",
    "T5-small", "Llama, 8 layers", "Qwen2-MoE, 4 layers", "diffusion U-Net",
)  # fmt: skip
EXPORT_RATIO, EAGER_RATIO, COMPILED_RATIO, PEAK = 2.0, 1.0, 1.2, 1.2
TIME_LIMIT = 900  # seconds for one process


def resnet(quick: bool) -> tuple[Any, nn.Module, Any, dict[str, Any]]:
    """Return torch's network, ours, an input, and arguments of the forward."""
    import torch

    import resnet as by_hand
    from tests.examples.reference import torchvision  # needs the packages of the tests

    name, size = ("resnet18", 64) if quick else ("resnet50", 224)
    theirs = getattr(torchvision.models, name)().eval()
    return theirs, getattr(by_hand, name)().eval(), torch.randn(2, 3, size, size), {}


def gpt2(quick: bool) -> tuple[Any, nn.Module, Any, dict[str, Any]]:
    """Return torch's network, ours, an input, and arguments of the forward."""
    import torch
    import transformers

    import gpt2 as by_hand

    layers = 2 if quick else 12
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers)).eval()
    ours = by_hand.GPT2LMHeadModel(by_hand.GPT2Config(n_layer=layers)).eval()
    return theirs, ours, torch.randint(0, 1000, (2, 32 if quick else 128)), {"use_cache": False}


NETWORKS: dict[str, Callable[[bool], tuple]] = {"ResNet-50": resnet, "GPT-2": gpt2}


def part_networks(report: Report, quick: bool) -> None:
    """Both networks: seconds to convert, and milliseconds of a forward."""
    from statefulnn.bridge.torch import from_torch

    import torch  # isort: skip

    # Imports and torch's own warming up belong to no network.
    class Warm(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1

    from_torch(Warm(), torch.ones(2, 3))
    rows = []
    for name, make in NETWORKS.items():
        theirs, by_hand, example, options = make(quick)
        seconds = []
        for _ in range(1 if quick else 3):
            gc.collect()
            start = time.perf_counter()
            converted = from_torch(theirs, example, kwargs=options)
            seconds.append(time.perf_counter() - start)
        state = {k: np.asarray(v) for k, v in converted.state_dict().items()}
        by_hand.load_state_dict({k: v for k, v in state.items() if k in by_hand.state_dict()})
        x = jnp.asarray(example.numpy())
        forward = nn.jit(lambda model, x: model(x))
        logits = nn.jit(lambda model, x, options=options: first(model(x, **options)))
        agreed = float(jnp.abs(logits(converted, x) - first(forward(by_hand, x))).max())
        if agreed > 1e-3:
            raise AssertionError(f"{name}: the two networks differ by {agreed}")
        timings = measure(
            [
                Case("by hand", lambda f=forward, m=by_hand, x=x: f(m, x)),
                Case("converted", lambda f=logits, m=converted, x=x: f(m, x)),
            ],
            seconds=2 if quick else 20,
            description=name,
            fewest=3 if quick else 9,
        )
        report.numbers[name] = {
            "conversion_seconds": [round(s, 3) for s in seconds],
            "forward": [t.row() for t in timings],
        }
        hand, ours = (f"{t.done / 1e3:.1f}" for t in timings)
        ratio = timings[1].ratio_done
        rows.append([name, f"{min(seconds):.2f} s", hand, ours, f"{ratio:.3f}x"])
        report.target(f"{name}: conversion", min(seconds), CONVERSION_SECONDS[name], " s")
        report.target(f"{name}: forward beside by hand", ratio, FORWARD_RATIO, "x")
    report.section(
        "From torch",
        table(["network", "conversion", "by hand, ms", "converted, ms", "ratio"], rows),
        "The least of three conversions; medians of the forward under nn.jit.",
    )


def first(out: Any) -> jax.Array:
    """Return the logits, whatever they are in."""
    return out["logits"] if isinstance(out, dict) else out


# What a conversion needs, and torch.export by itself.
PEAKS = ("peak", "export_peak")


def _child(name: str, *options: str) -> dict[str, Any]:
    """Return what a process of its own found of one network, or why it found nothing."""
    command = [sys.executable, "-W", "ignore", str(HERE / "_converted.py"), name, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return {"missing": f"no answer after {TIME_LIMIT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"missing": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    return json.loads(lines[-1])


def part_many(report: Report, quick: bool) -> None:
    """Twelve networks: conversion beside torch.export, memory, and the forward beside torch."""
    how = ["--seconds", "1", "--times", "1", "--no-inductor"] if quick else ["--seconds", "10"]
    rows, found = [], {}
    for name in progress(MANY[:1] if quick else MANY, "networks of torch"):
        one = _child(name, *how)
        if "missing" in one:
            report.leave_out(f"{name} is left out: {one['missing']}")
            continue
        sizes = _child(name, "--memory", "copy")
        one |= {key: sizes.get(key) for key in PEAKS}
        found[name] = one
        ms, slower = one["ms"], one["ratio"]["ours"]
        beside = ms["ours"] / ms["compiled"] if "compiled" in ms else None
        rows.append(
            [
                name,
                f"{one['export']:.2f} s",
                f"{one['conversion']:.2f} s",
                f"{one['conversion'] / one['export']:.2f}x",
                *("" if one[k] is None else f"{one[k]:.2f}x" for k in PEAKS),
                f"{one['first_call']:.1f} s",
                f"{ms['ours']:.1f}",
                f"{slower:.2f}x",
                "" if beside is None else f"{beside:.2f}x",
            ]
        )
    report.numbers["many"] = found
    header = (
        "network",
        "export",
        "conversion",
        "ratio",
        "peak",
        "export's",
        "first call",
        "ms",
        "eager",
        "compiled",
    )
    report.section(
        "Networks of torch",
        table(header, rows),
        "The least of two exports and conversions; the peaks of memory of a conversion and of torch.export "
        "alone, above what was held before, beside the bytes of the network's arrays; the first call under "
        "nn.jit; the median of a forward, and its ratio to torch's, eager and by torch.compile.",
    )
    if not found:
        return
    each = list(found.values())
    over = max(one["conversion"] / one["export"] for one in each)
    report.target("conversion beside torch.export, the slowest", over, EXPORT_RATIO, "x")
    peaks = [one["peak"] for one in each if one["peak"] is not None]
    report.target("peak of memory, the largest", max(peaks, default=None), PEAK, "x")
    eager = statistics.geometric_mean(one["ratio"]["ours"] for one in each)
    report.target("forward beside eager, geometric mean", eager, EAGER_RATIO, "x")
    both = [one["ms"] for one in each if "compiled" in one["ms"]]
    ratios = [ms["ours"] / ms["compiled"] for ms in both]
    mean = statistics.geometric_mean(ratios) if ratios else None
    report.target("forward beside torch.compile, geometric mean", mean, COMPILED_RATIO, "x")


PARTS = {"networks": part_networks, "many": part_many}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    options = arguments(__doc__ or "", tuple(PARTS)).parse_args(argv)
    packages = ["statefulnn", "torch", "transformers"]
    return run(PARTS, options, title="From torch", mark="from-torch", packages=packages)


if __name__ == "__main__":
    sys.exit(main())
