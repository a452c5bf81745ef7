"""ModuleDef: the static half of a module tree.

A ModuleDef says everything about a tree but the values of its arrays: classes, names, which box sits
where (ties, shared modules, cycles), static attributes. It refers to no module, is immutable, and equal
ones are one object (`core.plan` interns them).
"""

from __future__ import annotations

import difflib
from typing import Any

from statefulnn.core.errors import UnknownNameError, explain
from statefulnn.core.generator import Generator
from statefulnn.core.parameter import Parameter

# How a clone gets a static attribute: the same object, a copy, a copy as a dict of hooks.
SHARED, COPIED, HOOKS = 0, 1, 2

_SHOWN = 8  # names in a message: similar ones are searched for these, which takes long

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
        "_ranks",
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
        self._ranks = [0] * len(boxes)
        for number, (cls, static) in enumerate(boxes):
            self._ranks[order[number]] = rank(cls, static)
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
        naming = _Naming(self)
        several = len(self.roots) > 1
        for number, (what, index) in enumerate(self.roots):
            prefix = f"[{number}]." if several else ""
            if what == "box":
                naming.label(f"[{number}]", index, False)
            else:
                naming.visit(index, prefix, (number,), number == 0 or several)
        for number, (what, index) in enumerate(self.roots):
            if what == "node":
                naming.refer(index, f"[{number}]." if several else "", (number,))
        return naming.names, [n if n is not None else "?" for n in naming.first], naming.paths


class _Naming:
    """Names the boxes and nodes of a ModuleDef, depth first and without recursion."""

    def __init__(self, moduledef: ModuleDef) -> None:
        self.nodes, self.order = moduledef.nodes, moduledef.order
        self.names: dict[str, int] = {}
        self.first: list[str | None] = [None] * len(moduledef.boxes)
        self.paths: list[tuple | None] = [None] * len(moduledef.nodes)

    def label(self, name: str, box: int, registered: bool) -> None:
        position = self.order[box]
        if registered:
            self.names.setdefault(name, position)
        if self.first[position] is None:
            self.first[position] = name

    def visit(self, root: int, prefix: str, path: tuple, registered: bool) -> None:
        """Name a node and what is registered below it, under every name."""
        around: set[int] = set()
        todo: list[tuple | int] = [(root, prefix, path)]
        while todo:
            step = todo.pop()
            if isinstance(step, int):
                around.discard(step)  # what remains is the path to here, so that a cycle still ends
                continue
            node, prefix, path = step
            # Without a registered name, what has a name gets no other.
            if node in around or (not registered and self.paths[node] is not None):
                continue
            if self.paths[node] is None:
                self.paths[node] = path
            around.add(node)
            parameters, buffers, children = self.nodes[node].members
            for name, box in (*parameters, *buffers):
                if box is not None:
                    self.label(prefix + name, box, registered)
            todo.append(node)
            todo += _below(children, prefix, path)

    def refer(self, root: int, prefix: str, path: tuple) -> None:
        """Name what is referred to from a node or below it, and has no name yet."""
        done: set[int] = set()
        todo: list[tuple] = [("node", root, prefix, path)]
        while todo:
            what, number, prefix, path = todo.pop()
            if what == "box":
                self.label(prefix, number, False)
                continue
            if what == "reference":
                self.visit(number, prefix, path, False)
            if number not in done:
                done.add(number)
                d = self.nodes[number]
                todo += [("node", *child) for child in _below(d.members[2], prefix, path)]
                todo += [
                    ("box", number, prefix + name, path)
                    if what == "box"
                    else ("reference", number, f"{prefix}{name}.", (*path, name))
                    for name, what, number in reversed(d.references)
                ]


def _below(children: tuple, prefix: str, path: tuple) -> list[tuple[int, str, tuple]]:
    """Return the children of a node with their prefixes and paths, the last one first."""
    return [
        (child, f"{prefix}{name}.", (*path, name))
        for name, child in reversed(children)
        if child is not None
    ]


def positions_of(moduledef: ModuleDef, names: Any, function: str) -> list[int]:
    """Return the leaf position of each name, or raise with the names that are near."""
    known = moduledef.names
    unknown = [n for n in names if n not in known]
    if unknown:
        shown = ", ".join(_guessed(n, known) for n in unknown[:_SHOWN])
        if len(unknown) > _SHOWN:
            shown += f" and {len(unknown) - _SHOWN} more"
        some = ", ".join(list(known)[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
        raise UnknownNameError(
            explain(
                f"{function} was given unknown names: {shown}",
                f"{moduledef!r} has {some or 'no parameters or buffers'}",
                "use the names of named_parameters() and named_buffers()",
            )
        )
    return [known[n] for n in names]


def _guessed(name: Any, known: dict[str, int]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


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
            for name in sorted(a.keys() | b.keys()):
                if name not in b:
                    found.append((_dotted(path, name, before), f"{noun} removed"))
                elif name not in a:
                    found.append((_dotted(path, name, before), f"{noun} added"))
                elif (a[name] is None) != (b[name] is None):
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
