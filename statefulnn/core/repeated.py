"""Whether the code being traced will run again and again: in a loop, or for many sets of weights at once.

Some operations have another fastest form there. XLA's convolution on CPU, for one, has fast kernels only in
straight code with one set of weights.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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
def _saying(**said: bool) -> Iterator[None]:
    before = dict(vars(_state))
    vars(_state).update(said)
    try:
        yield
    finally:
        vars(_state).clear()
        vars(_state).update(before)


def repeated(inside: bool = True) -> AbstractContextManager[None]:
    """Say of what is traced here that it is repeated; False leaves it as it is outside."""
    return _saying(inside=_state.inside or inside, refused=_state.refused and not inside)


def in_loss_of_example() -> bool:
    """Say whether what is traced here is differentiated for each example of a batch by itself."""
    return _state.example


def loss_of_example() -> AbstractContextManager[None]:
    """Say of what is traced here that it is differentiated for each example by itself."""
    return _saying(example=True)


def straight_code_only() -> AbstractContextManager[None]:
    """Stop at the first operation that has another form in repeated code, for whoever can repeat it."""
    return _saying(refused=True)


def body_of_loop(step: Callable) -> Callable:
    """Return a function that is traced as repeated code."""

    @functools.wraps(step)
    def body(*args: Any) -> Any:
        with repeated():
            return step(*args)

    return body
