"""What grad, vjp, jvp and the Jacobians share: a call as a function of what is differentiated.

A user's function takes modules, boxes and arrays, in any pytree. `Differentiation` makes it a pure
function of `Chosen`, the unique arrays among its differentiated arguments, and shows results in the
user's terms: a module stands for a dict of dotted name -> array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import refusals
from statefulnn.core.box import Box
from statefulnn.core.errors import ShapeError, UnknownNameError, UnusedModuleError, explain
from statefulnn.core.hooks import hooks_of
from statefulnn.core.module import Module
from statefulnn.core.ownership import Scope
from statefulnn.core.pytree import flatten_collecting
from statefulnn.transforms.lift import SplitCall, Writes, template


class Chosen:
    """The arrays that are differentiated, each once; a pytree node, so that results can be found."""

    __slots__ = ("values",)

    def __init__(self, values: Sequence[Any]) -> None:
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
    ) -> None:
        self.fun, self.has_aux, self._view = fun, has_aux, view
        self._several = not isinstance(argnums, int)
        numbers: Any = tuple(argnums) if not isinstance(argnums, int) else (argnums,)
        self.call = SplitCall((args, kwargs))
        self._targets = [_Target(self.call, args, n, fun) for n in numbers]
        # Positions to differentiate: among the leaves of modules, and among the other leaves.
        self._in_modules = sorted({p for t in self._targets for p in t.leaf_positions})
        self._in_arrays = sorted({p for t in self._targets for p in t.array_positions})
        if not self._in_modules and not self._in_arrays:
            raise _nothing_to_differentiate(fun, args, numbers)
        self._argument = args[numbers[0]]
        self._leaves = self.call.leaves
        self._scope: Scope | None = None
        self.values = Chosen(
            [self._leaves[p] for p in self._in_modules]
            + [self.call.dynamic[p] for p in self._in_arrays]
        )

    def __call__(self, chosen: Chosen) -> tuple[Any, tuple[Any, Writes]]:
        """Run the user's function, purely: return its output, and (aux, what it wrote)."""
        leaves, dynamic = list(self._leaves), list(self.call.dynamic)
        values = iter(chosen.values)
        for p in self._in_modules:
            leaves[p] = next(values)
        for p in self._in_arrays:
            dynamic[p] = next(values)
        outputs: list[Any] = []

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
        if not self._in_arrays and self._scope is not None and not self._scope.read:
            raise _never_read(self.fun, self._argument)
        return self.call.finish(aux, written)

    def refuse_hooks(self) -> None:
        """Raise for modules with backward hooks, before ``jax.linearize``.

        It looks like reverse mode to the hooks, so JAX's error would come at the first tangent.
        """
        for root in self.call.roots:
            for module in root.modules() if isinstance(root, Module) else ():
                if hooks_of(module, "_backward_hooks") or hooks_of(module, "_backward_pre_hooks"):
                    raise refusals.forward_mode(type(module).__name__)

    def show(self, tree: Any) -> Any:
        """Replace every `Chosen` in a result by the arguments it stands for, in the user's terms."""

        def one(node: Any) -> Any:
            return self._in_user_terms(node) if isinstance(node, Chosen) else node

        return jax.tree_util.tree_map(one, tree, is_leaf=lambda x: isinstance(x, Chosen))

    def _in_user_terms(self, chosen: Chosen) -> Any:
        values = [self.show(v) for v in chosen.values]
        of_leaf = dict(zip(self._in_modules, values, strict=False))
        of_array = dict(zip(self._in_arrays, values[len(self._in_modules) :], strict=True))
        shown = tuple(t.shown(of_leaf, of_array) for t in self._targets)
        return shown if self._several else shown[0]

    def take(self, given: Any, what: str) -> Chosen:
        """Return arrays in the user's terms (a tangent, a vector) as `Chosen`: the inverse of `show`."""
        targets = given if self._several else (given,)
        if not isinstance(targets, (tuple, list)) or len(targets) != len(self._targets):
            raise TypeError(
                explain(
                    f"gave {what} of type {type(given).__name__} for {len(self._targets)} arguments",
                    "there is one for each argument that is differentiated",
                    "pass a tuple with one entry for each",
                )
            )
        found: dict[tuple[str, int], Any] = {}
        for target, value in zip(self._targets, targets, strict=True):
            target.take(value, found, what)
        wanted = [("leaf", p) for p in self._in_modules] + [("array", p) for p in self._in_arrays]
        values = []
        for mark, have in zip(wanted, self.values.values, strict=True):
            value = found[mark]
            if jnp.shape(value) != jnp.shape(have):
                raise ShapeError(
                    explain(
                        f"gave {what} of shape {jnp.shape(value)} for an array of shape "
                        f"{jnp.shape(have)}{self._name_of(mark)}",
                        "it has the shape of what it belongs to",
                        "pass an array of the same shape",
                    )
                )
            values.append(jnp.asarray(value, _tangent_dtype(have)))
        return Chosen(values)

    def _name_of(self, mark: tuple[str, int]) -> str:
        return f", {self.call.moduledef.leaf_names[mark[1]]!r}" if mark[0] == "leaf" else ""


def _tangent_dtype(value: Any) -> Any:
    dtype = jnp.result_type(value)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0


