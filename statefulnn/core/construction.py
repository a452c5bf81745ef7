"""What is in force while modules are built: where arrays are put, their dtype, by which rules they are drawn.

All are set for a block of code (`with nn.device(...)`, `with nn.default_dtype(...)`,
`with nn.init.version(...)`) and hold for one thread or task, as context variables do. Dtype and version can
be set for good as well (`nn.set_default_dtype`, `nn.init.set_version`).

`settings` is what compiled code depends on beside its arguments: `nn.jit` compiles for each value of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np

from statefulnn.core.stamps import clock, tick

_T = TypeVar("_T")

# Where arrays are put if a layer is not told; the innermost block's is the last.
devices_in_force: ContextVar[tuple[Any, ...]] = ContextVar("devices_in_force", default=())

# The name of the initialisation version; every module notes it when it is built.
DEFAULT_VERSION = "torch"
version_in_force: ContextVar[str | None] = ContextVar("version_in_force", default=None)

# The dtype of new parameters and buffers that are given none.
dtype_in_force: ContextVar[np.dtype | None] = ContextVar("dtype_in_force", default=None)


class _Session:
    """What holds where no block says otherwise, in all threads."""

    __slots__ = ("dtype", "version")

    def __init__(self) -> None:
        self.version = DEFAULT_VERSION
        self.dtype = np.dtype(np.float32)


session = _Session()


def current_version() -> str:
    """Return the name of the initialisation version in force."""
    return version_in_force.get() or session.version


def set_session_version(name: str) -> None:
    """Set the version that holds where no block says otherwise."""
    session.version = name
    clock.structure = tick()


def current_dtype() -> np.dtype:
    """Return the dtype of new parameters and buffers that are given none."""
    return dtype_in_force.get() or session.dtype


def set_session_dtype(dtype: np.dtype) -> None:
    """Set the dtype that holds where no block says otherwise."""
    session.dtype = dtype
    clock.structure = tick()


# Names of the kernels of attention that `nn.attention.sdpa_kernel` allows; None for all.
allowed_backends: ContextVar[frozenset[str] | None] = ContextVar("allowed_backends", default=None)


def settings() -> tuple:
    """Return what is in force here, and what code compiled elsewhere may have been compiled without."""
    return current_version(), current_dtype(), allowed_backends.get()


@contextlib.contextmanager
def in_force(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Set one of the settings for a block of code."""
    token, block = variable.set(value), object()
    # Calls look at the settings when the clock has moved, and at each call while a block is open: another
    # thread may be outside of it. So a call pays for them only where somebody uses them.
    clock.blocks.add(block)
    clock.structure = tick()
    try:
        yield
    finally:
        clock.blocks.discard(block)
        variable.reset(token)
