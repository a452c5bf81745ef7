"""Max, average and power-average pooling."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

INF = np.inf
NAN = np.nan
LINE = array(2, 4, 13)
IMAGE = array(2, 4, 7, 8)
ONE = array(4, 7, 8)  # an image without a batch axis
VOLUME = array(2, 3, 5, 6, 7)
TIES = np.zeros((1, 2, 6, 6), np.float32)
LOWEST = np.full((1, 1, 5, 5), -np.inf, np.float32)
ODD = np.where(array(1, 2, 6, 6) > 0.5, NAN, array(1, 2, 6, 6)).astype(np.float32)
POSITIVE = np.abs(array(2, 3, 6, 7)) + 0.1


def _infinite() -> np.ndarray:
    x = array(1, 2, 6, 6)
    x[0, 0, 2, 3], x[0, 1, 0, 0], x[0, 1, 5, 5] = INF, -INF, NAN
    return x


LAYERS = [
    Case("MaxPool1d", (3,), {}, (LINE,)),
    Case("MaxPool1d", (3, 2, 1), {"return_indices": True}, (LINE,)),
    Case("MaxPool1d", ((3,),), {"stride": (2,), "dilation": 2, "ceil_mode": True}, (LINE,)),
    Case("MaxPool1d", (2,), {}, (array(4, 13),), note="one example"),
    Case("MaxPool1d", (2,), {}, (array(0, 4, 13),), note="no examples"),
    Case("MaxPool1d", (70, 3, 20), {}, (array(2, 2, 150),), note="large window"),
    Case("MaxPool1d", (70, 3, 35), {"return_indices": True}, (np.zeros((1, 2, 150), "f"),)),
    Case("MaxPool2d", (2,), {}, (IMAGE,)),
    Case("MaxPool2d", (2,), {}, (ONE,), note="one example"),
    Case("MaxPool2d", (2,), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("MaxPool2d", (2,), {}, (TIES,), note="ties"),
    Case("MaxPool2d", (3, 2, 1), {}, (TIES,), note="ties"),
    Case("MaxPool2d", (3,), {"stride": 2, "padding": 1}, (IMAGE,)),
    Case("MaxPool2d", (3, 1, 1), {}, (IMAGE,)),
    Case("MaxPool2d", ((3, 2),), {"stride": (1, 2), "padding": (1, 0)}, (IMAGE,)),
    Case("MaxPool2d", ((5, 3),), {"stride": (2, 3), "padding": (2, 1)}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"dilation": 2, "stride": 1}, (IMAGE,)),
    Case("MaxPool2d", (3,), {"dilation": (1, 2), "padding": 1}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"dilation": (3, 4), "stride": (2, 3)}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (3,), {"stride": 3, "padding": 1, "ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"stride": 4, "padding": 1, "ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (1,), {"stride": 3}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"return_indices": True}, (IMAGE,)),
    Case("MaxPool2d", (3, 2, 1), {"return_indices": True}, (IMAGE,)),
    Case("MaxPool2d", (3, 1, 1), {"return_indices": True, "dilation": 2}, (IMAGE,)),
    Case("MaxPool2d", (3, 2, 1), {"return_indices": True}, (TIES,), note="ties"),
    Case("MaxPool2d", (3, 2, 1), {"return_indices": True}, (LOWEST,), note="all -inf"),
    Case("MaxPool2d", (3, 2, 1), {}, (_infinite(),), note="infinite"),
    Case("MaxPool2d", (9, 3, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("MaxPool2d", (9, 3, 4), {"return_indices": True}, (array(2, 3, 12, 11),), note="large"),
    Case("MaxPool2d", (9, 3, 4), {}, (np.zeros((1, 1, 12, 12), np.float32),), note="large, ties"),
    Case("MaxPool2d", (70,), {"return_indices": True}, (array(1, 1, 140, 71),), note="larger"),
    Case("MaxPool3d", (2,), {}, (VOLUME,)),
    Case("MaxPool3d", (3, 2, 1), {"return_indices": True}, (VOLUME,)),
    Case("MaxPool3d", ((2, 3, 1), (1, 2, 2), (1, 0, 0)), {"ceil_mode": True}, (VOLUME,)),
    Case("MaxPool3d", (2,), {"dilation": (1, 2, 3), "return_indices": True}, (VOLUME,)),
    Case("MaxPool3d", (5, 2, 2), {"return_indices": True}, (VOLUME,), note="large window"),
    Case("MaxPool3d", (2,), {}, (array(3, 4, 4, 4),), note="one example"),
    Case("MaxPool3d", (2,), {}, (array(0, 3, 4, 4, 4),), note="no examples"),
    Case("AvgPool1d", (3,), {}, (LINE,)),
    Case("AvgPool1d", (4, 2, 2), {"ceil_mode": True}, (LINE,)),
    Case("AvgPool1d", ((4,), (3,), (1,), True, False), {}, (LINE,)),
    Case("AvgPool1d", (2,), {}, (array(4, 13),), note="one example"),
    Case("AvgPool1d", (2,), {}, (array(0, 4, 13),), note="no examples"),
    Case("AvgPool1d", (70, 3, 20), {}, (array(2, 2, 150),), note="large window"),
    Case("AvgPool2d", (2,), {}, (IMAGE,)),
    Case("AvgPool2d", (2,), {}, (ONE,), note="one example"),
    Case("AvgPool2d", (2,), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("AvgPool2d", ((3, 2),), {"stride": (2, 1), "padding": 1}, (IMAGE,)),
    Case("AvgPool2d", (3, 1, 1), {}, (IMAGE,)),
    Case("AvgPool2d", (2, 3), {}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"count_include_pad": False}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"ceil_mode": True}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"ceil_mode": True, "count_include_pad": False}, (IMAGE,)),
    Case("AvgPool2d", (2, 3, 1), {"ceil_mode": True, "divisor_override": 3}, (IMAGE,)),
    Case("AvgPool2d", (2,), {"divisor_override": -2}, (IMAGE,)),
    Case("AvgPool2d", (9, 2, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("AvgPool2d", (2, 1), {}, (_infinite(),), note="infinite"),
    Case("AvgPool3d", (2,), {}, (VOLUME,), no_low="torch has no such kernel on the CPU"),
    Case("AvgPool3d", ((2, 3, 4), (1, 2, 2), (0, 1, 2), True), {}, (VOLUME,)),
    Case(
        "AvgPool3d",
        (3, 2, 1),
        {"count_include_pad": False, "ceil_mode": True},
        (VOLUME,),
    ),
    Case("AvgPool3d", (5, 2, 2), {"divisor_override": 2}, (VOLUME,), note="large window"),
    Case("AvgPool3d", (2,), {}, (array(3, 4, 4, 4),), note="one example"),
    Case("AvgPool3d", (2,), {}, (array(0, 3, 4, 4, 4),), note="no examples"),
    Case("LPPool1d", (2, 3), {}, (LINE,)),
    Case("LPPool1d", (1.5, 3, 2, True), {}, (np.abs(LINE) + 0.1,)),
    Case("LPPool1d", (INF, 3), {}, (LINE,)),
    Case("LPPool1d", (2, 2), {}, (array(4, 13),), note="one example"),
    Case("LPPool1d", (2, 2), {}, (array(0, 4, 13),), note="no examples"),
    Case("LPPool2d", (2, 2), {}, (IMAGE,)),
    Case("LPPool2d", (3, (2, 3), (1, 2)), {}, (POSITIVE,)),
    Case("LPPool2d", (1.2, 3), {"stride": 2, "ceil_mode": True}, (POSITIVE,)),
    Case("LPPool2d", (-1.0, 2), {}, (POSITIVE,)),
    Case("LPPool2d", (3, 2), {}, (IMAGE,), note="negative sums"),
    Case("LPPool2d", (1, 2), {}, (IMAGE,), note="signed sums"),
    Case("LPPool2d", (0.5, 2), {}, (POSITIVE,)),
    Case("LPPool2d", (INF, 3, 2), {"ceil_mode": True}, (IMAGE,)),
    Case("LPPool2d", (-INF, 3, 2), {}, (IMAGE,)),
    Case("LPPool2d", (2, 2), {}, (TIES,), note="zeros"),
    Case("LPPool2d", (1, 2), {}, (TIES,), note="zeros"),
    Case("LPPool3d", (2, 2), {}, (VOLUME,), no_low="torch has no such kernel on the CPU"),
    Case("LPPool3d", (4, (2, 3, 1), (1, 2, 2), True), {}, (VOLUME,)),
    Case("LPPool3d", (INF, 2), {}, (VOLUME,)),
]

SHORT = np.array([[[1.0, NAN], [3.0, 2.0]]], np.float32)
TWO_NAN = np.array([[[1.0, NAN], [NAN, 2.0]]], np.float32)

FUNCTIONS = [
    Call("max_pool1d", (LINE, 3, 2, 1)),
    Call("max_pool1d", (LINE, 3), {"stride": []}),
    Call("max_pool1d_with_indices", (LINE, 3, 2, 1)),
    Call("max_pool1d", (integers(9, 2, 9), 2), {"return_indices": True}),
    Call("max_pool1d", (np.where(array(1, 150) > 2, NAN, 0).astype("f"), 70, 1), note="large"),
    Call("max_pool2d", (SHORT, 2)),
    Call("max_pool2d", (TWO_NAN, 2), {"return_indices": True}),
    Call("max_pool2d", (ODD, 3, 1, 1), {"return_indices": True}, note="NaN"),
    Call("max_pool2d", (ODD, 3, 2), note="NaN"),
    Call("max_pool2d", (integers(9, 1, 4, 4), 2)),
    Call("max_pool2d", (integers(3, 1, 5, 5) - 9, 3, 2, 1), {"return_indices": True}),
    Call("max_pool2d", (np.array([[[0.0, -0.0], [-0.0, 0.0]]], np.float32), 2)),
    Call("max_pool2d", (np.tile(np.where(array(9, 9) > 1, NAN, 0), (1, 1, 1)).astype("f"), 9)),
    Call("max_pool2d_with_indices", (array(1, 5, 5), 3, 2, 1)),
    Call("max_pool3d", (VOLUME, 2)),
    Call("max_pool3d", (integers(9, 1, 4, 4, 4), 2)),
    Call("max_pool3d_with_indices", (VOLUME, 3, 2, 1)),
    Call("avg_pool1d", (LINE, 3, 2)),
    Call("avg_pool1d", (integers(9, 2, 9) - 5, 2)),
    Call("avg_pool2d", (IMAGE, 3, 2, 1)),
    Call("avg_pool2d", (IMAGE, (2, 3), ())),
    Call("avg_pool2d", (integers(9, 1, 5, 5) - 5, 3, 2, 1, True, False)),
    Call("avg_pool2d", (ODD, 3, 2), note="NaN"),
    Call("avg_pool3d", (VOLUME, 2)),
    Call("avg_pool3d", (integers(9, 1, 4, 4, 4), 2)),
    Call("lp_pool1d", (LINE, 2.0, 3)),
    Call("lp_pool2d", (IMAGE, 2.0, 3, 2)),
    Call("lp_pool2d", (integers(9, 1, 4, 4), float("inf"), 2)),
    Call("lp_pool3d", (VOLUME, 2.0, 2)),
]

DEEP = array(1, 1, 4, 4, 4)
FLAT = array(1, 1, 4, 4)
THIN = array(1, 1, 4)

MISUSE = [
    Call("max_pool1d", (array(0, 1, 49), 2, 50, -1)),
    Call("max_pool1d", (array(0, 1, 49), 2, 50, 4)),
    Call("max_pool1d", (array(0, 1, 49), 3, 1, 3, 2)),
    Call("max_pool1d", (array(), 1)),
    Call("max_pool1d", (array(0, 10), 1)),
    Call("max_pool1d", (array(1, 10, 0), 1)),
    Call("max_pool1d", (array(3, 3, 3), 1, 0)),
    Call("max_pool1d", (array(3, 3, 3), 1, 1, 0, 0)),
    Call("max_pool1d", (array(2, 2, 2), 5, 1)),
    Call("max_pool1d", (array(0, 1, 49), 0)),
    Call("max_pool1d", (THIN, (2, 2))),
    Call("max_pool1d", (THIN > 0, 2)),
    Call("max_pool2d", (FLAT, 2), {"padding": 2}),
    Call("max_pool2d", (FLAT, 5)),
    Call("max_pool2d", (array(1, 0, 4, 4), 2)),
    Call("max_pool2d", (array(4, 4), 2)),
    Call("max_pool2d", (FLAT, (2, 2, 2))),
    Call("max_pool2d", (FLAT, 2.5)),
    Call("max_pool2d", (FLAT, 2), {"stride": 0}),
    Call("max_pool2d", (FLAT > 0, 2)),
    Call("max_pool2d", (array(0, 1, 49), (3, 2), 50, -1)),
    Call("max_pool2d", (array(2, 1, 10, 0), 1)),
    Call("max_pool2d", (array(1, 1, 4), 2)),
    Call("max_pool3d", (array(0, 1, 49, 50), (3, 2, 2), 50, -1)),
    Call("max_pool3d", (array(0, 1, 49, 50), 2, 50, 4)),
    Call("max_pool3d", (array(0, 1, 2, 10), 1)),
    Call("max_pool3d", (array(2, 1, 0, 1, 2), 1)),
    Call("max_pool3d", (array(1, 1, 1, 4, 4), 2)),
    Call("avg_pool1d", (array(0, 1, 49), 2, 50, -1)),
    Call("avg_pool1d", (array(0, 1, 49), 2, 50, 4)),
    Call("avg_pool1d", (THIN, (2, 2))),
    Call("avg_pool2d", (FLAT, 2), {"divisor_override": 0}),
    Call("avg_pool2d", (array(1, 0, 4, 4), 2)),
    Call("avg_pool2d", (FLAT, 2.5)),
    Call("avg_pool2d", (FLAT > 0, 2)),
    Call("avg_pool2d", (array(0, 1, 49), (3, 2), 50, 4)),
    Call("avg_pool3d", (array(3, 3, 3, 3), 2), {"divisor_override": 0}),
    Call("avg_pool3d", (array(0, 1, 49), 2, 50, 0)),
    Call("avg_pool3d", (array(0, 1, 49, 50), 2, 50, -1)),
    Call("lp_pool1d", (array(4), 2.0, 2)),
    Call("lp_pool2d", (FLAT, 0, 2)),
    Call("lp_pool2d", (FLAT, 2.0, 2, 0)),
    Call("lp_pool2d", (FLAT, 2.0, (2, 2, 2))),
    Call("lp_pool3d", (array(4, 4, 4), 2.0, 2)),
]

LAYER_MISUSE = [
    Case("MaxPool2d", (3,), {"stride": 0}, (array(1, 1, 4, 4),)),
    Case("MaxPool2d", (3,), {"stride": -1}, (array(1, 1, 4, 4),)),
    Case("MaxPool2d", (0,), {}, (array(1, 1, 4, 4),)),
    Case("MaxPool2d", (3,), {"padding": -1}, (array(1, 1, 4, 4),)),
    Case("MaxPool2d", (2,), {"dilation": 0}, (array(1, 1, 4, 4),)),
    Case("MaxPool2d", (9,), {}, (array(1, 1, 4, 4),)),
    Case("MaxPool2d", (2,), {}, (array(4, 4),)),
    Case("MaxPool2d", (2,), {}, (array(1, 2, 3, 4, 5),)),
    Case("MaxPool2d", (3,), {"padding": 5}, (array(1, 1, 10, 10),)),
    Case("AvgPool2d", (2,), {"divisor_override": 0}, (array(1, 1, 4, 4),)),
    Case("AvgPool1d", ((2, 2),), {}, (array(1, 1, 4),)),
    Case("LPPool2d", (0, 2), {}, (array(1, 1, 4, 4),)),
]
