"""statefulize: a pure function and its arrays as a module, the way back from functionalize.

Every bridge from another library is this one step: what the library calls a model becomes a pure function
and trees of arrays (`statefulnn.bridge`). Beside its signature such a function may have

    in_mode(training)   returns the function of training or of evaluation mode, the same one every time;
                        ``train()`` and ``eval()`` of the module call it
    training            the mode it was made in
    takes_rng           False: it draws nothing, so nothing is drawn for it
    moduledef           the ModuleDef it was made of: `functionalize` sets it, and it tells which state is a
                        frozen parameter and which buffers are not persistent
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box, unwrap
from statefulnn.core.errors import MissingRngError
from statefulnn.core.generator import current_generator, next_key
from statefulnn.core.module import Module, find_box, place_box
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.narrowing import check_jax_holds
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.static_keys import KeyMaker
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.types import PyTree, TreeDef


def dotted(path: tuple) -> str:
    """Return the name of a place in a tree: its keys, joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@dataclasses.dataclass(frozen=True)
class _Tree:
    """The structure of a tree of arrays, and the names of its leaves in JAX's order."""

    treedef: TreeDef
    names: tuple[str, ...]

    def __deepcopy__(self, memo: dict) -> _Tree:
        return self  # a treedef may hold objects that are told apart by identity


