"""What depth and many devices cost: nn.LayerStack beside the same blocks in a list, memory, a step on a mesh.

    python benchmarks/scale.py --json results.json --markdown results.md
    python benchmarks/scale.py --quick
    python benchmarks/scale.py --only memory sharded

The model is a small GPT; a step is loss, gradient and Adam. The first call is that of a model which no
call has seen, so it is traced and compiled; what JAX remembers of single functions is warm for all. Each
round measures every case once, and the ratios are medians over the rounds. `JAX_PLATFORMS=cpu` forces the
CPU. Memory is what XLA reports of the compiled step, which is not run. The step on a mesh runs in a process
of its own, on eight virtual devices of the CPU, beside the same step by hand with `jax.jit`.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from _harness import Case, measure, progress, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402

WIDTH, HEADS, LENGTH, BATCH, TOKENS = 64, 4, 32, 4, 256
_number = itertools.count().__next__


class Block(nn.Module):
    """A block of a GPT, with its norms in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: jax.Array) -> jax.Array:
        n, t, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, HEADS, -1).transpose(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(y.transpose(0, 2, 1, 3).reshape(n, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model over bytes; its blocks are a list or a stack."""

    def __init__(self, layers: int, stacked: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        blocks = [Block() for _ in range(layers)]
        self.blocks = nn.LayerStack(blocks) if stacked else nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.number = _number()  # no two are alike, so each is traced and compiled

    def forward(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.blocks(self.embedding(tokens)))


def _step(model: nn.Module, opt: nn.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_fn(model: nn.Module) -> jax.Array:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.reshape(-1, TOKENS), tokens[:, 1:].reshape(-1))

    loss, grads = nn.value_and_grad(loss_fn)(model)
    opt.step(grads)
    return loss


def _tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, TOKENS, (BATCH, LENGTH + 1)))


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(call())
    return time.perf_counter() - start, out


def _first(layers: int, stacked: bool) -> tuple[dict[str, float], Callable[[], Any]]:
    """Build a model; return the seconds of its parts, and a step of it."""
    nn.manual_seed(0)
    built, model = _seconds(lambda: GPT(layers, stacked))
    opt = nn.Optimizer(model, optax.adam(1e-3))
    tokens, step = _tokens(), nn.jit(_step)
    traced, _ = _seconds(lambda: (step.lower(model, opt, tokens), None)[1])
    model.number = _number()
    first, _ = _seconds(lambda: step(model, opt, tokens))
    return {"built": built, "traced": traced, "first": first}, lambda: step(model, opt, tokens)


def part_layer_stack(report: Report, quick: bool) -> None:
    """The first call and a step, of a stack and of a list."""
    few, many, rounds = (2, 8, 2) if quick else (4, 96, 3)
    cases = [(few, True), (many, True), (few, False), (many, False)]
    for stacked in (True, False):  # what JAX remembers of single functions
        _first(few, stacked)
    seen: dict[tuple[int, bool], list[dict[str, float]]] = {case: [] for case in cases}
    steps: dict[tuple[int, bool], Callable[[], Any]] = {}
    for _ in progress(range(rounds), "first calls"):
        for case in cases:
            parts, steps[case] = _first(*case)
            seen[case].append(parts)
    timings = measure(
        [
            Case("nn.Sequential", steps[many, False], steps[many, False]),
            Case("nn.LayerStack", steps[many, True], steps[many, True]),
        ],
        seconds=2.0 if quick else 20.0,
        description=f"steps of {many} layers",
    )
    losses = [float(steps[many, stacked]()) for stacked in (True, False)]
    assert np.isfinite(losses).all(), losses

    def median(case: tuple[int, bool], part: str) -> float:
        return statistics.median(row[part] for row in seen[case])

    def ratio(a: tuple[int, bool], b: tuple[int, bool], part: str) -> float:
        pairs = zip(seen[a], seen[b], strict=True)
        return statistics.median(x[part] / y[part] for x, y in pairs)

    names = {True: "nn.LayerStack", False: "nn.Sequential"}
    rows = [
        [f"{names[stacked]}, {layers} layers"]
        + [f"{median((layers, stacked), part):.2f}" for part in ("built", "traced", "first")]
        for layers, stacked in cases
    ]
    report.section(
        "The first call of a train step",
        table(["", "built", "traced and lowered", "first call"], rows),
        "Seconds; the first call traces, compiles and runs.",
    )
    report.section(
        f"A step of {many} layers",
        table(
            ["", "ms"], [[t.label, f"{t.done / 1e3:.1f} ({t.ratio_done:.2f}x)"] for t in timings]
        ),
        "Milliseconds until the result was there.",
    )
    report.numbers["layer_stack"] = {
        "first": {f"{names[s]}, {n}": rows for (n, s), rows in seen.items()},
        "steps": [t.row() for t in timings],
    }
    if quick:
        return
    stack = (many, True)
    report.target(
        f"first call, {many} layers beside {few}", ratio(stack, (few, True), "first"), 1.5, "x"
    )
    report.target("first call, stack beside list", ratio(stack, (many, False), "first"), 0.3, "x")
    report.target(
        f"trace, {many} layers beside {few}", ratio(stack, (few, True), "traced"), 1.3, "x"
    )
    report.target("step, stack beside list", timings[1].ratio_done, 1.05, "x")


def _bytes(layers: int, remat: Any, donate: tuple[int, ...]) -> int:
    """Compile a step of a model without numbers; return what it holds at once."""
    with nn.device("meta"):
        model = GPT(1, True)
        model.blocks = nn.LayerStack(Block, layers, remat=remat)
        opt = nn.Optimizer(model, optax.adam(1e-3))
    tokens = jax.ShapeDtypeStruct((4 * BATCH, 4 * LENGTH + 1), jnp.int32)
    program = nn.jit(_step, donate=donate).lower(model, opt, tokens).compile()
    held = program.memory_analysis()
    if held is None:
        raise SystemExit("this device does not tell how much memory a program takes")
    inputs_and_outputs = held.argument_size_in_bytes + held.output_size_in_bytes
    return inputs_and_outputs - held.alias_size_in_bytes + held.temp_size_in_bytes


def part_memory(report: Report, quick: bool) -> None:
    """What a step holds at once, by what is kept for the backward pass, and by donation."""
    layers = 4 if quick else 24
    policies = jax.checkpoint_policies
    kept = {
        "everything": False,
        "products": policies.dots_saveable,
        "products with weights": policies.dots_with_no_batch_dims_saveable,
        "the input of each layer": True,
    }
    found = {
        name: [_bytes(layers, remat, donate) for donate in ((), (0, 1))]
        for name, remat in kept.items()
    }
    first = found["everything"]
    rows = [
        [name, *(f"{n / 1e6:.1f} ({n / of:.2f}x)" for n, of in zip(pair, first, strict=True))]
        for name, pair in found.items()
    ]
    report.section(
        f"Memory of a train step of {layers} layers",
        table(["kept", "MB", "MB, model and slots donated"], rows),
        f"{4 * BATCH} sequences of {4 * LENGTH} tokens; arguments, results and what lies between.",
    )
    report.numbers["memory"] = found
    if not quick:
        share = found["the input of each layer"][1] / first[1]
        report.target("memory, remat beside none, donated", share, 0.35, "x")


def part_sharded(report: Report, quick: bool) -> None:
    """A step on 2 x 4 devices beside the same step by hand."""
    command = [sys.executable, str(HERE / "_sharded.py"), *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(*found["losses"], rtol=1e-5)
    rows = [
        [t["label"], f"{t['done_us'] / 1e3:.1f} ({t['ratio_done']:.2f}x)"] for t in found["steps"]
    ]
    report.section(
        "A step on 2 x 4 virtual devices",
        table(["", "ms"], rows),
        "Milliseconds until the result was there. By hand: a dict of the same arrays in the same places, "
        "jax.lax.scan, optax.",
    )
    ours, theirs = found["collectives"]["nn.jit"], found["collectives"]["jax.jit"]
    report.section(
        "What it exchanges",
        table(
            ["numbers", "jax.jit", "nn.jit"],
            [
                [kind, *(f"{c.get(kind, 0):,}" for c in (theirs, ours))]
                for kind in sorted({*ours, *theirs})
            ],
        ),
    )
    report.numbers["sharded"] = found
    if not quick:
        report.target("step on a mesh", found["steps"][1]["ratio_done"], 1.05, "x")
        share = sum(ours.values()) / sum(theirs.values())
        report.target("numbers exchanged on a mesh", share, 1.001, "x")
        report.target("compilations of a step on a mesh", found["compilations"], 1, "")


PARTS = {"layer_stack": part_layer_stack, "memory": part_memory, "sharded": part_sharded}


def main() -> int:
    """Runs the parts that the options ask for."""
    options = arguments(__doc__ or "", list(PARTS)).parse_args()
    return run(
        PARTS, options, title="What depth costs", mark="scale", packages=("jax", "optax", "tqdm")
    )


if __name__ == "__main__":
    sys.exit(main())
