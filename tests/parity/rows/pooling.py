"""Pooling."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

INF = np.inf
NAN = np.nan
IMAGE = array(2, 4, 7, 8)
ONE = array(4, 7, 8)  # an image without a batch axis
TIES = np.zeros((1, 2, 6, 6), np.float32)

LAYERS = [
    Case("MaxPool2d", (2,), {}, (IMAGE,)),
    Case("MaxPool2d", (2,), {}, (ONE,), note="one example"),
    Case("MaxPool2d", (2,), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("MaxPool2d", (2,), {}, (TIES,), note="ties"),
    Case("MaxPool2d", (3, 2, 1), {}, (TIES,), note="ties"),
    Case("MaxPool2d", (3,), {"stride": 2, "padding": 1}, (IMAGE,)),
    Case("MaxPool2d", ((3, 2),), {"stride": (1, 2), "padding": (1, 0)}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"dilation": 2, "stride": 1}, (IMAGE,)),
    Case("MaxPool2d", (3,), {"dilation": (1, 2), "padding": 1}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (3,), {"stride": 3, "padding": 1, "ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"stride": 4, "padding": 1, "ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"return_indices": True}, (IMAGE,)),
    Case("MaxPool2d", (3, 2, 1), {"return_indices": True}, (IMAGE,)),
    Case("MaxPool2d", (3, 2, 1), {"return_indices": True}, (TIES,), note="ties"),
    Case(
        "MaxPool2d",
        (3, 2, 1),
        {"return_indices": True},
        (np.full((1, 1, 5, 5), -np.inf, np.float32),),
        note="all -inf",
    ),
    Case("MaxPool2d", (9, 3, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("MaxPool2d", (9, 3, 4), {"return_indices": True}, (array(2, 3, 12, 11),), note="large"),
    Case("MaxPool2d", (9, 3, 4), {}, (np.zeros((1, 1, 12, 12), np.float32),), note="large, ties"),
    Case("AvgPool2d", (2,), {}, (IMAGE,)),
    Case("AvgPool2d", (2,), {}, (ONE,), note="one example"),
    Case("AvgPool2d", ((3, 2),), {"stride": (2, 1), "padding": 1}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"count_include_pad": False}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"ceil_mode": True}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"ceil_mode": True, "count_include_pad": False}, (IMAGE,)),
    Case("AvgPool2d", (2, 3, 1), {"ceil_mode": True, "divisor_override": 3}, (IMAGE,)),
    Case("AvgPool2d", (9, 2, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("AdaptiveAvgPool2d", (1,), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((7, 4),), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((3, 5),), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((10, 11),), {}, (IMAGE,), note="larger than the input"),
    Case("AdaptiveAvgPool2d", ((None, 3),), {}, (ONE,), note="one example"),
    Case("AdaptiveAvgPool2d", (2,), {}, (array(0, 4, 7, 8),), note="no examples"),
]

FUNCTIONS = [
    Call("max_pool2d", (np.array([[[1.0, NAN], [3.0, 2.0]]], np.float32), 2)),
    Call(
        "max_pool2d",
        (np.array([[[1.0, NAN], [NAN, 2.0]]], np.float32), 2),
        {"return_indices": True},
    ),
    Call("max_pool2d", (integers(9, 1, 4, 4), 2)),
    Call("max_pool2d_with_indices", (array(1, 5, 5), 3, 2, 1)),
]

MISUSE = [
    Call("max_pool2d", (array(1, 1, 4, 4), 2), {"padding": 2}),
    Call("max_pool2d", (array(1, 1, 4, 4), 5)),
    Call("max_pool2d", (array(1, 0, 4, 4), 2)),
    Call("max_pool2d", (array(4, 4), 2)),
    Call("max_pool2d", (array(1, 1, 4, 4), (2, 2, 2))),
    Call("max_pool2d", (array(1, 1, 4, 4), 2), {"stride": 0}),
    Call("avg_pool2d", (array(1, 1, 4, 4), 2), {"divisor_override": 0}),
    Call("avg_pool2d", (array(1, 0, 4, 4), 2)),
    Call("adaptive_avg_pool2d", (array(1, 1, 0, 4), (2, 2))),
    Call("adaptive_avg_pool2d", (array(1, 1, 4, 4), (-2, 2))),
]
