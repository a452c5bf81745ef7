"""What conversion from torch costs: the conversion itself, and a forward beside the same network by hand.

    python benchmarks/from_torch.py --json results.json --markdown results.md
    python benchmarks/from_torch.py --quick

ResNet-50 is torchvision's beside examples/resnet.py, GPT-2 (124M parameters) transformers' beside
examples/gpt2.py, with one set of random weights. Both forwards run under nn.jit, interleaved.
"""

from __future__ import annotations

import gc
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
from _harness import Case, measure, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402
from tests.examples.reference import torchvision  # noqa: E402

CONVERSION_SECONDS, FORWARD_RATIO = 5.0, 1.05


def resnet(quick: bool) -> tuple[Any, nn.Module, Any, dict[str, Any]]:
    """Return torch's network, ours, an input, and arguments of the forward."""
    import torch

    import resnet as by_hand

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
        report.target(f"{name}: conversion", min(seconds), CONVERSION_SECONDS, " s")
        report.target(f"{name}: forward beside by hand", ratio, FORWARD_RATIO, "x")
    report.section(
        "From torch",
        table(["network", "conversion", "by hand, ms", "converted, ms", "ratio"], rows),
        "The least of three conversions; medians of the forward under nn.jit.",
    )


def first(out: Any) -> jax.Array:
    """Return the logits, whatever they are in."""
    return out["logits"] if isinstance(out, dict) else out


PARTS = {"networks": part_networks}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    options = arguments(__doc__ or "", tuple(PARTS)).parse_args(argv)
    packages = ["statefulnn", "torch", "transformers"]
    return run(PARTS, options, title="From torch", mark="from-torch", packages=packages)


if __name__ == "__main__":
    sys.exit(main())
