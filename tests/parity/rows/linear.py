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
