"""The train step of a GPT on paper: what devices exchange, as formulas, and as XLA compiles it for eight.

    python benchmarks/plan.py
    python benchmarks/plan.py --markdown docs/parallel.md
    python benchmarks/plan.py --width 8192 --layers 80 --near 450e9 --far 50e9 --flops 4e14

The first table compiles the step of a small model for eight virtual devices of this CPU and reads the
collectives from the compiled text, layer by layer, beside the formulas. The second one has the formulas
alone, for a model of the given size on up to 1,024 devices. Nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]
if __name__ == "__main__":  # before JAX is first used
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from _harness import table  # noqa: E402

import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402
from statefulnn import parallel  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model and its batch; `itemsize` is that of a number."""

    width: int = 64
    heads: int = 8
    layers: int = 3
    vocabulary: int = 256
    length: int = 32
    batch: int = 16
    itemsize: int = 4

    def parameters(self) -> int:
        w, v = self.width, self.vocabulary
        return self.layers * (12 * w * w + 13 * w) + 2 * v * w + v

    def flops(self) -> float:
        """Return those of matrix products in a step: a gradient costs twice what the output does."""
        w, t = self.width, self.length
        products = 12 * w * w * self.layers + w * self.vocabulary
        return 3 * 2 * self.batch * t * (products + 2 * t * w * self.layers)


class Block(nn.Module):
    """A block of a GPT, with its norms in front."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        w = sizes.width
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(w), nn.LayerNorm(w)
        self.q, self.k, self.v, self.o = (nn.Linear(w, w) for _ in range(4))
        self.up, self.down = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def forward(self, x: jax.Array) -> jax.Array:
        h, heads = self.norm1(x), (*x.shape[:2], self.heads, -1)
        q, k, v = (p(h).reshape(heads).swapaxes(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.swapaxes(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model over tokens."""

    def __init__(self, sizes: Sizes, unroll: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.LayerStack(lambda: Block(sizes), sizes.layers, unroll=unroll)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)

    def forward(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.blocks(self.embedding(tokens)))


def step(model: GPT, opt: nn.Optimizer, tokens: jax.Array) -> jax.Array:
    """Make a step, and return the loss."""

    def loss_fn(model: GPT) -> jax.Array:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    loss, grads = nn.value_and_grad(loss_fn)(model)
    opt.step(grads)
    return loss


