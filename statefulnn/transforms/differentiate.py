"""What grad, vjp, jvp and the Jacobians share: a call as a function of what is differentiated.

A user's function takes modules, boxes and arrays, in any pytree. `Differentiation` makes it a pure
function of `Chosen`, the unique arrays among its differentiated arguments, and shows results in the
user's terms: a module stands for a dict of dotted name -> array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.box import Box
from statefulnn.core.compat import own_on_devices
from statefulnn.core.gradients import note_gradient
from statefulnn.core.hooks import hooks_of
from statefulnn.core.module import Module
from statefulnn.core.ownership import Scope
from statefulnn.core.pytree import flatten_collecting
from statefulnn.core.refusals import forward_mode, only_without_modules
from statefulnn.core.selection import Selection, trainable
from statefulnn.transforms import refusals
from statefulnn.transforms.lift import Mark, SplitCall, Writes, template
from statefulnn.transforms.types import PyTree

# Where a differentiated array is: "leaf" and its position among the leaves of modules, or "array" and that
# among the other leaves.
Place: TypeAlias = tuple[str, int]


class Chosen:
    """The arrays that are differentiated, each once; a pytree node of its own.

    What JAX makes of it has the same node in it, wherever that ends up: a gradient is one, a Jacobian has one
    for each output, a Hessian one in each array of the outer one. So `Differentiation.show` finds them all.
    """

    __slots__ = ("values",)

    def __init__(self, values: Sequence[jax.Array]) -> None:
        self.values = values


jax.tree_util.register_pytree_node(
    Chosen, lambda c: (tuple(c.values), None), lambda _, values: Chosen(values)
)


class Differentiation:
    """One call of a function that is differentiated by some of its arguments.

    Args:
        fun: the user's function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        argnums: which positional arguments to differentiate by; an integer or a tuple of them.
        has_aux: whether `fun` returns a pair of a differentiated output and anything else.
        view: is applied to the differentiated output, such as a check that it is a scalar.
        only: which parameters of the modules among these arguments, see `trainable`; others are constants.
        of_example: whether the other arguments are those of one example, see `own_on_devices`.

    Attributes:
        values: what is differentiated, `Chosen`.
    """

    def __init__(
        self,
        fun: Callable,
        args: tuple,
        kwargs: dict,
        argnums: int | tuple[int, ...],
        has_aux: bool = False,
        view: Callable[[Any], Any] = lambda out: out,
        only: Selection = None,
        of_example: bool = False,
    ) -> None:
        self.fun, self.has_aux, self._view = fun, has_aux, view
        self._several = not isinstance(argnums, int)
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        self.call = SplitCall((args, kwargs))
        self._targets = [_Target(self.call, args, n, fun) for n in numbers]
        if only is not None:
            self._choose(only)
        # Positions to differentiate: among the leaves of modules, and among the other leaves. Sets, since two
        # arguments may share a parameter: it is one array, and its gradient the sum over both.
        self._in_modules = sorted({p for t in self._targets for p in t.leaf_positions})
        self._in_arrays = sorted({p for t in self._targets for p in t.array_positions})
        if not self._in_modules and not self._in_arrays:
            kind = type(args[numbers[0]]).__name__
            raise refusals.nothing_to_differentiate(function_name(fun), kind)
        self._argument = args[numbers[0]]
        self._leaves = self.call.leaves
        self._scope: Scope | None = None
        self.values = Chosen(
            [self._leaves[p] for p in self._in_modules]
            + [self.call.dynamic[p] for p in self._in_arrays]
        )
        if of_example:
            data = [v for i, v in enumerate(self.call.dynamic) if i not in self._in_arrays]
            self.values = own_on_devices(self.values, data)

    def _choose(self, only: Selection) -> None:
        """Leave out the parameters of modules that a selection does not choose."""
        modules = [root for t in self._targets for root in t.roots if isinstance(root, Module)]
        if not modules:
            raise only_without_modules("nn.grad")
        found = trainable(modules, only, "nn.grad")
        ids = {id(p) for those in found for p in those.values()}
        for target in self._targets:
            target.keep(ids)

    def __call__(self, chosen: Chosen) -> tuple[Any, tuple[Any, Writes]]:
        """Run the user's function, purely: return its output, and (aux, what it wrote)."""
        leaves, dynamic = list(self._leaves), list(self.call.dynamic)
        values = iter(chosen.values)
        for p in self._in_modules:
            leaves[p] = next(values)
        for p in self._in_arrays:
            dynamic[p] = next(values)
        outputs: list[PyTree] = []

        # `run` returns what is handed back as it is, aux. The output that is differentiated goes beside it.
        def body(*args: Any, **kwargs: Any) -> Any:
            out = self.fun(*args, **kwargs)
            out, aux = _pair(out, self.fun) if self.has_aux else (out, None)
            outputs.append(_arrays(out, self.fun))
            return aux

        aux, written = self.call.run(body, leaves, dynamic, on_scope=self._note_scope)
        return self._view(outputs.pop()), (aux, written)

    def _note_scope(self, scope: Scope) -> None:
        self._scope = scope

    def finish(self, effects: tuple[Any, Writes]) -> Any:
        """Write back what the function wrote, and return its aux output.

        Raises:
            UnusedModuleError: if the function never read the module it is differentiated by.
        """
        aux, written = effects
        # Gradients by arrays may well be zero. A module nobody read is nearly always the wrong module.
        if not self._in_arrays and self._scope is not None and not self._scope.read:
            raise refusals.never_read(function_name(self.fun), type(self._argument).__name__)
        return self.call.finish(aux, written)

    def refuse_hooks(self) -> None:
        """Raise for modules with backward hooks, before ``jax.linearize``.

        It looks like reverse mode to the hooks, so JAX's error would come at the first tangent.
        """
        for root in self.call.roots:
            for module in root.modules() if isinstance(root, Module) else ():
                if hooks_of(module, "_backward_hooks") or hooks_of(module, "_backward_pre_hooks"):
                    raise forward_mode(type(module).__name__)

    def show(self, tree: PyTree) -> PyTree:
        """Replace every `Chosen` in a result by the arguments it stands for, in the user's terms."""

        is_chosen = lambda node: isinstance(node, Chosen)
        shown = lambda node: self._in_user_terms(node) if is_chosen(node) else node
        return jax.tree_util.tree_map(shown, tree, is_leaf=is_chosen)

    def _in_user_terms(self, chosen: Chosen) -> Any:
        values = [self.show(v) for v in chosen.values]
        of_leaf = dict(zip(self._in_modules, values, strict=False))
        of_array = dict(zip(self._in_arrays, values[len(self._in_modules) :], strict=True))
        shown = tuple(t.shown(of_leaf, of_array) for t in self._targets)
        return shown if self._several else shown[0]

    def take(self, given: PyTree, what: str) -> Chosen:
        """Return arrays in the user's terms (a tangent, a vector) as `Chosen`: the inverse of `show`."""
        targets = given if self._several else (given,)
        if not isinstance(targets, (tuple, list)) or len(targets) != len(self._targets):
            raise refusals.not_one_for_each(what, type(given).__name__, len(self._targets))
        found: dict[Place, ArrayLike] = {}
        for target, value in zip(self._targets, targets, strict=True):
            target.take(value, found, what)
        places = [("leaf", p) for p in self._in_modules] + [("array", p) for p in self._in_arrays]
        values = []
        for place, own in zip(places, self.values.values, strict=True):
            value = found[place]
            if jnp.shape(value) != jnp.shape(own):
                name = self.call.moduledef.leaf_names[place[1]] if place[0] == "leaf" else None
                raise refusals.direction_of_other_shape(
                    what, jnp.shape(value), jnp.shape(own), name
                )
            values.append(jnp.asarray(value, _tangent_dtype(own)))
        return Chosen(values)


