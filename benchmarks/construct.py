"""What building a model costs: a 12-block transformer and a CNN of ResNet-50's size, in fresh processes.

    python benchmarks/construct.py                       # 7 rounds, about 3 minutes
    python benchmarks/construct.py --rounds 3 --json out.json

*Cold* is the first model of a process, after the import and after the device has been started; *warm* the
next one. Each round starts one process for each library, in a shuffled order; reported are medians, and
the ratios of medians. The models have the same number of parameters in every library, which is checked.
Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

WIDTH, HEADS, BLOCKS = 256, 8, 12
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # bottleneck width and blocks of ResNet-50
LIBRARIES = ("statefulnn", "torch", "flax.nnx", "equinox")
TARGETS = {("torch", 5.0), ("flax.nnx", 0.2)}


# --------------------------------------------------------------------------------------------------
# The models. A library gives its layers under these names; a model is a list of layers.


def transformer(layers: Any) -> list[Any]:
    """Build 12 blocks of attention and MLP."""
    built = []
    for _ in range(BLOCKS):
        built += [
            layers.norm(WIDTH),
            layers.attention(WIDTH, HEADS),
            layers.norm(WIDTH),
            layers.linear(WIDTH, 4 * WIDTH),
            layers.linear(4 * WIDTH, WIDTH),
        ]
    return built


def cnn(layers: Any) -> list[Any]:
    """Build the convolutions, norms and the head of ResNet-50."""
    built = [layers.conv(3, 64, 7), layers.batch_norm(64)]
    channels = 64
    for width, blocks in STAGES:
        for block in range(blocks):
            for a, b, k in ((channels, width, 1), (width, width, 3), (width, 4 * width, 1)):
                built += [layers.conv(a, b, k), layers.batch_norm(b)]
            if block == 0:
                built += [layers.conv(channels, 4 * width, 1), layers.batch_norm(4 * width)]
            channels = 4 * width
    return [*built, layers.linear(channels, 1000)]


MODELS: dict[str, Callable[[Any], list[Any]]] = {"transformer": transformer, "cnn": cnn}


class TorchLike:
    """The layers of torch.nn or statefulnn."""

    def __init__(self, nn: Any) -> None:
        self.nn = nn
        self.linear = nn.Linear
        self.norm = nn.LayerNorm
        self.batch_norm = nn.BatchNorm2d
        self.attention = nn.MultiheadAttention

    def conv(self, a: int, b: int, k: int) -> Any:
        return self.nn.Conv2d(a, b, k, bias=False)

    def count(self, model: list[Any]) -> int:
        return sum(
            p.numel() if hasattr(p, "numel") else p.size for m in model for p in m.parameters()
        )


class Nnx:
    """The layers of flax.nnx."""

    def __init__(self) -> None:
        from flax import nnx

        self.nnx, self.rngs = nnx, nnx.Rngs(0)

    def linear(self, a: int, b: int) -> Any:
        return self.nnx.Linear(a, b, rngs=self.rngs)

    def norm(self, n: int) -> Any:
        return self.nnx.LayerNorm(n, rngs=self.rngs)

    def batch_norm(self, n: int) -> Any:
        return self.nnx.BatchNorm(n, rngs=self.rngs)

    def attention(self, n: int, heads: int) -> Any:
        return self.nnx.MultiHeadAttention(heads, n, decode=False, rngs=self.rngs)

    def conv(self, a: int, b: int, k: int) -> Any:
        return self.nnx.Conv(a, b, (k, k), use_bias=False, rngs=self.rngs)

    def count(self, model: list[Any]) -> int:
        import jax

        return sum(
            x.size for m in model for x in jax.tree.leaves(self.nnx.state(m, self.nnx.Param))
        )


class Equinox:
    """The layers of equinox."""

    def __init__(self) -> None:
        import equinox
        import jax

        self.eqx, self.jax, self.key = equinox, jax, jax.random.key(0)

    def next(self) -> Any:
        self.key, key = self.jax.random.split(self.key)
        return key

    def linear(self, a: int, b: int) -> Any:
        return self.eqx.nn.Linear(a, b, key=self.next())

    def norm(self, n: int) -> Any:
        return self.eqx.nn.LayerNorm(n)

    def batch_norm(self, n: int) -> Any:
        return self.eqx.nn.BatchNorm(n, axis_name="batch", mode="batch")

    def attention(self, n: int, heads: int) -> Any:
        return self.eqx.nn.MultiheadAttention(
            heads,
            n,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=self.next(),
        )

    def conv(self, a: int, b: int, k: int) -> Any:
        return self.eqx.nn.Conv2d(a, b, k, use_bias=False, key=self.next())

    def count(self, model: list[Any]) -> int:
        arrays = self.eqx.filter(model, self.eqx.is_inexact_array)
        return sum(x.size for x in self.jax.tree.leaves(arrays))


def layers_of(library: str) -> Any:
    """Import a library and start its device."""
    if library == "torch":
        import torch

        torch.zeros(1)
        return TorchLike(torch.nn)
    import jax
    import numpy as np

    jax.device_put(np.zeros(1)).block_until_ready()
    if library == "statefulnn":
        import statefulnn

        return TorchLike(statefulnn)
    return Nnx() if library == "flax.nnx" else Equinox()


def child(library: str, model: str) -> None:
    """Print the seconds of the first and the second construction, and the number of parameters."""
    layers = layers_of(library)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        built = MODELS[model](layers)
        if library != "torch":
            import jax

            jax.block_until_ready(
                [jax.tree.leaves(m) for m in built] if library != "flax.nnx" else []
            )
        seconds.append(time.perf_counter() - start)
    print(json.dumps([*seconds, layers.count(built)]))


# --------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    from _harness import progress

    jobs = [(model, library) for model in MODELS for library in LIBRARIES]
    found: dict[tuple[str, str], list[list[float]]] = {job: [] for job in jobs}
    order = [job for _ in range(args.rounds) for job in random.sample(jobs, len(jobs))]
    for model, library in progress(order, "constructing"):
        done = subprocess.run(
            [sys.executable, __file__, "--child", library, model], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{library}, {model}:\n{done.stderr}")
        found[model, library].append(json.loads(done.stdout.splitlines()[-1]))
    results = []
    for model in MODELS:
        sizes = {library: found[model, library][0][2] for library in LIBRARIES}
        base = sizes["torch"]
        # nnx and equinox keep BatchNorm and attention a little differently.
        assert all(abs(size / base - 1) < 0.01 for size in sizes.values()), sizes
        print(f"\n{model}, {base / 1e6:.1f} M parameters\n")
        print("| | cold, ms | warm, ms | statefulnn, cold, beside it |\n| --- | --- | --- | --- |")
        medians = {
            library: [1e3 * statistics.median(r[i] for r in found[model, library]) for i in (0, 1)]
            for library in LIBRARIES
        }
        for library, (cold, warm) in medians.items():
            ratio = medians["statefulnn"][0] / cold
            print(f"| {library} | {cold:.0f} | {warm:.0f} | {ratio:.2f}x |")
            results.append({"model": model, "library": library, "cold_ms": cold, "warm_ms": warm})
        for library, limit in sorted(TARGETS):
            ratio = medians["statefulnn"][0] / medians[library][0]
            kept = "kept" if ratio <= limit else "MISSED"
            print(f"at most {limit:g}x of {library}: {ratio:.2f}x, {kept}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
