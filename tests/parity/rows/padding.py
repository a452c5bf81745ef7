"""Padding."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

SERIES = array(2, 3, 5)
IMAGE = array(2, 3, 4, 5)
VOLUME = array(2, 2, 3, 4, 5)
LINE = np.arange(4, dtype=np.float32)[None]
SPECIAL = np.array([[[-0.0, np.nan, 1.0, -np.inf, 0.0]]], np.float32)

# For each number of axes: inputs, one example, sides that differ, sides that cut.
SHAPES = {
    1: (SERIES, array(3, 5), (1, 3), (-1, 2)),
    2: (IMAGE, array(3, 4, 5), (1, 3, 2, 0), (-1, 2, 1, -1)),
    3: (VOLUME, array(2, 3, 4, 5), (1, 3, 2, 0, 2, 1), (2, -1, -2, 1, 0, -1)),
}

LAYERS = [
    case
    for n, (batch, one, sides, cuts) in SHAPES.items()
    for kind, more in (
        ("Constant", (1.5,)),
        ("Zero", ()),
        ("Reflection", ()),
        ("Replication", ()),
        ("Circular", ()),
    )
    for case in (
        Case(f"{kind}Pad{n}d", (1, *more), {}, (batch,)),
        Case(f"{kind}Pad{n}d", (sides, *more), {}, (batch,)),
        Case(f"{kind}Pad{n}d", (cuts, *more), {}, (batch,)),
        Case(f"{kind}Pad{n}d", (sides, *more), {}, (one,), note="one example"),
        Case(f"{kind}Pad{n}d", (sides, *more), {}, (batch[:0],), note="no examples"),
        Case(f"{kind}Pad{n}d", (0, *more), {}, (batch,)),
    )
] + [
    Case("ConstantPad1d", (1, -np.inf), {}, (array(5),), note="one axis"),
    Case("ConstantPad2d", ([1, 2, 3, 4], 7), {}, (array(2, 2, 3, 4, 5),), note="many axes"),
    Case("ReflectionPad1d", ((1, 2, 1, 1),), {}, (IMAGE,), note="more axes than its name says"),
    Case("ReflectionPad1d", (4,), {}, (SERIES,), note="as far as it goes"),
    Case("CircularPad1d", (5,), {}, (SERIES,), note="as far as it goes"),
    Case("ReplicationPad1d", (9,), {}, (SERIES,), note="beyond its size"),
]

FUNCTIONS = [
    Call("pad", (array(2, 3), (1, 1))),
    Call("pad", (array(2, 3), ())),
    Call("pad", (array(), ())),
    Call("pad", (array(2, 3), [1, -1, -1, 2], "constant", 3)),
    Call("pad", (array(2, 3), (-2, -1)), note="nothing left"),
    Call("pad", (array(2, 3, 0), (1, 1)), {"value": 2.5}),
    Call("pad", (array(1, 2, 1, 2, 1), (1, 0) * 5), note="five axes"),
    Call("pad", (integers(9, 6), (1, 1), "constant", 2.7), note="integers"),
    Call("pad", (integers(9, 6), (1, 1), "constant", -(2**20) - 1), note="integers"),
    Call("pad", (integers(9, 6) > 4, (1, 2), "constant", 2), note="booleans"),
    Call("pad", (np.arange(4, dtype=np.uint8), (1, 2)), {"value": 255}),
    Call("pad", (SPECIAL, (2, 3)), {"value": np.nan}),
    Call("pad", (SPECIAL, (2, 3), "reflect")),
    Call("pad", (SPECIAL, (2, 3), "replicate")),
    Call("pad", (SPECIAL, (2, 3), "circular", 0)),
    *[Call("pad", (LINE, sides, "reflect")) for sides in ((-2, 3), (3, -3), (-3, 3), (0, -3))],
    *[Call("pad", (LINE, s, "replicate")) for s in ((-3, 3), (-4, 5), (-6, 5), (7, -5), (-1, -2))],
    *[Call("pad", (LINE, sides, "circular")) for sides in ((-1, 3), (2, -2), (-3, 1), (-1, -2))],
    Call("pad", (LINE, (-2, -2), "circular"), note="nothing left"),
    Call("pad", (integers(9, 2, 4), (1, 3), "reflect"), note="integers"),
    Call("pad", (integers(9, 2, 4), (1, 3), "replicate"), note="integers"),
    Call("pad", (integers(9, 2, 4) > 4, (1, 3), "circular"), note="booleans"),
    Call("pad", (array(2, 0, 3), (1, 1), "circular"), note="no channels"),
    Call("pad", (array(0, 3), (1, 1), "circular"), note="no channels"),
    Call("pad", (array(2, 3, 0), (0, 0), "circular"), note="nothing there"),
]

MISUSE = [
    Call("pad", (array(2, 3), (1,))),
    Call("pad", (array(2, 3), (1,) * 6)),
    Call("pad", (array(2, 3), (-2, -2))),
    Call("pad", (array(2, 3), (-4, 2))),
    Call("pad", (array(2, 3), (1, 1), "some")),
    Call("pad", (array(2, 3), (1, 1), "reflect", 2.0)),
    Call("pad", (array(2, 3), (1, 1), "circular", 2.0)),
    Call("pad", (array(2, 3), 2)),
    Call("pad", (array(2, 3), (1.5, 1))),
    Call("pad", (array(2, 3), (1, 1)), {"value": "one"}),
    Call("pad", (integers(9, 6), (1, 1)), {"value": np.inf}),
    Call("pad", (integers(9, 6), (1, 1)), {"value": np.nan}),
    Call("pad", (np.arange(4, dtype=np.uint8), (1, 1)), {"value": 300}),
    Call("pad", (np.arange(4, dtype=np.uint8), (1, 1)), {"value": -1}),
    *[
        Call("pad", (array(*shape), sides, mode))
        for mode in ("reflect", "replicate", "circular")
        for shape, sides in (
            ((), ()),
            ((3,), (1, 1)),
            ((1, 2, 3, 3), (1, 1)),
            ((3, 3), (1, 1, 1, 1)),
            ((1, 2, 3, 3, 3), (1, 1)),
            ((1, 2, 2, 2, 2, 2), (1,) * 8),
            ((1, 2, 3), (1,)),
            ((2, 3, 0), (1, 1)),
        )
    ],
    Call("pad", (array(2, 0, 3), (1, 1), "reflect")),
    Call("pad", (array(2, 0, 3), (1, 1), "replicate")),
    Call("pad", (array(0, 3), (1, 1), "reflect")),
    Call("pad", (array(2, 3, 0), (0, 0), "replicate")),
    Call("pad", (array(2, 3), (3, 0), "reflect")),
    Call("pad", (array(2, 3), (0, 3), "reflect")),
    Call("pad", (array(2, 3), (-2, -1), "reflect")),
    Call("pad", (array(2, 3), (-1, -2), "replicate")),
    Call("pad", (array(2, 3), (4, 0), "circular")),
    Call("pad", (array(2, 4), (-3, -2), "circular")),
]

LAYER_MISUSE = [
    *[
        Case(f"{kind}Pad{n}d", (3,), {}, (x,))
        for kind in ("Reflection", "Replication", "Circular")
        for n, x in ((1, array(2, 3, 4, 5)), (2, array(2, 3)), (3, array(2, 3)))
    ],
    *[Case(f"CircularPad{n}d", (1,), {}, (array(*(2,) * (n + 3)),)) for n in (1, 2, 3)],
    Case("ReflectionPad2d", ((1, 2),), {}, (IMAGE,)),
    Case("ReflectionPad2d", ((1, 2, 3),), {}, (IMAGE,)),
    Case("ReflectionPad1d", (1.5,), {}, (SERIES,)),
    Case("ConstantPad3d", (1, 2.0), {}, (array(2, 3),)),
    Case("ZeroPad2d", (1,), {}, (array(2),)),
]
