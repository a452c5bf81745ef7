"""Modules of other libraries as ours, and ours as theirs; a submodule for each library."""

import importlib
from typing import Any

_LIBRARIES = ("equinox", "flax", "haiku", "torch")


def __getattr__(name: str) -> Any:
    if name in _LIBRARIES:  # imported when first used: each needs its library
        return importlib.import_module(f"statefulnn.bridge.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIBRARIES})
