"""Gradients by copies of parameters that nobody reads, while the parameters themselves are read.

``jax.grad(lambda q: loss(model(x)))(dict(model.named_parameters()))`` is how torch's ``grad`` is written.
But JAX hands the function copies, and the model from the closure has constants: the gradient is zero. To be
told apart from a frozen teacher, and from a function that reads both, each trace notes which boxes it has
copies of, and which of either were read. The verdict comes when JAX builds the gradient, after the trace.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from statefulnn.core import compat, refusals
from statefulnn.core.errors import UntrainedLeavesWarning, user_stack_level

if TYPE_CHECKING:
    from statefulnn.core.box import Box
    from statefulnn.core.ownership import Scope


class _Copies:
    """What one trace differentiates by."""

    def __init__(self, trace: Any) -> None:
        self.trace = weakref.ref(trace)
        # Of the copies, by the identity of the array that each was made of.
        self.scopes: dict[int, tuple[Any, Scope]] = {}
        self.bypassed: list[str] = []  # the boxes that were read instead of their copies


class _Open(threading.local):
    copies: tuple[_Copies, ...] = ()  # of the traces that run, the innermost last


_open = _Open()


def note_copy(value: object, scope: Scope) -> None:
    """Note that JAX has built a box around a value, which the trace in force may differentiate by."""
    trace, primal = compat.trace_of(value), compat.primal_of(value)
    if primal is None or trace is not compat.current_trace() or compat.is_forward_mode(trace):
        return
    if not _open.copies or _open.copies[-1].trace() is not trace:
        _open.copies = (*_open.copies, _Copies(trace))
    _open.copies[-1].scopes[id(primal)] = primal, scope


def note_read(box: Box) -> None:
    """Note that a box of the user's is read in a trace."""
    for copies in _open.copies:
        if id(box._value) in copies.scopes:
            copies.bypassed.append(box.label())


def _nonzero(value: object) -> bool:
    return not isinstance(value, jax.Array) or isinstance(value, compat.Tracer) or bool(value.any())


def settle(values: Sequence[Any]) -> None:
    """JAX builds a box outside: warn if it is a gradient of zeros that nobody would expect."""
    if not _open.copies:
        return
    running = list(compat.chain(compat.current_trace()))
    over = [c for c in _open.copies if c.trace() not in running]
    if not over:
        return
    _open.copies = tuple(c for c in _open.copies if c.trace() in running)
    for copies in over:
        read = any(scope.read for _, scope in copies.scopes.values())
        # A trace that failed has no gradient: what is built since then is something else.
        if copies.bypassed and not read and not any(map(_nonzero, values)):
            names = list(dict.fromkeys(copies.bypassed))
            text = refusals.gradient_by_copies(names)
            warnings.warn(text, UntrainedLeavesWarning, stacklevel=user_stack_level())
