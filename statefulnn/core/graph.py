"""split and merge: a module tree as a static half and a list of arrays, and back.

Terms
  leaves      the arrays of a module, each once: trainable parameters, frozen parameters, buffers,
              generators. A tied parameter is one leaf.
  ModuleDef   the static rest, see `core.moduledef`.
  Plan        what a root remembers of both, see `core.plan`.
  clone       a module that `merge` builds. Transformed code runs on clones.

Every transform of the package, and the registration as a pytree, is built on `plan_of` and
`build_clones`. Limitation: writing into ``module.__dict__`` by hand goes unseen.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import jax

from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.lending import lend
from statefulnn.core.moduledef import HOOKS, ModuleDef, NodeDef, rank
from statefulnn.core.objects import copied
from statefulnn.core.ownership import ModuleBase, Scope, set_cell, set_home, set_plan, set_shell
from statefulnn.core.plan import plan_of
from statefulnn.core.registry import HookDict, Registry
from statefulnn.core.stamps import Cell
from statefulnn.core.static_keys import BoundMethod


def build_clones(
    moduledef: ModuleDef,
    leaves: Sequence[Any],
    scope: Scope | None,
    parameter_scope: Scope | None = None,
    buffer_scope: Scope | None = None,
    into: Any = None,
) -> tuple[list[Any], list[Box], list[Any]]:
    """Build the modules of a ModuleDef around arrays.

    Args:
        moduledef: the static half.
        leaves: one array per leaf, in leaf order.
        scope: the owner of the clones.
        parameter_scope, buffer_scope: other owners of the parameters, and of buffers and generators.
        into: a bare module to use as the first root.

    Returns:
        the roots, the boxes in leaf order, all modules in node order.
    """
    parameter_scope = scope if parameter_scope is None else parameter_scope
    buffer_scope = scope if buffer_scope is None else buffer_scope
    numbered: list[Any] = [None] * len(leaves)
    boxes: list[Any] = [None] * len(leaves)
    stop = scope is not None and scope.stop_gradients
    for number, (cls, static) in enumerate(moduledef.boxes):
        position = moduledef.order[number]
        value = leaves[position]
        group = rank(cls, static)
        if stop and group and isinstance(value, jax.Array):
            value = _stopped(value)
        box = cls.clone_of(static, value, parameter_scope if group < 2 else buffer_scope, position)
        numbered[number] = boxes[position] = box

    modules = []
    for index, d in enumerate(moduledef.nodes):
        if into is not None and ("node", index) == moduledef.roots[0]:
            module = into
        else:
            module = object.__new__(d.cls)
        set_shell(module, None)
        set_plan(module, None)
        set_home(module, index)
        set_cell(module, Cell(scope))
        modules.append(module)
    for module, d in zip(modules, moduledef.nodes, strict=True):
        fill(module, d, modules, numbered)
    roots = [modules[i] if what == "node" else numbered[i] for what, i in moduledef.roots]
    return roots, boxes, modules


def _stopped(value: Any) -> Any:
    if jax.numpy.issubdtype(value.dtype, jax.numpy.inexact):
        return jax.lax.stop_gradient(value)
    return value


def fill(module: Any, d: NodeDef, modules: list[Any], boxes: list[Any]) -> None:
    """Give a bare module the attributes of its node."""
    cell = module._cell
    attributes = module.__dict__
    parameters, buffers, children = d.members
    attributes["_parameters"] = Registry(
        cell, [(k, None if i is None else boxes[i]) for k, i in parameters]
    )
    attributes["_buffers"] = Registry(
        cell, [(k, None if i is None else boxes[i]) for k, i in buffers]
    )
    attributes["_modules"] = Registry(
        cell, [(k, None if i is None else modules[i]) for k, i in children]
    )
    for name, what, i in d.references:
        attributes[name] = boxes[i] if what == "box" else modules[i]
    for name, value, copy in d.values:
        if copy:
            value = copied(value, lambda v: _rebind(v, modules))
            if copy == HOOKS:
                value = HookDict(cell, value)
        attributes[name] = value


def _rebind(value: Any, modules: list[Any]) -> Any:
    if type(value) is BoundMethod:
        return types.MethodType(value.function, modules[value.node])
    return value


def materialise(module: Any) -> None:
    """Turn a shell into a module."""
    shell = module._shell
    if shell is None:
        return
    moduledef, leaves, scope = shell
    build_clones(moduledef, leaves, scope, into=module)


def split(module: Any) -> tuple[ModuleDef, list[Any]]:
    """Return the static half of a module and its arrays.

    Args:
        module: a Module.

    Returns:
        ``(moduledef, leaves)``: trainable parameters first, then frozen ones, buffers, generators;
        a tied parameter is one leaf.

    Example:
        >>> import statefulnn as nn
        >>> moduledef, leaves = nn.split(nn.Linear(3, 4))
        >>> [leaf.shape for leaf in leaves]
        [(4, 3), (4,)]
        >>> nn.merge(moduledef, leaves)
        Linear(in_features=3, out_features=4, bias=True)
    """
    require_module(module, "nn.split")
    plan = plan_of(module)
    return plan.moduledef, plan.given_out()


def merge(moduledef: ModuleDef, leaves: Sequence[Any]) -> Any:
    """Build a module from what `split` gave; inside a traced function it may be written.

    Args:
        moduledef: the static half.
        leaves: one array per leaf, with the shapes that `split` gave or others.

    Returns:
        a new Module that shares nothing with the one that was split.

    Raises:
        ShapeError: for a wrong number of leaves.
    """
    leaves = list(leaves)
    if len(leaves) != moduledef.num_leaves:
        raise ShapeError(
            explain(
                f"merged {moduledef!r} with {len(leaves)} leaves",
                f"it has {moduledef.num_leaves} leaves",
                "pass the list that nn.split gave, changed in place or mapped one to one",
            )
        )
    return build_clones(moduledef, list(map(lend, leaves)), own_scope(moduledef))[0][0]


def own_scope(moduledef: ModuleDef) -> Scope | None:
    """Return the scope of clones that somebody collects: None outside every trace."""
    if current_trace() is EAGER:
        return None
    return Scope(moduledef=moduledef)


def mutable(module: Any) -> Any:
    """Return a copy of a module that may be written, for code that returns the updated module.

    Args:
        module: a Module, mostly one that a plain JAX transformation passed in.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> @jax.jit
        ... def double(model):
        ...     model = nn.mutable(model)
        ...     model.weight.value = model.weight * 2
        ...     return model
        >>> model = nn.Linear(2, 2)
        >>> bool((double(model).weight == 2 * model.weight).all())
        True
    """
    require_module(module, "nn.mutable")
    shell = module._shell
    if shell is not None:
        moduledef, leaves = shell[:2]
        if shell[2] is not None and shell[2].stop_gradients:
            materialise(module)
            moduledef, leaves = split(module)
    else:
        moduledef, leaves = split(module)
    return merge(moduledef, list(leaves))


def require_module(module: Any, function: str) -> None:
    """Raise unless the argument is a Module."""
    if not isinstance(module, ModuleBase):
        hint = f"{module.__name__}(...)" if isinstance(module, type) else "an instance of nn.Module"
        raise TypeError(
            explain(
                f"called {function} with an object of type {type(module).__name__}",
                "it works on modules",
                f"pass {hint}",
            )
        )
