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
from typing import Any, TypeVar

import jax

from statefulnn.core import refusals
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.lending import lend
from statefulnn.core.moduledef import HOOKS, ModuleDef, NodeDef, rank
from statefulnn.core.objects import copied
from statefulnn.core.ownership import ModuleBase, Scope, set_home, set_plan, set_shell, set_stamp
from statefulnn.core.placement import Value
from statefulnn.core.plan import plan_of
from statefulnn.core.registry import REGISTRIES, HookDict, Registry
from statefulnn.core.stamps import Stamp
from statefulnn.core.static_keys import BoundMethod

M = TypeVar("M", bound=ModuleBase)


def build_clones(
    moduledef: ModuleDef,
    leaves: Sequence[object],
    scope: Scope | None,
    parameter_scope: Scope | None = None,
    buffer_scope: Scope | None = None,
    into: ModuleBase | None = None,
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
    stop = scope is not None and scope.stop_gradients
    # Boxes are numbered as the walk met them, leaves by kind: `order` leads from one to the other.
    numbered: list[Any] = [None] * len(leaves)
    boxes: list[Any] = [None] * len(leaves)
    for number, (cls, static) in enumerate(moduledef.boxes):
        position = moduledef.order[number]
        group = rank(cls, static)
        # A raw jax.grad differentiates all leaves; what is not trained is a constant.
        value = _stopped(leaves[position]) if stop and group else leaves[position]
        owner = parameter_scope if group < 2 else buffer_scope
        numbered[number] = boxes[position] = cls.clone_of(static, value, owner, position)

    # All modules are there before the first is filled, so that shared ones and cycles need no thought.
    modules = []
    for index, d in enumerate(moduledef.nodes):
        is_root = into is not None and ("node", index) == moduledef.roots[0]
        modules.append(bare(into if is_root else object.__new__(d.cls), index, scope))
    for module, d in zip(modules, moduledef.nodes, strict=True):
        fill(module, d, modules, numbered)
    roots = [modules[i] if what == "node" else numbered[i] for what, i in moduledef.roots]
    return roots, boxes, modules


def bare(module: Any, number: int, scope: Scope | None) -> Any:
    """Make a module of a new object, which `fill` gives its attributes."""
    set_shell(module, None)
    set_plan(module, None)
    set_home(module, number)
    set_stamp(module, Stamp(scope))
    return module


def _stopped(value: object) -> object:
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.numpy.inexact):
        return jax.lax.stop_gradient(value)
    return value


def fill(module: ModuleBase, d: NodeDef, modules: Sequence[Any], boxes: Sequence[Box]) -> None:
    """Give a bare module the attributes of its node."""

    def bound(value: object) -> Any:
        if type(value) is BoundMethod:
            return types.MethodType(value.function, modules[value.node])
        return value

    stamp = module._nn_stamp
    attributes = module.__dict__
    for name, members, held in zip(REGISTRIES, d.members, (boxes, boxes, modules), strict=True):
        items = [(k, None if i is None else held[i]) for k, i in members]
        attributes[name] = Registry(stamp, items)
    for name, what, i in d.references:
        attributes[name] = boxes[i] if what == "box" else modules[i]
    for name, value, copy in d.values:
        if copy:
            # A ModuleDef is immutable, so each clone has what can change in place for itself.
            value = copied(value, bound)
            if copy == HOOKS:
                value = HookDict(stamp, value)
        attributes[name] = value


def unpack_shell(module: ModuleBase) -> None:
    """Turn a shell into a module."""
    shell = module._nn_shell
    if shell is None:
        return
    moduledef, leaves, scope = shell
    build_clones(moduledef, leaves, scope, into=module)


def split(module: ModuleBase) -> tuple[ModuleDef, list[jax.Array]]:
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


def merge(moduledef: ModuleDef, leaves: Sequence[Value]) -> Any:
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
        raise refusals.other_number_of_leaves(repr(moduledef), len(leaves), moduledef.num_leaves)
    # Whoever gave the leaves may still hold them.
    return build_clones(moduledef, list(map(lend, leaves)), own_scope(moduledef))[0][0]


def own_scope(moduledef: ModuleDef) -> Scope | None:
    """Return the scope of clones that somebody collects: None outside every trace."""
    return None if current_trace() is EAGER else Scope(moduledef=moduledef)


def mutable(module: M) -> M:
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
    shell = module._nn_shell
    # A shell has its leaves at hand; only where gradients are to be stopped must it be looked into.
    if shell is not None and shell[2] is not None and shell[2].stop_gradients:
        unpack_shell(module)
        shell = None
    moduledef, leaves = split(module) if shell is None else shell[:2]
    return merge(moduledef, list(leaves))


def require_module(module: object, function: str) -> None:
    """Raise unless the argument is a Module."""
    if not isinstance(module, ModuleBase):
        hint = f"{module.__name__}(...)" if isinstance(module, type) else "an instance of nn.Module"
        raise refusals.no_module(type(module).__name__, function, hint)
