"""ModuleDef: the static half of a module tree.

A ModuleDef says everything about a tree but the values of its arrays: classes, names, which box sits
where (ties, shared modules, cycles), static attributes. It refers to no module, is immutable, and equal
ones are one object (`core.plan` interns them).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Hashable, Iterator
from typing import Any

from statefulnn.core import refusals
from statefulnn.core.generator import Generator
from statefulnn.core.parameter import Parameter

# How a clone gets a static attribute: the same object, a copy, a copy as a dict of hooks.
SHARED, COPIED, HOOKS = 0, 1, 2

_KINDS = ("trainable", "frozen", "buffer", "generator")


def rank(cls: type, static: Hashable) -> int:
    """Return the place that boxes of a kind have among the leaves: a number of `_KINDS`."""
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
        shadowing: those of them that the class has an attribute of the same name for.
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
        """What is compared, and hashed: `values` and `shadowing` follow from it."""
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
        "_naming",
        "_ranks",
        "boxes",
        "key",
        "nodes",
        "order",
        "roots",
    )

    def __init__(
        self, nodes: tuple, roots: tuple, boxes: tuple, order: tuple, key: Hashable
    ) -> None:
        self.nodes = nodes
        self.roots = roots
        self.boxes = boxes
        self.order = order
        self.key = key
        # Hashed once: a key is a deep tuple, and JAX asks at each call.
        self._hash = hash(key)
        # By leaf position: a box says of what kind it is, and `order` says where it lies.
        self._ranks = [0] * len(boxes)
        for number, (cls, static) in enumerate(boxes):
            self._ranks[order[number]] = rank(cls, static)
        self._naming: _Naming | None = None  # names are made when somebody asks for one

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(other) is ModuleDef and self._hash == other._hash and self.key == other.key

    def __reduce__(self) -> Any:
        raise refusals.pickled_moduledef()

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
        return self._ranks.count(_KINDS.index(kind))

    @property
    def paths(self) -> list[tuple | None]:
        """For each node, the names that lead to it from its root, the root's number first."""
        return self._named().paths

    @property
    def names(self) -> dict[str, int]:
        """Every dotted name of every box under the first root (ties have several): its leaf position."""
        return self._named().names

    @property
    def leaf_names(self) -> list[str]:
        """For each leaf, its first name; a leaf that is only referred to is named by the reference."""
        return self._named().leaf_names

    def _named(self) -> _Naming:
        if self._naming is None:
            self._naming = _Naming(self)
        return self._naming


class _Naming:
    """The names of the boxes and nodes of a ModuleDef, found depth first and without recursion.

    What is registered is named before what is only referred to: a box that both a model and its optimizer
    know has the name that the model gives it.
    """

    def __init__(self, moduledef: ModuleDef) -> None:
        self.nodes, self.order = moduledef.nodes, moduledef.order
        self.names: dict[str, int] = {}
        self.leaf_names = ["?"] * len(moduledef.boxes)
        self.paths: list[tuple | None] = [None] * len(moduledef.nodes)
        several = len(moduledef.roots) > 1
        prefixes = [f"[{number}]." if several else "" for number in range(len(moduledef.roots))]
        for number, (what, index) in enumerate(moduledef.roots):
            if what == "box":
                self.label(f"[{number}]", index, False)
            else:
                self.visit(index, prefixes[number], (number,), True)
        for number, (what, index) in enumerate(moduledef.roots):
            if what == "node":
                self.refer(index, prefixes[number], (number,))

    def label(self, name: str, box: int, registered: bool) -> None:
        position = self.order[box]
        if registered:
            self.names.setdefault(name, position)
        if self.leaf_names[position] == "?":
            self.leaf_names[position] = name

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
            # Registered modules are named on each path, since ties have several names; but one that is only
            # referred to, and has a name already, gets no other.
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
        todo: list[tuple] = [("child", root, prefix, path)]
        while todo:
            what, number, prefix, path = todo.pop()
            if what == "box":
                self.label(prefix, number, False)
                continue
            if what == "node":
                self.visit(number, prefix, path, False)
            if number not in done:
                done.add(number)
                d = self.nodes[number]
                todo += [("child", *child) for child in _below(d.members[2], prefix, path)]
                # On top, so first: what a module refers to itself, before what its children do.
                for name, what, referred in reversed(d.references):
                    label = prefix + name if what == "box" else f"{prefix}{name}."
                    todo.append((what, referred, label, (*path, name)))


