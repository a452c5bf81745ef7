"""ModuleDef: the static half of a module tree.

A ModuleDef says everything about a tree but the values of its arrays: classes, names, which box sits
where (ties, shared modules, cycles), static attributes. It refers to no module, is immutable, and equal
ones are one object (`core.plan` interns them).
"""

from __future__ import annotations

import difflib
from typing import Any

from statefulnn.core.box import Parameter
from statefulnn.core.errors import UnknownNameError, explain
from statefulnn.core.generator import Generator

# How a clone gets a static attribute: the same object, a copy, a copy as a dict of hooks.
SHARED, COPIED, HOOKS = 0, 1, 2

_KINDS = ("trainable", "frozen", "buffer", "generator")


def rank(cls: type, static: Any) -> int:
    if issubclass(cls, Parameter):
        return 0 if static else 1
    return 3 if issubclass(cls, Generator) else 2


class NodeDef:
    """One module of a ModuleDef.

    Attributes:
        cls: its class.
        members: per registry (`_parameters`, `_buffers`, `_modules`), the names and the number of the
            box or node under each, None for a name that holds None.
        references: attributes that refer to a box or module without registering it.
        statics: the static attributes (name, frozen key).
        values: the same attributes (name, stored value, whether it must be copied for each clone).
    """

    __slots__ = ("cls", "members", "references", "shadowing", "statics", "values")

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.members: tuple = ()
        self.references: tuple = ()
        self.statics: tuple = ()
        self.values: tuple = ()
        self.shadowing: tuple = ()

    @property
    def key(self) -> tuple:
        return (self.cls, self.members, self.references, self.statics)


class ModuleDef:
    """The static half of one or several modules; hashable, and equal ones are the same object.

    Attributes:
        nodes: the modules, each once, in the order they were met.
        roots: for each root, ("node", number) or ("box", number).
        boxes: the class and static part of each box, in the order they were met.
        order: the leaf position of each box.
    """

    __slots__ = (
        "__weakref__",
        "_hash",
        "_names",
        "boxes",
        "key",
        "nodes",
        "order",
        "roots",
    )

    def __init__(self, nodes: tuple, roots: tuple, boxes: tuple, order: tuple, key: Any) -> None:
        self.nodes = nodes
        self.roots = roots
        self.boxes = boxes
        self.order = order
        self.key = key
        self._hash = hash(key)
        self._names: Any = None  # names are made when somebody asks for one

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(other) is ModuleDef and self._hash == other._hash and self.key == other.key

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ModuleDef refers to live classes and functions: pickle the module instead"
        )

    def __repr__(self) -> str:
        names = ", ".join(self.nodes[i].cls.__name__ for k, i in self.roots if k == "node")
        return f"ModuleDef({names}: {len(self.nodes)} modules, {len(self.boxes)} leaves)"

    @property
    def num_leaves(self) -> int:
        """How many leaves `merge` takes."""
        return len(self.boxes)

    def kind_of(self, position: int) -> str:
        """Return "trainable", "frozen", "buffer" or "generator" for a leaf position."""
        return _KINDS[self._ranks[position]]

    @property
    def _ranks(self) -> list[int]:
        ranks = [0] * len(self.boxes)
        for number, (cls, static) in enumerate(self.boxes):
            ranks[self.order[number]] = rank(cls, static)
        return ranks

    def count(self, kind: str) -> int:
        """Return how many leaves are of a kind."""
        rank = _KINDS.index(kind)
        return sum(r == rank for r in self._ranks)

    @property
    def paths(self) -> list[tuple | None]:
        """For each node, the names that lead to it from its root, the root's number first."""
        return self._described()[2]

    @property
    def names(self) -> dict[str, int]:
        """Every dotted name of every box under the first root (ties have several): its leaf position."""
        return self._described()[0]

    @property
    def leaf_names(self) -> list[str]:
        """For each leaf, its first name; a leaf that is only referred to is named by the reference."""
        return self._described()[1]

    def _described(self) -> tuple[dict[str, int], list[str], list[tuple | None]]:
        if self._names is None:
            self._names = self._name_everything()
        return self._names

    def _name_everything(self) -> tuple[dict[str, int], list[str], list[tuple | None]]:
        names: dict[str, int] = {}
        first: list[str | None] = [None] * len(self.boxes)
        paths: list[tuple | None] = [None] * len(self.nodes)
        several = len(self.roots) > 1

        def visit(node: int, prefix: str, path: tuple, active: frozenset, registered: bool) -> None:
            if node in active:
                return
            if paths[node] is None:
                paths[node] = path
            d = self.nodes[node]
            for registry in d.members[:2]:
                for name, box in registry:
                    if box is not None:
                        label(prefix + name, box, registered)
            active = active | {node}
            for name, child in d.members[2]:
                if child is not None:
                    visit(child, f"{prefix}{name}.", (*path, name), active, registered)

        def refer(node: int, prefix: str, path: tuple, done: set) -> None:
            if node in done:
                return
            done.add(node)
            d = self.nodes[node]
            for name, what, number in d.references:
                if what == "box":
                    label(prefix + name, number, False)
                else:
                    visit(number, f"{prefix}{name}.", (*path, name), frozenset(), False)
                    refer(number, f"{prefix}{name}.", (*path, name), done)
            for name, child in d.members[2]:
                if child is not None:
                    refer(child, f"{prefix}{name}.", (*path, name), done)

        def label(name: str, box: int, registered: bool) -> None:
            position = self.order[box]
            if registered:
                names.setdefault(name, position)
            if first[position] is None:
                first[position] = name

        for number, (what, index) in enumerate(self.roots):
            prefix = f"[{number}]." if several else ""
            if what == "box":
                label(f"[{number}]", index, False)
            else:
                visit(index, prefix, (number,), frozenset(), number == 0 or several)
        for number, (what, index) in enumerate(self.roots):
            if what == "node":
                refer(index, f"[{number}]." if several else "", (number,), set())
        return names, [n if n is not None else "?" for n in first], paths


