"""Recurrent layers and cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.parity.oracle import Case, array

SEQUENCE = array(7, 3, 5)  # (T, N, F)
FIRST = {"rnn": array(4, 3, 6, seed=1), "cell": array(4, 3, 6, seed=2)}

# The cost of compiling for many combinations counts: each row covers several options at once.
OPTIONS: list[tuple[dict[str, Any], tuple, str]] = [
    ({}, (SEQUENCE,), ""),
    ({"bias": False, "bidirectional": True}, (SEQUENCE,), ""),
    ({"bidirectional": True, "num_layers": 2, "batch_first": True}, (array(3, 7, 5),), ""),
    ({"num_layers": 2, "dropout": 1.0}, (SEQUENCE,), "all dropped"),
    ({"num_layers": 2, "dropout": 0.0}, (array(7, 5),), "one sequence"),
    ({"bidirectional": True, "batch_first": True}, (array(7, 5),), "one sequence"),
    ({}, (array(1, 3, 5),), "one step"),
    ({}, (array(3, 0, 5),), "no sequences"),
    ({}, (100 * SEQUENCE,), "saturated"),
]

LAYERS = [
    Case(layer, (5, 6), kwargs, inputs, note=note, modes=kwargs.get("dropout") == 1.0)
    for layer in ("RNN", "LSTM", "GRU")
    for kwargs, inputs, note in OPTIONS
    if not (layer == "RNN" and note == "saturated")
]
LAYERS += [
    # Two layers in two directions have a first state for each of the four.
    Case("RNN", (5, 6, 2), {"bidirectional": True}, (SEQUENCE, FIRST["rnn"]), note="with hx"),
    Case("GRU", (5, 6, 2), {"bidirectional": True}, (SEQUENCE, FIRST["rnn"]), note="with hx"),
    Case("RNN", (5, 6), {}, (array(7, 5), array(1, 6)), note="one sequence with hx"),
    Case("GRU", (5, 6), {}, (array(7, 5), array(1, 6)), note="one sequence with hx"),
    Case(
        "GRU",
        (5, 6),
        {"batch_first": True},
        (array(3, 7, 5), array(1, 3, 6)),
        note="batch first, hx",
    ),
    Case("RNN", (5, 6, 1, "relu"), {}, (SEQUENCE,)),
    Case(
        "RNN", (5, 6), {"nonlinearity": "relu", "bidirectional": True, "bias": False}, (SEQUENCE,)
    ),
    Case("RNN", (5, 6, 1, "relu"), {}, (0 * SEQUENCE,), note="at zero"),
    Case("RNN", (5, 6, 2, "tanh", False, True, 0.0, True), {}, (array(3, 7, 5),)),
    Case("LSTM", (5, 6, 2, False, True, 0.0, True, 2), {}, (array(3, 7, 5),)),
    Case("LSTM", (5, 6), {"proj_size": 4}, (SEQUENCE,)),
    Case("LSTM", (5, 6, 2), {"proj_size": 4, "bidirectional": True}, (SEQUENCE,)),
    Case(
        "LSTM",
        (5, 6, 2),
        {"bidirectional": True},
        (SEQUENCE,),
        {"hx": (FIRST["rnn"], FIRST["cell"])},
        note="with hx",
    ),
    Case(
        "LSTM",
        (5, 6),
        {"proj_size": 4},
        (array(7, 5),),
        {"hx": (array(1, 4), array(1, 6))},
        note="one sequence with hx",
    ),
    Case("GRU", (5, 6, 2, False, True, 0.0, True), {}, (array(3, 7, 5),)),
    Case("RNNCell", (5, 6), {}, (array(3, 5), array(3, 6))),
    Case("RNNCell", (5, 6, False, "relu"), {}, (array(3, 5), array(3, 6))),
    Case("RNNCell", (5, 6), {}, (array(3, 5),), note="without hx"),
    Case("RNNCell", (5, 6), {}, (array(5), array(6)), note="one example"),
    Case("RNNCell", (5, 6), {}, (array(0, 5), array(0, 6)), note="no examples"),
    Case("LSTMCell", (5, 6), {}, (array(3, 5), (array(3, 6), array(3, 6, seed=1)))),
    Case("LSTMCell", (5, 6, False), {}, (array(3, 5),), note="without hx"),
    Case("LSTMCell", (5, 6), {}, (array(5),), {"hx": (array(6), array(6))}, note="one example"),
    Case("LSTMCell", (5, 6), {}, (array(0, 5),), note="no examples"),
    Case("GRUCell", (5, 6), {}, (array(3, 5), array(3, 6))),
    Case("GRUCell", (5, 6, False), {}, (array(3, 5),), note="without hx"),
    Case("GRUCell", (5, 6), {}, (array(5), array(6)), note="one example"),
    Case("GRUCell", (5, 6), {}, (array(0, 5), array(0, 6)), note="no examples"),
]

_STATE = {
    "RNNCell": lambda *shape: {"hx": array(*shape)},
    "GRUCell": lambda *shape: {"hx": array(*shape)},
    "LSTMCell": lambda *shape: {"hx": (array(*shape), array(*shape))},
}

LAYER_MISUSE = [
    Case(cell, (5, 6), {}, (x,), state(*shape), note=note)
    for cell, state in _STATE.items()
    for note, x, shape in (
        ("other features", array(3, 4), (3, 6)),
        ("other hidden size", array(3, 5), (3, 7)),
        ("other batch", array(3, 5), (2, 6)),
        ("4D state", array(3, 5), (3, 1, 1, 6)),
        ("3D input", array(2, 3, 5), (3, 6)),
        ("2D state of one example", array(5), (1, 6)),
        ("integers", np.ones((3, 5), np.int64), (3, 6)),
    )
]
LAYER_MISUSE += [
    Case("LSTMCell", (5, 6), {}, (array(3, 5), array(3, 6)), note="one array as state"),
    Case("RNNCell", (5, 6, True, "sin"), {}, (array(3, 5),)),
]
LAYER_MISUSE += [
    Case(layer, args, kwargs, (SEQUENCE,))
    for layer in ("RNN", "LSTM", "GRU")
    for args, kwargs in (
        ((5, 0), {}),
        ((5, 6, 0), {}),
        ((5, 6), {"bias": 0}),
        ((5, 6), {"bias": "True"}),
        ((5, 6), {"batch_first": 1}),
        ((5, 6), {"batch_first": "False"}),
        ((5.0, 6), {}),
        (("10", 6), {}),
        ((0, 6), {}),
        ((-1, 6), {}),
        ((5, 6.0), {}),
        ((5, 6), {"dropout": 1.5}),
        ((5, 6), {"dropout": True}),
        ((5, 6), {"proj_size": 6}),
        ((5, 6), {"proj_size": -1}),
    )
]
LAYER_MISUSE += [
    Case(layer, (5, 6), {}, inputs, note=note)
    for layer in ("RNN", "LSTM", "GRU")
    for note, inputs in (
        ("4D input", (array(2, 3, 4, 5),)),
        ("1D input", (array(5),)),
        ("other features", (array(7, 3, 4),)),
        ("no steps", (array(0, 3, 5),)),
        ("integers", (np.ones((7, 3, 5), np.int64),)),
    )
]
LAYER_MISUSE += [
    Case(layer, (5, 6), {}, (x, hx), note=note)
    for layer in ("RNN", "GRU")
    for note, x, hx in (
        ("2D state of a batch", SEQUENCE, array(3, 6)),
        ("3D state of one sequence", array(7, 5), array(1, 1, 6)),
        ("other batch", SEQUENCE, array(1, 2, 6)),
        ("other hidden size", SEQUENCE, array(1, 3, 5)),
        ("other number of layers", SEQUENCE, array(2, 3, 6)),
    )
]
LAYER_MISUSE += [
    Case("LSTM", (5, 6), {"proj_size": 4}, (x,), {"hx": (array(*h), array(*c))}, note=note)
    for note, x, h, c in (
        ("2D state of a batch", SEQUENCE, (3, 4), (3, 6)),
        ("3D state of one sequence", array(7, 5), (1, 1, 4), (1, 1, 6)),
        ("other batch", SEQUENCE, (1, 2, 4), (1, 2, 6)),
        ("unprojected state", SEQUENCE, (1, 3, 6), (1, 3, 6)),
        ("projected cell state", SEQUENCE, (1, 3, 4), (1, 3, 4)),
        ("other number of layers", SEQUENCE, (2, 3, 4), (2, 3, 6)),
    )
]
LAYER_MISUSE += [
    Case("RNN", (5, 6), {"nonlinearity": "sin"}),
    Case("GRU", (5, 6), {"proj_size": 2}, note="only LSTM has projections"),
    Case("RNN", (5, 6), {"proj_size": 2}, note="only LSTM has projections"),
    Case("RNNBase", ("LSTM2", 5, 6)),
]
