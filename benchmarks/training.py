"""What trainers import, beside the same by hand, in one run.

    python benchmarks/training.py --json results.json --markdown results.md
    python benchmarks/training.py --quick --only groups ema

Every part compares compiled calls of equal results, until these are there; the ratios are medians over
rounds in which each was measured. `JAX_PLATFORMS=cpu` forces the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from _harness import Case, Timing, measure, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402


def net(layers: int, width: int) -> nn.Sequential:
    """Linear layers with norms between them, the same for each call."""
    nn.manual_seed(0)
    blocks = ((nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(layers))
    return nn.Sequential(*(layer for block in blocks for layer in block))


def loss_fn(model: nn.Module, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def train_step(model: nn.Module, opt: nn.Optimizer, x: jax.Array) -> jax.Array:
    loss, grads = nn.value_and_grad(loss_fn)(model, x)
    opt.step(grads)
    return loss


def compare(
    report: Report, title: str, note: str, cases: dict[str, Callable[[], Any]], quick: bool
) -> list[Timing]:
    """Measure cases, the first of which is the baseline, and add a table of them."""
    for call in cases.values():  # all are compiled before one is measured
        jax.block_until_ready(call())
    timings = measure(
        [Case(label, call) for label, call in cases.items()],
        seconds=1.0 if quick else 20.0,
        description=title,
    )
    rows = [[t.label, f"{t.done / 1e3:.2f}", f"{t.ratio_done:.3f}x"] for t in timings]
    report.section(title, table(["", "ms", "ratio"], rows), note)
    report.numbers[title] = [t.row() for t in timings]
    return timings


def part_groups(report: Report, quick: bool) -> None:
    """A train step with three groups of parameters beside one with one."""
    layers, width = (4, 32) if quick else (24, 256)
    x = jnp.ones((32, width))
    rate = lambda decay: optax.adamw(1e-4, weight_decay=decay)

    def case(tx: object) -> Callable[[], jax.Array]:
        model = net(layers, width)
        opt, step = nn.Optimizer(model, tx), nn.jit(train_step)
        return lambda: step(model, opt, x)

    cases = {
        "one group": case(rate(1e-4)),
        "three groups": case({"*.bias": rate(0.0), "0.weight": rate(1e-3), "*": rate(1e-4)}),
    }
    note = f"A train step of {layers} Linear layers with norms, AdamW."
    timings = compare(report, "Groups of parameters", note, cases, quick)
    report.target("step, three groups beside one", timings[1].ratio_done, 1.05, "x")


def part_accumulate(report: Report, quick: bool) -> None:
    """One update of eight batches beside a scan over them by hand."""
    layers, width, count = (4, 32, 8) if quick else (12, 256, 8)
    batches = jnp.ones((count, 256, width))
    tx = optax.adamw(1e-4)
    fn, params = nn.functionalize(net(layers, width))

    @jax.jit
    def by_hand(params: dict, state: Any, batches: jax.Array) -> tuple:
        def body(sums: dict, x: jax.Array) -> tuple:
            loss, grads = jax.value_and_grad(lambda p: (fn(p, x) ** 2).mean())(params)
            return jax.tree.map(jnp.add, sums, grads), loss

        sums, losses = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), batches)
        updates, state = tx.update(jax.tree.map(lambda g: g / count, sums), state, params)
        return optax.apply_updates(params, updates), state, losses

    kept = {"params": params, "state": tx.init(params)}

    def hand() -> jax.Array:
        kept["params"], kept["state"], losses = by_hand(kept["params"], kept["state"], batches)
        return losses

    @nn.jit
    def in_one(model: nn.Module, opt: nn.Optimizer, batches: jax.Array) -> jax.Array:
        def body(carry: tuple, x: jax.Array) -> tuple:
            model, opt = carry
            return carry, train_step(model, opt, x)

        return nn.scan(body, (model, opt), batches)[1]

    def ours(step: Callable) -> Callable[[], Any]:
        model = net(layers, width)
        opt = nn.Optimizer(model, tx, accumulate=count)
        return lambda: step(model, opt, batches)

    step = nn.jit(train_step)
    donated = nn.jit(train_step, donate=(0, 1))
    cases = {
        "scan by hand": hand,
        "accumulate=8, in a scan": ours(in_one),
        "accumulate=8, eight calls": ours(lambda m, opt, xs: [step(m, opt, x) for x in xs]),
        "the same, donated": ours(lambda m, opt, xs: [donated(m, opt, x) for x in xs]),
    }
    first = [jnp.asarray(call()) for call in cases.values()]
    assert all(jnp.allclose(first[0], losses, rtol=1e-5) for losses in first), first
    note = f"{count} batches of {layers} Linear layers with norms, and one update by AdamW."
    timings = compare(report, "Accumulated gradients", note, cases, quick)
    report.target("accumulate 8 beside the scan by hand", timings[1].ratio_done, 1.02, "x")


def part_ema(report: Report, quick: bool) -> None:
    """An update of an average of weights beside a jitted function by hand."""
    tensors, decay = 300, 0.999

    @jax.jit
    def by_hand(average: dict, current: dict) -> dict:
        return jax.tree.map(lambda a, c: decay * a + (1 - decay) * c, average, current)

    def both(width: int) -> dict[str, Callable[[], Any]]:
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(tensors // 2)))
        average = nn.AveragedModel(model, avg_fn=nn.averaging.get_ema_avg_fn(decay))
        average.update_parameters(model)  # takes the model over, as the dict below
        kept = dict(average.module.state_dict())
        current = {name: value + 1 for name, value in kept.items()}
        model.load_state_dict(current)
        name, first = next(iter(average.module.named_parameters()))

        def hand() -> jax.Array:
            kept.update(by_hand(kept, current))
            return kept[name]

        def ours() -> jax.Array:
            average.update_parameters(model)
            return first.value

        assert jnp.allclose(hand(), ours(), rtol=1e-6)
        return {"jitted, by hand": hand, "nn.AveragedModel": ours}

    for width in (16, 256):
        title = f"Averages of weights, {tensors} tensors of width {width}"
        note = "An update of an exponential moving average, outside of compiled code."
        timings = compare(report, title, note, both(width), quick)
        report.target(f"EMA update, width {width}", timings[1].ratio_done, 1.1, "x")


def pairs(width: int, change: Callable[[Any], Any]) -> nn.Sequential:
    """Four pairs of Linear layers, `width` to four times that and back, the same for each call."""
    nn.manual_seed(0)
    layers = (
        (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(4)
    )
    model = nn.Sequential(*(layer for pair in layers for layer in pair)).eval()
    change(model)
    return model


def part_lora(report: Report, quick: bool) -> None:
    """A forward pass and a gradient with adapters beside the base's."""
    width, inputs = (64, 32) if quick else (768, 512)
    attach = lambda model, **options: nn.lora.attach(model, "*", rank=8, **options)
    nets = {
        "base": pairs(width, lambda m: None),
        "base, again": pairs(width, lambda m: None),
        "adapters": pairs(width, attach),
        "merged": pairs(width, lambda m: (attach(m), nn.lora.merge(m))),
        "DoRA": pairs(width, lambda m: attach(m, variant="dora")),
    }
    x = jax.random.normal(jax.random.key(0), (inputs, width))
    forward = nn.jit(lambda model, x: model(x))
    gradient = nn.jit(nn.grad(loss_fn))
    assert all(
        jnp.allclose(forward(nets["base"], x), forward(m, x), atol=1e-5) for m in nets.values()
    )

    def cases(function: Callable, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
        return {name: lambda name=name: function(nets[name], x) for name in names}

    note = f"Eight Linear layers of {width} x {4 * width}, {inputs} inputs, rank 8"
    title = "Adapters, forward"
    extra = (
        "a merged model runs the base's program, so it differs by as much as the base from itself."
    )
    timings = compare(report, title, f"{note}; {extra}", cases(forward, list(nets)), quick)
    ratios = {t.label: t.ratio_done for t in timings}
    report.target("LoRA, forward beside the base", ratios["adapters"], 1.15, "x")
    report.target("the same, merged", round(ratios["merged"], 2), 1.0, "x")
    names = ["base", "adapters", "DoRA"]
    note = f"{note}; of the base all weights have gradients."
    compare(report, "Adapters, gradient", note, cases(gradient, names), quick)


def part_quantized(report: Report, quick: bool) -> None:
    """A forward pass of weights in 8 and 4 bits beside float32, and the bytes of the weights."""
    width = 64 if quick else 768
    bits: dict[str, Any] = {}
    nets = {"float32": pairs(width, lambda m: None)}
    for kind in ("int8", "nf4"):
        nets[kind] = pairs(
            width, lambda m, kind=kind: bits.update({kind: nn.quantize(m, "*", kind)})
        )
    full = bits["int8"].before
    size = {"float32": full, **{kind: r.after for kind, r in bits.items()}}
    rows = [[k, f"{n / 1e6:.2f}", f"{n / full:.3f}x"] for k, n in size.items()]
    title = "Quantised weights, memory"
    report.section(
        title, table(["", "MB", "ratio"], rows), f"Eight layers of {width} x {4 * width}."
    )
    report.numbers[title] = size
    report.target("weights in nf4 beside float32", size["nf4"] / full, 0.16, "x")
    forward = nn.jit(lambda model, x: model(x))
    for inputs in (8, 512):
        x = jax.random.normal(jax.random.key(0), (inputs, width))
        cases = {kind: lambda m=m, x=x: forward(m, x) for kind, m in nets.items()}
        note = "Weights are computed anew in each call, for however many inputs."
        compare(report, f"Quantised weights, forward of {inputs} inputs", note, cases, quick)


PARTS: dict[str, Callable[[Report, bool], None]] = {
    "groups": part_groups,
    "accumulate": part_accumulate,
    "ema": part_ema,
    "lora": part_lora,
    "quantized": part_quantized,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    options = arguments(__doc__ or "", list(PARTS)).parse_args(argv)
    return run(PARTS, options, title="Training", mark="training", packages=("jax", "optax"))


if __name__ == "__main__":
    sys.exit(main())
