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
is no public way to ask either question. Where one is gone, the import says so, and what is known without
it is still checked: nobody gets an error for want of an answer.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.core import Tracer, eval_context
from jax.extend.core import find_top_trace

from statefulnn.core.errors import explain

__all__ = [
    "EAGER",
    "TELLS_OWNERS",
    "Tracer",
    "between",
    "chain",
    "current_trace",
    "kind",
    "may_be_around",
    "own_on_devices",
    "trace_of",
    "tracer_in",
    "varies",
]


def current_trace() -> Any:
    """Return the trace in force; it is `EAGER` outside every transformation."""
    return find_top_trace(())


def plain_evaluation() -> AbstractContextManager[None]:
    """Compute inside as outside of every transformation, for what belongs to no trace."""
    return eval_context()


def _warn(unknown: str, unchecked: str) -> None:
    warnings.warn(
        explain(
            f"this JAX does not tell {unknown}",
            f"without that statefulnn does not notice {unchecked}; everything else works",
            "take the JAX that this statefulnn was made for, or a newer statefulnn, to be told",
        ),
        RuntimeWarning,
        stacklevel=2,
    )


def _plain_evaluation() -> Any:
    # The package may be imported inside somebody's trace, but a new thread is in none.
    met: list[Any] = []
    thread = threading.Thread(target=lambda: met.append(find_top_trace(())))
    thread.start()
    thread.join()
    return met[0]


def _private_parts() -> tuple[bool, bool]:
    """Return whether a trace tells what is around it, and a tracer which trace it belongs to."""
    met: list[bool] = []

    def look(x: object) -> Any:
        met[:] = hasattr(find_top_trace(()), "parent_trace"), hasattr(x, "_trace")
        return x

    jax.eval_shape(look, jax.ShapeDtypeStruct((), np.float32))
    return met[0], met[1]


EAGER = _plain_evaluation()
_NESTING, _OWNERS = _private_parts()
TELLS_OWNERS = (
    _NESTING and _OWNERS
)  # whether a value of an outer trace can be told from one of an inner
if not _NESTING:
    _warn(
        "which traces are around a trace (Trace.parent_trace)",
        "writes, draws and captures that are illegal because of a transformation further out, with a "
        "legal one inside it (laws 4, 5, 6, 11)",
    )
if not _OWNERS:
    _warn(
        "which trace a traced value belongs to (Tracer._trace)",
        "a value of an inner transformation that is written to a module of an outer one, or captured "
        "there (law 5)",
    )


def chain(trace: Any) -> Iterator[Any]:
    """Yield a trace and what is known to be around it, innermost first, `EAGER` last."""
    while trace is not None and trace is not EAGER:
        yield trace
        trace = getattr(trace, "parent_trace", None)
    yield EAGER


def between(trace: Any, owner: Any) -> list[Any] | None:
    """Return the traces from one outwards up to an owner, without it; None if that is not around."""
    inside: list[Any] = []
    for around in chain(trace):
        if around is owner:
            return inside
        inside.append(around)
    if _NESTING or trace is EAGER or owner is None:
        return None
    return [trace]  # and what is around it, of which nothing is known


def may_be_around(outer: Any, trace: Any) -> bool:
    """Say whether a trace is another one or around it; True if that is not known."""
    if trace is EAGER or (_NESTING and outer is not None):
        return outer in chain(trace)
    return True


def trace_of(value: Any) -> Any:
    """Return the trace a tracer belongs to, None for anything else, and where JAX does not tell."""
    return getattr(value, "_trace", None) if isinstance(value, Tracer) else None


def primal_of(value: Any) -> Any:
    """Return the plain array under a value that is differentiated, None for any other."""
    primal = getattr(value, "primal", None) if isinstance(value, Tracer) else None
    return None if isinstance(primal, Tracer) else primal


def varies(values: Sequence[Any], lanes: Any) -> list[bool]:
    """Say of each value whether it has its own one in each lane of the ``jax.vmap`` in force.

    Args:
        values: arrays.
        lanes: any traced value that does.
    """
    if _OWNERS:
        return [trace_of(v) is current_trace() for v in values]
    return [isinstance(v, Tracer) and _varies(v, lanes) for v in values]


