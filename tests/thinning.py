"""Which rows of a large table run by default, and which in the long run only (`make test-long`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def diagonal(step: int, *axes: Sequence[Any]) -> list[Any]:
    """Return all combinations, of which one in `step` runs by default.

    These lie on diagonals, so that each entry of each axis is among them, with others in turn.
    """
    rows = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, places, strict=True)]
        marks = (pytest.mark.long,) if sum(places) % step else ()
        name = "-".join(str(getattr(v, "__name__", v)) for v in values)
        rows.append(pytest.param(*values, id=name, marks=marks))
    return rows
