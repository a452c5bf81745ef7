"""What keeps the tests quick: cheap compilation, and rows that run in `make test-long` only."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import pytest

# What is compiled to run once: the time goes into compiling it.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quickly = functools.partial(jax.jit, compiler_options=QUICKLY)


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


def first(count: int, values: Sequence[Any]) -> list[Any]:
    """Return all values, of which the first few run by default."""
    long = pytest.mark.long
    return [pytest.param(v, marks=() if i < count else (long,)) for i, v in enumerate(values)]
