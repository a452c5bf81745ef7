"""nn.custom_vjp: a function of modules and arrays with a backward pass of its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from statefulnn.core.box import Box, reads
from statefulnn.core.compat import EAGER, Tracer, current_trace, kind, may_be_around, trace_of
from statefulnn.core.errors import (
    DtypeError,
    ShapeError,
    StateWriteError,
    TraceLeakError,
    UnknownNameError,
    explain,
)
from statefulnn.core.graph import build_clones
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.ownership import Scope
from statefulnn.core.plan import build_plan
from statefulnn.core.pytree import flatten_collecting, unflatten_with
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.differentiate import function_name
from statefulnn.transforms.lift import Mark, SplitCall, Writes, spread, template, unbound
from statefulnn.transforms.naming import as_users, told_as
from statefulnn.transforms.types import P, R


class custom_vjp(Generic[P, R]):
    """Give a function of modules and arrays a backward pass of its own, as ``jax.custom_vjp``.

    Set it by ``f.defvjp(fwd, bwd)``. ``fwd(*args) -> (out, residuals)`` runs in place of the function
    when a gradient is taken, and writes to modules what the function writes. ``bwd(residuals, cotangent)``
    returns a tuple with one entry per argument: the cotangent of an array; for a module a dict of dotted
    name -> array as ``nn.grad`` gives it, of which names may be missing; None for zeros.

    What is written to modules is written back, once, and passes no gradient on. Residuals may hold modules;
    in `bwd` these are copies that can be read only. Under ``nn.shard_map`` the cotangent of a replicated
    array is a ``jax.lax.psum``.

    Args:
        fun: a function of modules and arrays, a Module or a method of one; the module is the first argument
            of `fwd` and has the first entry of what `bwd` returns.
        nondiff_argnums: positions of arguments that are no arrays, such as functions and numbers. `bwd` is
            given them first, ``bwd(*nondiff, residuals, cotangent)``, and returns no entries for them.

    Returns:
        a function with `fun`'s arguments.

    Raises:
        UnknownNameError: if `bwd` names what is no trainable parameter of the module.
        ShapeError, DtypeError: if a cotangent has another shape, or dtype, than its argument.
        StateWriteError: if `fwd` writes other arrays than `fun`, where both run (as under ``nn.jit``).
        TraceLeakError: if a function of it, or one among its arguments, closes over a module or an array
            that is differentiated outside.

    Source: ``jax.custom_vjp``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> @nn.custom_vjp
        ... def scaled(layer, x):
        ...     return layer.weight * x
        >>> def fwd(layer, x):
        ...     return scaled(layer, x), (layer, x)
        >>> def bwd(residuals, g):  # the gradient of the weight, cut off at 1
        ...     layer, x = residuals
        ...     return {"weight": jnp.clip(g * x, -1, 1)}, g * layer.weight
        >>> scaled.defvjp(fwd, bwd)
        >>> layer = nn.PReLU(init=2.0)
        >>> loss = lambda layer, x: scaled(layer, x).sum()
        >>> (
        ...     nn.grad(loss)(layer, jnp.array([3.0])),
        ...     nn.grad(loss, argnums=1)(layer, jnp.array([3.0])),
        ... )
        ({'weight': Array([1.], dtype=float32)}, Array([2.], dtype=float32))
    """

    def __init__(self, fun: Callable[P, R], nondiff_argnums: int | Iterable[int] = ()) -> None:
        self.fun, self.__self__ = unbound(fun)  # as a method has it: nn.jit passes the module in
        numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else nondiff_argnums
        self.nondiff_argnums = tuple(sorted(n + (self.__self__ is not None) for n in numbers))
        self.fwd: Callable | None = None
        self.bwd: Callable | None = None
        functools.update_wrapper(self, self.fun, updated=())

    def defvjp(self, fwd: Callable, bwd: Callable) -> None:
        """Set the forward pass that keeps residuals, and the backward pass that uses them."""
        self.fwd, self.bwd = fwd, bwd

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__func__(*(() if self.__self__ is None else (self.__self__,)), *args, **kwargs)

    @shortened
    def __func__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; if it is a module's, the module is the first argument."""
        if self.fwd is None or self.bwd is None:
            raise _no_rule(self.fun)
        bound = inspect.signature(self.fun).bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise _keyword_only(self.fun, bound.kwargs)
        fixed = {i: bound.args[i] for i in self.nondiff_argnums}
        leaves, _, roots = flatten_collecting(list(fixed.values()))
        if roots or any(isinstance(v, Tracer) for v in leaves):
            raise _traced(self.fun, self.nondiff_argnums)
        call = SplitCall((tuple(None if i in fixed else a for i, a in enumerate(bound.args)), {}))
        rule = _Rule(call, fixed, self.fun, self.fwd, self.bwd)
        vjp = jax.custom_vjp(as_users(rule.primal, self.fun))
        vjp.defvjp(as_users(rule.forward, self.fwd), rule.backward)
        out, written = vjp(call.leaves, call.dynamic)
        if current_trace() is not EAGER:
            # JAX marks every output as one that lanes differ in and gradients flow through. A copy, cut off
            # from gradients, of a value that neither is true of is a plain value again.
            written.values = [jnp.copy(jax.lax.stop_gradient(v)) for v in written.values]
        return call.finish(out, written)


