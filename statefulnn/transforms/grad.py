"""nn.grad and nn.value_and_grad: gradients with respect to a module's trainable parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.box import Box, Parameter
from statefulnn.core.errors import UnusedModuleError, explain
from statefulnn.transforms.lift import Call, restore_output, run, template


def value_and_grad(
    fun: Callable | None = None, argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Any:
    """Return a function that computes a loss and its gradient.

    Args:
        fun: returns a scalar, or with `has_aux` a pair of a scalar and anything.
        argnums: which argument, or arguments, to differentiate: a Module, a Parameter, or arrays.
        has_aux: whether `fun` returns a pair.

    Returns:
        a function with `fun`'s arguments that returns ``(value, grads)`` or ``((value, aux), grads)``.
        For a Module, `grads` is a dict of dotted name -> array of its trainable parameters, each tied
        parameter once. What `fun` writes to modules (running statistics, generators) is written back.

    Raises:
        UnusedModuleError: if `fun` never reads the module it is differentiated by.
        TypeError: if the loss is no real scalar.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Linear(2, 1)
        >>> loss_fn = lambda model, x: model(x).sum()
        >>> loss, grads = nn.value_and_grad(loss_fn)(model, jnp.ones((3, 2)))
        >>> grads["bias"].tolist()
        [3.0]
    """
    if fun is None:
        return functools.partial(value_and_grad, argnums=argnums, has_aux=has_aux)
    several = not isinstance(argnums, int)
    numbers = tuple(argnums) if several else (argnums,)

    @functools.wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        targets = [_Target(args, n, fun) for n in numbers]
        call = Call((args, kwargs))
        leaves = list(call.plan.leaves())
        # Positions to differentiate: among the leaves of modules, and among the other leaves.
        in_modules = sorted({p for t in targets for p in t.leaf_positions(call)})
        in_arrays = sorted({p for t in targets for p in t.array_positions(call)})
        if not in_modules and not in_arrays:
            raise _nothing_to_differentiate(fun, args, numbers)
        scopes: list[Any] = []

        def loss_of(chosen: tuple[list, list]) -> tuple[Any, Any]:
            ours, dynamic = list(leaves), list(call.dynamic)
            for p, v in zip(in_modules, chosen[0], strict=True):
                ours[p] = v
            for p, v in zip(in_arrays, chosen[1], strict=True):
                dynamic[p] = v
            out, written = run(
                fun,
                call.moduledef,
                call.treedef,
                call.generator is not None,
                ours,
                dynamic,
                on_scope=scopes.append,
            )
            loss, aux = _loss_and_aux(out, written, has_aux, fun)
            return loss, (aux, written)

        chosen = ([leaves[p] for p in in_modules], [call.dynamic[p] for p in in_arrays])
        (loss, (aux, written)), (by_leaf, by_array) = jax.value_and_grad(loss_of, has_aux=True)(
            chosen
        )
        if in_modules and not in_arrays and not scopes[0].read:
            raise _never_read(fun, args, numbers)
        call.write_back(written)
        of_leaf = dict(zip(in_modules, by_leaf, strict=True))
        of_array = dict(zip(in_arrays, by_array, strict=True))
        grads = [t.gradient(call, of_leaf, of_array) for t in targets]
        if has_aux and written.out is not None:
            aux = _pair(restore_output(aux, written.out, call.plan, call.roots), fun)[1]
        value = (loss, aux) if has_aux else loss
        return value, tuple(grads) if several else grads[0]

    return wrapper


def grad(
    fun: Callable | None = None, argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Any:
    """Return a function that computes the gradient of a loss; see `value_and_grad`.

    Args:
        fun: returns a scalar, or with `has_aux` a pair of a scalar and anything.
        argnums: which argument, or arguments, to differentiate.
        has_aux: whether `fun` returns a pair.

    Returns:
        a function that returns ``grads``, or ``(grads, aux)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> grads = nn.grad(lambda model, x: model(x).sum())(nn.Linear(2, 1), jnp.ones((3, 2)))
        >>> sorted(grads)
        ['bias', 'weight']
    """
    if fun is None:
        return functools.partial(grad, argnums=argnums, has_aux=has_aux)
    both = value_and_grad(fun, argnums, has_aux)

    @functools.wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapper


class _Target:
    """One argument to differentiate."""

    def __init__(self, args: tuple, number: int, fun: Callable) -> None:
        if not -len(args) <= number < len(args):
            raise TypeError(
                explain(
                    f"differentiated argument {number} of {_name(fun)}, called with {len(args)} "
                    "positional arguments",
                    "there is no such argument",
                    "pass it by position, or choose another one with argnums",
                )
            )
        self.number = number % len(args)

    def _marks(self, call: Call) -> list[Any]:
        return jax.tree_util.tree_leaves(template(call.treedef)[0][self.number])

    def leaf_positions(self, call: Call) -> list[int]:
        """Return the leaf positions of the trainable parameters in the argument."""
        roots = [call.roots[m.number] for m in self._marks(call) if not m.is_leaf]
        return [p for root in roots for p in call.positions_under(root)]

    def array_positions(self, call: Call) -> list[int]:
        """Return the positions of the argument's other leaves."""
        return [m.number for m in self._marks(call) if m.is_leaf]

    def gradient(self, call: Call, of_leaf: dict[int, Any], of_array: dict[int, Any]) -> Any:
        """Return the argument with gradients in the place of what was differentiated."""

        def one(mark: Any) -> Any:
            if mark.is_leaf:
                return of_array[mark.number]
            root = call.roots[mark.number]
            if isinstance(root, Box):
                return of_leaf[call.positions_under(root)[0]]
            return _by_name(root, call, of_leaf)

        return jax.tree_util.tree_map(one, template(call.treedef)[0][self.number])


