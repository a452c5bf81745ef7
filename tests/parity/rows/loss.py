"""Losses."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

INF, NAN = np.inf, np.nan
REDUCTIONS = ("mean", "sum", "none")
X, Y = array(4, 6), array(4, 6, seed=1)
LOGITS = array(5, 3)
CLASSES = integers(3, 5)
PIXELS = array(2, 3, 4, 2)
LABELS = integers(3, 2, 4, 2)
VOLUME = array(2, 3, 4, 2, 3)
VOLUME_LABELS = integers(3, 2, 4, 2, 3)
WEIGHT = np.array([0.5, 2.0, 1.5], np.float32)
SOME_IGNORED = np.array([0, -100, 2, -100, 1])
SIGNS = np.where(integers(2, 4, 6, seed=3) > 0, 1.0, -1.0).astype("float32")


def softmax(x: np.ndarray) -> np.ndarray:
    """Return probabilities over axis 1."""
    e = np.exp(x)
    return (e / e.sum(1, keepdims=True)).astype("float32")


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return probabilities."""
    return (1 / (1 + np.exp(-x))).astype("float32")


PROBABILITIES = softmax(array(5, 3, seed=1))
SOFT_PIXELS = softmax(array(2, 3, 4, 2, seed=1))
LOG_PROBABILITIES = np.log(softmax(LOGITS))
FLAGS = integers(2, 4, 6, seed=4).astype("float32")

# Differences of every kind: none, inside, on the edge of 1 and of 0.5, and beyond.
EDGES = np.array([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 0.25, 3.0, -7.0], np.float32)
ZEROS = np.zeros(9, np.float32)
NUMBER, OTHER = np.array(-0.5, np.float32), np.array(0.3, np.float32)  # without axes


def each_reduction(layer: str, inputs: tuple, note: str = "", /, **kwargs) -> list[Case]:
    """Return one case for each reduction."""
    call = kwargs.pop("call", {})
    extra = {k: kwargs.pop(k) for k in ("no_low", "no_second", "no_vmap") if k in kwargs}
    return [
        Case(layer, (), {**kwargs, "reduction": r}, inputs, call, note=note, **extra)
        for r in REDUCTIONS
    ]


NOT_TWICE = "torch has no second derivative of it"
NOT_LOW = "torch has no kernel for it on a CPU"

REGRESSION = [
    *[
        case
        for layer in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss")
        for case in each_reduction(layer, (X, Y))
    ],
    *[
        Case(layer, (), {"reduction": "none"}, (EDGES, ZEROS), note="edges")
        for layer in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss")
    ],
    *[
        Case(layer, (), {"reduction": "sum"}, (array(0, 3), array(0, 3)), note="empty")
        for layer in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss")
    ],
    *[
        Case(layer, (), {}, (OTHER, NUMBER), note="no axes")
        for layer in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss")
    ],
    Case("SmoothL1Loss", (), {"beta": 0.0}, (X, Y)),
    Case("SmoothL1Loss", (), {"beta": 0.5, "reduction": "none"}, (EDGES, ZEROS), note="edges"),
    Case("SmoothL1Loss", (), {"beta": 2}, (X, Y)),
    Case("HuberLoss", (), {"delta": 0.5, "reduction": "none"}, (EDGES, ZEROS), note="edges"),
    Case("HuberLoss", (), {"delta": 3}, (X, Y)),
    *each_reduction("PoissonNLLLoss", (X, np.abs(Y) * 3)),
    *each_reduction("PoissonNLLLoss", (np.abs(X), np.abs(Y) * 3), log_input=False),
    *each_reduction("PoissonNLLLoss", (X, np.abs(Y) * 3 + 0.1), full=True),
    Case(
        "PoissonNLLLoss",
        (),
        {"log_input": False, "full": True, "eps": 0.1},
        (np.abs(X), np.abs(Y) + 1.5),
    ),
    Case("PoissonNLLLoss", (), {"reduction": "none"}, (X, array(6)), note="broadcast"),
    *each_reduction("GaussianNLLLoss", (X, Y, np.abs(array(4, 6, seed=2)) + 0.1)),
    *each_reduction("GaussianNLLLoss", (X, Y, np.abs(array(4, 6, seed=2)) + 0.1), full=True),
    Case("GaussianNLLLoss", (), {}, (X, Y, np.abs(array(4, seed=2)) + 0.1), note="one a row"),
    Case("GaussianNLLLoss", (), {}, (X, Y, np.abs(array(4, 1, seed=2)) + 0.1), note="one a row"),
    Case("GaussianNLLLoss", (), {}, (X, Y, np.abs(array(1, 6, seed=2)) + 0.1), note="a column"),
    Case("GaussianNLLLoss", (), {"eps": 0.5}, (X, Y, np.abs(array(4, 6)) / 2), note="clamped"),
    Case("GaussianNLLLoss", (), {"eps": 0.5}, (X, Y, np.zeros((4, 6), "float32")), note="zero"),
    Case("GaussianNLLLoss", (), {}, (X, Y, 0.5), note="a number"),
    Case("GaussianNLLLoss", (), {"reduction": "none"}, (X, array(6), np.abs(X) + 0.1), note="wide"),
]

