"""compare: where a module written by hand stops computing what torch's computes."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from statefulnn.bridge.torch.arrays import to_jax
from statefulnn.bridge.torch.compare_runs import Call, Places, Run, run_ours, run_theirs
from statefulnn.core.errors import ArgumentError, explain
from statefulnn.core.module import Module
from statefulnn.core.refusals import listed

_PLAIN = (bool, int, float, str, type(None))
_SHOWN = 12  # names in a list of them
_TOLERANCE = 1e-4
# Gradients this much smaller than the largest one are compared with that: some are zero but for rounding,
# such as that of a bias before a normalisation.
_SMALL = 0.1


@dataclasses.dataclass(frozen=True)
class Row:
    """One module that both models have, in the order in which torch's finish.

    Attributes:
        path: its dotted name, "" for the models themselves.
        theirs: the name of torch's class.
        ours: the name of the other class.
        shape: the shapes that torch's returned, as text.
        given: how much its inputs differ, relative to the largest number in torch's; infinity where shapes,
            or the numbers of arrays, differ; None where that is not known.
        output: the same for what it returned.
        gradient: the same for the gradient of the loss with respect to that; None if it has none.
        settings: attributes of the same name with other values: (name, torch's, ours).
        draws: whether torch's draws random numbers.
        calls: how often it was called: (torch's, ours).
    """

    path: str
    theirs: str
    ours: str
    shape: str
    given: float | None
    output: float | None
    gradient: float | None
    settings: tuple[tuple[str, object, object], ...]
    draws: bool = False
    calls: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found: print it, or read it.

    Attributes:
        missing: names of arrays that only our module has.
        unexpected: names of arrays that only torch's has.
        misshapen: name -> (torch's shape, our shape).
        suggested: our name -> torch's, by shape and order, for the argument `names`.
        rows: a `Row` for each module that both called; empty if the arrays do not fit.
        tolerance: from which difference on a number counts as another one.
        only_theirs: names of modules that only torch's model called.
        only_ours: names of modules that only our model called.
        inside: names of modules that ours called inside of a transformation, where they cannot be compared.
        gradients: how much those of parameters and arguments differ, by our name.
        buffers: how much those differ after the call, by our name.
        notes: sentences on what differs without a difference in numbers: ties, and what is frozen.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    suggested: Mapping[str, str]
    rows: tuple[Row, ...]
    tolerance: float
    only_theirs: tuple[str, ...] = ()
    only_ours: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    gradients: Mapping[str, float] = dataclasses.field(default_factory=dict)
    buffers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def loads(self) -> bool:
        """Whether every array of our module has one of torch's."""
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def first(self) -> Row | None:
        """The first module, as they finish, whose output differs; None if all agree."""
        return next((row for row in self.rows if self._differs(row.output)), None)

    @property
    def first_gradient(self) -> Row | None:
        """The module nearest to the loss at whose output the gradient differs; None if all agree."""
        return next((row for row in reversed(self.rows) if self._differs(row.gradient)), None)

    @property
    def agrees(self) -> bool:
        """Whether all arrays load, and all outputs, gradients and buffers agree."""
        rows_agree = self.first is None and self.first_gradient is None
        return self.loads and rows_agree and not self._wrong(self.gradients, self.buffers)

    def _wrong(self, *errors: Mapping[str, float]) -> list[str]:
        """Return the names of what differs, with the numbers, the largest first."""
        found = [(e, n) for those in errors for n, e in those.items() if self._differs(e)]
        return [f"{n} ({e:.0e})" for e, n in sorted(found, key=lambda pair: -pair[0])]

    def _differs(self, error: float | None) -> bool:
        return error is not None and not error <= self.tolerance

    def __str__(self) -> str:
        lines = [*self._names(), *self._table()]
        if self.rows:
            lines += self._verdict()
        return "\n".join(lines)

    __repr__ = __str__

    def _names(self) -> Iterator[str]:
        for what, names in (
            ("only in ours: ", self.missing),
            ("only in torch's: ", self.unexpected),
            ("called by torch's model alone: ", self.only_theirs),
            ("called by ours alone: ", self.only_ours),
            ("called inside of a transformation, so not compared: ", self.inside),
        ):
            if names:
                yield what + listed(names, _SHOWN)
        for name, (theirs, ours) in self.misshapen.items():
            turned = theirs != ours and theirs[::-1] == ours
            note = ": the same, transposed; torch's nn.Linear has (out, in)" if turned else ""
            yield f"{name} has shape {theirs} in torch, and {ours} here{note}"
        if self.suggested:
            pairs = ", ".join(f'"{a}": "{b}"' for a, b in self.suggested.items())
            yield f"by shape and order these may belong together: names={{{pairs}}}"
        yield from self.notes
        if not self.loads:
            yield "the arrays do not all fit, so nothing was run"

    def _table(self) -> Iterator[str]:
        cells: list[tuple[str, ...]] = [
            ("module", "torch's class", "output", "inputs", "output", "gradient", "")
        ]
        for row in self.rows:
            differs = any(map(self._differs, (row.given, row.output, row.gradient)))
            cells.append(
                (
                    row.path or "(the model)",
                    row.theirs,
                    row.shape,
                    *(
                        "" if e is None else f"{e:.0e}"
                        for e in (row.given, row.output, row.gradient)
                    ),
                    "<-" if differs else "",
                )
            )
        if len(cells) > 1:
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            for line in cells:
                texts = [text.ljust(n) for text, n in zip(line, widths, strict=True)]
                yield "  ".join(texts).rstrip()

    def _verdict(self) -> Iterator[str]:
        row, gradient = self.first, self.first_gradient
        if row is not None:
            yield f"first output that differs: {_title(row)}. {self._reason(row)}"
        elif gradient is not None:
            yield (
                f"all outputs agree. The gradient differs first, seen from the loss, at the output of "
                f"{_title(gradient)}: look at the backward pass of what comes after it"
            )
        elif wrong := self._wrong(self.gradients):
            yield f"all outputs agree. These gradients differ: {listed(wrong, _SHOWN)}"
        elif wrong := self._wrong(self.buffers):
            yield f"outputs and gradients agree. After the call these buffers differ: {listed(wrong, _SHOWN)}"
        else:
            yield f"all agree within {self.tolerance:.0e} of the largest number"
        others = collections.defaultdict(list)
        for other in self.rows:
            if other.settings and other is not row:
                others[_settings(other)].append(other.path or "the model")
        for settings, paths in others.items():
            yield f"other settings: {settings} ({', '.join(paths)})"

    def _reason(self, row: Row) -> str:
        if row.settings:
            return f"Its settings differ: {_settings(row)}"
        if row.draws:
            return "It draws random numbers: compare both after eval()"
        if row.calls[0] != row.calls[1]:
            return f"The number of its calls is {row.calls[1]} here and {row.calls[0]} in torch"
        if self._differs(row.given):
            return "It is given something else: look at the code that calls it"
        below = f"{row.path}." if row.path else ""
        if any(r.path.startswith(below) and r is not row for r in self.rows):
            return "What it calls agrees: look at the code around these calls in its forward"
        if row.theirs != row.ours:
            return f"It is a {row.ours} here"
        return "It is given the same, with the same arrays and settings: look at its forward"


def compare(
    theirs: torch.nn.Module,
    ours: Module,
    *inputs: object,
    kwargs: Mapping[str, object] | None = None,
    names: Mapping[str, str] | None = None,
    load: bool = True,
    grads: bool = True,
    tolerance: float | None = None,
) -> Comparison:
    """Run a module of torch and one written by hand with the same arrays, and say where they part.

    The arrays of `theirs` are loaded into `ours` by name. Then both are called, and the outputs of modules of
    the same name are compared in the order in which torch's finish: the first that differs holds the mistake,
    or the code between it and the one before. Gradients, by outputs, parameters and arguments, are those of a
    fixed random product with the output. Buffers are compared after the call.

    Args:
        theirs: the module to follow; it is not changed.
        ours: the module that should compute the same, in the same mode. Its arrays become those of `theirs`.
        inputs: what both are called with: tensors, arrays, numbers and texts in tuples, lists and dicts.
        kwargs: the same, by name.
        names: our name -> torch's, for arrays or modules that are called differently.
        load: whether to load the arrays; without it `ours` is compared as it is.
        grads: whether to compare gradients too.
        tolerance: from which difference on, relative to the largest number, two arrays are not the same. None
            is 1e-4, or four steps of the coarsest dtype that torch's modules return: 0.03 for bfloat16.

    Returns:
        A `Comparison`: printed, it is a table with a verdict. If some arrays do not fit, nothing is loaded or
        run, and it says which, and what may belong together.

    Raises:
        ArgumentError: for modules of other kinds, names that neither module has, and a negative tolerance.
        StateDictError: if arrays that are tied here have different values in torch.

    Example:
        >>> import torch
        >>> theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(approximate="tanh"))
        >>> ours = nn.Sequential(nn.Linear(3, 4), nn.GELU())
        >>> found = nn.bridge.torch.compare(theirs, ours, torch.randn(2, 3))
        >>> found.first.path, found.first.settings
        ('1', (('approximate', 'tanh', 'none'),))
    """
    if not isinstance(theirs, torch.nn.Module) or not isinstance(ours, Module):
        raise ArgumentError(
            explain(
                f"compared a {type(theirs).__name__} with a {type(ours).__name__}",
                "the first is a torch.nn.Module, the second a statefulnn.Module",
                "nn.bridge.torch.compare(torch_module, module, *inputs)",
            )
        )
    _check(kwargs, names, tolerance)
    renamed = _Names(theirs, ours, names or {})
    arrays = renamed.fitted() if load else Comparison((), (), {}, {}, (), 0.0)
    if load and arrays.loads:
        values = theirs.state_dict()
        ours.load_state_dict({n: to_jax(values[renamed.theirs(n)], True, n) for n in renamed.ours})
    if not arrays.loads:
        return dataclasses.replace(arrays, tolerance=_TOLERANCE if tolerance is None else tolerance)
    at_theirs = run_theirs(theirs, inputs, kwargs or {}, grads)
    at_ours = run_ours(ours, inputs, kwargs or {}, grads)
    return _Differences(theirs, ours, at_theirs, at_ours, renamed).compared(tolerance)


def _check(kwargs: object, names: object, tolerance: float | None) -> None:
    for name, value in (("kwargs", kwargs), ("names", names)):
        if value is not None and not isinstance(value, Mapping):
            raise ArgumentError(
                explain(
                    f"compare was given a {type(value).__name__} as {name}",
                    "it is a dict: kwargs by the names of arguments, names from ours to torch's",
                    "inputs without a name come after the two modules: compare(theirs, ours, x)",
                )
            )
    if tolerance is not None and not tolerance >= 0:
        raise ArgumentError(
            explain(
                f"compare was given tolerance={tolerance!r}",
                "it is a difference relative to the largest number, and so 0 or more",
                "tolerance=1e-4",
            )
        )


# --------------------------------------------------------------------------------------------------
# Names


class _Names:
    """Which of our names is which of torch's."""

    def __init__(self, theirs: torch.nn.Module, ours: Module, names: Mapping[str, str]) -> None:
        self._their_shapes = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
        self._our_shapes = {n: tuple(a.shape) for n, a in ours.state_dict().items()}
        self.ours = list(self._our_shapes)
        modules = {n for n, _ in ours.named_modules(remove_duplicate=False)}
        their_modules = {n for n, _ in theirs.named_modules(remove_duplicate=False)}
        self._names = dict(names)
        for ours_, theirs_ in names.items():
            for name, known, whose in (
                (ours_, modules | set(self.ours), "our module"),
                (theirs_, their_modules | set(self._their_shapes), "torch's module"),
            ):
                if name not in known:
                    raise ArgumentError(
                        explain(
                            f"names={{{ours_!r}: {theirs_!r}}} was given to compare",
                            f"{whose} has nothing of the name {name!r}",
                            "write our name first, then torch's: names={'fc.weight': 'linear.weight'}",
                        )
                    )

    def theirs(self, name: str) -> str:
        """Return torch's name of an array or a module of ours."""
        if name in self._names:
            return self._names[name]
        parts = name.split(".")
        for i in range(len(parts) - 1, 0, -1):
            above = ".".join(parts[:i])
            if above in self._names:
                return ".".join([self._names[above], *parts[i:]])
        # The layer of an array that has another name has another name as well.
        return next(
            (
                their_name.rpartition(".")[0]
                for our_name, their_name in self._names.items()
                if our_name.rpartition(".")[0] == name and our_name in self._our_shapes
            ),
            name,
        )

    def fitted(self) -> Comparison:
        """Return which arrays have no partner, or one of another shape, and what may belong together."""
        wanted = {n: self.theirs(n) for n in self.ours}
        missing = [n for n, their_name in wanted.items() if their_name not in self._their_shapes]
        used = set(wanted.values())
        unexpected = [n for n in self._their_shapes if n not in used]
        misshapen = {
            n: (self._their_shapes[their_name], self._our_shapes[n])
            for n, their_name in wanted.items()
            if n not in missing and self._their_shapes[their_name] != self._our_shapes[n]
        }
        left = collections.defaultdict(list)
        for n in unexpected:
            left[self._their_shapes[n], n.rpartition(".")[2]].append(n)
        suggested = {}
        for n in [*missing, *misshapen]:
            own, last = self._our_shapes[n], n.rpartition(".")[2]
            # Of the same last name first: a bias and a norm's weight may have one shape.
            candidates = left[own, last] or next(
                (those for (shape, _), those in left.items() if shape == own and those), []
            )
            if candidates:
                best = max(candidates, key=lambda their_name: _likeness(n, their_name))
                candidates.remove(best)
                suggested[n] = best
        return Comparison(
            tuple(missing), tuple(unexpected), misshapen, _by_layer(suggested), (), 0.0
        )


def _likeness(ours: str, theirs: str) -> int:
    """Return how many parts of two names, from the end, begin alike: ``q`` and ``query``."""
    pairs = zip(ours.split(".")[::-1], theirs.split(".")[::-1], strict=False)
    return sum(a.startswith(b) or b.startswith(a) for a, b in pairs)


def _by_layer(names: Mapping[str, str]) -> dict[str, str]:
    """Return pairs of layers for pairs of arrays, where the arrays of two layers have the same names."""
    layers = collections.defaultdict(set)
    for ours, theirs in names.items():
        same = ours.rpartition(".")[2] == theirs.rpartition(".")[2] and "." in theirs
        layers[ours.rpartition(".")[0]].add(theirs.rpartition(".")[0] if same else None)
    found: dict[str, str] = {}
    for ours, theirs in names.items():
        layer = ours.rpartition(".")[0]
        others = layers[layer]
        one = next(iter(others)) if len(others) == 1 else None
        found.update({layer: one} if layer and one else {ours: theirs})
    return found


# --------------------------------------------------------------------------------------------------
# Differences


class _Differences:
    """Puts together what belongs together, also where a module has two names in one model only."""

    def __init__(
        self, theirs: torch.nn.Module, ours: Module, at_theirs: Run, at_ours: Run, names: _Names
    ) -> None:
        self.theirs, self.ours, self.names = theirs, ours, names
        self.at_theirs, self.at_ours = at_theirs, at_ours
        self._group: dict[tuple[str, str], Any] = {}
        their_first: dict[int, str] = {}
        their_names = dict(theirs.named_modules(remove_duplicate=False))
        our_first: dict[int, str] = {}
        for name, module in their_names.items():
            their_first.setdefault(id(module), name)
        for name, module in ours.named_modules(remove_duplicate=False):
            one = ("ours", our_first.setdefault(id(module), name))
            their_name = names.theirs(name)
            if their_name in their_names:
                self._join(one, ("theirs", their_first[id(their_names[their_name])]))

    def _join(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        both = {*self._members(one), *self._members(other)}
        for member in both:
            self._group[member] = both

    def _members(self, name: tuple[str, str]) -> set[tuple[str, str]]:
        return self._group.get(name, {name})

    def compared(self, tolerance: float | None) -> Comparison:
        """Return the comparison."""
        if tolerance is None:
            tolerance = max(_TOLERANCE, 4 * _coarsest(self.at_theirs.calls))
        rows, seen = [], set()
        for name in dict.fromkeys(c.name for c in reversed(self.at_theirs.calls)):
            group = self._members(("theirs", name))
            if ("theirs", name) in seen:
                continue
            seen |= group
            row = self._row(group)
            if row is not None:
                rows.append(row)
        met = {("theirs", c.name) for c in self.at_theirs.calls}
        own = {("ours", c.name) for c in self.at_ours.calls}
        inside = {("ours", n) for n in self.at_ours.inside}
        alone = lambda some, others: tuple(
            dict.fromkeys(n for n in some if not self._members(n) & others)
        )
        just = lambda pairs: tuple(sorted(n for _, n in pairs))
        return Comparison(
            (), (), {}, {}, tuple(reversed(rows)), tolerance,
            just(alone(met, own | inside)), just(alone(own, met)), just(inside),
            self._gradients(), self._buffers(), tuple(self._notes()),
        )  # fmt: skip

    def _row(self, group: set[tuple[str, str]]) -> Row | None:
        theirs = [c for c in self.at_theirs.calls if ("theirs", c.name) in group]
        ours = [c for c in self.at_ours.calls if ("ours", c.name) in group]
        if not ours:
            return None
        name = next(n for n, _ in self.ours.named_modules() if ("ours", n) in group)
        other, module = self.theirs.get_submodule(theirs[0].name), self.ours.get_submodule(name)
        gradients = [_of_gradients(a, b) for a, b in zip(theirs, ours, strict=False)]
        known = [e for e in gradients if e is not None]
        settings = [*_other_settings(other, module), *_other_outputs(theirs[0], ours[0])]
        return Row(
            name,
            type(other).__name__,
            type(module).__name__,
            ", ".join(str(y.shape) for call in theirs for y in call.output.values()),
            _largest(ours, theirs, lambda call: call.given),
            _largest(ours, theirs, lambda call: call.output, kinds=True),
            max(known) if known else None,
            tuple(settings),
            any(call.drew for call in theirs),
            (len(theirs), len(ours)),
        )

    def _gradients(self) -> dict[str, float]:
        theirs, ours = self.at_theirs.gradients, self.at_ours.gradients
        largest = max((np.max(np.abs(g), initial=0.0) for g in theirs.values()), default=0.0)
        first = {id(p): n for n, p in self.theirs.named_parameters()}
        of_theirs = {
            n: first[id(p)] for n, p in self.theirs.named_parameters(remove_duplicate=False)
        }
        found = {}
        for name, gradient in ours.items():
            their_name = self.names.theirs(name)
            their_name = of_theirs.get(their_name, their_name)
            if their_name in theirs:
                error = _error(
                    {"": gradient}, {"": theirs[their_name]}, least=float(largest) * _SMALL
                )
                if error is not None:
                    found[name] = error
        return found

    def _buffers(self) -> dict[str, float]:
        theirs = self.at_theirs.buffers
        pairs = [(n, self.names.theirs(n)) for n in self.at_ours.buffers]
        errors = {
            n: _error({"": self.at_ours.buffers[n]}, {"": theirs[t]})
            for n, t in pairs
            if t in theirs
        }
        return {n: e for n, e in errors.items() if e is not None}

    def _notes(self) -> Iterator[str]:
        theirs = dict(self.theirs.named_parameters(remove_duplicate=False))
        ours = dict(self.ours.named_parameters(remove_duplicate=False))
        pairs = [
            (n, p, theirs[t]) for n, p in ours.items() if (t := self.names.theirs(n)) in theirs
        ]
        tied = collections.defaultdict(list)
        for name, own, other in pairs:
            if all(ours[n] is not own for n in tied[id(other)]):
                tied[id(other)].append(name)
        for names in tied.values():
            if len(names) > 1:
                yield f"one parameter in torch, and {len(names)} here: {listed(names, _SHOWN)}"
        for flag, text in (
            (False, "frozen in torch, trained here: "),
            (True, "trained in torch, frozen here: "),
        ):
            names = [
                n for n, own, other in pairs if other.requires_grad is flag is not own.requires_grad
            ]
            if names:
                yield text + listed(names, _SHOWN)


def _coarsest(calls: Iterable[Call]) -> float:
    """Return the largest step of the floating dtypes among outputs."""
    dtypes = {y.dtype for call in calls for y in call.output.values()}
    return max(
        (float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)), default=0.0
    )


def _largest(
    ours: list[Call], theirs: list[Call], places: Any, kinds: bool = False
) -> float | None:
    if len(ours) != len(theirs):
        return math.inf
    errors = [_error(places(a), places(b), kinds) for a, b in zip(ours, theirs, strict=True)]
    return max((e for e in errors if e is not None), default=None)


def _of_gradients(theirs: Call, ours: Call) -> float | None:
    """Return the difference of the gradients by what a call returned, where torch's code takes some."""
    wanted, have = theirs.gradient, ours.gradient
    if wanted.keys() <= have.keys():
        have = {place: have[place] for place in wanted}
    return _error(have, wanted) if wanted and len(have) == len(wanted) else None


def _error(ours: Places, theirs: Places, kinds: bool = False, least: float = 0.0) -> float | None:
    """Return the largest difference, relative to the largest number in each of torch's arrays.

    Args:
        ours: arrays by their places.
        theirs: the same; if the places are others, they are compared in order.
        kinds: whether integers and floating numbers are different also if they are equal.
        least: what differences are relative to at least.
    """
    if len(ours) != len(theirs):
        return math.inf
    places = theirs if ours.keys() == theirs.keys() else ours
    worst = None
    for own, b in zip(places, theirs.values(), strict=True):
        a = ours[own]
        if a.shape != b.shape or kinds and _kind(a) != _kind(b):
            return math.inf
        if not b.size:
            continue
        kind = complex if np.iscomplexobj(b) or np.iscomplexobj(a) else float
        a, b = a.astype(kind), b.astype(kind)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(all="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
            largest = max(np.max(np.abs(b), where=np.isfinite(b), initial=0.0), least)
            error = float(np.max(gap) / largest) if largest else float(np.max(gap))
        worst = max(worst or 0.0, math.inf if math.isnan(error) else error)
    return worst


def _kind(array: np.ndarray) -> str:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return "f"
    return {"u": "i"}.get(array.dtype.kind, array.dtype.kind)


def _other_outputs(theirs: Call, ours: Call) -> Iterator[tuple[str, object, object]]:
    """Yield what differs in what two calls returned, but for the numbers."""
    if theirs.keys and ours.keys and set(theirs.keys) != set(ours.keys):
        yield "the set of names that it returns", list(theirs.keys), list(ours.keys)
    if len(theirs.output) != len(ours.output):
        yield "the number of arrays that it returns", len(theirs.output), len(ours.output)
        return
    for a, b in zip(theirs.output.values(), ours.output.values(), strict=True):
        if _kind(a) != _kind(b) or _kind(a) == "f" and a.dtype != b.dtype:
            yield "the dtype that it returns", str(a.dtype), str(b.dtype)
            return


def _other_settings(theirs: torch.nn.Module, ours: Module) -> Iterator[tuple[str, object, object]]:
    for name, value in vars(theirs).items():
        if name.startswith("_") or name == "training" or name not in vars(ours):
            continue
        own = vars(ours)[name]
        if _is_plain(value) and _is_plain(own) and not _equal(value, own):
            yield name, value, own
    if theirs.training != ours.training:
        yield "training", theirs.training, ours.training


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, (tuple, list)):  # torch's (3, 3) for our 3
        return all(_equal(x, b) for x in a)
    if isinstance(b, (tuple, list)):
        return all(_equal(a, x) for x in b)
    return a == b


def _title(row: Row) -> str:
    return f"{row.path or 'the model'} ({row.theirs})"


def _settings(row: Row) -> str:
    return ", ".join(f"{n} is {b!r} here and {a!r} in torch" for n, a, b in row.settings)
