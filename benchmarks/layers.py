"""What a layer costs at common sizes: statefulnn beside torch, flax.nnx and equinox, in one run.

    python benchmarks/layers.py --json results.json --markdown results.md
    python benchmarks/layers.py --quick
    python benchmarks/layers.py --only forward --layers Conv LSTM --no-compile

The parts: every layer forward; with its gradient; eager functions at a small size; how long an LSTM
takes to compile. Everybody has the same number of threads, and a call ends when its results are
there. What is not installed is left out, with a line that says so, and so is torch.compile where it
does not work (it needs a C++ compiler). README.md beside this file says how to read the numbers.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _harness import Case, Timing, measure, progress, table  # noqa: E402
from _layers import LAYERS, LIBRARIES, Layer, output_shape, threads, torch_device  # noqa: E402
from _report import Report, arguments, run, uninstalled  # noqa: E402

DEPTHWISE = "Conv2d 3x3, depthwise"
TITLES = {"forward": "Forward", "backward": "Forward and gradient"}
# The geometric mean of statefulnn's time over torch's that is aimed at.
TORCH_MEAN = {"forward": 1.2, "backward": 1.0}
# libgomp's threads spin for up to some milliseconds after torch's last parallel loop.
PAUSE = 0.01


def available(report: Report, no_compile: bool) -> list[str]:
    """The libraries that can take part, ours first."""
    missing = uninstalled(["torch", "flax.nnx", "equinox"])
    if "torch" not in missing and torch_device() is None:
        missing["torch"] = "JAX has an accelerator that torch has not"
        report.leave_out(f"torch is left out: {missing['torch']}")
    if "torch" in missing:
        missing["torch.compile"] = missing["torch"]
    elif no_compile:
        missing["torch.compile"] = "--no-compile"
        report.leave_out("torch.compile is left out: --no-compile")
    else:
        relu = next(layer for layer in LAYERS if layer.name == "ReLU").shrunk(1)
        try:
            cases_of(relu, "forward", ["torch.compile"])
        # Whatever is wrong with the compiler of this machine, the other columns can be measured.
        except Exception as error:
            missing["torch.compile"] = f"{type(error).__name__}: {error}".splitlines()[0]
            report.leave_out(f"torch.compile is left out: {missing['torch.compile']}")
    return [name for name in LIBRARIES if name not in missing]


def cases_of(layer: Layer, kind: str, libraries: Sequence[str]) -> list[Case]:
    """The warm cases of one layer, after checking that the outputs have one shape up to the layout."""
    cases = []
    expected = None
    for name in libraries:
        call = LIBRARIES[name](layer, kind)
        if call is None:
            continue
        shape = output_shape(call())
        expected = shape if expected is None else expected
        if shape != expected:
            raise AssertionError(f"{layer.name}: {name} returns {shape}, statefulnn {expected}")
        cases.append(Case(name, call))
    return cases


def _layer_row(layer: Layer, timings: dict[str, Timing], libraries: Sequence[str]) -> list[str]:
    cells = [layer.name, layer.size]
    for name in libraries:
        t = timings.get(name)
        if t is None:
            cells.append("-")
        elif name == "statefulnn":
            cells.append(f"{t.done / 1e3:.2f}")
        else:
            cells.append(f"{t.done / 1e3:.2f} ({1 / t.ratio_done:.2f}x)")
    return cells


def part_layers(
    report: Report, quick: bool, *, kind: str, chosen: list[Layer], no_compile: bool
) -> None:
    """Every layer, forward or with its gradient."""
    libraries = available(report, no_compile)
    rows = []
    ratios: dict[str, dict[str, float]] = {name: {} for name in libraries[1:]}
    numbers: dict[str, Any] = {}
    for layer in progress(chosen, TITLES[kind]):
        sized = layer.shrunk(2) if quick else layer
        timings = {
            t.label: t
            for t in measure(
                cases_of(sized, kind, libraries),
                seconds=0.05 if quick else 2.0,
                description=layer.name,
                fewest=2 if quick else 7,
                most=2 if quick else 60,
                pause=PAUSE,
            )
        }
        rows.append(_layer_row(layer, timings, libraries))
        numbers[layer.name] = [t.row() for t in timings.values()]
        for name in libraries[1:]:
            if name in timings:
                ratios[name][layer.name] = 1 / timings[name].ratio_done
    report.numbers[kind] = numbers
    means = {name: statistics.geometric_mean(r.values()) for name, r in ratios.items() if r}
    mean = ["**geometric mean**", "", ""]
    rows.append(mean + [f"{means[n]:.2f}x" if n in means else "-" for n in libraries[1:]])
    report.section(
        TITLES[kind],
        table(["", "size", *libraries], rows),
        "Milliseconds a call (statefulnn's time over that one: below 1x, statefulnn is faster); "
        f"{threads()} threads{'; a quick run, with a first axis of 2' if quick else ''}.",
    )
    _layer_targets(report, kind, ratios, means)


def _layer_targets(
    report: Report, kind: str, ratios: dict[str, dict[str, float]], means: dict[str, float]
) -> None:
    title = TITLES[kind].lower()
    worst = {name: max(r.items(), key=lambda item: item[1]) for name, r in ratios.items() if r}
    if "torch" in worst:
        report.target(f"{title}: mean beside torch", means["torch"], TORCH_MEAN[kind], "x")
        name, ratio = worst["torch"]
        report.target(f"{title}: slowest beside torch ({name})", ratio, 2.5, "x")
    for library in ("flax.nnx", "equinox"):
        if library not in worst:
            continue
        name, ratio = worst[library]
        report.target(f"{title}: slowest beside {library} ({name})", ratio, 1.05, "x")
        # On a GPU everybody calls cuDNN.
        if DEPTHWISE in ratios[library] and jax.default_backend() == "cpu":
            what = f"{title}: depthwise convolution beside {library}"
            report.target(what, ratios[library][DEPTHWISE], 0.05, "x")


# -------------------------------------------------------------------------------------------- eager


def _eager_functions() -> dict[str, tuple[Callable[..., Any], str, list[np.ndarray]]]:
    """Function name -> ours, torch's name, and the arguments: small, so that the call is what costs."""
    import statefulnn.functional as F

    draw = lambda *shape: np.random.default_rng(0).standard_normal(shape, np.float32)
    return {
        "linear": (F.linear, "linear", [draw(32, 64), draw(64, 64), draw(64)]),
        "layer_norm": (
            lambda x, weight, bias: F.layer_norm(x, (64,), weight, bias),
            "layer_norm",
            [draw(32, 64), draw(64), draw(64)],
        ),
        "conv2d": (F.conv2d, "conv2d", [draw(1, 8, 8, 8), draw(8, 8, 3, 3), draw(8)]),
    }


