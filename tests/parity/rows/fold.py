"""Sliding blocks."""

from __future__ import annotations

from tests.parity.oracle import Call, Case, array, integers

IMAGE = array(2, 3, 7, 8)
ONE = array(3, 7, 8)  # an image without a batch axis

LAYERS = [
    Case("Unfold", (3,), {}, (IMAGE,)),
    Case("Unfold", ((2, 3),), {"padding": (1, 2), "stride": (2, 1)}, (IMAGE,)),
    Case("Unfold", (3, 2, 2, 3), {}, (IMAGE,)),
    Case("Unfold", ([3, 2], (1, 3)), {"stride": (1, 2)}, (IMAGE,)),
    Case("Unfold", (2,), {"stride": 2}, (IMAGE,), note="blocks that do not overlap"),
    Case("Unfold", (1,), {"stride": 3}, (IMAGE,), note="pixels in no block"),
    Case("Unfold", (2,), {"padding": 4}, (IMAGE,), note="blocks of padding"),
    Case("Unfold", (3,), {}, (ONE,), note="one example"),
    Case("Unfold", (3,), {}, (IMAGE[:0],), note="no examples"),
    Case("Fold", ((7, 8), 3), {}, (array(2, 27, 30),)),
    Case("Fold", ((4, 5), (2, 3)), {"padding": (1, 2), "stride": (2, 1)}, (array(2, 12, 21),)),
    Case("Fold", (7, 3, 2, 2, 3), {}, (array(2, 18, 9),)),
    Case("Fold", ([6, 7], [3, 2], (1, 3)), {"stride": (1, 2)}, (array(2, 12, 8),)),
    Case("Fold", (6, 2), {"stride": 2}, (array(2, 12, 9),), note="blocks that do not overlap"),
    Case("Fold", (7, 1), {"stride": 3}, (array(2, 3, 9),), note="pixels in no block"),
    Case("Fold", (2, 2), {"padding": 4}, (array(2, 4, 81),), note="blocks of padding"),
    Case("Fold", (8, 5), {"stride": 3}, (array(2, 50, 4),), note="blocks that end in the middle"),
    Case("Fold", ((7, 8), 3), {}, (array(27, 30),), note="one example"),
    Case("Fold", ((7, 8), 3), {}, (array(0, 27, 30),), note="no examples"),
]

FUNCTIONS = [
    Call("unfold", (IMAGE, (3, 2), 1, 1, 2)),
    Call("unfold", (integers(9, 1, 2, 4, 4) > 4, 2), note="booleans"),
    Call("fold", (array(1, 8, 9), (4, 4), (2, 2))),
    Call("fold", (array(1, 8, 9), 4, 2)),
]

MISUSE = [
    Call("unfold", (array(1, 2, 4, 4), (2,))),
    Call("unfold", (array(1, 2, 4, 4), (2, 2, 2))),
    Call("unfold", (array(1, 2, 4, 4), "22")),
    Call("unfold", (array(1, 0, 4, 4), 2)),
    Call("unfold", (array(1, 2, 0, 4), 2)),
    Call("unfold", (array(1, 2, 4, 4), 5)),
    Call("unfold", (array(1, 2, 4, 4), 2), {"dilation": 4}),
    Call("unfold", (array(1, 2, 4, 4), 0)),
    Call("unfold", (array(1, 2, 4, 4), 2), {"stride": 0}),
    Call("unfold", (array(1, 2, 4, 4), 2), {"dilation": 0}),
    Call("unfold", (array(1, 2, 4, 4), 2), {"padding": -1}),
    Call("unfold", (array(1, 1, 2, 4, 4), 2)),
    Call("fold", (array(8), (4, 4), 2)),
    Call("fold", (array(1, 7, 9), (4, 4), 2)),
    Call("fold", (array(1, 8, 8), (4, 4), 2)),
    Call("fold", (array(1, 8, 9), (4,), 2)),
    Call("fold", (array(1, 8, 9), (4, 4, 4), 2)),
    Call("fold", (array(1, 8, 9), (1, 1), 2)),
    Call("fold", (array(1, 8, 0), (1, 1), 2)),
    Call("fold", (array(1, 0, 9), (4, 4), 2)),
    Call("fold", (array(1, 8, 9), (4, 4), 0)),
    Call("fold", (array(1, 8, 9), (4, 4), 2), {"stride": 0}),
    Call("fold", (array(1, 8, 9), (4, 4), 2), {"dilation": 0}),
    Call("fold", (array(1, 8, 9), (4, 4), 2), {"padding": -1}),
    Call("fold", (array(1, 8, 9), (-4, 4), 2)),
]

LAYER_MISUSE = [
    Case("Unfold", ((2, 2, 2),), {}, (IMAGE,)),
    Case("Unfold", (9,), {}, (IMAGE,)),
    Case("Fold", (4, 2), {}, (array(1, 8, 8),)),
    Case("Fold", (4, 2), {}, (array(1, 7, 9),)),
]
