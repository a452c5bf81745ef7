"""What is in force while modules are built: where their arrays are put, by which rules they are drawn.

Both are set for a block of code (`with nn.device(...)`, `with nn.init.version(...)`) and hold for one thread
or task, as context variables do; the version also for good (`nn.init.set_version`).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

# Where arrays are put if a layer is not told; the innermost block's is the last.
devices_in_force: ContextVar[tuple[Any, ...]] = ContextVar("devices_in_force", default=())

# The name of the initialisation version; every module notes it when it is built.
DEFAULT_VERSION = "torch"
version_in_force: ContextVar[str | None] = ContextVar("version_in_force", default=None)


class _Session:
    """What holds where no block says otherwise, in all threads."""

    __slots__ = ("version",)

    def __init__(self) -> None:
        self.version = DEFAULT_VERSION


session = _Session()


def current_version() -> str:
    """Return the name of the initialisation version in force."""
    return version_in_force.get() or session.version
