"""Modules and boxes as JAX pytrees.

Term
  shell       a module that came out of a JAX transformation and has not been looked at: it keeps its
              ModuleDef and leaves, and becomes a module at the first access to an attribute.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from statefulnn.core.box import Box, Buffer, Parameter
from statefulnn.core.compat import EAGER, current_trace, is_forward_mode, kind, trace_of
from statefulnn.core.errors import UntrainedLeavesWarning, explain, user_stack_level
from statefulnn.core.generator import Generator
from statefulnn.core.lending import lend, note_rebuilt
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.objects import copied
from statefulnn.core.ownership import LOST_IN_RAW_TRANSFORM, Scope, set_shell
from statefulnn.core.plan import plan_of


class Token(int):
    """Stands for a collected module or box in a treedef: its number."""

    __slots__ = ()


_tokens = [Token(i) for i in range(64)]


class _Collecting(threading.local):
    found: list[Any] | None = None  # while flattening: collect modules and boxes instead of leaves
    table: Sequence[Any] = ()  # while unflattening: what tokens stand for


_collecting = _Collecting()


def flatten_collecting(tree: Any) -> tuple[list[Any], Any, list[Any]]:
    """Flatten a pytree; modules and boxes are not entered but returned beside the leaves."""
    before, _collecting.found = _collecting.found, []
    try:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        return leaves, treedef, _collecting.found
    finally:
        _collecting.found = before


def unflatten_with(treedef: Any, leaves: Any, table: Sequence[Any]) -> Any:
    """Undo `flatten_collecting`, with other modules and boxes in the place of the collected ones."""
    before, _collecting.table = _collecting.table, table
    try:
        return jax.tree_util.tree_unflatten(treedef, leaves)
    finally:
        _collecting.table = before


def _collect(obj: Any, found: list[Any]) -> tuple[tuple, Token]:
    index = len(found)
    found.append(obj)
    return (), _tokens[index] if index < 64 else Token(index)


def flatten_module(module: Any) -> tuple[Any, Any]:
    found = _collecting.found
    if found is not None:
        return _collect(module, found)
    shell = module._shell
    if shell is not None:
        return shell[1], shell[0]
    plan = module._plan
    if plan is None or not plan.valid():
        plan = plan_of(module)
    if current_trace() is not EAGER:
        plan.note_read()
    return plan.cached_leaves or plan.leaves(), plan.moduledef


def flatten_module_with_keys(module: Any) -> tuple[Any, Any]:
    leaves, aux = flatten_module(module)
    if type(aux) is Token:
        return (), aux
    names = aux.leaf_names
    return [(jax.tree_util.GetAttrKey(n), v) for n, v in zip(names, leaves, strict=True)], aux


def unflatten_module(aux: Any, leaves: Any) -> Any:
    if type(aux) is Token:
        return _collecting.table[aux]
    root = aux.nodes[aux.roots[0][1]]
    module = object.__new__(root.cls)
    scope = raw_scope(aux, leaves)
    set_shell(module, (aux, leaves, scope))
    if scope is None:
        note_rebuilt(module)
    if root.shadowing:
        # A class attribute of that name would answer in the shell's place.
        for name, value, copy in root.shadowing:
            object.__setattr__(module, name, copied(value, lambda v: v) if copy else value)
    return module


def raw_scope(moduledef: ModuleDef, leaves: Sequence[Any]) -> Scope | None:
    """Return the owner of what JAX itself rebuilds: nobody under a trace, the user outside."""
    trace = current_trace()
    if trace is EAGER:
        return None
    scope = Scope(False, LOST_IN_RAW_TRANSFORM, moduledef)
    # jax.grad differentiates every leaf it is given; buffers and frozen parameters are constants.
    scope.stop_gradients = kind(trace) == "autodiff"
    if scope.stop_gradients and not is_forward_mode(trace):
        _warn_of_zeros(moduledef, leaves, trace)
    return scope


def _warn_of_zeros(moduledef: ModuleDef, leaves: Sequence[Any], trace: Any) -> None:
    """Warn if what is differentiated holds numbers that are not trained; Python does so once a line."""
    start = moduledef.count("trainable")
    untrained = [
        i
        for i, leaf in enumerate(leaves[start:], start)
        if trace_of(leaf) is trace and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
    ]
    if not untrained:
        return
    names = [moduledef.leaf_names[i] for i in untrained]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    warnings.warn(
        explain(
            f"took the gradient of a whole {moduledef.nodes[0].cls.__name__} by a plain JAX "
            "transformation (jax.grad, jax.vjp ...), with frozen parameters or buffers: "
            f"{', '.join(map(repr, names[:5]))}{more}",
            "the result holds zeros for them; an optimizer that works on the whole module, such as "
            "optax.adamw, would still move them, by weight decay for instance",
            "grads = nn.grad(loss)(model) and nn.Optimizer(model, tx).step(grads), which leave out what "
            "is not trained; or jax.grad and optax over the params of "
            "fn, params, state = nn.functionalize(model, mutable=True)",
        ),
        UntrainedLeavesWarning,
        stacklevel=user_stack_level(),
    )


def flatten_box(box: Box) -> tuple[tuple, Any]:
    found = _collecting.found
    if found is not None:
        return _collect(box, found)
    return (box.out(),), (type(box), box.static_part())


def unflatten_box(aux: Any, children: Any) -> Any:
    if type(aux) is Token:
        return _collecting.table[aux]
    cls, static = aux
    scope = None
    trace = current_trace()
    if trace is not EAGER:
        scope = Scope(False, LOST_IN_RAW_TRANSFORM)
    box = cls.clone_of(static, children[0], scope, 0)
    if scope is None:
        box._home = None
        lend(children[0])
    return box


for _cls in (Parameter, Buffer, Generator):
    jax.tree_util.register_pytree_node(_cls, flatten_box, unflatten_box)
