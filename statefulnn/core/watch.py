"""What can change in place, and whether it has: a list that compiled code depends on, a method of a class.

Members are compared by identity, at the speed of C. Whoever finds another one compares by value then.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any


class Watch:
    """Things that can change without a stamp, each once, and what was in them when they were noted.

    The first note of a thing counts: its key was made of what it held by then.
    """

    __slots__ = ("_many", "_mappings", "_sealed", "_single")

    # Between what several things hold, so that no member can move from one to the next unseen.
    _END = (object(),)

    def __init__(self) -> None:
        # By kind, since each kind has its own way to be compared with few steps of Python.
        self._single: dict[Hashable, tuple] = {}
        self._mappings: dict[Hashable, tuple] = {}
        self._many: dict[Hashable, tuple] = {}
        self._sealed: tuple[list, list, list, list, list] | None = None

    def __len__(self) -> int:
        return len(self._single) + len(self._mappings) + len(self._many)

    def note(
        self, read: Callable[[Any], object], subject: object, held: object, key: Hashable = None
    ) -> None:
        """Note a thing that holds one object: what reads it, the thing, what was read.

        Args:
            key: by what the thing is known, if not by `read` and its own identity.
        """
        self._add(self._single, key or (read, id(subject)), (read, subject, held))

    def note_members(self, key: Hashable, views: Iterable[Iterable], held: tuple) -> None:
        """Note a thing with many members: iterables that read it, and what all of them gave."""
        self._add(self._many, key, (views, held))

    def note_mapping(self, key: Hashable, mapping: Mapping, copy: Mapping) -> None:
        """Note a mapping whose members are the same where they are equal, and a copy of it."""
        self._add(self._mappings, key, (mapping, copy))

    def _add(self, notes: dict[Hashable, tuple], key: Hashable, note: tuple) -> None:
        self._sealed = None
        notes.setdefault(key, note)

    def add(self, other: Watch) -> None:
        """Take over the notes of another watch."""
        for name in ("_single", "_mappings", "_many"):
            mine = getattr(self, name)
            for key, note in getattr(other, name).items():
                self._add(mine, key, note)

    def unchanged(self) -> bool:
        """Say whether everything still holds what it held."""
        single, mappings, copies, views, held = self._sealed or self._seal()
        try:  # in the order of what is asked most often of models that people write
            for read, subject, was in single:
                if read(subject) is not was:
                    return False
            if mappings != copies:
                return False
            return not views or all(map(operator.is_, itertools.chain.from_iterable(views), held))
        except (
            Exception
        ):  # a thread adds members, a variable was unset, a new value will not compare
            return False

    def _seal(self) -> tuple[list, list, list, list, list]:
        self._sealed = single, mappings, copies, views, held = (
            [*self._single.values()],
            [],
            [],
            [],
            [],
        )
        for mapping, copy in self._mappings.values():
            mappings.append(mapping)
            copies.append(copy)
        for subject, was in self._many.values():
            views += (*subject, self._END)
            held += (*was, *self._END)
        return self._sealed
