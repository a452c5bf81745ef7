"""The types of what the transforms pass around, where neither Python nor JAX has one to name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

# Arrays, modules, boxes and anything else, in any containers that JAX knows: what a user's function takes
# and returns. No type of Python's describes it.
PyTree: TypeAlias = Any


# What a user's function takes and returns, where a transform keeps that.
P = ParamSpec("P")
R = TypeVar("R")


class TreeDef(Protocol):
    """How a pytree is put together: JAX's `PyTreeDef`, of which type checkers see nothing."""

    @property
    def num_leaves(self) -> int: ...

    @property
    def num_nodes(self) -> int: ...

    def unflatten(self, leaves: Iterable[object], /) -> PyTree: ...

    def flatten_up_to(self, tree: PyTree, /) -> list[PyTree]: ...