class _Rule:
    """The three functions of one call, on arrays; it refers to no module of the caller's."""

    def __init__(
        self, call: SplitCall, fixed: dict[int, Any], fun: Callable, fwd: Callable, bwd: Callable
    ) -> None:
        self._signature, self._fixed = call.signature, fixed
        self._fun, self._fwd, self._bwd = fun, fwd, bwd
        self._written: tuple[int, ...] | None = None
        self._like = [(jnp.shape(v), jnp.result_type(v)) for v in (*call.leaves, *call.dynamic)]
        # For each module or box in the arguments, its trainable parameters: name -> leaf position.
        self._names = [
            dict(
                zip(
                    build_plan([root]).moduledef.leaf_names,
                    call.positions_under(root),
                    strict=False,
                )
            )
            for root in call.roots
        ]

    def primal(self, leaves: list[Any], dynamic: list[Any]) -> tuple[Any, Writes]:
        """Run the function."""
        return self._run(self._fun, leaves, dynamic)

    def forward(self, leaves: list[Any], dynamic: list[Any]) -> tuple[tuple[Any, Writes], Partial]:
        """Run `fwd`: return what `primal` does, and what gives the residuals back."""
        kept: list[Partial] = []

        def body(*args: Any) -> Any:
            result = self._fwd(*args)
            if not isinstance(result, tuple) or len(result) != 2:
                raise _no_pair(self._fwd, result)
            arrays, treedef, roots = flatten_collecting(result[1])
            plan = build_plan(roots)
            readable = functools.partial(_readable, treedef, plan.moduledef)
            kept.append(Partial(readable, arrays, list(plan.leaves())))
            return result[0]

        told_as(body, self._fwd)
        return self._run(body, leaves, dynamic), kept.pop()

    def _run(self, function: Callable, leaves: list[Any], dynamic: list[Any]) -> tuple[Any, Writes]:
        def with_fixed(*args: Any) -> Any:
            return function(*(self._fixed.get(i, a) for i, a in enumerate(args)))

        told_as(with_fixed, function)
        with _arguments_only(self._fun):
            out, written = self._signature.run(with_fixed, leaves, dynamic)
        if written.out is not None:
            raise _returned_module(self._fun)
        before, self._written = self._written, written.indices
        if before not in (None, written.indices):
            differ = sorted({*before} ^ {*written.indices})
            raise _other_writes([self._signature.moduledef.leaf_names[i] for i in differ])
        return out, written

    def backward(self, residuals: Partial, cotangent: tuple[Any, Any]) -> tuple[list, list]:
        """Run `bwd`: return the cotangents of leaves and of other arrays, None for zeros."""
        with _arguments_only(self._fun):
            given = self._bwd(*self._fixed.values(), residuals(), cotangent[0])
        args = template(self._signature.treedef)[0]
        wanted = len(args) - len(self._fixed)
        if not isinstance(given, (tuple, list)) or len(given) != wanted:
            raise _wrong_entries(self._bwd, f"{wanted} entries", given)
        entries = iter(given)
        full = tuple(None if i in self._fixed else next(entries) for i in range(len(args)))
        try:
            marks = list(spread(full, args))
        except ValueError as error:
            wrong = f"the structure of the arguments ({error})"
            raise _wrong_entries(self._bwd, wrong, given) from None
        found: list[Any] = [None] * len(self._like)
        for mark, entry in marks:
            for i, value in self._of_argument(mark, entry):
                self._check(i, value)
                found[i] = value if found[i] is None else found[i] + value  # two arguments share it
        leaves = self._signature.moduledef.num_leaves
        return found[:leaves], found[leaves:]

    def _of_argument(self, mark: Mark, entry: object) -> Iterator[tuple[int, Any]]:
        """Yield what `bwd` returned for one argument, or a part of one: position, cotangent."""
        moduledef = self._signature.moduledef
        if mark.is_leaf:
            entries = {moduledef.num_leaves + mark.number: entry}
        elif moduledef.roots[mark.number][0] == "box":
            (position,) = self._names[mark.number].values()
            entries = {position: entry}
        else:
            names = self._names[mark.number]
            entry = {} if entry is None else entry
            if not isinstance(entry, Mapping) or entry.keys() - names:
                raise _unknown_names(self._bwd, entry, list(names))
            entries = {names[name]: value for name, value in entry.items()}
        yield from ((i, value) for i, value in entries.items() if value is not None)

    def _check(self, position: int, value: Any) -> None:
        """Raise unless a cotangent has the shape and dtype of what it belongs to."""
        shape, dtype = self._like[position]
        dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0
        got = getattr(value, "dtype", None) or jnp.result_type(value)
        if jnp.shape(value) == shape and got == dtype:
            return
        names = self._signature.moduledef.leaf_names
        what = repr(names[position]) if position < len(names) else "an array argument"
        error = DtypeError if jnp.shape(value) == shape else ShapeError
        raise error(
            explain(
                f"{function_name(self._bwd)} returned a cotangent {got}{list(jnp.shape(value))} for {what}",
                f"a cotangent is as what it belongs to, here {dtype}{list(shape)}",
                "return an array like the argument, or None for zeros",
            )
        )


