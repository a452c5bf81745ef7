"""Arguments and outputs as nested containers whose leaves are arrays or constants.

Terms
  structure    tuples, lists, dicts, namedtuples, `Output`s, and leaves
  Var          a leaf: the array in one slot of a graph
  Size         a leaf: an integer that follows from the sizes of the arrays a graph is called with
  constant     a leaf: None, a truth value, a number, a text
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

CONSTANTS = (bool, int, float, complex, str, type(None))


@dataclass(frozen=True)
class Var:
    """The array in one slot of a graph."""

    slot: int


@dataclass(frozen=True)
class Size:
    """A number computed from sizes of the inputs, such as ``(d0*8)``."""

    text: str

    def __call__(self, sizes: Mapping[str, int]) -> Any:
        code = _COMPILED.get(self.text)
        if code is None:
            code = _COMPILED[self.text] = compile(self.text, "<size>", "eval")
        return eval(code, _NAMES, dict(sizes))  # an expression that this package printed

    def is_name(self) -> bool:
        return self.text.isidentifier()

    def misfit(self, value: Any, sizes: dict[str, int]) -> str | None:
        """Bind the name of a size that no array has, or say why a number is not the size that it was."""
        if not isinstance(value, (int, float)) and not jax.export.is_symbolic_dim(value):
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


_NAMES: dict[str, Any] = {
    "__builtins__": {
        "abs": abs, "bool": bool, "float": _float, "int": int,
        "max": _extreme("max", max), "min": _extreme("min", min),
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


def is_namedtuple(value: Any) -> bool:
    """Say whether a value is a namedtuple."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def map_leaves(value: Any, leaf: Callable[[Any, str], Any], where: str = "") -> Any:
    """Return a structure of the same shape; `leaf` gets what is no container, and its place as text."""
    below = lambda v, key: map_leaves(v, leaf, f"{where}[{key!r}]")
    if is_namedtuple(value):
        return type(value)(
            *(
                map_leaves(v, leaf, f"{where}.{f}")
                for f, v in zip(value._fields, value, strict=True)
            )
        )
    if type(value) in (tuple, list):
        return type(value)(below(v, i) for i, v in enumerate(value))
    if isinstance(value, dict):
        items = {k: below(v, k) for k, v in value.items()}
        # ModelOutput and its like: dicts whose entries are attributes.
        plain = type(value).__module__ in ("builtins", "collections")
        return items if plain else Output(items)
    return leaf(value, where)


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

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments by the names of the parameters, with the defaults.

        Raises:
            TypeError: for arguments that do not fit.
        """
        signature = inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect._ParameterKind[kind],
                    default=inspect.Parameter.empty if default == REQUIRED else default,
                )
                for name, kind, default in self.parameters
            ]
        )
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
