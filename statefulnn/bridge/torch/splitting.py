"""A flat list of instructions, taken apart into one graph for each call of a user's module.

A call is *kept* as a call if all that its forward takes comes in as an argument, and all that others use of
it is in its output. Otherwise (an object that carries tensors from one module to another, an argument that
is changed in place) its instructions become a part of the graph of the module that called it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from statefulnn.bridge.torch.arrays import to_jax
from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.bridge.torch.functionalize import Flat, Instruction
from statefulnn.bridge.torch.graph import Body, Graph, Input, Step
from statefulnn.bridge.torch.operators import find
from statefulnn.bridge.torch.sizes import Sizes, Unresolved
from statefulnn.bridge.torch.structures import Size, Var, leaves, map_leaves
from statefulnn.bridge.torch.tracing import Call, Number, Trace
from statefulnn.core.errors import explain

_KINDS = {"b": "b", "i": "i", "u": "i", "f": "f", "c": "c"}


class Splitter:
    """Takes one trace apart.

    Args:
        trace: of the model.
        flat: its instructions.
        is_ours: says whether a call is of a layer that exists here, which computes by itself.
    """

    def __init__(self, trace: Trace, flat: Flat, is_ours: Callable[[Call], bool]) -> None:
        self.trace, self.flat = trace, flat
        self.environment = _environment(trace)
        self.as_users: set[int] = set()
        self.is_ours = lambda call: id(call) not in self.as_users and is_ours(call)
        self.inlined: dict[int, str] = {}  # call -> why
        self.children: dict[int, list[Call]] = {}
        for call in flat.calls:
            if call.parent is not None:
                self.children.setdefault(id(call.parent), []).append(call)
        self.missing: dict[str, list[str]] = {}

    # ----------------------------------------------------------------------------------------------
    # Which calls are kept

    def inline(self, call: Call, why: str) -> None:
        if call.parent is None and self.is_ours(call):
            self.as_users.add(
                id(call)
            )  # a container at the root, which gets a graph like any other
            return
        if call.parent is None:
            raise ConversionError(
                explain(
                    f"converted {type(call.module).__name__}, which {why}",
                    "inputs and outputs of a graph are arrays and constants in tuples, lists, dicts",
                    "wrap it in a module that takes and returns such",
                )
            )
        if call.opaque:
            raise ConversionError(
                explain(
                    f"converted {_label(call)}, which {why}",
                    "this layer is taken as a whole",
                    "pass it the tensors themselves, and use what it returns",
                )
            )
        self.inlined.setdefault(id(call), why)

    def decide(self) -> None:
        """Find the calls that become part of those around them."""
        flat = self.flat
        handed_in = {k: _slots(v) for k, v in flat.inputs.items()}
        handed_out = {k: _slots(v) for k, v in flat.outputs.items()}
        for call in flat.calls:
            if call.problem:
                self.inline(call, call.problem)
            elif call.path is None:
                self.inline(call, "is not in the tree of modules")
        for slot, user in self.uses():
            maker = flat.producer[slot]
            around_user = {id(c) for c in user.chain()}
            around_maker = {id(c) for c in maker.chain()}
            for call in maker.chain():
                if id(call) in around_user:
                    break
                if slot not in handed_out.get(id(call), ()):
                    self.inline(call, "changes or makes a tensor that it does not return")
            for call in user.chain():
                if id(call) in around_maker:
                    break
                if slot not in handed_in.get(id(call), ()) and not self.within_ours(call):
                    self.inline(call, "uses a tensor that is no argument of it")
        # A container of ours calls its children itself; it cannot if one of them is no module any more.
        for call in reversed(flat.calls):
            if self.is_ours(call) and any(id(c) in self.inlined for c in self.descendants(call)):
                self.inline(call, "holds a module that became a part")

    def within_ours(self, call: Call) -> bool:
        return self.is_ours(call) and id(call) not in self.inlined

    def uses(self) -> Iterator[tuple[int, Call]]:
        for step in self.flat.instructions:
            for slot in _slots((step.args, step.kwargs)):
                yield slot, step.call
        for call in self.flat.calls:
            if call.parent is not None:
                for slot in _slots(self.flat.inputs.get(id(call))):
                    yield slot, call.parent
            for slot in _slots(self.flat.outputs.get(id(call))):
                yield slot, call

    def descendants(self, call: Call) -> Iterator[Call]:
        for child in self.children.get(id(call), ()):
            yield child
            yield from self.descendants(child)

    # ----------------------------------------------------------------------------------------------
    # Graphs

    def graphs(self) -> dict[str, list[Graph]]:
        """Return the graphs of each module that is not ours, by path.

        Raises:
            ConversionError: with every operator that is not supported.
        """
        while True:
            self.decide()
            made: dict[str, list[Graph]] = {}
            self.missing = {}
            try:
                self.collect(made)
            except _Again:
                continue
            break
        if self.missing:
            raise unsupported(self.missing)
        return made

    def collect(self, made: dict[str, list[Graph]]) -> None:
        by_call: dict[int, list[Any]] = {}
        for item in self.items():
            owner = item.call if isinstance(item, Instruction) else item.parent
            if owner is None:
                continue
            home = self.home(owner)
            if home is not None:
                by_call.setdefault(id(home), []).append(item)
        for call in self.flat.calls:
            if id(call) in self.inlined or self.is_ours(call) or self.home(call) is not call:
                continue
            assert call.path is not None
            try:
                graph = self.graph(call, by_call.get(id(call), []))
            except Unresolved as error:
                self.inline(call, f"uses {error}")
                raise _Again from None
            known = made.setdefault(call.path, [])
            if graph in known:
                continue
            if any(_same_call(graph, other) for other in known):
                self.inline(call, "does something else each time it is called")
                raise _Again
            known.append(graph)

    def parts(self) -> dict[str, str]:
        """Return, by path, the module whose graph a module's forward became part of."""
        found = {}
        for call in self.flat.calls:
            home = self.home(call)
            if id(call) in self.inlined and call.path is not None and home is not None:
                found[call.path] = _label(home)
        return found

    def items(self) -> Iterator[Instruction | Call]:
        """Yield instructions, and calls at the place of their outputs' first instruction or later."""
        # A call stands where it was left: after its instructions, before those that follow.
        position: dict[int, int] = {}
        for i, step in enumerate(self.flat.instructions):
            for call in step.call.chain():
                position[id(call)] = i
        waiting: dict[int, list[Call]] = {}
        for call in self.flat.calls:
            at = position.get(id(call))
            if at is None or id(call) in self.inlined:
                continue
            waiting.setdefault(at, []).append(call)
        for i, step in enumerate(self.flat.instructions):
            yield step
            # Inner calls end before the calls around them.
            yield from reversed(waiting.get(i, []))

    def home(self, call: Call) -> Call | None:
        """Return the kept call of a user's module that an instruction of `call` goes to, if any."""
        for around in call.chain():
            if id(around) in self.inlined:
                continue
            # What happens inside of a layer of ours is its own affair.
            if self.is_ours(around):
                return None
            return around
        return None

    def graph(self, call: Call, items: list[Any]) -> Graph:
        """Return the graph of one call.

        Raises:
            Unresolved: if it needs sizes that do not follow from its arguments.
        """
        path = call.path or ""
        sizes = Sizes(self.environment)
        _, _, bound = self.flat.inputs[id(call)]
        arguments, inputs, number = self.arguments(bound, sizes)
        modes, parts = dict(call.modes), {}
        for inner in self.descendants(call):
            if id(inner) in self.inlined and self.home(inner) is call:
                modes.update(inner.modes)
                if inner.path is not None:
                    parts[self.relative(path, inner.path)] = _origin(inner, self.is_ours(inner))
        for inner in (call, *self.descendants(call)):
            if id(inner) in self.flat.with_bodies and self.home(inner) is call:
                for name, member in self.hidden_in(inner):
                    modes[name] = member.module.__dict__["training"]
                    parts[self.relative(path, name)] = _origin(member, self.is_ours(member))
        renamed = self.renaming(path, number, sizes)
        steps = []
        for item in items:
            if isinstance(item, Call):
                steps += self.steps_of_call(item, call, renamed)
            else:
                steps.append(self.step_of(item, path, renamed))
        result = map_leaves(self.flat.outputs[id(call)], renamed)
        steps = _needed(steps, result)
        for member in self.read_by_bodies(path, steps):
            modes[member.path or ""] = member.module.__dict__["training"]
            name = self.relative(path, member.path or "")
            parts[name] = _origin(member, self.is_ours(member))
        for step in _all_steps(steps):
            if step.kind == "operator" and isinstance(step.target, str) and not find(step.target):
                self.missing.setdefault(step.target, []).append(step.where)
        _free(steps, result)
        assert call.signature is not None
        return Graph(
            call.signature,
            arguments,
            inputs,
            self.conditions(sizes),
            {self.relative(path, p): m for p, m in modes.items()},
            parts,
            steps,
            result,
            number.count,
        )

    def hidden_in(self, call: Call) -> Iterator[tuple[str, Call]]:
        """Yield the modules below that of a call which nothing calls, unless a branch or a loop in it does.

        There nothing tells which module is called, nor in which mode.
        """
        called = {c.path for c in self.flat.calls}
        for name, module in self.trace.root.module.named_modules():
            if self.below(call.path or "", name) and name not in called:
                yield name, Call(name, module, None)

    def read_by_bodies(self, path: str, steps: Iterable[Step]) -> Iterator[Call]:
        """Yield the modules whose weights a branch or a loop is given, and those around them.

        They may be called outside of it as well, and are modules there.
        """
        given = {slot for s in steps if _has_body(s) for slot in _slots((s.args, s.kwargs))}
        for step in steps:
            if step.kind != "read" or step.out.slot not in given:
                continue
            owner = step.target.rpartition(".")[0]
            while owner:
                name = f"{path}.{owner}" if path else owner
                yield Call(name, self.trace.root.module.get_submodule(name), None)
                owner = owner.rpartition(".")[0]

    def renaming(self, path: str, number: Callable[[Var], Var], sizes: Sizes) -> Callable[..., Any]:
        """Return what makes leaves of instructions into leaves of the graph of the module at `path`."""

        def renamed(x: Any, _: str = "") -> Any:
            if isinstance(x, Var):
                return number(x)
            if not isinstance(x, Body):
                return sizes.leaf(x)
            own = self.renaming(path, lambda var: var, sizes)
            steps = tuple(self.step_of(item, path, own) for item in x.steps)
            return dataclasses.replace(x, steps=steps, result=map_leaves(x.result, own))

        return renamed

    def steps_of_call(self, inner: Call, call: Call, renamed: Callable[..., Any]) -> list[Step]:
        """Return a kept call as steps of the graph around it; `renamed` gives slots of that graph."""
        args, kwargs, _ = self.flat.inputs[id(inner)]
        out = map_leaves(self.flat.outputs[id(inner)], renamed)
        args, kwargs = map_leaves(args, renamed), map_leaves(kwargs, renamed)
        target = self.relative(call.path or "", inner.path or "")
        steps = [Step("call", target, args, kwargs, out, _label(call))]
        if inner.stopped and not call.stopped:
            for slot in sorted(_slots(out)):
                steps.append(Step("operator", "stop_gradient", (Var(slot),), out=Var(slot)))
        return steps

    def step_of(self, item: Instruction, path: str, renamed: Callable[..., Any]) -> Step:
        """Return an instruction as a step of the graph of the module at `path`."""
        target = item.target
        if item.kind in ("read", "write"):
            target = self.attribute(path, target)
        elif item.kind == "constant":
            if is_functorch_wrapped_tensor(target):
                raise _transformed(item.where or _label(item.call))
            target = np.asarray(
                to_jax(target, True, f"a constant ({item.where or _label(item.call)})")
            )
        elif isinstance(target, str):
            target = find(target) or target
            if target == "put_view":
                item = dataclasses.replace(
                    item,
                    args=(*item.args[:2], find(item.args[2]) or item.args[2], *item.args[3:]),
                )
        return Step(
            item.kind,
            target,
            map_leaves(item.args, renamed),
            {k: map_leaves(v, renamed) for k, v in item.kwargs.items()},
            renamed(Var(item.out)),
            item.where,
        )

    def arguments(self, bound: Any, sizes: Sizes) -> tuple[Any, dict[int, Input], _Numbering]:
        """Return the arguments with slots of the graph, and what each array has to be."""
        number, inputs = _Numbering(), {}

        def leaf(x: Any, _: str) -> Any:
            if not isinstance(x, Var):
                return x
            new = number(x)
            like = self.flat.shapes.get(x.slot)
            if like is None:
                raise Unresolved("an argument of unknown shape")
            kind = "b" if like.dtype == torch.bool else "f" if like.is_floating_point() else "i"
            kind = "c" if like.is_complex() else kind
            inputs[new.slot] = Input(kind, tuple(sizes.axis(n) for n in like.shape))
            return new

        def size(x: Any, _: str) -> Any:
            if not isinstance(x, Number):
                return x
            try:
                return sizes.leaf(x)
            except Unresolved:  # a size of another array, which the number itself tells
                return Size(sizes.name(x.expression))

        return map_leaves(map_leaves(bound, leaf), size), inputs, number

    def below(self, path: str, name: str) -> bool:
        return not path or name == path or name.startswith(f"{path}.")

    def relative(self, path: str, name: str) -> str:
        if not self.below(path, name):
            raise Unresolved(f"the module {name!r}, which is not inside of it")
        return name if not path else name[len(path) + 1 :]

    def attribute(self, path: str, name: str) -> str:
        """Return the name of a parameter or buffer seen from a module, by any of its tied names."""
        for names in self.trace.paths.values():
            if name in names:
                for other in names:
                    if self.below(path, other):
                        return self.relative(path, other)
        raise Unresolved(f"the parameter {name!r}, which is not inside of it")

    def conditions(self, sizes: Sizes) -> tuple[str, ...]:
        """Return what torch.export found to hold for the sizes, as far as they are known here."""
        found = sizes.relations()
        for guard in self.environment.guards if self.environment is not None else ():
            try:
                found.append(sizes.text(guard.expr))
            except Unresolved:
                continue
        return tuple(dict.fromkeys(found))


