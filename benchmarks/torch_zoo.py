r"""Whether networks of torch that nobody chose for it convert, and compute what torch does.

    pip install -e ".[dev,reference,bench]" torch_geometric segmentation-models-pytorch x-transformers \
        diffusers lpips
    python benchmarks/torch_zoo.py --markdown docs/from-torch.md
    python benchmarks/torch_zoo.py --match "timm swin" --jobs 2

Each network runs in a process of its own, with a time limit. Its weights are random, also those that
start as zeros and ones. It is converted with a batch of two, and compared with torch for a batch of three,
under nn.jit; every third also in its gradients, and of the others those with statistics of a batch also in
training: outputs and what the buffers hold afterwards. Errors are relative to the largest number of each
output, gradient or buffer. Where gradients or training differ by more than the limits, the yardstick is how
much torch's own change when its parameters do by 1e-7 of their values: the largest of eight times, doubled.
XLA compiles in a hurry, without most of its optimisations.

With `--timing`, XLA takes its time, and a forward is timed beside torch's, both without gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    sys.path[:3]
)  # for the process that the others come from

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _harness import Case, measure, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402
from _zoo import NETWORKS, Inputs  # noqa: E402

import statefulnn as nn  # noqa: E402

# Sums of float32 in another order differ by this much at most; gradients pass twice as many layers.
FORWARD, GRADIENT = 1e-4, 1e-3
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.examples.reference", "timm", "_harness"])
NUDGES = 8
FEWEST = 130  # so many networks agree at least
SLOWEST = 1.0  # a forward beside torch's, geometric mean


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    parser = arguments(__doc__ or "", ("networks",))
    parser.add_argument("--match", default="", help="only networks whose names this pattern is in")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a network")
    parser.add_argument("--timing", action="store_true", help="time forwards beside torch's")
    parser.add_argument(
        "--resume", type=Path, help="a file of results: networks in it that agree do not run again"
    )
    options = parser.parse_args(argv)
    parts = {"networks": lambda report, quick: part_networks(report, quick, options)}
    return run(parts, options, title="Networks", mark="zoo", packages=["statefulnn", "torch"])


def part_networks(report: Report, quick: bool, options: argparse.Namespace) -> None:
    """Every network in its process, and the table."""
    from tqdm import tqdm

    names = [n for n in NETWORKS if re.search(options.match, n)]
    names = names[:: len(names) // 5 or 1] if quick else names
    found: dict[str, dict[str, Any]] = {}
    if options.resume and options.resume.exists():
        for line in options.resume.read_text().splitlines():
            row = json.loads(line)
            if row["name"] in names:
                found[row["name"]] = row
    left = [n for n in names if found.get(n, {}).get("verdict") != "agrees"]
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(left), disable=None) as bar:

        def one(name: str) -> None:
            found[name] = row = _in_a_process(name, options)
            if options.resume:
                with options.resume.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if row["verdict"] != "agrees":
                tqdm.write(f"{name}: {row['verdict']} {row.get('why', '')[:2000]}")
            bar.update()

        list(pool.map(one, left))
    rows = [found[n] for n in names]
    report.numbers["networks"] = rows
    agree = [r for r in rows if r["verdict"] == "agrees"]
    report.section(
        f"{len(agree)} of {len(rows)} networks agree",
        table(
            ["network", *COLUMNS], [[r["name"], *(f(r) for f in COLUMNS.values())] for r in rows]
        ),
        "The largest relative error of outputs, gradients, and of outputs and buffers in training.",
    )
    report.target(
        "networks that do not agree", len(rows) - len(agree), len(rows) * (1 - FEWEST / 140), ""
    )
    if timed := [r["beside torch"] for r in agree if "beside torch" in r]:
        mean = math.exp(statistics.fmean(map(math.log, timed)))
        report.target("a forward beside torch's, geometric mean", mean, SLOWEST, "x")


def _error(key: str) -> Callable[[Mapping[str, Any]], str]:
    def text(row: Mapping[str, Any]) -> str:
        if key not in row:
            return ""
        nudged = row.get("torch, nudged") if row[key] > GRADIENT else None
        return f"{row[key]:.0e}" + (f" (torch, nudged: {nudged:.0e})" if nudged else "")

    return text


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "": lambda row: row["verdict"],
    "parameters": lambda row: f"{row['parameters']:,}" if "parameters" in row else "",
    "forward": _error("forward"),
    "gradients": _error("gradients"),
    "training": lambda row: "refused" if "training refused" in row else _error("training")(row),
}


def _in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Examines one network in a process of its own, which comes from one that has imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        process = PROCESSES.Process(target=_child, args=(name, options.timing, folder))
        process.start()
        process.join(options.limit)
        if process.is_alive():
            process.kill()
            process.join()
            return {"name": name, "verdict": f"not done in {options.limit:g} s"}
        row, printed = Path(folder, "row"), Path(folder, "printed")
        if not row.exists():
            said = printed.read_text()[-3000:] if printed.exists() else ""
            return {"name": name, "verdict": "failed", "why": said}
        return json.loads(row.read_text())


def _child(name: str, timing: bool, folder: str) -> None:
    printed = os.open(Path(folder, "printed"), os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    row = examine(name, timing)
    Path(folder, "row").write_text(json.dumps(row))


def examine(name: str, timing: bool) -> dict[str, Any]:
    """Return what came out of one network, as a row of the table."""
    jax.config.update("jax_disable_most_optimizations", not timing)
    nn.manual_seed(0)
    torch.manual_seed(0)
    network = NETWORKS[name]
    theirs = _unsettled(network.make().eval())
    given = {batch: network.inputs(batch) for batch in (2, 3)}
    row: dict[str, Any] = {"name": name, "verdict": "agrees"}
    row["parameters"] = sum(p.numel() for p in theirs.parameters())
    start = time.perf_counter()
    try:
        model = nn.bridge.torch.from_torch(theirs, *given[2][0], kwargs=given[2][1])
    except nn.bridge.torch.ConversionError as error:
        return {**row, "verdict": "refused", "why": str(error)}
    row["conversion"] = round(time.perf_counter() - start, 1)
    if timing:
        row["beside torch"] = _timing(theirs, model, given[2])
    # The third is fixed by the place in the whole list, whatever `--match` picks.
    if list(NETWORKS).index(name) % 3 == 0:
        row |= _gradients(theirs, model, given[3])
    else:
        row["forward"] = _difference(_ours(model, given[3]), _theirs(theirs, given[3]))
    if "gradients" not in row and any(
        getattr(m, "running_mean", None) is not None for m in theirs.modules()
    ):
        row |= _training(theirs.train(), given[2])
    noise = 2 * row.get("torch, nudged", 0.0)
    limits = {"gradients": max(GRADIENT, noise), "training": max(GRADIENT, noise)}
    wrong = [
        key
        for key in ("forward", "gradients", "training")
        if not row.get(key, 0.0) <= limits.get(key, FORWARD)
    ]
    return row | {"verdict": f"differs: {', '.join(wrong)}"} if wrong else row


def _unsettled(module: torch.nn.Module) -> torch.nn.Module:
    # Zeros and ones hide what is not used, or used twice. What is drawn in training cannot be compared.
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
                tensor.add_(0.1 * torch.randn_like(tensor))
        for part in module.modules():
            if getattr(part, "running_mean", None) is not None:
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
            for key, value in vars(part).items():
                if isinstance(value, float) and (
                    "drop" in key or isinstance(part, torch.nn.Dropout)
                ):
                    setattr(part, key, 0.0)
    return module


def _split(inputs: Inputs) -> tuple[Any, Callable[[Any], tuple[tuple, dict]]]:
    """The tensors among the inputs as arrays, and what puts them back among the others."""
    args, kwargs = inputs
    both = {**dict(enumerate(args)), **kwargs}
    arrays = {
        str(k): jnp.asarray(v.numpy()) for k, v in both.items() if isinstance(v, torch.Tensor)
    }

    def joined(arrays: Any) -> tuple[tuple, dict]:
        full = {k: arrays.get(str(k), v) for k, v in both.items()}
        return tuple(full[i] for i in range(len(args))), {k: full[k] for k in kwargs}

    return arrays, joined


def _forward(inputs: Inputs) -> tuple[Any, Callable]:
    arrays, joined = _split(inputs)

    def forward(model: nn.Module, arrays: Any) -> Any:
        args, kwargs = joined(arrays)
        return model(*args, **kwargs)

    return arrays, forward


def _ours(model: nn.Module, inputs: Inputs) -> dict[str, np.ndarray]:
    arrays, forward = _forward(inputs)
    return _flat(nn.jit(forward)(model, arrays))


def _theirs(module: torch.nn.Module, inputs: Inputs) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {k: v.numpy() for k, v in _flat(_called(module, inputs)).items()}


def _called(module: torch.nn.Module, inputs: Inputs) -> Any:
    return module(*inputs[0], **inputs[1])


def _flat(out: Any, path: str = "") -> dict[str, Any]:
    """The arrays or tensors in an output, by where they are."""
    if out is None or isinstance(out, bool | int | float | str):
        return {}
    if isinstance(out, Mapping):
        parts = [(str(k), v) for k, v in out.items()]
    elif isinstance(out, tuple | list):
        parts = [(str(i), v) for i, v in enumerate(out)]
    else:
        return {path: out}
    return {k: v for name, part in parts for k, v in _flat(part, f"{path}/{name}").items()}


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest relative error of all arrays; infinite where names, shapes or integers differ."""
    if set(ours) != set(theirs):
        return math.inf
    worst = 0.0
    for key, a in ours.items():
        b = np.asarray(theirs[key])
        a = np.asarray(a)
        if a.shape != b.shape:
            return math.inf
        if a.size == 0:
            continue
        if not np.issubdtype(b.dtype, np.inexact):
            worst = max(worst, 0.0 if np.array_equal(a, b) else math.inf)
            continue
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return math.inf
        finite = np.isfinite(b)
        if finite.any():
            a, b = a[finite], b[finite]
            worst = max(worst, float(np.abs(a - b).max() / (np.abs(b).max() + 1e-30)))
    return worst