def _tangent_dtype(value: ArrayLike) -> np.dtype:
    dtype = jnp.result_type(value)
    # An integer has no direction to go to: JAX's tangent of it has a dtype without numbers.
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0


class _Target:
    """One argument to differentiate by."""

    def __init__(self, call: SplitCall, args: tuple, number: int, fun: Callable) -> None:
        if not -len(args) <= number < len(args):
            raise refusals.no_such_argument(function_name(fun), number, len(args))
        self._call = call
        self._template = template(call.signature.treedef)[0][number % len(args)]
        marks = jax.tree_util.tree_leaves(self._template)
        self.roots = [call.roots[m.number] for m in marks if not m.is_leaf]
        # The trainable parameters of modules, and the other leaves.
        self.leaf_positions = [p for root in self.roots for p in call.positions_under(root)]
        self.array_positions = [m.number for m in marks if m.is_leaf]

    def keep(self, ids: set[int]) -> None:
        """Leave out the parameters of modules whose boxes are not among these."""
        ids = ids | {id(root) for root in self.roots if isinstance(root, Box)}
        boxes = self._call.plan.boxes
        self.leaf_positions = [p for p in self.leaf_positions if id(boxes[p]) in ids]

    def shown(self, of_leaf: Mapping[int, PyTree], of_array: Mapping[int, PyTree]) -> PyTree:
        """Return the argument with other values in place of what is differentiated."""

        def one(mark: Mark) -> PyTree:
            if mark.is_leaf:
                return of_array[mark.number]
            names = self._names(self._call.roots[mark.number])
            if isinstance(names, int):
                return of_leaf[names]
            shown = {name: of_leaf[p] for name, p in names.items()}
            first = next(iter(shown), None)
            if first is not None:  # one tells whose they are
                note_gradient(shown[first], self._call.plan.boxes[names[first]])
            return shown

        return jax.tree_util.tree_map(one, self._template)

    def take(self, given: PyTree, found: dict[Place, ArrayLike], what: str) -> None:
        """Note the values of an argument in the user's terms under their positions."""
        marks, treedef = jax.tree_util.tree_flatten(self._template)
        try:
            parts = treedef.flatten_up_to(given)
        except ValueError as error:
            raise refusals.direction_of_other_structure(what, error) from None
        for mark, value in zip(marks, parts, strict=True):
            if mark.is_leaf:
                found["array", mark.number] = value
                continue
            names = self._names(self._call.roots[mark.number])
            if isinstance(names, int):
                found["leaf", names] = value
                continue
            if not isinstance(value, Mapping) or value.keys() != names.keys():
                got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
                raise refusals.direction_of_other_names(what, got, sorted(names))
            found.update({("leaf", names[name]): v for name, v in value.items()})

    def _names(self, root: Module | Box) -> int | dict[str, int]:
        """Return the leaf position of each trainable parameter by name; of a box, the position."""
        if isinstance(root, Box):
            return self._call.positions_under(root)[0]
        boxes = self._call.plan.boxes
        position = {id(boxes[i]): i for i in self.leaf_positions}
        return {n: position[id(p)] for n, p in root.named_parameters() if id(p) in position}


