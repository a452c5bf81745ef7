"""Ways to compute a convolution, against each other: ``python benchmarks/conv_lowering.py``.

Prints, for each case, the time of ``lax.conv_general_dilated`` in milliseconds and the times of the
other ways as multiples of it (below 1 is faster), forward and with gradients by both arguments.
Medians of interleaved rounds. What wins is written into statefulnn/functional/_conv_lowering.py.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.functional import _conv_lowering as lowering

# name, (N, C, *spatial), (O, C / groups, *kernel), stride, padding, groups
CASES = [
    ("3x3, 16->32, 32x32", (32, 16, 32, 32), (32, 16, 3, 3), 1, 1, 1),
    ("3x3, 64->64, 16x16", (32, 64, 16, 16), (64, 64, 3, 3), 1, 1, 1),
    ("3x3 stride 2, 32->64, 32x32", (32, 32, 32, 32), (64, 32, 3, 3), 2, 1, 1),
    ("3x3 of one channel, 1->32, 28x28", (32, 1, 28, 28), (32, 1, 3, 3), 1, 1, 1),
    ("1x1, 64->128, 16x16", (32, 64, 16, 16), (128, 64, 1, 1), 1, 0, 1),
    ("3x3 in 4 groups, 64->64, 16x16", (32, 64, 16, 16), (64, 16, 3, 3), 1, 1, 4),
    ("3x3 in 16 groups, 64->64, 16x16", (32, 64, 16, 16), (64, 4, 3, 3), 1, 1, 16),
    ("3x3 depthwise, 64, 32x32", (32, 64, 32, 32), (64, 1, 3, 3), 1, 1, 64),
    ("3x3 depthwise stride 2, 64, 32x32", (32, 64, 32, 32), (64, 1, 3, 3), 2, 1, 64),
    ("3x3 depthwise x2, 32->64, 16x16", (32, 32, 16, 16), (64, 1, 3, 3), 1, 1, 32),
    ("7x7 depthwise, 64, 16x16", (32, 64, 16, 16), (64, 1, 7, 7), 1, 3, 64),
    ("1-d width 5, 64->64, 128", (32, 64, 128), (64, 64, 5), 1, 2, 1),
    ("1-d depthwise width 4, 128, 256", (32, 128, 256), (128, 1, 4), 1, 0, 128),
]


def channels_last(x, w, stride, pads, dilation, groups):
    """The same operation with the channels moved to the end inside."""
    n = x.ndim - 2
    layout = "HW"[:n]
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


def as_matmul(x, w, stride, pads, dilation, groups):
    return lowering.pointwise(x, w, stride, pads)


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


def shifted(x, w, stride, pads, dilation, groups):
    return lowering.shifted_sum(x, w, stride, pads, dilation)


def ways(x_shape, w_shape, groups):
    chosen = {"lax": lowering.general, "NHWC": channels_last}
    if all(k == 1 for k in w_shape[2:]):
        chosen["matmul"] = as_matmul
    if 1 < groups < x_shape[1]:
        chosen["by group"] = lowering.group_by_group
        if len(x_shape) == 4:
            chosen["patches"] = patches_in_groups
    if groups == x_shape[1]:
        chosen["shifted"] = shifted
    chosen["chosen"] = lowering.convolve
    return chosen


def with_rest(f, rest, x, w):
    return f(x, w, *rest)


def squared_sum(f):
    return lambda x, w: jnp.sum(f(x, w) ** 2)


def measure(functions, args, rounds):
    for f in functions.values():
        jax.block_until_ready(f(*args))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) * 1e3 for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, batch 32, float32")
    for name, x_shape, w_shape, stride, padding, groups in CASES:
        if options.only not in name:
            continue
        n = len(x_shape) - 2
        keys = jax.random.split(jax.random.key(0))
        x, w = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)
        rest = ((stride,) * n, ((padding, padding),) * n, (1,) * n, groups)
        forward, both = {}, {}
        expected = None
        for way, f in ways(x_shape, w_shape, groups).items():
            call = functools.partial(with_rest, f, rest)
            forward[way] = jax.jit(call)
            both[way] = jax.jit(jax.value_and_grad(squared_sum(call), argnums=(0, 1)))
            out = forward[way](x, w)
            expected = out if expected is None else expected
            assert jnp.allclose(out, expected, rtol=1e-3, atol=1e-3), (name, way)
        for what, functions in (("forward", forward), ("gradients", both)):
            times = measure(functions, (x, w), options.rounds)
            base = times.pop("lax")
            ratios = "  ".join(f"{way} {t / base:.2f}" for way, t in times.items())
            print(f"{name:36s} {what:10s} lax {base:8.2f} ms   {ratios}", flush=True)


if __name__ == "__main__":
    main()
