"""What is said of an argument that no transformation takes, or of a value that is asked for too early.

JAX finds both, and says so of arrays without names. Here the argument is looked for again, after JAX has
refused it, so that calls that work pay nothing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.ownership import ModuleBase
from statefulnn.transforms import refusals


def refuse_what_is_no_array(function: Callable, args: tuple, kwargs: Mapping[str, object]) -> None:
    """Raise if compiled code was given something else than modules and arrays."""
    try:
        given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # of no signature, or wrong: Python says so
        given = {"args": args, **kwargs}
    ours = lambda value: isinstance(value, (ModuleBase, Box))
    for path, value in jax.tree_util.tree_flatten_with_path(dict(given), is_leaf=ours)[0]:
        if not ours(value) and not _is_array(value):
            name = getattr(path[0], "key", "args") + jax.tree_util.keystr(path[1:])
            holds = any(map(ours, getattr(value, "__dict__", {}).values()))
            raise refusals.argument_of_no_array(
                getattr(function, "__name__", "forward"), name, value, holds
            )


def _is_array(value: object) -> bool:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind not in "OSUMmV" or value.dtype.isbuiltin != 1
    return isinstance(value, (jax.Array, bool, int, float, complex)) or hasattr(
        value, "__jax_array__"
    )


_EARLY = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


# What Python says of an f-string with a format.
_FORMATTED = re.compile(r"format string passed to \w*Tracer\.__format__")


def advise(error: Exception) -> None:
    """Note on an error of JAX's about a value that is not known yet what to write instead."""
    note = ""
    if isinstance(error, _EARLY):
        note = next(refusals.EARLY[c] for c in type(error).__mro__ if c in refusals.EARLY)
    elif isinstance(error, TypeError) and _FORMATTED.search(str(error)):
        note = refusals.FORMATTED
    if note and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
