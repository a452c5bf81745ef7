"""Functions that reach traced values through their closures, as functions of these values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from statefulnn.core.baked_in import BakedIn
from statefulnn.core.compat import Tracer, current_trace, under_compilation


class Hoisted(NamedTuple):
    """A function of what it takes from outside.

    Attributes:
        call: ``call(values, *args)``.
        values: the traced values that the function takes from outside, such as the parameters of a module.
        shapes: what it returns, with ``jax.ShapeDtypeStruct`` instead of arrays.
    """

    call: Callable
    values: list[Any]
    shapes: Any


def hoisted(function: Callable, *args: Any) -> Hoisted:
    """Trace a pure function of arrays, and return it as a function of all that is traced.

    Args:
        function: what it does.
        args: arguments, or their shapes, as `call` will be given them.
    """
    eager = not under_compilation()

    def traced(*args: Any) -> Any:
        try:
            return function(*args)
        finally:
            if eager:  # it runs once: nothing that it has read can become stale in it
                BakedIn.forget_all_of(current_trace())

    closed, shapes = jax.make_jaxpr(traced, return_shape=True)(*args)
    consts, out = closed.consts, jax.tree_util.tree_structure(shapes)
    numbers = [i for i, value in enumerate(consts) if isinstance(value, Tracer)]

    def call(values: Sequence[Any], *args: Any) -> Any:
        filled = list(consts)
        for i, value in zip(numbers, values, strict=True):
            filled[i] = value
        leaves = jax.tree_util.tree_leaves(args)
        return out.unflatten(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, filled))(*leaves))

    return Hoisted(call, [consts[i] for i in numbers], shapes)
