"""nn.jit: compile functions that use, and change, modules.

A call gathers the leaves from the boxes (cached), makes one compiled call and puts the leaves that were
written back into their boxes. What the function reads from Python (the ModuleDef, static arguments) is
part of the key of the compiled code, and looked at again only after something has changed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.freeze import Freezer
from statefulnn.core.generator import current_generator, streams
from statefulnn.core.placement import is_meta, no_numbers
from statefulnn.core.plan import Plan, build_plan, count_changes
from statefulnn.core.pytree import flatten_collecting
from statefulnn.core.scope import ModuleBase
from statefulnn.transforms.ahead import Lowered
from statefulnn.transforms.lift import (
    leaves_below,
    restore_output,
    run,
    template,
    unbound,
    write_back,
)


class _Known:
    """What is remembered of one combination of modules in the arguments."""

    __slots__ = ("compiled", "plan", "references", "targets")

    def __init__(self, plan: Plan, compiled: Any) -> None:
        self.plan = plan
        self.compiled = compiled
        self.references: list[Any] = []
        self.targets: dict[int, list[Any]] = {}  # for each kind of result, the boxes it writes


class _Recent:
    """A recent call with modules and arrays by position, to recognise the next one like it.

    Attributes:
        count: how many arguments it had; -1 once a module of it has died.
        wants: for each argument the identity of the module, or the type of the array.
        generator: the generator in force.
    """

    __slots__ = ("__weakref__", "compiled", "count", "generator", "known", "references", "wants")

    def __init__(self, wants: tuple, generator: Any, known: Any, compiled: Any) -> None:
        self.count = len(wants)
        self.wants = wants
        self.generator = generator
        self.known: Any = known
        self.compiled = compiled
        self.references: list[Any] = []

    def forget(self) -> None:
        """Match no call any more, and let go of the boxes."""
        self.count, self.known = -1, None


def _when_dead(objects: list[Any], owner: Any, forget: Callable[[Any], Any]) -> list[Any]:
    """Return weak references to objects; when one of them dies, `owner` forgets.

    The owner is referred to weakly as well: a cycle would keep arrays until the garbage collector runs.
    """
    reference = weakref.ref(owner)

    def callback(_: Any) -> None:
        alive = reference()
        if alive is not None:
            forget(alive)

    return [weakref.ref(obj, callback) for obj in objects]


class JitFunction:
    """A compiled function; see `jit`."""

    def __init__(
        self,
        function: Callable,
        owner: Any,
        static_argnums: Sequence[int],
        static_argnames: Sequence[str],
        donate: Sequence[int],
        options: dict[str, Any],
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._owner = owner  # the module whose call or method this is
        self._static_argnums = frozenset(static_argnums)
        self._static_argnames = frozenset(static_argnames)
        self._donate = frozenset(donate)
        self._options = options
        # By modules: the plan, and the compiled code for each structure of the arguments.
        self._known: dict[Any, _Known] = {}
        self._recent: list[_Recent] = []
        self._compiled: dict[Any, Any] = {}
        # What each trace found out: which leaves it writes, and the modules in its output.
        self._results: list[tuple[tuple[int, ...], Any]] = []

    @property
    def trace_count(self) -> int:
        """How often the Python function has been traced."""
        return len(self._results)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The usual call, modules and arrays by position, is recognised argument by argument; anything
        # else is taken apart by `_look_up`.
        if self._owner is not None:
            args = (self._owner, *args)
        known: Any = None
        compiled: Any = None
        dynamic: Any = None
        if not kwargs:
            count, generator = len(args), streams.current
            for recent in self._recent:
                if recent.count == count and recent.generator is generator:
                    dynamic = []
                    for arg, want in zip(args, recent.wants):  # noqa: B905 (of one length)
                        if type(arg) is want:
                            dynamic.append(arg)
                        elif id(arg) != want:
                            break
                    else:
                        if recent.known.plan.valid():
                            known, compiled = recent.known, recent.compiled
                        break
        if known is None:
            known, compiled, dynamic = self._look_up(args, kwargs)
        if current_trace() is not EAGER:
            known.plan.note_read()
        plan = known.plan
        leaves = plan.cached_leaves
        if leaves is None:
            leaves = plan.leaves()
        try:
            out, written = compiled(leaves, dynamic)
        except TypeError:
            for box, leaf in zip(plan.boxes, leaves, strict=True):
                if is_meta(leaf):
                    raise no_numbers(box.label()) from None
            raise
        if written is None:
            return out
        number, values = written.popitem()
        targets = known.targets.get(number)
        indices, described = self._results[number]
        if targets is None:
            targets = known.targets[number] = [plan.boxes[i] for i in indices]
        if targets:
            stamp = write_back(targets, values)
            if stamp is not None and indices[-1] == len(indices) - 1:
                # The first leaves were written, usually all but the generator: no need to gather.
                plan.keep([*values, *leaves[len(indices) :]], stamp)
        if described is not None:
            roots = flatten_collecting((args, kwargs))[2]
            return restore_output(out, described, plan, roots)
        return out

    def _look_up(self, args: tuple, kwargs: dict) -> tuple[_Known, Any, list]:
        """Return what a call needs: what is known of its modules, compiled code, the other leaves."""
        statics = None
        if self._static_argnums or self._static_argnames:
            args, kwargs, statics = self._without_statics(args, kwargs)
        dynamic, treedef, roots = flatten_collecting((args, kwargs))
        generator = current_generator()
        everything = roots if generator is None else [*roots, generator]
        key = tuple(map(id, everything))
        known = self._known.get(key)
        if known is None or not known.plan.valid():
            stale, known = known, _Known(build_plan(everything), {})
            if stale is not None:
                count_changes(stale.plan, known.plan)
            known.references = _when_dead(
                everything, self, lambda owner: owner._known.pop(key, None)
            )
            self._known[key] = known
        plan = known.plan
        compiled = known.compiled.get(treedef) if statics is None else None
        if compiled is None:
            compiled = self._compiled_for(plan, treedef, generator is not None, statics)
            if statics is None:
                known.compiled[treedef] = compiled
        if statics is None and not kwargs and len(roots) + len(dynamic) == len(args):
            self._remember(args, roots, known, compiled)
        return known, compiled, dynamic

    def _remember(self, args: tuple, roots: list, known: _Known, compiled: Any) -> None:
        if not all(isinstance(a, (ModuleBase, jax.Array, np.ndarray, int, float)) for a in args):
            return
        wants = tuple(id(a) if isinstance(a, ModuleBase) else type(a) for a in args)
        recent = _Recent(wants, streams.current, known, compiled)
        recent.references = _when_dead(roots, recent, _Recent.forget)
        others = [r for r in self._recent if r.count >= 0 and r.wants != wants]
        self._recent = [recent, *others[:3]]

    def _without_statics(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, tuple]:
        numbers = {n % len(args) if args else n for n in self._static_argnums}
        static_args = tuple((i, args[i]) for i in sorted(numbers) if i < len(args))
        static_kwargs = tuple((k, kwargs[k]) for k in sorted(self._static_argnames & set(kwargs)))
        args = tuple(None if i in numbers else a for i, a in enumerate(args))
        kwargs = {k: v for k, v in kwargs.items() if k not in self._static_argnames}
        return args, kwargs, (static_args, static_kwargs)

    def _compiled_for(self, plan: Plan, treedef: Any, has_generator: bool, statics: Any) -> Any:
        frozen = None
        if statics is not None:
            freezer = Freezer(lambda: "a static argument")
            frozen = tuple(
                (where, freezer.freeze(value)) for group in statics for where, value in group
            )
        key = (plan.moduledef, treedef, has_generator, frozen)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(plan, treedef, has_generator, statics)
        return compiled

    def _compile(self, plan: Plan, treedef: Any, has_generator: bool, statics: Any) -> Any:
        moduledef, results = plan.moduledef, self._results
        function = self._function
        if statics is not None:
            function = _with_statics(function, *statics)
        donated_leaves = self._donated_leaves(plan, treedef)

        def traced(leaves: Any, dynamic: Any) -> tuple[Any, Any]:
            number = len(results)
            results.append(((), None))
            out, written = run(
                function,
                moduledef,
                treedef,
                has_generator,
                leaves,
                dynamic,
                returned=donated_leaves,
            )
            if not written.indices and written.out is None:
                return out, None
            # The key of a dict is static: it tells the caller which trace this result is of.
            results[number] = (written.indices, written.out)
            return out, {number: written.values}

        traced.__name__ = traced.__qualname__ = getattr(self._function, "__name__", "forward")
        if not self._donate:
            return jax.jit(traced, **self._options)
        return self._compile_donating(traced, moduledef.num_leaves, donated_leaves, treedef)

    def _donated_leaves(self, plan: Plan, treedef: Any) -> frozenset[int]:
        roots = [m.number for m in self._donated_marks(treedef) if not m.is_leaf]
        return frozenset(leaves_below(plan.moduledef, roots))

    def _donated_marks(self, treedef: Any) -> list[Any]:
        args, _ = template(treedef)
        return [
            mark
            for i in self._donate
            if i < len(args)
            for mark in jax.tree_util.tree_leaves(args[i])
        ]

    def _compile_donating(
        self, traced: Callable, num_leaves: int, donated: frozenset[int], treedef: Any
    ) -> Any:
        given = sorted(m.number for m in self._donated_marks(treedef) if m.is_leaf)

        def select(leaves: Any, dynamic: Any) -> tuple[list, list]:
            gone = [leaves[i] for i in sorted(donated)] + [dynamic[i] for i in given]
            if len({id(v) for v in gone}) < len(gone):
                gone = _distinct(gone)
            kept = [v for i, v in enumerate(leaves) if i not in donated]
            kept += [v for i, v in enumerate(dynamic) if i not in given]
            return gone, kept

        def join(gone: Sequence[Any], kept: Sequence[Any]) -> tuple[list, list]:
            first, rest = iter(gone), iter(kept)
            leaves = [next(first) if i in donated else next(rest) for i in range(num_leaves)]
            total = len(gone) + len(kept) - num_leaves
            dynamic = [next(first) if i in given else next(rest) for i in range(total)]
            return leaves, dynamic

        @functools.wraps(traced)
        def donating(gone: Any, kept: Any) -> Any:
            return traced(*join(gone, kept))

        compiled = jax.jit(donating, donate_argnums=0, **self._options)

        def call(leaves: Any, dynamic: Any) -> Any:
            return compiled(*select(leaves, dynamic))

        call.select = select
        call.lower = lambda leaves, dynamic: compiled.lower(*select(leaves, dynamic))
        return call

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """Return the computation for these arguments, as ``jax.jit(f).lower`` does.

        Shapes will do: ``jax.ShapeDtypeStruct`` for arrays, modules on the meta device. Its ``compile()``
        gives a function that is called as this one, and has ``cost_analysis`` and ``memory_analysis``.
        """
        return Lowered(self, args if self._owner is None else (self._owner, *args), kwargs)

    def clear_cache(self) -> None:
        """Forget all compiled code."""
        self._known.clear()
        self._recent = []
        self._compiled.clear()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        # As a decorator of a method: the module is the first argument.
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"nn.jit({self._function if self._owner is None else self._owner!r})"


def _distinct(arrays: list[Any]) -> list[Any]:
    """Copy an array that several boxes hold: XLA takes a buffer once."""
    seen: set[int] = set()
    result = []
    for array in arrays:
        result.append(jnp.array(array) if id(array) in seen else array)
        seen.add(id(array))
    return result


def _with_statics(function: Callable, static_args: tuple, static_kwargs: tuple) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        full = list(args)
        for i, value in static_args:
            full[i] = value
        return function(*full, **kwargs, **dict(static_kwargs))

    return call


def jit(
    fun: Any = None,
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate: int | Iterable[int] = (),
    **options: Any,
) -> Any:
    """Compile a function that takes modules, reads them and changes them.

    The modules may be anywhere in the arguments and may share parameters. What the function writes to
    their parameters, buffers and generators is written back when it returns; calls are asynchronous.

    Args:
        fun: a function, a Module (its call is compiled) or a method of a Module. Without it, `jit`
            returns a decorator.
        static_argnums: positions of arguments that are compiled in.
        static_argnames: names of such keyword arguments.
        donate: positions of arguments whose memory may be reused for the results; for a module, all
            its arrays are then replaced, and older references to them are dead.
        options: passed to ``jax.jit`` (``inline``, ``compiler_options`` ...).

    Returns:
        a function with `fun`'s signature. Modules among its results that were arguments are the
        caller's own objects. ``trace_count`` tells how often `fun` was traced.

    Raises:
        StructureChangeError: if the function changes more than arrays.
        TraceLeakError: if it writes to a module that is no argument.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> @nn.jit
        ... def step(model, x):
        ...     return model(x).sum()
        >>> _ = step(model, jnp.ones((8, 3)))
        >>> int(model[1].num_batches_tracked)
        1
    """
    if fun is None:
        return functools.partial(
            jit,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate=donate,
            **options,
        )
    numbers = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    donated = (donate,) if isinstance(donate, int) else tuple(donate)
    function, owner = unbound(fun)
    if owner is not None:
        # The module is the first argument: shift the positions past it.
        numbers = tuple(n + 1 if n >= 0 else n for n in numbers)
        donated = tuple(n + 1 for n in donated)
    if not callable(fun):
        raise TypeError(f"nn.jit takes a function or a Module, got {type(fun).__name__}")
    return JitFunction(function, owner, numbers, names, donated, options)