def _torch_eager(name: str, arguments: list[np.ndarray]) -> Callable[[], Any]:
    import torch

    # Too small to share out, and waiting threads would meet other programs.
    torch.set_num_threads(1)
    device = torch_device()
    tensors = [torch.from_numpy(a).to(device) for a in arguments]
    function: Any = getattr(torch.nn.functional, name)
    if name == "layer_norm":
        function = lambda x, weight, bias: torch.nn.functional.layer_norm(x, (64,), weight, bias)

    def call() -> Any:
        with torch.no_grad():
            return function(*tensors)

    return call


def part_eager(report: Report, quick: bool) -> None:
    """Eager functions beside the same kernel compiled, which has no checks before it, and torch."""
    without_torch = "torch" in uninstalled(["torch"]) or torch_device() is None
    rows = []
    for name, (function, torch_name, values) in _eager_functions().items():
        arrays = [jnp.asarray(a) for a in values]
        kernel = jax.jit(function)
        cases = [
            Case("jax.jit of it", lambda kernel=kernel, arrays=arrays: kernel(*arrays)),
            Case("eager", lambda function=function, arrays=arrays: function(*arrays)),
        ]
        if not without_torch:
            cases.append(Case("torch", _torch_eager(torch_name, values)))
        timings = measure(cases, seconds=0.3 if quick else 3, description=f"eager F.{name}")
        report.numbers[f"eager_{name}"] = [t.row() for t in timings]
        cells = [f"{t.done:.1f} ({t.ratio_done:.2f}x)" for t in timings]
        rows.append([f"F.{name}", *cells, *["-"] * (3 - len(cells))])
        what = f"eager F.{name} beside the bare kernel"
        report.target(what, timings[1].ratio_done, 2, "x")
    report.section(
        "Eager functions",
        table(["", "bare jitted kernel", "eager", "torch"], rows),
        "Microseconds a call (ratio to the kernel); (32, 64) features, an image of (1, 8, 8, 8); "
        "torch on one thread.",
    )