class Statefulized(Module):
    """A pure function and its arrays as a module; made by `statefulize`.

    Args:
        fn: ``fn(params, *inputs)``, or ``fn(params, state, *inputs) -> (out, new_state)``.
        params: a tree of arrays.
        state: another one, or None for a function without state.
        path_name: gives the dotted name of a leaf for its path, as ``jax.tree_util`` has paths.
        did: what was called, for messages.
    """

    # With underscores, so that few names are lost for parameters: those are keys of a user's tree.
    _fn: Any = None
    _trees: Any = ()
    _rng: str = ""

    def __init__(
        self,
        fn: Callable,
        params: PyTree,
        state: PyTree = None,
        *,
        path_name: Callable[[tuple], str] = dotted,
        did: str = "called nn.statefulize",
    ) -> None:
        super().__init__()
        if not callable(fn):
            raise refusals.no_function(did, type(fn).__name__)
        frozen, hidden = kinds_of_state(getattr(fn, "moduledef", None))
        trees, boxes = [], {}
        for noun, tree in (("params", params), ("state", state)):
            if noun == "state" and state is None:
                continue
            described, arrays = _taken_apart(tree, noun, path_name, did)
            trees.append(described)
            for name, array in arrays.items():
                if name in boxes:
                    where = "both in the parameters and in the state"
                    raise refusals.name_not_unique(did, name, where)
                if noun == "params" or name in frozen:
                    trainable = noun == "params" and jnp.issubdtype(array.dtype, jnp.inexact)
                    boxes[name] = Parameter(array, requires_grad=trainable)
                else:
                    boxes[name] = Buffer(array, persistent=name not in hidden)
        _check_names(boxes, did)
        self._fn = fn
        self._trees = tuple(trees)
        self._rng = _takes_rng(fn)
        self.training = bool(getattr(fn, "training", True))
        for name, box in boxes.items():
            place_box(self, name.split("."), box)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the function with the module's arrays, and keep the new state."""
        kwargs = self._with_rng(kwargs)
        params, *rest = self._arrays()
        if not rest:
            return self._fn(params, *inputs, **kwargs)
        result = self._fn(params, rest[0], *inputs, **kwargs)
        if not isinstance(result, tuple) or len(result) != 2:
            raise refusals.no_new_state(self._get_name(), type(result).__name__)
        out, new = result
        self._keep(new)
        return out

    def train(self, mode: bool = True) -> Self:
        """Set training mode, where the function has two modes: ``fn.in_mode``."""
        in_mode = getattr(self._fn, "in_mode", None)
        fn = self._fn if in_mode is None else in_mode(mode)
        super().train(mode)
        if KeyMaker().of(fn) != KeyMaker().of(self._fn):  # an equal one is no change
            self._fn = fn
        return self

    def extra_repr(self) -> str:
        fn = self._fn
        return getattr(fn, "__qualname__", None) or repr(fn)

    def _arrays(self) -> list[Any]:
        """Return the parameters, and the state if there is one, as the function takes them."""
        return [
            tree.treedef.unflatten([unwrap(self._box(n)) for n in tree.names])
            for tree in self._trees
        ]

    def _box(self, name: str) -> Any:
        return find_box(self, name.split("."))

    def _keep(self, new: PyTree) -> None:
        """Write the state that has changed into its buffers."""
        tree = self._trees[1]
        if jax.tree.structure(new) != tree.treedef:
            raise refusals.state_of_other_structure(self._get_name(), _difference(tree, new))
        for name, value in zip(tree.names, jax.tree.leaves(new), strict=True):
            box = self._box(name)
            if value is not box._value:  # the very array it was given is no change
                box.value = value

    def _with_rng(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add the random key that the function takes, unless the caller gave one."""
        if not self._rng or "rng" in kwargs:
            return kwargs
        generator = current_generator()
        if getattr(self._fn, "moduledef", None) is not None:
            # One of ours draws for itself, as the module it was made of would.
            return kwargs if generator is None else {**kwargs, "rng": generator}
        try:
            return {**kwargs, "rng": next_key()}
        except MissingRngError:
            if self._rng == "required":
                raise
            return kwargs  # as calling the function without a key: it knows whether it needs one


@shortened
def statefulize(fn: Callable, params: object, state: object = None) -> Module:
    """Return a pure function and its arrays as a module: the way back from `functionalize`.

    ``statefulize(*functionalize(module, mutable=True))`` behaves as the module: the same names, the same
    parameters frozen, the same draws, and ``train()`` and ``eval()`` switch it.

    Args:
        fn: ``fn(params, *inputs) -> out``, or with `state` ``fn(params, state, *inputs) -> (out,
            new_state)``. If it has a keyword ``rng``, each call passes a fresh random key from the
            generator in force; where there is none, a function that has a default is called without.
        params: a tree of arrays (nested dicts, lists, tuples, any pytree); `fn` gets the same tree. They
            become parameters named by their path, ``params["layers"][0]["w"]`` ``layers.0.w``; integers
            and booleans become frozen ones.
        state: another such tree; its arrays become buffers, and take the new state after each call.

    Returns:
        a Module. An array that is in a tree twice becomes two parameters, as it is two arguments of `fn`.

    Raises:
        RegistrationError: for a leaf that is no array, or a name that cannot be one.
        StructureChangeError: in a call, if `fn` returns a state of another structure.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> def mlp(layers, x):
        ...     for w, b in layers:
        ...         x = jnp.tanh(x @ w + b)
        ...     return x
        >>> model = nn.statefulize(
        ...     mlp, [(jnp.ones((3, 4)), jnp.zeros(4)), (jnp.ones((4, 2)), jnp.zeros(2))]
        ... )
        >>> [name for name, _ in model.named_parameters()]
        ['0.0', '0.1', '1.0', '1.1']
        >>> nn.grad(lambda m: m(jnp.ones((5, 3))).sum())(model)["1.1"].shape
        (2,)
    """
    return Statefulized(fn, params, state)


# --------------------------------------------------------------------------------------------------
# Taking trees apart


def _taken_apart(
    tree: PyTree, noun: str, path_name: Callable[[tuple], str], did: str
) -> tuple[_Tree, dict[str, Any]]:
    """Return the structure of a tree, and its arrays by name.

    The structure has JAX's order, which sorts the keys of a dict; the arrays come as they were put in, since
    parameters have the order in which they were registered.
    """
    place = lambda path: path_name(path) if path else noun
    is_leaf = lambda x: isinstance(x, (Box, ModuleBase))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    names = tuple(place(path) for path, _ in leaves)
    arrays: dict[str, Any] = {}
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if name in arrays:
            raise refusals.name_not_unique(did, name, f"twice in the {noun}")
        arrays[name] = _array(leaf, name, noun, did)
    inserted = jax.tree_util.tree_flatten_with_path(_unsorted(tree, is_leaf), is_leaf=is_leaf)[0]
    return _Tree(treedef, names), {place(path): arrays[place(path)] for path, _ in inserted}


def _unsorted(tree: PyTree, is_leaf: Callable[[object], bool]) -> PyTree:
    """Return a tree with ordered dicts for dicts, whose keys JAX would sort."""
    stop = lambda x: type(x) is dict or is_leaf(x)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=stop)
    return treedef.unflatten(
        OrderedDict((k, _unsorted(v, is_leaf)) for k, v in leaf.items())
        if type(leaf) is dict
        else leaf
        for leaf in leaves
    )


def _array(leaf: object, name: str, noun: str, did: str) -> Any:
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != object:
        check_jax_holds(leaf, lambda: f"the {noun} {name!r}")
        return jnp.asarray(leaf)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    instead = "convert numbers with jnp.asarray; what is no array belongs into the function itself"
    if isinstance(leaf, Box):
        instead = "pass its array: parameter.value"
    elif isinstance(leaf, ModuleBase):
        instead = "pass its arrays: fn, params = nn.functionalize(module)"
    raise refusals.no_array_in_tree(did, type(leaf).__name__, name, noun, instead)


def is_taken(part: str) -> bool:
    """Say whether a module uses a name already, so that no array of it can have it."""
    return hasattr(Statefulized, part) or part in (
        "training",
        "_parameters",
        "_buffers",
        "_modules",
    )


def _check_names(names: Iterable[str], did: str) -> None:
    """Raise unless every name can be that of a box, all at once."""
    # What would be a submodule: each beginning of a name, and one of the names that need it.
    inner: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            inner.setdefault(".".join(parts[:i]), name)
        if "" in parts:
            raise refusals.name_not_possible(did, name, "a part of it is empty")
        taken = next((p for p in parts if is_taken(p)), None)
        if taken is not None:
            why = f"every module has an attribute {taken!r} already"
            raise refusals.name_not_possible(did, name, why)
    for name in names:
        if name in inner:
            raise refusals.name_not_unique(did, name, f"also the beginning of {inner[name]!r}")


def _difference(tree: _Tree, new: PyTree) -> str:
    """Say how a tree differs from what was expected, by the names of its leaves if they tell."""
    paths = lambda t: {dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(t)[0]}
    known, found = paths(tree.treedef.unflatten(tree.names)), paths(new)
    unknown = sorted(found - known)
    parts = [f"{name!r} missing" for name in sorted(known - found)]
    for name in unknown:
        near = difflib.get_close_matches(name, known, 1)
        parts.append(f"{name!r} unknown" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return ", ".join(parts[:8]) or f"{jax.tree.structure(new)} for {tree.treedef}"


# --------------------------------------------------------------------------------------------------
# What a function says of itself


def _takes_rng(fn: Callable) -> str:
    """Return "required" or "optional" for a function with a keyword ``rng``, "" for others."""
    # Nothing is drawn for a function that takes no key: a draw advances the generator for everybody.
    if not getattr(fn, "takes_rng", True):
        return ""
    try:
        rng = inspect.signature(fn).parameters.get("rng")
    except (TypeError, ValueError):  # no signature: some callables of C
        return ""
    if rng is None or rng.kind is rng.POSITIONAL_ONLY:
        return ""
    if rng.default is not rng.empty:
        return "optional"
    # A positional ``rng`` without default comes among the inputs: fn(params, rng, x).
    return "required" if rng.kind is rng.KEYWORD_ONLY else ""


def kinds_of_state(moduledef: ModuleDef | None) -> tuple[set[str], set[str]]:
    """Return the names of the frozen parameters and of the non-persistent buffers of a ModuleDef."""
    if moduledef is None:
        return set(), set()
    first = moduledef.count("trainable")  # leaves are ordered by kind
    last = first + moduledef.count("frozen")
    frozen = {n for n, i in moduledef.names.items() if first <= i < last}
    hidden = set()
    for node, path in zip(moduledef.nodes, moduledef.paths, strict=True):
        if path is not None:
            own = {n: v for n, v, _ in node.values}.get("_non_persistent_buffers_set", ())
            hidden |= {".".join((*path[1:], name)) for name in own}
    return frozen, hidden
