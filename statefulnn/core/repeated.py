"""Whether the code being traced will run again and again: in a loop, or for many sets of weights at once.

Some operations have another fastest form there. XLA's convolution on CPU, for one, has fast kernels only in
straight code with one set of weights.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any


class _State(threading.local):
    inside: bool = False
    example: bool = False
    refused: bool = False


_state = _State()


class HasRepeatedForm(Exception):
    """Raised under `straight_code_only` by what has another fastest form in repeated code."""


def in_repeated_code() -> bool:
    """Say whether what is traced here is repeated; asked by what has another form there.

    Raises:
        HasRepeatedForm: under `straight_code_only`.
    """
    if _state.refused:
        raise HasRepeatedForm
    return _state.inside


@contextlib.contextmanager
def repeated(inside: bool = True) -> Iterator[None]:
    """Say of what is traced here that it is repeated; False leaves it as it is outside."""
    before = _state.inside, _state.refused
    _state.inside, _state.refused = before[0] or inside, before[1] and not inside
    try:
        yield
    finally:
        _state.inside, _state.refused = before


def in_loss_of_example() -> bool:
    """Say whether what is traced here is differentiated for each example of a batch by itself."""
    return _state.example


@contextlib.contextmanager
def loss_of_example() -> Iterator[None]:
    """Say of what is traced here that it is differentiated for each example by itself."""
    before, _state.example = _state.example, True
    try:
        yield
    finally:
        _state.example = before


@contextlib.contextmanager
def straight_code_only() -> Iterator[None]:
    """Stop at the first operation that has another form in repeated code, for whoever can repeat it."""
    before, _state.refused = _state.refused, True
    try:
        yield
    finally:
        _state.refused = before


def body_of_loop(step: Callable) -> Callable:
    """Return a function that is traced as repeated code."""

    @functools.wraps(step)
    def body(*args: Any) -> Any:
        with repeated():
            return step(*args)

    return body
