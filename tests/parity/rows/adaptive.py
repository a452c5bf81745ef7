"""The adaptive softmax."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Case, array

NAME = "AdaptiveLogSoftmaxWithLoss"
X = array(6, 16)
TARGET = np.array([0, 3, 4, 9, 10, 19])  # both ends of each cluster

LAYERS = [
    Case(NAME, (16, 20, [4, 10]), {}, (X, TARGET)),
    Case(NAME, (16, 20, [4, 10]), {"div_value": 2.0, "head_bias": True}, (X, TARGET)),
    Case(NAME, (16, 20, (4,)), {}, (X, np.array([0, 1, 2, 3, 0, 1])), note="one cluster unused"),
    Case(NAME, (16, 20, [1, 5, 19]), {"div_value": 1.5}, (X, TARGET)),
    Case(NAME, (16, 20, [4, 10]), {}, (array(16), np.array(7)), note="one example"),
    Case(NAME, (16, 20, [4, 10]), {}, (X, np.full(6, 15)), note="one cluster"),
]

LAYER_MISUSE = [
    *[
        Case(NAME, (16, 20, cutoffs), {})
        for cutoffs in ([], [5, 5], [10, 5], [0, 5], [-1], [20], [5, 25], [2.5])
    ],
    *[
        Case(NAME, (16, 20, [4, 10]), {}, inputs)
        for inputs in (
            (X, TARGET[:4]),
            (X, TARGET[:, None]),
            (array(16), TARGET),
            (X, np.array(3)),
            (X, np.array([0, 3, 4, 9, 10, 20])),
            (X, np.array([0, 3, 4, 9, 10, -1])),
            (array(6, 15), TARGET),
        )
    ],
]