def _by_name(module: Any, call: Call, of_leaf: dict[int, Any]) -> dict[str, Any]:
    position = {id(box): i for i, box in enumerate(call.plan.boxes)}
    return {
        name: of_leaf[position[id(p)]] for name, p in module.named_parameters() if p.requires_grad
    }


def _loss_and_aux(out: Any, written: Any, has_aux: bool, fun: Callable) -> tuple[Any, Any]:
    if has_aux:
        if written.out is not None:
            # The pair was taken apart because aux holds modules; its first leaf is the loss.
            return _scalar(out[0], fun), out
        _pair(out, fun)
        return _scalar(out[0], fun), out[1]
    return _scalar(out, fun), None


def _pair(out: Any, fun: Callable) -> tuple:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            explain(
                f"{_name(fun)} returned {type(out).__name__} with has_aux=True",
                "the loss and the auxiliary output are needed",
                "return a pair: return loss, aux",
            )
        )
    return out


def _scalar(loss: Any, fun: Callable) -> Any:
    if isinstance(loss, Parameter):
        loss = loss.value
    shape = getattr(loss, "shape", None if not isinstance(loss, (int, float)) else ())
    if shape != ():
        what = f"an array of shape {shape}" if shape is not None else f"a {type(loss).__name__}"
        hint = "return loss.mean()" if shape is not None else "return the scalar loss"
        if isinstance(loss, tuple):
            hint = "return the loss alone, or pass has_aux=True to return (loss, aux)"
        raise TypeError(
            explain(f"{_name(fun)} returned {what}", "a gradient is that of a scalar", hint)
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            explain(
                f"{_name(fun)} returned a loss of dtype {jnp.result_type(loss)}",
                "a gradient is that of a real number",
                "compute the loss in a floating dtype",
            )
        )
    return loss


def _nothing_to_differentiate(
    fun: Callable, args: tuple, numbers: tuple[int, ...]
) -> UnusedModuleError:
    return UnusedModuleError(
        explain(
            f"differentiated {_name(fun)} with respect to {type(args[numbers[0]]).__name__}",
            "it has no trainable parameters and holds no arrays, so the gradient is empty",
            "unfreeze what is to be trained, module.requires_grad_(True), or choose another argument "
            "with argnums",
        )
    )


def _never_read(fun: Callable, args: tuple, numbers: tuple[int, ...]) -> UnusedModuleError:
    what = type(args[numbers[0]]).__name__
    return UnusedModuleError(
        explain(
            f"differentiated {_name(fun)} with respect to {what}",
            "it never read a parameter of that argument, so every gradient would be zero; it probably "
            "uses a module from outside",
            "use the argument inside the function: def loss_fn(model, x): return model(x).mean()",
        )
    )


def _name(fun: Callable) -> str:
    return getattr(fun, "__qualname__", repr(fun))
