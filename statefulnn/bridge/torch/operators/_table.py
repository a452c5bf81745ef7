"""The table of operators: ATen's name -> function.

An entry stands for an operator, ``add``, or for one of its overloads, ``max.dim``. Functions take ATen's
arguments in ATen's order; dtypes come as texts, and where a tensor would lie is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPERATORS: dict[str, Callable[..., Any]] = {}


def operator(*names: str) -> Callable[[Any], Any]:
    """Put a function into the table under these names."""

    def put(function: Any) -> Any:
        for name in names:
            OPERATORS[name] = function
        return function

    return put


def find(name: str) -> str | None:
    """Return the entry for an overload such as ``add.Tensor``, if there is one."""
    if name in OPERATORS:
        return name
    general = name.rpartition(".")[0]
    return general if general in OPERATORS else None
