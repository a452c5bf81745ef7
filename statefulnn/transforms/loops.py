"""nn.while_loop, nn.fori_loop, nn.map and nn.associative_scan: the other loops, with modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.baked_in import probing
from statefulnn.core.errors import TraceLeakError
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.lift import SplitCall, Writes, several_unbound
from statefulnn.transforms.naming import told_as
from statefulnn.transforms.scan import Loop, scan
from statefulnn.transforms.types import PyTree, R
from statefulnn.transforms.vmap import vmap


@shortened
def while_loop(cond_fun: Callable, body_fun: Callable[..., R], init_val: object) -> R:
    """Run ``val = body_fun(val)`` while ``cond_fun(val)``, as ``jax.lax.while_loop``, with modules.

    What a step writes to a module in `val` is seen by the next one and by the condition, and written back
    at the end. As in JAX, forward mode passes such a loop and reverse mode does not.

    Args:
        cond_fun: gives a boolean scalar; it may read modules, and neither write nor draw.
        body_fun: one step; for a Module or a method of one, the module is carried. So it is for `cond_fun`.
        init_val: the first value: arrays and modules in any pytree.

    Returns:
        the last value; modules in it are the caller's own.

    Raises:
        StateWriteError: if `cond_fun` writes to a module.
        StructureChangeError: if a step returns other modules, or changes the shape or the dtype of what it
            carries.

    Source: ``jax.lax.while_loop``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.Linear(2, 2)
        >>> def halve(layer):
        ...     layer.weight.value = layer.weight / 2
        ...     return layer
        >>> layer = nn.while_loop(lambda layer: jnp.abs(layer.weight).max() > 0.01, halve, layer)
        >>> bool(jnp.abs(layer.weight).max() <= 0.01)
        True
    """
    loop = Loop(lambda f, carry, _: (f(carry), None), (body_fun, cond_fun), init_val)
    loop.learn()
    ask = told_as(lambda val: loop.ask(val), cond_fun)
    state = jax.lax.while_loop(ask, lambda state: loop.step(state)[0], loop.start)
    return loop.finish(state)[0]


@shortened
def fori_loop(
    lower: ArrayLike,
    upper: ArrayLike,
    body_fun: Callable[..., R],
    init_val: object,
    *,
    unroll: int | bool | None = None,
) -> R:
    """Run ``val = body_fun(i, val)`` for i from `lower` to `upper`, as ``jax.lax.fori_loop``, with modules.

    What a step writes to a module in `val` is seen by the next one, and written back at the end. As in
    JAX, reverse mode passes the loop if both bounds are Python integers.

    Args:
        lower: the first index, an integer.
        upper: the index after the last one.
        body_fun: one step; for a Module or a method of one, the module is carried.
        init_val: the first value: arrays and modules in any pytree.
        unroll: how many steps to compile into one; both bounds must be Python integers.

    Returns:
        the last value; modules in it are the caller's own.

    Raises:
        StructureChangeError: if a step returns other modules, or changes the shape or the dtype of what it
            carries.

    Source: ``jax.lax.fori_loop``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> norm = nn.BatchNorm1d(2)
        >>> def step(i, carry):
        ...     norm, x = carry
        ...     return norm, norm(x) + i
        >>> _ = nn.fori_loop(0, 3, step, (norm, jnp.ones((4, 2))))
        >>> int(norm.num_batches_tracked)
        3
    """
    loop = Loop(lambda f, carry, _, i: (f(i, carry), None), (body_fun,), init_val)
    loop.learn(lower)
    step = lambda i, state: loop.step(state, ((), ()), i)[0]
    return loop.finish(jax.lax.fori_loop(lower, upper, step, loop.start, unroll=unroll))[0]


@shortened
def map(f: Callable, xs: PyTree, *, batch_size: int | None = None) -> PyTree:
    """Call a function on each slice of `xs`, one after the other, as ``jax.lax.map``, with modules.

    What a call writes to the module whose call or method `f` is, is seen by the next one, and written
    back at the end. With a `batch_size`, the calls of one batch run side by side, as in `vmap`: they share
    the module and have to write the same to it, and each draws its own numbers.

    Args:
        f: a function of one slice; a Module or a method of one is a function too.
        xs: arrays with a leading axis, and stacks of modules (see `scan`).
        batch_size: how many calls to run side by side; 0 for all of them.

    Returns:
        the outputs, stacked.

    Raises:
        ValueError: if `batch_size` is no integer from 0.
        StateWriteError: if calls of one batch write different values to what they share.

    Source: ``jax.lax.map``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> norm = nn.BatchNorm1d(2)
        >>> nn.map(norm, jnp.ones((5, 3, 2))).shape, int(norm.num_batches_tracked)
        ((5, 3, 2), 5)
    """
    (one,), owners = several_unbound((f,))
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 0):
        raise refusals.no_batch_size(batch_size)
    if batch_size is None:
        step = told_as(lambda owners, x: (owners, one(owners, x)), one)
        return scan(step, owners, xs)[1]
    loop = Loop(lambda f, carry, x: (carry, f(x)), (f,), (), xs)
    size = loop.check_lengths()
    # Whole batches are a scan of vmaps; the elements that are left over at the end are one more vmap.
    width = batch_size or size or 1
    full = size - size % width
    lanes = vmap(one, in_axes=(None, 0))
    batches = lambda owners, xs: scan(lambda o, x: (o, lanes(o, x)), owners, xs)[1]
    parts = [
        _Part(batches, 0, full, (full // width, width)),
        _Part(lanes, full, size, (size - full,)),
    ]
    values, outputs = loop.call.leaves, []
    # What one part writes, the next one finds; without elements, one part runs for the shapes of the output.
    for part in [p for p in parts if p.start < p.stop] or parts[:1]:
        out, writes = part.run(loop, values)
        outputs.append(out)
    # As in `Signature.run`: a box was written if its array is not the one that went in.
    indices = tuple(i for i, v in enumerate(values) if v is not loop.call.plan.boxes[i]._value)
    out = jax.tree.map(lambda *v: jnp.concatenate(v), *outputs)
    return loop.call.finish(out, Writes(indices, [values[i] for i in indices], writes.out))


class _Part(NamedTuple):
    """Consecutive elements of what is mapped over, the shape their axis takes, and what is called on them."""

    function: Callable
    start: int
    stop: int
    shape: tuple[int, ...]

    def run(self, loop: Loop, values: list[Any]) -> tuple[PyTree, Writes]:
        """Return the output of this part, one row an element; put what it wrote into the leaves."""
        cut = lambda v: v[self.start : self.stop].reshape(*self.shape, *v.shape[1:])
        joined = lambda v: v.reshape(self.stop - self.start, *v.shape[len(self.shape) :])
        leaves = [cut(v) if i in loop.sliced else v for i, v in enumerate(values)]
        pure = lambda kept, xs: self.function(kept[0], xs)
        out, writes = loop.call.run(pure, leaves, [cut(v) for v in loop.call.dynamic])
        for i, new in zip(writes.indices, writes.values, strict=True):
            if i in loop.sliced:
                new = values[i].at[self.start : self.stop].set(joined(new))
            values[i] = new
        return jax.tree.map(joined, out), writes


@shortened
def associative_scan(
    fn: Callable[..., R], elems: object, reverse: bool = False, axis: int = 0
) -> R:
    """Combine elements along an axis with an associative function, as ``jax.lax.associative_scan``.

    JAX calls the function a few times on many pairs at once, in a tree whose shape is its own affair. So
    modules may be read there, and a write has no order: it is refused, as is a draw.

    Args:
        fn: combines two elements, elementwise along the axis; a Module or a method of one is a function
            too.
        elems: arrays with the axis, in any pytree.
        reverse: whether to go backwards.
        axis: the axis.

    Returns:
        at each place, all elements up to it combined.

    Raises:
        StateWriteError: if `fn` writes to a module.

    Source: ``jax.lax.associative_scan``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> product = nn.Bilinear(1, 1, 1, bias=False)
        >>> product.weight.value = jnp.ones((1, 1, 1))
        >>> nn.associative_scan(product, jnp.asarray([[1.0], [2.0], [3.0]])).ravel().tolist()
        [1.0, 2.0, 6.0]
    """
    (combine,), owners = several_unbound((fn,))
    call = SplitCall(((owners,), {}))

    def pure(a: PyTree, b: PyTree) -> PyTree:
        combined: list[PyTree] = []
        body = lambda owners: combined.append(combine(owners, a, b))
        call.signature.run(body, call.leaves, (), lost=refusals.NO_ORDER)
        return combined.pop()

    told_as(pure, combine)
    # An abstract run first: what is wrong is said once, and not in the middle of JAX's tree of calls.
    try:
        with probing():  # JAX may call it outside of every trace, where a closure could write
            jax.eval_shape(pure, elems, elems)
    except TraceLeakError as error:
        what = str(error).partition("\n")[0]
        raise refusals.write_without_order(what) from error
    return jax.lax.associative_scan(pure, elems, reverse, axis)
