"""Compiling ahead of time: what ``nn.jit(f).lower(...)`` returns.

JAX's own `Lowered` and `Compiled` know the flat lists that nn.jit gives them. These two know how a call is
taken apart into such lists, and how what it wrote is put back; everything else is asked of JAX's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.failures import raise_original
from statefulnn.core.moduledef import differences
from statefulnn.core.tracebacks import shorten, shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.dispatch import Dispatch
from statefulnn.transforms.versions import Version


class Lowered:
    """A function lowered for certain arguments; ``jax.stages.Lowered`` has the other methods.

    Source: ``jax.stages.Lowered``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> lowered = nn.jit(nn.Linear(3, 4)).lower(jnp.ones((8, 3)))
        >>> lowered.out_info.shape, "stablehlo" in lowered.as_text()
        ((8, 4), True)
    """

    @shortened
    def __init__(self, function: Dispatch, args: tuple, kwargs: dict[str, Any]) -> None:
        known, version, dynamic = function.look_up(args, kwargs)
        self._function, self._version = function, version
        # Labels for errors: the leaves of the modules, then the other arrays.
        self._names = known.plan.moduledef.leaf_names
        self._lowered = version.lower(known.plan.leaves(), dynamic)

    @shortened
    def compile(self, *args: Any, **options: Any) -> Compiled:
        """Return the compiled function; the arguments are those of ``jax.stages.Lowered.compile``."""
        return Compiled(self, self._lowered.compile(*args, **options))

    @property
    def out_info(self) -> Any:
        """Shapes and dtypes of what the function returns."""
        return self._lowered.out_info[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._lowered, name)

    def __repr__(self) -> str:
        return f"Lowered({self._function!r})"


class Compiled:
    """A function compiled for certain arguments: called as it, it writes back what it changes.

    ``jax.stages.Compiled`` has the other methods: ``cost_analysis``, ``memory_analysis``, ``as_text``.

    Source: ``jax.stages.Compiled``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.BatchNorm1d(3)
        >>> step = nn.jit(lambda model, x: model(x).sum()).lower(model, jnp.ones((8, 3))).compile()
        >>> _ = step(model, jnp.ones((8, 3)))
        >>> int(model.num_batches_tracked)
        1
    """

    def __init__(self, lowered: Lowered, compiled: jax.stages.Compiled) -> None:
        self._lowered, self._compiled = lowered, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, on arguments of the structure, shapes and dtypes that it was lowered for.

        Raises:
            TypeError: for others.
        """
        try:
            lowered, function = self._lowered, self._lowered._function
            if function.owner is not None:
                args = (function.owner, *args)
            known, version, dynamic = function.look_up(args, kwargs)
            if version is not lowered._version:
                changes = _changes(lowered._version, version)
                if changes:
                    raise refusals.other_arguments(_function_name(function), changes)
            if current_trace() is not EAGER:
                known.plan.note_read()
            leaves = known.plan.leaves()
            given = version.given(leaves, dynamic)
            try:
                out, written = self._compiled(*given)
            except (TypeError, ValueError):
                # JAX knows the arrays by their place in flat lists; what it found is said again by name.
                changes = self._other_arrays(given, [*leaves, *dynamic], lowered._names)
                if changes:
                    raise refusals.other_arguments(_function_name(function), changes) from None
                raise
            except RuntimeError as error:
                raise_original(error)
                raise
            # JAX keeps the dict in which a result comes for the next one: it is not to be emptied.
            return (
                out
                if written is None
                else function.finish(known, leaves, out, dict(written), args, kwargs)
            )
        except Exception as error:
            shorten(error)
            raise

    @property
    def out_info(self) -> Any:
        """Shapes and dtypes of what the function returns."""
        return self._lowered.out_info

    def _other_arrays(
        self, given: Iterable[Sequence], arrays: list[Any], names: list[str]
    ) -> list[str]:
        """Return how arrays differ from those it was lowered for."""
        # By identity: what is donated comes in another order than the leaves.
        labels = {id(v): f"argument {i - len(names)}" for i, v in enumerate(arrays)}
        labels |= {id(v): repr(n) for v, n in zip(arrays, names, strict=False)}
        (infos, _) = self._compiled.args_info
        changes = []
        for value, info in zip(_flat(given), _flat(infos), strict=True):
            have = (tuple(getattr(value, "shape", ())), str(getattr(value, "dtype", type(value))))
            want = (tuple(info.shape), str(info.dtype))
            if have != want:
                label = labels.get(id(value), "an argument")
                changes.append(f"{label}: {want[1]}{list(want[0])} -> {have[1]}{list(have[0])}")
        return changes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._compiled, name)

    def __repr__(self) -> str:
        return f"Compiled({self._lowered._function!r})"


def _flat(lists: Iterable[Iterable]) -> list[Any]:
    return [value for one in lists for value in one]


def _changes(before: Version, after: Version) -> list[str]:
    """Return how a call differs from the one that was lowered, apart from its arrays."""
    old, new = before.signature, after.signature
    changes = []
    if old.moduledef is not new.moduledef:
        listed = differences(old.moduledef, new.moduledef)
        changes = [f"{name}: {change}" for name, change in listed]
    if old.treedef != new.treedef:
        changes.append(f"the arguments: {old.treedef} -> {new.treedef}")
    if old.has_generator != new.has_generator:
        changes.append("random numbers: a generator may be drawn from in one of the two only")
    if before.statics != after.statics:
        was = dict(before.statics or ())
        names = [n for n, value in (after.statics or ()) if n not in was or was[n] != value]
        changes.append(f"another value of the static argument {', '.join(map(repr, names))}")
    return changes


def _function_name(function: Dispatch) -> str:
    return getattr(function.function, "__name__", "a function")
