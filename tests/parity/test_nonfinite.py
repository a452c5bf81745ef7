"""NaN, infinities, kinks and masked rows: values and gradients beside torch's.

A row is a call of a function of F. Special values are put, one at a time, at the first, a middle and the
last place of the arguments named in `at`, and what both libraries make of it is compared. Each row is
compiled once.

Left out is where torch contradicts itself: a number that is not finite and meets the zeros of a border in
the gradient of a convolution's weight, or a weight that is not finite and meets them forward (by kernel, 0
or NaN); positions of `grid_sample` that are no numbers (by kernel, 0, the nearest pixel, or a crash); NaN in
`gelu` at infinity and in single elements of piecewise functions (vectorised loops and single elements
differ); NaN in the cotangent of an interpolation along an axis that keeps its size (by kernel, it reaches
pixels of weight 0 or not; here not). And where ours is right and torch's overflows or divides 0 by 0:
`soft_margin_loss` of a large negative margin, derivatives by targets of 0 of `kl_div` and
`poisson_nll_loss`, by impossible labels of `ctc_loss`. For a target that does not fit, NaN in the first step
of `ctc_loss` gives NaN here and infinity in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import statefulnn as nn
import statefulnn.functional as F
from tests.parity.oracle import (
    Call,
    Case,
    array,
    close,
    compare,
    flat,
    to_jax,
    to_torch,
)
from tests.parity.rows.attention import (
    BATCH_FIRST,
    CAUSAL,
    KEY,
    QUERY,
    SELF,
    UNBATCHED,
    VALUE,
    K,
    Q,
    V,
    attention,
    forward,
)
from tests.parity.table import TORCH_WARNS, thinned
from tests.quick import QUICKLY, first, quickly

pytestmark = TORCH_WARNS

NAN, INF = np.nan, np.inf
WILD = (NAN, INF, -INF)


@dataclass(eq=False)
class Row(Call):
    """A call, and where special values are put in it.

    The arguments in `grads` are differentiated, without it those in `at`.
    """

    at: tuple[int, ...] = (0,)
    values: tuple[float, ...] = WILD
    grads: tuple[int, ...] | None = None

    def variants(self) -> Iterator[tuple[str, tuple]]:
        """Yield the arguments as they are, and then with each value in each place."""
        yield "as it is", self.args
        for i in self.at:
            size = self.args[i].size
            for place in sorted({0, size // 2, size - 1}):
                for value in self.values:
                    changed = self.args[i].copy()
                    changed.flat[place] = value
                    args = (*self.args[:i], changed, *self.args[i + 1 :])
                    yield f"{value} at {place} of argument {i}", args


# --------------------------------------------------------------------------------------------------
# Activations

# Each 64 times, because torch computes what does not fill a vector register in another way.
KINKS = (0, -0.0, 0.5, -0.5, 1, -1, 3, -3, 6, 20, 20.5, -20, 88, -88, 1e20, -1e20)
EVERYWHERE = np.repeat(np.array([*WILD, *KINKS], np.float32), 64)


def elementwise(name: str, *args: float, **kwargs: Any) -> Row:
    """Make a row that has all special values in one array."""
    x = EVERYWHERE[EVERYWHERE != INF] if name == "gelu" and not kwargs else EVERYWHERE
    return Row(name, (x, *args), kwargs, values=())


X, Y, Z = array(3, 5), array(3, 5, seed=1), array(3, 5, seed=2)
ACTIVATIONS = [
    *map(
        elementwise,
        (
            "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 "
            "rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink"
        ).split(),
    ),
    elementwise("gelu", approximate="tanh"),
    elementwise("celu", 0.5),
    elementwise("celu", -2.0),
    elementwise("elu", 0.0),
    elementwise("leaky_relu", -0.5),
    elementwise("leaky_relu", 0.0),
    elementwise("hardshrink", 0.0),
    elementwise("hardshrink", INF),
    elementwise("softshrink", 0.0),
    elementwise("softshrink", 1.0),
    elementwise("hardtanh", -INF, 1.0),
    elementwise("hardtanh", 1.0, 1.0),
    elementwise("softplus", 2.0, 3.0),
    elementwise("softplus", -1.0),
    Row(
        "softplus", (np.full(64, 87.5, np.float32), 1.0, 100.0), values=(), note="nearly too large"
    ),
    elementwise("threshold", 0.5, 7.0),
    elementwise("threshold", 0.0, NAN),
    Row("prelu", (X, array(5, seed=3)), at=(0, 1), values=(*WILD, 0.0)),
    Row("prelu", (X, array(1, seed=3)), at=(0, 1), values=(*WILD, 0.0)),
    Row("glu", (array(3, 6),)),
    *[Row(name, (X, 1)) for name in ("softmax", "log_softmax", "softmin")],
    Row("softmax", (np.full((2, 3), -INF, np.float32), 1), values=(INF,)),
    Row("log_softmax", (np.full((2, 3), -INF, np.float32), 1), values=(INF,)),
]

# --------------------------------------------------------------------------------------------------
# Losses

SIGNS = np.where(array(3, 5, seed=3) > 0, 1, -1).astype(np.float32)
SHARES = np.random.default_rng(4).dirichlet(np.ones(5), 3).astype(np.float32)
POSITIVE = np.abs(Z) + np.float32(0.1)
CLASSES, LABELS = (
    np.array([0, 4, 2]),
    np.array([[0, 2, -1, 1, 1], [4, 1, 0, -1, 2], [-1, 0, 0, 0, 0]]),
)
TIES = np.array([[1, 0, 2, 1, 0.5], [1, 2, 0, 0.5, 1]], np.float32)  # margins of exactly 0 and 1
ENDS = np.array([-2, -1, -0.5, 0, 0.5, 1, 2], np.float32)
LOG_PROBS = np.log(np.random.default_rng(5).dirichlet(np.ones(4), (6, 2))).astype(np.float32)
SEQUENCES = np.array([[1, 2, 2], [3, 1, 0]])


def loss(name: str, *args: Any, **kwargs: Any) -> Row:
    """Make a row of a loss of each element; `at`, `values` and `note` are those of the row."""
    own = {k: kwargs.pop(k) for k in ("at", "values", "note") if k in kwargs}
    own.setdefault("values", (*WILD, 0.0))
    own.setdefault("at", tuple(i for i in range(2) if args[i].dtype == np.float32))
    return Row(name, args, {"reduction": "none", **kwargs}, **own)


LOSSES = [
    *[loss(name, X, Y) for name in ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss")],
    *[
        loss(name, ENDS, ENDS * 0, **kwargs)
        for name, kwargs in (
            ("l1_loss", {}),
            ("smooth_l1_loss", {}),
            ("smooth_l1_loss", {"beta": 0.5}),
            ("smooth_l1_loss", {"beta": 0.0}),
            ("huber_loss", {"delta": 0.5}),
        )
    ],
    loss("l1_loss", X, Y, weight=POSITIVE),
    loss("poisson_nll_loss", X, POSITIVE, values=WILD),
    loss("poisson_nll_loss", POSITIVE, POSITIVE[::-1].copy(), log_input=False, values=(NAN, INF)),
    loss("poisson_nll_loss", X, POSITIVE * 3, full=True, values=(NAN, INF, 1.0)),
    loss("gaussian_nll_loss", X, Y, POSITIVE, at=(0, 1, 2), values=(NAN, INF, 0.0)),
    loss("gaussian_nll_loss", X, Y, POSITIVE, eps=0.5, at=(2,), values=(INF, 0.5, 0.25)),
    loss("binary_cross_entropy", SHARES, SHARES[::-1].copy(), values=(0.0, 1.0)),
    loss("binary_cross_entropy_with_logits", X, SHARES),
    loss("binary_cross_entropy_with_logits", X, SHARES, weight=POSITIVE, pos_weight=POSITIVE[0]),
    *[
        loss("binary_cross_entropy_with_logits", X, SHARES * 0 + y, pos_weight=POSITIVE[0] * 0 + p)
        for y in (0, 1)
        for p in (0, 1)
    ],
    loss("multilabel_soft_margin_loss", X, (SIGNS + 1) / 2),
    loss("soft_margin_loss", X, SIGNS * SIGNS, at=(0,), values=(NAN, INF, 0.0)),
    loss("hinge_embedding_loss", X, SIGNS, at=(0,), values=(*WILD, 1.0)),
    loss("margin_ranking_loss", X, Y, SIGNS),
    loss("margin_ranking_loss", X, X, SIGNS, note="ties"),
    loss("cosine_embedding_loss", X, Y, np.array([1, -1, 1])),
    loss("cosine_embedding_loss", X * 0, Y, np.array([1, -1, 1]), note="zeros"),
    *[loss("multi_margin_loss", X, CLASSES, p=p) for p in (1, 2)],
    *[loss("multi_margin_loss", TIES, CLASSES[:2], p=p) for p in (1, 2)],
    loss("multi_margin_loss", X, CLASSES, p=2, margin=0.3, weight=POSITIVE[0]),
    loss("multilabel_margin_loss", X, LABELS),
    loss("multilabel_margin_loss", TIES, LABELS[:2]),
    loss("cross_entropy", X, CLASSES),
    loss("cross_entropy", X, CLASSES, weight=POSITIVE[0], label_smoothing=0.2, reduction="mean"),
    loss("cross_entropy", X, CLASSES, ignore_index=4, reduction="mean"),
    loss("cross_entropy", X, SHARES),
    loss("cross_entropy", X * -INF, CLASSES, note="all infinite"),
    loss("nll_loss", X, CLASSES, weight=POSITIVE[0], ignore_index=2, reduction="mean"),
    Row("linear_cross_entropy", (X, array(4, 5), np.array([0, 3, -100])), at=(0, 1)),
    loss("kl_div", X, SHARES, values=WILD),
    loss("kl_div", X, Y, log_target=True),
    *[
        loss("triplet_margin_loss", X, Y, Z, p=p, swap=True, at=(0, 1, 2), values=WILD)
        for p in (1.0, 1.5, 2.0, INF)
    ],
    loss("triplet_margin_loss", X, X, X, eps=0.0, at=(0, 1, 2)),
    *[
        loss(
            "ctc_loss", LOG_PROBS, SEQUENCES, lengths, (3, 2), zero_infinity=zero, at=(0,), values=v
        )
        for zero in (False, True)
        for lengths, v in (
            ((6, 5), (NAN,)),
            ((3, 5), ()),
        )  # three labels, two alike, need four steps
    ],
    *[
        Row("ctc_loss", (log_probs, *rest, lengths, (3, 2)), options, values=(), note=note)
        for note, log_probs in (
            ("one example of NaN", LOG_PROBS + np.array([[0], [NAN]], np.float32)),
            ("one class of NaN", LOG_PROBS + np.array([0, 0, 0, NAN], np.float32)),
        )
        for rest, lengths in (((SEQUENCES,), (6, 5)), ((SEQUENCES.ravel()[:5],), (3, 5)))
        for options in ({"reduction": "sum"}, {"zero_infinity": True})
    ],
]

# --------------------------------------------------------------------------------------------------
# Norms and normalisations

IMAGE = array(2, 4, 3, 3)
DEGREES = (0.5, 1.0, 1.5, 2.0, 3.0, INF, -INF, -1.0)
NORMS = [
    *[Row("normalize", (X, p), values=(*WILD, 0.0)) for p in DEGREES],
    *[Row("normalize", (X * 0, p), note="zeros") for p in (1.5, 2.0)],
    *[Row("pairwise_distance", (X, Y, p), at=(0, 1), values=(*WILD, 0.0)) for p in DEGREES],
    *[Row("pairwise_distance", (X, X, p, 0.0), at=(0, 1)) for p in (1.5, 2.0)],
    *[Row("pdist", (x, p)) for x in (X, X * 0) for p in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, INF)],
    Row("cosine_similarity", (X, Y), at=(0, 1), values=(*WILD, 0.0)),
    Row("cosine_similarity", (X * 0, Y), note="zeros", at=(0, 1)),
    Row("layer_norm", (X, (5,), array(5), array(5, seed=1)), grads=(0, 2, 3)),
    Row("rms_norm", (X, (5,), array(5)), grads=(0, 2)),
    Row("group_norm", (IMAGE, 2, array(4), array(4, seed=1)), grads=(0, 2, 3)),
    Row("instance_norm", (IMAGE,)),
    Row("batch_norm", (IMAGE, None, None, array(4), array(4, seed=1), True), grads=(0, 3, 4)),
    Row("batch_norm", (IMAGE, array(4), array(4) ** 2, array(4), array(4)), grads=(0, 3, 4)),
    Row("local_response_norm", (IMAGE, 3)),
]

# --------------------------------------------------------------------------------------------------
# Convolutions, pools and what else moves windows


def convolution(name: str, x: tuple, weight: tuple, **kwargs: Any) -> Row:
    """Make a row with special values in the image; its gradient, and the weight's without a border."""
    bordered = "transpose" in name and "padding" in kwargs
    return Row(name, (array(*x), array(*weight)), kwargs, grads=(0,) if bordered else (0, 1))


