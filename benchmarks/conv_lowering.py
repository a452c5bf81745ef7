"""Ways to compute a convolution, against each other: ``python benchmarks/conv_lowering.py``.

Prints, for each case, the time of ``lax.conv_general_dilated`` in milliseconds and the times of the
other ways as multiples of it (below 1 is faster), forward and with gradients by both arguments.
Medians of interleaved rounds. What wins is written into statefulnn/functional/_conv_lowering.py.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

sys.path.insert(0, str(Path(__file__).parent.parent))

from statefulnn.functional import _conv_lowering as lowering  # noqa: E402

# name, (N, C, *spatial), (O, C / groups, *kernel), stride, padding, groups
CASES = [
    ("3x3, 16->32, 32x32", (32, 16, 32, 32), (32, 16, 3, 3), 1, 1, 1),
    ("3x3, 64->64, 16x16", (32, 64, 16, 16), (64, 64, 3, 3), 1, 1, 1),
    ("3x3, 64->64, 56x56", (32, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1),
    ("3x3, 256->256, 14x14", (32, 256, 14, 14), (256, 256, 3, 3), 1, 1, 1),
    ("3x3, 512->512, 7x7", (32, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1),
    ("3x3 stride 2, 32->64, 32x32", (32, 32, 32, 32), (64, 32, 3, 3), 2, 1, 1),
    ("3x3 of one channel, 1->32, 28x28", (32, 1, 28, 28), (32, 1, 3, 3), 1, 1, 1),
    ("3x3, 512->512, 2x2", (8, 512, 2, 2), (512, 512, 3, 3), 1, 1, 1),
    ("3x3 stride 2, 256->512, 4x4", (8, 256, 4, 4), (512, 256, 3, 3), 2, 1, 1),
    ("3x3 with a border of 2, 16->32, 32x32", (32, 16, 32, 32), (32, 16, 3, 3), 1, 2, 1),
    ("1x1, 64->128, 16x16", (32, 64, 16, 16), (128, 64, 1, 1), 1, 0, 1),
    ("3x3 in 4 groups, 64->64, 16x16", (32, 64, 16, 16), (64, 16, 3, 3), 1, 1, 4),
    ("3x3 in 16 groups, 64->64, 16x16", (32, 64, 16, 16), (64, 4, 3, 3), 1, 1, 16),
    ("3x3 depthwise, 64, 32x32", (32, 64, 32, 32), (64, 1, 3, 3), 1, 1, 64),
    ("3x3 depthwise stride 2, 64, 32x32", (32, 64, 32, 32), (64, 1, 3, 3), 2, 1, 64),
    ("3x3 depthwise x2, 32->64, 16x16", (32, 32, 16, 16), (64, 1, 3, 3), 1, 1, 32),
    ("7x7 depthwise, 64, 16x16", (32, 64, 16, 16), (64, 1, 7, 7), 1, 3, 64),
    ("1-d width 5, 64->64, 128", (32, 64, 128), (64, 64, 5), 1, 2, 1),
    ("1-d width 5, 64->64, 1024", (32, 64, 1024), (64, 64, 5), 1, 2, 1),
    ("1-d depthwise width 4, 128, 256", (32, 128, 256), (128, 1, 4), 1, 0, 128),
    ("7x7 stride 2, 3->64, 64x64", (8, 3, 64, 64), (64, 3, 7, 7), 2, 3, 1),
    ("7x7 stride 2, 3->64, 224x224", (8, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1),
    ("3x3 without border, 32->64, 26x26", (64, 32, 26, 26), (64, 32, 3, 3), 1, 0, 1),
    ("5x5 without border, 32->64, 28x28", (64, 32, 28, 28), (64, 32, 5, 5), 1, 0, 1),
    ("2x2 stride 2, 64->128, 28x28", (32, 64, 28, 28), (128, 64, 2, 2), 2, 0, 1),
    ("2x2 stride 2, 96->192, 28x28, batch 128", (128, 96, 28, 28), (192, 96, 2, 2), 2, 0, 1),
    ("4x4 stride 4, 3->64, 32x32", (32, 3, 32, 32), (64, 3, 4, 4), 4, 0, 1),
    ("16x16 stride 16, 3->768, 224x224", (8, 3, 224, 224), (768, 3, 16, 16), 16, 0, 1),
    ("64x1 without border, 128->256, 95x1, batch 2", (2, 128, 95, 1), (256, 128, 64, 1), 1, 0, 1),
    ("64x1 without border, 256->128, 191x1, batch 2", (2, 256, 191, 1), (128, 256, 64, 1), 1, 0, 1),
    ("1x3 without border, 64->64, 64x64, batch 8", (8, 64, 64, 64), (64, 64, 1, 3), 1, 0, 1),
    ("3x1 without border, 64->64, 64x64, batch 8", (8, 64, 64, 64), (64, 64, 3, 1), 1, 0, 1),
    ("3-d width 3, 16->16, 12x12x12", (8, 16, 12, 12, 12), (16, 16, 3, 3, 3), 1, 1, 1),
]

# name, (N, C, *spatial), (C, O / groups, *kernel), stride, padding, groups
TRANSPOSED = [
    ("transposed 4x4 stride 2, 64->32, 16x16", (32, 64, 16, 16), (64, 32, 4, 4), 2, 1, 1),
    ("transposed 3x3 stride 2, 64->32, 16x16", (32, 64, 16, 16), (64, 32, 3, 3), 2, 1, 1),
    ("transposed 2x2 stride 2, 64->32, 16x16", (32, 64, 16, 16), (64, 32, 2, 2), 2, 0, 1),
    ("transposed 4x4 depthwise, 64, 16x16", (32, 64, 16, 16), (64, 1, 4, 4), 2, 1, 64),
    ("transposed width 16 stride 8, 64->32, 64", (32, 64, 64), (64, 32, 16), 8, 4, 1),
    ("transposed 3-d 4, 32->16, 8x8x8", (8, 32, 8, 8, 8), (32, 16, 4, 4, 4), 2, 1, 1),
]


def channels_last(x, w, stride, pads, dilation, groups):
    """The same operation with the channels moved to the end inside."""
    n = x.ndim - 2
    layout = "DHW"[-n:]
    out = lax.conv_general_dilated(
        jnp.moveaxis(x, 1, -1),
        jnp.moveaxis(w, (0, 1), (-1, -2)),
        stride,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{layout}C", f"{layout}IO", f"N{layout}C"),
        feature_group_count=groups,
    )
    return jnp.moveaxis(out, -1, 1)


def patches_in_groups(x, w, stride, pads, dilation, groups):
    """Shifted copies, and one batched matrix product over all groups."""
    n, channels = x.shape[:2]
    kernel = w.shape[2:]
    x = jnp.pad(x, ((0, 0), (0, 0), *pads))
    sizes = [(s - k) // t + 1 for s, k, t in zip(x.shape[2:], kernel, stride, strict=True)]
    windows = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            windows.append(
                x[
                    :,
                    :,
                    i : i + stride[0] * (sizes[0] - 1) + 1 : stride[0],
                    j : j + stride[1] * (sizes[1] - 1) + 1 : stride[1],
                ]
            )
    stacked = jnp.stack(windows, 2).reshape(n, groups, -1, sizes[0] * sizes[1])
    kernels = w.reshape(groups, w.shape[0] // groups, -1)
    return jnp.einsum("goc,ngcs->ngos", kernels, stacked).reshape(n, w.shape[0], *sizes)


def ways(x_shape, w_shape, stride, groups):
    chosen = {"lax": lowering.general, "NHWC": channels_last}
    if all(k == 1 for k in w_shape[2:]):
        chosen["matmul"] = lowering.pointwise
    if 1 < groups < x_shape[1]:
        chosen["by group"] = lowering.group_by_group(lowering.dense)
        if len(x_shape) == 4:
            chosen["patches"] = patches_in_groups
    if groups == x_shape[1]:
        chosen["shifted"] = lowering.shifted_sum
    if groups == 1 and all(k > 1 for k in w_shape[2:]):
        products = lowering.few_at_a_time(lowering.as_one_product, lowering.POSITIONS_OF_A_PRODUCT)
        chosen["products"] = lowering.differentiated(lowering.general, lowering.general, products)
    if groups == 1 and tuple(stride) == w_shape[2:]:
        chosen["apart"] = lowering.apart
    chosen["chosen"] = lowering.convolve
    return chosen


def transposed_ways():
    return {
        "lax": lowering.general_transposed,
        "phases": functools.partial(lowering.by_phases, repeated=False),
        "chosen": lowering.convolve_transposed,
    }


def with_rest(f, rest, x, w):
    return f(x, w, *rest)


def squared_sum(f):
    return lambda x, w: jnp.sum(f(x, w) ** 2)


def measure(functions, args, rounds, clock):
    for f in functions.values():
        jax.block_until_ready(f(*args))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            start = clock()
            jax.block_until_ready(f(*args))
            times[name].append(clock() - start)
    return {name: statistics.median(t) * 1e3 for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time, for a machine that others use as well"
    )
    options = parser.parse_args()
    measured = functools.partial(
        measure,
        rounds=options.rounds,
        clock=time.process_time if options.cpu_time else time.perf_counter,
    )
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, batch 32 or 8, float32")
    for name, x_shape, w_shape, stride, padding, groups in CASES:
        if options.only in name:
            n = len(x_shape) - 2
            rest = ((stride,) * n, ((padding, padding),) * n, (1,) * n, groups)
            race(name, ways(x_shape, w_shape, rest[0], groups), x_shape, w_shape, rest, measured)
    for name, x_shape, w_shape, stride, padding, groups in TRANSPOSED:
        if options.only in name:
            n = len(x_shape) - 2
            sizes = tuple(
                (size - 1) * stride - 2 * padding + k
                for size, k in zip(x_shape[2:], w_shape[2:], strict=True)
            )
            rest = ((stride,) * n, (padding,) * n, (1,) * n, groups, sizes)
            race(name, transposed_ways(), x_shape, w_shape, rest, measured)


def race(name, contenders, x_shape, w_shape, rest, measured):
    """Time each way on the same arrays, check that they agree, and print the ratios."""
    keys = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)
    forward, both = {}, {}
    expected = None
    for way, f in contenders.items():
        call = functools.partial(with_rest, f, rest)
        forward[way] = jax.jit(call)
        both[way] = jax.jit(jax.value_and_grad(squared_sum(call), argnums=(0, 1)))
        out = forward[way](x, w)
        expected = out if expected is None else expected
        assert jnp.allclose(out, expected, rtol=1e-3, atol=1e-3), (name, way)
    for what, functions in (("forward", forward), ("gradients", both)):
        times = measured(functions, (x, w))
        base = times.pop("lax")
        ratios = "  ".join(f"{way} {t / base:.2f}" for way, t in times.items())
        print(f"{name:41s} {what:10s} lax {base:8.2f} ms   {ratios}", flush=True)


if __name__ == "__main__":
    main()
