"""Convolutions."""

from __future__ import annotations

from tests.parity.oracle import Call, Case, array

IMAGE = array(2, 4, 7, 8)
ONE = array(4, 7, 8)  # an image without a batch axis
SERIES = array(2, 4, 9)

LAYERS = [
    Case("Conv1d", (4, 6, 3), {}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {}, (array(4, 9),), note="one example"),
    Case("Conv1d", (4, 6, 4), {"padding": "same"}, (SERIES,)),
    Case("Conv1d", (4, 6, 4), {"padding": "valid", "stride": 2}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {"padding": 2, "dilation": 2, "groups": 2}, (SERIES,)),
    Case("Conv1d", (4, 8, 3), {"padding": 1, "stride": 2, "groups": 4}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {"padding": 2, "padding_mode": "reflect"}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {"padding": "same", "padding_mode": "circular"}, (SERIES,)),
    Case("Conv1d", (4, 6, 1), {}, (SERIES,)),
    Case("Conv2d", (4, 6, 3), {}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {}, (ONE,), note="one example"),
    Case("Conv2d", (4, 6, 3), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("Conv2d", (4, 6, (3, 2)), {"bias": False, "stride": (2, 1), "padding": (0, 1)}, (IMAGE,)),
    Case("Conv2d", (4, 6, (4, 3)), {"padding": "same", "dilation": (1, 2)}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": "valid"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"groups": 2, "padding": 1}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"groups": 2, "stride": 2, "dilation": 2}, (IMAGE,)),
    Case("Conv2d", (4, 4, 3), {"groups": 4, "padding": 1}, (IMAGE,)),
    Case("Conv2d", (4, 12, (3, 5)), {"groups": 4, "stride": (1, 2), "padding": 2}, (IMAGE,)),
    Case("Conv2d", (4, 4, 3), {"groups": 4, "dilation": 2, "padding": (2, 1)}, (IMAGE,)),
    Case("Conv2d", (4, 4, 3), {"groups": 4}, (array(0, 4, 7, 8),), note="no examples"),
    Case("Conv2d", (4, 4, 3), {"groups": 4, "padding": "same"}, (ONE,), note="one example"),
    Case("Conv2d", (4, 6, 1), {}, (IMAGE,)),
    Case("Conv2d", (4, 6, 1), {"stride": 2, "padding": 1}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "replicate"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "circular"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": "same", "padding_mode": "replicate"}, (IMAGE,)),
    Case("Conv2d", (1, 2, 3), {}, (array(2, 1, 5, 5),), note="one channel"),
]

FUNCTIONS = [
    Call("conv1d", (array(2, 3, 8), array(4, 3, 3), array(4)), {"padding": (2,), "stride": [2]}),
    Call("conv2d", (array(3, 8, 8), array(6, 1, 3, 3)), {"groups": 3, "padding": "same"}),
    Call("conv2d", (array(1, 2, 12, 12), array(2, 1, 12, 12)), {"groups": 2}),
]

MISUSE = [
    Call("conv2d", (array(1, 2, 4, 4), array(3, 3, 3, 3))),
    Call("conv2d", (array(1, 2, 2, 2), array(3, 2, 3, 3))),
    Call("conv2d", (array(1, 2, 4, 4), array(3, 2, 3, 3)), {"padding": "same", "stride": 2}),
    Call("conv2d", (array(1, 2, 4, 4), array(3, 1, 3, 3)), {"groups": 2}),
    Call("conv2d", (array(1, 2, 4, 4), array(3, 2, 3, 3)), {"padding": -1}),
    Call("conv2d", (array(1, 2, 4, 4), array(3, 2, 3, 3)), {"stride": 0}),
    Call("conv2d", (array(1, 2, 4, 4), array(3, 2, 3, 3)), {"padding": "some"}),
    Call("conv2d", (array(2, 4), array(3, 2, 3, 3))),
    Call("conv2d", (array(1, 2, 4, 4), array(3, 2, 3, 3), array(2))),
    Call("conv1d", (array(1, 2, 4), array(3, 2, 3)), {"dilation": 4}),
]