CONVOLUTIONS = [
    convolution("conv_transpose1d", (2, 3, 5), (3, 2, 3)),
    convolution("conv_transpose1d", (2, 3, 5), (3, 2, 5), stride=2, padding=1, output_padding=1),
    convolution("conv_transpose1d", (2, 3, 4), (3, 2, 3), stride=4, dilation=3),
    convolution("conv_transpose1d", (2, 3, 4), (3, 2, 3), stride=4, dilation=6),
    convolution("conv_transpose2d", (2, 3, 4, 3), (3, 2, 3, 2), dilation=2),
    convolution("conv_transpose2d", (2, 3, 4, 3), (3, 2, 3, 3), stride=2, padding=1),
    convolution("conv_transpose2d", (2, 3, 4, 3), (3, 2, 3, 2), stride=3, dilation=2, padding=1),
    convolution("conv_transpose2d", (2, 3, 4, 3), (3, 2, 4, 4), stride=2, padding=1),
    convolution("conv_transpose2d", (2, 3, 4, 3), (3, 2, 1, 1), stride=2),
    convolution("conv_transpose2d", (2, 4, 4, 3), (4, 1, 3, 1), stride=2, groups=4),
    convolution("conv_transpose2d", (2, 4, 4, 3), (4, 2, 3, 1), groups=2),
    convolution("conv_transpose3d", (1, 2, 3, 2, 3), (2, 2, 3, 1, 2), stride=2),
    convolution("conv1d", (2, 3, 7), (2, 3, 3), stride=2, padding=1),
    convolution("conv2d", (2, 3, 7, 6), (2, 3, 3, 2), padding=1),
    convolution("conv2d", (2, 3, 7, 6), (2, 3, 3, 2), stride=2, dilation=2, padding=2),
    convolution("conv2d", (2, 3, 7, 6), (2, 3, 2, 2), stride=2, padding=1),
    convolution("conv2d", (2, 3, 7, 6), (2, 3, 1, 1), stride=2, padding=1),
    convolution("conv2d", (2, 4, 7, 6), (8, 1, 3, 2), groups=4, padding=1),
    convolution("conv2d", (2, 4, 7, 6), (4, 2, 3, 2), groups=2, padding=1),
    convolution("conv2d", (2, 9, 5, 6), (2, 9, 3, 3)),
    convolution("conv3d", (1, 2, 5, 4, 3), (2, 2, 3, 2, 3), padding=1),
    Row("unfold", (array(2, 3, 7, 6), 2), {"dilation": 2, "padding": 1}),
    Row("fold", (array(2, 12, 12), (7, 6), 2), {"stride": 2, "padding": (0, 1)}),
    Row("linear", (X, array(4, 5), array(4)), at=(0, 1, 2)),
    Row("bilinear", (X, array(3, 2), array(4, 5, 2)), at=(0, 1, 2)),
]

