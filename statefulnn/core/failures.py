"""Failures that compiled code finds: errors of this package instead of the runtime's.

A callback may raise what it likes, JAX's runtime passes on the text alone, in an error of its own. So each
failure is kept as well, and whoever of this package meets the runtime's error raises the failure that it
tells of.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import StatefulnnError


class _Traced(threading.local):
    checks: int = 0  # that have been traced in this thread


_traced = _Traced()
# Class and text: the error itself would keep the frames it went through, and their arrays.
_recent: collections.deque[tuple[type[StatefulnnError], str]] = collections.deque(maxlen=64)


def fail(error: StatefulnnError) -> NoReturn:
    """Raise an error, which may be in a callback of compiled code."""
    _recent.append((type(error), str(error)))
    raise error


def _is_raised_anyway(record: logging.LogRecord) -> bool:
    error = (record.exc_info or (None, None))[1]
    return isinstance(error, StatefulnnError) and (type(error), str(error)) in _recent


# JAX logs each error of a callback with its traceback, also one that is raised and caught.
_module = inspect.getmodule(jax.debug.callback)
_logger = logging.getLogger(_module.__name__ if _module else "jax")
_logger.addFilter(lambda record: not _is_raised_anyway(record))


@contextlib.contextmanager
def typed_failures() -> Iterator[None]:
    """Raise the failure itself where the runtime raises an error that tells of one."""
    try:
        yield
    except RuntimeError as error:
        raise_original(error)
        raise


def raise_original(error: Exception) -> None:
    """Raise the failure that an error of the runtime tells of, if it does."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        text = str(error)
        for kind, message in reversed(_recent):
            if message in text:
                raise kind(message) from None


def note_check() -> None:
    """Note that a check is traced: whoever calls the program waits for it, to raise its failure."""
    _traced.checks += 1


def checks_traced() -> int:
    """Return how many checks this thread has traced so far."""
    return _traced.checks


def wait_for(results: Any) -> None:
    """Wait for the results of a program with checks, and raise the failure if one has failed."""
    if current_trace() is not EAGER:
        note_check()  # the program around it has them too
        return
    with typed_failures():
        jax.block_until_ready(results)