def _floating(out: Mapping[str, Any], of: Any) -> list[tuple[Any, np.ndarray]]:
    """The outputs that a gradient can go through, each with the same weights on both sides."""
    pairs = []
    for i, key in enumerate(sorted(out)):
        value = out[key]
        if np.issubdtype(np.dtype(str(value.dtype).removeprefix("torch.")), np.floating):
            weights = np.random.default_rng(i).normal(size=value.shape).astype(np.float32)
            pairs.append((value, of(weights)))
    return pairs


def _gradients(theirs: torch.nn.Module, model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """The errors of the outputs and of the gradients of a weighted sum of them, from one program."""
    arrays, forward = _forward(inputs)

    def loss(model: nn.Module, arrays: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = _flat(forward(model, arrays))
        pairs = _floating(out, jnp.asarray)
        return sum((jnp.where(jnp.isfinite(v), v, 0.0) * w).mean() for v, w in pairs), out

    ours, out = nn.jit(nn.grad(loss, has_aux=True))(model, arrays)
    wanted_out, wanted = _gradients_of_torch(theirs, inputs)
    row = {"forward": _difference(out, wanted_out), "gradients": _relative(ours, wanted)}
    if row["gradients"] > GRADIENT:
        # Rounding turns a unit of relu on or off, in torch as here: what does it cost torch itself?
        nudged = [_gradients_of_torch(_nudged(theirs), inputs)[1] for _ in range(NUDGES)]
        row["torch, nudged"] = max(_relative(grads, wanted) for grads in nudged)
    return row


def _gradients_of_torch(
    theirs: torch.nn.Module, inputs: Inputs
) -> tuple[dict, dict[str, np.ndarray]]:
    theirs.zero_grad()
    out = _flat(_called(theirs, inputs))
    pairs = _floating(out, torch.from_numpy)
    sum((torch.where(v.isfinite(), v, 0.0) * w).mean() for v, w in pairs).backward()
    grads = {k: p.grad.numpy().copy() for k, p in theirs.named_parameters() if p.grad is not None}
    return {k: v.detach().numpy() for k, v in out.items()}, grads


def _nudged(module: torch.nn.Module) -> torch.nn.Module:
    """Change all parameters in the last bits: by 1e-7 of their values."""
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.is_floating_point():
                tensor.mul_(1 + 1e-7 * torch.randn_like(tensor))
    return module


def _relative(ours: Mapping[str, Any], wanted: Mapping[str, np.ndarray]) -> float:
    """The largest relative error of all gradients."""
    largest = max(float(np.abs(g).max()) for g in wanted.values())
    # Where the exact gradient is zero, such as of a bias before a normalization, both have noise alone.
    return max(
        float(np.abs(np.asarray(ours[k]) - g).max() / max(float(np.abs(g).max()), 1e-3 * largest))
        for k, g in wanted.items()
        if g.size
    )


def _training(theirs: torch.nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The error of outputs and buffers after one forward in training."""
    try:
        model = nn.bridge.torch.from_torch(theirs, *inputs[0], kwargs=inputs[1])
    except nn.bridge.torch.ConversionError as error:
        return {"training refused": str(error)}
    before = copy.deepcopy(theirs.state_dict())
    ours = _ours(model, inputs), {k: np.asarray(v) for k, v in model.named_buffers()}
    wanted = _training_of_torch(theirs, inputs)
    row = {"training": _of_both(ours, wanted)}
    if row["training"] > GRADIENT:
        # Statistics of a batch of two, at one point of an image, blow rounding up: in torch as well?
        nudged = []
        for _ in range(NUDGES):
            theirs.load_state_dict(before)
            nudged.append(_training_of_torch(_nudged(theirs), inputs))
        row["torch, nudged"] = max(_of_both(one, wanted) for one in nudged)
    return row


def _training_of_torch(theirs: torch.nn.Module, inputs: Inputs) -> tuple[dict, dict]:
    out = _theirs(theirs, inputs)
    return out, {k: v.numpy().copy() for k, v in theirs.named_buffers() if v.is_floating_point()}


def _of_both(ours: tuple[Mapping, Mapping], wanted: tuple[Mapping, Mapping]) -> float:
    held = {k: v for k, v in ours[1].items() if k in wanted[1]}
    return max(_difference(ours[0], wanted[0]), _difference(held, wanted[1]))


def _timing(theirs: torch.nn.Module, model: nn.Module, inputs: Inputs) -> float:
    arrays, forward = _forward(inputs)
    compiled = nn.jit(forward)

    def eager() -> Any:
        with torch.inference_mode():
            return list(_flat(_called(theirs, inputs)).values())

    cases = [Case("torch", eager), Case("ours", lambda: compiled(model, arrays))]
    timings = measure(cases, seconds=4, description="", fewest=5)
    return round(timings[1].ratio_done, 3)


if __name__ == "__main__":
    sys.exit(main())