LINE, PLANE, VOLUME = array(2, 3, 9), array(2, 3, 7, 6), array(2, 2, 5, 4, 6)
SAMPLES = np.random.default_rng(6).random((2, 3, 2)).astype(np.float32)
PLACES = np.array([[[0, 3, 5], [1, 2, 7], [4, 6, 6]]] * 2)
FLAT = np.zeros((1, 1, 6), np.float32)  # ties, and a root at 0
POOLS = [
    Row("max_pool1d", (LINE, 3, 2, 1)),
    Row("max_pool2d", (PLANE, 3, 1, 1)),
    Row("max_pool2d", (PLANE, 2), {"dilation": 2, "ceil_mode": True}),
    Row("max_pool2d", (np.full((1, 1, 4, 4), -INF, np.float32), 3, 1, 1), values=(NAN, INF)),
    Row("max_pool2d", (array(1, 1, 12, 12), 9, 1), note="a large window"),
    Row("max_pool3d", (VOLUME, 2)),
    Row("avg_pool1d", (LINE, 3, 2, 1)),
    Row("avg_pool2d", (PLANE, 3, 2, 1, True, False)),
    Row("avg_pool2d", (array(1, 1, 12, 12), 9, 1, 2), note="a large window"),
    Row("avg_pool3d", (VOLUME, 2)),
    *[Row(f"adaptive_{kind}_pool2d", (PLANE, n)) for kind in ("avg", "max") for n in (3, 1)],
    *[Row(f"adaptive_{kind}_pool1d", (array(1, 1, 90), 70)) for kind in ("avg", "max")],
    *[Row("lp_pool1d", (LINE, p, 2), values=(*WILD, 0.0)) for p in (1.0, 1.5, 2.0, 3.0, INF, 0.5)],
    *[Row("lp_pool1d", (FLAT, p, 2)) for p in (1.0, 1.5, 2.0, INF)],
    Row("lp_pool2d", (np.abs(PLANE), 1.5, 3, 2, True), values=(*WILD, 0.0)),
    Row("fractional_max_pool2d", (PLANE, 2, (3, 4)), {"_random_samples": SAMPLES}),
    Row("max_unpool1d", (array(2, 3, 3), PLACES, 3)),
]

