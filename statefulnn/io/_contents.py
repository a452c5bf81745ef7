"""Finds and replaces the leaves in the containers that a file holds, without recursion.

A file can nest containers as deeply as it likes, and hold the same one in many places. So each is visited
once, with a list of what is still to do, and its leaves are replaced in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from statefulnn.io._reading import Budget, broken, shown
from statefulnn.io.placeholder import Placeholder

_PART, _ENDLESS = 8, 1 << 62  # bytes of a part in its container; a limit for counts of parts
_LONGEST_NAME, _LONGEST_PART = 100, 1000  # parts of a name, letters of a part


class Contents:
    """A value, the containers in it, and their contents.

    Args:
        path: the file, for messages.
        root: its containers are dicts, lists, tuples, their subclasses in ``collections``, and
            Placeholders.
        named: whether `name` will be called.
        budget: pays for a part once for each path to it, as ``repr`` and ``jax.tree.map`` visit it: 60 lists,
            of which each holds the one before it twice, have 2**60 parts for them.

    Attributes:
        root: the value.
        containers: each once, an inner one before the outer one.
        leaves: whatever is not a container, each object once, in the order of the file.
        versions: the ``_metadata`` of state dicts, by their id.

    Raises:
        CheckpointError: for a container that contains itself. A Placeholder may: objects refer to each other.
    """

    def __init__(
        self, path: Path, root: Any, named: bool = False, budget: Budget | None = None
    ) -> None:
        self.root = root
        self.leaves: list[Any] = []
        self.versions: dict[int, dict] = {}
        self.containers: list[Any] = []
        # For a part, by id: the container it was found in, and its key there.
        self._place: dict[int, tuple[int, Any]] | None = {} if named else None
        seen: dict[int, int] = {}
        roots = [root]
        for start in roots:  # the list grows during the loop
            count = self._walk(path, start, seen, roots)
            if budget is not None:
                budget.spend(_PART * count)

    def _walk(self, path: Path, start: object, seen: dict[int, int], roots: list[Any]) -> int:
        """Walk a value depth first; what is inside of Placeholders is put off, as further roots.

        Args:
            path: the file.
            start: the value.
            seen: the parts that were met already, by id, with the number of parts in them.
            roots: takes what is put off.

        Returns:
            the number of parts; those of a shared container count each time.
        """
        unfinished: set[int] = set()
        counts: list[int] = []  # of the containers that enclose this one
        count = 0
        way: list[tuple[Any, Iterator[tuple[Any, Any]]]] = []
        parts = iter([(None, start)])
        while True:
            for key, part in parts:
                count += 1
                if _is_plain(part):
                    continue
                if self._place is not None and way:
                    self._place.setdefault(id(part), (id(way[-1][0]), key))
                if id(part) in unfinished:
                    raise broken(path, 0, "a container that holds itself", "data without circles")
                if id(part) in seen:
                    count = min(count + seen[id(part)], _ENDLESS)
                    continue
                seen[id(part)] = 0
                if not isinstance(part, (dict, list, tuple)):
                    self._take(part, roots)
                    continue
                if isinstance(part, dict):
                    roots += [key for key in part if type(key) is Placeholder]
                unfinished.add(id(part))
                way.append((part, parts))
                counts.append(count)
                parts, count = self._parts(part), 0
                break  # go on inside it
            else:
                if not way:
                    return count
                part, parts = way.pop()
                seen[id(part)] = count
                count = min(count + counts.pop(), _ENDLESS)
                unfinished.discard(id(part))
                self.containers.append(part)

    def _take(self, part: object, roots: list[Any]) -> None:
        if isinstance(part, Placeholder):
            self.containers.append(part)
            inside = (part.args, part.kwargs, part.state, part.content)
            roots += [v for v in inside if v is not None]
        elif isinstance(part, (set, frozenset)):
            roots += [v for v in part if type(v) is Placeholder]
        else:
            self.leaves.append(part)

    def _parts(self, container: Any) -> Iterator[tuple[Any, Any]]:
        if not isinstance(container, dict):
            yield from enumerate(container)
            return
        yield from container.items()
        versions = getattr(container, "_metadata", None)
        if versions is not None:
            self.versions[id(versions)] = versions
            yield "_metadata", versions

    def name(self, leaf: Any) -> str:
        """Return the keys on the path to a leaf, joined by dots."""
        parts: list[str] = []
        at = id(leaf)
        place = self._place or {}
        while at in place and len(parts) < _LONGEST_NAME:
            at, key = place[at]
            parts.append(key[:_LONGEST_PART] if type(key) is str else shown(key))
        return ".".join(reversed(parts))

    def exchanged(self, new: dict[int, Any]) -> Any:
        """Return the value with its leaves replaced; `new` has the new ones by the id of the old ones.

        Dicts, lists and Placeholders stay the same objects.
        """
        done = dict(new)
        for part in self.containers:
            if type(part) is tuple and any(id(v) in done for v in part):
                done[id(part)] = tuple(done.get(id(v), v) for v in part)
        for part in self.containers:
            if isinstance(part, Placeholder):
                for field in ("args", "kwargs", "state", "content"):
                    value = getattr(part, field)
                    setattr(part, field, done.get(id(value), value))
            elif isinstance(part, dict):
                for key, value in part.items():
                    if id(value) in done:
                        part[key] = done[id(value)]
                if id(getattr(part, "_metadata", None)) in done:
                    part._metadata = done[id(part._metadata)]  # pyright: ignore
            elif isinstance(part, list):
                part[:] = [done.get(id(v), v) for v in part]
        return done.get(id(self.root), self.root)


def _is_plain(value: object) -> bool:
    return value is None or type(value) in _PLAIN


_PLAIN = {bool, int, float, complex, str, bytes, bytearray}
