"""The computed attribute behind pruning: a parameter times its mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from statefulnn.core.box import unwrap
from statefulnn.core.module import Module
from statefulnn.utils._computed import Computation, computation, computations

HISTORY = "_pruning_methods"


@dataclass(frozen=True)
class Pruned(Computation):
    """Computes ``module.<name>`` as ``<name>_orig`` times ``<name>_mask``."""

    name: str
    # Which methods made the mask is for Python code only, and no part of what is compiled.
    python_cache = (HISTORY,)

    def __str__(self) -> str:
        return f"the pruned {self.name!r}"

    def read(self, module: Module) -> Any:
        original = unwrap(getattr(module, f"{self.name}_orig"))
        return getattr(module, f"{self.name}_mask").astype(original.dtype) * original


def pruned(module: Module, name: str) -> Pruned | None:
    """Return the computation of a pruned parameter, None for any other."""
    return computation(module, name, Pruned)


def any_pruned(module: Module) -> bool:
    """Say whether a parameter of the module itself is pruned."""
    return any(isinstance(c, Pruned) for c in computations(module))


def methods(module: Module) -> dict[str, Any]:
    """Return the methods that pruned the parameters of a module; clones do not know them."""
    return getattr(module, HISTORY, None) or {}