# --------------------------------------------------------------------------------------------------
# Resampling, borders and tables

GRID = np.random.default_rng(7).uniform(-1.3, 1.3, (2, 4, 5, 2)).astype(np.float32)
GRID_3D = np.random.default_rng(7).uniform(-1.3, 1.3, (2, 2, 1, 3, 3)).astype(np.float32)
AVERAGES = ("bilinear", "bicubic")
BAGS, TABLE = np.array([[0, 2, 4, 2], [1, 1, 4, 0]]), array(5, 3)
FACTORS = array(2, 4, seed=8)
RESAMPLING = [
    *[
        Row("interpolate", (PLANE, size), {"mode": mode})
        for mode in ("nearest", "area", *AVERAGES)
        for size in ((5, 4), (10, 9))
    ],
    *[Row("interpolate", (PLANE,), {"scale_factor": 2, "mode": mode}) for mode in AVERAGES],
    *[
        Row("interpolate", (PLANE, size), {"mode": mode, "antialias": True})
        for mode in AVERAGES
        for size in ((5, 4), (14, 12))
    ],
    Row("interpolate", (LINE, 13), {"mode": "linear", "align_corners": True}),
    Row("interpolate", (VOLUME, 3), {"mode": "trilinear"}),
    *[
        Row("grid_sample", (PLANE, GRID, mode, padding, corners), grads=(0, 1))
        for mode, padding, corners in (
            ("bilinear", "border", False),
            ("bilinear", "border", True),
            ("bilinear", "reflection", False),
            ("nearest", "zeros", False),
            ("bicubic", "zeros", False),
            ("bicubic", "border", True),
            ("bicubic", "reflection", False),
        )
    ],
    *[
        Row("grid_sample", (VOLUME, GRID_3D, "bilinear", padding, False), grads=(0, 1))
        for padding in ("border", "reflection")
    ],
    Row("grid_sample", (PLANE, GRID, "bilinear", "zeros", True), at=(0, 1)),
    *[
        Row("grid_sample", (PLANE, GRID, mode, "border", True), at=(1,), values=(-1, 1, 3, -3))
        for mode in ("bilinear", "nearest")
    ],
    *[
        Row("pad", (PLANE, (2, 1, 1, 2)), {"mode": mode})
        for mode in ("constant", "reflect", "replicate", "circular")
    ],
    Row("pad", (PLANE, (1, -1, -2, 1)), {"value": NAN}),
    Row("pixel_shuffle", (array(2, 8, 3, 2), 2)),
    Row("pixel_unshuffle", (array(2, 2, 4, 6), 2)),
    Row("channel_shuffle", (array(2, 4, 3, 2), 2)),
    Row("embedding", (BAGS, TABLE), {"padding_idx": 2}, at=(1,)),
    Row("embedding", (BAGS, TABLE), {"scale_grad_by_freq": True}, at=(1,)),
    *[
        Row("embedding_bag", (BAGS, TABLE), {"mode": mode, **options}, at=(1,))
        for mode in ("sum", "mean", "max")
        for options in ({}, {"padding_idx": 1})
    ],
    Row("embedding_bag", (BAGS.ravel(), TABLE, np.array([0, 3, 3, 6])), {"mode": "max"}, at=(1,)),
    Row("embedding_bag", (BAGS, TABLE * 0), {"mode": "max"}, note="ties", at=(1,)),
    *[
        Row(
            "embedding_bag",
            (BAGS, TABLE, None, None, 2.0, False, "sum", False, FACTORS, False, padding),
            at=(1, 8),
        )
        for padding in (None, 2)
    ],
    *[
        Row("scaled_dot_product_attention", (Q[:1, :1], K[:1, :1], V[:1, :1]), kwargs, at=(0, 1, 2))
        for kwargs in (
            {},
            {"is_causal": True},
            {"attn_mask": np.arange(30).reshape(5, 6) % 7 < np.arange(5)[:, None]},
        )
    ],
]

