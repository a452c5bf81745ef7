"""All rows of tests/parity/rows, one file a topic, collected for the tests that run them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

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
