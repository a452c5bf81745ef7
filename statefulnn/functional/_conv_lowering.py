"""How a convolution is computed: the one place where that is chosen, by measurement.

``python benchmarks/conv_lowering.py`` on 2 CPU cores, JAX 0.10.2, batch 32 (8 for 3-d, 7x7 and 16x16),
float32; time as a multiple of that of XLA's own operation, forward and with both gradients (numbers from
0.8 to 1.2 are noise):

=======================================  =======  =========  =======================================
convolution                              forward  gradients  chosen on CPU
=======================================  =======  =========  =======================================
depthwise 3x3, 64 channels, 32x32           0.01       0.03  a sum of shifted products; the weight's
depthwise 3x3, stride 2                     0.04       0.07  gradient image by image
depthwise 3x3, two outputs a channel        0.05       0.01
depthwise 7x7, 64 channels, 16x16           0.05       0.11
depthwise width 4, 128 channels, 256        0.01       0.04
3x3 in 4 groups, 64 channels, 16x16         0.34       0.04  one convolution a group
3x3 in 16 groups, 64 channels, 16x16        0.56       0.03
1x1, 64 to 128 channels, 16x16              0.62       0.35  a matrix product, for each image
dense 3x3, 64 channels, 16x16               1.00       0.71  XLA's; from 134 million multiplications on
dense 3x3, 64 channels, 56x56               1.01       0.46  the weight's gradient is a product an image,
dense 3x3, 256 channels, 14x14              0.99       0.78  or for a few small ones
dense 3x3, 512 channels, 7x7                1.00       0.94
dense 7x7, step 2, 3 to 64, 224x224         1.00       0.61
dense 3x3, border of 2, 16 to 32, 32x32     0.99       0.28  the same, also for less
dense 3x3, 512 channels, 2x2                0.03       0.08  where the image or the output is smaller than
dense 3x3, stride 2, 256 to 512, 4x4        0.75       0.15  the kernel: a matrix product of all taps
dense 3x3, no border, 26x26, batch 64       0.40       0.40  XLA's, with one more row that is cut off; the
dense 5x5, no border, 28x28, batch 64       0.39       0.35  weight's gradient as above
2x2, step 2, 64 to 128, 28x28               0.88       0.70  a matrix product of patches that do not
2x2, step 2, 96 to 192, batch 128           0.87       0.46  overlap; of many numbers the weight's
4x4, step 4, 3 to 64, 32x32                 0.81       0.73  gradient image by image
16x16, step 16, 3 to 768, 224x224           0.54       0.22
dense width 5, 64 channels, 128             0.99       1.02  XLA's
64x1, no border, 256 to 128, 191x1          0.17       0.31  over one axis, with the positions along the
3x1, no border, 64 channels, 64x64          0.43       0.30  other in the batch
1x3, no border, 64 channels, 64x64          0.66       0.65
dense 3-d of width 3, 16 channels, 12³      0.22       0.22  a sum of convolutions over two axes
transposed 4x4, stride 2, 64 to 32, 16²     0.60       0.12  by phases: convolutions of step 1
transposed 3x3, stride 2                    0.77       0.12
transposed 2x2, stride 2                    0.92       0.11
transposed width 16, stride 8, 64           0.60       0.11
in a loop: dense 3x3, 16 channels, 32x32               0.19  a matrix product of all taps and images
in a loop: dense 3x3, 64 channels, 56x56               0.06  the same, image by image
of each image: dense 3x3, 32 to 64, 26x26              0.15  the weight's gradient tap after tap, on one
of each image: dense 3x3, 64 channels, 16x16           0.40  core; of less than 8 channels a product of
of each image: dense 3x3, 256 channels, 8x8            0.57  all taps
of each image: dense 5x5, 16 to 32, 14x14              0.62
of each image: dense 7x7, step 2, 3 to 64, 32x32       0.49
=======================================  =======  =========  =======================================

What comes before and after counts as well. On one core, batch 2, milliseconds: a scale, SiLU and a
depthwise 3x3 of step 2 (96 channels, 112x112) take 5.1, and took 14.1 while all taps read the copy with
borders; a depthwise 7x7, a transpose and a norm over channels (384 channels, 14x14) take 1.7, and took 9.0
as one sum for all images. A ConvNeXt-T takes about 290, and took 476.

Also tried: channels last inside (1.0; for all 1x1 and depthwise ones of a network 1.08 in ResNet-50 and 1.13
in EfficientNet-B0, since XLA copies between the layouts), groups as a batched matrix product over stacked
shifts (1.15 and 0.13 in 4 groups), a sum of shifted products for a single input channel (0.3 and 3.7),
matrix products for the gradient by the image (0.7 to 1.5), matrix products image by image forward (0.5 to
3.5), and of patches that do not overlap along one axis (1.5 and 1.8 with 64 channels). The weight's gradient
by products takes about 0.1 s longer to compile, and along one axis 1.2 to 1.5 of XLA's time. On other
platforms the library behind XLA's own operation is left to choose.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from statefulnn.core.compat import own_on_devices
from statefulnn.core.repeated import in_repeated_code
from statefulnn.functional._checks import widened

PerAxis = Sequence[int]
Pads = Sequence[tuple[int, int]]  # before and after, along each axis

# Above this many taps no sum over taps is unrolled: it would be long to compile.
MOST_TAPS = 128
# Up to this many, the sum over the taps of a depthwise convolution may become a part of what follows.
FEW_TAPS = 25
# From this many channels on, a product for one tap is as fast as one for all, or faster.
CHANNELS_OF_A_TAP = 8
# From this many numbers on, patches that do not overlap are better laid out for each image by itself.
LARGE_BATCH = 1 << 23
# From so many multiplications on, products for the gradient by the kernel are worth their time to compile,
LONG_GRADIENT = 1 << 27
# unless an output sees less than so many numbers: there XLA is as fast.
FEW_SEEN = 128
# Each product takes as many images as have so many positions.
POSITIONS_OF_A_PRODUCT = 400


def general(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    """Convolve by XLA's own operation; ``(N, C, *)`` and ``(O, C / groups, *)``."""
    layout = "DHW"[2 - x.ndim :]
    return lax.conv_general_dilated(
        x,
        w,
        tuple(stride),
        tuple(pads),
        rhs_dilation=tuple(dilation),
        dimension_numbers=(f"NC{layout}", f"OI{layout}", f"NC{layout}"),
        feature_group_count=groups,
    )


