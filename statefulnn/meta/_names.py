"""Which names a filter chooses."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from statefulnn.core.errors import UnknownNameError, explain


def chosen_names(values: Mapping[str, Any], only: Any, function: str) -> list[str]:
    """Return the names that a filter chooses, in the order of the dict.

    Args:
        values: a dict by name.
        only: None for all; a pattern, an iterable of patterns, or a function of the name.
        function: who asks, for the message.

    Raises:
        UnknownNameError: if the filter, or one of its patterns, matches nothing.
    """
    names = list(values)
    if only is None:
        return names
    if callable(only):
        found, unmatched = [n for n in names if only(n)], []
    else:
        patterns = [only] if isinstance(only, str) else list(_strings(only, function))
        found = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        unmatched = [p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for n in names)]
    if not found or unmatched:
        shown = ", ".join(map(repr, unmatched)) or "the filter"
        raise UnknownNameError(
            explain(
                f"{function} was asked for {shown}, which matches no name",
                f"the names are {names}",
                "use one of them, or a pattern such as 'head.*'",
            )
        )
    return found


def _strings(only: Any, function: str) -> Iterable[str]:
    if not isinstance(only, Iterable) or not all(isinstance(p, str) for p in only):
        raise TypeError(
            explain(
                f"{function} was given a filter of type {type(only).__name__}",
                "a filter chooses among names",
                "pass a pattern, a list of patterns, or a function of the name",
            )
        )
    return only
