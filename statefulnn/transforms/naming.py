"""JAX's messages in the user's terms: the function that he wrote, and his names for its arguments.

JAX is given pure functions of lists of arrays. It would tell of those: a function ``traced`` in a file of
this package, and an argument ``leaves[0]``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

_PARAMETERS = inspect.signature(lambda leaves, dynamic, *rest: None)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def source_of(function: Any) -> Any:
    """Return the user's own function under wrappers and partial functions."""
    for name in ("__wrapped__", "func"):
        inner = getattr(function, name, None)
        if inner is not None and callable(inner):
            return source_of(inner)
    return function


def as_users(pure: Callable, user: Callable, name: str | None = None) -> Callable:
    """Return a new function that does what a pure one does, and that JAX takes for the user's.

    Args:
        pure: a function of leaves, of the other arrays and of anything else.
        user: the function it is made of.
        name: what the compiled code is called.
    """

    def call(leaves: object, dynamic: object, *rest: Any) -> Any:
        return pure(leaves, dynamic, *rest)

    call.__name__ = call.__qualname__ = name or getattr(user, "__name__", "f")
    call.__wrapped__ = source_of(user)
    # Else JAX would look for the user's parameters, which are others.
    call.__signature__ = _PARAMETERS
    return call


def told_as(function: Callable, user: Callable) -> Callable:
    """Return a function, which JAX's messages from now on call as the user's, with its own parameters."""
    own = inspect.signature(function)
    function.__dict__.update(__wrapped__=source_of(user), __signature__=own)
    return function


def argument_names(user: Callable, count: int) -> list[str]:
    """Return the names of the first positional arguments of a call."""
    try:
        parameters = [*inspect.signature(user).parameters.values()]
    except (TypeError, ValueError):  # of a function written in C, perhaps
        parameters = []
    names = [p.name for p in parameters if p.kind in _BY_POSITION][:count]
    more = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return names + [f"{more}[{i}]" for i in range(count - len(names))]


def rename(
    error: Exception, user: Callable, labels: Callable[[], Mapping[str, Sequence[str]]]
) -> None:
    """Name arguments as the user does, in an error of JAX's about what was traced of his function.

    Args:
        error: any error.
        user: the function that was traced.
        labels: gives the names of the arrays in each list that JAX knows as an argument.
    """
    if not isinstance(error, (jax.errors.JAXTypeError, jax.errors.JAXIndexError)):
        return
    code = getattr(source_of(user), "__code__", None)
    head, depends, tail = str(error).partition("depends on the value")
    # It may be about the trace around this one, which has other arguments.
    if code is None or f" at {code.co_filename}:{code.co_firstlineno} for " not in head:
        return
    known = labels()

    def named(found: re.Match[str]) -> str:
        return dict(enumerate(known.get(found[1], ()))).get(int(found[2]), found[0])

    error.args = (head + depends + re.sub(r"\b(\w+)\[(\d+)\]", named, tail), *error.args[1:])