# --------------------------------------------------------------------------------------------------
# The derivatives of a way


def differentiated(value: Callable, along_x: Callable, along_w: Callable) -> Callable:
    """Return `value` with derivatives that are computed in other ways.

    A convolution is linear in the image and linear in the kernel, so each derivative is a convolution
    too; reverse mode runs its transpose.

    Args:
        value: convolves, called as `general`.
        along_x: convolves a tangent of the image with the kernel.
        along_w: convolves the image with a tangent of the kernel.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
    def convolution(
        x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
    ) -> Array:
        return value(x, w, stride, pads, dilation, groups)

    @functools.partial(convolution.defjvp, symbolic_zeros=True)
    def _(
        stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int, primals: tuple, tangents: tuple
    ) -> tuple[Array, Array]:
        (x, w), (dx, dw) = primals, tangents
        how = stride, pads, dilation, groups
        terms = []
        if not isinstance(dx, SymbolicZero):
            terms.append(along_x(dx, w, *how))
        if not isinstance(dw, SymbolicZero):
            terms.append(along_w(x, dw, *how))
        out = convolution(x, w, *how)
        return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)

    return convolution


def few_at_a_time(way: Callable, positions: int = 1) -> Callable:
    """Return `way` for one image after the other, or for a few at a time.

    The transpose by the kernel then adds up over images, each of which stays in the cache, and makes
    again what the taps see of an image, rather than keeping it for all.

    Args:
        way: convolves, called as `general`.
        positions: of how many outputs a channel there are at least in a turn, where one image has less.
    """

    def convolution(
        x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
    ) -> Array:
        how = stride, pads, dilation, groups
        some = jax.checkpoint(lambda images, w: way(images, w, *how), prevent_cse=False)
        if not _on_one_device():
            return some(x, w)
        number, few, rest = x.shape[0], 1, 0
        made = math.prod(_outputs(x.shape[2:], w.shape[2:], stride, pads, dilation))
        if not jax.export.is_symbolic_dim(number * made):
            least = min(-(-positions // made), number)
            few = next((n for n in range(least, 4 * least) if number % n == 0), least)
            rest = number % few
        turns = number // few
        images = lax.slice_in_dim(x, 0, turns * few).reshape(turns, few, *x.shape[1:])
        out = lax.map(lambda images: some(images, w), images)
        out = out.reshape(-1, *out.shape[2:])
        return lax.concatenate([out, some(x[-rest:], w)], 0) if rest else out

    return convolution


def _at_least(size: int, least: int) -> bool:
    # A size that has a name only, in a program for all sizes, is not known to be large.
    return not jax.export.is_symbolic_dim(size) and size >= least


def _at_most(number: int, size: int) -> bool:
    return jax.export.is_symbolic_dim(size) or number <= size


def _on_one_device() -> bool:
    # Of several, each may have a part of the batch: a loop over images would bring all of it to all of them.
    return jax.device_count("cpu") == 1


# --------------------------------------------------------------------------------------------------
# Many channels to many


def _outputs(
    sizes: PerAxis, kernel: PerAxis, stride: PerAxis, pads: Pads, dilation: PerAxis
) -> list[int]:
    """Return how many outputs there are along each axis."""
    axes = zip(sizes, kernel, stride, pads, dilation, strict=True)
    return [(size + low + high - d * (k - 1) - 1) // s + 1 for size, k, s, (low, high), d in axes]


def _bordered(x: Array, pads: Pads) -> Array:
    """Return x with zeros around its last axes."""
    edges = [(0, 0, 0), (0, 0, 0), *((low, high, 0) for low, high in pads)]
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def windows(
    x: Array, kernel: PerAxis, stride: PerAxis, pads: Pads, dilation: PerAxis
) -> Iterator[Array]:
    """Yield, for each point of a kernel, what it sees of the last axes of x: ``(A, B, *out)``.

    A point that sees no border reads x itself. So x has two readers, and XLA keeps it as it is: it would
    compute an x that only a copy with borders reads inside of the loop that copies, element by element.
    """
    bordered = _bordered(x, pads)
    spans = [
        (size - d * (k - 1) - 1) // s * s + 1
        for size, k, s, d in zip(bordered.shape[2:], kernel, stride, dilation, strict=True)
    ]
    for point in itertools.product(*map(range, kernel)):
        starts = [p * d for p, d in zip(point, dilation, strict=True)]
        inside = [start - low for start, (low, _) in zip(starts, pads, strict=True)]
        ends = [start + span for start, span in zip(inside, spans, strict=True)]
        seen = bordered
        if min(inside) >= 0 and all(
            _at_least(n - b, 0) for b, n in zip(ends, x.shape[2:], strict=True)
        ):
            seen, starts = x, inside
        stops = [start + span for start, span in zip(starts, spans, strict=True)]
        yield lax.slice(seen, (0, 0, *starts), (*x.shape[:2], *stops), (1, 1, *stride))


def tap_after_tap(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int = 1
) -> Array:
    """Convolve as a matrix product over channels for each point of the kernel, and their sum, in a loop.

    Straight code may copy what all taps see first. The system makes new pages for so many numbers in each
    call, which takes longer than the products.
    """
    kernel, made = w.shape[2:], _outputs(x.shape[2:], w.shape[2:], stride, pads, dilation)
    bordered = jnp.moveaxis(_bordered(x, pads), 1, -1)
    # XLA would copy for the loop, where a batch of one lies before the positions.
    batch = x.shape[:1] if x.shape[0] > 1 else ()
    image = bordered.reshape(*batch, *bordered.shape[1:])  # (N, *, C)
    spans = [(size - 1) * s + 1 for size, s in zip(made, stride, strict=True)]
    points = np.array(list(itertools.product(*map(range, kernel)))) * np.array(dilation)
    starts = np.pad(points, ((0, 0), (len(batch), 1))).astype(np.int32)
    taps = jnp.moveaxis(w.reshape(*w.shape[:2], -1), -1, 0)  # (k, O, C)

    # What a tap sees is made again in the backward pass, rather than kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        start, tap = at
        seen = lax.dynamic_slice(image, tuple(start), (*batch, *spans, x.shape[1]))
        seen = lax.slice(seen, (0,) * seen.ndim, seen.shape, (*(1 for _ in batch), *stride, 1))
        return total + lax.dot_general(tap, seen, (((1,), (seen.ndim - 1,)), ((), ()))), None

    nothing = own_on_devices(jnp.zeros((w.shape[0], *batch, *made), x.dtype), (x, w))
    total, _ = lax.scan(step, nothing, (starts, taps))
    return total.reshape(w.shape[0], x.shape[0], *made).swapaxes(0, 1)


def as_one_product(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int = 1
) -> Array:
    """Convolve as one matrix product for all images, whose derivatives are products as well.

    XLA's own operation is slow on CPU where it is not in straight code with one kernel: in the body of a
    loop it takes 5 times as long, its gradients 6 to 25 times, and under vmap many kernels make a convolution
    in groups. A product is as fast in all of these as outside.
    """
    made = _outputs(x.shape[2:], w.shape[2:], stride, pads, dilation)
    rows = _bordered(x.swapaxes(0, 1), pads)  # (C, N, *)
    # What all points see, axis by axis: fewer slices, which takes half as long to compile.
    for axis, (k, d, s, size) in enumerate(
        zip(w.shape[2:], dilation, stride, made, strict=True), 2
    ):
        starts = range(0, d * k, d)
        seen = [lax.slice_in_dim(rows, a, a + (size - 1) * s + 1, s, axis) for a in starts]
        rows = lax.concatenate(seen, 0)
    kernel = jnp.moveaxis(w, range(2, w.ndim), range(w.ndim - 2, 0, -1))  # in the order of the rows
    out = kernel.reshape(w.shape[0], -1) @ rows.reshape(rows.shape[0], -1)
    return out.reshape(w.shape[0], *rows.shape[1:]).swapaxes(0, 1)


def general_with_more(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    """Convolve by XLA's own operation, along some axes with one more output, which is cut off again.

    Without any border XLA has a path of its own in JAX 0.10, which is slower, from 30,000 outputs a channel
    on 2.5 times; in JAX 0.12 both take the same time. And with steps, where the first output sees one
    position alone, compiling the gradient by x can abort the process: for two points, a step of 2, a border
    of 1 and an even size ("Window dimensions do not match RHS shape").
    """
    borders = any(low or high for low, high in pads)
    axes = [0] if len(stride) == 2 and x.shape[1] > 1 and not borders else []
    for axis, (k, s, d, (low, _)) in enumerate(
        zip(w.shape[2:], stride, dilation, pads, strict=True)
    ):
        if s > 1 and 0 < low == d * (k - 1):
            axes.append(axis)
    grown = [
        (a, b + s if i in axes else b)
        for i, ((a, b), s) in enumerate(zip(pads, stride, strict=True))
    ]
    out = general(x, w, stride, grown, dilation, groups)
    for axis in axes:
        out = lax.slice_in_dim(out, 0, out.shape[2 + axis] - 1, axis=2 + axis)
    return out


def flat(x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int) -> Array:
    """Convolve over one axis or two by XLA's own operation."""
    how, kernel = (tuple(stride), tuple(pads), tuple(dilation), groups), w.shape[2:]
    grown = any(a + b > d * (k - 1) for (a, b), d, k in zip(pads, dilation, kernel, strict=True))
    multiplied = x.shape[0] * math.prod(_outputs(x.shape[2:], kernel, *how[:3])) * w.size
    long = _at_least(multiplied, LONG_GRADIENT) and len(kernel) == 2 and w[0].size >= FEW_SEEN
    # XLA's gradient by the kernel takes twice as long, and 30 times where borders make the output the larger.
    products = math.prod(kernel) <= MOST_TAPS and (grown or long and _on_one_device())
    return (_with_products if products else general_with_more)(x, w, *how)