def _readable(treedef: object, moduledef: ModuleDef, arrays: list[Any], leaves: list[Any]) -> Any:
    """Return residuals as `fwd` returned them, with modules that can be read only."""
    lost = (
        "a module among the residuals is a copy, which nobody looks at after the backward pass",
        "write in the forward pass; or return the value as the cotangent of an argument",
    )
    roots, _, _ = build_clones(moduledef, leaves, Scope(False, lost, moduledef))
    return unflatten_with(treedef, arrays, roots)


# --------------------------------------------------------------------------------------------------
# Errors


@contextlib.contextmanager
def _arguments_only(fun: Callable) -> Iterator[None]:
    """Raise where a value is used that is differentiated outside; JAX's own text is about something else."""

    def check(box: Box) -> None:
        home = trace_of(box._value)
        if kind(home) == "autodiff" and not may_be_around(home, current_trace()):
            raise _closed_over(fun, box.label())

    token = reads.set(check)
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise _closed_over(fun, "a module or an array") from error
    finally:
        reads.reset(token)


def _closed_over(fun: Callable, what: str) -> TraceLeakError:
    return TraceLeakError(
        explain(
            f"{function_name(fun)}, an nn.custom_vjp, or a function among its nondiff_argnums, used {what}, "
            "which is differentiated outside and none of its arguments",
            "the backward pass gives cotangents of arguments alone, so this gradient would be lost",
            "make it an argument, f(module, x), for which bwd returns a cotangent, or None for zeros",
        )
    )


def _no_rule(fun: Callable) -> AttributeError:
    return AttributeError(
        explain(
            f"called {function_name(fun)}, an nn.custom_vjp without a rule",
            "its backward pass is not known",
            "call f.defvjp(fwd, bwd) first",
        )
    )


def _keyword_only(fun: Callable, kwargs: Mapping[str, Any]) -> TypeError:
    return TypeError(
        explain(
            f"called {function_name(fun)}, an nn.custom_vjp, with keyword-only arguments {sorted(kwargs)}",
            "fwd and bwd know arguments by position",
            "give the function ordinary parameters, without * and **",
        )
    )


def _traced(fun: Callable, numbers: Sequence[int]) -> TypeError:
    return TypeError(
        explain(
            f"called {function_name(fun)} with a module or a traced array among its nondiff_argnums "
            f"{numbers}",
            "these are for what is no array: functions, numbers, settings",
            "make it an ordinary argument, for which bwd returns None",
        )
    )


def _no_pair(fwd: Callable, result: object) -> TypeError:
    return TypeError(
        explain(
            f"{function_name(fwd)} returned {type(result).__name__} as the forward pass of an nn.custom_vjp",
            "the output and the residuals are needed",
            "return a pair: return out, residuals",
        )
    )


def _returned_module(fun: Callable) -> TypeError:
    return TypeError(
        explain(
            f"{function_name(fun)}, an nn.custom_vjp, returned a module, or a box of one",
            "a cotangent is that of arrays",
            "return arrays (p.value); what is written to a module in the arguments is written back",
        )
    )


def _other_writes(names: Sequence[str]) -> StateWriteError:
    return StateWriteError(
        explain(
            f"wrote to {', '.join(map(repr, names))} in only one of a function and its forward pass",
            "one of them runs in place of the other, so both must change the same arrays",
            "call the function in fwd: return f(*args), residuals",
        )
    )


def _wrong_entries(bwd: Callable, wanted: str, given: object) -> TypeError:
    count = f" of length {len(given)}" if isinstance(given, (tuple, list)) else ""
    return TypeError(
        explain(
            f"{function_name(bwd)} returned {type(given).__name__}{count}, and not {wanted}",
            "there is one entry for each argument that is not in nondiff_argnums",
            "return a tuple: a cotangent for an array, a dict of name -> array for a module, None for zeros",
        )
    )


def _unknown_names(bwd: Callable, entry: object, names: list[str]) -> UnknownNameError:
    got = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
    return UnknownNameError(
        explain(
            f"{function_name(bwd)} returned {got} for a module",
            f"its trainable parameters are {names}",
            "return a dict of some of them; those that are missing get zeros",
        )
    )
