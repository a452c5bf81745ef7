"""Stamps: how caches know that something has changed, without walking modules.

Terms
  clock       the two counters that stamps are taken from: structural changes, changes of values.
  Stamp       the stamp of one module. Caches compare stamps instead of walking the modules.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from statefulnn.core.refusals import Subject

if TYPE_CHECKING:
    from statefulnn.core.baked_in import BakedIn
    from statefulnn.core.ownership import Scope

# Counters and not `n += 1`: `next` is one step for threads, so no two changes get one stamp.
tick = itertools.count(1).__next__
value_tick = itertools.count(1).__next__


class Clock:
    """The two global counters, and what hangs on them.

    Attributes:
        structure: the stamp of the last structural or static change.
        values: the stamp of the last change of a value.
        gathered: weak references to the plans whose list of leaves is cached; the next change of a
            value drops the lists.
        baked_in: how many boxes were taken as constants by traced code and not written since.
        blocks: one object for each ``with`` block, of any thread, that sets what compiled code depends on.
    """

    __slots__ = ("baked_in", "blocks", "gathered", "structure", "values")

    def __init__(self) -> None:
        self.structure = 0
        self.values = 0
        self.gathered: list[Any] = []
        self.baked_in = 0
        self.blocks: set[object] = set()


clock = Clock()


def value_changed() -> None:
    """Drop every cached list of leaves; call after a box took another value."""
    # The stamp first: a list that is gathered meanwhile is then seen to be old (`Plan.keep`).
    clock.values = value_tick()
    if clock.gathered:
        plans, clock.gathered = clock.gathered, []
        for reference in plans:
            plan = reference()
            if plan is not None:
                plan.cached_leaves = None


class Stamp:
    """The stamp of one module, and the scope that owns the module (None: the user)."""

    __slots__ = ("__weakref__", "baked_in", "scope", "number")

    def __init__(self, scope: Scope | None = None) -> None:
        self.number = 0
        self.scope = scope
        self.baked_in: BakedIn | None = None

    def touch(self, subject: Subject = "a module") -> None:
        """Record a change that has just been made to the structure or to a static attribute."""
        # After the change: a plan that is made meanwhile has the old stamp, and is made again.
        self.number = clock.structure = tick()
        if self.baked_in is not None:
            self.baked_in.warn_of_structure(subject)
