"""Non-linearities and softmax."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

INF = np.inf
NAN = np.nan
X = array(4, 6)
IMAGE = array(2, 4, 7, 8)
# With both zeros and every corner of the piecewise functions: ±0.5, ±1, ±3, 6, and 20 of softplus.
SPECIAL = np.array(
    [-30, -6, -3, -1, -0.5, -0.3, -0.0, 0.0, 0.2, 0.5, 1, 2, 3, 6, 20, 20.5, 30], np.float32
)
ENDS = np.array([-INF, -200.0, 200.0, INF], np.float32)
NO_EXAMPLES = array(0, 6)

ELEMENTWISE = (
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
)
WITH_INPLACE = (
    "CELU",
    "ELU",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
)

LAYERS = [
    Case(
        "Hardsigmoid",
        (),
        {},
        (SPECIAL,),
        note="a sixth",
        tolerance=30,  # torch's float64 derivative is a sixth in float32
        no_second="derivative for aten::hardsigmoid_backward is not implemented",
    ),
    Case("Hardsigmoid", (), {}, (SPECIAL,)),
    *[Case(name, (), {}, (SPECIAL,)) for name in ELEMENTWISE],
    *[Case(name, (), {"inplace": True}, (X,)) for name in WITH_INPLACE],
    Case("CELU", (0.4,), {}, (SPECIAL,)),
    Case("CELU", (-2.0,), {}, (X,), note="a negative alpha"),
    Case("ELU", (0.3,), {}, (SPECIAL,)),
    Case("ELU", (-1.0,), {}, (X,), note="a negative alpha"),
    Case("GELU", (), {"approximate": "tanh"}, (SPECIAL,)),
    Case("GLU", (), {}, (X,)),
    Case("GLU", (1,), {}, (IMAGE,)),
    Case("GLU", (0,), {}, (array(0, 3),), note="no examples"),
    Case("Hardshrink", (1.0,), {}, (SPECIAL,)),
    Case("Hardshrink", (-1.0,), {}, (SPECIAL,), note="a negative band"),
    Case("Hardtanh", (-0.5, 3), {}, (SPECIAL,)),
    Case("Hardtanh", (-INF, 1.0), {}, (SPECIAL,), note="one end"),
    Case("LeakyReLU", (0.3,), {}, (SPECIAL,)),
    Case("LeakyReLU", (-0.3,), {}, (SPECIAL,), note="a negative slope"),
    Case("LogSoftmax", (1,), {}, (X,)),
    Case("LogSoftmax", (-3,), {}, (IMAGE,)),
    Case("LogSoftmax", (0,), {}, (SPECIAL * 10,)),
    Case("PReLU", (4,), {}, (IMAGE,)),
    Case("PReLU", (6,), {"init": -0.1}, (X,)),
    Case("PReLU", (1,), {}, (array(),), note="a scalar"),
    Case("PReLU", (1,), {}, (IMAGE,), note="one weight"),
    Case("PReLU", (6,), {}, (NO_EXAMPLES,), note="no examples"),
    # Equal bounds leave nothing to draw, so training can be compared, too.
    Case(
        "RReLU",
        (0.25, 0.25),
        {},
        (SPECIAL,),
        modes=True,
        no_low="torch has no kernel for float16 on the CPU",
        no_second="a pure call in training mode takes a key",
        no_vmap="a pure call in training mode takes a key",
    ),
    Case("RReLU", (0.25, 0.25, True), {}, (X,), modes=True),
    Case("ReLU", (), {}, (NO_EXAMPLES,), note="no examples"),
    Case("Softmax", (), {"dim": 1}, (X,)),
    Case("Softmax", (), {"dim": -3}, (IMAGE,)),
    Case("Softmax", (), {"dim": 0}, (SPECIAL * 10,)),
    Case("Softmax", (), {"dim": 0}, (array(),), note="a scalar"),
    Case("Softmax", (), {"dim": 1}, (array(3, 0),), note="no classes"),
    Case("Softmax", (), {"dim": 0}, (np.array([-INF, -INF], np.float32),), note="all -inf"),
    Case("Softmax2d", (), {}, (IMAGE,)),
    Case("Softmax2d", (), {}, (array(4, 3, 2),), note="one example"),
    Case("Softmin", (1,), {}, (X,)),
    Case("Softmin", (0,), {}, (SPECIAL * 10,)),
    Case("Softplus", (2.0, 3.0), {}, (SPECIAL,)),
    Case("Softplus", (-1.0,), {}, (X,), note="a negative beta"),
    Case("Softshrink", (1.0,), {}, (SPECIAL,)),
    Case("Softshrink", (0,), {}, (SPECIAL,)),
    Case("Threshold", (0.5, -7.0), {}, (SPECIAL,)),
    Case("Threshold", (0.5, 20, True), {}, (X,)),
]

# Their limits, infinities and what is not a number.
_UNARY = (
    "celu",
    "elu",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
)

FUNCTIONS = [
    # torch's exact gelu of infinity is infinity or not a number, as the processor has it.
    *[Call(name, (ENDS if name != "gelu" else ENDS[1:-1],), note="ends") for name in _UNARY],
    # 64 of them: torch's loops over whole vector registers and over single elements disagree.
    *[Call(name, (np.full(64, NAN, np.float32),), note="NaN") for name in _UNARY],
    Call("gelu", (ENDS,), {"approximate": "tanh"}, note="ends"),
    Call("hardtanh", (integers(9, 8) - 4,), {"min_val": -2, "max_val": 3}),
    Call("hardtanh", (SPECIAL,), {"min_val": 1.0, "max_val": 1.0}),
    Call("relu", (integers(5, 4) - 2,)),
    Call("relu", (integers(5, 4).astype("uint8"),)),
    Call("relu6", (integers(9, 8) - 1,)),
    Call("relu6", (integers(9, 8).astype("uint8"),)),
    Call("threshold", (integers(9, 8), 3.5, 1.5)),
    Call("threshold", (np.array([NAN, INF, -INF], np.float32), 0.5, 2.0)),
    Call("sigmoid", (integers(5, 4),)),
    Call("sigmoid", (np.array([True, False]),)),
    Call("softsign", (integers(5, 4),)),
    Call("tanh", (integers(5, 4),)),
    Call("tanhshrink", (integers(5, 4),)),
    Call("softplus", (SPECIAL, 0.5, 100), note="a high threshold"),
    Call("softplus", (SPECIAL, 0.0), note="no beta", no_grad="infinite"),
    Call("prelu", (SPECIAL, np.array(0.2, np.float32))),
    Call("prelu", (ENDS, np.array([0.5], np.float32)), note="ends", no_grad="infinite"),
    Call("prelu", (array(3, 2, 5), array(2))),
    Call("glu", (array(3, 4, 2), -2)),
    Call("rrelu", (SPECIAL, 0.1, 0.5)),
    Call("rrelu", (SPECIAL, 0.3, 0.3, True), many="it may draw", no_grad="no key under jit"),
    *[
        Call(name, (SPECIAL,), kwargs)
        for name, kwargs in (
            ("relu_", {}),
            ("celu_", {"alpha": 0.5}),
            ("elu_", {"alpha": 0.5}),
            ("hardtanh_", {"min_val": -0.5, "max_val": 3.0}),
            ("leaky_relu_", {"negative_slope": 0.3}),
            ("rrelu_", {"lower": 0.1, "upper": 0.5}),
            ("selu_", {}),
            ("threshold_", {"threshold": 0.5, "value": 2.0}),
        )
    ],
    Call("log_softmax", (array(4, 3) * 100,), {"dim": -1}),
    Call("softmin", (array(3, 4), -1)),
    Call("softmax", (np.array([[1.0, NAN], [INF, 0.0], [-INF, 0.0]], np.float32),), {"dim": 1}),
    Call("softmin", (np.array([[1.0, NAN], [INF, 0.0], [-INF, 0.0]], np.float32),), {"dim": 1}),
    Call("log_softmax", (np.array([[INF, 0.0], [-INF, 0.0]], np.float32),), {"dim": 1}),
]

INTS = integers(3, 4)
MISUSE = [
    *[
        Call(name, (INTS,), note="integers")
        for name in _UNARY
        if name not in ("hardtanh", "relu", "relu6", "sigmoid", "softsign", "tanh", "tanhshrink")
    ],
    *[
        Call(name, (np.array([True]),), note="truth values")
        for name in ("relu", "relu6", "hardtanh", "softsign", "tanhshrink", "softplus")
    ],
    Call("threshold", (np.array([True]), 0, 1)),
    Call("prelu", (INTS, integers(3, 1))),
    Call("rrelu", (INTS,)),
    Call("glu", (INTS,)),
    Call("celu", (array(3), 0.0)),
    Call("gelu", (array(3),), {"approximate": "erf"}),
    Call("glu", (array(2, 3),)),
    Call("glu", (array(),)),
    Call("glu", (array(2, 4), 2)),
    Call("gumbel_softmax", (array(2, 3),), {"dim": 2}, many="it draws"),
    Call("gumbel_softmax", (INTS,), many="it draws"),
    Call("hardtanh", (array(3), 1.0, -1.0)),
    Call("hardtanh", (INTS.astype("uint8"),)),
    Call("prelu", (array(2, 3), array(2))),
    Call("prelu", (array(2, 3), array(1, 3))),
    Call("prelu", (array(3), array(3))),
    Call("prelu", (array(), array(2))),
    Call("prelu", (array(3), integers(3, 1))),
    Call("rrelu", (array(3), 0.5, 0.1)),
    Call("rrelu", (array(3), 0.5, INF), {"training": True}),
    Call("softshrink", (array(3), -1.0)),
    Call("softmax", (array(2, 3),), {"dim": 2}),
    Call("softmax", (INTS,), {"dim": 0}),
    Call("softmin", (array(2, 3), -3)),
    Call("softmin", (INTS, 0)),
    Call("log_softmax", (array(2, 3),), {"dim": 2}),
    Call("log_softmax", (INTS,), {"dim": 0}),
]

LAYER_MISUSE = [
    Case("Hardtanh", (1.0, 1.0), {}, (X,)),
    Case("Hardtanh", (1.0, -1.0), {}, (X,)),
    Case("Softmax2d", (), {}, (X,)),
    Case("Softmax2d", (), {}, (array(1, 2, 3, 4, 5),)),
    Case("PReLU", (3,), {}, (X,)),
    Case("GLU", (), {}, (array(3),)),
    Case("Softshrink", (-1.0,), {}, (X,)),
    Case("CELU", (0.0,), {}, (X,)),
    Case("RReLU", (0.5, 0.1), {}, (X,)),
    Case("GELU", ("erf",), {}, (X,)),
]