class _Target:
    """One argument to differentiate by."""

    def __init__(self, call: SplitCall, args: tuple, number: int, fun: Callable) -> None:
        if not -len(args) <= number < len(args):
            raise TypeError(
                explain(
                    f"differentiated argument {number} of {name_of(fun)}, called with {len(args)} "
                    "positional arguments",
                    "there is no such argument",
                    "pass it by position, or choose another one with argnums",
                )
            )
        self._call = call
        self._template = template(call.signature.treedef)[0][number % len(args)]
        marks = jax.tree_util.tree_leaves(self._template)
        roots = [call.roots[m.number] for m in marks if not m.is_leaf]
        # The trainable parameters of modules, and the other leaves.
        self.leaf_positions = [p for root in roots for p in call.positions_under(root)]
        self.array_positions = [m.number for m in marks if m.is_leaf]

    def shown(self, of_leaf: Mapping[int, Any], of_array: Mapping[int, Any]) -> Any:
        """Return the argument with other values in the place of what is differentiated."""

        def one(mark: Any) -> Any:
            if mark.is_leaf:
                return of_array[mark.number]
            names = self._names(self._call.roots[mark.number])
            if isinstance(names, int):
                return of_leaf[names]
            return {name: of_leaf[p] for name, p in names.items()}

        return jax.tree_util.tree_map(one, self._template)

    def take(self, given: Any, found: dict[tuple[str, int], Any], what: str) -> None:
        """Note the values of an argument in the user's terms under their positions."""
        marks, treedef = jax.tree_util.tree_flatten(self._template)
        try:
            parts = treedef.flatten_up_to(given)
        except ValueError as error:
            raise TypeError(
                explain(
                    f"gave {what} of another structure than the argument ({error})",
                    "each array of the argument has its own",
                    "pass the argument's structure, with a dict of name -> array for a module",
                )
            ) from None
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
                raise UnknownNameError(
                    explain(
                        f"gave {what} {got} for a module",
                        f"its trainable parameters are {sorted(names)}",
                        "pass a dict with one array for each of them",
                    )
                )
            found.update({("leaf", names[name]): v for name, v in value.items()})

    def _names(self, root: Any) -> Any:
        """Return the leaf position of each trainable parameter by name; of a box, the position."""
        if isinstance(root, Box):
            return self._call.positions_under(root)[0]
        position = {id(box): i for i, box in enumerate(self._call.plan.boxes)}
        return {name: position[id(p)] for name, p in root.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------------
# Checks


def name_of(fun: Callable) -> str:
    """Return a function's name for a message."""
    return getattr(fun, "__qualname__", repr(fun))


def real_scalar(fun: Callable) -> Callable[[Any], Any]:
    """Return a check that a loss is a real scalar; it returns the loss."""

    def view(loss: Any) -> Any:
        shape = getattr(loss, "shape", None if not isinstance(loss, (int, float)) else ())
        if shape != ():
            what = f"an array of shape {shape}" if shape is not None else f"a {type(loss).__name__}"
            hint = "return loss.mean()" if shape is not None else "return the scalar loss"
            if isinstance(loss, tuple):
                hint = "return the loss alone, or pass has_aux=True to return (loss, aux)"
            raise TypeError(
                explain(f"{name_of(fun)} returned {what}", "a gradient is that of a scalar", hint)
            )
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(
                explain(
                    f"{name_of(fun)} returned a loss of dtype {jnp.result_type(loss)}",
                    "a gradient is that of a real number",
                    "compute the loss in a floating dtype",
                )
            )
        return loss

    return view


def _pair(out: Any, fun: Callable) -> tuple:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            explain(
                f"{name_of(fun)} returned {type(out).__name__} with has_aux=True",
                "the loss and the auxiliary output are needed",
                "return a pair: return loss, aux",
            )
        )
    return out


def _arrays(out: Any, fun: Callable) -> Any:
    """Return a differentiated output with the values of its boxes; it cannot hold modules."""
    if isinstance(out, (jax.Array, np.ndarray, float)):
        return out
    if isinstance(out, Box):
        return out.value
    found = flatten_collecting(out)[2]
    for obj in found:
        if not isinstance(obj, Box):
            raise TypeError(
                explain(
                    f"{name_of(fun)} returned a {type(obj).__name__} as its differentiated output",
                    "a derivative is that of arrays",
                    "return arrays; has_aux=True passes anything else through: return out, model",
                )
            )
    if not found:
        return out
    return jax.tree_util.tree_map(
        lambda x: x.value if isinstance(x, Box) else x, out, is_leaf=lambda x: isinstance(x, Box)
    )


def _nothing_to_differentiate(
    fun: Callable, args: tuple, numbers: tuple[int, ...]
) -> UnusedModuleError:
    return UnusedModuleError(
        explain(
            f"differentiated {name_of(fun)} with respect to {type(args[numbers[0]]).__name__}",
            "it has no trainable parameters and holds no arrays, so the gradient is empty",
            "unfreeze what is to be trained, module.requires_grad_(True), or choose another argument "
            "with argnums",
        )
    )


def _never_read(fun: Callable, argument: Any) -> UnusedModuleError:
    return UnusedModuleError(
        explain(
            f"differentiated {name_of(fun)} with respect to {type(argument).__name__}",
            "it never read a parameter of that argument, so every gradient would be zero; it probably "
            "uses a module from outside",
            "use the argument inside the function: def loss_fn(model, x): return model(x).mean()",
        )
    )
