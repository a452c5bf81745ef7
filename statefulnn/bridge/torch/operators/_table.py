"""The table of operators: ATen's name -> function.

An entry stands for an operator, ``add``, or for one of its overloads, ``max.dim``. Functions take ATen's
arguments in ATen's order; dtypes come as texts, and where a tensor would lie is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeVar

    _Function = TypeVar("_Function", bound=Callable[..., Any])

Scalar = bool | int | float | complex  # a number of Python's
Size = int | Sequence[int]  # one number, or one for each axis
Axes = int | Sequence[int] | None  # one, some, or all

OPERATORS: dict[str, Callable[..., Any]] = {}


def operator(*names: str) -> Callable[[_Function], _Function]:
    """Put a function into the table under these names."""

    def put(function: _Function) -> _Function:
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