def _below(children: tuple, prefix: str, path: tuple) -> list[tuple[int, str, tuple]]:
    """Return the children of a node with their prefixes and paths, the last one first."""
    return [
        (child, f"{prefix}{name}.", (*path, name))
        for name, child in reversed(children)
        if child is not None
    ]


def positions_of(moduledef: ModuleDef, names: Collection[str], function: str) -> list[int]:
    """Return the leaf position of each name, or raise with the names that are near."""
    known = moduledef.names
    unknown = [n for n in names if n not in known]
    if unknown:
        # Similar names are searched for those alone that are shown, since it takes long.
        unknown[: refusals.SHOWN] = [_guessed(n, known) for n in unknown[: refusals.SHOWN]]
        raise refusals.unknown_names(function, unknown, repr(moduledef), list(known))
    return [known[n] for n in names]


def _guessed(name: str, known: dict[str, int]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def differences(before: ModuleDef, after: ModuleDef) -> list[tuple[str, str]]:
    """List what differs between two ModuleDefs as (attribute, description)."""
    found: list[tuple[str, str]] = []
    # Nodes are compared by path: their numbers shift when one is added.
    by_path = {p: i for i, p in enumerate(after.paths)}
    for path, old in zip(before.paths, before.nodes, strict=True):
        if path is None:
            continue
        if path in by_path:
            changes = _changes(old, after.nodes[by_path[path]], before.boxes, after.boxes)
        else:
            changes = [("", "module removed")]
        found += [(_dotted(path, name, before), change) for name, change in changes]
    tie = "which box or module sits where has changed (a tie was made or broken)"
    return found or [("", tie)]


def _changes(
    old: NodeDef, new: NodeDef, boxes_before: tuple, boxes_after: tuple
) -> Iterator[tuple[str, str]]:
    """Yield what differs between two nodes as (name, or "" for the module itself; description)."""
    if old.cls is not new.cls:
        yield "", f"class {old.cls.__name__} became {new.cls.__name__}"
    nouns = ("parameter", "buffer", "module")
    for noun, a, b in zip(nouns, map(dict, old.members), map(dict, new.members), strict=True):
        for name in sorted(a.keys() | b.keys()):
            one, other = a.get(name), b.get(name)
            if name not in b:
                yield name, f"{noun} removed"
            elif name not in a:
                yield name, f"{noun} added"
            elif one is None or other is None:
                if one is not other:
                    yield name, f"{noun} set to or from None"
            # A child is a node of its own, and compared there.
            elif noun != "module" and boxes_before[one] != boxes_after[other]:
                yield name, "requires_grad or persistence changed"
    a, b = dict(old.statics), dict(new.statics)
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            yield name, f"{_shown(old, name)} became {_shown(new, name)}"
    if old.references != new.references:
        yield "", "a reference changed"


def _dotted(path: tuple, name: str, moduledef: ModuleDef) -> str:
    # The first element of a path is the number of its root.
    head = () if len(moduledef.roots) == 1 or path[0] == 0 else (f"[{path[0]}]",)
    return ".".join((*head, *path[1:], *((name,) if name else ()))) or "the module itself"


def _shown(d: NodeDef, name: str) -> str:
    text = next((repr(value) for n, value, _ in d.values if n == name), "(absent)")
    return text if len(text) <= 60 else text[:57] + "..."
