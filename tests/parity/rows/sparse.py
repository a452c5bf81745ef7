"""Embeddings."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

LAYERS = [
    Case("Embedding", (7, 3), {}, (integers(7, 4, 2),), no_second="indices have no derivative"),
    Case("Embedding", (7, 3), {}, (integers(7),), note="one index"),
    Case("Embedding", (7, 3), {}, (integers(7, 0),), note="no indices"),
    Case("Embedding", (7, 3), {"padding_idx": 2}, (integers(7, 9),)),
    Case("Embedding", (7, 3), {"padding_idx": -1}, (integers(7, 9),)),
    Case("Embedding", (7, 3), {"scale_grad_by_freq": True}, (integers(7, 20),)),
    Case("Embedding", (7, 3), {"max_norm": 1.0}, (integers(7, 5),)),
    Case("Embedding", (7, 3), {"max_norm": 0.7, "norm_type": 1.0}, (integers(7, 5),)),
]

FUNCTIONS = [
    Call("embedding", (np.array([[1, 2]], np.int32), array(4, 3))),
]

MISUSE = [
    Call("embedding", (np.array([5]), array(3, 2))),
    Call("embedding", (np.array([-1]), array(3, 2))),
    Call("embedding", (array(2), array(3, 2))),
    Call("embedding", (np.array([1]), array(3, 2)), {"padding_idx": 3}),
    Call("embedding", (np.array([1]), array(3))),
]
