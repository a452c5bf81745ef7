"""Normalisation."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

X = array(4, 6)
IMAGE = array(2, 4, 7, 8)
SERIES = array(2, 4, 9)
VOLUME = array(2, 4, 3, 5, 2)

BATCH = [
    Case("BatchNorm1d", (6,), {}, (X,), modes=True),
    Case("BatchNorm1d", (4,), {}, (SERIES,), modes=True),
    Case("BatchNorm1d", (6,), {"affine": False}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"bias": False}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"momentum": None}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"momentum": 0.0}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"momentum": 0.7, "eps": 0.1}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {"track_running_stats": False}, (X,), modes=True),
    Case("BatchNorm1d", (6,), {}, (array(0, 6),), note="no examples", modes=True),
    Case("BatchNorm1d", (4,), {}, (array(1, 4, 2),), note="two values", modes=True),
    Case("BatchNorm2d", (4,), {}, (IMAGE,), modes=True),
    Case(
        "BatchNorm2d", (4,), {"affine": False, "track_running_stats": False}, (IMAGE,), modes=True
    ),
    Case(
        "BatchNorm2d", (4,), {}, (IMAGE * 3 + 50,), note="far from zero", tolerance=30, modes=True
    ),
    Case("BatchNorm3d", (4,), {}, (VOLUME,), modes=True),
    Case("BatchNorm3d", (4,), {"bias": False, "momentum": None}, (VOLUME,), modes=True),
    # Without a process group, and without an axis, it is a plain one.
    Case("SyncBatchNorm", (4,), {}, (IMAGE,), modes=True),
    Case("SyncBatchNorm", (6,), {"momentum": None, "affine": False}, (X,), modes=True),
    Case("SyncBatchNorm", (4,), {"track_running_stats": False}, (SERIES,), modes=True),
]

INSTANCE = [
    Case("InstanceNorm1d", (4,), {}, (SERIES,), modes=True),
    Case("InstanceNorm1d", (4,), {}, (array(4, 9),), note="one example", modes=True),
    Case("InstanceNorm2d", (4,), {}, (IMAGE,), modes=True),
    Case("InstanceNorm2d", (4,), {"affine": True, "eps": 0.1}, (IMAGE,), modes=True),
    Case("InstanceNorm2d", (4,), {"affine": True, "bias": False}, (IMAGE,), modes=True),
    Case("InstanceNorm2d", (4,), {"track_running_stats": True}, (IMAGE,), modes=True),
    Case(
        "InstanceNorm2d",
        (4,),
        {"track_running_stats": True, "affine": True, "momentum": 0.7},
        (array(4, 7, 8),),
        note="one example",
        modes=True,
    ),
    Case(
        "InstanceNorm2d",
        (4,),
        {"track_running_stats": True, "momentum": None},
        (IMAGE,),
        modes=True,
    ),
    Case("InstanceNorm3d", (4,), {"affine": True}, (VOLUME,), modes=True),
    Case("InstanceNorm3d", (4,), {"track_running_stats": True}, (VOLUME,), modes=True),
    Case("InstanceNorm3d", (4,), {}, (VOLUME[0],), note="one example", modes=True),
]

OTHERS = [
    Case("LayerNorm", (6,), {}, (X,)),
    Case("LayerNorm", ((7, 8),), {"eps": 0.1}, (IMAGE,)),
    Case("LayerNorm", ([7, 8],), {}, (IMAGE,), note="a list"),
    Case("LayerNorm", (6,), {"bias": False}, (X,)),
    Case("LayerNorm", (6,), {"elementwise_affine": False}, (X,)),
    Case("LayerNorm", (6,), {}, (array(6),), note="one example"),
    Case("LayerNorm", (6,), {}, (array(0, 6),), note="no examples"),
    Case("RMSNorm", (6,), {}, (X,)),
    Case("RMSNorm", (6,), {}, (X * 1e-4,), note="small", tolerance=10),
    Case("RMSNorm", ((7, 8),), {"eps": 0.1}, (IMAGE,)),
    Case("RMSNorm", (6,), {"elementwise_affine": False}, (X,)),
    Case("RMSNorm", (6,), {}, (array(0, 6),), note="no examples"),
    Case("GroupNorm", (2, 4), {}, (IMAGE,)),
    Case("GroupNorm", (1, 4), {"eps": 0.1}, (SERIES,)),
    Case("GroupNorm", (4, 4), {"affine": False}, (VOLUME,)),
    Case("GroupNorm", (3, 6), {"bias": False}, (array(4, 6, 5),)),
    # The derivatives are 0; torch's are what rounding leaves of a difference.
    Case("GroupNorm", (6, 6), {}, (X,), note="one value a group", tolerance=10),
    Case("GroupNorm", (2, 4), {}, (IMAGE * 3 + 50,), note="far from zero", tolerance=30),
    # Torch's gradient of the weight would be NaN.
    Case("GroupNorm", (2, 4), {"affine": False}, (array(2, 4, 0),), note="no places"),
    Case("LocalResponseNorm", (2,), {}, (SERIES,)),
    Case("LocalResponseNorm", (5,), {"alpha": 0.5, "beta": 0.6, "k": 2.0}, (IMAGE,)),
    Case("LocalResponseNorm", (3,), {"alpha": 0.5}, (VOLUME,)),
    Case("LocalResponseNorm", (1,), {"alpha": 0.5}, (IMAGE,)),
    Case("LocalResponseNorm", (9,), {"alpha": 0.5}, (SERIES,), note="wider than the channels"),
    Case("LocalResponseNorm", (20,), {"alpha": 0.5}, (array(2, 30, 2),), note="a wide window"),
    Case("LocalResponseNorm", (3,), {}, (array(0, 4, 3),), note="no examples"),
    # Without the sum over the channels: torch's derivative takes it over a window one channel off.
    Case(
        "CrossMapLRN2d",
        (3,),
        {"alpha": 0.0, "beta": 0.6, "k": 2.0},
        (array(2, 3, 4, 5),),
        no_second="torch's derivative is written by hand and cannot be differentiated",
    ),
]

LAYERS = BATCH + INSTANCE + OTHERS

MEAN, VAR = array(4), np.abs(array(4)) + 1

FUNCTIONS = [
    Call("batch_norm", (array(3, 4), MEAN, VAR), no_grad="of statistics"),
    Call(
        "batch_norm",
        (array(3, 4), MEAN, VAR, array(4), array(4), False, 0.1, 0.0),
        no_grad="of statistics",
    ),
    Call("batch_norm", (array(3, 4), None, None), {"training": True, "weight": array(4)}),
    Call("batch_norm", (array(3, 4), None, None, None, array(4), True)),
    Call("instance_norm", (SERIES,)),
    Call("instance_norm", (SERIES, None, None, array(4), array(4))),
    Call("instance_norm", (SERIES,), {"eps": 0.0}),
    Call("instance_norm", (array(0, 4, 3),)),
    *[
        Call("instance_norm", (x, MEAN, VAR), {"use_input_stats": False}, no_grad="of statistics")
        for x in (SERIES, np.ascontiguousarray(X[:, :4]))
    ],
    Call("layer_norm", (X, [6])),
    Call("layer_norm", (X, (4, 6), X)),
    Call("layer_norm", (array(3, 0), (0,))),
    Call("rms_norm", (X, [6], array(6), 0.1)),
    Call("group_norm", (IMAGE, 2)),
    Call("group_norm", (IMAGE, 2, array(4), array(4))),
    Call("group_norm", (array(1, 4), 2)),
    Call("group_norm", (array(0, 4, 3), 2)),
    Call("local_response_norm", (IMAGE, 4)),
    Call("local_response_norm", (array(1, 2, 3, 2, 2, 2), 2), {"alpha": 1.0}),
]

MISUSE = [
    Call("batch_norm", (array(1, 3), None, None), {"training": True}),
    Call("batch_norm", (array(2, 3), None, None)),
    Call("batch_norm", (array(2, 3), array(4), array(4))),
    Call("batch_norm", (array(2, 3), None, None, array(4), None, True)),
    Call("batch_norm", (array(2, 3), None, None, None, array(2), True)),
    Call("batch_norm", (array(3), array(3), array(3))),
    Call("batch_norm", (array(2, 3), None, None), {"training": True, "eps": 0.0}),
    Call("batch_norm", (array(2, 3), array(3), array(3)), {"eps": -1.0}),
    Call("batch_norm", (integers(3, 2, 3), None, None), {"training": True}),
    Call("instance_norm", (array(2, 3, 1),)),
    Call("instance_norm", (array(2, 3),)),
    Call("instance_norm", (SERIES,), {"use_input_stats": False}),
    Call("instance_norm", (SERIES, MEAN, None), {"use_input_stats": False}),
    Call("instance_norm", (SERIES,), {"weight": array(3)}),
    Call("instance_norm", (SERIES, array(3), array(3)), {"use_input_stats": False}),
    Call("layer_norm", (array(2, 3), (4,))),
    Call("layer_norm", (array(2, 3), ())),
    Call("layer_norm", (array(2, 3), 3)),
    Call("layer_norm", (array(2, 3), (3,)), {"weight": array(2)}),
    Call("layer_norm", (array(2, 3), (3,)), {"bias": array(2)}),
    Call("layer_norm", (array(3), (2, 3))),
    Call("layer_norm", (integers(3, 2, 3), (3,))),
    Call("rms_norm", (array(2, 3), (4,))),
    Call("rms_norm", (array(2, 3), ())),
    Call("rms_norm", (array(2, 3), (3,)), {"weight": array(2)}),
    Call("group_norm", (array(2, 5, 3), 2)),
    Call("group_norm", (array(2, 4, 3), -2)),
    Call("group_norm", (array(1, 2), 2)),
    Call("group_norm", (array(4), 2)),
    Call("group_norm", (array(2, 4, 3), 2), {"weight": array(3)}),
    Call("group_norm", (array(2, 4, 3), 2), {"bias": array(3)}),
    Call("group_norm", (integers(3, 2, 4, 3), 2)),
    Call("local_response_norm", (X, 2)),
    Call("local_response_norm", (SERIES, 0)),
]

LAYER_MISUSE = [
    *[
        Case(f"BatchNorm{d}d", (10,), {"eps": eps}, (array(2, 10, *(3,) * (d - 1)),))
        for d in (1, 2, 3)
        for eps in (-1.0, 0.0)
    ],
    Case("BatchNorm1d", (3,), {}, (array(2, 4),)),
    Case("BatchNorm1d", (3,), {}, (array(1, 3),)),
    Case("BatchNorm1d", (3,), {}, (array(2, 3, 4, 4),)),
    Case("BatchNorm1d", (3,), {}, (array(3),)),
    Case("BatchNorm2d", (3,), {}, (array(2, 3, 4),)),
    Case("BatchNorm2d", (3,), {}, (array(3, 4, 4),)),
    Case("BatchNorm2d", (3,), {}, (array(1, 3, 1, 1),)),
    Case("BatchNorm3d", (3,), {}, (array(2, 3, 4, 4),)),
    Case("SyncBatchNorm", (3,), {}, (array(3),)),
    Case("SyncBatchNorm", (0,), {}, (array(2, 0),)),
    Case("SyncBatchNorm", (3,), {}, (array(1, 3),)),
    Case("InstanceNorm1d", (3,), {}, (array(2, 3, 4, 4),)),
    Case("InstanceNorm1d", (3,), {}, (array(3),)),
    Case("InstanceNorm1d", (3,), {}, (array(2, 3, 1),)),
    Case("InstanceNorm1d", (3,), {"affine": True}, (array(2, 4, 5),)),
    Case("InstanceNorm2d", (3,), {"affine": True}, (array(4, 5, 5),)),
    Case("InstanceNorm2d", (3,), {}, (array(3, 4),)),
    Case("InstanceNorm2d", (3,), {"track_running_stats": True}, (array(2, 3, 1, 1),)),
    Case("InstanceNorm3d", (3,), {}, (array(2, 3, 4),)),
    Case("GroupNorm", (3, 10), {}, ()),
    Case("GroupNorm", (5, 13), {}, ()),
    Case("GroupNorm", (2, 4), {}, (array(4),)),
    Case("GroupNorm", (2, 4), {}, (array(2, 6, 3),)),
    Case("LayerNorm", (3,), {}, (array(2, 4),)),
    Case("LayerNorm", ((2, 3),), {}, (array(3),)),
    Case("RMSNorm", (3,), {}, (array(2, 4),)),
    Case("LocalResponseNorm", (3,), {}, (X,)),
    Case("CrossMapLRN2d", (3,), {}, (SERIES,)),
]
