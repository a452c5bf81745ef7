"""nn.jit: compile functions that use, and change, modules.

A call gathers the leaves from the boxes (cached), makes one compiled call and puts the leaves that were
written back into their boxes. What the function reads from Python (the ModuleDef, static arguments) is
part of the key of the compiled code, and looked at again only after something has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from statefulnn.core.box import ModuleBase
from statefulnn.core.freeze import Freezer
from statefulnn.core.generator import current_generator
from statefulnn.core.graph import Plan, build_plan, count_changes, flatten_collecting
from statefulnn.transforms.lift import (
    Written,
    forget_when_dead,
    leaves_below,
    restore_output,
    run,
    template,
    write_back,
)


# Compares with any treedef, unlike None.
_NO_TREEDEF = jax.tree_util.tree_structure(0)


class _Entry:
    """What is remembered of one combination of module arguments."""

    __slots__ = ("__weakref__", "compiled", "plan", "references", "treedef")

    plan: Plan
    references: list[Any]
    treedef: Any  # of the last call, with `compiled`, what it uses
    compiled: Any


class JitFunction:
    """A compiled function; see `jit`."""

    def __init__(
        self,
        function: Callable,
        static_argnums: Sequence[int],
        static_argnames: Sequence[str],
        donate: Sequence[int],
        options: dict[str, Any],
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._static_argnums = frozenset(static_argnums)
        self._static_argnames = frozenset(static_argnames)
        self._donate = frozenset(donate)
        self._options = options
        self._entries: dict[Any, _Entry] = {}
        self._compiled: dict[Any, Any] = {}
        self._traces = [0]

    @property
    def trace_count(self) -> int:
        """How often the Python function has been traced."""
        return self._traces[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        statics = None
        if self._static_argnums or self._static_argnames:
            args, kwargs, statics = self._without_statics(args, kwargs)
        dynamic, treedef, roots = flatten_collecting((args, kwargs))
        generator = current_generator()
        if generator is not None:
            roots.append(generator)
        key = tuple(map(id, roots))
        entry = self._entries.get(key)
        if entry is None or not entry.plan.valid():
            entry = self._new_entry(key, roots, entry)
        if entry.treedef == treedef and statics is None:
            compiled = entry.compiled
        else:
            compiled = self._compiled_for(entry, treedef, generator is not None, statics, roots)
        plan = entry.plan
        leaves = plan.cached_leaves
        if leaves is None:
            leaves = plan.leaves()
        out, written = compiled(leaves, dynamic)
        if written.indices:
            write_back(plan.boxes, written)
        if written.out is not None:
            return restore_output(out, written.out, plan, roots)
        return out

    def _new_entry(self, key: Any, roots: list[Any], stale: _Entry | None) -> _Entry:
        entry = _Entry()
        entry.plan = build_plan(roots)
        if stale is not None:
            count_changes(stale.plan, entry.plan)
        entry.treedef, entry.compiled = _NO_TREEDEF, None
        entry.references = forget_when_dead(self._entries, key, roots)
        self._entries[key] = entry
        return entry

    def _without_statics(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, tuple]:
        numbers = {n % len(args) if args else n for n in self._static_argnums}
        static_args = tuple((i, args[i]) for i in sorted(numbers) if i < len(args))
        static_kwargs = tuple((k, kwargs[k]) for k in sorted(self._static_argnames & set(kwargs)))
        args = tuple(None if i in numbers else a for i, a in enumerate(args))
        kwargs = {k: v for k, v in kwargs.items() if k not in self._static_argnames}
        return args, kwargs, (static_args, static_kwargs)

    def _compiled_for(
        self, entry: _Entry, treedef: Any, has_generator: bool, statics: Any, roots: list[Any]
    ) -> Any:
        moduledef = entry.plan.moduledef
        frozen = None
        if statics is not None:
            freezer = Freezer(lambda: "a static argument")
            frozen = tuple(
                (where, freezer.freeze(value)) for group in statics for where, value in group
            )
        key = (moduledef, treedef, has_generator, frozen)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compile(entry.plan, treedef, has_generator, statics)
            self._compiled[key] = compiled
        if statics is None:
            entry.treedef, entry.compiled = treedef, compiled
        return compiled

    def _compile(self, plan: Plan, treedef: Any, has_generator: bool, statics: Any) -> Any:
        moduledef, traces = plan.moduledef, self._traces
        function = self._function
        if statics is not None:
            function = _with_statics(function, *statics)
        donated_leaves = self._donated_leaves(plan, treedef)

        def traced(leaves: Any, dynamic: Any) -> tuple[Any, Written]:
            traces[0] += 1
            return run(
                function,
                moduledef,
                treedef,
                has_generator,
                leaves,
                dynamic,
                returned=donated_leaves,
            )

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
            mark for i in self._donate if i < len(args) for mark in jax.tree_util.tree_leaves(args[i])
        ]

    def _compile_donating(
        self, traced: Callable, num_leaves: int, donated: frozenset[int], treedef: Any
    ) -> Any:
        given = sorted(m.number for m in self._donated_marks(treedef) if m.is_leaf)

        def select(leaves: Any, dynamic: Any) -> tuple[list, list]:
            gone = [leaves[i] for i in sorted(donated)] + [dynamic[i] for i in given]
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

        call.lower = lambda leaves, dynamic: compiled.lower(*select(leaves, dynamic))
        return call

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Return the lowered computation for these arguments, as ``jax.jit(f).lower`` does."""
        statics = None
        if self._static_argnums or self._static_argnames:
            args, kwargs, statics = self._without_statics(args, kwargs)
        dynamic, treedef, roots = flatten_collecting((args, kwargs))
        generator = current_generator()
        if generator is not None:
            roots.append(generator)
        entry = self._new_entry(tuple(map(id, roots)), roots, None)
        compiled = self._compiled_for(entry, treedef, generator is not None, statics, roots)
        return compiled.lower(entry.plan.leaves(), dynamic)

    def clear_cache(self) -> None:
        """Forget all compiled code."""
        self._entries.clear()
        self._compiled.clear()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        # As a decorator of a method: the module is the first argument.
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"nn.jit({self._function!r})"


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
    owner = fun if isinstance(fun, ModuleBase) else getattr(fun, "__self__", None)
    if isinstance(owner, ModuleBase):
        # The module itself is an argument too: shift the positions past it.
        function = _call_module if fun is owner else fun.__func__
        return BoundJit(
            JitFunction(
                function,
                [n + 1 if n >= 0 else n for n in numbers],
                names,
                [n + 1 for n in donated],
                options,
            ),
            owner,
        )
    if not callable(fun):
        raise TypeError(f"nn.jit takes a function or a Module, got {type(fun).__name__}")
    return JitFunction(fun, numbers, names, donated, options)


def _call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class BoundJit:
    """A compiled module or method: a `JitFunction` with its first argument."""

    def __init__(self, function: JitFunction, module: Any) -> None:
        self._function = function
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.module, *args, **kwargs)

    @property
    def trace_count(self) -> int:
        """How often the Python function has been traced."""
        return self._function.trace_count

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Return the lowered computation for these arguments, as ``jax.jit(f).lower`` does."""
        return self._function.lower(self.module, *args, **kwargs)

    def clear_cache(self) -> None:
        """Forget all compiled code."""
        self._function.clear_cache()

    def __repr__(self) -> str:
        return f"nn.jit({self.module!r})"


