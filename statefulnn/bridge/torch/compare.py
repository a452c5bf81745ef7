"""compare: where a module written by hand stops computing what torch's computes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from statefulnn.bridge.torch.arrays import as_numpy, to_jax
from statefulnn.bridge.torch.structures import leaves, rebuilt
from statefulnn.core.box import unwrap
from statefulnn.core.errors import ArgumentError, explain
from statefulnn.core.module import Module
from statefulnn.core.refusals import listed
from statefulnn.transforms.capture import capture

# What a module is called with, what it returns, and the gradient at that: arrays of numpy, a tuple for each.
Arrays = tuple[np.ndarray, ...]
_PLAIN = (bool, int, float, str, type(None))
_SHOWN = 12  # names in a list of them


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
        drops: whether it is dropout in training mode.
    """

    path: str
    theirs: str
    ours: str
    shape: str
    given: float | None
    output: float | None
    gradient: float | None
    settings: tuple[tuple[str, object, object], ...]
    drops: bool = False


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
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    suggested: Mapping[str, str]
    rows: tuple[Row, ...]
    tolerance: float
    only_theirs: tuple[str, ...] = ()
    only_ours: tuple[str, ...] = ()

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
        """Whether all arrays load, and all outputs and gradients agree."""
        return self.loads and self.first is None and self.first_gradient is None

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
        if row.drops:
            return "It draws random numbers: compare both after eval()"
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
    tolerance: float = 1e-4,
) -> Comparison:
    """Run a module of torch and one written by hand with the same arrays, and say where they part.

    The arrays of `theirs` are loaded into `ours` by name. Then both are called, and the outputs of modules of
    the same name are compared in the order in which torch's finish: the first that differs holds the mistake,
    or the code between it and the one before. Gradients are those of a fixed random product with the output.

    Args:
        theirs: the module to follow; it is not changed.
        ours: the module that should compute the same, in the same mode. Its arrays become those of `theirs`.
        inputs: what both are called with: tensors, numbers and texts in tuples, lists and dicts.
        kwargs: the same, by name.
        names: our name -> torch's, for arrays or modules that are called differently.
        load: whether to load the arrays; without it `ours` is compared as it is.
        grads: whether to compare gradients too.
        tolerance: from which difference on, relative to the largest number, two arrays are not the same.

    Returns:
        A `Comparison`: printed, it is a table with a verdict. If some arrays do not fit, nothing is loaded or
        run, and it says which, and what may belong together.

    Raises:
        ArgumentError: for modules of other kinds, and names that neither module has.

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
    renamed = _Names(theirs, ours, names or {})
    arrays = renamed.fitted() if load else Comparison((), (), {}, {}, (), tolerance)
    if load and arrays.loads:
        values = theirs.state_dict()
        ours.load_state_dict({n: to_jax(values[renamed.theirs(n)], True, n) for n in renamed.ours})
    if not arrays.loads:
        return dataclasses.replace(arrays, tolerance=tolerance)
    at_theirs = _run_theirs(copy.deepcopy(theirs), inputs, dict(kwargs or {}), grads)
    at_ours = _run_ours(copy.deepcopy(ours), inputs, dict(kwargs or {}), grads)
    return _compared(theirs, ours, at_theirs, at_ours, renamed, tolerance)


@dataclasses.dataclass
class _Seen:
    """What one module was called with and returned, over all its calls, and the gradients at that."""

    given: list[np.ndarray] = dataclasses.field(default_factory=list)
    output: list[np.ndarray] = dataclasses.field(default_factory=list)
    gradient: list[np.ndarray | None] = dataclasses.field(default_factory=list)


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
        for n in missing:
            own, last = self._our_shapes[n], n.rpartition(".")[2]
            # Of the same last name first: a bias and a norm's weight may have one shape.
            candidates = left[own, last] or next(
                (those for (shape, _), those in left.items() if shape == own and those), []
            )
            if candidates:
                suggested[n] = candidates.pop(0)
        return Comparison(
            tuple(missing), tuple(unexpected), misshapen, _by_layer(suggested), (), 0.0
        )


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
# Runs


def _run_theirs(
    module: torch.nn.Module, inputs: tuple, kwargs: dict[str, object], grads: bool
) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def before(name: str, _: object, args: tuple, kwargs: dict) -> None:
        found = seen.setdefault(name, _Seen())
        found.given += [as_numpy(t).copy() for t in _tensors((args, kwargs))]

    def after(name: str, _: object, args: object, out: object) -> None:
        found = seen.pop(name)
        seen[name] = found  # in the order in which they finish
        for tensor in _tensors(out):
            found.output.append(as_numpy(tensor).copy())
            place = len(found.gradient)
            found.gradient.append(None)
            if grads and tensor.requires_grad:
                tensor.register_hook(functools.partial(_keep, found.gradient, place))

    for name, sub in module.named_modules(remove_duplicate=True):
        sub.register_forward_pre_hook(functools.partial(before, name), with_kwargs=True)
        sub.register_forward_hook(functools.partial(after, name))
    with torch.set_grad_enabled(grads), torch.random.fork_rng():
        out = module(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
        floating = [t for t in _tensors(out) if t.requires_grad]
        if grads and floating:
            loss = sum(
                (t * torch.from_numpy(_direction(t.shape)).to(t.dtype)).sum() for t in floating
            )
            loss.backward()  # pyright: ignore
    return seen


def _keep(gradients: list, place: int, gradient: torch.Tensor) -> None:
    gradients[place] = as_numpy(gradient).copy()


def _run_ours(
    module: Module, inputs: tuple, kwargs: dict[str, object], grads: bool
) -> dict[str, _Seen]:
    args, named = _as_arrays(inputs), _as_arrays(kwargs)
    seen: dict[str, _Seen] = {}

    def before(name: str, _: object, args: tuple, kwargs: dict) -> None:
        found = seen.setdefault(name, _Seen())
        found.given += map(np.asarray, _arrays((args, kwargs)))

    def after(name: str, _: object, args: object, out: object) -> None:
        seen[name].output += map(np.asarray, _arrays(out))

    hooked = copy.deepcopy(module)
    for name, sub in hooked.named_modules():
        sub.register_forward_pre_hook(functools.partial(before, name), with_kwargs=True)
        sub.register_forward_hook(functools.partial(after, name))
    hooked(*args, **named)
    if not grads:
        return seen
    out, _, backward = capture(module, grads=True)(*args, **named)
    floating = lambda y: jnp.issubdtype(jnp.result_type(y), jnp.floating)
    cotangent = jax.tree_util.tree_map(
        lambda y: jnp.asarray(_direction(y.shape), y.dtype) if floating(y) else None, out
    )
    for name, gradient in backward(cotangent).items():
        if name in seen:
            seen[name].gradient += map(np.asarray, _arrays(gradient))
    return seen


def _direction(shape: Iterable[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(tuple(shape)).astype(np.float32)


def _as_arrays(given: Any) -> Any:
    return rebuilt(given, lambda x: to_jax(x, True) if isinstance(x, torch.Tensor) else x)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [x for x in leaves(tree) if isinstance(x, torch.Tensor)]


def _arrays(tree: object) -> list[Any]:
    return [x for x in map(unwrap, leaves(tree)) if isinstance(x, (jax.Array, np.ndarray))]


# --------------------------------------------------------------------------------------------------
# Differences


def _compared(
    theirs: torch.nn.Module,
    ours: Module,
    at_theirs: Mapping[str, _Seen],
    at_ours: Mapping[str, _Seen],
    names: _Names,
    tolerance: float,
) -> Comparison:
    of_theirs = {names.theirs(name): name for name in at_ours}
    rows = []
    for their_name, seen in at_theirs.items():
        if their_name not in of_theirs:
            continue
        name = of_theirs[their_name]
        own, other = at_ours[name], theirs.get_submodule(their_name)
        module = ours.get_submodule(name)
        gradients = [g for g in seen.gradient if g is not None]
        rows.append(
            Row(
                name,
                type(other).__name__,
                type(module).__name__,
                ", ".join(str(tuple(y.shape)) for y in seen.output),
                _error(own.given, seen.given),
                _error(own.output, seen.output),
                _error(own.gradient, gradients) if gradients and own.gradient else None,
                tuple(_other_settings(other, module)),
                other.training and "Dropout" in type(other).__name__,
            )
        )
    return Comparison(
        (),
        (),
        {},
        {},
        tuple(rows),
        tolerance,
        tuple(n for n in at_theirs if n not in of_theirs),
        tuple(n for t, n in of_theirs.items() if t not in at_theirs),
    )


def _error(ours: list, theirs: list) -> float | None:
    """Return the largest difference, relative to the largest number in each of torch's arrays."""
    if len(ours) != len(theirs) or any(
        a.shape != b.shape for a, b in zip(ours, theirs, strict=True)
    ):
        return math.inf
    worst = None
    for a, b in zip(ours, theirs, strict=True):
        if not b.size:
            continue
        kind = complex if np.iscomplexobj(b) else float
        a, b = a.astype(kind), b.astype(kind)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(all="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
            largest = np.max(np.abs(b), where=np.isfinite(b), initial=0.0)
            error = float(np.max(gap) / largest) if largest else float(np.max(gap))
        worst = max(worst or 0.0, math.inf if math.isnan(error) else error)
    return worst


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
