"""Saying on the host what happened in compiled code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import Tracer


def report_unless(fine: Any, say: Callable[..., None], *values: Any) -> None:
    """Call ``say(*values)`` on the host, with numpy arrays, if a traced condition does not hold.

    Compiled code goes on meanwhile. A call into Python costs a compiled function the fast path of its
    dispatch: about 0.1 ms a call on CPU, whether the condition holds or not.
    """
    if not isinstance(fine, Tracer):
        if not fine:
            say(*map(np.asarray, values))
        return

    def on_host(fine: Any, *values: Any) -> None:
        if not fine:  # asked again: under vmap both branches of the condition run
            say(*map(np.asarray, values))

    fine, values = jax.lax.stop_gradient((fine, values))
    jax.lax.cond(
        fine,
        lambda fine, *values: None,
        lambda fine, *values: jax.debug.callback(on_host, fine, *values),
        fine,
        *values,
    )


def finite(tree: Any, lanes: int) -> Any:
    """Say for each lane, the first axis, whether all numbers of a tree are finite."""
    fine = jnp.ones(lanes, bool)
    for leaf in jax.tree_util.tree_leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            fine &= jnp.isfinite(leaf).reshape(lanes, -1).all(1)
    return fine


def warn(message: str, category: type[Warning]) -> None:
    """Warn from a callback, where no line of the user's is on the stack."""
    warnings.warn(message, category, stacklevel=2)
