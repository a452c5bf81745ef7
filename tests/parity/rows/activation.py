"""Activations and dropout."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

INF = np.inf
NAN = np.nan
X = array(4, 6)
IMAGE = array(2, 4, 7, 8)
SPECIAL = np.array([-30.0, -3.0, -0.5, -0.0, 0.0, 0.5, 3.0, 30.0], np.float32)

LAYERS = [
    Case("ReLU", (), {}, (SPECIAL,)),
    Case("ReLU", (), {"inplace": True}, (X,)),
    Case("GELU", (), {}, (SPECIAL,)),
    Case("GELU", (), {"approximate": "tanh"}, (SPECIAL,)),
    Case("SiLU", (), {}, (SPECIAL,)),
    Case("Tanh", (), {}, (SPECIAL,)),
    Case("Sigmoid", (), {}, (SPECIAL,)),
    Case("Softmax", (), {"dim": 1}, (X,)),
    Case("Softmax", (), {"dim": -3}, (IMAGE,)),
    Case("Softmax", (), {"dim": 0}, (SPECIAL * 10,)),
    Case("Softmax", (), {"dim": 0}, (array(),), note="a scalar"),
    Case("Softmax", (), {"dim": 1}, (array(3, 0),), note="no classes"),
    Case("Softmax", (), {"dim": 0}, (np.array([-np.inf, -np.inf], np.float32),), note="all -inf"),
    Case("Dropout", (0.0,), {}, (X,), modes=True),
    Case("Dropout", (1.0,), {}, (X,), modes=True),
]

FUNCTIONS = [
    Call("log_softmax", (array(4, 3) * 100,), {"dim": -1}),
    Call("tanh", (integers(5, 4),)),
    Call("sigmoid", (integers(5, 4),)),
    Call("relu", (integers(5, 4) - 2,)),
    Call("relu", (np.array([NAN, -0.0, -INF, INF], np.float32),)),
    Call("gelu", (np.array([NAN, INF, -50.0], np.float32),)),
    Call("silu", (np.array([NAN, INF, -200.0], np.float32),)),
    Call("softmax", (np.array([[1.0, NAN], [INF, 0.0], [-INF, 0.0]], np.float32),), {"dim": 1}),
    Call("dropout", (array(3),), {"training": False}, many="it may draw"),
    Call("dropout", (array(3),), {"p": 0.0}, many="it may draw"),
    Call(
        "dropout",
        (array(3),),
        {"p": 1.0},
        many="it may draw",
        no_grad="no key under jit",
    ),
]

MISUSE = [
    Call("gelu", (integers(3, 4),)),
    Call("gelu", (array(3),), {"approximate": "erf"}),
    Call("silu", (integers(3, 4),)),
    Call("softmax", (array(2, 3),), {"dim": 2}),
    Call("dropout", (array(2),), {"p": 1.5}, many="it may draw"),
]
