"""The models of the examples beside torchvision's and transformers': building, loading, compiling, calling.

    python benchmarks/models.py                            # about 5 minutes
    python benchmarks/models.py --models resnet50 gpt2 --seconds 20

Both have the same weights, from one file of torch.save, and the same batch. *Drawn* builds a model with
initial values, *meta* one with shapes alone; *loaded* is the time from the file to a model on meta that
has its numbers (torch: `torch.load(mmap=True)`), each the median of three. *First call* is the first call
of `nn.jit(model)`, which compiles. *Call* is the median ratio of `nn.jit(model)` to torch's eager forward
without gradients, in interleaved rounds. *Difference* is the largest one between the outputs, beside the
largest output. Needs the extras `bench` and `reference`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _harness import Case, measure, progress, table  # noqa: E402

import statefulnn as nn  # noqa: E402
from tests.examples import reference  # noqa: E402

MODELS = ("resnet18", "resnet50", "vit_b_16", "convnext_tiny", "bert-base", "gpt2", "lstm")
INPUTS = {
    "bert-base": reference.padded_tokens(30522, 2, 128),
    "gpt2": reference.tokens(50257, 1, 128),
    "lstm": reference.tokens(33278, 35, 8),
}
# libgomp's threads spin for up to some milliseconds after torch's last parallel loop.
PAUSE = 0.01


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    """Return the median time of a call and of what it leaves to be done."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def row(name: str, folder: Path, limit: float) -> list[str]:
    """Measure one model and return its row of the table."""
    case = reference.FULL[name]
    theirs = case.reference()
    path = reference.saved_by_torch(theirs, folder, "pth")
    inputs = INPUTS.get(name, reference.images(224, 1))(np.random.default_rng(0))

    def ours_loaded() -> nn.Module:
        with nn.device("meta"):
            model = case.ours()
        model.load_state_dict(nn.load(path), assign=True)
        return model

    def theirs_loaded() -> Any:
        with torch.device("meta"):
            model = case.theirs()
        model.load_state_dict(torch.load(path, mmap=True), assign=True)

    def ours_meta() -> None:
        with nn.device("meta"):
            case.ours()

    def theirs_meta() -> None:
        with torch.device("meta"):
            case.theirs()

    times = [
        (seconds(case.ours), seconds(case.theirs)),
        (seconds(ours_meta), seconds(theirs_meta)),
        (seconds(ours_loaded), seconds(theirs_loaded)),
    ]
    call, given = nn.jit(ours_loaded().eval()), reference.as_arrays(inputs)
    first = seconds(lambda: call(*given), 1)
    out = case.our_output(call(*given))
    tensors = [reference.to_torch(x) for x in inputs]

    def forward() -> Any:
        with torch.no_grad():
            return theirs(*tensors)

    expected = case.call(theirs, *inputs)
    difference, largest = np.abs(np.asarray(out) - expected).max(), np.abs(expected).max()
    baseline, ours = measure(
        [Case("torch", forward), Case("statefulnn", lambda: call(*given))],
        seconds=limit,
        description=name,
        fewest=5,
        pause=PAUSE,
    )
    return [
        name,
        f"{sum(p.numel() for p in theirs.parameters()):,}",
        f"{difference:.1e} of {largest:.1f}",
        *(f"{a:.2f} / {b:.2f} s" for a, b in times),
        f"{first:.1f} s",
        f"{baseline.done / 1e3:.0f} ms",
        f"{ours.ratio_done:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=reference.FULL, default=MODELS)
    parser.add_argument("--seconds", type=float, default=15, help="of calls, for each model")
    args = parser.parse_args()
    rows = []
    for name in progress(args.models, "models"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, Path(folder), args.seconds))
    pairs = ("drawn", "meta", "loaded")
    header = ["model", "parameters", "difference", *(f"{p}, ours / torch" for p in pairs)]
    print(table([*header, "first call", "torch", "call, ours / torch"], rows))


if __name__ == "__main__":
    main()
