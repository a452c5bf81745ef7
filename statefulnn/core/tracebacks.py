"""Short tracebacks: an error shows the user's lines, and not what this package and JAX did in between.

Where a call comes in from the user's code (a module, a transformed function, `Optimizer.step`) is a
boundary. An error that leaves through one loses the frames of this package, and those of JAX that this
package called; what it was caused by loses them too. ``STATEFULNN_TRACEBACK=full`` keeps all of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import opcode
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import jax
from jax.extend.source_info_util import register_exclusion

from statefulnn.core.errors import StatefulnnError, explain
from statefulnn.core.habits import refuse_usage

_F = TypeVar("_F", bound=Callable[..., Any])

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_JAX = os.path.dirname(inspect.getfile(jax)) + os.sep
_OF_JAX = "For simplicity, JAX has removed its internal frames"
_HIDDEN = (
    "STATEFULNN_TRACEBACK=full shows the frames of statefulnn, JAX_TRACEBACK_FILTERING=off those of "
    "JAX as well."
)
_UNKNOWN = "STATEFULNN_TRACEBACK is neither 'short' nor 'full': nothing was left out."
_EXPLAINED = explain("", "", "")[:8]  # "  Why: ", as all errors of this package have
_RAISE = opcode.opmap["RAISE_VARARGS"]

# Where a value was made, in JAX's messages, profiles and jaxprs: the user's line as well.
register_exclusion(_PACKAGE)


def shortened(function: _F) -> _F:
    """Return a function that is a boundary: errors leave it with short tracebacks."""

    @functools.wraps(function)
    def boundary(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            entry = error.__traceback__
            if isinstance(error, TypeError) and entry is not None and entry.tb_next is None:
                refuse_usage(function.__qualname__, str(error))
            shorten(error)
            raise

    return boundary  # pyright: ignore[reportReturnType]


def shorten(error: Exception) -> None:
    """Take the frames of this package out of an error that leaves it; for an ``except`` at a boundary.

    Where calls are many, that costs nothing until there is an error: a `shortened` function costs a frame.
    """
    # Without room for a call, the boundaries further out do it.
    with contextlib.suppress(RecursionError):
        mode = os.environ.get("STATEFULNN_TRACEBACK") or "short"
        if mode not in ("short", "full"):
            _note(error, _UNKNOWN)
        # Who is shown the frames of JAX, wants all.
        of_jax = getattr(jax.config, "jax_traceback_filtering", None)
        if mode == "short" and of_jax not in ("off", "remove_frames"):
            _shorten_last(error)
            _shorten_earlier(error)


def _shorten_last(error: Exception) -> None:
    own, kept = _without_own(error.__traceback__)
    # An error without an explanation in the package may be a mistake there: its last frame tells where.
    if own is not None and not _explained(error):
        kept.append(own)
    _show(error, kept)
    notes = getattr(error, "__notes__", [])
    of_jax = [note for note in notes if _OF_JAX in note]
    for note in of_jax:
        notes.remove(note)
    # Whoever wrote `raise` has said what he wants to say.
    on_purpose = kept and kept[-1].tb_frame.f_code.co_code[kept[-1].tb_lasti] == _RAISE
    if (of_jax or own is not None) and not _explained(error) and not on_purpose:
        _note(error, _HIDDEN)


def _shorten_earlier(error: BaseException) -> None:
    """Shorten the errors that an error came from."""
    todo, seen = [error], {id(error)}
    while todo:
        later = todo.pop()
        # Without room for the call of `shorten`, the same happens once more on the way out.
        if isinstance(later, RecursionError) and isinstance(later.__context__, RecursionError):
            later.__context__ = later.__context__.__context__
            todo.append(later)
            continue
        for earlier in (later.__cause__, later.__context__):
            if earlier is None or id(earlier) in seen:
                continue
            seen.add(id(earlier))
            todo.append(earlier)
            _, kept = _without_own(earlier.__traceback__)
            _show(earlier, kept)
            # An explanation stands for what the package met by itself.
            if earlier is not later.__cause__ and not kept and _explained(later):
                later.__suppress_context__ = True


def _explained(error: BaseException) -> bool:
    texts = [text for text in error.args if isinstance(text, str)]
    return isinstance(error, StatefulnnError) or any(_EXPLAINED in text for text in texts)


def _show(error: BaseException, entries: list[TracebackType]) -> None:
    shown = None
    for entry in reversed(entries):
        shown = TracebackType(shown, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    error.with_traceback(shown)


def _without_own(entry: TracebackType | None) -> tuple[TracebackType | None, list[TracebackType]]:
    """Return the innermost entry if it is one of this package's, and the entries that are shown."""
    own, kept, hidden = None, [], False
    while entry is not None:
        file = entry.tb_frame.f_code.co_filename
        ours = file.startswith(_PACKAGE)
        hidden = ours or (hidden and file.startswith(_JAX))
        if not hidden:
            own = None
            kept.append(entry)
        elif ours:
            own = entry
        entry = entry.tb_next
    return own, kept


def _note(error: BaseException, text: str) -> None:
    # A class may refuse notes: they are a courtesy.
    with contextlib.suppress(Exception):
        if text not in getattr(error, "__notes__", ()):
            error.add_note(text)
