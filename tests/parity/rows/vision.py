"""Sampling grids, and rearrangements of channels and pixels."""

from __future__ import annotations

import itertools

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

IMAGE = array(2, 3, 5, 6)
VOLUME = array(2, 2, 3, 4, 5)
NEAR = array(2, 4, 3, 2, seed=1) * np.float32(0.4)
FAR = array(2, 4, 3, 2, seed=2) * np.float32(2.5)
DEEP = array(2, 2, 3, 4, 3, seed=3)
# The corners, the centre, an edge, and far outside.
EXACT = np.array([[[[-1, -1], [1, 1], [0, 0], [1, 0.25], [-7.3, 9.1]]]], "float32")

LAYERS = [
    Case("PixelShuffle", (2,), {}, (array(2, 8, 3, 4),)),
    Case("PixelShuffle", (3,), {}, (array(9, 2, 3),), note="no batch"),
    Case("PixelShuffle", (2,), {}, (array(2, 3, 4, 2, 2),), note="two batch axes"),
    Case("PixelUnshuffle", (2,), {}, (array(2, 3, 4, 6),)),
    Case("PixelUnshuffle", (3,), {}, (array(1, 3, 6),), note="no batch"),
    Case("ChannelShuffle", (2,), {}, (array(2, 6, 3, 4),)),
    Case("ChannelShuffle", (3,), {}, (array(2, 6, 3),)),
    Case("ChannelShuffle", (1,), {}, (array(2, 4, 3, 2, 2),)),
    Case("ChannelShuffle", (2,), {}, (array(0, 4, 3),), note="no examples"),
]

KINDS = list(
    itertools.product(
        ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (False, True)
    )
)


FUNCTIONS = [
    *[Call("grid_sample", (IMAGE, NEAR, *kind)) for kind in KINDS],
    *[Call("grid_sample", (IMAGE, FAR, *kind), note="far") for kind in KINDS],
    *[Call("grid_sample", (VOLUME, DEEP, *kind)) for kind in KINDS if kind[0] != "bicubic"],
    *[Call("grid_sample", (IMAGE[:1], EXACT, *kind), note="exact") for kind in KINDS],
    Call("grid_sample", (array(1, 2, 1, 4), EXACT, "bilinear", "reflection", True), note="a row"),
    Call("grid_sample", (array(2, 0, 4, 4), NEAR, "bilinear", "zeros", False), note="no channels"),
    Call("grid_sample", (array(0, 3, 4, 4), array(0, 2, 2, 2), "bilinear", "zeros", False)),
    Call("grid_sample", (IMAGE, array(2, 0, 3, 2), "bilinear", "zeros", False), note="no places"),
    Call("affine_grid", (array(2, 2, 3), (2, 1, 4, 5), False)),
    Call("affine_grid", (array(2, 2, 3), (2, 1, 4, 5), True)),
    Call("affine_grid", (array(2, 2, 3), [2, 1, 1, 3], False)),
    Call("affine_grid", (array(2, 3, 4), (2, 3, 3, 4, 1), False)),
    Call("affine_grid", (array(2, 3, 4), (2, 3, 3, 4, 2), True)),
    Call("pixel_shuffle", (integers(9, 1, 9, 2, 2), 3)),
    Call("pixel_shuffle", (array(2, 0, 2, 2), 3), no_grad="torch fails on its own gradient"),
    Call("pixel_unshuffle", (array(2, 3, 1, 6, 3), 3)),
    Call("channel_shuffle", (integers(9, 2, 6, 2), 3)),
    Call("channel_shuffle", (array(2, 6, 2), 2)),
    Call("native_channel_shuffle", (array(2, 6, 2, 2), 3), no_grad="torch has no derivative of it"),
    Call("one_hot", (integers(5, 3, 4), 6)),
    Call("one_hot", (integers(5, 3, 4),)),
    Call("one_hot", (integers(5, 3, 0), 4)),
    Call("one_hot", (np.array(2), 3)),
    Call("grouped_mm", (array(2, 3, 8), array(2, 8, 4))),
    Call("grouped_mm", (array(5, 8), array(2, 8, 4)), {"offs": np.array([2, 5], "int32")}),
    Call("grouped_mm", (array(5, 8), array(3, 8, 4)), {"offs": np.array([2, 2, 5], "int32")}),
    Call("grouped_mm", (array(2, 5, 8), array(8, 8)), {"offs": np.array([3, 8], "int32")}),
    Call("grouped_mm", (array(4, 8), array(8, 8)), {"offs": np.array([3, 8], "int32")}),
]

