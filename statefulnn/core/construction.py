"""What is in force while modules are built: where their arrays are put, by which rules they are drawn.

Both are set for a block of code (`with nn.device(...)`, `with nn.init.version(...)`) or for good, and are
per thread and task, as context variables are.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

# Where arrays are put if a layer is not told: what `placement.resolve_device` takes.
device_in_force: ContextVar[Any] = ContextVar("device_in_force", default=None)

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
