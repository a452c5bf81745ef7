"""Plain data: values that come back from JSON exactly as they were."""

from __future__ import annotations

from typing import Any

_DEEPEST = 200  # containers in containers; JSON readers have such a limit, too


def is_plain(value: Any, depth: int = _DEEPEST) -> bool:
    """Say whether a value is None, a number, a text, or a list or dict of these, with texts as keys.

    A tuple is not: it would come back as a list.
    """
    if type(value) is str:
        return _is_text(value)
    if value is None or type(value) in (bool, float):
        return True
    if type(value) is int:
        return value.bit_length() <= 1024
    if depth == 0:
        return False
    if type(value) is list:
        return all(is_plain(v, depth - 1) for v in value)
    if type(value) is dict:
        keys = all(type(k) is str and _is_text(k) for k in value)
        return keys and all(is_plain(v, depth - 1) for v in value.values())
    return False


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