MISUSE = [
    Call("grid_sample", (IMAGE, NEAR, "linear")),
    Call("grid_sample", (IMAGE, NEAR, "bilinear", "wrap")),
    Call("grid_sample", (IMAGE, NEAR[:1]), {"align_corners": False}),
    Call("grid_sample", (IMAGE, NEAR[0]), {"align_corners": False}),
    Call("grid_sample", (IMAGE[0], NEAR), {"align_corners": False}),
    Call("grid_sample", (IMAGE, array(2, 4, 3, 3)), {"align_corners": False}),
    Call("grid_sample", (VOLUME, DEEP, "bicubic"), {"align_corners": False}),
    Call("grid_sample", (array(2, 3, 0, 4), NEAR), {"align_corners": False}),
    Call("grid_sample", (integers(9, 2, 3, 4, 4), NEAR), {"align_corners": False}),
    Call("affine_grid", (array(2, 3, 3), (2, 1, 3, 3), False)),
    Call("affine_grid", (array(2, 2, 3), (3, 1, 3, 3), False)),
    Call("affine_grid", (array(2, 2, 3), (2, 1, 0, 3), False)),
    Call("affine_grid", (array(2, 2, 3), (2, 1, 3), False)),
    Call("affine_grid", (array(2, 2, 3), (2, 1, 3, 3, 3), False)),
    Call("affine_grid", (array(2, 3), (2, 1, 3, 3), False)),
    Call("affine_grid", (integers(3, 2, 2, 3), (2, 1, 3, 3), False)),
    Call("pixel_shuffle", (array(1, 9, 2, 2), 3.0)),
    Call("pixel_unshuffle", (array(1, 1, 6, 6), 0)),
    Call("native_channel_shuffle", (array(1, 5, 2), 2)),
    Call("one_hot", (np.array([0, 4]), 2)),
    Call("one_hot", (np.array([0, -1]), 3)),
    Call("one_hot", (np.array([0, -1]),)),
    Call("one_hot", (np.array([0]), 0)),
    Call("one_hot", (np.array([0]), -2)),
    Call("one_hot", (np.zeros(0, int),)),
    Call("one_hot", (array(3), 2)),
    Call("one_hot", (np.array([True]), 2)),
    Call("grouped_mm", (array(5, 8), array(2, 8, 4))),
    Call("grouped_mm", (array(2, 3, 8), array(2, 8, 4)), {"offs": np.array([1, 2], "int32")}),
    Call("grouped_mm", (array(5, 8), array(2, 7, 4)), {"offs": np.array([1, 2], "int32")}),
    Call("grouped_mm", (array(5, 8), array(2, 8, 4)), {"offs": np.array([1, 2, 3], "int32")}),
    Call("grouped_mm", (array(5, 8), array(2, 8, 4)), {"offs": np.array([[1, 2]], "int32")}),
    Call("grouped_mm", (array(3, 3, 8), array(2, 8, 4))),
    Call("grouped_mm", (array(8), array(8, 4)), {"offs": np.array([1, 2], "int32")}),
    Call(
        "grouped_mm",
        (array(5, 8), array(2, 8, 4)),
        {"offs": np.array([1, 2], "int32"), "bias": array(2, 4)},
    ),
]

LAYER_MISUSE = [
    Case("PixelShuffle", (3,), {}, (array(1, 8, 2, 2),)),
    Case("PixelShuffle", (3,), {}, (array(2, 2),)),
    Case("PixelShuffle", (0,), {}, (array(1, 9, 2, 2),)),
    Case("PixelShuffle", (-3,), {}, (array(1, 9, 2, 2),)),
    Case("PixelUnshuffle", (3,), {}, (array(1, 1, 6, 5),)),
    Case("PixelUnshuffle", (3,), {}, (array(1, 1, 5, 6),)),
    Case("PixelUnshuffle", (3,), {}, (array(6, 6),)),
    Case("PixelUnshuffle", (-1,), {}, (array(1, 1, 6, 6),)),
    Case("ChannelShuffle", (3,), {}, (array(1, 5, 2),)),
    Case("ChannelShuffle", (3,), {}, (array(1, 6),)),
    Case("ChannelShuffle", (0,), {}, (array(1, 6, 2),)),
    Case("ChannelShuffle", (-2,), {}, (array(1, 6, 2),)),
]
