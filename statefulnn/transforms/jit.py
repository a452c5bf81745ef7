"""nn.jit: compile functions that use, and change, modules.

A call gathers the leaves from the boxes (cached), makes one compiled call and puts the leaves that were
written back into their boxes: `dispatch` does that, on the `versions` of the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from statefulnn.core.module import Module
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.refusals import no_callable, sharding_option
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.ahead import Lowered
from statefulnn.transforms.dispatch import Dispatch
from statefulnn.transforms.lift import call_module, unbound
from statefulnn.transforms.types import P, R
from statefulnn.transforms.versions import Options

_Rest = ParamSpec("_Rest")  # the arguments of a method after its module
_M = TypeVar("_M")


class JitFunction(Dispatch, Generic[P, R]):
    """A compiled function; see `jit`."""

    def __init__(self, function: Callable, owner: ModuleBase | None, options: Options) -> None:
        super().__init__(function, owner, options)
        functools.update_wrapper(self, function, updated=())

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @shortened
    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """Return the computation for these arguments, as ``jax.jit(f).lower`` does.

        Shapes will do: ``jax.ShapeDtypeStruct`` for arrays, modules on the meta device. Its ``compile()``
        gives a function that is called as this one, and has ``cost_analysis`` and ``memory_analysis``.
        """
        return Lowered(self, args if self.owner is None else (self.owner, *args), kwargs)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(
        self: JitFunction[Concatenate[_M, _Rest], R], instance: _M, owner: type | None = None
    ) -> Callable[_Rest, R]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        # As a decorator of a method: the module is the first argument.
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"nn.jit({self.function if self.owner is None else self.owner!r})"


@overload
def jit(
    fun: Callable[P, R],
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate: int | str | Iterable[int | str] = (),
    **options: Any,
) -> JitFunction[P, R]: ...
@overload
def jit(
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate: int | str | Iterable[int | str] = (),
    **options: Any,
) -> Callable[[Callable[P, R]], JitFunction[P, R]]: ...
def jit(
    fun: Callable | None = None,
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate: int | str | Iterable[int | str] = (),
    **options: Any,
) -> Any:
    """Compile a function that takes modules, reads them and changes them.

    The modules may be anywhere in the arguments and may share parameters. What the function writes to
    their parameters, buffers and generators is written back when it returns; calls are asynchronous.

    Args:
        fun: a function, a Module (its call is compiled) or a method of a Module. Without it, `jit`
            returns a decorator.
        static_argnums: positions of arguments that are compiled in; a caller may pass them by name.
        static_argnames: names of such arguments; a caller may pass them by position.
        donate: positions or names of arguments whose memory may be reused for the results; for a module, all
            its arrays are then replaced, and older references to them are dead. ``donate_argnums`` and
            ``donate_argnames``, JAX's names, mean the same.
        options: passed to ``jax.jit`` (``inline``, ``compiler_options`` ...).

    Returns:
        a function with `fun`'s signature. Modules among its results that were arguments are the
        caller's own objects. ``trace_count`` tells how often `fun` was traced.

    Raises:
        ValueError: if `fun` has no argument that `static_argnums`, `static_argnames` or `donate` mean, or one
            is to be static and donated.
        ArgumentError: for `in_shardings` and `out_shardings`: arrays say themselves where they lie.
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
    for option in ("in_shardings", "out_shardings"):
        if option in options:
            raise sharding_option(option)
    numbers = (static_argnums,) if isinstance(static_argnums, (int, str)) else tuple(static_argnums)
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    # JAX's names too: `jax.jit` would give away the arrays of all modules, and one in two places twice.
    several = [donate, *(options.pop(n, ()) for n in ("donate_argnums", "donate_argnames"))]
    donated = [n for one in several for n in ([one] if isinstance(one, (int, str)) else one or ())]
    if not callable(fun):
        example = "nn.jit(lambda model, x: model(x))(model, x)"
        raise no_callable("nn.jit", type(fun).__name__, example)
    function, owner = unbound(fun)
    if owner is not None:
        # The module is the first argument: shift the positions past it.
        numbers, donated = _past_the_first(numbers), _past_the_first(donated)
    named = (
        type(owner).forward if isinstance(owner, Module) and function is call_module else function
    )
    chosen = Options.of(named, numbers, names, donated, options)
    return JitFunction(function, owner, chosen)


def _past_the_first(places: Iterable[int | str]) -> list[int | str]:
    return [n + 1 if isinstance(n, int) and n >= 0 else n for n in places]
