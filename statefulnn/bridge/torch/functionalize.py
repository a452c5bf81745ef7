"""torch.export's graph as a list of instructions in which nothing is changed in place.

A tensor of torch is a *view*: a chain of view operators from a root. Writing to one writes to the root, and
the other views of the root are computed again when they are read next.

Terms
  Instruction   one operation on slots, and the call of a module it belongs to
  View          root and chain of view operators that a node stands for
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from typing import Any

import torch

from statefulnn.bridge.torch.decompositions import decomposed
from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.bridge.torch.graph import Body
from statefulnn.bridge.torch.nodes import (
    counts_places,
    depends_on_numbers,
    entry_of,
    is_in_place,
    layout_of_memory,
    number_of_array,
    operator_name,
    place_of,
    shares_memory,
    unclear_view,
    unknown_size,
    written_constant,
)
from statefulnn.bridge.torch.operators import find
from statefulnn.bridge.torch.structures import CONSTANTS, Var, leaves, map_leaves
from statefulnn.bridge.torch.tracing import (
    CUSTOM,
    OURS,
    SYMBOLIC,
    Call,
    Ref,
    Trace,
    number_of,
)
from statefulnn.core.errors import explain

# Operators that check, or that only speak to torch's compiler.
_DROPPED = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_set_grad_enabled",
}
# What gives the tensor itself another shape: its name, without the underscore, is that of a view.
_RESHAPED = {"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
# What returns its argument, or another view of the same numbers, only sometimes.
_PERHAPS_A_VIEW = {"reshape", "flatten", "contiguous", "to", "_to_copy", "type_as", "reshape_as"}
# Operators without an underscore that write to arguments: their positions, if the flag there is set.
_WRITES: dict[str, tuple[int, tuple[int, ...]]] = dict.fromkeys(
    ("batch_norm.default", "instance_norm.default", "_native_batch_norm_legit.default"), (5, (3, 4))
)


@dataclass
class Instruction:
    """One operation on slots; the kinds are those of `Step`, without "call"."""

    kind: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    out: int
    call: Call
    where: str


@dataclass
class Root:
    """A tensor that is no view of another: where its numbers are."""

    slot: int | None
    name: str | None = None  # of a parameter or buffer, relative to the model
    constant: Any = None  # a tensor that is neither
    like: Any = None  # the tensor of a parameter or buffer, as torch.export has it
    version: int = 0
    read_by: dict[tuple[int, int], int] = field(default_factory=dict)
    views: dict[tuple[int, ...], int] = field(
        default_factory=dict
    )  # (call, version, *links) -> slot

    def __post_init__(self) -> None:
        self.first = self.slot  # the one that it was made with

    def is_read(self) -> bool:
        """Say whether the numbers are read where they are needed, and not in a slot."""
        return self.name is not None or (self.constant is not None and not self.version)


@dataclass(frozen=True)
class Link:
    """One view operator of a chain; `index` picks one of several views that it gives."""

    target: Any
    args: Any
    kwargs: Any
    where: str
    many: bool = False
    index: int | None = None


@dataclass
class View:
    """What a node stands for: the root and the view operators that lead here."""

    root: Root
    chain: tuple[Link, ...] = ()
    certain: bool = True  # False: it depends on the layout whether it is a view at all


@dataclass
class Flat:
    """A trace as instructions.

    Attributes:
        producer: the call in which a slot got its value.
        inputs, outputs: by call, the arguments and the output as structures of `Var`.
        sizes: by slot, the shape and dtype that its tensor has.
        with_bodies: calls with an operator that is given functions.
    """

    instructions: list[Instruction] = field(default_factory=list)
    producer: list[Call] = field(default_factory=list)
    inputs: dict[int, tuple[Any, Any, Any]] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    shapes: dict[int, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    with_bodies: set[int] = field(default_factory=set)


def _is_detach(link: Link) -> bool:
    return str(link.target).startswith("detach")


def _only_checked(node: Any) -> bool:
    """Say whether a number of an array is in assertions alone, which a graph leaves out."""
    if operator_name(node.target) in _DROPPED:
        return True
    if not isinstance(node.meta.get("val"), SYMBOLIC) or not depends_on_numbers(node.meta["val"]):
        return False
    return bool(node.users) and all(_only_checked(user) for user in node.users)


class Functionalizer:
    """Goes once through the nodes of a trace."""

    def __init__(self, trace: Trace, operators: dict[Any, Any]) -> None:
        self.trace = trace
        self.custom = operators
        self.flat = Flat()
        self.views: dict[Any, Any] = {}  # node -> View, or a number
        self.by_ref: dict[int, tuple[View, Any]] = {}  # and a tensor like it
        self.nodes_by_ref: dict[int, Any] = {}
        self.named: dict[str, Root] = {}
        self.events = iter(enumerate(trace.events))
        self.next_event = next(self.events, None)
        self.call = trace.root
        self.stopped = False  # whether the code at hand runs under no_grad

    # ----------------------------------------------------------------------------------------------
    # Instructions and slots

    def slot(self, call: Call, value: Any = None) -> int:
        self.flat.producer.append(call)
        number = len(self.flat.producer) - 1
        if isinstance(value, torch.Tensor):
            self.flat.shapes[number] = value
        return number

    def emit(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any = None,
        where: str = "",
        like: Any = None,
    ) -> int:
        out = self.slot(self.call, like)
        self.flat.instructions.append(
            Instruction(kind, target, args, kwargs or {}, out, self.call, where)
        )
        return out

    # ----------------------------------------------------------------------------------------------
    # Reading and writing views

    def root_slot(self, root: Root) -> int:
        """Return the slot with a root's numbers; parameters and constants are read anew in each call."""
        if not root.is_read():
            assert root.slot is not None
            return root.slot
        key = (id(self.call), root.version)
        if key not in root.read_by:
            kind, target = ("read", root.name) if root.name else ("constant", root.constant)
            root.read_by[key] = self.emit(kind, target, ())
        return root.read_by[key]

    def read(self, view: View) -> Var:
        """Return the slot with a view's numbers, computed from those that are known already."""
        root = view.root
        where = id(self.call) if root.is_read() else 0
        keys = [(where, root.version, *map(id, view.chain[:i])) for i in range(len(view.chain) + 1)]
        known = next((i for i in range(len(view.chain), 0, -1) if keys[i] in root.views), 0)
        slot = root.views[keys[known]] if known else self.root_slot(root)
        for link, key in zip(view.chain[known:], keys[known + 1 :], strict=True):
            slot = self.apply(link, slot)
            root.views[key] = slot
        return Var(slot)

    def apply(self, link: Link, slot: int) -> int:
        slot = self.emit("operator", link.target, (Var(slot), *link.args), link.kwargs, link.where)
        if link.index is not None:
            slot = self.emit("operator", "getitem", (Var(slot), link.index))
        return slot

    def write(self, view: View, new: int, where: str, seen: bool = True) -> None:
        """Put other numbers into a tensor, and so into everything it is a view of.

        Where gradients do not see it (under no_grad, by way of ``detach``), they pass as if nothing had been
        written.
        """
        root = view.root
        seen = seen and not self.stopped and not any(_is_detach(link) for link in view.chain)
        if root.constant is not None:
            raise written_constant(where)
        if not view.certain:
            raise unclear_view(where)
        values = [self.root_slot(root)]
        for link in view.chain[:-1]:
            values.append(self.apply(link, values[-1]))
        value = new
        for before, link in zip(reversed(values), reversed(view.chain), strict=False):
            if link.target != "alias":
                parts = (link.target, link.args, link.kwargs, link.index)
                value = self.emit(
                    "operator", "put_view", (Var(before), Var(value), *parts), {}, where
                )
        if not seen:
            value = self.emit("operator", "unseen", (Var(values[0]), Var(value)), {}, where)
        root.version += 1
        if root.name is not None:
            self.emit("write", root.name, (Var(value),), where=where)
            root.read_by[(id(self.call), root.version)] = value
        else:
            root.slot = value
        where_read = id(self.call) if root.is_read() else 0
        if seen:
            root.views[(where_read, root.version, *map(id, view.chain))] = new

    def argument(self, value: Any) -> Any:
        """Return an argument of a node, with slots for nodes."""
        if isinstance(value, torch.fx.Node):
            found = self.views[value]
            if isinstance(found, torch.fx.GraphModule):
                return self.body(found)
            return self.read(found) if isinstance(found, View) else found
        if isinstance(value, tuple):
            return tuple(self.argument(v) for v in value)
        if isinstance(value, list):
            return [self.argument(v) for v in value]
        if isinstance(value, dict):
            return {k: self.argument(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, (torch.dtype, torch.layout, torch.device, torch.memory_format)):
            return str(value).removeprefix("torch.")
        if isinstance(value, SYMBOLIC):
            return number_of(value)
        if type(value) in CONSTANTS:
            return value
        return f"<{type(value).__name__}>"

    # ----------------------------------------------------------------------------------------------
    # Events and nodes

    def advance(self, number: int) -> None:
        """Enter and leave modules up to an event."""
        while self.next_event is not None and self.next_event[0] <= number:
            kind, call = self.next_event[1]
            if kind == "enter":
                structure = (call.args, call.kwargs, call.bound)
                if not call.problem:
                    self.flat.inputs[id(call)] = tuple(self.filled(s) for s in structure)  # type: ignore
                self.flat.calls.append(call)
                self.hand_in(call)
                self.call = call
            elif kind == "assign":
                self.assign(*call)
            elif kind == "function":
                self.give_gradient(*call)
            else:
                if not call.problem:
                    self.flat.outputs[id(call)] = self.filled(call.output)
                self.call = call.parent or self.trace.root
            self.next_event = next(self.events, None)

    def hand_in(self, call: Call) -> None:
        """Let a call read the parameters it was given as arguments from there."""
        for ref in leaves((call.args, call.kwargs)):
            if isinstance(ref, Ref) and ref.number in self.by_ref:
                view, _ = self.by_ref[ref.number]
                root, slot = view.root, self.read(view).slot
                if root.is_read() and not view.chain:
                    root.read_by[(id(call), root.version)] = slot
                elif root.is_read():
                    root.views[(id(call), root.version, *map(id, view.chain))] = slot

    def assign(self, name: str, number: int) -> None:
        """Bind a buffer's name to another tensor; what the old one was stays as it is."""
        old = self.named[name]
        old.slot, old.name = self.root_slot(old), None
        view, _ = self.by_ref[number]
        slot = self.read(view).slot
        self.emit("write", name, (Var(slot),))
        root = view.root if not view.chain and view.root.name is None else Root(slot)
        root.name = name
        root.read_by[(id(self.call), root.version)] = slot
        self.named[name] = root

    def give_gradient(
        self, given: list, made: list, graph: torch.fx.GraphModule, name: str
    ) -> None:
        """Let gradients pass the outputs of a torch.autograd.Function by its own backward."""
        if any(ref.number not in self.by_ref for ref in (*given, *made)):  # nothing uses it
            return
        inputs = [self.read(self.by_ref[ref.number][0]) for ref in given]
        outputs = [self.read(self.by_ref[ref.number][0]) for ref in made]
        args = (outputs, inputs, self.body(graph, calls=False))
        out = self.emit("operator", "own_gradient", args, None, f"the backward of {name}")
        for i, ref in enumerate(made):
            _, like = self.by_ref[ref.number]
            view = View(Root(self.emit("operator", "getitem", (Var(out), i), like=like)))
            self.by_ref[ref.number] = view, like
            self.views[self.nodes_by_ref[ref.number]] = view

    def filled(self, structure: Any) -> Any:
        def leaf(x: Any, _: str) -> Any:
            if not isinstance(x, Ref):
                return x
            if x.number not in self.by_ref:  # left out by torch.export: nothing uses it
                return None
            view, like = self.by_ref[x.number]
            slot = self.read(view)
            if isinstance(like, torch.Tensor):
                self.flat.shapes[slot.slot] = like
            return slot

        return map_leaves(structure, leaf)

    def run(self) -> Flat:
        """Return the instructions."""
        program = self.trace.program
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        kinds = torch.export.graph_signature.InputKind
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            value = node.meta.get("val")
            if spec.kind in (kinds.PARAMETER, kinds.BUFFER):
                name = str(spec.target).removeprefix("model.")
                table = self.trace.tables.get(name)
                root = Root(None, name) if table is None else Root(None, constant=table)
                root.like = value
                self.views[node] = View(self.named.setdefault(name, root))
            elif spec.kind == kinds.CONSTANT_TENSOR:
                tensor = program.constants[str(spec.target)]
                # A buffer that the code reaches by way of another object is that buffer.
                root = Root(None, constant=tensor)
                if known := self.trace.paths.get(id(tensor)):
                    root = self.named.setdefault(known[0], Root(None, known[0]))
                self.views[node] = View(root)
            elif isinstance(value, torch.Tensor):
                self.views[node] = View(Root(self.slot(self.trace.root, value)))
            else:
                self.views[node] = value
            self.note(node)
        self.nodes(program.graph_module, stopped=False)
        self.advance(len(self.trace.events))
        return self.flat

    def body(self, graph: torch.fx.GraphModule, calls: bool = True) -> Body:
        """Return a function that an operator is given, with slots of its own; `calls`: of modules."""
        if calls:
            self.flat.with_bodies.add(id(self.call))
        inner = Functionalizer(self.trace, self.custom)
        inner.call, inner.next_event = self.call, None
        inputs = []
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                value = node.meta.get("val")
                slot = inner.slot(self.call, value)
                inputs.append(slot)
                is_array = isinstance(value, torch.Tensor)
                inner.views[node] = View(Root(slot)) if is_array else number_of(value)
        found = inner.nodes(graph, stopped=False)
        result = [inner.read(x) if isinstance(x, View) else x for x in found]
        flat = inner.flat
        return Body(tuple(inputs), tuple(flat.instructions), result, len(flat.producer))

    def note(self, node: Any) -> None:
        ref = node.meta.get(CUSTOM, {}).get(OURS, {}).get("ref")
        if ref is not None and isinstance(self.views.get(node), View):
            self.by_ref[ref] = self.views[node], node.meta.get("val")
            self.nodes_by_ref[ref] = node

    def nodes(self, module: torch.fx.GraphModule, stopped: bool) -> Any:
        """Go through the nodes of a graph; `stopped` says whether no gradients pass."""
        output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
        around, self.stopped = self.stopped, stopped
        made_before = len(self.flat.producer)
        results = dict.fromkeys(output.all_input_nodes) if stopped else {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            event = node.meta.get(CUSTOM, {}).get(OURS, {}).get("event")
            if event is not None:
                self.advance(event)
            if node.op == "get_attr":
                value = getattr(module, node.target)
                if isinstance(value, torch.Tensor):
                    value = View(Root(None, constant=value))
                self.views[node] = value
            elif node.op == "call_function":
                self.views[node] = self.node(node)
            self.note(node)
        for node in results:
            found = self.views[node]
            if isinstance(found, View) and node.op != "placeholder":
                self.views[node] = self.stop(node, found, made_before)
                self.note(node)
        self.stopped = around
        pick = lambda x: self.views[x] if isinstance(x, torch.fx.Node) else x
        several = isinstance(output.args[0], (tuple, list))
        return [pick(x) for x in output.args[0]] if several else [pick(output.args[0])]

    def stop(self, node: Any, view: View, made_before: int) -> View:
        """Return what a result of no_grad is after it, where gradients pass again.

        A tensor that was there before, and was written to, is as it was for them.
        """
        root = view.root
        if root.slot is not None and root.first is not None and root.first >= made_before:
            root.slot = self.emit("operator", "stop_gradient", (Var(root.slot),))
            root.version += 1
            return view
        name = operator_name(node.target)
        if is_in_place(name):
            return view
        link = Link("detach.default", (), {}, place_of(node, self.call))
        return View(root, (*view.chain, link), view.certain)

    def node(self, node: Any) -> Any:
        """Return what a node stands for: a View, a number, or a list of these."""
        value = node.meta.get("val")
        if _only_checked(node):
            return None
        if operator_name(node.target) in ("item", "_local_scalar_dense"):
            raise number_of_array(place_of(node, self.call))
        if depends_on_numbers(value) and operator_name(node.target) not in _DROPPED:
            raise unknown_size(f"{node.target}", place_of(node, self.call))
        if counts_places(node):
            raise unknown_size(f"{node.target}", place_of(node, self.call))
        if isinstance(value, SYMBOLIC):
            return number_of(value)
        if isinstance(value, (int, bool, float)):
            return value
        if node.target is operator.getitem:
            return self.item(node, value)
        name = operator_name(node.target)
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            return self.inlined(node, name)
        if name in _DROPPED:
            return None
        return self.operator(node, name, value)

    def item(self, node: Any, value: Any) -> Any:
        source, index = node.args
        found = self.views[source]
        if isinstance(found, list):
            return found[index]
        if found.chain and found.chain[-1].many:
            *before, last = found.chain
            chosen = dataclasses.replace(last, many=False, index=index)
            return View(found.root, (*before, chosen), found.certain)
        where = place_of(node, self.call)
        return View(
            Root(self.emit("operator", "getitem", (self.read(found), index), None, where, value))
        )

    def inlined(self, node: Any, name: str) -> Any:
        """Go through the graph inside of a ``no_grad`` or a switched off ``autocast``."""
        if name == "wrap_with_autocast":
            _, _, enabled, _, inner, *rest = node.args
            if enabled:
                raise ConversionError(
                    explain(
                        f"converted code that runs under torch.autocast ({place_of(node, self.call)})",
                        "the dtypes that it chooses are not in the graph",
                        "convert the model without autocast, and change dtypes with model.to(...)",
                    )
                )
            stopped = self.stopped
        else:
            enabled, inner, *rest = node.args
            stopped = not enabled
        graph = self.views[inner]
        holes = [n for n in graph.graph.nodes if n.op == "placeholder"]
        for hole, given in zip(holes, rest, strict=True):
            self.views[hole] = self.views[given] if isinstance(given, torch.fx.Node) else given
        return self.nodes(graph, stopped)

    def operator(self, node: Any, name: str, value: Any) -> Any:
        where = place_of(node, self.call)
        schema = getattr(node.target, "_schema", None)
        target = entry_of(node.target, self.custom)
        if schema is None:
            slot = self.emit("operator", target, self.argument(node.args), {}, where, value)
            return View(Root(slot))
        if isinstance(target, str) and not find(target):
            graph = decomposed(node)
            if graph is not None:
                holes = [n for n in graph.graph.nodes if n.op == "placeholder"]
                for hole, given in zip(holes, node.all_input_nodes, strict=True):
                    self.views[hole] = self.views[given]
                found = self.nodes(graph, self.stopped)
                return found if isinstance(value, (tuple, list)) else found[0]
        updates = _WRITES.get(str(node.target).removeprefix("aten."))
        written = [
            i
            for i, a in enumerate(schema.arguments)
            if a.alias_info and a.alias_info.is_write and not updates
        ]
        names = [schema.arguments[i].name for i in written]
        given_out = names == ["out"]
        if written and not given_out and not (written == [0] and is_in_place(name)):
            raise ConversionError(
                explain(
                    f"found {node.target} ({where})",
                    "it writes to several of its arguments",
                    "use what it returns: write it without out=",
                )
            )
        event = node.meta.get(CUSTOM, {}).get(OURS, {}).get("event")
        call = self.call
        if event is None and node.all_input_nodes:  # put there after the trace
            self.call = self._latest(node)
        try:
            args, kwargs = self.argument(node.args), self.argument(node.kwargs)
            if name in _RESHAPED:
                view = self.views[node.args[0]]
                link = Link(target, args[1:], kwargs, where)
                new = View(view.root, (*view.chain, link), view.certain)
                self.views[node.args[0]] = new  # the code may go on with either
                return new
            if written:
                view = self.views[node.kwargs["out"] if given_out else node.args[0]]
                old = kwargs.pop("out") if given_out else args[0]
                new = self.emit("operator", target, args, kwargs, where, value)
                new = self.emit("operator", "assign", (old, Var(new)), None, where, value)
                self.write(view, new, where)
                return view
            if updates and args[updates[0]] and args[updates[1][0]] is not None:
                return self.writing(node, name, args, updates[1], where, value)
            if schema.returns and schema.returns[0].alias_info and node.args:
                found = self.view(node, name, args, kwargs, value)
                if found is not None:
                    return found
            slot = self.emit("operator", target, args, kwargs, where, value)
            return View(Root(slot))
        finally:
            self.call = call

    def _latest(self, node: Any) -> Call:
        found = [self.views[n] for n in node.all_input_nodes]
        slots = [v.root.slot for v in found if isinstance(v, View) and v.root.slot is not None]
        return self.flat.producer[max(slots)] if slots else self.call

    def view(self, node: Any, name: str, args: Any, kwargs: Any, value: Any) -> View | None:
        """Return the view that an operator gives, or None if it gives other numbers."""
        first = node.args[0]
        source = self.views.get(first) if isinstance(first, torch.fx.Node) else None
        if not isinstance(source, View):
            return None
        certain = source.certain
        target = name if name == "alias" else entry_of(node.target, self.custom)
        if name in _PERHAPS_A_VIEW:
            before = first.meta["val"]
            if before.dtype != value.dtype or not shares_memory(before, value):
                return None
            if name in ("to", "type_as", "contiguous"):
                return View(source.root, source.chain, certain)  # the tensor itself
        if name == "as_strided":
            return self.strided(source, first.meta["val"], args, place_of(node, self.call), target)
        many = isinstance(value, (tuple, list))
        link = Link(target, args[1:], kwargs, place_of(node, self.call), many)
        return View(source.root, (*source.chain, link), certain)

    def strided(self, source: View, like: Any, args: Any, where: str, target: Any) -> View:
        """Return the view of a tensor's memory, of which nothing is known but the numbers in its root."""
        root = source.root
        base = root.constant if root.like is None else root.like
        base = self.flat.shapes.get(root.first) if base is None else base  # type: ignore
        if base is None or not base.is_contiguous() or base.storage_offset():
            raise layout_of_memory(where)
        size, stride, offset = (*args[1:], None)[:3]
        offset = like.storage_offset() if offset is None else offset
        offset = number_of(offset) if isinstance(offset, SYMBOLIC) else offset
        return View(root, (Link(target, (size, stride, offset), {}, where),), source.certain)

    def writing(
        self, node: Any, name: str, args: Any, written: tuple[int, ...], where: str, value: Any
    ) -> View:
        """Emit an operator that updates running statistics, the arguments at some positions."""
        out = self.emit("operator", f"{name}.updating", args, None, where)
        for position, i in enumerate(written, 1):
            new = self.emit("operator", "getitem", (Var(out), position))
            self.write(self.views[node.args[i]], new, where, seen=False)
        return View(Root(self.emit("operator", "getitem", (Var(out), 0), None, where, value)))