class _Again(Exception):
    """One more call became a part of another: start over."""


class _Numbering:
    """Consecutive numbers for the slots of one graph."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def __call__(self, var: Var) -> Var:
        return Var(self.numbers.setdefault(var.slot, len(self.numbers)))

    @property
    def count(self) -> int:
        return len(self.numbers)


def _slots(structure: Any) -> set[int]:
    return {x.slot for x in leaves(structure) if isinstance(x, Var)}


def _origin(call: Call, is_ours: bool) -> str:
    kind = type(call.module).__name__
    return f"{kind}({', '.join(call.module._modules)})" if is_ours else f"{call.path}: {kind}"


def _label(call: Call) -> str:
    name = type(call.module).__name__
    return f"{call.path!r} ({name})" if call.path else name


def _environment(trace: Trace) -> Any:
    """Return what torch.export knows about the sizes, if any vary."""
    values = (node.meta.get("val") for node in trace.program.graph.nodes)
    return next((v.fake_mode.shape_env for v in values if isinstance(v, FakeTensor)), None)


def _same_call(one: Graph, other: Graph) -> bool:
    return (one.arguments, one.inputs, one.modes) == (other.arguments, other.inputs, other.modes)


def _has_body(step: Step) -> bool:
    """Say whether a step is a branch or a loop, which is given functions."""
    return any(isinstance(leaf, Body) for leaf in leaves((step.args, step.kwargs)))


def _all_steps(steps: Iterable[Step]) -> Iterator[Step]:
    """Yield steps, and those of the functions that they are given."""
    for step in steps:
        yield step
        for leaf in leaves((step.args, step.kwargs)):
            if isinstance(leaf, Body):
                yield from _all_steps(leaf.steps)


def _needed(steps: list[Step], result: Any) -> list[Step]:
    """Leave out the steps whose results nobody uses."""
    wanted, kept = _slots(result), []
    for step in reversed(steps):
        has_effect = step.kind in ("call", "write") or not isinstance(step.target, str)
        if step.kind != "constant" and has_effect or _slots(step.out) & wanted:
            wanted |= _slots((step.args, step.kwargs))
            kept.append(step)
    return kept[::-1]


def _free(steps: list[Step], result: Any) -> None:
    """Note which slots nobody reads after a step."""
    seen = _slots(result)
    for step in reversed(steps):
        here = _slots((step.args, step.kwargs, step.out))
        step.free = tuple(sorted(here - seen))
        seen |= here


def _transformed(where: str) -> ConversionError:
    return ConversionError(
        explain(
            f"found a transformation of torch.func, such as vmap or grad ({where})",
            "torch.export keeps no graph of a function that is mapped or differentiated",
            "write it for a whole batch; or take it out of forward, and use nn.vmap or nn.grad",
        )
    )


def unsupported(missing: dict[str, list[str]]) -> ConversionError:
    """Build the error that names every operator without a counterpart."""
    mapped = [p[0] for name, p in missing.items() if "_functorch" in name]
    if len(mapped) == len(missing):
        return _transformed(mapped[0])
    lines = []
    for name, places in sorted(missing.items()):
        lines.append(f"  {name}, used {len(places)}x, first in {places[0]}")
    return ConversionError(
        explain(
            "found operators that have no counterpart here:\n" + "\n".join(lines),
            "each operator of torch needs a function of arrays",
            "from_torch(..., operators={torch.ops.aten.name.overload: function}) takes yours; "
            "nn.bridge.torch.operators() lists those that are there",
        )
    )