ROWS = [*ACTIVATIONS, *LOSSES, *NORMS, *CONVOLUTIONS, *POOLS, *RESAMPLING]


def _first(out: Any) -> Any:
    return flat(out)[0]


def _in_torch(row: Row, args: tuple, chosen: tuple[int, ...]) -> tuple[Any, list[Any], np.ndarray]:
    """Return torch's output, its gradients by the chosen arguments, and the cotangent taken."""
    given = [to_torch(a) for a in args]
    for i in chosen:
        given[i].requires_grad_(True)
    out = _first(getattr(TF, row.name)(*given, **{k: to_torch(v) for k, v in row.kwargs.items()}))
    cotangent = array(*out.shape, seed=100)
    out.backward(torch.as_tensor(cotangent))
    return out, [given[i].grad for i in chosen], cotangent


def _compiled(row: Row, cotangent: np.ndarray, chosen: tuple[int, ...]) -> Callable:
    """Return a function from arguments to our output and gradients, which is compiled once."""
    kwargs = {k: to_jax(v) for k, v in row.kwargs.items()}

    @quickly
    def run(*arrays: Any) -> Any:
        def of(*arrays: Any) -> Any:
            args = list(to_jax(row.args))
            for i, x in zip(chosen, arrays, strict=True):
                args[i] = x
            return _first(getattr(F, row.name)(*args, **kwargs))

        out, back = jax.vjp(of, *arrays)
        return out, back(jnp.asarray(cotangent))

    return lambda args: run(*(to_jax(args[i]) for i in chosen))


