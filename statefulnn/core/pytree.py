"""Modules and boxes as JAX pytrees.

Term
  shell       a module that came out of a JAX transformation and has not been looked at: it keeps its
              ModuleDef and leaves, and becomes a module at the first access to an attribute.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax

from statefulnn.core import refusals
from statefulnn.core.box import Box
from statefulnn.core.bypassed import note_copy, settle
from statefulnn.core.compat import EAGER, current_trace, is_forward_mode, kind, trace_of
from statefulnn.core.errors import UntrainedLeavesWarning, user_stack_level
from statefulnn.core.generator import Generator
from statefulnn.core.lending import lend, note_rebuilt
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.objects import copied
from statefulnn.core.ownership import ModuleBase, Scope, Trace, set_shell
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.placement import Value
from statefulnn.core.plan import plan_of

# A jax.tree_util.PyTreeDef, which type checkers do not take for a class.
Treedef: TypeAlias = Any


class Token(int):
    """Stands for a collected module or box in a treedef: its number."""

    __slots__ = ()


# The treedefs of calls are compared by their tokens; those of most calls are made once.
_tokens = [Token(i) for i in range(64)]


# JAX gives the functions of a node class no arguments of our own, so what they are to do is said here.
class _Collecting(threading.local):
    found: list[Any] | None = None  # while flattening: collect modules and boxes instead of leaves
    table: Sequence[Any] = ()  # while unflattening: what tokens stand for


_collecting = _Collecting()


def flatten_collecting(tree: object) -> tuple[list[Any], Treedef, list[Any]]:
    """Flatten a pytree; modules and boxes are not entered but returned beside the leaves."""
    before, _collecting.found = _collecting.found, []
    try:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        return leaves, treedef, _collecting.found
    finally:
        _collecting.found = before


def unflatten_with(treedef: Treedef, leaves: Iterable[Any], table: Sequence[Any]) -> Any:
    """Undo `flatten_collecting`, with other modules and boxes in place of the collected ones."""
    before, _collecting.table = _collecting.table, table
    try:
        return jax.tree_util.tree_unflatten(treedef, leaves)
    finally:
        _collecting.table = before


def _collect(obj: ModuleBase | Box, found: list[Any]) -> tuple[tuple, Token]:
    index = len(found)
    found.append(obj)
    return (), _tokens[index] if index < 64 else Token(index)


def flatten_module(module: ModuleBase) -> tuple[Any, ModuleDef | Token]:
    """Return the leaves of a module and its ModuleDef, or what stands for it in `flatten_collecting`."""
    found = _collecting.found
    if found is not None:
        return _collect(module, found)
    # Nobody has looked at a shell, so it is as it was built: most modules between two calls are.
    shell = module._nn_shell
    if shell is not None:
        return shell[1], shell[0]
    plan = plan_of(module)
    if current_trace() is not EAGER:
        plan.note_read()
    return plan.cached_leaves or plan.leaves(), plan.moduledef


def flatten_module_with_keys(module: ModuleBase) -> tuple[Any, ModuleDef | Token]:
    """Do as `flatten_module` does, and name each leaf."""
    leaves, aux = flatten_module(module)
    if isinstance(aux, Token):
        return (), aux
    names = aux.leaf_names
    return [(jax.tree_util.GetAttrKey(n), v) for n, v in zip(names, leaves, strict=True)], aux


def unflatten_module(aux: ModuleDef | Token, leaves: Iterable[Any]) -> Any:
    """Build a shell, or return what a token stands for.

    A shell holds the leaves as JAX gave them, and they may be anything: JAX itself rebuilds trees of
    booleans, None or its own markers. So nothing is read of them here, and a module that only passes
    through costs no walk.
    """
    if isinstance(aux, Token):
        return _collecting.table[aux]
    root = aux.nodes[aux.roots[0][1]]
    module = object.__new__(root.cls)
    scope = raw_scope(aux, leaves)
    set_shell(module, (aux, leaves, scope))
    # `jax.tree.map` may hand on arrays that the module it came from still holds.
    if scope is None:
        note_rebuilt(module)
    # Any other attribute is asked of `Module.__getattr__`, which builds the module; but a class attribute
    # of that name would answer in the shell's place.
    for name, value, copy in root.shadowing:
        object.__setattr__(module, name, copied(value, lambda v: v) if copy else value)
    return module


def raw_scope(moduledef: ModuleDef, leaves: Iterable[Value]) -> Scope | None:
    """Return the owner of what JAX itself rebuilds: nobody under a trace, the user outside."""
    trace = current_trace()
    if trace is EAGER:
        return None
    scope = Scope(False, refusals.LOST_IN_RAW_TRANSFORM, moduledef)
    # jax.grad differentiates every leaf it is given; buffers and frozen parameters are constants.
    scope.stop_gradients = kind(trace) == "autodiff"
    if scope.stop_gradients and not is_forward_mode(trace):
        _warn_of_zeros(moduledef, leaves, trace)
    return scope


def _warn_of_zeros(moduledef: ModuleDef, leaves: Iterable[Value], trace: Trace) -> None:
    """Warn if what is differentiated holds numbers that are not trained; Python does so once a line."""
    names = [
        moduledef.leaf_names[i]
        for i, leaf in enumerate(leaves)
        if moduledef.kind_of(i) != "trainable"
        and trace_of(leaf) is trace
        and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
    ]
    if names:
        text = refusals.gradient_with_zeros(moduledef.nodes[0].cls.__name__, names)
        warnings.warn(text, UntrainedLeavesWarning, stacklevel=user_stack_level())


def flatten_box(box: Box) -> tuple[tuple, Any]:
    """Return the array of a box and its kind, or what stands for it in `flatten_collecting`."""
    found = _collecting.found
    if found is not None:
        return _collect(box, found)
    return (box.out(),), (box.clone_class, box.static_part())


def unflatten_box(aux: Any, children: Sequence[Any]) -> Any:
    """Build a box, or return what a token stands for."""
    if isinstance(aux, Token):
        return _collecting.table[aux]
    cls, static = aux
    scope = None if current_trace() is EAGER else Scope(False, refusals.LOST_IN_RAW_TRANSFORM)
    box = cls.clone_of(static, children[0], scope, 0)
    settle(children)
    if scope is not None:
        note_copy(children[0], scope)
    else:
        box._nn_home = None
        lend(children[0])  # the box that it comes from may hold the same array
    return box


for _cls in (Parameter, Buffer, Generator):
    jax.tree_util.register_pytree_node(_cls, flatten_box, unflatten_box)