COLUMNS, ROWS = parallel.ColwiseParallel(), parallel.RowwiseParallel()
STYLES = {"*.[qkv]": COLUMNS, "*.up": COLUMNS, "*.o": ROWS, "*.down": ROWS}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on `data` times `model` devices; `sharded` splits what is left of arrays over `data`."""

    name: str
    data: int
    model: int
    sharded: bool

    def place(self, model: GPT) -> Any:
        shape, names = (self.data, self.model), ("data", "model")
        mesh = parallel.init_device_mesh("cpu", shape, mesh_dim_names=names)
        parallel.data_parallel(model, mesh)
        if self.model > 1:
            parallel.parallelize_module(model, mesh, STYLES)
        if self.sharded:
            parallel.fully_shard(model, mesh, min_size=1)
        return mesh


ON_EIGHT = [
    Layout("data parallel", 8, 1, False),
    Layout("fully sharded", 8, 1, True),
    Layout("tensor parallel", 1, 8, False),
    Layout("both, 2 x 4", 2, 4, True),
]


# --------------------------------------------------------------------------------------------------
# Formulas. What is counted are the numbers of the result of a collective, on one device.

BLOCK, REST = "each block", "the rest"
Volumes = Counter[tuple[str, str]]  # (kind, BLOCK or REST) -> numbers


class Exchange(NamedTuple):
    """What devices along an axis of the mesh exchange in a step."""

    kind: str
    where: str
    axis: str
    numbers: int


def exchanges(layout: Layout, sizes: Sizes) -> Iterator[Exchange]:
    """Yield what a step exchanges.

    Biases and norms of a block: 7w of layers that are split by their outputs, 2w of those that are split by
    their inputs, 4w of norms. The gradient of a layer needs its weight again, but no bias.
    """
    w, v, m = sizes.width, sizes.vocabulary, layout.model
    matrices, split, whole = 12 * w * w // m, 7 * w // m, 6 * w
    if layout.sharded:
        forward = matrices + whole + (split if m == 1 else 0)  # else they are split already
        yield Exchange("all-gather", BLOCK, "data", forward + matrices + 2 * w)
        yield Exchange("all-gather", REST, "data", 2 * v * w + v)
    if layout.data > 1:
        yield Exchange("all-reduce", BLOCK, "data", matrices + split + whole)  # gradients
        yield Exchange("all-reduce", REST, "data", 2 * v * w + v + 2)  # and the loss: sum, count
    if m > 1:
        # The outputs of o and down; backwards the inputs of up and, one by one, of q, k and v.
        activations = sizes.batch // layout.data * sizes.length * w
        yield Exchange("all-reduce", BLOCK, "model", (2 + 1 + 3) * activations)


def volumes(layout: Layout, sizes: Sizes) -> Volumes:
    """Return the numbers of all exchanges by kind and place."""
    found: Volumes = Counter()
    for kind, where, _, numbers in exchanges(layout, sizes):
        found[kind, where] += numbers
    return found


# --------------------------------------------------------------------------------------------------
# What XLA compiles

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf' = (.*?) ({_KINDS})(?:-start)?\(.*op_name="([^"]*)"')
_WRAPPED = re.compile(r"(?:transpose|jvp|vmap|checkpoint)\((.*)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a compiled program: its kind, how many numbers come out, and for which layer."""

    kind: str
    numbers: int
    layer: str
    in_the_loop: bool


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled program."""
    found = []
    for results, kind, path in _COLLECTIVE.findall(text):
        shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", results)
        numbers = sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
        found.append(Collective(kind, numbers, _layer(path), "while/body" in path))
    return found


def _layer(path: str) -> str:
    """Return the layer that an instruction belongs to; of one combined of several, what is around them."""
    around = path.split("/(")[0].split("/") if "/(" in path else path.split("/")[:-1]
    names = []
    for part in around:
        while (wrapped := _WRAPPED.fullmatch(part)) is not None:
            part = wrapped[1]
        if "(" not in part and part not in ("while", "body", "closed_call", "eval_jaxpr"):
            names.append(part)
    return ".".join(names)


def compiled(layout: Layout, sizes: Sizes, unroll: int = 1) -> Any:
    """Compile a step for eight devices, of a model without numbers."""
    with nn.device("meta"):
        model = GPT(sizes, unroll)
    mesh = layout.place(model)
    opt = nn.Optimizer(model, optax.adam(1e-3))
    spec = jax.sharding.NamedSharding(mesh, jax.P("data"))
    tokens = jax.ShapeDtypeStruct((sizes.batch, sizes.length + 1), jnp.int32, sharding=spec)
    return nn.jit(step).lower(model, opt, tokens).compile()


def counted(found: list[Collective]) -> Volumes:
    """Return what a compiled step exchanges, by the names of the formulas."""
    result: Volumes = Counter()
    for c in found:
        result[c.kind, BLOCK if c.in_the_loop else REST] += c.numbers
    return result


# --------------------------------------------------------------------------------------------------
# Tables


def beside_formulas(sizes: Sizes) -> str:
    """Return what XLA compiles for eight devices beside the formulas, and the same layer by layer."""
    rows: list[list[str]] = []
    by_layer: Counter[tuple[str, str, str]] = Counter()
    for layout in ON_EIGHT:
        program = compiled(layout, sizes)
        found = collectives(program.as_text())
        seen, expected = counted(found), volumes(layout, sizes)
        for kind, where in sorted({*seen, *expected}):
            numbers = (seen[kind, where], expected[kind, where])
            rows.append([layout.name, kind, where, *(f"{n * sizes.itemsize:,}" for n in numbers)])
        for c in found:
            by_layer[c.layer or "several layers", layout.name, c.kind] += c.numbers
        held = program.memory_analysis().argument_size_in_bytes
        flops = compiled(layout, sizes, sizes.layers).cost_analysis()["flops"]
        print(
            f"{layout.name}: {held:,} bytes of arguments, {flops:,.0f} flops a device", flush=True
        )
    header = ["", "collective", "of", "bytes in the HLO", "by formula"]
    layers = [
        [layer, name, kind, f"{n * sizes.itemsize:,}"]
        for (layer, name, kind), n in by_layer.items()
    ]
    print("\n" + table(["layer", "", "collective", "bytes"], layers), flush=True)
    return table(header, rows)


def seconds(layout: Layout, sizes: Sizes, near: float, far: float) -> float:
    """Return how long a step's exchanges take, one after the other, on rings of devices.

    Args:
        layout, sizes: what is exchanged.
        near: bytes a second that a device sends to others of its eight.
        far: the same beyond these.
    """
    total = 0.0
    for kind, where, axis, numbers in exchanges(layout, sizes):
        n = layout.data if axis == "data" else layout.model
        within = layout.model * (n if axis == "data" else 1) <= 8
        # Sharded gradients are needed in parts only, which XLA makes use of on GPU and TPU.
        rounds = 2 if kind == "all-reduce" and not (layout.sharded and axis == "data") else 1
        size = numbers * sizes.itemsize * (sizes.layers if where == BLOCK else 1)
        total += rounds * size * (n - 1) / n / (near if within else far)
    return total


def on_paper(sizes: Sizes, near: float, far: float, flops: float) -> str:
    """Return the formulas on up to 1,024 devices; `sizes.batch` is that of one device."""
    rows = []
    for n in (8, 64, 256, 1024):
        here = dataclasses.replace(sizes, batch=sizes.batch * n)
        compute = here.flops() / n / flops
        for layout in (
            Layout("data parallel", n, 1, False),
            Layout("fully sharded", n, 1, True),
            Layout(f"both, {n // 8} x 8", n // 8, 8, True),
        ):
            parts = n if layout.sharded else 1
            held = 3 * sizes.itemsize * sizes.parameters() / parts
            exchange = seconds(layout, here, near, far)
            rows.append(
                [f"{n:,}", layout.name, f"{held / 1e9:,.1f}"]
                + [f"{compute:.2f}", f"{exchange:.2f}", f"{exchange / compute:.2f}"]
            )
    header = ["devices", "", "GB each", "compute, s", "exchange, s", "exchange / compute"]
    return table(header, rows)


def _write(path: Path, body: str) -> None:
    begin, end = "<!-- plan: begin -->", "<!-- plan: end -->"
    page = path.read_text() if path.exists() else f"{begin}{end}"
    before, after = page.split(begin)[0], page.split(end)[1]
    path.write_text(f"{before}{begin}\n{body}\n{end}{after}")


def main() -> int:
    """Print the tables, and write them to a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    for name, value, text in (
        ("width", 4096, "numbers a position"),
        ("layers", 32, "blocks"),
        ("vocabulary", 50304, "tokens there are"),
        ("length", 4096, "positions of a sequence"),
        ("batch", 1, "sequences on each device"),
        ("itemsize", 4, "bytes of a number"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    for name, value, text in (
        ("near", 400e9, "bytes a second between eight devices"),
        ("far", 50e9, "bytes a second a device beyond these"),
        ("flops", 4e14, "operations a second that a device reaches"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text} ({value:g})")
    options = parser.parse_args()
    small = Sizes()
    names = [f.name for f in dataclasses.fields(Sizes) if f.name != "heads"]
    sizes = Sizes(**{name: getattr(options, name) for name in names})
    of_small = (
        f"{small.layers} blocks of width {small.width}, {small.batch} sequences of {small.length} "
        "tokens, eight devices; bytes of one block, and outside of the blocks."
    )
    of_large = (
        f"{sizes.parameters() / 1e9:.2f} billion parameters of {sizes.itemsize} bytes with Adam's "
        f"slots: {sizes.layers} blocks of width {sizes.width}, {sizes.batch} x {sizes.length} tokens a "
        f"device. A device reaches {options.flops:.0e} operations a second and sends "
        f"{options.near / 1e9:g} GB/s to others of its eight, {options.far / 1e9:g} GB/s beyond."
    )
    parts = [of_small, beside_formulas(small), of_large]
    parts.append(on_paper(sizes, options.near, options.far, options.flops))
    body = "\n\n".join(parts)
    print("\n" + body)
    if options.markdown:
        _write(options.markdown, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
