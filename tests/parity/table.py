"""All rows of tests/parity/rows, one file a topic, collected for the tests that run them."""

from __future__ import annotations

import collections
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.oracle import Call, Case

TOPICS = sorted(
    m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "rows")]) if m.name[0] != "_"
)


def _collect(name: str) -> list[Any]:
    rows: list[Any] = []
    for topic in TOPICS:
        rows += getattr(importlib.import_module(f"tests.parity.rows.{topic}"), name, [])
    return rows


LAYERS: list[Case] = _collect("LAYERS")
FUNCTIONS: list[Call] = _collect("FUNCTIONS")
MISUSE: list[Call] = _collect("MISUSE")  # of functions
LAYER_MISUSE: list[Case] = _collect("LAYER_MISUSE")  # of layers: of the constructor or the call


def _one_of_each() -> list[Case]:
    seen: dict[str, Case] = {}
    for case in LAYERS:
        arrays = [x for x in case.inputs if hasattr(x, "shape")]
        if all(0 not in x.shape for x in arrays):
            seen.setdefault(case.layer, case)
    return list(seen.values())


ONE_OF_EACH = _one_of_each()

# What torch warns of when it runs these rows; we warn of all but the first, too.
TORCH_WARNS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "enable_nested_tensor is True",
        "size_average and reduce args will be deprecated",
        "reduction. 'mean' divides the total loss",
        "`NLLLoss2d` has been deprecated",
        "Using padding='same' with even kernel lengths",
        "Initializing zero-element tensors",
        "Support for mismatched key_padding_mask and attn_mask",
        "LSTM with projections is not supported with oneDNN",
    )
]


# Every fifth row of a layer or function runs by default, and every n-th of these, which take longest to
# compile; the others are for the long run, `make test-long`.
EVERY = {
    "LSTM": 7,
    "GRU": 7,
    "RNN": 7,
    "MultiheadAttention": 7,
    "Transformer": 7,
    "TransformerEncoderLayer": 7,
    "TransformerDecoderLayer": 7,
    "CTCLoss": 7,
    "CrossEntropyLoss": 7,
    "Conv3d": 7,
    "MaxPool2d": 7,
    "AdaptiveMaxPool2d": 7,
    "grid_sample": 9,
    "interpolate": 9,
}


def thinned(rows: Iterable[Any], every: int | None = None) -> list[Any]:
    """Return the rows as parameters of a test, those that are for the long run marked so.

    Of each layer or function the first row runs, and every n-th from there; n is `every`, or without it what
    `EVERY` says.
    """
    number: collections.Counter[str] = collections.Counter()
    out = []
    for row in rows:
        name = row.layer if isinstance(row, Case) else row.name
        step = every or EVERY.get(name, 5)
        marks = (pytest.mark.long,) if number[name] % step else ()
        number[name] += 1
        out.append(pytest.param(row, id=str(row), marks=marks))
    return out


# What is made of layers that are tried, and the one- and three-dimensional kinds of what is tried in two
# dimensions.
_LIKE_OTHERS = {"Transformer", "TransformerDecoderLayer"} | {
    c.layer[:-2] + d for c in ONE_OF_EACH if c.layer.endswith("2d") for d in ("1d", "3d")
}


def representative(rows: Iterable[Case], part: int = 0, parts: int = 1) -> list[Any]:
    """Return rows as parameters of a test, of which the first of each layer runs by default.

    Layers that are like others run in the long run only, as do further rows of one layer. Of the layers
    that are left this is one part of several: of as many tests with different parts each layer runs one.
    """
    first = {id(case): number for number, case in enumerate(ONE_OF_EACH)}

    def runs(row: Case) -> bool:
        number = first.get(id(row))
        chosen = number is not None and number % parts == part
        return chosen and row.layer not in _LIKE_OTHERS

    return [
        pytest.param(row, id=str(row), marks=() if runs(row) else (pytest.mark.long,))
        for row in rows
    ]