def positions_of(moduledef: ModuleDef, names: Any, function: str) -> list[int]:
    """Return the leaf position of each name, or raise with the names that are near."""
    known = moduledef.names
    unknown = [n for n in names if n not in known]
    if unknown:
        near = {n: difflib.get_close_matches(str(n), known, 1) for n in unknown}
        shown = ", ".join(
            f"{n!r}" + (f" (did you mean {near[n][0]!r}?)" if near[n] else "") for n in unknown
        )
        some = ", ".join(list(known)[:8]) + (", ..." if len(known) > 8 else "")
        raise UnknownNameError(
            explain(
                f"{function} was given unknown names: {shown}",
                f"{moduledef!r} has {some or 'no parameters or buffers'}",
                "use the names of named_parameters() and named_buffers()",
            )
        )
    return [known[n] for n in names]


def differences(before: ModuleDef, after: ModuleDef) -> list[tuple[str, str]]:
    """List what differs between two ModuleDefs as (attribute, description)."""
    found: list[tuple[str, str]] = []
    by_path = {p: i for i, p in enumerate(after.paths)}
    for index, path in enumerate(before.paths):
        if path is None or path not in by_path:
            if path is not None:
                found.append((_dotted(path, "", before), "module removed"))
            continue
        old, new = before.nodes[index], after.nodes[by_path[path]]
        if old.cls is not new.cls:
            found.append(
                (_dotted(path, "", before), f"class {old.cls.__name__} became {new.cls.__name__}")
            )
        for registry, noun in zip((0, 1, 2), ("parameter", "buffer", "module"), strict=True):
            a, b = dict(old.members[registry]), dict(new.members[registry])
            for name in a.keys() - b.keys():
                found.append((_dotted(path, name, before), f"{noun} removed"))
            for name in b.keys() - a.keys():
                found.append((_dotted(path, name, before), f"{noun} added"))
            for name in a.keys() & b.keys():
                if (a[name] is None) != (b[name] is None):
                    found.append((_dotted(path, name, before), f"{noun} set to or from None"))
                elif registry == 2 and a[name] is not None:
                    continue
                elif a[name] is not None and before.boxes[a[name]] != after.boxes[b[name]]:
                    found.append(
                        (_dotted(path, name, before), "requires_grad or persistence changed")
                    )
        a, b = dict(old.statics), dict(new.statics)
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                found.append(
                    (_dotted(path, name, before), f"{_shown(old, name)} became {_shown(new, name)}")
                )
        if old.references != new.references:
            found.append((_dotted(path, "", before), "a reference changed"))
    if not found:
        found.append(("", "which box or module sits where has changed (a tie was made or broken)"))
    return found


def _dotted(path: tuple, name: str, moduledef: ModuleDef) -> str:
    # The first element of a path is the number of its root.
    head = () if len(moduledef.roots) == 1 or path[0] == 0 else (f"[{path[0]}]",)
    return ".".join((*head, *path[1:], *((name,) if name else ()))) or "the module itself"


def _shown(d: NodeDef, name: str) -> str:
    for n, value, _ in d.values:
        if n == name:
            text = repr(value)
            return text if len(text) <= 60 else text[:57] + "..."
    return "(absent)"