def _varies(value: object, lanes: object) -> bool:
    # JAX tells rules of vmap, innermost first, which arguments are mapped.
    answers: list[bool] = []

    @jax.custom_batching.custom_vmap
    def ask(value: object, lanes: object) -> Any:
        return lanes

    @ask.def_vmap
    def _(axis_size: int, mapped: Any, value: Any, lanes: Any) -> Any:
        answers.append(mapped[0])
        return lanes, True

    ask(jax.lax.stop_gradient(value), lanes)
    return answers[0]


def own_on_devices(values: Any, examples: Any) -> Any:
    """Return values of which, inside ``jax.shard_map``, each device with examples of its own has its own.

    A gradient by a value that is equal on all devices is summed over them, which is right for a batch that is
    spread. The gradient of one example, or of one task, would be mixed with those of other devices.

    Args:
        values: what is differentiated, a pytree of arrays.
        examples: what differs between devices, a pytree of arrays.
    """
    axes = frozenset[Hashable]().union(*map(_varying_axes, jax.tree.leaves(examples)))

    def own(value: object) -> Any:
        more = tuple(axes - _varying_axes(value))
        return jax.lax.pcast(value, more, to="varying") if more else value

    return jax.tree.map(own, values) if axes else values


def _varying_axes(value: object) -> frozenset[Hashable]:
    """Return the axes of a mesh along which a value differs, as far as JAX checks that."""
    of = jax.typeof(value) if isinstance(value, Tracer) else None
    return getattr(getattr(of, "manual_axis_type", of), "varying", frozenset())


def kind(trace: Any) -> str:
    """Return "eager", "staged", "autodiff", "batch" or, for any other trace, "other".

    Where JAX does not tell of what kind its traces are, that is "unknown".
    """
    kinds = _kinds()
    return kinds.get(type(trace)) or kinds[object]


def under_compilation() -> bool:
    """Say whether what runs now is traced to be compiled."""
    return any(kind(trace) == "staged" for trace in chain(current_trace()))


def is_forward_mode(trace: Any) -> bool:
    """Say whether a trace is that of ``jax.jvp``."""
    return kind(trace) == "autodiff" and "forward" in _modes().get(type(trace), ())


def _jvp(f: Callable, x: object) -> None:
    jax.jvp(f, (x,), (x,))


_TRANSFORMATIONS: tuple[tuple[str, str, Callable[[Callable, Any], Any]], ...] = (
    ("autodiff", "forward", _jvp),
    ("autodiff", "reverse", jax.vjp),
    ("batch", "", lambda f, x: jax.vmap(f)(x)),
    ("staged", "", jax.eval_shape),
)


@functools.cache
def _met() -> dict[type, set[tuple[str, str]]]:
    """Return in what each class of traces was met: the classes are private to JAX."""
    met: dict[type, set[tuple[str, str]]] = {}
    failed: dict[str, Exception] = {}
    for name, mode, transform in _TRANSFORMATIONS:

        def body(x: object, what: tuple[str, str] = (name, mode)) -> Any:
            met.setdefault(type(find_top_trace(())), set()).add(what)
            return x

        try:
            with jax.ensure_compile_time_eval():
                transform(body, np.ones((1,), np.float32))
        except Exception as error:
            failed[name] = error
    if failed:
        _warn(
            f"of what kind a trace is ({', '.join(failed)}: {[*failed.values()][0]!r})",
            "writes, draws and captures that are illegal in traces of these kinds",
        )
    return met


@functools.cache
def _kinds() -> dict[type, str]:
    kinds = {cls: min(name for name, _ in met) for cls, met in _met().items()}
    found = {what for met in _met().values() for what in met}
    # What any other class stands for: all that are known were met, or not.
    kinds[object] = "other" if len(found) == len(_TRANSFORMATIONS) else "unknown"
    return {**kinds, type(EAGER): "eager"}


@functools.cache
def _modes() -> dict[type, set[str]]:
    # A class that serves both modes tells nothing.
    modes = {cls: {mode for _, mode in met} for cls, met in _met().items()}
    return {cls: found if len(found) == 1 else set() for cls, found in modes.items()}


def tracer_in(value: Any) -> bool:
    """Say whether a tracer sits in a value or, one level down, in a plain container."""
    if isinstance(value, Tracer):
        return True
    if type(value) in (list, tuple, set, frozenset):
        return any(isinstance(v, Tracer) for v in value)
    if type(value) is dict:
        return any(isinstance(v, Tracer) for v in value.values())
    return False