@pytest.mark.parametrize("row", thinned(ROWS, every=8))
def test_nan_infinities_and_kinks_go_where_they_go_in_torch(row: Row) -> None:
    chosen = tuple(sorted({*row.at, *(row.grads or ())}))
    compared = row.at if row.grads is None else row.grads
    run = None
    for what, args in row.variants():
        expected, wanted, cotangent = _in_torch(row, args, chosen)
        run = run or _compiled(row, cotangent, chosen)
        out, slopes = run(args)
        close(out, expected, f"value, {what}", 2e-5)
        for i, slope, want in zip(chosen, slopes, wanted, strict=True):
            if i in compared:
                close(slope, want, f"gradient of argument {i}, {what}", 8e-5)


def resized(size: tuple[int, int], mode: str, **kwargs: Any) -> Call:
    """Make a row of an interpolation between pixels."""
    return Call("interpolate", (PLANE[:1, :2], size), {"mode": mode, **kwargs})


@pytest.mark.parametrize(
    "row",
    [
        *[
            resized(size, mode)
            for size in ((5, 4), (10, 9), (14, 18))
            for mode in ("nearest", "nearest-exact", "area", *AVERAGES)
        ],
        *[
            resized(size, mode, **{option: True})
            for size in ((5, 4), (14, 12))
            for mode in AVERAGES
            for option in ("align_corners", "antialias")
        ],
        resized((7, 6), "bicubic"),
        Call("interpolate", (LINE, 13), {"mode": "linear"}),
        Call("interpolate", (VOLUME, (3, 8, 6)), {"mode": "trilinear"}),
    ],
    ids=str,
)
def test_nan_in_the_cotangent_of_an_interpolation_goes_where_it_goes_in_torch(row: Call) -> None:
    image, *rest = row.args
    given = to_torch(image).requires_grad_(True)
    out = TF.interpolate(given, *rest, **row.kwargs)
    back = quickly(
        lambda x, c: jax.vjp(lambda x: F.interpolate(x, *rest, **row.kwargs), x)[1](c)[0]
    )
    for place in (0, out.numel() // 3, out.numel() - 1):
        cotangent = array(*out.shape, seed=100)
        cotangent.flat[place] = NAN
        (wanted,) = torch.autograd.grad(out, given, torch.as_tensor(cotangent), retain_graph=True)
        close(back(to_jax(image), jnp.asarray(cotangent)), wanted, f"NaN at {place}", 8e-5)


def test_a_random_slope_is_1_where_there_is_no_number() -> None:
    compare(Case("RReLU", (0.25, 0.25), {}, (EVERYWHERE,)), training=True, jitted=True)


# --------------------------------------------------------------------------------------------------
# Rows where everything is masked

PADDED = np.zeros((3, 6), bool)
PADDED[1], PADDED[2, 4:] = True, True  # one example whole, one in part
HIDDEN = np.random.default_rng(8).random((5, 6)) < 0.3
HIDDEN[2] = True  # one position sees nothing


def as_numbers(mask: np.ndarray) -> np.ndarray:
    """Return a mask of booleans as one of 0 and -inf."""
    return np.where(mask, -INF, 0).astype(np.float32)


MASKED = [
    attention(note="booleans", key_padding_mask=PADDED),
    attention(note="numbers", key_padding_mask=as_numbers(PADDED)),
    attention(note="both", attn_mask=HIDDEN, key_padding_mask=PADDED),
    attention(attn_mask=HIDDEN, average_attn_weights=False),
    attention(attn_mask=as_numbers(HIDDEN), need_weights=False),
    attention(key_padding_mask=PADDED, need_weights=False),
    attention(UNBATCHED, "one example", key_padding_mask=PADDED[1]),
    attention(BATCH_FIRST, batch_first=True, key_padding_mask=PADDED, average_attn_weights=False),
    attention(SELF, attn_mask=CAUSAL, is_causal=True, key_padding_mask=PADDED[:, :5]),
    attention(add_zero_attn=True, key_padding_mask=PADDED),
    Case(
        "TransformerEncoderLayer",
        (8, 2, 16, 0.0, "gelu"),
        {},
        (QUERY,),
        {"src_mask": CAUSAL, "src_key_padding_mask": PADDED[:, :5]},
    ),
    Case(
        "TransformerDecoderLayer",
        (8, 2, 16, 0.0, "gelu"),
        {},
        (QUERY, KEY),
        {"tgt_key_padding_mask": PADDED[:, :5], "memory_key_padding_mask": PADDED},
    ),
]


@pytest.fixture
def safe_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's attention with weights take the softmax of its attention without: 0 for no terms."""
    monkeypatch.setattr(TF, "softmax", torch.ops.aten._safe_softmax)


@pytest.mark.parametrize("case", first(3, MASKED), ids=str)
@pytest.mark.usefixtures("safe_softmax")
def test_a_row_where_everything_is_masked_attends_to_nothing(case: Case) -> None:
    compare(case, training=True, jitted=True)


@pytest.mark.usefixtures("safe_softmax")
def test_the_function_of_attention_gives_zeros_for_a_masked_row_as_well() -> None:
    call = forward(key_padding_mask=PADDED, attn_mask=HIDDEN)
    arrays = [i for i, x in enumerate(call.args) if isinstance(x, np.ndarray)]

    def of(*given: Any) -> Any:
        args = list(to_jax(call.args))
        for i, x in zip(arrays, given, strict=True):
            args[i] = x
        return F.multi_head_attention_forward(*args, **to_jax(call.kwargs))

    theirs = [to_torch(x) for x in call.args]
    for i in arrays:
        theirs[i].requires_grad_(True)
    expected = flat(TF.multi_head_attention_forward(*theirs, **to_torch(call.kwargs)))
    torch.stack([x.square().sum() for x in expected]).sum().backward()
    squares = lambda *given: sum((x**2).sum() for x in flat(of(*given)))
    step = lambda *given: (of(*given), jax.grad(squares, range(len(given)))(*given))
    outs, slopes = quickly(step)(*(to_jax(call.args[i]) for i in arrays))
    for ours, wanted in zip(outs, expected, strict=True):
        close(ours, wanted, "output", 2e-5)
    for ours, i in zip(slopes, arrays, strict=True):
        close(ours, theirs[i].grad, f"gradient of argument {i}", 2e-4)


def test_weights_of_a_padded_example_are_zero_and_every_gradient_is_a_number() -> None:
    model = nn.MultiheadAttention(8, 2)
    inputs = to_jax((QUERY, KEY, VALUE))

    def squares(model: nn.MultiheadAttention, q: Any, k: Any, v: Any) -> Any:
        out, weights = model(q, k, v, key_padding_mask=jnp.asarray(PADDED))
        return (out**2).sum() + (weights**2).sum(), weights

    step = nn.value_and_grad(squares, argnums=(0, 1, 2, 3), has_aux=True)
    (_, weights), grads = nn.jit(step, compiler_options=QUICKLY)(model, *inputs)
    np.testing.assert_array_equal(weights[1], np.zeros((5, 6)))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
