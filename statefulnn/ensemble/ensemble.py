"""Ensemble: the members as one module whose arrays have a leading axis, the members' axis.

A call maps over that axis with ``nn.vmap``, so that each member has its own state and its own random numbers,
and n small models cost about as many operations as one.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.errors import ShapeError, StructureChangeError, explain
from statefulnn.core.graph import merge, split
from statefulnn.core.module import Module
from statefulnn.core.plan import plan_of
from statefulnn.core.state_dict import IncompatibleKeys
from statefulnn.core.tracebacks import shortened
from statefulnn.core.walk import owned
from statefulnn.ensemble._building import build, check_factory, described, first_key, stacked
from statefulnn.ensemble._state_dicts import stacked_dicts, unstacked
from statefulnn.transforms.lift import call_module
from statefulnn.transforms.types import PyTree
from statefulnn.transforms.vmap import vmap


class Ensemble(Module):
    """n members of one structure that are called and trained together.

    All members are built in one compiled call, whatever their number. Member i starts with the values
    that ``make_member()`` gives under ``nn.rng_scope(jax.random.fold_in(key, i))``, so a larger
    ensemble of the same key begins with the smaller one. The parameters and buffers of all members are
    those of one module, `stack`, with a leading axis of n; gradients, optimizers and ``state_dict`` see
    these.

    Args:
        make_member: a class or function without arguments that builds one member. It is called while
            JAX traces, twice. What it draws comes from the generator in force, as ``nn.init`` and the
            layers do, or from ``nn.next_key()``.
        n: how many members, at least 1.
        rng: a random key or an integer seed; None draws a key from the generator in force.

    Attributes:
        stack: the members as one module of their structure, each array ``(n, ...)``. It is not to be
            called itself: `map` and the call of the ensemble give each member its part.

    Raises:
        ValueError: for ``n < 1``, for a member without arrays, or if `make_member` draws from another
            generator, gives another structure at each call, or looks at the values it has drawn.
        TypeError: if `make_member` is no function, or returns no Module.
        UninitializedParameterError: if a member has lazy or meta parameters.

    Limitations: a compilation takes about a second for a small network and more for a deep one, since
    each shape is drawn by code of its own; for a few large members `Ensemble.of` is quicker.

    Source: Lakshminarayanan, Pritzel and Blundell 2017, "Simple and scalable predictive uncertainty
    estimation using deep ensembles"; ``torch.func.stack_module_state``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> ensemble = nn.Ensemble(
        ...     lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)), 5
        ... )
        >>> x = jnp.ones((4, 2))
        >>> ensemble(x).shape, ensemble.mean(x).shape
        ((5, 4, 3), (4, 3))
        >>> ensemble(jnp.ones((5, 4, 2)), in_axes=0).shape  # for each member its own inputs
        (5, 4, 3)
        >>> ensemble.stack[0].weight.shape
        (5, 8, 2)
    """

    stack: Any

    @shortened
    def __init__(
        self, make_member: Callable[[], Module], n: int, *, rng: jax.Array | None = None
    ) -> None:
        super().__init__()
        check_factory(make_member)
        n = operator.index(n)
        if n < 1:
            raise ValueError(
                explain(
                    f"made an Ensemble of {n} members",
                    "it has at least one",
                    "nn.Ensemble(make_member, 5)",
                )
            )
        self.stack = owned(merge(*build(make_member, n, first_key(rng))))

    @classmethod
    @shortened
    def of(cls, models: Sequence[Module]) -> Self:
        """Return the ensemble of models that exist; their arrays are copied.

        Args:
            models: modules of one structure, in the same mode.

        Raises:
            ValueError: for no models, or models that differ in structure, mode or shapes.
            TypeError: if one is no Module, or for different dtypes.

        Source: ``torch.func.stack_module_state``.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> models = [nn.Linear(2, 1) for _ in range(3)]
            >>> bool((nn.Ensemble.of(models)(jnp.ones(2))[1] == models[1](jnp.ones(2))).all())
            True
        """
        self = cls.__new__(cls)
        Module.__init__(self)
        self.stack = owned(merge(*stacked(list(models))))
        return self

    def __len__(self) -> int:
        # A shape is known where the value is not, and is no reading of it.
        return plan_of(self.stack).boxes[0]._value.shape[0]

    def extra_repr(self) -> str:
        """Return the number of members."""
        return f"n={len(self)}"

    # ----------------------------------------------------------------------------------------------
    # Calls

    def forward(self, *inputs: object, in_axes: PyTree = None, **kwargs: object) -> Any:
        """Call every member.

        Args:
            inputs: what a member takes; with an axis in `in_axes`, n of them.
            in_axes: the members' axis of the inputs: None if all members see the same, an integer, or a
                tuple with one entry for each input, as for ``nn.vmap``.
            kwargs: keyword arguments, the same for all members.

        Returns:
            The outputs, stacked: ``(n, ...)``.

        Raises:
            ShapeError: if an input has no such axis of n entries.
        """
        return self.map(call_module, *inputs, in_axes=in_axes, **kwargs)

    @shortened
    def map(
        self, fn: Callable[..., Any], /, *inputs: object, in_axes: PyTree = None, **kwargs: object
    ) -> Any:
        """Call a function with every member, such as one that computes a member's loss.

        What it writes to the member (running statistics, parameters) is kept, and its random numbers are
        others for each member.

        Args:
            fn: ``fn(member, *inputs, **kwargs)``.
            inputs: what the function takes; with an axis in `in_axes`, n of them.
            in_axes: the members' axis of the inputs, see `forward`.
            kwargs: keyword arguments, the same for all members.

        Returns:
            What the function returned, stacked: ``(n, ...)``.

        Raises:
            ShapeError: if an input has no such axis of n entries.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn, statefulnn.functional as F
            >>> ensemble = nn.Ensemble(lambda: nn.Linear(2, 3), 5)
            >>> x, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
            >>> ensemble.map(lambda member, x, y: F.cross_entropy(member(x), y), x, labels).shape
            (5,)
        """
        axes = _checked_axes(inputs, in_axes, len(self))
        own = [j for j, axis in enumerate(axes) if axis is not None]

        def lane(member: Module, *parts: Any) -> Any:
            # What all members see is closed over: it may be anything, such as a flag or None.
            full = list(inputs)
            for j, part in zip(own, parts, strict=True):
                full[j] = part
            return fn(member, *full, **kwargs)

        in_axes = (0, *(axes[j] for j in own))
        return vmap(lane, in_axes=in_axes)(self.stack, *(inputs[j] for j in own))

    @shortened
    def mean(
        self, *inputs: object, of: Callable[[Any], Any] | None = None, **kwargs: object
    ) -> Any:
        """Return the mean of the members' outputs.

        Args:
            inputs: see `forward`.
            of: a function of a member's output whose values are averaged instead, such as
                ``jax.nn.softmax`` for the mean of probabilities.
            kwargs: see `forward`.

        Example:
            >>> import jax, jax.numpy as jnp, statefulnn as nn
            >>> probabilities = nn.Ensemble(lambda: nn.Linear(2, 3), 5).mean(
            ...     jnp.ones(2), of=jax.nn.softmax
            ... )
            >>> round(float(probabilities.sum()), 4)
            1.0
        """
        return jax.tree.map(lambda v: v.mean(0), self._outputs(inputs, of, kwargs))

    @shortened
    def variance(
        self, *inputs: object, of: Callable[[Any], Any] | None = None, **kwargs: object
    ) -> Any:
        """Return the variance of the outputs over the members, the mean squared distance from `mean`.

        Args:
            inputs: see `forward`.
            of: a function of a member's output whose values are meant instead.
            kwargs: see `forward`.
        """
        return jax.tree.map(lambda v: v.var(0), self._outputs(inputs, of, kwargs))

    def _outputs(self, inputs: tuple, of: Callable | None, kwargs: dict) -> Any:
        outputs = self(*inputs, **kwargs)
        return outputs if of is None else jax.vmap(of)(outputs)

    @shortened
    def vote(self, *inputs: object, dim: int = -1, **kwargs: object) -> jax.Array:
        """Return the class that most members choose; of several such classes the lowest, as ``torch.mode``.

        A member whose logits are not all numbers has no vote; where none has one, the result is -1.

        Args:
            inputs: see `forward`.
            dim: the axis of the classes in the output of a member.
            kwargs: see `forward`.

        Returns:
            int32, the shape of a member's output without `dim`.

        Raises:
            ShapeError: if the outputs have no such axis, or only one class on it.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> nn.Ensemble(lambda: nn.Linear(2, 3), 5).vote(jnp.ones((4, 2))).shape
            (4,)
        """
        return _most_votes(*self._logits(inputs, dim, kwargs))

    @shortened
    def disagreement(self, *inputs: object, dim: int = -1, **kwargs: object) -> jax.Array:
        """Return the share of pairs of members that choose different classes, between 0 and 1.

        A member whose logits are not all numbers is in no pair; without any pair the result is NaN.

        Args:
            inputs: see `forward`.
            dim: the axis of the classes in the output of a member.
            kwargs: see `forward`.

        Returns:
            float32, the shape of a member's output without `dim`.

        Raises:
            ShapeError: if the outputs have no such axis, or only one class on it.
            ValueError: for one member alone.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> nn.Ensemble(lambda: nn.Linear(2, 3), 5).disagreement(jnp.ones((4, 2))).shape
            (4,)
        """
        if len(self) < 2:
            raise ValueError(
                explain(
                    "asked for the disagreement of an Ensemble of 1 member",
                    "it is a share of pairs, and there is no pair",
                    "build it with two members or more",
                )
            )
        return _differing_pairs(*self._logits(inputs, dim, kwargs))

    def _logits(self, inputs: tuple, dim: int, kwargs: dict) -> tuple[Any, int]:
        """Return the members' outputs, and the axis of the classes counted from the end."""
        logits = self(*inputs, **kwargs)
        shape = jnp.shape(logits)[1:] if hasattr(logits, "shape") else None
        if shape is None or not -len(shape) <= dim < len(shape):
            raise ShapeError(
                explain(
                    f"asked for the votes of members that put out {described(logits, shape)}",
                    f"there is no axis {dim} of classes",
                    "vote and disagreement are for logits (N, classes); for numbers take mean and "
                    "variance",
                )
            )
        axis = dim % len(shape) - len(shape)
        if shape[axis] < 2:
            raise ShapeError(
                explain(
                    f"asked for the votes of members that put out shape {shape}, {shape[axis]} on axis "
                    f"{dim}",
                    "with fewer than two classes there is nothing to choose",
                    "give each class a logit, or count yourself: "
                    "(ensemble(x) > 0).mean(0) is the share of votes for 'yes'",
                )
            )
        return logits, axis

    # ----------------------------------------------------------------------------------------------
    # Members

    @shortened
    def member(self, i: int) -> Module:
        """Return one member as a module of its own: a copy, which no longer follows the ensemble.

        Args:
            i: its number; negative ones count from the end.

        Raises:
            IndexError: if there is no such member.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> nn.Ensemble(lambda: nn.Linear(2, 3), 5).member(0)
            Linear(in_features=2, out_features=3, bias=True)
        """
        i = self._index(i)
        moduledef, leaves = split(self.stack)
        return owned(merge(moduledef, [leaf[i] for leaf in leaves]))

    if not TYPE_CHECKING:

        def __getitem__(self, i):
            raise TypeError(
                explain(
                    "indexed an Ensemble",
                    "its members are stacked arrays: what is written to one that was taken out does not "
                    "come back",
                    "ensemble.member(i), a copy; ensemble.load_member(i, ...) puts its arrays back; "
                    "ensemble.map(fn) calls a function with every member",
                )
            )

    def _index(self, i: int) -> int:
        i, n = operator.index(i), len(self)
        if not -n <= i < n:
            raise IndexError(
                explain(
                    f"asked for member {i} of an Ensemble of {n}",
                    f"the members are numbered from 0 to {n - 1}",
                    f"ensemble.member({n - 1})",
                )
            )
        return i % n

    @shortened
    def apply(self, fn: Callable[[Module], object]) -> Self:
        """Call a function on every module of every member, then on the ensemble, and return it.

        The function sees the modules of one member, so ``nn.init`` functions find the shapes they expect
        and draw other values for each. A static attribute is
        that of all members: set it on the modules of `stack`.

        Raises:
            StructureChangeError: if the function changes static attributes or structure.
        """

        def apply_to(member: Module) -> None:
            member.apply(fn)

        try:
            self.map(apply_to)
        except StructureChangeError as error:
            error.add_note(
                "Ensemble.apply gives the function the modules of one member. What is the same for all: "
                "for module in ensemble.stack.modules(): ..."
            )
            raise
        fn(self)
        return self

    # ----------------------------------------------------------------------------------------------
    # State

    def state_dicts(self) -> list[OrderedDict[str, Any]]:
        """Return the state dict of each member, under the member's own names.

        ``state_dict()`` gives the same arrays stacked, under the names of `stack`.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> ensemble = nn.Ensemble(lambda: nn.Linear(2, 3), 5)
            >>> {name: v.shape for name, v in ensemble.state_dicts()[0].items()}
            {'weight': (3, 2), 'bias': (3,)}
            >>> {name: v.shape for name, v in ensemble.state_dict().items()}
            {'stack.weight': (5, 3, 2), 'stack.bias': (5, 3)}
        """
        return unstacked(self.stack.state_dict(), len(self))

    @shortened
    def load_state_dict(
        self,
        state_dict: Mapping[str, object] | Sequence[Mapping[str, object]],
        strict: bool = True,
        assign: bool = False,
    ) -> IncompatibleKeys:
        """Copy arrays by name into parameters and buffers; all or nothing.

        Args:
            state_dict: arrays ``(n, ...)`` by name, as ``state_dict()`` gives them; or a sequence of n
                state dicts, one for each member, such as checkpoints of n separate models.
            strict: whether missing and unexpected names are an error.
            assign: take the given dtypes instead of casting to the present ones.

        Raises:
            StateDictError: for a wrong number of dicts, or names (with `strict`), shapes or dtypes that
                do not fit; the members are as they were before.
        """
        if not isinstance(state_dict, Mapping) and isinstance(state_dict, Sequence):
            state_dict = stacked_dicts(state_dict, len(self))
        return super().load_state_dict(state_dict, strict, assign)

    @shortened
    def load_member(
        self, i: int, state_dict: Mapping[str, object], strict: bool = True
    ) -> IncompatibleKeys:
        """Copy arrays by the member's own names into one member; all or nothing.

        Args:
            i: the number of the member.
            state_dict: arrays by name, such as ``ensemble.member(j).state_dict()``.
            strict: whether missing and unexpected names are an error.

        Raises:
            IndexError: if there is no such member.
            StateDictError: for names (with `strict`), shapes or dtypes that do not fit.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> ensemble = nn.Ensemble(lambda: nn.Linear(2, 3), 5)
            >>> best = ensemble.member(0).state_dict()
            >>> ensemble.load_member(4, best)
            <All keys matched successfully>
        """
        i = self._index(i)
        member = self.member(i)
        before = list(plan_of(member).leaves())
        result = member.load_state_dict(state_dict, strict)
        after = plan_of(member).leaves()
        for box, old, new in zip(plan_of(self.stack).boxes, before, after, strict=True):
            if new is not old:
                Box.write(box, box.value.at[i].set(new))
        return result


