"""nn.scan, and what all loops share: steps of a user's function, with modules that are carried or sliced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.baked_in import probing
from statefulnn.core.box import Box
from statefulnn.core.generator import Generator
from statefulnn.core.module import Module
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.pytree import flatten_collecting, unflatten_with
from statefulnn.core.repeated import repeated
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.lift import SplitCall, Writes, leaves_below, several_unbound
from statefulnn.transforms.naming import as_users
from statefulnn.transforms.types import PyTree

Carry = TypeVar("Carry")
Out = TypeVar("Out")


@shortened
def scan(
    f: Callable[..., tuple[object, Out]],
    init: Carry,
    xs: object = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Carry, Out]:
    """Run ``carry, y = f(carry, x)`` over the first axis of `xs`, as ``jax.lax.scan``, with modules.

    What a step writes to a module in the carry is seen by the next one, and written back at the end. A
    module in `xs` is a stack of modules: each of its arrays has the leading axis, a step gets one slice
    as a module, and what it writes there goes into the stack. A generator that was not stacked is one
    stream for all steps.

    Args:
        f: one step; for a Module or a method of one, the module is carried.
        init: the first carry: arrays and modules in any pytree.
        xs: arrays with a leading axis to step over, and stacks of modules.
        length: the number of steps, if there are no `xs`.
        reverse: whether to go backwards.
        unroll: how many steps to compile into one.

    Returns:
        ``(carry, ys)``; modules in the carry are the caller's own, and so are slices of `xs` among the
        outputs. Any other module in an output comes back as a stack of what it was after each step.

    Raises:
        StructureChangeError: if a step returns a carry with other modules, or changes the shape or the
            dtype of what it carries.
        ShapeError: if a module is in the carry and in `xs`, or its arrays have no leading axis of the
            length of the others.

    Source: ``jax.lax.scan``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> norm = nn.BatchNorm1d(2)
        >>> def step(norm, x):
        ...     return norm, norm(x)
        >>> _, ys = nn.scan(step, norm, jnp.ones((5, 3, 2)))
        >>> ys.shape, int(norm.num_batches_tracked)
        ((5, 3, 2), 5)
        >>> layers = nn.vmap(lambda: nn.Linear(2, 2), axis_size=4)()
        >>> h, _ = nn.scan(lambda h, layer: (layer(h), None), jnp.ones(2), layers)
        >>> h.shape
        (2,)
    """
    return looped(f, init, xs, length, reverse, unroll)


def looped(
    f: Callable[..., tuple[object, Any]],
    init: PyTree,
    xs: PyTree,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    whole: Collection[Box] = (),
) -> tuple[Any, Any]:
    """Do what `scan` does; the boxes of `whole`, in modules of `xs`, are taken as they are by each step."""
    loop = Loop(_advance, (f,), init, xs, whole)
    loop.check_lengths(length)
    loop.learn()
    state, (ys, stacked) = jax.lax.scan(
        loop.step, loop.start, loop.inputs, length=length, reverse=reverse, unroll=unroll
    )
    return loop.finish(state, ys, stacked)


def _advance(f: Callable, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    result = f(carry, x)
    if not isinstance(result, tuple) or len(result) != 2:
        raise refusals.no_pair_of_a_step(type(result).__name__)
    return result


class Loop:
    """The arguments of a loop, taken apart: some boxes are carried, some sliced, the rest constant.

    Only what a step writes is carried. In reverse mode JAX keeps what is carried for every step, so weights
    that nobody writes would be kept as often as there are steps.

    Args:
        advance: one step, ``advance(f, carry, x, *extra) -> (carry, y)``.
        functions: the user's functions, the one of a step first; the owners of methods are carried.
        carry: the first carry.
        xs: what is stepped over.
        whole: boxes in `xs` that each step takes as they are.

    Attributes:
        call: all of it.
        sliced: the leaf positions that have an axis to step over.
    """

    def __init__(
        self,
        advance: Callable,
        functions: Sequence[Callable],
        carry: PyTree,
        xs: PyTree = None,
        whole: Collection[Box] = (),
    ) -> None:
        self._advance = advance
        self._functions, owners = several_unbound(functions)
        self._init = carry
        values, _, roots = flatten_collecting((owners, carry))
        self.call = call = SplitCall((((owners, carry), xs), {}))
        self._leaves, n = call.leaves, len(values)
        # The other arrays of the carry, and of what is stepped over.
        self._dynamic = call.dynamic[:n], call.dynamic[n:]
        kept = leaves_below(call.moduledef, range(len(roots)))
        # A generator that was not stacked has one state, four words: it is one stream for all steps.
        known = {id(box) for box in whole}
        self.sliced = [
            i
            for i in leaves_below(call.moduledef, range(len(roots), len(call.roots)))
            if id(call.plan.boxes[i]) not in known
            and (not isinstance(call.plan.boxes[i], Generator) or jnp.ndim(self._leaves[i]) > 1)
        ]
        # What a step writes, of which part is carried and part stacked; the others are constants.
        self._written: tuple[int, ...] = ()
        self._carried: list[int] = []
        self._stacked: list[int] = []
        for i in self.sliced:
            if i in kept:
                raise refusals.carried_and_cut(call.moduledef.leaf_names[i])

    def check_lengths(self, length: int | None = None) -> int:
        """Return the number of steps, or raise if the arrays to step over do not have one length."""
        names = self.call.moduledef.leaf_names
        named = [(repr(names[i]), self._leaves[i]) for i in self.sliced]
        lengths: dict[Any, str] = {} if length is None else {length: "length"}
        for name, value in [*(("an array of xs", v) for v in self._dynamic[1]), *named]:
            shape = jnp.shape(value)
            lengths.setdefault(shape[0] if shape else None, f"{name} of shape {shape}")
        if len(lengths) > 1 or None in lengths:
            raise refusals.other_lengths(lengths)
        return next(iter(lengths), 0)

    def learn(self, *extra: Any) -> None:
        """Find out by an abstract run what a step writes: only that has to be carried."""
        leaves, sliced = list(self._leaves), {*self.sliced}
        for i in sliced:
            leaves[i] = _slice_of(leaves[i])
        dynamic = [*self._dynamic[0], *map(_slice_of, self._dynamic[1])]
        with probing():
            run = as_users(self._run, self._functions[0])
            following, _, writes = jax.eval_shape(run, leaves, dynamic, *extra)
        self._check_carry(following)
        for i, new in zip(writes.indices, writes.values, strict=True):
            old = leaves[i] if i in sliced else jax.typeof(leaves[i])
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                name = self.call.moduledef.leaf_names[i]
                raise refusals.array_changed_by_step(name, described(old), described(new))
        self._written, self._out = writes.indices, writes.out
        self._carried = [i for i in writes.indices if i not in sliced]
        self._stacked = [i for i in writes.indices if i in sliced]

    def _check_carry(self, following: list[jax.ShapeDtypeStruct]) -> None:
        """Raise if a step gives an array of the carry another shape or dtype."""
        for i, (value, new) in enumerate(zip(self._dynamic[0], following, strict=True)):
            old = jax.typeof(value)
            # A Python number has no dtype of its own: JAX gives it the one that comes back.
            if old.shape != new.shape or (old.dtype != new.dtype and not old.weak_type):
                at = jax.tree_util.tree_flatten_with_path(
                    self._init, is_leaf=lambda v: isinstance(v, (ModuleBase, Box))
                )[0]
                paths = [path for path, v in at if not isinstance(v, (ModuleBase, Box))]
                name = f"carry{jax.tree_util.keystr(paths[i])}"
                raise refusals.array_changed_by_step(name, described(old), described(new))

    @property
    def start(self) -> tuple[list, list]:
        """The first state of the loop: the values of boxes that are carried, and other arrays."""
        return [self._leaves[i] for i in self._carried], self._dynamic[0]

    @property
    def inputs(self) -> tuple[list, list]:
        """What is cut into steps: the values of boxes, and other arrays."""
        return [self._leaves[i] for i in self.sliced], self._dynamic[1]

    def step(
        self, state: tuple[list, list], inputs: tuple[Sequence, Sequence] = ((), ()), *extra: Any
    ) -> tuple[tuple[list, list], tuple[PyTree, list]]:
        """Run one step, purely: return the next state, and (output, what it wrote to its slices)."""
        leaves, dynamic = self._at(state, inputs)
        # This trace returns every leaf that the abstract run saw written, whether it writes it or not: the
        # carry has the same leaves in each step.
        new, y, writes = self._run(leaves, dynamic, *extra)
        again = sorted({*writes.indices}.difference(self._written))
        if again:
            raise refusals.written_the_second_time(self.call.moduledef.leaf_names[again[0]])
        values = dict(zip(writes.indices, writes.values, strict=True))
        return (
            ([values[i] for i in self._carried], new),
            (y, [values[i] for i in self._stacked]),
        )

    def ask(self, state: tuple[list, list]) -> Any:
        """Call the second function with the carry, for reading alone."""
        run, asked = self.call.signature.run, lambda kept, _: self._functions[1](*kept)
        return run(asked, *self._at(state), lost=refusals.CONDITION)[0]

    def finish(
        self, state: tuple[list, list], ys: PyTree = None, stacked: Sequence[jax.Array] = ()
    ) -> tuple[PyTree, PyTree]:
        """Write back what the loop wrote, and return its carry and its outputs."""
        values, dynamic = state
        # The carry is rebuilt around the caller's own modules, whose boxes get the values in a moment.
        everything = [*dynamic, *self._dynamic[1]]
        ((_, carry), _), _ = unflatten_with(
            self.call.signature.treedef, everything, self.call.roots
        )
        writes = Writes((*self._carried, *self._stacked), [*values, *stacked], self._out)
        return carry, self.call.finish(ys, writes)

    def _at(
        self, state: tuple[list, list], inputs: tuple[Sequence, Sequence] = ((), ())
    ) -> tuple[list, list]:
        """Return the leaves and the other arrays as a step finds them."""
        leaves = list(self._leaves)
        for positions, values in ((self._carried, state[0]), (self.sliced, inputs[0])):
            for i, value in zip(positions, values, strict=True):
                leaves[i] = value
        return leaves, [*state[1], *inputs[1]]

    def _run(self, leaves: list, dynamic: list, *extra: Any) -> tuple[list, PyTree, Writes]:
        """Run one step: return the arrays of the next carry, the output, and what was written."""
        following: list[jax.Array] = []

        # The next carry goes beside the output. Its modules are those of the carry before, so only its arrays
        # are new.
        def body(kept: tuple, x: PyTree) -> PyTree:
            owners, carry = kept
            before = flatten_collecting(carry)
            new, y = self._advance(
                lambda *args: self._functions[0](owners, *args), carry, x, *extra
            )
            after = flatten_collecting(new)
            same = len(before[2]) == len(after[2]) and all(
                a is b for a, b in zip(before[2], after[2], strict=True)
            )
            if after[1] != before[1] or not same:
                raise refusals.other_carry()
            following.extend(after[0])
            return _snapshot(y, x)

        body.__wrapped__ = self._functions[0]
        with repeated():
            y, writes = self.call.signature.run(
                body, leaves, dynamic, returned=self._written, names=(("owners", "carry"), "x")
            )
        return following, y, writes


def _slice_of(value: ArrayLike) -> jax.ShapeDtypeStruct:
    of = jax.typeof(value)
    return jax.ShapeDtypeStruct(of.shape[1:], of.dtype, weak_type=of.weak_type)


def _snapshot(y: PyTree, x: PyTree) -> PyTree:
    """Copy the modules of an output that other steps will change; slices of `xs` stay what they are."""
    leaves, treedef, found = flatten_collecting(y)
    roots = [r for r in flatten_collecting(x)[2] if isinstance(r, Module)]
    own = {id(m) for root in roots for m in root.modules()}
    found = [m if id(m) in own else jax.tree.map(lambda v: v, m) for m in found]
    return unflatten_with(treedef, leaves, found) if found else y


def described(array: Any) -> str:
    """Return the dtype and shape of an array for a message."""
    return f"{array.dtype}{list(array.shape)}"