CROSS_ENTROPY = [
    *[
        Case("CrossEntropyLoss", (), {**options, "reduction": reduction}, inputs, note=note)
        for reduction in REDUCTIONS
        for options in ({}, {"weight": WEIGHT}, {"label_smoothing": 0.2, "weight": WEIGHT})
        for inputs, note in (
            ((LOGITS, CLASSES), "classes"),
            ((LOGITS, PROBABILITIES), "probabilities"),
            ((PIXELS, LABELS), "pixels"),
            ((PIXELS, SOFT_PIXELS), "soft pixels"),
        )
    ],
    Case("CrossEntropyLoss", (), {"label_smoothing": 0.3}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"label_smoothing": 1.0}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {}, (VOLUME, VOLUME_LABELS), note="volumes"),
    Case("CrossEntropyLoss", (), {}, (LOGITS, SOME_IGNORED), note="some ignored"),
    Case("CrossEntropyLoss", (), {"reduction": "sum"}, (LOGITS, np.full(5, -100)), note="ignored"),
    Case(
        "CrossEntropyLoss",
        (),
        {"weight": WEIGHT, "label_smoothing": 0.1},
        (LOGITS, SOME_IGNORED),
        note="some ignored",
    ),
    Case("CrossEntropyLoss", (), {"ignore_index": 1}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"ignore_index": 1, "reduction": "none"}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"ignore_index": -1}, (LOGITS, np.array([0, -1, 2, 2, 1]))),
    Case("CrossEntropyLoss", (), {}, (array(3), np.array(2)), note="one example"),
    Case("CrossEntropyLoss", (), {}, (array(3), np.ones(3, np.float32) / 3), note="one, soft"),
    Case("CrossEntropyLoss", (), {}, (array(5, 1), np.zeros(5, np.int64)), note="one class"),
    Case("CrossEntropyLoss", (), {}, (LOGITS * 1000, CLASSES), note="large logits"),
    Case("CrossEntropyLoss", (), {}, (LOGITS + 1e4, CLASSES), note="far logits", tolerance=2),
    Case("CrossEntropyLoss", (), {"reduction": "sum"}, (array(0, 3), integers(3, 0)), note="empty"),
    Case("CrossEntropyLoss", (), {"size_average": False}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"reduce": False}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"size_average": True, "reduce": True}, (LOGITS, CLASSES)),
    *[
        Case(layer, (), {**options, "reduction": reduction}, inputs, note=note)
        for layer in ("NLLLoss", "NLLLoss2d")
        for reduction in REDUCTIONS
        for options in ({}, {"weight": WEIGHT}, {"ignore_index": 1})
        for inputs, note in (
            ((LOG_PROBABILITIES, CLASSES), "classes"),
            ((LOG_PROBABILITIES, SOME_IGNORED % 3), "classes"),
            ((PIXELS, LABELS), "pixels"),
        )
        if layer == "NLLLoss" or note == "pixels"
    ],
    Case("NLLLoss", (), {"weight": WEIGHT}, (LOG_PROBABILITIES, SOME_IGNORED), note="ignored"),
    Case("NLLLoss", (), {}, (array(3), np.array(1)), note="one example"),
    Case("NLLLoss", (), {}, (VOLUME, VOLUME_LABELS), note="volumes"),
    Case("NLLLoss", (), {"reduction": "sum"}, (array(0, 3), integers(3, 0)), note="empty"),
    *[
        Case("KLDivLoss", (), {"reduction": r, "log_target": log}, (LOG_PROBABILITIES, target))
        for r in ("batchmean", *REDUCTIONS)
        for log, target in ((False, PROBABILITIES), (True, np.log(PROBABILITIES)))
    ],
    Case("KLDivLoss", (), {"reduction": "sum"}, (array(0, 3), array(0, 3)), note="empty"),
    Case("KLDivLoss", (), {"size_average": False}, (LOG_PROBABILITIES, PROBABILITIES)),
    *[
        Case(
            "LinearCrossEntropyLoss",
            (6, 3),
            {"bias": bias, "reduction": r, "weight": w, "ignore_index": ignore},
            (array(5, 6), CLASSES),
        )
        for r in REDUCTIONS
        for bias, w, ignore in ((False, None, None), (True, WEIGHT, 1))
    ],
    Case("LinearCrossEntropyLoss", (6, 3), {}, (array(5, 6), PROBABILITIES), note="soft"),
    Case("LinearCrossEntropyLoss", (6, 3), {"bias": True}, (array(6), np.array(1)), note="one"),
    Case("LinearCrossEntropyLoss", (6, 3), {"label_smoothing": 0.2}, (array(5, 6), CLASSES)),
    Case(
        "LinearCrossEntropyLoss",
        (6, 3),
        {"out_features": (4, 2), "bias": True, "weight": WEIGHT},
        (array(2, 6), LABELS),
        note="several targets of a row",
    ),
]

