"""nn.cond and nn.switch: one of several functions, chosen by a traced value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

from statefulnn.core.baked_in import probing
from statefulnn.core.pytree import unflatten_with
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.lift import SplitCall, Writes, several_unbound
from statefulnn.transforms.naming import argument_names, source_of
from statefulnn.transforms.scan import described
from statefulnn.transforms.types import PyTree, R


@shortened
def cond(
    pred: ArrayLike, true_fun: Callable[..., R], false_fun: Callable[..., R], *operands: object
) -> R:
    """Run one of two functions on the operands, as ``jax.lax.cond``, with modules.

    What the function that ran wrote to its modules is written back. A box that only the other one writes
    keeps its value, and a draw in the other one advances no generator.

    Args:
        pred: a boolean scalar.
        true_fun, false_fun: the functions; a Module or a method of one is a function too.
        operands: arrays and modules in any pytree.

    Returns:
        what the function returned; modules among the operands come back as the caller's own.

    Raises:
        StructureChangeError: if the functions return other structures, shapes or dtypes, or leave a box
            with another shape or dtype.

    Source: ``jax.lax.cond``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> norm = nn.BatchNorm1d(2)
        >>> @nn.jit
        ... def maybe(norm, x, wanted):
        ...     return nn.cond(wanted, lambda norm, x: norm(x), lambda norm, x: x, norm, x)
        >>> _ = maybe(norm, jnp.ones((3, 2)), False)
        >>> _ = maybe(norm, jnp.ones((3, 2)), True)
        >>> int(norm.num_batches_tracked), maybe.trace_count
        (1, 1)
    """
    choose = functools.partial(jax.lax.cond, pred)
    return _branched(choose, ("true_fun", "false_fun"), (true_fun, false_fun), operands)


@shortened
def switch(index: ArrayLike, branches: Sequence[Callable[..., R]], *operands: object) -> R:
    """Run the function with this number on the operands, as ``jax.lax.switch``, with modules.

    See `cond`. An index that is too small or too large chooses the first or the last function.

    Args:
        index: an integer scalar.
        branches: the functions; a Module or a method of one is a function too.
        operands: arrays and modules in any pytree.

    Returns:
        what the function returned; modules among the operands come back as the caller's own.

    Raises:
        StructureChangeError: if the functions return other structures, shapes or dtypes, or leave a box
            with another shape or dtype.

    Source: ``jax.lax.switch``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> experts = [nn.Linear(2, 3) for _ in range(4)]
        >>> nn.switch(2, experts, jnp.ones((5, 2))).shape
        (5, 3)
    """
    names = [f"branches[{i}]" for i in range(len(branches))]

    def choose(*arguments: Any) -> Any:
        return jax.lax.switch(index, arguments[: len(names)], *arguments[len(names) :])

    return _branched(choose, names, branches, operands)


def _branched(
    choose: Callable, names: Sequence[str], functions: Sequence[Callable], operands: tuple
) -> Any:
    for name, function in zip(names, functions, strict=True):
        if not callable(function):
            raise refusals.no_branch(name, repr(function))
    branches, owners = several_unbound(functions)
    call = SplitCall(((owners, *operands), {}))
    signature, leaves = call.signature, call.leaves
    # The owners come first, see `several_unbound`.
    named = [(b, ["owners", *argument_names(source_of(b), len(operands))]) for b in branches]
    # The branches of a conditional return the same arrays, but each may write other boxes. So a first,
    # abstract run tells which boxes any of them writes; then each returns the values of all of these.
    with probing():
        tried = [
            jax.eval_shape(signature.pure(b, names=names), leaves, call.dynamic)
            for b, names in named
        ]
    indices = sorted({i for _, writes in tried for i in writes.indices})
    for name, one in zip(names[1:], tried[1:], strict=True):
        _check_alike(call, (names[0], name), tried[0], one, indices)
    pure = [signature.pure(b, names=names, returned=indices) for b, names in named]
    return call.finish(*choose(*pure, leaves, call.dynamic))


def _check_alike(
    call: SplitCall, names: tuple[str, str], first: tuple, other: tuple, indices: list[int]
) -> None:
    """Raise if two branches do not return, or leave in boxes, arrays of one structure and type."""
    outputs = [_parts(call, *tried) for tried in (first, other)]
    boxes = []
    for _, writes in (first, other):
        after = dict(zip(writes.indices, writes.values, strict=True))
        # What a branch does not write it leaves as it was.
        values = {i: after.get(i, jax.typeof(call.leaves[i])) for i in indices}
        boxes.append({repr(call.moduledef.leaf_names[i]): described(v) for i, v in values.items()})
    for what, (a, b) in (("returned", outputs), ("left", boxes)):
        for part in sorted(dict.fromkeys((*a, *b)), key=_WHOLE.__eq__):  # the parts first
            if a.get(part) != b.get(part):
                found = a.get(part, "nothing"), b.get(part, "nothing")
                raise refusals.branches_differ(names, what, found, part)


_WHOLE = "the output, taken as a whole"


class _Stand(NamedTuple):
    """Stands for a module or box in a branch's output; compares by which one it is."""

    what: str
    key: object

    def __str__(self) -> str:
        return self.what


def _parts(call: SplitCall, out: PyTree, writes: Writes) -> dict[str, object]:
    """Return what stands in each part of a branch's output, by the path of the part."""
    # Modules are gone from the output by now: the description says where they were, and which.
    if writes.out is not None:
        count, *items = writes.out.items
        stands = [_stand(call, item, out) for item in items]
        out = unflatten_with(writes.out.treedef, out[:count], stands)
    leaves = jax.tree_util.tree_flatten_with_path(out, is_leaf=lambda v: isinstance(v, _Stand))[0]
    parts = {
        f"the output{jax.tree_util.keystr(path)}": v if isinstance(v, _Stand) else described(v)
        for path, v in leaves
    }
    structure = jax.tree_util.tree_structure(out, is_leaf=lambda v: isinstance(v, _Stand))
    return {**parts, _WHOLE: structure}


def _stand(call: SplitCall, item: tuple, arrays: Sequence[jax.Array]) -> _Stand:
    if item[0] == "new":
        held = ", ".join(described(v) for v in arrays[item[2] : item[3]])
        return _Stand(f"a new {item[1]!r} of {held}", (item[1], held))
    number = item[1]
    if item[0] == "box":
        return _Stand(f"the box {call.moduledef.leaf_names[number]!r}", item)
    root, *names = call.moduledef.paths[number] or ("?",)
    kind = call.moduledef.nodes[number].cls.__name__
    return _Stand(f"the {kind} {'.'.join((f'[{root}]', *names))!r}", item)
