"""What `dir` shows of a package: the names that it says are public."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def listing(namespace: dict[str, Any], *more: str) -> Callable[[], list[str]]:
    """Return the `__dir__` of a package: the names in `__all__`, Python's own, and what is left out of ``*``.

    Args:
        namespace: the package's ``globals()``.
        more: public names that ``from package import *`` is not to bind.
    """
    return lambda: sorted({*namespace["__all__"], *more, *(n for n in namespace if n[:2] == "__")})
