"""What a user's forward became: a list of operations on arrays and calls of submodules.

Nothing here knows torch: a converted model runs, is copied and saved without it.

Terms
  Graph    one call of a forward as it was traced: what it takes, its steps, what it gives
  Step     one operation, one call of a submodule, or a read or write of a parameter or buffer
  Body     the steps of a function that an operator is given
  Traced   a module whose forward is one of its graphs: the one that fits its mode and the arguments
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from statefulnn.bridge.torch.named_sizes import as_constraint, holds_for_all
from statefulnn.bridge.torch.operators import OPERATORS
from statefulnn.bridge.torch.structures import Leaf, Signature, Size, Var, flat, map_leaves
from statefulnn.core.box import Box, unwrap
from statefulnn.core.errors import ShapeError, StructureChangeError, explain
from statefulnn.core.module import Module


@dataclass
class Step:
    """One line of a graph.

    Attributes:
        kind: "operator", "call" (of a submodule), "read" or "write" (of a parameter or buffer), "constant".
        target: the operator's name, a function, a dotted path, or an array.
        args: a structure.
        kwargs: a dict of structures.
        out: where the result goes: a `Var`, or a structure of them.
        where: module and line of the user's code, for messages.
        free: slots that nobody reads after this step.
    """

    kind: str
    target: Any
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    out: Any = None
    where: str = ""
    free: tuple[int, ...] = ()

    def __eq__(
        self, other: Any
    ) -> bool:  # `where` is for people, and arrays compare by their numbers
        if not isinstance(other, Step) or self.kind != other.kind:
            return False
        if self.kind == "constant":
            same = np.array_equal(self.target, other.target)
        else:
            same = self.target == other.target
        return same and (self.args, self.kwargs, self.out) == (other.args, other.kwargs, other.out)


@dataclass(frozen=True)
class Body(Leaf):
    """A function among the arguments of an operator, such as a branch of ``torch.cond``.

    Attributes:
        inputs: the slots of what it is given, in order.
        steps: as those of a graph, without calls, reads and writes: it is given all arrays it needs.
        result: a structure.
        slots: how many there are.
    """

    inputs: tuple[int, ...]
    steps: tuple[Any, ...]
    result: Any
    slots: int

    def run(self, sizes: Mapping[str, int], *arrays: Any) -> Any:
        """Run the steps."""
        values: list[Any] = [None] * self.slots
        for slot, array in zip(self.inputs, arrays, strict=True):
            values[slot] = array
        _run(self.steps, None, sizes, values)
        return map_leaves(self.result, lambda leaf, _: _filled(leaf, values, sizes))


@dataclass(frozen=True)
class Input:
    """What an array has to be: its kind of dtype, and for each axis a size or the name of one."""

    kind: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.shape))}{',' * (len(self.shape) == 1)})"


@dataclass
class Graph:
    """One call of a forward as it was traced.

    Attributes:
        signature: of the forward.
        arguments: what `Signature.bind` has to give: a structure of `Var` and constants.
        inputs: what the array of each `Var` of `arguments` has to be.
        guards: conditions on the sizes, as texts.
        modes: by path, the ``training`` flags that the code looked at.
        parts: paths of modules whose forward became part of this graph.
        steps: in order.
        result: the structure that is returned.
        slots: how many there are.
    """

    signature: Signature
    arguments: dict[str, Any]
    inputs: dict[int, Input]
    guards: tuple[str, ...]
    modes: dict[str, bool]
    parts: dict[str, str]
    steps: list[Step]
    result: Any
    slots: int

    def __deepcopy__(self, memo: dict) -> Graph:
        return self  # nobody changes it

    def misfit(self, given: Any, sizes: dict[str, int], values: list[Any]) -> str | None:
        """Put the arrays into their slots, and say what does not fit, if anything."""
        wanted, got = flat(self.arguments), flat(given)
        if wanted.keys() != got.keys():
            return f"it was traced with arguments like {_shown(self.arguments, self.inputs)}"
        numbers = []
        for place, want in wanted.items():
            value, name = got[place], f"the argument {_spoken(place)}"
            if isinstance(want, Size):
                numbers.append((want, value, name))
                continue
            if not isinstance(want, Var):
                if _is_array(value) or want is not value and _differ(want, value):
                    return f"{name} was {want!r} when it was traced, and is {_short(value)} here"
                continue
            spec = self.inputs[want.slot]
            if not _is_array(value):
                return f"{name} was an array {spec} when it was traced, and is {_short(value)} here"
            wrong = _bind(spec, value, sizes)
            if wrong:
                return (
                    f"{name} was traced as {spec} and has shape {tuple(value.shape)} here: {wrong}"
                )
            values[want.slot] = value
        # Arrays bind sizes first, then numbers that are one, then what follows from these is compared.
        for want, value, name in sorted(numbers, key=lambda number: not number[0].is_name()):
            wrong = want.misfit(value, sizes)
            if wrong:
                return f"{name} {wrong}"
        for guard in self.guards:
            if not _holds(guard, sizes):
                return f"with sizes {sizes} the condition {guard} does not hold, which the code relied on"
        return None

    def run(self, module: Module, sizes: Mapping[str, int], values: list[Any]) -> Any:
        """Run the steps."""
        _run(self.steps, module, sizes, values)
        return map_leaves(self.result, lambda leaf, _: _as_output(_filled(leaf, values, sizes)))


def _run(
    steps: Sequence[Step], module: Module | None, sizes: Mapping[str, int], values: list[Any]
) -> None:
    """Run steps on the arrays in slots; those of a `Body` need no module."""
    fill = lambda leaf, _="": _filled(leaf, values, sizes)
    for step in steps:
        if step.kind == "operator":
            call = OPERATORS[step.target] if isinstance(step.target, str) else step.target
            try:
                args, kwargs = map_leaves(step.args, fill), map_leaves(step.kwargs, fill)
                values[step.out.slot] = call(*args, **kwargs)
            except Exception as error:
                error.add_note(f"at {step.target} in {step.where}")
                raise
        elif step.kind == "constant":
            values[step.out.slot] = jnp.asarray(step.target)
        else:
            assert module is not None
            _with_module(step, module, fill, values)
        for slot in step.free:
            values[slot] = None


def _with_module(step: Step, module: Module, fill: Callable[..., Any], values: list[Any]) -> None:
    """Run a step that calls a submodule, or that reads or writes a parameter or buffer."""
    if step.kind == "call":
        args, kwargs = map_leaves(step.args, fill), map_leaves(step.kwargs, fill)
        out = module.get_submodule(step.target)(*args, **kwargs)
        _spread(out, step, values)
    elif step.kind == "read":
        values[step.out.slot] = unwrap(_attribute(module, step.target))
    else:
        _write(module, step.target, fill(step.args[0]))


def _holds(guard: str, sizes: Mapping[str, Any]) -> bool:
    """Say whether a condition holds.

    Raises:
        ShapeError: for sizes that have names, if it holds for some of them only.
    """
    named = {k: v for k, v in sizes.items() if jax.export.is_symbolic_dim(v)}
    if not named:
        return bool(Size(guard)(sizes))
    try:
        if Size(guard)(sizes):
            return True
    except Exception:  # jax.export cannot say: its class for that is not public
        pass
    if holds_for_all(guard, sizes):
        return True
    said = re.sub(r"\bd\d+\b", lambda name: str(sizes[name[0]]), guard)
    raise ShapeError(
        explain(
            f"called a converted module with sizes that have names, {', '.join(map(str, named.values()))}",
            f"it was traced for sizes with {said}, which does not hold for all",
            f"say that it does, nn.export(..., constraints=({as_constraint(guard, sizes)!r},)), "
            "or give a number",
        )
    )


def _differ(want: Any, value: Any) -> bool:
    """Say whether two constants differ, also by their kind: ``x * 2`` has another dtype than ``x * 2.0``."""
    numbers = (bool, int, float)
    of_kinds = type(want) in numbers and type(value) in numbers and type(want) is not type(value)
    return of_kinds or want != value


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _short(value: Any) -> str:
    if _is_array(value):
        return f"an array of shape {tuple(value.shape)}"
    return repr(value) if len(repr(value)) < 40 else f"a {type(value).__name__}"


def _spoken(place: str) -> str:
    """Return ``['pair'][0]`` as ``pair.0``."""
    return re.sub(r"\['?(.*?)'?\]", r".\1", place)[1:]


def _shown(arguments: Any, inputs: Mapping[int, Input]) -> str:
    leaf = lambda x, _="": f"array{inputs[x.slot]}" if isinstance(x, Var) else repr(x)
    return ", ".join(f"{k}={map_leaves(v, leaf)}" for k, v in arguments.items()).replace("'", "")


def _bind(spec: Input, value: Any, sizes: dict[str, int]) -> str | None:
    kind = jnp.dtype(value.dtype).kind
    kind = {"u": "i", "V": "f"}.get(kind, kind)
    if kind != spec.kind:
        words = {
            "b": "truth values",
            "i": "integers",
            "f": "floating numbers",
            "c": "complex numbers",
        }
        return f"it holds {words.get(kind, kind)}, not {words[spec.kind]}"
    if len(value.shape) != len(spec.shape):
        return "another number of axes"
    for axis, (want, have) in enumerate(zip(spec.shape, value.shape, strict=True)):
        want = sizes.setdefault(want, have) if isinstance(want, str) else want
        if want != have:
            return f"axis {axis} has to be {want}, the size that the traced code was made for"
    return None


def _filled(leaf: Any, values: list[Any], sizes: Mapping[str, int]) -> Any:
    if isinstance(leaf, Var):
        return values[leaf.slot]
    if isinstance(leaf, Body):
        return functools.partial(leaf.run, sizes)
    return leaf(sizes) if isinstance(leaf, Size) else leaf


def _as_output(value: Any) -> Any:
    return jnp.asarray(value) if jax.export.is_symbolic_dim(value) else value


def _spread(out: Any, step: Step, values: list[Any]) -> None:
    """Put the outputs of a submodule into their slots."""
    wanted, got = flat(step.out), flat(out)
    if wanted.keys() != got.keys():
        likes = (map_leaves(x, lambda _, __: "array") for x in (out, step.out))
        other, structure = map(str, likes)
        raise StructureChangeError(
            explain(
                f"called the submodule {step.target!r}, which returned {other}",
                f"the code around it ({step.where}) goes on with {structure}",
                "put a module there that returns what the original one did",
            )
        )
    for place, want in wanted.items():
        if isinstance(want, Var):
            values[want.slot] = got[place]


def _attribute(module: Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _write(module: Module, path: str, value: Any) -> None:
    owner, _, name = path.rpartition(".")
    target = getattr(module.get_submodule(owner), name)
    if isinstance(target, Box):
        target.value = value
    else:
        setattr(module.get_submodule(owner), name, value)


class Traced(Module):
    """A module of another class, whose forward was traced; made by `from_torch`.

    Attributes:
        source: the name of the class it was made from.
        origin: which module of the conversion it is.
    """

    _unwatched = ("graphs",)

    def __init__(self, source: str, origin: str) -> None:
        super().__init__()
        self.source = source
        self.origin = origin
        self.part_of = ""
        self.graphs: tuple[Graph, ...] = ()

    def _get_name(self) -> str:
        return self.source

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph that fits the arguments and the mode.

        Raises:
            ShapeError: if the arguments are not like those of any graph.
            StructureChangeError: in a mode that was not traced, or if a part of the graph was replaced.
        """
        if not self.graphs:
            raise self._never_called()
        in_mode = [g for g in self.graphs if self._has_modes(g)]
        if not in_mode:
            raise self._other_mode()
        problems = []
        for graph in in_mode:
            sizes: dict[str, int] = {}
            values: list[Any] = [None] * graph.slots
            try:
                given = graph.signature.bind(args, kwargs)
            except TypeError as error:
                raise TypeError(f"{self.source}.forward(): {error}") from None
            given = map_leaves(given, lambda x, _: unwrap(x))
            problem = graph.misfit(given, sizes, values)
            if problem is None:
                self._check_parts(graph)
                return graph.run(self, sizes, values)
            problems.append(problem)
        raise ShapeError(
            explain(
                f"called the converted {self.source} with arguments it was not traced for",
                "; ".join(dict.fromkeys(problems)),
                "convert it again with example inputs like these; an axis that is 0 or 1 in the "
                "example, or that the code compares with numbers, keeps its size",
            )
        )

    @property
    def forward_signature(self) -> inspect.Signature:
        """The arguments of the forward that was traced, by their names in torch."""
        return (
            self.graphs[0].signature.inspected() if self.graphs else inspect.signature(self.forward)
        )

    @property
    def example_shapes(self) -> list[tuple[int, ...]]:
        """A shape that each of the graphs takes, for those with one array and nothing else that is needed."""
        found = []
        for graph in self.graphs:
            inputs = list(graph.inputs.values())
            if len(inputs) == 1 and inputs[0].kind == "f":
                names = dict.fromkeys(n for n in inputs[0].shape if isinstance(n, str))
                sizes: dict[Any, int] = {name: i + 2 for i, name in enumerate(names)}
                found.append(tuple(sizes.get(n, n) for n in inputs[0].shape))
        return found

    def _has_modes(self, graph: Graph) -> bool:
        pairs = [(self._part(path), mode) for path, mode in graph.modes.items()]
        # Without one of them `_check_parts` says what was replaced.
        return all(part is None or part.training is mode for part, mode in pairs)

    def _part(self, path: str) -> Module | None:
        """Return a module below this one, or None if what it was in is another module now."""
        try:
            return self.get_submodule(path)
        except AttributeError:
            return None

    def _check_parts(self, graph: Graph) -> None:
        # Those around others first: without them the others are not there.
        for path, origin in sorted(graph.parts.items(), key=lambda part: part[0].count(".")):
            module = self._part(path)
            members = () if module is None else module._modules
            plain = f"{type(module).__name__}({', '.join(members)})"
            if getattr(module, "origin", plain) != origin:
                raise StructureChangeError(
                    explain(
                        f"replaced {path!r} of {self.source} by a {type(module).__name__}",
                        f"its forward was traced as a part of {self.source}'s and would still run",
                        f"replace a module inside of it, or write a module that takes "
                        f"{self.source}'s place",
                    )
                )

    def _never_called(self) -> Exception:
        if self.part_of:
            what = f"its forward became a part of that of {self.part_of}, which hands it what is no array"
        else:
            what = "its forward was not called with the example inputs"
        return StructureChangeError(
            explain(
                f"called {self.source}, a module that was converted from torch",
                what,
                "convert this module by itself: from_torch(module, *its_example_inputs)",
            )
        )

    def _other_mode(self) -> Exception:
        flags = {p: m for g in self.graphs for p, m in g.modes.items()}
        parts = {p: part for p in flags if (part := self._part(p)) is not None}
        wrong = [p for p, part in parts.items() if part.training is not flags[p]]
        mode = "training" if wrong and parts[wrong[0]].training else "evaluation"
        names = ", ".join(repr(p) if p else "itself" for p in wrong)
        return StructureChangeError(
            explain(
                f"called {self.source} in {mode} mode",
                f"its forward looks at the mode (of {names}), and was traced in the other mode only",
                'from_torch(..., modes=("train", "eval")) traces both',
            )
        )


OperatorTable = Mapping[str, Callable]
