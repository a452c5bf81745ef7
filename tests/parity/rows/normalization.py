"""Normalisation."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array

X = array(4, 6)
IMAGE = array(2, 4, 7, 8)
SERIES = array(2, 4, 9)

LAYERS = [
    Case("BatchNorm1d", (6,), {}, (X,), modes=True),
    Case("BatchNorm1d", (4,), {}, (SERIES,), modes=True),
    Case("BatchNorm1d", (6,), {"affine": False}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"bias": False}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"momentum": None}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"momentum": 0.0}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"momentum": 0.7, "eps": 0.1}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"track_running_stats": False}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {}, (array(0, 6),), note="no examples", modes=True),
    Case("BatchNorm2d", (4,), {}, (IMAGE,), modes=True),
    Case(
        "BatchNorm2d", (4,), {"affine": False, "track_running_stats": False}, (IMAGE,), modes=True
    ),
    Case(
        "BatchNorm2d", (4,), {}, (IMAGE * 3 + 50,), note="far from zero", tolerance=30, modes=True
    ),
    Case("LayerNorm", (6,), {}, (X,)),
    Case("LayerNorm", ((7, 8),), {"eps": 0.1}, (IMAGE,)),
    Case("LayerNorm", (6,), {"bias": False}, (X,)),
    Case("LayerNorm", (6,), {"elementwise_affine": False}, (X,)),
    Case("LayerNorm", (6,), {}, (array(0, 6),), note="no examples"),
    Case("RMSNorm", (6,), {}, (X,)),
    Case("RMSNorm", (6,), {}, (X * 1e-4,), note="small", tolerance=10),
    Case("RMSNorm", ((7, 8),), {"eps": 0.1}, (IMAGE,)),
    Case("RMSNorm", (6,), {"elementwise_affine": False}, (X,)),
]

FUNCTIONS = [
    Call("batch_norm", (array(3, 4), array(4), np.abs(array(4)) + 1), no_grad="of statistics"),
    Call("batch_norm", (array(3, 4), None, None), {"training": True, "weight": array(4)}),
]

MISUSE = [
    Call("batch_norm", (array(1, 3), None, None), {"training": True}),
    Call("batch_norm", (array(2, 3), None, None)),
    Call("batch_norm", (array(2, 3), array(4), array(4))),
    Call("layer_norm", (array(2, 3), (4,))),
    Call("layer_norm", (array(2, 3), (3,)), {"weight": array(2)}),
    Call("rms_norm", (array(2, 3), (4,))),
]
