"""Norms, distances and similarities."""

from __future__ import annotations

import math

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

X, Y = array(4, 5), array(4, 5, seed=1)
ZEROS = np.where(np.arange(4)[:, None] == 1, 0, X).astype("float32")  # one vector of zeros
HOLES = np.where(np.arange(20).reshape(4, 5) % 3 == 0, 0, X).astype("float32")
TIED = np.array([[1, -2, 2, 2], [0, 0, 0, 0], [3, 1, -3, 0]], "float32")
EQUAL = np.array([[1, 2, 4], [1, 2, 4], [3, 0, 6]], "float32")  # two rows alike, and ties
DEGREES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf)

LAYERS = [
    Case("PairwiseDistance", (), {}, (X, Y)),
    Case("PairwiseDistance", (1,), {"keepdim": True}, (X, Y)),
    Case("PairwiseDistance", (3.0, 1e-2), {}, (X, Y)),
    Case("PairwiseDistance", (math.inf,), {}, (X, Y)),
    Case("PairwiseDistance", (-1.0,), {}, (X, Y)),
    Case("PairwiseDistance", (), {}, (array(5), array(5, seed=1)), note="one vector"),
    Case("PairwiseDistance", (), {}, (array(0, 5), array(0, 5)), note="no vectors"),
    Case("CosineSimilarity", (), {}, (X, Y)),
    Case("CosineSimilarity", (2, 0.5), {}, (array(2, 3, 4), array(2, 3, 4, seed=1))),
    Case("CosineSimilarity", (0,), {}, (array(5), array(5, seed=1)), note="one vector"),
    Case("CosineSimilarity", (), {}, (array(0, 5), array(0, 5)), note="no vectors"),
]

FUNCTIONS = [
    *[Call("pairwise_distance", (X, Y, p)) for p in (*DEGREES[1:], -math.inf, -2.0)],
    Call("pairwise_distance", (X, Y, 0.0), no_grad="a count has no derivative"),
    Call("pairwise_distance", (X, X), note="equal vectors"),
    Call("pairwise_distance", (X, X, 2.0, 0.0), note="equal vectors and no eps"),
    Call("pairwise_distance", (HOLES, ZEROS * 0, 3.0, 0.0), note="zeros among differences"),
    Call("pairwise_distance", (array(2, 4, 3), array(4, 3)), {"keepdim": True}),
    Call("pairwise_distance", (array(2, 1), array(2, 3))),
    Call("pairwise_distance", (array(2, 0), array(2, 0))),
    Call("pairwise_distance", (np.array(1.0, "float32"), np.array(3.0, "float32"))),
    Call("cosine_similarity", (ZEROS, Y), note="a vector of zeros", tolerance=1.0),
    Call("cosine_similarity", (ZEROS, ZEROS * 2), note="two vectors of zeros"),
    Call("cosine_similarity", (X * np.float32(1e-5), Y), {"eps": 1e-2}, note="shorter than eps"),
    Call("cosine_similarity", (array(2, 1, 3), array(4, 3)), {"dim": -1}),
    Call("cosine_similarity", (array(2, 1), array(2, 3)), note="an axis that is broadcast"),
    Call("cosine_similarity", (array(2, 0), array(2, 0))),
    Call("cosine_similarity", (X, integers(5, 4, 5)), note="integers"),
    *[Call("normalize", (x, p)) for x in (X, TIED) for p in (*DEGREES[1:], -math.inf)],
    Call("normalize", (X, -1.5)),
    Call("normalize", (HOLES, 1.0)),
    Call("normalize", (HOLES, 3.0)),
    Call("normalize", (X, 0.0)),
    Call("normalize", (ZEROS,), {"dim": -1}, note="a vector of zeros"),
    Call("normalize", (X,), {"eps": 2.0}, note="shorter than eps"),
    Call("normalize", (np.array([[3, 4]], "float32"),), {"eps": 5.0}, note="as long as eps"),
    Call("normalize", (array(2, 3, 4),), {"dim": (1, 2)}),
    Call("normalize", (array(2, 3, 4),), {"dim": ()}),
    Call("normalize", (array(2, 0),)),
    Call("normalize", (np.array(3.0, "float32"),), {"dim": 0}),
    *[Call("pdist", (x, p)) for x in (X, EQUAL) for p in DEGREES],
    Call("pdist", (array(2, 3),)),
    Call("pdist", (array(1, 3),)),
    Call("pdist", (array(0, 3),), no_grad="torch's backward ends the process"),
    Call("pdist", (array(3, 0),)),
]

MISUSE = [
    Call("pairwise_distance", (array(2, 3), array(2, 4))),
    Call("pairwise_distance", (array(2, 0), array(2, 0), math.inf)),
    Call("cosine_similarity", (array(2, 3), array(2, 4))),
    Call("cosine_similarity", (array(3), array(3))),
    Call("cosine_similarity", (integers(5, 2, 3), integers(5, 2, 3))),
    Call("normalize", (array(3),)),
    Call("normalize", (integers(5, 2, 3),)),
    Call("normalize", (array(2, 3),), {"dim": (1, 1)}),
    Call("normalize", (array(2, 0), math.inf)),
    Call("normalize", (array(2, 3), "two")),
    Call("pdist", (array(2, 3, 4),)),
    Call("pdist", (array(3),)),
    Call("pdist", (array(3, 2), -1.0)),
    Call("pdist", (integers(5, 3, 2),)),
]

LAYER_MISUSE = [
    Case("PairwiseDistance", (), {}, (array(2, 3), array(2, 4))),
    Case("CosineSimilarity", (2,), {}, (array(2, 3), array(2, 3))),
]
