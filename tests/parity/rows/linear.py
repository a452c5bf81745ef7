"""Linear maps and flattening."""

from __future__ import annotations

from tests.parity.oracle import Call, Case, array, integers

X = array(4, 6)
IMAGE = array(2, 4, 7, 8)

LAYERS = [
    Case("Identity", (3,), {}, (X,)),
    Case("Linear", (6, 3), {}, (X,)),
    Case("Linear", (6, 3), {"bias": False}, (X,)),
    Case("Linear", (6, 3), {}, (array(6),), note="one example"),
    Case("Linear", (6, 3), {}, (array(2, 5, 6),), note="two batch axes"),
    Case("Linear", (6, 3), {}, (array(0, 6),), note="no examples"),
    Case("Linear", (0, 3), {}, (array(4, 0),), note="no features"),
    Case("Bilinear", (6, 5, 3), {}, (X, array(4, 5))),
    Case("Bilinear", (6, 5, 3), {"bias": False}, (array(6), array(5)), note="one example"),
    Case("Bilinear", (6, 5, 3), {}, (array(2, 3, 6), array(2, 3, 5)), note="two batch axes"),
    Case("Bilinear", (6, 5, 3), {}, (array(0, 6), array(0, 5)), note="no examples"),
    Case("Flatten", (), {}, (IMAGE,)),
    Case("Flatten", (0, 1), {}, (IMAGE,)),
    Case("Flatten", (2, -2), {}, (IMAGE,)),
    Case("Flatten", (), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("Flatten", (0,), {}, (array(),), note="a scalar"),
    Case("Unflatten", (1, (2, 3)), {}, (X,)),
    Case("Unflatten", (1, [2, 2]), {}, (IMAGE,)),
    Case("Unflatten", (-1, (2, -1, 2)), {}, (IMAGE,)),
    Case("Unflatten", (0, (-1,)), {}, (X,)),
    Case("Unflatten", (1, (0, 3)), {}, (array(2, 0),), note="no features"),
    Case("Unflatten", (1, (2, 3)), {}, (array(0, 6),), note="no examples"),
]

FUNCTIONS = [
    Call("linear", (array(4, 3), array(3))),
    Call("linear", (integers(5, 2, 3), integers(5, 4, 3))),
]

MISUSE = [
    Call("linear", (array(2, 3), array(4, 5))),
    Call("linear", (array(2, 3), array(4, 3), array(2))),
    Call("bilinear", (array(2, 3), array(3, 3), array(3, 3, 3))),
    Call("bilinear", (array(2, 3), array(2, 4), array(3, 3, 3))),
]

LAYER_MISUSE = [
    Case("Flatten", (), {}, (array(3),)),
    Case("Flatten", (2, 1), {}, (IMAGE,)),
    Case("Unflatten", (1, 6)),
    Case("Unflatten", (1, (2.0, 3))),
    Case("Unflatten", ("C", (("A", 2), ("B", 3)))),
    Case("Unflatten", ("C", (2, 3)), {}, (X,)),
    Case("Unflatten", (1, (2, 4)), {}, (X,)),
    Case("Unflatten", (1, (4, -1)), {}, (X,)),
    Case("Unflatten", (1, (-1, -1)), {}, (X,)),
    Case("Unflatten", (1, (-2, -3)), {}, (X,)),
    Case("Unflatten", (1, ()), {}, (array(2, 1),)),
    Case("Unflatten", (2, (2, 3)), {}, (X,)),
    Case("Unflatten", (1, (0, -1)), {}, (array(2, 0),)),
    Case("Unflatten", (0, (1, 1)), {}, (array(),)),
]
