"""One abstract call of a model: which module was called with what, and what flowed from where to where.

The model is called once under ``jax.make_jaxpr``, which computes nothing, on a copy whose arrays are
arguments. Each call of a module leaves marks in the jaxpr (named identities): one where it begins, one
around each output and one where it ends. What lies between the marks belongs to the call, also in the
bodies of loops, in branches and in recomputed parts; and the jaxpr's variables tell what feeds what.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from statefulnn.core.baked_in import probing
from statefulnn.core.box import Box
from statefulnn.core.compat import Tracer
from statefulnn.core.errors import TraceLeakError
from statefulnn.core.generator import rng_scope
from statefulnn.core.listeners import listening
from statefulnn.core.module import Module
from statefulnn.core.ownership import ModuleBase, birth_scope
from statefulnn.core.plan import plan_of
from statefulnn.core.uninitialized import is_lazy
from statefulnn.inspect.flops import flops_of, flops_of_layer, inner_jaxprs, turns

_MARK = "statefulnn:"
_runs = itertools.count()
# Operations at which two flows meet; they are drawn, up to so many in a module.
_MEETING = {"add": "+", "add_any": "+", "sub": "−", "mul": "×", "div": "÷", "dot_general": "@"}
_MOST_OPERATIONS = 40


@dataclasses.dataclass
class Call:
    """One call of a module.

    Attributes:
        number: of the call, in the order in which calls begin.
        path: the module's first name in the model; None for a module that is not part of it.
        cls: the name of its class.
        parent: the number of the call around it.
        inputs, output: ``(args, kwargs)`` and what came back, with a ShapeDtypeStruct for each array.
        flops: floating-point operations, those of calls inside included.
        times: how often it runs: the number of turns of the loops around it.
        root: for a module that no name leads to, such as a clone, the call with which it came up.
        module: one that is no part of the model, built in forward or held elsewhere; None for others.
        name: of the attribute that refers to such a module by `nn.Ref`; "" if there is none.
        children: the numbers of the calls inside.
        operations: where flows meet outside of these calls, by name: the sign.
        edges: (from, to): the shape of what flows. The ends are numbers of children, names of operations,
            "in" and "out".
    """

    number: int
    path: str | None
    cls: str
    parent: int | None
    inputs: Any
    output: Any = None
    flops: int = 0
    times: int = 1
    root: int | None = None
    module: Any = None
    name: str = ""
    children: list[int] = dataclasses.field(default_factory=list)
    operations: dict[str, str] = dataclasses.field(default_factory=dict)
    edges: dict[tuple[int | str, int | str], str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Trace:
    """What one abstract call of a model showed.

    Attributes:
        calls: by number; the model's own is the first.
        shapes: of boxes that had no shape before the call, by dotted name.
        read: the dotted names of boxes that something was computed with.
        foreign: the ids of boxes that are held by modules in `calls`, and not by the model.
    """

    calls: dict[int, Call]
    shapes: dict[str, jax.ShapeDtypeStruct]
    read: frozenset[str]
    foreign: frozenset[int]


def trace(model: Module, inputs: tuple, kwargs: dict[str, Any]) -> Trace:
    """Call a model without computing anything, and without touching it."""
    names: dict[int, list[str]] = {}
    held_boxes: dict[int, Box] = {}
    for name, box in boxes_of(model):
        if not is_lazy(box):
            held_boxes[id(box)] = box
            names.setdefault(id(box), []).append(name)
    boxes = list(held_boxes.values())
    leaves, treedef = jax.tree_util.tree_flatten((inputs, kwargs))
    arrays = [i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]
    recorders: list[_Recorder] = []
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def run(values: list[jax.Array], given: list[jax.Array]) -> None:
        memo: dict[int, Any] = {
            id(box): box.clone_class.clone_of(box.static_part(), value, birth_scope(), 0)
            for box, value in zip(boxes, values, strict=True)
        }
        for box in memo.values():
            box._nn_home = None
        clone = copy.deepcopy(model, memo)
        held = dict(zip(arrays, given, strict=True))
        args, keywords = treedef.unflatten([held.get(i, x) for i, x in enumerate(leaves)])
        recorder = _Recorder(clone)
        recorders.append(recorder)
        listens = listening(recorder.leave, entering=recorder.enter, silently=without_hooks)
        with rng_scope(jax.random.key(0)), listens:
            clone(*args, **keywords)
        shapes.update({name: _struct(box._value) for name, box in boxes_of(clone)})

    def traced() -> Any:
        # JAX keeps what inner functions were traced to. In a context of its own, no other trace meets the
        # marks.
        with probing(), set_xla_metadata(statefulnn_inspection=str(next(_runs))):
            structs = [_struct(b._value) for b in boxes], [leaves[i] for i in arrays]
            return jax.make_jaxpr(run)(*structs)

    without_hooks = False
    try:
        jaxpr = traced()
    except TraceLeakError:
        # A hook that keeps outputs is usual, and what is traced cannot be kept.
        without_hooks = True
        jaxpr = traced()
    reader = _Reader(recorders[-1])
    calls = reader.read(jaxpr.jaxpr, list(names.values()))
    read = frozenset(name for box in reader.used for name in reader.names[box])
    for _, box in itertools.chain.from_iterable(
        boxes_of(c.module) for c in calls.values() if c.module
    ):
        box._value = _struct(box._value) if isinstance(box._value, Tracer) else box._value
    return Trace(calls, shapes, read, frozenset(reader.foreign))


def boxes_of(model: Module) -> Iterable[tuple[str, Any]]:
    """Yield every parameter and buffer of a model with its dotted name, on every path."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, box in (*module._parameters.items(), *module._buffers.items()):
            if box is not None:
                yield f"{prefix}.{name}" if prefix else name, box


