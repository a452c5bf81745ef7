"""Interpolation."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

SERIES = array(2, 3, 7)
IMAGE = array(2, 3, 5, 6)
VOLUME = array(2, 2, 3, 4, 5)
BYTES = integers(256, 2, 3, 9, 7).astype("uint8")
ROUNDED = "torch's gradient is not that of its forward for this factor: see test_upsampling.py"

LAYERS = [
    Case("Upsample", (), {"scale_factor": 2.3, "mode": "bilinear"}, (IMAGE,)),
    Case("Upsample", (None, 2), {}, (SERIES,)),
    Case("Upsample", (None, (2.0, 3.0)), {}, (IMAGE,)),
    Case("Upsample", (None, 2), {}, (VOLUME,)),
    Case("Upsample", (5,), {}, (VOLUME,)),
    Case("Upsample", ((7, 4),), {}, (IMAGE,)),
    Case("Upsample", (9,), {"mode": "linear"}, (SERIES,)),
    Case("Upsample", (4,), {"mode": "linear", "align_corners": True}, (SERIES,)),
    Case("Upsample", (1,), {"mode": "linear", "align_corners": True}, (SERIES,)),
    Case("Upsample", (None, 2), {"mode": "bilinear"}, (IMAGE,)),
    Case("Upsample", (None, 2), {"mode": "bilinear"}, (array(0, 3, 5, 6),), note="no examples"),
    Case("Upsample", (None, 2), {"mode": "bilinear", "align_corners": True}, (IMAGE,)),
    Case("Upsample", (None, (3, 0.5)), {"mode": "bilinear"}, (IMAGE,)),
    Case("Upsample", (None, 2), {"mode": "bicubic"}, (IMAGE,)),
    Case("Upsample", ((3, 11),), {"mode": "bicubic", "align_corners": True}, (IMAGE,)),
    Case("Upsample", (None, 1.5), {"mode": "trilinear"}, (VOLUME,)),
    Case("Upsample", ((2, 4, 9),), {"mode": "trilinear", "align_corners": True}, (VOLUME,)),
    Case(
        "Upsample",
        (None, 1.7),
        {"mode": "bilinear", "recompute_scale_factor": True},
        (IMAGE,),
    ),
    Case("Upsample", (None, 1.7), {"mode": "nearest-exact"}, (IMAGE,)),
    Case("Upsample", (4,), {"mode": "area"}, (IMAGE,)),
    Case("UpsamplingNearest2d", (None, 2), {}, (IMAGE,)),
    Case("UpsamplingNearest2d", ((3, 9),), {}, (IMAGE,)),
    Case("UpsamplingBilinear2d", (None, 2), {}, (IMAGE,)),
    Case("UpsamplingBilinear2d", ((4, 1),), {}, (IMAGE,)),
]


def _call(x: np.ndarray, mode: str, no_grad: str = "", note: str = "", **kwargs: object) -> Call:
    return Call("interpolate", (x,), {"mode": mode, **kwargs}, note=note, no_grad=no_grad)


FUNCTIONS = [
    _call(IMAGE, "nearest", scale_factor=3),
    _call(IMAGE, "nearest", scale_factor=[2, 0.5]),
    _call(IMAGE, "nearest", size=(7, 4)),
    _call(IMAGE, "nearest", size=(70, 65), note="a large image"),
    _call(IMAGE, "nearest", scale_factor=1.05, no_grad=ROUNDED),
    _call(VOLUME, "nearest", scale_factor=1.3, no_grad=ROUNDED),
    _call(SERIES, "nearest", size=19),
    _call(SERIES, "nearest-exact", size=19),
    _call(SERIES, "nearest-exact", size=3),
    _call(IMAGE, "nearest-exact", scale_factor=2),
    _call(IMAGE, "nearest-exact", scale_factor=(0.4, 2.6)),
    _call(VOLUME, "nearest-exact", size=(2, 4, 7)),
    _call(SERIES, "linear", scale_factor=2),
    _call(SERIES, "linear", scale_factor=3),
    _call(SERIES, "linear", scale_factor=1.1, note="the same size"),
    _call(SERIES, "linear", scale_factor=0.6),
    _call(SERIES, "linear", scale_factor=0.6, recompute_scale_factor=True),
    _call(SERIES, "linear", size=13, align_corners=True),
    _call(array(1, 2, 1), "linear", size=4, note="a single position"),
    _call(array(1, 2, 12), "linear", size=4, note="a third"),
    _call(array(1, 2, 12), "linear", size=8, note="two thirds"),
    _call(IMAGE, "bilinear", scale_factor=2),
    _call(IMAGE, "bilinear", size=1),
    _call(IMAGE, "bilinear", size=(10, 3)),
    _call(IMAGE, "bilinear", scale_factor=2, align_corners=True),
    _call(IMAGE, "bicubic", scale_factor=2),
    _call(IMAGE, "bicubic", scale_factor=(0.5, 1.5)),
    _call(IMAGE, "bicubic", scale_factor=1.05, note="the same size", no_grad=ROUNDED),
    _call(IMAGE, "bicubic", size=(8, 4), align_corners=True),
    _call(VOLUME, "trilinear", scale_factor=2),
    _call(VOLUME, "trilinear", size=(5, 2, 7)),
    _call(VOLUME, "trilinear", size=(5, 2, 1), align_corners=True),
    _call(SERIES, "area", size=3),
    _call(SERIES, "area", scale_factor=1.6),
    _call(IMAGE, "area", size=(5, 3)),
    _call(IMAGE, "area", scale_factor=0.5),
    _call(VOLUME, "area", size=(3, 2, 7)),
    *[
        _call(IMAGE, mode, antialias=True, **how)
        for mode in ("bilinear", "bicubic")
        for how in (
            {"size": (2, 4)},
            {"size": (11, 3)},
            {"scale_factor": 0.7},
            {"size": (3, 8), "align_corners": True},
        )
    ],
    _call(array(1, 2, 40, 31), "bilinear", antialias=True, size=(5, 3), note="many taps"),
    _call(IMAGE, "lanczos", antialias=True, size=(3, 4)),
    _call(IMAGE, "lanczos", antialias=True, scale_factor=1.6),
    *[_call(BYTES, mode, size=(5, 12)) for mode in ("nearest", "nearest-exact", "bilinear")],
    _call(BYTES, "bilinear", scale_factor=2),
    _call(BYTES, "bilinear", size=(13, 4), align_corners=True),
    _call(BYTES, "bicubic", size=(13, 4)),
    _call(BYTES, "bicubic", size=(14, 19), align_corners=True),
    _call(BYTES, "bicubic", scale_factor=(1.04, 0.7), note="the same height"),
    _call(BYTES, "bilinear", antialias=True, size=(4, 11)),
    _call(BYTES, "bicubic", antialias=True, size=(4, 11)),
    _call(BYTES, "lanczos", antialias=True, size=(4, 11)),
]

MISUSE = [
    _call(IMAGE, "nearest"),
    _call(IMAGE, "nearest", size=2, scale_factor=2.0),
    _call(IMAGE, "nearest", size=2, recompute_scale_factor=True),
    _call(IMAGE, "nearest", size=2, align_corners=True),
    _call(IMAGE, "area", size=2, align_corners=False),
    _call(IMAGE, "nearest", size=(2, 2, 2)),
    _call(IMAGE, "nearest", scale_factor=(2.0,)),
    _call(IMAGE, "nearest", size=2.5),
    _call(IMAGE, "nearest", size=(2, 2.5)),
    _call(IMAGE, "nearest", size="2"),
    _call(IMAGE, "nearest", scale_factor="2"),
    _call(IMAGE, "nearest", size=0),
    _call(IMAGE, "bilinear", size=-3),
    _call(IMAGE, "nearest", scale_factor=0.1),
    _call(IMAGE, "linear", size=4),
    _call(IMAGE, "trilinear", size=4),
    _call(SERIES, "bilinear", size=4),
    _call(SERIES, "bicubic", size=4),
    _call(VOLUME, "bilinear", size=4),
    _call(IMAGE, "cubic", size=4),
    _call(array(3, 3), "nearest", size=4),
    _call(array(2, 3, 0, 4), "bilinear", size=4),
    _call(array(2, 0, 4, 4), "bilinear", size=4),
    _call(array(2, 0, 4), "nearest", size=4),
    _call(IMAGE, "nearest", size=4, antialias=True),
    _call(SERIES, "linear", size=4, antialias=True),
    _call(IMAGE, "lanczos", size=4),
    _call(IMAGE, "lanczos", size=4, antialias=True, align_corners=True),
    _call(integers(9, 1, 2, 4, 4), "nearest", size=3),
    _call(integers(9, 1, 2, 4, 4), "bilinear", size=3),
    _call(BYTES, "area", size=3),
    _call(integers(9, 1, 2, 4).astype("uint8"), "linear", size=3),
]

LAYER_MISUSE = [
    Case("Upsample", (), {}, (IMAGE,)),
    Case("Upsample", (2, 2), {}, (IMAGE,)),
    Case("Upsample", (2,), {"mode": "linear"}, (IMAGE,)),
    Case("Upsample", (2,), {"align_corners": True}, (IMAGE,)),
    Case("UpsamplingBilinear2d", (3,), {}, (SERIES,)),
    Case("UpsamplingNearest2d", ((1, 2, 3),), {}, (IMAGE,)),
]
