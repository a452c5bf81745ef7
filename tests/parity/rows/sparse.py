"""Embeddings."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

TABLE = array(7, 3)
NO_SECOND = "indices have no derivative"
FLAT, STARTS = integers(7, 9), np.array([0, 3, 3, 4, 9])  # an empty bag in between and at the end
FIT = np.array([0, 2, 2, 5])
TIES = np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 5.0], [1.0, 2.0, 5.0], [-1.0, -2.0, -3.0]], np.float32)

LAYERS = [
    Case("Embedding", (7, 3), {}, (integers(7, 4, 2),), no_second=NO_SECOND),
    Case("Embedding", (7, 3), {}, (integers(7),), note="one index"),
    Case("Embedding", (7, 3), {}, (integers(7, 0),), note="no indices"),
    Case("Embedding", (7, 3), {"padding_idx": 2}, (integers(7, 9),)),
    Case("Embedding", (7, 3), {"padding_idx": -1}, (integers(7, 9),)),
    Case("Embedding", (7, 3), {"scale_grad_by_freq": True}, (integers(7, 20),)),
    Case("Embedding", (7, 3), {"max_norm": 1.0}, (integers(7, 5),)),
    Case("Embedding", (7, 3), {"max_norm": 0.7, "norm_type": 1.0}, (integers(7, 5),)),
    Case("Embedding", (7, 3), {"_weight": TABLE, "_freeze": True}, (integers(7, 5),)),
    Case("EmbeddingBag", (7, 3), {}, (integers(7, 4, 2),), no_second=NO_SECOND),
    *[
        Case("EmbeddingBag", (7, 3), {"mode": mode, **options}, inputs, note=note)
        for mode in ("sum", "mean", "max")
        for options in ({}, {"padding_idx": 2}, {"padding_idx": -1})
        for inputs, note in (
            ((integers(7, 4, 5),), "even"),
            ((FLAT, STARTS), "offsets"),
        )
    ],
    *[
        Case("EmbeddingBag", (7, 3), {"mode": mode, "include_last_offset": True}, (FLAT, STARTS))
        for mode in ("sum", "mean", "max")
    ],
    *[
        Case(
            "EmbeddingBag", (7, 3), {"mode": mode}, (integers(7, 0), np.array([0, 0])), note="none"
        )
        for mode in ("sum", "mean", "max")
    ],
    Case("EmbeddingBag", (7, 3), {}, (integers(7, 0, 2),), note="no bags"),
    Case("EmbeddingBag", (7, 3), {}, (integers(7, 0), np.zeros(0, np.int64)), note="no bags"),
    Case("EmbeddingBag", (7, 3), {"mode": "sum"}, (FLAT, STARTS, array(9)), note="weighted"),
    Case("EmbeddingBag", (7, 3), {"mode": "sum"}, (integers(7, 4, 2), None, array(4, 2))),
    Case(
        "EmbeddingBag",
        (7, 3),
        {"mode": "sum", "padding_idx": 1},
        (FLAT, STARTS, array(9)),
        note="weighted",
    ),
    Case("EmbeddingBag", (7, 3), {"max_norm": 1.0, "mode": "sum"}, (FLAT, STARTS)),
    Case("EmbeddingBag", (7, 3), {"max_norm": 0.7, "norm_type": 1.0}, (integers(7, 4, 2),)),
    Case(
        "EmbeddingBag",
        (4, 3),
        {"mode": "max", "_weight": TIES},
        (np.array([0, 1, 2, 2, 1, 3, 3]), np.array([0, 2, 5])),
        note="ties",
    ),
]

FUNCTIONS = [
    Call("embedding", (np.array([[1, 2]], np.int32), array(4, 3))),
    Call("embedding_bag", (np.array([[1, 2]], np.int32), array(4, 3))),
    Call("embedding_bag", (np.array([1, 2, 2, 0]), array(4, 3), FIT[:3])),
    *[
        Call(
            "embedding_bag",
            (np.array([1, 2, 2, 0]), array(4, 3), FIT[:3]),
            {"include_last_offset": True, "mode": mode},
            note="some after the last bag",
            no_grad="torch ignores them, but its derivative counts them in the last bag",
        )
        for mode in ("sum", "mean")
    ],
    *[
        Call(
            "embedding_bag",
            (np.array([1, 2, 2, 0, 3]), array(4, 3), FIT),
            {"mode": mode, "include_last_offset": True, "padding_idx": -2},
        )
        for mode in ("sum", "mean", "max")
    ],
]

INDEX = np.array([1, 2])
MISUSE = [
    Call("embedding", (np.array([5]), array(3, 2))),
    Call("embedding", (np.array([-1]), array(3, 2))),
    Call("embedding", (array(2), array(3, 2))),
    Call("embedding", (np.array([1]), array(3, 2)), {"padding_idx": 3}),
    Call("embedding", (np.array([1]), array(3))),
    Call("embedding", (np.array([1]), array(3, 1, 1))),
    *[
        Call("embedding_bag", (index, array(3, 2), offsets), options)
        for index, offsets, options in (
            (INDEX, np.array([0, 3]), {}),
            (INDEX, np.array([1, 2]), {}),
            (INDEX, np.zeros(0, np.int64), {"include_last_offset": True}),
            (np.array([1, 5]), np.array([0]), {}),
            (np.array([1, -1]), np.array([0]), {}),
            (INDEX, np.array([0]), {"padding_idx": 7}),
            (INDEX, np.array([0.0]), {}),
            (array(2), np.array([0]), {}),
            (INDEX[None], np.array([0]), {}),
            (INDEX, None, {}),
            (INDEX, np.array([[0]]), {}),
            (INDEX[None, None], None, {}),
            (np.zeros((2, 0), np.int64), None, {}),
            (INDEX, np.array([0]), {"mode": "max", "scale_grad_by_freq": True}),
            (INDEX, np.array([0]), {"mode": "max", "sparse": True}),
            (INDEX, np.array([0]), {"mode": "mea"}),
            (INDEX, np.array([0]), {"per_sample_weights": array(2)}),
            (INDEX, np.array([0]), {"mode": "sum", "per_sample_weights": array(3)}),
        )
    ],
    Call("embedding_bag", (INDEX, array(3), np.array([0]))),
]

LAYER_MISUSE = [
    Case("Embedding", (10, 3), {}, (np.array([0, 5, 15]),)),
    Case("Embedding", (10, 3), {}, (array(2),)),
    Case("Embedding", (-1, 3)),
    Case("Embedding", (10, 3), {"padding_idx": 10}),
    Case("Embedding", (10, 3), {"padding_idx": -11}),
    Case("Embedding", (10, 3), {"_weight": array(9, 3)}),
    Case("EmbeddingBag", (10, 3), {}, (np.array([[0, 5, 15]]),)),
    Case("EmbeddingBag", (10, 3), {}, (np.array([0, 5]),)),
    Case("EmbeddingBag", (-1, 3)),
    Case("EmbeddingBag", (10, 3), {"padding_idx": 10}),
    Case("EmbeddingBag", (10, 3), {"padding_idx": -11}),
    Case("EmbeddingBag", (10, 3), {"_weight": array(9, 3)}),
]