# ------------------------------------------------------------------------------------------ compile


def _compile_seconds(library: str, layer: Layer, kind: str) -> float:
    """The first call from cold caches less a later one: tracing, lowering and XLA's compiler."""
    call = LIBRARIES[library](layer, kind)
    assert call is not None
    # Making the call may have run the forward, for the shape of the output.
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    later = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        later.append(time.perf_counter() - start)
    return first - min(later)


def part_compile(report: Report, quick: bool) -> None:
    """How long an LSTM takes to compile, by the length of the sequence."""
    lengths = (4, 8) if quick else (32, 128, 512)
    libraries = ["statefulnn"]
    missing = uninstalled(["flax.nnx", "equinox"])
    libraries += [name for name in ("flax.nnx", "equinox") if name not in missing]
    lstm = next(layer for layer in LAYERS if layer.name == "LSTM")
    jobs = [(kind, name, length) for kind in TITLES for name in libraries for length in lengths]
    seconds: dict[tuple[str, str, int], float] = {}
    for _ in range(1 if quick else 3):
        for kind, name, length in progress(jobs, "compiling LSTMs"):
            layer = replace(lstm, floats=(length, 32, 128))
            found = _compile_seconds(name, layer, kind)
            key = (kind, name, length)
            seconds[key] = min(found, seconds.get(key, found))
    rows = []
    for kind in TITLES:
        for name in libraries:
            values = [seconds[kind, name, length] for length in lengths]
            growth = values[-1] / values[0]
            cells = [f"{1e3 * value:.0f}" for value in values]
            rows.append([f"{name}, {TITLES[kind].lower()}", *cells, f"{growth:.2f}x"])
            if name == "statefulnn":
                what = f"LSTM, {TITLES[kind].lower()}: compile time at {lengths[-1]} steps"
                report.target(f"{what} beside {lengths[0]}", growth, 1.2, "x")
                for other in libraries[1:]:
                    ratio = values[-1] / seconds[kind, other, lengths[-1]]
                    report.target(f"{what} beside {other}", ratio, 1.0, "x")
    report.numbers["compile"] = [
        {"kind": kind, "library": name, "length": length, "seconds": round(value, 4)}
        for (kind, name, length), value in seconds.items()
    ]
    report.section(
        "Compile time of an LSTM",
        table(["steps", *map(str, lengths), "last/first"], rows),
        "Milliseconds from cold caches for tracing, lowering and compiling; 32 x 128 to 256; "
        "the least of the rounds.",
    )


PARTS = ("forward", "backward", "eager", "compile")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    parser = arguments(__doc__ or "", PARTS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--layers", nargs="+", help="layers with one of these in their name only")
    options = parser.parse_args(argv)
    chosen = [
        layer for layer in LAYERS if any(part in layer.name for part in options.layers or [""])
    ]
    if not chosen:
        parser.error(f"no layer has {options.layers} in its name: {[x.name for x in LAYERS]}")
    layers = functools.partial(part_layers, chosen=chosen, no_compile=options.no_compile)
    parts = {
        "forward": functools.partial(layers, kind="forward"),
        "backward": functools.partial(layers, kind="backward"),
        "eager": part_eager,
        "compile": part_compile,
    }
    packages = ["statefulnn", "torch", "flax.nnx", "equinox"]
    return run(parts, options, title="Layers", mark="layers", packages=packages)


if __name__ == "__main__":
    sys.exit(main())