def _is_array(x: object) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _struct(x: Any) -> Any:
    x = x._value if isinstance(x, Box) else x
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x


def _is_random_state(variable: Var) -> bool:
    # Keys and states of generators go from layer to layer, and are nothing that a layer computes.
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is None or dtype == jnp.uint32 or jnp.issubdtype(dtype, jax.dtypes.extended)


def _structs(tree: object) -> Any:
    return jax.tree_util.tree_map(_struct, tree, is_leaf=_is_member)


def _referred(model: Module) -> Iterable[tuple[str, Any]]:
    """Yield the modules that `nn.Ref` refers to, with dotted names."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Module):
                yield from value.named_modules(prefix=f"{prefix}.{name}".lstrip("."))


def _is_member(x: object) -> bool:
    return isinstance(x, (Box, ModuleBase))


def _read_by(eqn: JaxprEqn) -> set[Any]:
    """Return the variables that an equation computes with; a call may be given more than it reads."""
    jaxprs = list(inner_jaxprs(eqn))
    if not jaxprs:
        return {v for v in eqn.invars if isinstance(v, Var)}
    found = set()
    for jaxpr in jaxprs:
        read = {v for inner in jaxpr.eqns for v in _read_by(inner)}
        pairs = zip(reversed(jaxpr.invars), reversed(eqn.invars), strict=False)
        found |= {outer for own, outer in pairs if own in read and isinstance(outer, Var)}
    return found


class _Recorder:
    """Listens to calls, notes them and leaves marks in the jaxpr.

    Transformations inside forward, such as `nn.remat`, call clones of modules, and forward may call what is
    no part of the model. Which it is, show the arrays in its boxes, which are marked; a clone without any
    is taken for the next equal module that was not called yet.
    """

    def __init__(self, model: Module) -> None:
        self.calls: list[Call] = []
        # By the call of a module that no name leads to: its boxes, and their names in it.
        self.marked_boxes: dict[int, list[tuple[str, Any]]] = {}
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.lazy = any(is_lazy(box) for _, box in boxes_of(model))
        self._open: list[tuple[ModuleBase, int]] = []
        self._known: dict[int, tuple[str | None, int | None]] = {}
        self._kept: list[Any] = []  # ids are only good while the object lives
        self._name(model, "", None)
        self.referred = dict(_referred(model))
        self._name_of = {id(m): path for path, m in self.referred.items()}

    def _name(self, module: Module, path: str, root: int | None) -> None:
        self._kept.append(module)
        for name, m in module.named_modules(remove_duplicate=False):
            self._known.setdefault(id(m), (".".join(filter(None, (path, name))), root))

    def _meet(self, module: Module, number: int) -> None:
        """Name a module that is not among those of the model, and mark its boxes."""
        guess = self._equal_of(module)
        if guess is None:
            self._kept.append(module)
            self._known[id(module)] = None, number
        else:
            self._name(module, guess, number)
        self.marked_boxes[number] = list(boxes_of(module))
        for i, (_, box) in enumerate(self.marked_boxes[number]):
            if isinstance(box._value, jax.Array) and not is_lazy(box):
                checkpoint_name(box._value, f"{_MARK}whose:{number}:{i}")

    def _equal_of(self, module: Module) -> str | None:
        """Return the name of a module of the model that a clone may be a clone of."""
        scope = module._nn_stamp.scope
        if scope is None or scope.birth:  # no clone
            return None
        suffix = ".".join(("", *module._path()))
        moduledef = plan_of(module).moduledef
        called = {call.path for call in self.calls}
        equal = [
            path
            for path, m in (*self.modules.items(), *self.referred.items())
            if type(m) is type(module)
            and f".{path}".endswith(suffix)
            and plan_of(m).moduledef is moduledef
        ]
        return next((p for p in equal if p not in called), equal[0] if equal else None)

    def enter(self, module: Module, args: tuple, kwargs: dict) -> None:
        number = len(self.calls)
        parent = self._open[-1][1] if self._open else None
        checkpoint_name(np.zeros((), bool), f"{_MARK}enter:{number}")
        if id(module) not in self._known:
            self._meet(module, number)
        path, root = self._known[id(module)]
        inputs = _structs((args, kwargs))
        call = Call(number, path, type(module).__name__, parent, inputs, root=root, module=module)
        call.name = self._name_of.get(id(module), "").rpartition(".")[2]
        self.calls.append(call)
        self._open.append((module, number))

    def leave(self, module: Module, out: Any) -> Any:
        while self._open[-1][0] is not module:  # calls that an exception has ended
            self._open.pop()
        number = self._open.pop()[1]
        call = self.calls[number]
        call.output = _structs(out)
        call.cls = type(module).__name__  # lazy layers change their class

        def marked(x: jax.Array) -> Any:
            if not _is_array(x) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
                return x
            return checkpoint_name(x, f"{_MARK}out:{number}")

        out = jax.tree_util.tree_map(marked, out, is_leaf=_is_member)
        checkpoint_name(np.zeros((), bool), f"{_MARK}leave:{number}")
        return out


class _Reader:
    """Reads a jaxpr with marks: what each call computes, and what flows between calls."""

    def __init__(self, recorder: _Recorder) -> None:
        self._calls = calls = recorder.calls
        self._marked_boxes = recorder.marked_boxes
        self._modules = recorder.modules
        self._referred = recorder.referred
        self._lazy = recorder.lazy
        self.names: list[list[str]] = []
        self._boxes: dict[Any, int] = {}  # by variable
        self.used: set[int] = set()
        # What depends on the model's boxes or on the inputs; and the boxes of whose arrays none does.
        self._fed: set[Any] = set()
        self.foreign: set[int] = set()
        self._owned: dict[
            int, int
        ] = {}  # by the call of a clone: the model's box that is its first
        self._met: set[int] = set()
        self._unmarked: dict[int, tuple[Any, int | None]] = {}
        self._parents = {c.parent for c in calls}
        # For each variable, where its value comes from: ends of edges, each with the call it lies in.
        self._sources: dict[Any, frozenset[tuple[int, int | str]]] = {}

    def read(self, jaxpr: Jaxpr, names: list[list[str]]) -> dict[int, Call]:
        self.names = names
        self._boxes = {v: i for i, v in enumerate(jaxpr.invars[: len(names)])}
        for variable in jaxpr.invars[len(names) :]:
            self._sources[variable] = frozenset({(0, "in")})
        self._fed.update(jaxpr.invars)
        self.foreign.update(id(b) for boxes in self._marked_boxes.values() for _, b in boxes)
        self._walk(jaxpr, 0, 1)
        self._name_strangers()
        calls = {c.number: c for c in self._calls if c.number in self._met}
        for call in reversed(calls.values()):
            if call.parent is not None:
                calls[call.parent].flops += call.flops
        for call in calls.values():
            if call.parent is not None:
                calls[call.parent].children.append(call.number)
        return calls

    def _walk(self, jaxpr: Jaxpr, current: int, times: int) -> None:
        for eqn in jaxpr.eqns:
            mark = eqn.params.get("name", "") if eqn.primitive.name == "name" else ""
            if not mark.startswith(_MARK):
                self._equation(eqn, current, times)
                continue
            what, number, *index = mark.removeprefix(_MARK).split(":")
            call = self._calls[int(number)]
            if what == "enter":
                current, call.times = call.number, times
                self._met.add(current)
            elif what == "leave":
                current = call.number if call.parent is None else call.parent
            elif what == "whose":
                self._look_at_box(call.number, int(index[0]), eqn.invars[0])
            else:
                self._export(eqn, call)

    def _look_at_box(self, number: int, index: int, variable: Var | Literal) -> None:
        if isinstance(variable, Var) and variable in self._fed:
            self.foreign.discard(id(self._marked_boxes[number][index][1]))
            if index == 0 and variable in self._boxes:
                self._owned[number] = self._boxes[variable]

    def _name_strangers(self) -> None:
        """Give clones the name of the module whose boxes they have, and take it from what has others."""
        roots = {root: (self._calls[root].path, self._owner(root)) for root in self._marked_boxes}
        for call in self._calls:
            boxes = [] if call.root is None else self._marked_boxes[call.root]
            if call.root is not None:
                before, owner = roots[call.root]
                strange = [id(box) in self.foreign for _, box in boxes]
                # A pure call may replace some arrays; what a lazy layer draws is nobody's array yet.
                if any(strange) and (before is None or (all(strange) and not self._lazy)):
                    if call.path in self._referred:
                        call.name = call.path.rpartition(".")[2]
                    call.path = None
                elif owner is not None:  # of tied ones the guess is kept
                    rest = (call.path or "").removeprefix(before or "").removeprefix(".")
                    call.path = ".".join(filter(None, (owner, rest)))
            if call.path is not None or (boxes and not self._is_foreign(call.module)):
                call.module = None

    def _is_foreign(self, module: Module) -> bool:
        boxes = [id(box) for _, box in boxes_of(module)]
        return not boxes or not self.foreign.isdisjoint(boxes)

    def _owner(self, number: int) -> str | None:
        """Return the name of the module that holds a clone's first box; None if it is the guess, or none."""
        if number not in self._owned:
            return None
        ending, _ = self._marked_boxes[number][0]
        names = self.names[self._owned[number]]
        owners = [n.removesuffix(ending).removesuffix(".") for n in names if n.endswith(ending)]
        call = self._calls[number]
        fitting = [o for o in owners if type(self._modules.get(o)).__name__ == call.cls]
        return None if call.path in owners or not fitting else fitting[0]

    def _export(self, eqn: JaxprEqn, call: Call) -> None:
        (variable,) = eqn.invars
        for source in self._arriving(variable, call.number):
            self._edge(call.number, source, "out", variable)
        self._fed.update(eqn.outvars if isinstance(variable, Var) and variable in self._fed else ())
        end = (0, "out") if call.parent is None else (call.parent, call.number)
        self._sources[eqn.outvars[0]] = frozenset({end})

    def _edge(
        self, where: int, source: int | str, target: int | str, variable: Var | Literal
    ) -> None:
        if where in self._parents and source != target:
            shape = variable.aval.str_short(short_dtypes=True)
            self._calls[where].edges.setdefault((source, target), shape)

    def _arriving(self, variable: Var | Literal, here: int) -> set[int | str]:
        """Return from where a value comes, as seen in a call; draw the edges on its way into the call."""
        if not isinstance(variable, Var) or _is_random_state(variable):
            return set()
        found: set[int | str] = set()
        inwards = [here]
        while (parent := self._calls[inwards[-1]].parent) is not None:
            inwards.append(parent)  # here, and the calls around it
        for where, source in self._sources.get(variable, ()):
            # What left its call by an attribute comes from the call as a whole.
            while where not in inwards:
                where, source = self._calls[where].parent or 0, where
            for call in reversed(inwards[: inwards.index(where)]):
                self._edge(where, source, call, variable)
                where, source = call, "in"
            found.add(source)
        return found

    def _equation(self, eqn: JaxprEqn, current: int, times: int) -> None:
        jaxprs = list(inner_jaxprs(eqn))
        if any(self._is_marked(j) for j in jaxprs):
            self._inside(eqn, jaxprs, current, times)
            return
        self.used.update(self._boxes[v] for v in _read_by(eqn) if v in self._boxes)
        self._calls[current].flops += times * self._cost(eqn, jaxprs)
        if any(isinstance(v, Var) and v in self._fed for v in eqn.invars):
            self._fed.update(eqn.outvars)
        sources: set[int | str] = set()
        for variable in eqn.invars:
            sources |= self._arriving(variable, current)
        call = self._calls[current]
        if current not in self._parents:  # what happens in a layer is not drawn
            sources = {"in"} if sources else set()
        elif len(sources) > 1:
            sign = self._sign(eqn)
            if sign and len(call.operations) < _MOST_OPERATIONS:
                name = f"op{len(call.operations)}"
                call.operations[name] = sign
                for variable in eqn.invars:
                    for source in self._arriving(variable, current):
                        self._edge(current, source, name, variable)
                sources = {name}
        ends = frozenset((current, source) for source in sources)
        for variable in eqn.outvars:
            self._sources[variable] = ends

    @staticmethod
    def _sign(eqn: JaxprEqn) -> str | None:
        """Return how an operation is drawn at which flows meet; None if it is not."""
        name = eqn.primitive.name
        if name in ("pjit", "jit", "custom_jvp_call", "custom_vjp_call"):
            name = str(eqn.params.get("name", name)).strip("_<>")
        return _MEETING.get(name, None if name in ("select_n", "pjit") else name)

    def _inside(self, eqn: JaxprEqn, jaxprs: list[Any], current: int, times: int) -> None:
        for jaxpr in jaxprs:
            # Operands lie at the end: before them come the index of a cond, the constants of another body.
            for inner, outer in zip(reversed(jaxpr.invars), reversed(eqn.invars), strict=False):
                if isinstance(outer, Var):
                    self._sources[inner] = self._sources.get(outer, frozenset())
                    if outer in self._boxes:
                        self._boxes[inner] = self._boxes[outer]
                    if outer in self._fed:
                        self._fed.add(inner)
            self._walk(jaxpr, current, times * turns(eqn))
        for jaxpr in jaxprs:
            for inner, outer in zip(reversed(jaxpr.outvars), reversed(eqn.outvars), strict=False):
                if isinstance(inner, Var):
                    known = self._sources.get(outer, frozenset())
                    self._fed.update((outer,) if inner in self._fed else ())
                    self._sources[outer] = known | self._sources.get(inner, frozenset())

    def _is_marked(self, jaxpr: Jaxpr) -> bool:
        return self._summed(jaxpr) is None

    def _summed(self, jaxpr: Jaxpr) -> int | None:
        """Return the operations of a jaxpr without marks, None for one with marks; JAX shares jaxprs."""
        if id(jaxpr) not in self._unmarked:
            total: int | None = 0
            for eqn in jaxpr.eqns:
                inner = list(inner_jaxprs(eqn))
                marked = str(eqn.params.get("name", "")).startswith(_MARK)
                if marked or any(self._is_marked(j) for j in inner):
                    total = None
                    break
                total += self._cost(eqn, inner)
            self._unmarked[id(jaxpr)] = (jaxpr, total)
        return self._unmarked[id(jaxpr)][1]

    def _cost(self, eqn: JaxprEqn, jaxprs: list[Any]) -> int:
        """Return the operations of an equation without marks: of branches, those of the dearest."""
        if not jaxprs:
            return flops_of(eqn)
        if (known := flops_of_layer(eqn)) is not None:
            return known
        costs = [self._summed(j) or 0 for j in jaxprs]
        return turns(eqn) * (max(costs) if eqn.primitive.name == "cond" else sum(costs))