BINARY = [
    *each_reduction("BCELoss", (sigmoid(X), sigmoid(Y))),
    *each_reduction("BCELoss", (sigmoid(X), FLAGS), weight=np.abs(array(6, seed=2))),
    Case(
        "BCELoss",
        (),
        {"reduction": "none"},
        (np.array([0.0, 1.0, 0.5, 1e-30, 1.0], np.float32),),
        {"target": np.array([0.0, 1.0, 0.25, 0.0, 1.0], np.float32)},
        note="corners",
    ),
    Case(
        "BCELoss",
        (),
        {"reduction": "none"},
        (np.array([0.0, 1.0], np.float32),),
        {"target": np.array([1.0, 0.0], np.float32)},
        note="sure and wrong",
    ),
    Case("BCELoss", (), {"reduction": "sum"}, (array(0, 3), array(0, 3)), note="empty"),
    *each_reduction("BCEWithLogitsLoss", (X, sigmoid(Y))),
    *each_reduction(
        "BCEWithLogitsLoss",
        (X, sigmoid(Y)),
        weight=np.abs(array(6, seed=2)),
        pos_weight=np.abs(array(4, 1, seed=3)),
    ),
    Case(
        "BCEWithLogitsLoss",
        (),
        {"reduction": "none"},
        (np.array([0.0, -0.0, 200.0, -200.0, 200.0, -200.0], np.float32),),
        {"target": np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], np.float32)},
        note="corners",
    ),
    Case("BCEWithLogitsLoss", (), {"reduction": "sum"}, (array(0, 3), array(0, 3)), note="empty"),
    *each_reduction("MultiLabelSoftMarginLoss", (X, FLAGS)),
    *each_reduction("MultiLabelSoftMarginLoss", (X, FLAGS), weight=np.abs(array(6, seed=2))),
    Case("MultiLabelSoftMarginLoss", (), {}, (array(6), FLAGS[0]), note="one example"),
    Case("MultiLabelSoftMarginLoss", (), {"reduction": "sum"}, (array(0, 3), array(0, 3))),
    *each_reduction("SoftMarginLoss", (X,), call={"target": SIGNS}),
    Case("SoftMarginLoss", (), {"reduction": "none"}, (EDGES,), {"target": ZEROS + 1}),
    Case("SoftMarginLoss", (), {"reduction": "sum"}, (array(0, 3),), {"target": array(0, 3)}),
]

