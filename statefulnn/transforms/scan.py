"""nn.scan: a loop whose carry may hold modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from statefulnn.core.errors import StructureChangeError, explain
from statefulnn.core.pytree import flatten_collecting, unflatten_with
from statefulnn.transforms.lift import SplitCall, Writes


def scan(
    f: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """Run ``carry, y = f(carry, x)`` over the first axis of `xs`, as ``jax.lax.scan``, with modules.

    What a step writes to a module in the carry is seen by the next one, and written back at the end.

    Args:
        f: one step.
        init: the first carry: arrays and modules in any pytree.
        xs: arrays with a leading axis to step over.
        length: the number of steps, if there are no `xs`.
        reverse: whether to go backwards.
        unroll: how many steps to compile into one.

    Returns:
        ``(carry, ys)``; modules in the carry are the caller's own.

    Raises:
        StructureChangeError: if a step returns a carry with other modules.

    Source: ``jax.lax.scan``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> norm = nn.BatchNorm1d(2)
        >>> def step(norm, x):
        ...     return norm, norm(x)
        >>> _, ys = nn.scan(step, norm, jnp.ones((5, 3, 2)))
        >>> ys.shape, int(norm.num_batches_tracked)
        ((5, 3, 2), 5)
    """
    call = SplitCall(((init,), {}))
    leaves = call.leaves
    start = call.dynamic

    def step(leaves: list, dynamic: list, x: Any) -> tuple[list, Any, Writes]:
        ys: list[Any] = []

        def body(carry: Any) -> list:
            before = flatten_collecting(carry)
            result = f(carry, x)
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(
                    explain(
                        f"a scanned function returned {type(result).__name__}",
                        "a step gives the next carry and an output",
                        "return a pair: return carry, y",
                    )
                )
            after = flatten_collecting(result[0])
            same = len(before[2]) == len(after[2]) and all(
                a is b for a, b in zip(before[2], after[2], strict=True)
            )
            if after[1] != before[1] or not same:
                raise StructureChangeError(
                    explain(
                        "a scanned function returned a carry of another structure, or other modules",
                        "each step goes on with the carry of the one before",
                        "return the same modules, changed in place, and arrays in the same places",
                    )
                )
            ys.append(result[1])
            return after[0]

        new, written = call.run(body, leaves, dynamic)
        return new, ys[0], written

    # Only what a step writes has to be carried; an abstract run tells what that is.
    first = None if xs is None else jax.tree_util.tree_map(lambda v: v[0], xs)
    indices: list[int] = []

    def discover(leaves: list, dynamic: list, x: Any) -> Any:
        new, ys, written = step(leaves, dynamic, x)
        indices[:] = written.indices
        return new, ys

    if xs is None or all(len(v) for v in jax.tree_util.tree_leaves(xs)):
        jax.eval_shape(discover, leaves, start, first)

    def carried(carry: tuple[list, list], x: Any) -> Any:
        full = list(leaves)
        for i, value in zip(indices, carry[0], strict=True):
            full[i] = value
        new, ys, written = step(full, carry[1], x)
        values = dict(zip(written.indices, written.values, strict=True))
        return ([values.get(i, full[i]) for i in indices], new), ys

    (values, final), ys = jax.lax.scan(
        carried,
        ([leaves[i] for i in indices], start),
        xs,
        length=length,
        reverse=reverse,
        unroll=unroll,
    )
    (carry,), _ = unflatten_with(call.signature.treedef, final, call.roots)
    return call.finish((carry, ys), Writes(tuple(indices), values))
