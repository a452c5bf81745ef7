"""Arrays that more than one object holds, because this package gave them out.

A deep copy, a state dict and a loaded model share arrays with the boxes they come from, since arrays do not
change. A call with ``donate=`` gives the memory of its arrays away, and what was copied before has to
outlive that: such arrays are noted here, and `donate` copies those that somebody else still holds.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.stamps import value_changed

# By identity: what was lent; an entry goes with its array.
_lent: dict[int, weakref.ref] = {}
# Modules that JAX has put together, which may share arrays with others (jax.tree.map).
_rebuilt: list[weakref.ref] = []


class _Entry(weakref.ref):
    __slots__ = ("number",)


def _forget(entry: _Entry) -> None:
    if _lent.get(entry.number) is entry:
        del _lent[entry.number]


def lend(array: Any) -> Any:
    """Note that an array has got another holder, and return it."""
    if isinstance(array, jax.Array) and not isinstance(array, Tracer) and id(array) not in _lent:
        entry = _Entry(array, _forget)
        entry.number = id(array)
        _lent[id(array)] = entry
    return array


def note_rebuilt(module: ModuleBase) -> None:
    """Note that JAX has put a module together outside of every trace."""
    _rebuilt.append(weakref.ref(module))
    if len(_rebuilt) % 1024 == 0:
        _rebuilt[:] = [reference for reference in _rebuilt if reference() is not None]


def donated(leaves: Sequence[Any], positions: Iterable[int], others: Sequence[Any]) -> list[Any]:
    """Return the arrays to give away: where somebody else holds one, a copy of it.

    Args:
        leaves: the list of a plan's leaves, which holds each array beside its box.
        positions: of those to give away.
        others: arrays to give away that are in no box.
    """
    while _rebuilt and current_trace() is EAGER:
        module = _rebuilt.pop()()
        for array in () if module is None else jax.tree_util.tree_leaves(module):
            lend(array)
    gone = [leaves[i] for i in positions]
    shared = [i for i, array in enumerate(gone) if id(array) in _lent]
    if shared:
        value_changed()  # no plan's list holds an array any more, except `leaves`
        alone = _count_of_two_lists_and_a_box()
        for i in shared:
            if sys.getrefcount(gone[i]) > alone:
                gone[i] = jnp.array(gone[i], copy=True)
    gone += others
    if len({id(v) for v in gone}) < len(gone):
        gone = _distinct(gone)
    return gone


def _count_of_two_lists_and_a_box() -> int:
    # Asked and not assumed: versions of Python count the references of a running function otherwise.
    box = [object()]
    first, second = [box[0]], [box[0]]
    return sys.getrefcount(second[0]) if first else 0


def _distinct(arrays: list[Any]) -> list[Any]:
    """Copy an array that several boxes hold: XLA takes a buffer once."""
    seen: set[int] = set()
    result = []
    for array in arrays:
        result.append(jnp.array(array) if id(array) in seen else array)
        seen.add(id(array))
    return result
