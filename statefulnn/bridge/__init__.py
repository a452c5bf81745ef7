"""Modules of other libraries as ours, and ours as theirs; a submodule for each library."""

import importlib
from typing import TYPE_CHECKING, Any

from statefulnn.core.listing import listing

if TYPE_CHECKING:
    from statefulnn.bridge import equinox, flax, haiku, torch

__all__ = ["equinox", "flax", "haiku", "torch"]
__dir__ = listing(globals())

if not TYPE_CHECKING:  # with it, a type checker would take any name for one of the package

    def __getattr__(name: str) -> Any:
        if name in __all__:  # imported when first used: each needs its library
            return importlib.import_module(f"statefulnn.bridge.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