_with_products = differentiated(
    general_with_more, general_with_more, few_at_a_time(as_one_product, POSITIONS_OF_A_PRODUCT)
)


def dense(x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int) -> Array:
    """Convolve by XLA's own operation over one axis or two, over three as a sum of those over two."""
    if len(stride) < 3 or w.shape[2] > MOST_TAPS:
        return flat(x, w, stride, pads, dilation, groups)
    # XLA's operation over three axes has no fast kernel on CPU, its transpose is slower still, and
    # with steps compiling it can abort the process ("Window dimensions do not match RHS shape", jaxlib
    # 0.10.2).
    rest, total = (stride[1:], pads[1:], dilation[1:], groups), None
    way = pointwise if math.prod(w.shape[3:]) == 1 else flat
    slices = windows(
        x.reshape(*x.shape[:3], -1),
        (w.shape[2], 1),
        (stride[0], 1),
        (pads[0], (0, 0)),
        (dilation[0], 1),
    )
    for i, seen in enumerate(slices):
        batch, channels, depth, _ = seen.shape
        seen = seen.swapaxes(1, 2).reshape(batch * depth, channels, *x.shape[3:])
        term = way(seen, w[:, :, i], *rest)
        total = term if total is None else total + term
    assert total is not None
    return total.reshape(batch, depth, *total.shape[1:]).swapaxes(1, 2)


