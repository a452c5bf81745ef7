"""Losses."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

X = array(4, 6)
LOGITS = array(5, 3)
CLASSES = integers(3, 5)
PIXELS = array(2, 3, 4, 2)
LABELS = integers(3, 2, 4, 2)
PROBABILITIES = np.exp(array(5, 3, seed=1)) / np.exp(array(5, 3, seed=1)).sum(1, keepdims=True)
WEIGHT = np.array([0.5, 2.0, 1.5], np.float32)
SOME_IGNORED = np.array([0, -100, 2, -100, 1])

LAYERS = [
    Case("MSELoss", (), {}, (X, array(4, 6, seed=1))),
    Case("MSELoss", (), {"reduction": "sum"}, (X, array(4, 6, seed=1))),
    Case("MSELoss", (), {"reduction": "none"}, (X, array(4, 6, seed=1))),
    *[
        Case("CrossEntropyLoss", (), {**options, "reduction": reduction}, inputs, note=note)
        for reduction in ("mean", "sum", "none")
        for options in ({}, {"weight": WEIGHT}, {"label_smoothing": 0.2, "weight": WEIGHT})
        for inputs, note in (
            ((LOGITS, CLASSES), "classes"),
            ((LOGITS, PROBABILITIES.astype("float32")), "probabilities"),
            ((PIXELS, LABELS), "pixels"),
        )
    ],
    Case("CrossEntropyLoss", (), {"label_smoothing": 0.3}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {}, (LOGITS, SOME_IGNORED), note="some ignored"),
    Case(
        "CrossEntropyLoss",
        (),
        {"weight": WEIGHT, "label_smoothing": 0.1},
        (LOGITS, SOME_IGNORED),
        note="some ignored",
    ),
    Case("CrossEntropyLoss", (), {"ignore_index": 1}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"ignore_index": 1, "reduction": "none"}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {}, (array(3), np.array(2)), note="one example"),
    Case("CrossEntropyLoss", (), {}, (array(3), np.ones(3, np.float32) / 3), note="one, soft"),
    Case("CrossEntropyLoss", (), {}, (LOGITS * 1000, CLASSES), note="large logits"),
    Case("CrossEntropyLoss", (), {"reduction": "sum"}, (array(0, 3), integers(3, 0)), note="empty"),
    Case("CrossEntropyLoss", (), {"size_average": False}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"reduce": False}, (LOGITS, CLASSES)),
]

FUNCTIONS = [
    Call("mse_loss", (array(3, 4), array(3, 4, seed=1)), {"weight": np.abs(array(3, 4, seed=2))}),
    Call(
        "mse_loss",
        (array(3, 4), array(3, 4, seed=1)),
        {"weight": np.abs(array(3, 4, seed=2)), "reduction": "none"},
    ),
    Call("mse_loss", (array(0, 4), array(0, 4))),
    Call("cross_entropy", (array(2, 3), np.array([-100, -100]))),
    Call("cross_entropy", (array(0, 3), integers(3, 0))),
    Call("cross_entropy", (array(2, 3), np.array([[1.0, 0, 0], [0, 0.5, 0.5]]))),
    Call("cross_entropy", (array(2, 3), np.array([0, 2], np.uint8))),
]

MISUSE = [
    Call("cross_entropy", (array(2, 3), np.array([0, 3]))),
    Call("cross_entropy", (array(2, 3), np.array([0, -1]))),
    Call("cross_entropy", (array(2, 3), np.array([0, 1, 2]))),
    Call("cross_entropy", (array(2, 3), np.array([0.0, 1.0]))),
    Call("cross_entropy", (array(2, 3), np.ones((2, 3), np.int64))),
    Call("cross_entropy", (array(2, 3), np.ones((2, 3), np.float32)), {"ignore_index": 1}),
    Call("cross_entropy", (array(2, 3), np.array([0, 1])), {"label_smoothing": 2.0}),
    Call("cross_entropy", (array(2, 3), np.array([0, 1])), {"weight": array(2)}),
    Call("cross_entropy", (array(2, 3), np.array([0, 1])), {"reduction": "average"}),
    Call("mse_loss", (array(2, 3), array(2, 3)), {"reduction": "average"}),
    Call("mse_loss", (array(2, 3), array(2, 3)), {"weight": array(3)}),
]