# --------------------------------------------------------------------------------------------------
# Checks


def function_name(fun: Callable) -> str:
    """Return a function's name for a message."""
    return getattr(fun, "__qualname__", repr(fun))


def real_scalar(fun: Callable, has_aux: bool = False) -> Callable[[Any], Any]:
    """Return a check that a loss is a real scalar; it returns the loss."""

    def view(loss: PyTree) -> PyTree:
        shape = getattr(loss, "shape", None if not isinstance(loss, (int, float)) else ())
        if shape != ():
            raise refusals.no_scalar(
                function_name(fun), type(loss).__name__, shape, isinstance(loss, tuple), has_aux
            )
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise refusals.no_real_loss(function_name(fun), jnp.result_type(loss))
        return loss

    return view


def require_argnums(argnums: object, function: str) -> None:
    """Raise unless arguments are chosen by their positions."""
    if isinstance(argnums, int):
        return
    if not isinstance(argnums, (tuple, list)) or not all(isinstance(n, int) for n in argnums):
        raise refusals.no_argnums(function, argnums)


def _pair(out: PyTree, fun: Callable) -> tuple:
    if not isinstance(out, tuple) or len(out) != 2:
        raise refusals.no_aux(function_name(fun), type(out).__name__)
    return out


def _arrays(out: PyTree, fun: Callable) -> PyTree:
    """Return a differentiated output with the values of its boxes; it cannot hold modules."""
    # Nearly every output is one array: no need to flatten it.
    if isinstance(out, (jax.Array, np.ndarray, float)):
        return out
    if isinstance(out, Box):
        return out.value
    found = flatten_collecting(out)[2]
    for obj in found:
        if not isinstance(obj, Box):
            raise refusals.module_as_output(function_name(fun), type(obj).__name__)
    if not found:
        return out
    return jax.tree_util.tree_map(
        lambda x: x.value if isinstance(x, Box) else x, out, is_leaf=lambda x: isinstance(x, Box)
    )
