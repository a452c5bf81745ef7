"""The only file that asks JAX about traces.

A *trace* is one active transformation (``jax.jit``, ``jax.grad``, ``jax.vmap`` ...). Traces nest, and
each knows the one around it; the outermost is plain evaluation. What the rest of the package needs to
know is which trace is current, what lies around it, and of what kind each is:

=========  ================================================================================
staged     the function runs once and its operations are recorded: jit, scan, cond, checkpoint
autodiff   the function runs on real calls, with derivatives alongside: grad, jvp, linearize
batch      the function runs on all lanes at once: vmap
=========  ================================================================================

Two attributes read here are not documented by JAX: ``Trace.parent_trace`` and ``Tracer._trace``. There
is no public way to ask either question.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import find_top_trace

__all__ = ["EAGER", "Tracer", "chain", "current_trace", "kind", "trace_of", "tracer_in"]


def current_trace() -> Any:
    """Return the trace in force; it is `EAGER` outside every transformation."""
    return find_top_trace(())


def chain(trace: Any) -> Iterator[Any]:
    """Yield a trace and everything around it, innermost first, `EAGER` last."""
    while trace is not None:
        yield trace
        trace = getattr(trace, "parent_trace", None)


def _outermost() -> Any:
    # The package may be imported inside somebody's trace: plain evaluation is the end of the chain.
    *_, last = chain(find_top_trace(()))
    return last


EAGER = _outermost()


def trace_of(value: Any) -> Any:
    """Return the trace a tracer belongs to, None for anything else."""
    return getattr(value, "_trace", None) if isinstance(value, Tracer) else None


def kind(trace: Any) -> str:
    """Return "eager", "staged", "autodiff", "batch" or, for any other trace, "other"."""
    return _kinds().get(type(trace), "other")


def is_forward_mode(trace: Any) -> bool:
    """Say whether a trace is that of ``jax.jvp``."""
    return kind(trace) == "autodiff" and "forward" in _modes()[type(trace)]


@functools.cache
def _modes() -> dict[type, set[str]]:
    met: dict[type, set[str]] = {}

    def probe(name: str):
        def body(x):
            met.setdefault(type(find_top_trace(())), set()).add(name)
            return x

        return body

    with jax.ensure_compile_time_eval():
        one = np.ones((1,), np.float32)
        jax.jvp(probe("forward"), (one,), (one,))
        jax.vjp(probe("reverse"), one)
    # A class that serves both modes tells nothing.
    return {t: modes if len(modes) == 1 else set() for t, modes in met.items()}


@functools.cache
def _kinds() -> dict[type, str]:
    # Classes of traces are private, so each is met once by running the transformation it stands for.
    found: dict[type, str] = {type(EAGER): "eager"}

    def probe(name: str):
        def body(x):
            found.setdefault(type(find_top_trace(())), name)
            return x

        return body

    with jax.ensure_compile_time_eval():
        one = np.ones((1,), np.float32)
        jax.jvp(probe("autodiff"), (one,), (one,))
        jax.vjp(probe("autodiff"), one)
        jax.vmap(probe("batch"))(one)
        jax.eval_shape(probe("staged"), one)
    return found


def tracer_in(value: Any) -> bool:
    """Say whether a tracer sits in a value or, one level down, in a plain container."""
    if isinstance(value, Tracer):
        return True
    if type(value) in (list, tuple, set, frozenset):
        return any(isinstance(v, Tracer) for v in value)
    if type(value) is dict:
        return any(isinstance(v, Tracer) for v in value.values())
    return False
