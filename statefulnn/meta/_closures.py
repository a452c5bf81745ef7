"""Functions that reach traced values through their closures, as functions of these values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from statefulnn.core.compat import Tracer


def hoisted(function: Callable, *args: Any) -> tuple[Callable, list[Any]]:
    """Return ``call(values, *args)``, and the traced values that a function takes from outside.

    Args:
        function: a pure function of arrays.
        args: arguments of the structure, shapes and dtypes that `call` will be given, by which it is traced.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    consts, out = closed.consts, jax.tree_util.tree_structure(shapes)
    traced = [i for i, value in enumerate(consts) if isinstance(value, Tracer)]

    def call(values: Sequence[Any], *args: Any) -> Any:
        filled = list(consts)
        for i, value in zip(traced, values, strict=True):
            filled[i] = value
        leaves = jax.tree_util.tree_leaves(args)
        return out.unflatten(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, filled))(*leaves))

    return call, [consts[i] for i in traced]