# --------------------------------------------------------------------------------------------------
# Votes


def _votes(logits: jax.Array, axis: int) -> Any:
    """Return how many members choose each class, int32, the classes on the last axis."""
    logits = jnp.moveaxis(logits, axis, -1)  # (n, ..., classes)
    counted = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.int32)
    numbers = ~jnp.isnan(logits).any(-1, keepdims=True)
    return (counted * numbers.astype(jnp.int32)).sum(0, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _most_votes(logits: jax.Array, axis: int) -> Any:
    counts = _votes(logits, axis)
    return jnp.where(counts.sum(-1) > 0, counts.argmax(-1).astype(jnp.int32), np.int32(-1))


@functools.partial(jax.jit, static_argnums=1)
def _differing_pairs(logits: jax.Array, axis: int) -> Any:
    counts = _votes(logits, axis).astype(jnp.float32)
    votes = counts.sum(-1)
    agreeing = (counts * (counts - 1)).sum(-1)
    return 1 - agreeing / (votes * (votes - 1))


# --------------------------------------------------------------------------------------------------
# Arguments


def _checked_axes(inputs: tuple, in_axes: PyTree, n: int) -> tuple:
    """Return the axis of each input, or raise if an input does not have n entries there."""
    if not isinstance(in_axes, (tuple, list)):
        in_axes = (in_axes,) * len(inputs)
    elif len(in_axes) != len(inputs):
        raise ValueError(
            explain(
                f"called an Ensemble with in_axes of length {len(in_axes)} and {len(inputs)} inputs",
                "there must be one entry for each input",
                "pass an integer or None for all of them, or one entry for each",
            )
        )

    def leaf(value: object) -> bool:
        return value is None or isinstance(value, Module)

    for number, (axis, value) in enumerate(zip(in_axes, inputs, strict=True)):
        axes = jax.tree.leaves(jax.tree.broadcast(axis, value, is_leaf=leaf), is_leaf=leaf)
        for axis, array in zip(axes, jax.tree.leaves(value, is_leaf=leaf), strict=True):
            if axis is None or leaf(array):
                continue
            shape = jnp.shape(array)
            if not -len(shape) <= axis < len(shape) or shape[axis] != n:
                raise ShapeError(
                    explain(
                        f"called an Ensemble of {n} members with input {number} of shape {shape} and "
                        f"in_axes {axis} for it",
                        f"each member takes its own entry of axis {axis}, which must have {n} of them",
                        f"pass an array ({n}, ...) with in_axes=0; or in_axes=None for an input that all "
                        "members see",
                    )
                )
    return tuple(in_axes)