MARGIN = [
    *each_reduction("MarginRankingLoss", (X, Y), call={"target": SIGNS}),
    *each_reduction("MarginRankingLoss", (X, Y), margin=0.5, call={"target": SIGNS}),
    Case(
        "MarginRankingLoss",
        (),
        {"margin": 1.0, "reduction": "none"},
        (EDGES, ZEROS),
        {"target": ZEROS + 1},
        note="edges",
    ),
    Case("MarginRankingLoss", (), {"reduction": "none"}, (X, array(1, 6)), {"target": SIGNS}),
    *each_reduction("HingeEmbeddingLoss", (np.abs(X),), call={"target": SIGNS}),
    *each_reduction("HingeEmbeddingLoss", (np.abs(X),), margin=0.3, call={"target": SIGNS}),
    Case("HingeEmbeddingLoss", (), {"reduction": "none"}, (EDGES, SIGNS.ravel()[:9].astype(int))),
    Case("HingeEmbeddingLoss", (), {"reduction": "none"}, (EDGES,), {"target": ZEROS}, "neither"),
    *each_reduction("CosineEmbeddingLoss", (X, Y, np.array([1, -1, -1, 1]))),
    *each_reduction("CosineEmbeddingLoss", (X, Y, np.array([-1, -1, -1, 1])), margin=-0.2),
    Case("CosineEmbeddingLoss", (), {}, (array(6), array(6, seed=1), np.array(-1)), note="one"),
    Case("CosineEmbeddingLoss", (), {}, (X * 0, Y, np.array([1, -1, 0, 1])), note="at zero"),
    Case(
        "CosineEmbeddingLoss",
        (),
        {"reduction": "none"},
        (np.eye(4, 6, dtype="float32"), np.eye(4, 6, 1, dtype="float32"), np.array([-1] * 4)),
        note="orthogonal",
    ),
    *each_reduction("MultiMarginLoss", (LOGITS, CLASSES), no_low=NOT_LOW, no_second=NOT_TWICE),
    *each_reduction("MultiMarginLoss", (LOGITS, CLASSES), p=2, margin=0.5, weight=WEIGHT),
    Case("MultiMarginLoss", (), {}, (array(3), np.array(1)), note="one example"),
    Case("MultiMarginLoss", (), {"reduction": "none"}, (array(3), np.array(1)), note="one"),
    Case("MultiMarginLoss", (), {"reduction": "none"}, (array(3), np.array([1])), note="one"),
    Case("MultiMarginLoss", (), {"reduction": "none"}, (np.eye(3, dtype="float32"), np.arange(3))),
    *each_reduction(
        "MultiLabelMarginLoss",
        (X, np.stack([[3, 0, -1, 1, 2, 2], [-1] * 6, [5, 4, 3, 2, 1, 0], [1, 1, 2, 0, -1, 5]])),
        no_low=NOT_LOW,
        no_second=NOT_TWICE,
    ),
    Case("MultiLabelMarginLoss", (), {}, (array(4), np.array([3, 0, -1, 1])), note="one"),
    Case("MultiLabelMarginLoss", (), {"reduction": "none"}, (array(4), np.array([3, 0, -1, 1]))),
    Case(
        "MultiLabelMarginLoss",
        (),
        {"reduction": "none"},
        (np.array([[1.0, 0.0, 0.0]], np.float32), np.array([[0, -1, -1]])),
        note="edge",
    ),
    *[
        case
        for options in (
            {},
            {"swap": True},
            {"p": 1, "margin": 0.5},
            {"p": 3.0},
            {"p": INF, "swap": True},
            {"p": 1.5, "eps": 0.1},
        )
        for case in each_reduction("TripletMarginLoss", (X, Y, array(4, 6, seed=2)), **options)
    ],
    Case("TripletMarginLoss", (), {}, (array(6), array(6, seed=1), array(6, seed=2)), note="one"),
    *[
        Case("TripletMarginLoss", (), {"eps": 0.0, "p": p}, (X, X, X), note="all equal")
        for p in (1.0, 2.0, 3.0, INF)
    ],
    Case("TripletMarginLoss", (), {"reduction": "none"}, (X, array(1, 6), Y), note="broadcast"),
    Case("TripletMarginLoss", (), {"reduction": "sum"}, (array(0, 3),) * 3, note="empty"),
    *each_reduction("TripletMarginWithDistanceLoss", (X, Y, array(4, 6, seed=2))),
    *each_reduction(
        "TripletMarginWithDistanceLoss",
        (X, Y, array(4, 6, seed=2)),
        "of our own",
        distance_function=lambda a, b: abs(a - b).sum(-1),
        swap=True,
    ),
    *each_reduction(
        "TripletMarginWithDistanceLoss", (X, Y, array(4, 6, seed=2)), swap=True, margin=0.7
    ),
]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis."""
    return (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype("float32")


TIMES = log_softmax(array(9, 3, 5))
TARGETS = np.array([[1, 2, 2, 3], [4, 4, 1, 1], [2, 3, 0, 0]])
LENGTHS = {"input_lengths": (9, 9, 7), "target_lengths": (4, 3, 2)}
CTC = [
    *each_reduction(
        "CTCLoss",
        (TIMES, TARGETS, np.array([9, 9, 7]), np.array([4, 3, 2])),
        no_low=NOT_LOW,
        no_second=NOT_TWICE,
    ),
    *each_reduction("CTCLoss", (TIMES, TARGETS - 1 + (TARGETS == 0)), blank=4, call=LENGTHS),
    Case("CTCLoss", (2,), {}, (TIMES, np.where(TARGETS == 2, 0, TARGETS)), LENGTHS, "blank inside"),
    Case(
        "CTCLoss", (), {}, (TIMES, np.array([1, 2, 2, 3, 4, 4, 1, 2, 3])), LENGTHS, "concatenated"
    ),
    Case(
        "CTCLoss",
        (),
        {"reduction": "none"},
        (TIMES, np.array([1, 2, 2, 3, 4, 4, 1, 2, 3]), np.array([9, 9, 7]), np.array([4, 3, 2])),
        note="concatenated, lengths as arrays",
    ),
    *[
        Case(
            "CTCLoss",
            (),
            {"zero_infinity": True, "reduction": r},
            (TIMES, np.array([[1, 1, 1, 1], [1, 2, 3, 4], [2, 2, 2, 2]])),
            {"input_lengths": (6, 4, 9), "target_lengths": (4, 4, 4)},
            note="does not fit",
        )
        for r in REDUCTIONS
    ],
    Case("CTCLoss", (), {}, (TIMES, TARGETS), {**LENGTHS, "target_lengths": (4, 0, 1)}, "no label"),
    Case(
        "CTCLoss", (), {}, (TIMES[:, 0], TARGETS[0], np.array(9), np.array(4)), note="one example"
    ),
    Case(
        "CTCLoss",
        (),
        {"reduction": "none"},
        (TIMES[:, 0], TARGETS[0]),
        {"input_lengths": (9,), "target_lengths": (4,)},
        note="one example",
    ),
    Case("CTCLoss", (), {}, (array(9, 3, 5), TARGETS), LENGTHS, "not normalised"),
    Case(
        "CTCLoss",
        (),
        {"reduction": "none"},
        (TIMES, np.zeros((3, 0), np.int64)),
        {"input_lengths": (9, 9, 7), "target_lengths": (0, 0, 0)},
        note="no labels at all",
    ),
]

LAYERS = [*REGRESSION, *CROSS_ENTROPY, *BINARY, *MARGIN, *CTC]

POSITIVE = np.abs(array(3, 4, seed=2))
FUNCTIONS = [
    *[
        Call(name, (array(3, 4), array(3, 4, seed=1)), {"weight": POSITIVE, "reduction": r})
        for name in ("mse_loss", "l1_loss", "huber_loss")
        for r in REDUCTIONS
    ],
    *[
        Call(name, (array(0, 4), array(0, 4)))
        for name in ("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss")
    ],
    *[
        Call(name, (array(3, 4), integers(9, 3, 4)))
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "poisson_nll_loss")
    ],
    *[
        Call(
            name,
            (np.array([INF, -INF, NAN, 1.0], np.float32),),
            {"target": ZEROS[:4], "reduction": "none"},
            note="not finite",
        )
        for name in ("mse_loss", "huber_loss", "smooth_l1_loss")
    ],
    Call("cross_entropy", (array(2, 3), np.array([-100, -100]))),
    Call("cross_entropy", (array(0, 3), integers(3, 0))),
    Call("cross_entropy", (array(2, 3), np.array([[1.0, 0, 0], [0, 0.5, 0.5]]))),
    Call("cross_entropy", (array(2, 3), np.array([0, 2], np.uint8))),
    Call(
        "cross_entropy",
        (np.array([[-INF, 0.0, 1.0]], np.float32), np.array([2])),
        note="an impossible class",
    ),
    Call("nll_loss", (array(2, 3), np.array([-100, -100]))),
    Call("nll_loss", (array(0, 3), integers(3, 0))),
    Call(
        "nll_loss",
        (np.array([[-INF, 0.0, 1.0]], np.float32), np.array([0])),
        {"reduction": "none"},
    ),
    Call(
        "kl_div",
        (LOG_PROBABILITIES,),
        {"target": np.array([[0.0, 0.5, 0.5]] * 5, np.float32), "reduction": "none"},
        note="zero",
    ),
    Call("kl_div", (array(3, 4), np.abs(array(4))), {"reduction": "sum"}, note="broadcast"),
    Call(
        "kl_div",
        (np.array(-0.5, np.float32), np.array(0.5, np.float32)),
        {"reduction": "batchmean"},
        note="no axes",
    ),
    Call("binary_cross_entropy", (sigmoid(X), sigmoid(Y)), {"weight": np.abs(array(4, 1))}),
    Call("binary_cross_entropy_with_logits", (X, sigmoid(Y)), {"weight": array(4, 1)}),
    Call("gaussian_nll_loss", (X, Y, np.abs(array(4, 6, seed=2)) + 0.1)),
    Call("multilabel_soft_margin_loss", (X, FLAGS, np.abs(array(6)))),
    Call("soft_margin_loss", (X, SIGNS.astype(int))),
    Call("margin_ranking_loss", (X, Y, SIGNS.astype(int))),
    Call("hinge_embedding_loss", (X, SIGNS.astype(int))),
    Call("cosine_embedding_loss", (X, Y, np.array([1, -1, -1, 1]))),
    Call("multi_margin_loss", (LOGITS, CLASSES)),
    Call("multilabel_margin_loss", (array(4), np.array([3, 0, -1, 1]))),
    Call("triplet_margin_loss", (X, Y, array(4, 6, seed=2))),
    Call("triplet_margin_with_distance_loss", (X, Y, array(4, 6, seed=2))),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, 7), (4, 3, 2))),
    Call(
        "ctc_loss",
        (TIMES, TARGETS, (9, 3, 9), (4, 4, 2)),
        {"reduction": "none"},
        note="does not fit",
        no_grad="not a number there",
    ),
    Call("linear_cross_entropy", (array(5, 6), array(3, 6), CLASSES)),
]

PAIR = (array(5, 4), array(5, 4))
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
    Call("cross_entropy", (array(2, 3, 4), np.zeros((2, 5), np.int64))),
    Call("nll_loss", (array(2, 3), np.array([0, 3]))),
    Call("nll_loss", (array(2, 3), np.array([0, 1, 2]))),
    Call("nll_loss", (array(2, 3), np.array([0.0, 1.0]))),
    Call("nll_loss", (array(2, 3), np.array([0, 1])), {"weight": array(2)}),
    Call("nll_loss", (array(2, 3, 4), np.zeros((2, 5), np.int64))),
    Call("nll_loss", (NUMBER, np.array(0))),
    *[
        Call(name, PAIR, {"reduction": "abc"})
        for name in (
            "l1_loss",
            "mse_loss",
            "smooth_l1_loss",
            "huber_loss",
            "poisson_nll_loss",
            "kl_div",
            "soft_margin_loss",
            "hinge_embedding_loss",
            "multilabel_margin_loss",
            "multilabel_soft_margin_loss",
            "binary_cross_entropy_with_logits",
        )
    ],
    *[
        Call(name, (array(5, 4), array(5)))
        for name in (
            "poisson_nll_loss",
            "soft_margin_loss",
            "hinge_embedding_loss",
            "multilabel_soft_margin_loss",
            "binary_cross_entropy",
            "binary_cross_entropy_with_logits",
        )
    ],
    Call("kl_div", (array(5, 4), array(5)), {"reduction": "sum"}),
    Call("mse_loss", (array(2, 3), array(2, 3)), {"weight": array(3)}),
    Call("l1_loss", (array(2, 3), array(2, 3)), {"weight": array(3)}),
    Call("huber_loss", (array(2, 3), array(2, 3)), {"weight": array(3)}),
    Call("huber_loss", PAIR, {"delta": 0}),
    Call("huber_loss", PAIR, {"delta": -1}),
    Call("smooth_l1_loss", PAIR, {"beta": -1.0}),
    Call("gaussian_nll_loss", (X, Y, np.abs(X)), {"reduction": "abc"}),
    Call("gaussian_nll_loss", (array(3, 2, 3), array(3, 2, 3), np.abs(array(3, 2, 2)))),
    Call("gaussian_nll_loss", (array(3, 2, 3), array(3, 2, 2), np.abs(array(3, 2, 3)))),
    Call("gaussian_nll_loss", (X, Y, -np.abs(X))),
    Call("gaussian_nll_loss", (X, Y, -1.0)),
    Call("binary_cross_entropy", (np.array([1.5], np.float32), np.array([1.0], np.float32))),
    Call("binary_cross_entropy", (np.array([NAN], np.float32), np.array([1.0], np.float32))),
    Call("binary_cross_entropy", (sigmoid(X), sigmoid(Y), array(5))),
    Call("margin_ranking_loss", (*PAIR, array(5, 4)), {"reduction": "abc"}),
    Call("margin_ranking_loss", (*PAIR, array(5))),
    Call("cosine_embedding_loss", (X, Y, SIGNS)),
    Call("cosine_embedding_loss", (array(6), array(6), np.ones(1, np.int64))),
    Call("cosine_embedding_loss", (X, Y, np.array(1))),
    Call("cosine_embedding_loss", (X, Y, np.ones(3, np.int64))),
    Call("cosine_embedding_loss", (X, array(4, 5), np.ones(4, np.int64))),
    Call("multi_margin_loss", (array(5, 4), array(5)), {"reduction": "abc"}),
    Call("multi_margin_loss", (array(5, 0), array(5))),
    Call("multi_margin_loss", (array(0), array(5))),
    Call("multi_margin_loss", (array(5, 4), array(5, 4))),
    Call("multi_margin_loss", (array(5, 4), array(5))),
    Call("multi_margin_loss", (array(5, 4), array(5)), {"weight": np.array(1.0)}),
    Call("multi_margin_loss", (array(5, 4), array(5)), {"weight": array(5, 4)}),
    Call("multi_margin_loss", (array(5, 4), integers(4, 5)), {"weight": array(5)}),
    Call("multi_margin_loss", (array(5, 4), integers(4, 5)), {"p": 3}),
    Call("multi_margin_loss", (array(2, 4), np.array([0, 4]))),
    Call("multilabel_margin_loss", (array(5, 0), array(5, 4))),
    Call("multilabel_margin_loss", (array(0), array(0))),
    Call("multilabel_margin_loss", (array(5, 4), array(4))),
    Call("multilabel_margin_loss", (array(5, 4), np.array(1.0))),
    Call("multilabel_margin_loss", (array(1, 4), np.array([[0, 4, -1, -1]]))),
    Call("multilabel_margin_loss", (array(1, 4), np.array([[0, -2, -1, -1]]))),
    *[
        Call(name, (array(3, 4), array(3, 4), array(3, 4)), options)
        for name in ("triplet_margin_loss", "triplet_margin_with_distance_loss")
        for options in ({"reduction": "abc"}, {"margin": -1.0}, {"margin": 0})
    ],
    *[
        Call(name, tuple(array(*shape) for shape in shapes))
        for name in ("triplet_margin_loss", "triplet_margin_with_distance_loss")
        for shapes in (
            ((3, 5), (3, 4), (3, 4)),
            ((3, 4), (3, 5), (3, 4)),
            ((3, 4), (3, 4), (3, 5)),
            ((3,), (3, 4), (3, 4)),
            ((3, 4), (3,), (3, 4)),
            ((3, 4), (3, 4), (3,)),
        )
    ],
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, 7), (4, 3, 2)), {"blank": 5}),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, 7), (4, 3, 2)), {"blank": -1}),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9), (4, 3, 2))),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, 7), (4, 3))),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, 10), (4, 3, 2))),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, -1), (4, 3, 2))),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, 7), (4, 3, 5))),
    Call("ctc_loss", (TIMES, TARGETS, (9, 9, 7), (4, 3, -1))),
    Call("ctc_loss", (TIMES, TARGETS[:2], (9, 9, 7), (4, 3, 2))),
    Call("ctc_loss", (TIMES, np.arange(1, 5), (9, 9, 7), (4, 3, 2))),
    Call("ctc_loss", (array(0, 3, 5), TARGETS, (0, 0, 0), (4, 3, 2))),
    Call("linear_cross_entropy", (array(2, 3, 3), array(2, 3), array(3, 2))),
    Call("linear_cross_entropy", (array(2, 3), array(2), array(2, 2))),
    Call("linear_cross_entropy", (array(2, 3), array(2, 4), array(2, 2))),
    Call("linear_cross_entropy", (array(2, 3), array(2, 3), array(2, 2)), {"ignore_index": 0}),
    Call("linear_cross_entropy", (array(3), array(2, 4, 3), array(2, 4))),
    Call("linear_cross_entropy", (array(2, 3), array(2, 3), array(2)), {"linear_bias": array(3)}),
    Call("linear_cross_entropy", (array(2, 3), array(2, 3), np.array([0, 2]))),
]

LAYER_MISUSE = [
    Case("CrossEntropyLoss", (), {}, (array(2, 3), np.zeros((2, 3), np.int64))),
    Case("CrossEntropyLoss", (), {}, (array(2, 3), array(2))),
    Case("CrossEntropyLoss", (), {}, (array(2, 3), np.array([0, 1, 2]))),
    Case("CrossEntropyLoss", (), {"weight": array(2)}, (array(2, 3), np.array([0, 1]))),
    Case("CrossEntropyLoss", (), {"ignore_index": 1}, (array(2, 3), softmax(array(2, 3)))),
    Case("CrossEntropyLoss", (), {"label_smoothing": 1.5}, (array(2, 3), np.array([0, 1]))),
    Case("CrossEntropyLoss", (), {"reduction": "abc"}, (array(2, 3), np.array([0, 1]))),
    Case("LinearCrossEntropyLoss", (3, 2), {}, (array(4, 3), np.zeros((4, 2), np.int64))),
    Case("LinearCrossEntropyLoss", (3, 2), {}, (array(4, 3), array(5, 2))),
    Case("LinearCrossEntropyLoss", (3, 2), {}, (array(4, 5), array(4, 2))),
    Case("LinearCrossEntropyLoss", (3, 2), {"weight": array(3)}, (array(4, 3), array(4, 2))),
    Case("LinearCrossEntropyLoss", (3, 2), {"label_smoothing": 2.0}, (array(4, 3), array(4, 2))),
    Case("MultiMarginLoss", (), {}, (array(5, 10), np.array([0, 1, 2]))),
    Case("MultiMarginLoss", (3,)),
    Case("MultiMarginLoss", (), {"weight": array(2, 3)}),
    Case("NLLLoss", (), {"weight": np.zeros(0, np.int32)}, (array(0, 0), integers(1, 0))),
    Case("HuberLoss", (), {"delta": 1.0 + 0.0j}),
    Case("HuberLoss", (), {"delta": 0.0}, PAIR),
    Case("SmoothL1Loss", (), {"beta": -1.0}, PAIR),
    Case("TripletMarginLoss", (0.0,)),
    Case("TripletMarginWithDistanceLoss", (), {"margin": 0.0}),
    Case("KLDivLoss", (), {"reduction": "abc"}, PAIR),
    Case("BCELoss", (), {}, (sigmoid(array(5, 4)), sigmoid(array(4)))),
    Case("GaussianNLLLoss", (), {}, (X, Y, -np.abs(X))),
    Case("CTCLoss", (7,), {}, (TIMES, TARGETS), LENGTHS),
]
