"""The modules of a model as a tree that holds what a reader wants to know of each."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
from jax.typing import DTypeLike

from statefulnn.core.box import Box
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter
from statefulnn.core.uninitialized import is_lazy
from statefulnn.core.walk import ENTER, LEAVE, walk
from statefulnn.inspect.trace import Call, Trace, boxes_of


@dataclasses.dataclass(frozen=True)
class Held:
    """A parameter or buffer under one of its names.

    Attributes:
        path: its dotted name.
        name: the last part of it.
        box: the Parameter or Buffer.
        shape: its shape; None for one that has none yet.
        dtype: its dtype; None for one without an array.
        trainable: whether it is a parameter that is trained.
        tied: the first name of a box that has several, None under that one.
    """

    path: str
    name: str
    box: Any
    shape: tuple[int, ...] | None
    dtype: DTypeLike | None
    trainable: bool
    tied: str | None

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.box, Parameter)

    @property
    def size(self) -> int:
        return 0 if self.shape is None else math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * getattr(self.dtype, "itemsize", 4)


@dataclasses.dataclass
class Node:
    """A module under one of its names.

    Attributes:
        path: its dotted name.
        name: the last part of it.
        module: the module.
        shared: the first name of a module that has several, None under that one.
        own: its own parameters and buffers.
        children: its submodules; none if it is shown under another name.
        calls: what a trace saw of it.
        boxes: all parameters and buffers in it, each once, by id.
        read: whether a trace computed with one of them.
        stranger: what to say of a module that is no part of the model, and is called by it; "" of others.
    """

    path: str
    name: str
    module: Module
    stranger: str = ""
    shared: str | None = None
    own: list[Held] = dataclasses.field(default_factory=list)
    children: list[Node] = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)
    boxes: dict[int, Held] = dataclasses.field(default_factory=dict)
    read: bool = False
    signature: int = 0

    @property
    def cls(self) -> str:
        return type(self.module).__name__

    @functools.cached_property
    def parameters(self) -> int:
        return sum(h.size for h in self.boxes.values() if h.is_parameter)

    @functools.cached_property
    def trainable(self) -> int:
        return sum(h.size for h in self.boxes.values() if h.trainable)

    @functools.cached_property
    def buffers(self) -> int:
        return sum(h.size for h in self.boxes.values() if not h.is_parameter)

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(h.nbytes for h in self.boxes.values())

    @functools.cached_property
    def flops(self) -> int:
        # Nobody calls a list: its numbers are those of what is in it.
        return sum(x.flops for x in (self.calls or self.children))

    @functools.cached_property
    def is_called(self) -> bool:
        return bool(self.calls) or any(child.is_called for child in self.children)

    @property
    def without_shape(self) -> list[str]:
        """The names of lazy parameters whose shape nobody knows."""
        return [h.path for h in self.boxes.values() if h.shape is None]


def tree_of(model: Module, trace: Trace | None = None) -> Node:
    """Build the tree of a model, with the calls of a trace."""
    calls = collections.defaultdict(list)
    for call in trace.calls.values() if trace else ():
        if call.module is None:
            calls[call.path].append(call)
    first_box: dict[int, str] = {}
    first_module: dict[int, str] = {}
    signatures: dict[Any, int] = {}
    stack: list[Node] = []
    root: Node | None = None

    def below(module: Module, path: str) -> list[tuple[str, Any]]:
        children = ((n, m) for n, m in module._nn_shown().items() if m is not None)
        return [(f"{path}.{n}" if path else n, m) for n, m in children]

    for event, path, module in walk(model, below, once=True):
        if event is LEAVE:
            node = stack.pop()
            for part in (node.own, *(child.boxes.values() for child in node.children)):
                for held in part:
                    node.boxes.setdefault(id(held.box), held)
            node.read = trace is not None and any(h.path in trace.read for h in node.boxes.values())
            node.signature = signatures.setdefault(_signature(node), len(signatures))
            continue
        node = Node(path, path.rsplit(".", 1)[-1], module)
        (stack[-1].children if stack else []).append(node)
        root = root or node
        if event is ENTER:
            first_module[id(module)] = path
            node.own = _held(module, path, first_box, trace)
            node.calls = calls[path]
            stack.append(node)
        else:
            node.shared = first_module[id(module)]
            node.signature = signatures.setdefault(node.shared, len(signatures))
    assert root is not None
    if trace is not None:
        _add_strangers(root, trace, signatures)
    return root


def _add_strangers(root: Node, trace: Trace, signatures: dict[Any, int]) -> None:
    """Add what is called and no part of the model, each below the module whose call calls it."""
    nodes: dict[str | int | None, Node] = {}
    added: list[Node] = []
    todo = [root]
    while todo:
        node = todo.pop()
        nodes.setdefault(node.path, node)
        todo += reversed(node.children)
    for call in trace.calls.values():
        if call.module is None:
            continue
        around, key = call, ""
        while around.parent is not None:
            around = trace.calls[around.parent]
            key = around.path if around.module is None else id(around.module)
            if key in nodes:
                break
        if id(call.module) not in nodes:
            said = "referred to by nn.Ref" if call.name else "not registered"
            path = f"{nodes[key].path}.<{call.name or said} {len(added)}>".lstrip(".")
            node = nodes[id(call.module)] = Node(path, call.name, call.module, said)
            boxes = [(f"{path}.{n}", b) for n, b in boxes_of(call.module) if id(b) in trace.foreign]
            node.boxes = {id(b): held_of(b, n, n.removeprefix(f"{path}."), n) for n, b in boxes}
            node.own = [h for h in node.boxes.values() if "." not in h.name]
            nodes[key].children.append(node)
            added.append(node)
        nodes[id(call.module)].calls.append(call)
    for node in reversed(added):
        node.signature = signatures.setdefault(_signature(node), len(signatures))


def held_of(box: Box, path: str, name: str, first: str = "", trace: Trace | None = None) -> Held:
    """Describe a parameter or buffer; a trace knows the shapes that lazy ones will have."""
    known = (trace.shapes.get(path) if trace else None) if is_lazy(box) else box._value
    trainable = isinstance(box, Parameter) and box.requires_grad
    dtype = getattr(box._value if known is None else known, "dtype", None)  # Equinox leaves None
    shape = None if known is None else tuple(known.shape)
    return Held(path, name, box, shape, dtype, trainable, None if first == path else first)


def _held(module: Module, prefix: str, first: dict[int, str], trace: Trace | None) -> list[Held]:
    found = []
    for name, box in (*module._parameters.items(), *module._buffers.items()):
        if box is not None:
            path = f"{prefix}.{name}" if prefix else name
            found.append(held_of(box, path, name, first.setdefault(id(box), path), trace))
    return found


def _signature(node: Node) -> Any:
    """Return what equal blocks have in common: everything that is shown but their names and values."""
    return (
        type(node.module),
        node.module.extra_repr(),
        tuple((h.name, h.shape, str(h.dtype), h.trainable, h.tied) for h in node.own),
        tuple((c.flops, c.times, describe(c.output)) for c in node.calls),
        tuple((child.name, child.signature) for child in node.children),
        node.read,
        node.stranger,
    )


def runs_of_equals(nodes: list[Node]) -> list[list[Node]]:
    """Group neighbours that look the same, such as the blocks of a list."""
    groups: list[list[Node]] = []
    for node in nodes:
        if groups and groups[-1][0].signature == node.signature and node.shared is None:
            groups[-1].append(node)
        else:
            groups.append([node])
    return groups


def describe(tree: object) -> str:
    """Return the shapes in an output, nested as it is: ``(2, 3)``, ``[(2, 3), None]``, ``{a: (2,)}``."""
    if isinstance(tree, jax.ShapeDtypeStruct):
        return str(tree.shape)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, (list, tuple)):
        runs = ((part, len(list(same))) for part, same in itertools.groupby(map(describe, tree)))
        return "[" + ", ".join(f"{part} × {n}" if n > 1 else part for part, n in runs) + "]"
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return repr(tree)
    leaves = jax.tree_util.tree_leaves(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return type(tree).__name__
    return f"{type(tree).__name__}({', '.join(map(describe, leaves))})"


def bytes_of(tree: object) -> int:
    """Return how many bytes the arrays of an output take."""
    structs = (x for x in jax.tree_util.tree_leaves(tree) if isinstance(x, jax.ShapeDtypeStruct))
    return sum(math.prod(x.shape) * getattr(x.dtype, "itemsize", 4) for x in structs)
