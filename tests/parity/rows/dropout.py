"""Dropout where nothing is left to chance."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

X = array(4, 6)
SERIES = array(2, 4, 9)
IMAGE = array(2, 4, 5, 6)
VOLUME = array(2, 4, 3, 5, 2)
BAD = np.array([1.0, np.nan, np.inf], np.float32)

MAY_DRAW = "it may draw"

INPUTS = {
    "Dropout": X,
    "Dropout1d": SERIES,
    "Dropout2d": IMAGE,
    "Dropout3d": VOLUME,
    "AlphaDropout": X,
    "FeatureAlphaDropout": IMAGE,
}

LAYERS = [
    *[Case(name, (p,), {}, (x,), modes=True) for name, x in INPUTS.items() for p in (0.0, 1.0)],
    *[Case(name, (0.0, True), {}, (x,), modes=True) for name, x in INPUTS.items()],
    Case("Dropout", (0.5,), {}, (array(0, 3),), modes=True, note="no examples"),
    Case("Dropout1d", (1.0,), {}, (array(4, 9),), modes=True, note="one example"),
    Case("Dropout3d", (1,), {}, (array(4, 3, 5, 2),), modes=True, note="one example"),
    Case("FeatureAlphaDropout", (0.5,), {}, (array(0, 3),), modes=True, note="no examples"),
]

FUNCTIONS = [
    Call("dropout", (array(3),), {"training": False}, many=MAY_DRAW),
    Call("dropout", (array(3),), {"p": 0.0}, many=MAY_DRAW),
    Call("dropout", (BAD,), {"p": 1.0}, many=MAY_DRAW),
    Call("dropout", (integers(5, 4),), {"p": 1.0}, many=MAY_DRAW),
    Call("dropout", (integers(5, 4),), {"training": False}, many=MAY_DRAW),
    Call("alpha_dropout", (array(3), 0.5), many=MAY_DRAW),
    Call("alpha_dropout", (BAD, 1.0, True), many=MAY_DRAW),
    Call("feature_alpha_dropout", (IMAGE, 0.5), many=MAY_DRAW),
    Call("feature_alpha_dropout", (array(3), 1.0, True), many=MAY_DRAW),
    Call("dropout1d", (SERIES, 0.5, False), many=MAY_DRAW),
    Call("dropout2d", (IMAGE, 0.5, False), many=MAY_DRAW),
    Call("dropout3d", (VOLUME, 0.5, False), many=MAY_DRAW),
]

MISUSE = [
    *[
        Call(name, (IMAGE, p))
        for name in ("dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout")
        for p in (1.5, -0.1)
    ],
    Call("dropout1d", (SERIES, 2.0)),
    Call("dropout3d", (VOLUME, -1.0)),
    Call("dropout", (array(2), float("nan"))),
    Call("dropout1d", (array(3),)),
    Call("dropout1d", (IMAGE,)),
    Call("dropout1d", (IMAGE,), {"training": False}),
    Call("feature_alpha_dropout", (array(3), 0.5, True)),
    Call("dropout", (integers(5, 4),)),
    Call("alpha_dropout", (integers(5, 4), 0.5, True)),
    Call("dropout1d", (integers(5, 4, 2),)),
]

LAYER_MISUSE = [
    *[Case(name, (p,), {}, (x,)) for name, x in INPUTS.items() for p in (1.5, -0.1)],
    Case("Dropout1d", (), {}, (IMAGE,)),
]
