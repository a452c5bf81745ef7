"""Finds the dotted names that a filter chooses: names, patterns, or a function of the name."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from statefulnn.core import refusals

Filter: TypeAlias = str | Iterable[str] | Callable[[str], bool] | None

_WILDCARD = re.compile(r"[*?\[]")
_GUESSED = 3  # unknown names for which similar ones are searched, which takes long


def chosen(
    names: Iterable[str], wanted: Filter, where: str, *, required: bool = False
) -> list[str]:
    """Return the names that a filter chooses, in the order of `names`.

    A text without ``*``, ``?`` and ``[`` is one whole name. With them it is a pattern, as in a shell. A
    pattern without a dot is compared with each dotted part of a name, one with a dot with the whole name. A
    text that equals a name means that name, even if it looks like a pattern. ``a|b`` are two texts.

    Args:
        names: dotted names.
        wanted: None for all; a name or a pattern; several of them; or a function that says for a name
            whether it is wanted.
        where: the caller, for the message.
        required: whether a function, or an empty list, has to choose something as well.

    Raises:
        UnknownNameError: for a name or a pattern that matches nothing, and with `required` for a filter that
            chooses nothing.
        TypeError: for a filter, or a name, of another type.

    Example:
        >>> names = [
        ...     "encoder.0.weight",
        ...     "encoder.0.lora_A",
        ...     "q.lora_B.weight",
        ...     "head.weight",
        ...     "head.bias",
        ... ]
        >>> chosen(names, "head.bias", "nn.save")
        ['head.bias']
        >>> chosen(names, "lora_*", "nn.save")
        ['encoder.0.lora_A', 'q.lora_B.weight']
        >>> chosen(names, ["head.*", "encoder.0.weight"], "nn.save")
        ['encoder.0.weight', 'head.weight', 'head.bias']
        >>> chosen(names, "lora_*|*.bias", "nn.save")
        ['encoder.0.lora_A', 'q.lora_B.weight', 'head.bias']
        >>> chosen(names, lambda name: name.startswith("encoder."), "nn.save")
        ['encoder.0.weight', 'encoder.0.lora_A']
    """
    names = list(names)
    if wanted is None:
        return names
    for name in names:
        if not isinstance(name, str):
            raise refusals.filter_of_no_text(f"names, one of which is {name!r}", where)
    if callable(wanted):
        of_function = [name for name in names if wanted(name)]
        if required and not of_function:
            raise refusals.filter_chooses_nothing(names, where)
        return of_function
    if not isinstance(wanted, str) and not isinstance(wanted, Iterable):
        raise refusals.filter_of_no_text(f"a filter of type {type(wanted).__name__}", where)
    known = set(names)
    texts: list[str] = []
    for text in [wanted] if isinstance(wanted, str) else wanted:
        if not isinstance(text, str):
            raise refusals.filter_of_no_text(f"{text!r} in a filter", where)
        texts += [text] if text in known else text.split("|")

    found: set[str] = set()
    unknown: list[str] = []
    by_part: dict[str, list[str]] | None = None
    for text in dict.fromkeys(texts):
        if text in known:
            found.add(text)
            continue
        matching: list[str] = []
        if _WILDCARD.search(text):
            matches = re.compile(fnmatch.translate(text)).match
            if "." in text:
                matching = [name for name in known if matches(name)]
            else:
                by_part = _by_part(known) if by_part is None else by_part
                matching = [n for part, those in by_part.items() if matches(part) for n in those]
        if not matching:
            unknown.append(text)
        found.update(matching)
    if unknown:
        raise refusals.nothing_chosen(unknown, names, _similar(unknown, names), where)
    if required and not found:
        raise refusals.filter_chooses_nothing(names, where)
    return [name for name in names if name in found]


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    by_part: dict[str, list[str]] = {}
    for name in names:
        for part in name.split("."):
            by_part.setdefault(part, []).append(name)
    return by_part


def _similar(unknown: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return what may have been meant by the first few of some names that are not there."""
    near: dict[str, None] = {}
    for text in unknown[:_GUESSED]:
        below = f"{text}."
        if any(name.startswith(below) for name in names):
            near[f"{below}*"] = None  # the name of a module
        else:
            near.update(dict.fromkeys(difflib.get_close_matches(text, names, 2)))
    return list(near)
