"""Pooling whose windows are not of one size: adaptive, fractional, and the inverse of max pooling."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

NAN = np.nan
LINE = array(2, 4, 13)
IMAGE = array(2, 4, 7, 8)
ONE = array(4, 7, 8)  # an image without a batch axis
VOLUME = array(2, 3, 5, 6, 7)
TIES = np.zeros((1, 2, 7, 6), np.float32)
LOWEST = np.full((1, 1, 5, 5), -np.inf, np.float32)
ODD = np.where(array(1, 2, 7, 6) > 1.5, NAN, array(1, 2, 7, 6)).astype(np.float32)

NO_BACKWARD = "torch refuses empty outputs in its backward pass"


def _samples(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).random(shape, np.float32)


def _indices(high: int, *shape: int) -> np.ndarray:
    """Draw indices of which none repeats within a channel."""
    rng = np.random.default_rng((high, *shape))
    count = int(np.prod(shape[2:]))
    rows = [rng.permutation(high)[:count] for _ in range(shape[0] * shape[1])]
    return np.stack(rows).reshape(shape)


LAYERS = [
    Case("AdaptiveAvgPool1d", (5,), {}, (LINE,)),
    Case("AdaptiveAvgPool1d", ((1,),), {}, (LINE,)),
    Case("AdaptiveAvgPool1d", (20,), {}, (LINE,), note="larger than the input"),
    Case("AdaptiveAvgPool1d", (4,), {}, (array(4, 12),), note="one example"),
    Case("AdaptiveAvgPool1d", (4,), {}, (array(0, 4, 13),), note="no examples"),
    Case("AdaptiveAvgPool1d", (70,), {}, (array(2, 2, 100),), note="many windows"),
    Case("AdaptiveAvgPool2d", (1,), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((7, 4),), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((3, 5),), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((3, 5),), {}, (ODD,), note="NaN"),
    Case("AdaptiveAvgPool2d", ((10, 11),), {}, (IMAGE,), note="larger than the input"),
    Case("AdaptiveAvgPool2d", ((None, 3),), {}, (ONE,), note="one example"),
    Case("AdaptiveAvgPool2d", (2,), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("AdaptiveAvgPool3d", ((2, 3, 4),), {}, (VOLUME,)),
    Case("AdaptiveAvgPool3d", (1,), {}, (VOLUME,)),
    Case("AdaptiveAvgPool3d", ((5, None, 7),), {}, (array(3, 5, 6, 7),), note="one example"),
    Case("AdaptiveMaxPool1d", (5,), {}, (LINE,)),
    Case("AdaptiveMaxPool1d", (5,), {"return_indices": True}, (LINE,)),
    Case("AdaptiveMaxPool1d", (20,), {"return_indices": True}, (LINE,), note="larger"),
    Case("AdaptiveMaxPool1d", (4,), {"return_indices": True}, (array(4, 12),), note="one example"),
    Case("AdaptiveMaxPool1d", (4,), {}, (array(0, 4, 13),), note="no examples"),
    Case("AdaptiveMaxPool1d", (70,), {}, (array(2, 2, 100),), note="many windows"),
    Case("AdaptiveMaxPool2d", ((70, 3),), {"return_indices": True}, (array(2, 2, 100, 7),)),
    Case("AdaptiveMaxPool2d", ((3, 5),), {}, (IMAGE,)),
    Case("AdaptiveMaxPool2d", ((3, 5),), {"return_indices": True}, (IMAGE,)),
    Case("AdaptiveMaxPool2d", ((7, 4),), {"return_indices": True}, (IMAGE,), note="even"),
    Case("AdaptiveMaxPool2d", (1,), {}, (IMAGE,)),
    Case("AdaptiveMaxPool2d", (1,), {"return_indices": True}, (array(1, 2, 9, 9),), note="large"),
    Case("AdaptiveMaxPool2d", (4,), {"return_indices": True}, (TIES,), note="ties"),
    Case("AdaptiveMaxPool2d", (3,), {"return_indices": True}, (LOWEST,), note="all -inf"),
    Case("AdaptiveMaxPool2d", ((10, 11),), {"return_indices": True}, (IMAGE,), note="larger"),
    Case("AdaptiveMaxPool2d", ((None, 3),), {}, (ONE,), note="one example"),
    Case("AdaptiveMaxPool3d", ((2, 3, 4),), {}, (VOLUME,)),
    Case("AdaptiveMaxPool3d", ((2, 4, 4),), {"return_indices": True}, (VOLUME,)),
    Case("AdaptiveMaxPool3d", ((1, 2, 7),), {"return_indices": True}, (VOLUME,), note="even"),
    Case("AdaptiveMaxPool3d", (2,), {}, (array(0, 3, 5, 6, 7),), note="no examples"),
    Case(
        "MaxUnpool1d",
        (2,),
        {},
        (array(2, 3, 5), _indices(10, 2, 3, 5)),
    ),
    Case("MaxUnpool1d", (3, 2, 1), {}, (array(1, 3, 5), _indices(9, 1, 3, 5))),
    Case(
        "MaxUnpool1d",
        (2,),
        {},
        (array(3, 5), _indices(11, 1, 3, 5)[0]),
        {"output_size": (11,)},
        note="one example",
    ),
    Case("MaxUnpool2d", (2,), {}, (array(2, 3, 4, 5), _indices(80, 2, 3, 4, 5))),
    Case(
        "MaxUnpool2d",
        ((3, 2), (2, 1), (1, 0)),
        {},
        (array(2, 3, 4, 5), _indices(42, 2, 3, 4, 5)),
        {"output_size": (2, 3, 8, 6)},
    ),
    Case(
        "MaxUnpool2d",
        (2,),
        {},
        (array(2, 3, 3, 3), np.full((2, 3, 3, 3), 5)),
        note="one place for all",
    ),
    Case("MaxUnpool2d", (2,), {}, (array(0, 3, 4, 5), integers(9, 0, 3, 4, 5)), note="none"),
    Case("MaxUnpool3d", (2,), {}, (array(2, 3, 2, 3, 2), _indices(96, 2, 3, 2, 3, 2))),
    Case(
        "MaxUnpool3d",
        (2,),
        {},
        (array(3, 2, 3, 2), _indices(96, 1, 3, 2, 3, 2)[0]),
        {"output_size": (5, 6, 4)},
        note="one example",
    ),
    Case(
        "FractionalMaxPool2d",
        (2, (3, 4)),
        {"_random_samples": _samples(2, 4, 2)},
        (IMAGE,),
        no_low="torch places the windows in the low precision, where samples collapse",
    ),
    Case(
        "FractionalMaxPool2d",
        ((3, 2),),
        {"output_ratio": (0.5, 0.7), "return_indices": True, "_random_samples": _samples(2, 4, 2)},
        (IMAGE,),
    ),
    Case(
        "FractionalMaxPool2d",
        (2,),
        {"output_ratio": 0.5, "return_indices": True, "_random_samples": _samples(3, 4, 2)},
        (ONE,),
        note="one example",
    ),
    Case(
        "FractionalMaxPool2d",
        (3, (1, 4)),
        {"return_indices": True, "_random_samples": _samples(1, 2, 2)},
        (ODD,),
        note="NaN",
    ),
    Case(
        "FractionalMaxPool2d",
        (3, 4),
        {"return_indices": True, "_random_samples": _samples(1, 2, 2)},
        (TIES,),
        note="ties",
    ),
    Case(
        "FractionalMaxPool3d",
        (2, (3, 4, 5)),
        {"_random_samples": _samples(2, 3, 3)},
        (VOLUME,),
        no_low="torch places the windows in the low precision, where samples collapse",
    ),
    Case(
        "FractionalMaxPool3d",
        ((1, 2, 3),),
        {"output_ratio": 0.5, "return_indices": True, "_random_samples": _samples(2, 3, 3)},
        (VOLUME,),
    ),
    Case(
        "FractionalMaxPool3d",
        (2, 2),
        {"_random_samples": _samples(1, 3, 3)},
        (array(0, 3, 5, 6, 7),),
        note="no examples",
    ),
]

FUNCTIONS = [
    Call("adaptive_avg_pool1d", (LINE, 5)),
    Call("adaptive_avg_pool2d", (IMAGE, (3, None))),
    Call("adaptive_avg_pool3d", (VOLUME, 2)),
    Call("adaptive_avg_pool2d", (array(2, 0, 7, 8), 2), no_grad=NO_BACKWARD),
    Call("adaptive_avg_pool2d", (IMAGE, 0), no_grad=NO_BACKWARD),
    Call("adaptive_max_pool2d", (IMAGE, (0, 3), True), no_grad=NO_BACKWARD),
    Call("adaptive_max_pool1d", (LINE, 5)),
    Call("adaptive_max_pool1d_with_indices", (LINE, 5)),
    Call("adaptive_max_pool2d", (IMAGE, (3, 5))),
    Call("adaptive_max_pool2d", (ODD, (3, 4)), {"return_indices": True}, note="NaN"),
    Call("adaptive_max_pool2d_with_indices", (IMAGE, (3, 5))),
    Call("adaptive_max_pool3d", (VOLUME, (2, 3, 4))),
    Call("adaptive_max_pool3d_with_indices", (VOLUME, (2, 3, 4))),
    Call("max_unpool1d", (array(2, 3, 5), _indices(10, 2, 3, 5), 2)),
    Call("max_unpool2d", (array(2, 3, 4, 5), _indices(80, 2, 3, 4, 5), 2)),
    Call("max_unpool3d", (array(2, 3, 2, 3, 2), _indices(96, 2, 3, 2, 3, 2), 2)),
    Call("fractional_max_pool2d", (IMAGE, 2, (3, 4)), {"_random_samples": _samples(2, 4, 2)}),
    Call(
        "fractional_max_pool2d",
        (IMAGE, 2),
        {"output_ratio": (0.4, 0.6), "_random_samples": _samples(2, 4, 2)},
    ),
    Call(
        "fractional_max_pool2d_with_indices",
        (IMAGE, 2, (3, 4)),
        {"_random_samples": _samples(2, 4, 2)},
    ),
    Call("fractional_max_pool3d", (VOLUME, 2, 3), {"_random_samples": _samples(2, 3, 3)}),
    Call(
        "fractional_max_pool3d_with_indices",
        (VOLUME, 2, 3),
        {"_random_samples": _samples(2, 3, 3)},
    ),
]

FLAT = array(1, 1, 4, 4)
PLACES = np.zeros((1, 1, 4, 4), np.int64)

MISUSE = [
    Call("adaptive_avg_pool1d", (array(1, 2, 3), ())),
    Call("adaptive_avg_pool1d", (array(1, 1, 1), (-1,))),
    Call("adaptive_avg_pool1d", (array(1, 1, 3), None)),
    Call("adaptive_avg_pool1d", (array(1, 1, 3), 2.0)),
    Call("adaptive_avg_pool2d", (array(1, 1, 0, 4), (2, 2))),
    Call("adaptive_avg_pool2d", (FLAT, (-2, 2))),
    Call("adaptive_avg_pool2d", (array(2, 2), (2, 2))),
    Call("adaptive_avg_pool2d", (FLAT, ())),
    Call("adaptive_avg_pool2d", (FLAT, (2,))),
    Call("adaptive_avg_pool2d", (FLAT, None)),
    Call("adaptive_avg_pool2d", (integers(5, 1, 4, 4), 2)),
    Call("adaptive_avg_pool3d", (array(2, 2, 2), (2, 2, 2))),
    Call("adaptive_avg_pool3d", (array(1, 2, 3, 4), ())),
    Call("adaptive_avg_pool3d", (array(1, 1, 1, 1, 1), (-1, 0, 2))),
    Call("adaptive_avg_pool3d", (array(1, 0, 4, 4, 4), 2)),
    Call("adaptive_max_pool1d", (array(1, 2, 3), ())),
    Call("adaptive_max_pool1d", (array(1, 1, 1), (-1,))),
    Call("adaptive_max_pool1d", (array(1, 0, 3), 1)),
    Call("adaptive_max_pool2d", (array(2, 2), (2, 2))),
    Call("adaptive_max_pool2d", (FLAT, ())),
    Call("adaptive_max_pool2d", (FLAT, (-1, 0))),
    Call("adaptive_max_pool2d", (FLAT, 2.0)),
    Call("adaptive_max_pool2d", (integers(5, 1, 4, 4), 2)),
    Call("adaptive_max_pool3d", (array(2, 2, 2), (2, 2, 2))),
    Call("adaptive_max_pool3d", (array(1, 2, 3, 4), ())),
    Call("adaptive_max_pool3d", (array(1, 1, 1, 1, 1), (-1, 0, 2))),
    Call("max_unpool1d", (array(8, 8), np.zeros((8, 7), np.int64), 3, 2)),
    Call("max_unpool2d", (FLAT, PLACES[..., :1], 3, 2)),
    Call("max_unpool2d", (FLAT, PLACES - 1, 2)),
    Call("max_unpool2d", (FLAT, PLACES + 64, 2)),
    Call("max_unpool2d", (FLAT, array(1, 1, 4, 4), 2)),
    Call("max_unpool2d", (FLAT, PLACES, 2), {"output_size": (20, 20)}),
    Call("max_unpool2d", (FLAT, PLACES, 2), {"output_size": (8, 8, 8)}),
    Call("max_unpool2d", (FLAT, PLACES, 2), {"output_size": 8}),
    Call("max_unpool2d", (FLAT, PLACES, 2, 1, 10)),
    Call("max_unpool2d", (FLAT[0, 0], PLACES[0, 0], 2)),
    Call("max_unpool2d", (FLAT[:, :0], PLACES[:, :0], 2)),
    Call("max_unpool3d", (array(1, 1, 4, 4, 4), np.zeros((1, 1, 4, 4, 1), np.int64), 3, 2)),
    Call("max_unpool3d", (array(1, 2, 2, 2), np.zeros((1, 2, 2, 2), np.int64), 2, 0)),
    Call("fractional_max_pool2d", (FLAT, 2)),
    Call("fractional_max_pool2d", (FLAT, 3, 3)),
    Call("fractional_max_pool2d", (FLAT, 2), {"output_ratio": (0.5, 0.5, 0.5)}),
    Call("fractional_max_pool2d", (FLAT, 2), {"output_ratio": (1.5, 0.5)}),
    Call("fractional_max_pool2d", (array(1, 0, 4, 4), 2, 2)),
    Call("fractional_max_pool2d", (integers(5, 1, 4, 4), 2, 2)),
    Call("fractional_max_pool2d", (FLAT, 2, 2), {"_random_samples": _samples(1, 2, 2)}),
    Call("fractional_max_pool2d", (FLAT, 2, 2), {"_random_samples": _samples(1, 1, 3)}),
    Call("fractional_max_pool2d", (FLAT, 2, 2), {"_random_samples": _samples(1, 2)}),
    Call("fractional_max_pool2d", (FLAT, 2, 2), {"_random_samples": integers(2, 1, 1, 2)}),
    Call("fractional_max_pool3d", (array(1, 1, 4, 4, 4), 2)),
    Call("fractional_max_pool3d", (array(1, 1, 4, 4, 4), 3, 3)),
]

LAYER_MISUSE = [
    Case("AdaptiveAvgPool2d", ((2, 2, 2),), {}, (FLAT,)),
    Case("AdaptiveMaxPool2d", ((-2, 2),), {}, (FLAT,)),
    Case("MaxUnpool2d", (2,), {}, (FLAT, PLACES + 64)),
    Case("FractionalMaxPool2d", (2,), {}, (FLAT,)),
    Case("FractionalMaxPool2d", (2, 2, 0.5), {}, (FLAT,)),
    Case("FractionalMaxPool2d", (2,), {"output_ratio": (0.5, 1.0)}, (FLAT,)),
    Case("FractionalMaxPool3d", (2,), {}, (FLAT,)),
    Case("FractionalMaxPool3d", (2, 2, 0.5), {}, (FLAT,)),
    Case("FractionalMaxPool3d", (2,), {"output_ratio": 0.0}, (FLAT,)),
    Case("FractionalMaxPool3d", (0, 2), {}, (FLAT,)),
    Case("FractionalMaxPool3d", ((2, -1, 2), 2), {}, (FLAT,)),
]