def _along_kernel_of_example(x: Array, w: Array, *how: Any) -> Array:
    if x.shape[1] >= CHANNELS_OF_A_TAP:
        return tap_after_tap(x, w, *how)
    return jax.checkpoint(lambda x, w: as_one_product(x, w, *how), prevent_cse=False)(x, w)


@functools.cache
def of_example(way: Callable) -> Callable:
    """Return `way` with another gradient by the kernel, for each image of a batch by itself.

    That of XLA's own operation is a convolution of as many groups, which takes 2 to 6 times as long.
    """
    return differentiated(way, way, _along_kernel_of_example)


def along_one_axis(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    """Convolve with a kernel that is one point wide along one of two axes: positions become a batch."""
    axis = 2 if w.shape[2] > 1 else 3  # along which the kernel is longer
    rows = x.transpose(0, 5 - axis, 1, axis)  # (N, the other axis, C, L)
    one = slice(axis - 2, axis - 1)
    how = stride[one], pads[one], dilation[one], groups
    out = convolve(rows.reshape(-1, *rows.shape[2:]), w.squeeze(5 - axis), *how)
    return out.reshape(*rows.shape[:2], *out.shape[1:]).transpose(
        0, 2, *((3, 1) if axis == 2 else (1, 3))
    )


def group_by_group(way: Callable) -> Callable:
    """Return `way` for each group of channels by itself."""

    def convolution(
        x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
    ) -> Array:
        inputs, kernels = jnp.split(x, groups, axis=1), jnp.split(w, groups, axis=0)
        outs = [way(a, b, stride, pads, dilation, 1) for a, b in zip(inputs, kernels, strict=True)]
        return jnp.concatenate(outs, axis=1)

    return convolution


def pointwise(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    """Convolve with a kernel of one point, as a matrix product over channels."""
    if any(low or high for low, high in pads):
        x = _bordered(x, pads)
    if any(s != 1 for s in stride):
        x = lax.slice(x, (0,) * x.ndim, x.shape, (1, 1, *stride))
    batch, channels, *sizes = x.shape
    positions = math.prod(sizes)
    image, kernel = x.reshape(batch, channels, positions), w.reshape(w.shape[:2])
    if _at_most(kernel.size, (channels + kernel.shape[0]) * positions):
        # A product an image needs no transposing, and copies of the kernel no more memory than x.
        out = jnp.broadcast_to(kernel, (batch, *kernel.shape)) @ image
    else:
        out = jnp.einsum("oc,ncs->nos", kernel, image)
    return out.reshape(batch, w.shape[0], *sizes)


def apart(x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int) -> Array:
    """Convolve with a kernel as large as its step, as a matrix product of patches that do not overlap."""
    kernel, n = w.shape[2:], len(stride)
    x = _bordered(x, pads)
    counts = [size // k for size, k in zip(x.shape[2:], kernel, strict=True)]
    used = [count * k for count, k in zip(counts, kernel, strict=True)]
    x = lax.slice(x, (0,) * x.ndim, (*x.shape[:2], *used))
    x = x.reshape(
        *x.shape[:2], *(s for pair in zip(counts, kernel, strict=True) for s in pair)
    )  # (N, C, count, k, ...)
    x = x.transpose(0, 1, *range(3, 3 + 2 * n, 2), *range(2, 2 + 2 * n, 2))
    x = x.reshape(x.shape[0], -1, *counts)
    ones = (1,) * n
    return pointwise(x, w.reshape(w.shape[0], -1, *ones), ones, ((0, 0),) * n, ones, 1)


# --------------------------------------------------------------------------------------------------
# Each channel by itself


def shifted_sum(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    """Convolve each channel with its own kernels, as a sum of shifted products."""
    channels = x.shape[1]
    per_channel = w.shape[0] // channels
    taps = w.reshape(channels, per_channel, -1)
    spatial = (1,) * len(stride)
    out = None
    for i, window in enumerate(windows(x, w.shape[2:], stride, pads, dilation)):
        if per_channel > 1:
            term = window[:, :, None] * taps[None, :, :, i].reshape(
                1, channels, per_channel, *spatial
            )
        else:
            term = window * taps[:, 0, i].reshape(1, channels, *spatial)
        out = term if out is None else out + term
    assert out is not None
    return out.reshape(x.shape[0], channels * per_channel, *out.shape[-len(stride) :])


def sum_in_parts(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    """Convolve as `shifted_sum`; one of many taps for each image by itself, or each half of the channels.

    XLA would put the sum inside of the loop that comes next. Where that one transposes, for the norm over
    channels behind the 7x7 of a ConvNeXt, the taps are read across memory, which takes 3 to 5 times as long.
    The body of a loop stays what it is.
    """
    channels, alone = x.shape[1], x.shape[0] == 1
    whole = channels % 2 if alone else not _on_one_device()
    if whole or math.prod(w.shape[2:]) <= FEW_TAPS:
        return shifted_sum(x, w, stride, pads, dilation, groups)
    if not alone:
        of_one = lambda image: shifted_sum(image[None], w, stride, pads, dilation, groups)[0]
        return lax.map(of_one, x)
    halves = x.reshape(2, 1, channels // 2, *x.shape[2:]), w.reshape(2, -1, *w.shape[1:])
    of_half = lambda half: shifted_sum(half[0], half[1], stride, pads, dilation, groups // 2)[0]
    out = lax.map(of_half, halves)
    return out.reshape(1, -1, *out.shape[2:])


def _along_image(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    how = stride, pads, dilation, groups
    if w.shape[0] > groups or any(s != 1 for s in stride):
        return shifted_sum(x, w, *how)
    # The transpose adds to shifted places. It is the same sum, with the taps in opposite order, and so
    # this is the transpose of that one.
    turned = lax.rev(w, tuple(range(2, w.ndim)))
    borders = [
        (d * (k - 1) - low, d * (k - 1) - high)
        for (low, high), d, k in zip(pads, dilation, w.shape[2:], strict=True)
    ]
    out = jax.eval_shape(lambda: shifted_sum(x, w, *how))
    back = lambda y: shifted_sum(y, turned, stride, borders, dilation, groups)
    return jax.linear_transpose(back, out)(x)[0]


def _product_sum(
    x: Array, w: Array, stride: PerAxis, pads: Pads, dilation: PerAxis, groups: int
) -> Array:
    # `shifted_sum`, by products whose transpose is one as well, and not a product and a sum.
    taps = w.reshape(groups, w.shape[0] // groups, -1)
    out = None
    for i, window in enumerate(windows(x, w.shape[2:], stride, pads, dilation)):
        term = jnp.einsum("nc...,cm->ncm...", window, taps[:, :, i])
        out = term if out is None else out + term
    assert out is not None
    return out.reshape(x.shape[0], w.shape[0], *out.shape[3:])


depthwise = differentiated(sum_in_parts, _along_image, few_at_a_time(_product_sum))


# --------------------------------------------------------------------------------------------------
# The choice

apart_by_image = differentiated(apart, apart, few_at_a_time(apart))


def convolve(
    x: Array,
    w: Array,
    stride: PerAxis,
    pads: Pads,
    dilation: PerAxis,
    groups: int,
    repeated: bool = False,
    example: bool = False,
) -> Array:
    """Convolve ``(N, C, *)`` with ``(O, C / groups, *)``, by the lowering that is fastest there.

    Args:
        repeated: whether this is code for a loop, or for many kernels at once: see `repeated_on_cpu`.
        example: whether it is differentiated for each image of a batch by itself.
    """
    how = tuple(stride), tuple((low, high) for low, high in pads), tuple(dilation), groups
    if not for_cpu():
        return general(x, w, *how)
    # A sum over taps is not rounded at each tap; CPUs compute low precision in float32 anyway.
    way = chosen_on_cpu(x, w, *how, repeated, example)
    return way(widened(x), widened(w), *how).astype(x.dtype)


def repeated_on_cpu() -> bool:
    """Say whether a convolution that is traced here is best computed `as_one_product`."""
    return for_cpu() and in_repeated_code()


def for_cpu() -> bool:
    """Say whether the code being traced will most likely run on a CPU.

    It is only about speed: every way is right everywhere. `lax.platform_dependent` would know, but the
    conditional that it leaves in derivatives hides convolutions from XLA's choice of layouts, and the
    gradient of a dense 1-d convolution takes 80 times as long.
    """
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is not None:
        return (chosen if isinstance(chosen, str) else chosen.platform) == "cpu"
    return jax.default_backend() == "cpu"


def _smaller_than_kernel(
    sizes: PerAxis, kernel: PerAxis, stride: PerAxis, pads: Pads, dilation: PerAxis
) -> bool:
    """Say whether along each axis the image, or the output, is smaller than the kernel.

    There XLA's own operation or its gradient has no fast kernel, and takes up to 60 times as long.
    """
    made = _outputs(sizes, kernel, stride, pads, dilation)
    if any(map(jax.export.is_symbolic_dim, sizes)):
        return False  # a size that has a name only is not known to be small
    return all(min(a, b) < k for a, b, k in zip(sizes, made, kernel, strict=True))


def _one_point_wide(kernel: PerAxis, stride: PerAxis, pads: Pads) -> bool:
    """Say whether a kernel over two axes moves along one of them without a width, steps or borders.

    There XLA's own operation takes up to 7 times as long as along one axis, most where the image has one
    position on the other, as in networks of sounds that are written with two axes.
    """
    axes = zip(kernel, stride, pads, strict=True)
    return len(kernel) == 2 and any(k == s == 1 and p == (0, 0) for k, s, p in axes)


def chosen_on_cpu(
    x: Array,
    w: Array,
    stride: PerAxis,
    pads: Pads,
    dilation: PerAxis,
    groups: int,
    repeated: bool,
    example: bool = False,
) -> Callable[..., Array]:
    """Return the way to compute a convolution that is fastest on CPU."""
    taps = math.prod(w.shape[2:])
    if x.size == 0 or w.size == 0 or not jnp.issubdtype(x.dtype, jnp.inexact):
        return general
    if groups > 1 and groups == x.shape[1] and taps <= MOST_TAPS:
        return depthwise
    by_kernel = dense
    # Moving the axes costs more than two taps gain, of which transposed convolutions are made.
    if not repeated and taps > 2 and _one_point_wide(w.shape[2:], stride, pads):
        by_kernel = along_one_axis
    elif (
        _smaller_than_kernel(x.shape[2:], w.shape[2:], stride, pads, dilation) and taps <= MOST_TAPS
    ):
        by_kernel = as_one_product
    elif repeated and taps <= MOST_TAPS:
        # What the taps see of the input. The backward pass makes it again; where it is long, image by image.
        large = _at_least(x.size * taps // math.prod(stride), LARGE_BATCH)
        by_kernel = few_at_a_time(as_one_product) if large else as_one_product
    if example and taps > 1 and by_kernel in (dense, along_one_axis):
        by_kernel = of_example(by_kernel)
    if groups > 1:
        return group_by_group(by_kernel)
    if taps == 1:
        return pointwise
    if len(stride) > 1 and tuple(stride) == w.shape[2:] and set(dilation) == {1}:
        return apart_by_image if _at_least(x.size, LARGE_BATCH) else apart
    return by_kernel


# --------------------------------------------------------------------------------------------------
# Transposed


def general_transposed(
    x: Array,
    w: Array,
    stride: PerAxis,
    padding: PerAxis,
    dilation: PerAxis,
    groups: int,
    sizes: PerAxis,
) -> Array:
    """Convolve, transposed, by XLA's own operation with zeros between the input's elements."""
    spatial = w.shape[2:]
    taken, made = w.shape[0] // groups, w.shape[1]
    kernel = w.reshape(groups, taken, made, *spatial).swapaxes(1, 2)
    kernel = lax.rev(kernel.reshape(groups * made, taken, *spatial), tuple(range(2, w.ndim)))
    pads = []
    for n, k, s, p, d, size in zip(
        x.shape[2:], spatial, stride, padding, dilation, sizes, strict=True
    ):
        low = d * (k - 1) - p
        pads.append((low, size - 1 + d * (k - 1) - s * (n - 1) - low))
    layout = "DHW"[-len(spatial) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        (1,) * len(spatial),
        pads,
        lhs_dilation=tuple(stride),
        rhs_dilation=tuple(dilation),
        dimension_numbers=(f"NC{layout}", f"OI{layout}", f"NC{layout}"),
        feature_group_count=groups,
    )


def _runs(kernel: int, stride: int, dilation: int) -> list[tuple[slice, range]]:
    """Return, along an axis, the outputs between two steps, those together whose taps lie alike.

    Output ``q s + r`` is the sum, over the taps t with ``t d = j s + r``, of input ``q - j`` times tap t. A
    run is a slice of r and the range of j.
    """
    apart = dilation // math.gcd(dilation, stride)

    def back(r: int) -> range:
        found = [t * dilation // stride for t in range(kernel) if t * dilation % stride == r]
        return range(found[0], found[-1] + 1, apart) if found else range(0)

    alike = [(j, list(run)) for j, run in itertools.groupby(range(stride), back)]
    return [(slice(run[0], run[-1] + 1), j) for j, run in alike]


def _split(w: Array, stride: PerAxis, dilation: PerAxis) -> Array:
    """Return taps as (J, s) along each of the last axes, zeros where there are none."""
    lead = w.ndim - len(stride)
    filled, shape = [(0, 0, 0)] * lead, [*w.shape[:lead]]
    for k, s, d in zip(w.shape[lead:], stride, dilation, strict=True):
        covered = d * (k - 1) + 1
        shape += [-(-covered // s), s]
        filled.append((0, -covered % s, d - 1))
    return lax.pad(w, jnp.zeros((), w.dtype), filled).reshape(shape)


def by_phases(
    x: Array,
    w: Array,
    stride: PerAxis,
    padding: PerAxis,
    dilation: PerAxis,
    groups: int,
    sizes: PerAxis,
    repeated: bool,
) -> Array:
    """Convolve, transposed, as convolutions of step 1 that make the outputs between two steps.

    Outputs whose taps lie alike come from one convolution with several outputs a channel, and all are
    interleaved. One convolution for all would multiply by taps of 0, and so spread NaN and infinities.
    """
    n, batch = len(stride), x.shape[0]
    taken, made = w.shape[0] // groups, w.shape[1]
    runs = [_runs(*how) for how in zip(w.shape[2:], stride, dilation, strict=True)]
    w = _split(w.reshape(groups, taken, *w.shape[1:]), stride, dilation)
    # Only the steps that hold an output, of which the first may begin in the padding.
    first = [p // s for p, s in zip(padding, stride, strict=True)]
    last = [(p + size - 1) // s for p, size, s in zip(padding, sizes, stride, strict=True)]
    counts = [b - a + 1 for a, b in zip(first, last, strict=True)]

    def block(run: Sequence[tuple[slice, range]]) -> Array:  # (N, O, *outputs of the run, *steps)
        backs = [j for _, j in run]
        shape = (batch, groups * made, *(r.stop - r.start for r, _ in run), *counts)
        if not all(backs):
            return jnp.zeros(shape, x.dtype)
        kernel = w[:, :, :, *(i for r, j in run for i in (slice(j[0], j[-1] + 1, j.step), r))]
        kernel = lax.rev(kernel, tuple(range(3, 3 + 2 * n, 2)))
        kernel = kernel.transpose(0, 2, *range(4, 4 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))
        kernel = kernel.reshape(-1, taken, *map(len, backs))  # (O · s, C / groups, *J)
        pads = tuple(
            (j[-1] - a, b - j[0] + 1 - size)
            for j, a, b, size in zip(backs, first, last, x.shape[2:], strict=True)
        )
        how = (1,) * n, pads, tuple(j.step for j in backs), groups
        return chosen_on_cpu(x, kernel, *how, repeated)(x, kernel, *how).reshape(shape)

    blocks = [block(run) for run in itertools.product(*runs)]
    for axis in reversed(range(n)):
        size = len(runs[axis])
        blocks = [
            lax.concatenate(blocks[i : i + size], 2 + axis) for i in range(0, len(blocks), size)
        ]
    out = blocks[0].transpose(0, 1, *(axis for i in range(n) for axis in (2 + n + i, 2 + i)))
    out = out.reshape(*out.shape[:2], *(c * s for c, s in zip(counts, stride, strict=True)))
    starts = [p - a * s for p, a, s in zip(padding, first, stride, strict=True)]
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    return lax.slice(out, (0, 0, *starts), (*out.shape[:2], *stops))


def convolve_transposed(
    x: Array,
    w: Array,
    stride: PerAxis,
    padding: PerAxis,
    dilation: PerAxis,
    groups: int,
    sizes: PerAxis,
    repeated: bool = False,
) -> Array:
    """Convolve ``(N, C, *)``, transposed, with ``(C, O / groups, *)`` into ``(N, O, *sizes)``."""
    how = tuple(stride), tuple(padding), tuple(dilation), groups, tuple(sizes)
    if not for_cpu() or not x.size or not w.size:
        return general_transposed(x, w, *how)
    return by_phases(widened(x), widened(w), *how, repeated).astype(x.dtype)
