"""Arguments and outputs as nested containers whose leaves are arrays or constants.

Terms
  structure    tuples, lists, dicts, namedtuples, dataclasses, and leaves
  Var          a leaf: the array in one slot of a graph
  Size         a leaf: an integer that follows from the sizes of the arrays a graph is called with
  constant     a leaf: None, a truth value, a number, a text
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from types import CodeType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

CONSTANTS = (bool, int, float, complex, str, type(None))


class Leaf:
    """A class of leaves: what it holds is no part of a structure."""


@dataclass(frozen=True)
class Var(Leaf):
    """The array in one slot of a graph."""

    slot: int


@dataclass(frozen=True)
class Size(Leaf):
    """A number computed from sizes of the inputs, such as ``(d0*8)``."""

    text: str

    def __call__(self, sizes: Mapping[str, int]) -> Any:
        code = _COMPILED.get(self.text)
        if code is None:
            code = _COMPILED[self.text] = compile(self.text, "<size>", "eval")
        return eval(code, _NAMES, dict(sizes))  # an expression that this package printed

    def is_name(self) -> bool:
        return self.text.isidentifier()

    def misfit(self, given: Any, sizes: dict[str, Any]) -> str | None:
        """Bind the name of a size that no array has, or say why a number is not the size that it was."""
        value: Any = given
        if not isinstance(given, (int, float)) and not jax.export.is_symbolic_dim(given):
            return f"was a number that follows from sizes when it was traced, and is {value!r} here"
        if self.is_name():
            sizes.setdefault(self.text, value)
        want = self(sizes)
        if want == value or isinstance(want, float) and math.isclose(want, value):
            return None
        return f"was traced as the size {self.text}, which is {want}, and is {value} here"


_COMPILED: dict[str, CodeType] = {}


class _Math:
    """The module math; what has no number yet, since a size has only a name, is computed as an array."""

    def __getattr__(self, name: str) -> Any:
        known = getattr(math, name)
        if not callable(known):
            return known
        return lambda x: getattr(jnp, name)(x) if isinstance(x, jax.Array) else known(x)


def _float(x: Any) -> Any:
    return jnp.asarray(x, jnp.float32) if jax.export.is_symbolic_dim(x) else float(x)


def _extreme(name: str, plain: Callable) -> Callable:
    def extreme(*sizes: Any) -> Any:
        named = next((s for s in sizes if jax.export.is_symbolic_dim(s)), None)
        if named is None:
            return plain(sizes)
        text = f"{name}({', '.join(map(str, sizes))})"
        return jax.export.symbolic_shape(text, scope=named.scope)[0]

    return extreme


minimum = _extreme("min", min)
_NAMES: dict[str, Any] = {
    "__builtins__": {
        "abs": abs, "bool": bool, "float": _float, "int": int,
        "max": _extreme("max", max), "min": minimum,
    },
    "math": _Math(),
}  # fmt: skip


@jax.tree_util.register_pytree_with_keys_class
class Output(dict):
    """What a model returned under names: a dict whose entries are attributes as well.

    Example:
        >>> out = Output(logits=jnp.ones(2))
        >>> out.logits is out["logits"]
        True
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}; it has {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        return [(jax.tree_util.DictKey(k), v) for k, v in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, keys: Any, values: Any) -> Output:
        return cls(zip(keys, values, strict=True))


class NotPlain(Exception):
    """An object that is no structure; its argument says where it is and what."""


def fields_of(value: tuple) -> tuple[str, ...]:
    """Return the names of a tuple's items, if it is a namedtuple or one that torch returns, or ()."""
    cls: Any = type(value)
    return getattr(cls, "_fields", ()) or (hasattr(cls, "n_fields") and cls.__match_args__) or ()


def _is_plain(value: object) -> bool:
    """Say whether a value is a tuple that any items make: torch's PackedSequence looks at its own."""
    return isinstance(value, tuple) and type(value).__name__ != "PackedSequence"


@functools.cache
def _named_class(name: str, fields: tuple[str, ...]) -> type:
    cls = namedtuple(name, fields)
    # A pickle finds no class of this name; this function makes it anew.
    cls.__reduce__ = lambda self: (_named, (name, fields, tuple(self)))
    return cls


def _named(name: str, fields: tuple[str, ...], values: Sequence[Any]) -> Any:
    return _named_class(name, fields)(*values)


def _class_of(value: tuple, fields: tuple[str, ...]) -> type:
    """Return a namedtuple's class: the one of this name and fields if it was made inside of a function."""
    cls = type(value)
    known: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        known = getattr(known, name, None)
    return cls if known is cls and hasattr(cls, "_fields") else _named_class(cls.__name__, fields)


def is_record(value: Any) -> bool:
    """Say whether a value is a dataclass whose fields are parts of a structure."""
    return is_dataclass(value) and not isinstance(value, (type, Leaf))


def map_leaves(value: Any, leaf: Callable[[Any, str], Any], where: str = "") -> Any:
    """Return a structure of the same shape, with ``leaf(value, place)`` for each value that holds no others.

    Dataclasses and dicts with attributes become an `Output`, other classes what they are derived from.
    """
    below = lambda v, key: map_leaves(v, leaf, f"{where}[{key!r}]")
    if isinstance(value, tuple) and _is_plain(value):
        fields = fields_of(value)
        if not fields:
            return tuple(below(v, i) for i, v in enumerate(value))
        named = zip(fields, value, strict=True)
        return _class_of(value, fields)(*(map_leaves(v, leaf, f"{where}.{f}") for f, v in named))
    if isinstance(value, list):
        return [below(v, i) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        items = {k: below(v, k) for k, v in value.items()}
        if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
            return OrderedDict(items) if isinstance(value, OrderedDict) else items
        return Output(items)  # ModelOutput and its like
    if is_record(value):
        record: Any = value
        held = [f.name for f in dataclass_fields(record) if hasattr(value, f.name)]
        return Output({f: below(getattr(value, f), f) for f in held})
    return leaf(value, where)


def rebuilt(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a structure of the same classes with other leaves."""
    if isinstance(value, tuple) and not _is_plain(value):
        return leaf(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuilt(v, leaf) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)([rebuilt(v, leaf) for v in value])
    if not isinstance(value, Mapping) and not is_record(value):
        return leaf(value)
    new: Any = copy.copy(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            new[key] = rebuilt(item, leaf)
    else:
        for f in dataclass_fields(value):
            object.__setattr__(new, f.name, rebuilt(getattr(value, f.name), leaf))
    return new


def flat(value: Any) -> dict[str, Any]:
    """Return the leaves of a structure by their places: tuples are lists there, and dicts have no order."""
    found: dict[str, Any] = {}
    map_leaves(value, lambda x, where: found.setdefault(re.sub(r"\.(\w+)", r"['\1']", where), x))
    return found


def leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of a structure."""
    found: list[Any] = []
    map_leaves(value, lambda x, _: found.append(x))
    return iter(found)


# --------------------------------------------------------------------------------------------------
# Signatures

REQUIRED, OTHER = "<required>", "<another default>"


@dataclass(frozen=True)
class Signature:
    """The parameters of a forward: (name, kind, default) each.

    A default that is no constant is `OTHER`: it equals itself, and nothing that can be given.
    """

    parameters: tuple[tuple[str, str, Any], ...]

    @classmethod
    def of(cls, function: Callable) -> Signature:
        """Read the signature of a function."""

        def default(p: inspect.Parameter) -> Any:
            if p.default is p.empty:
                return REQUIRED
            return p.default if type(p.default) in CONSTANTS else OTHER

        found = inspect.signature(function).parameters.values()
        return cls(tuple((p.name, p.kind.name, default(p)) for p in found))

    def inspected(self) -> inspect.Signature:
        """Return it as Python has it."""
        empty = inspect.Parameter.empty
        kinds = inspect._ParameterKind
        return inspect.Signature(
            [
                inspect.Parameter(
                    name, kinds[kind], default=empty if default == REQUIRED else default
                )
                for name, kind, default in self.parameters
            ]
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments by the names of the parameters, with the defaults.

        Raises:
            TypeError: for arguments that do not fit.
        """
        bound = self.inspected().bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
