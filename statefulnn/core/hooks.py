"""Hooks: the tables that they are kept in, and the call of a module with all of them.

Forward hooks are plain Python around ``forward``: under a compiled call they run once, while tracing.
Backward hooks run in the backward pass, see `core.taps`.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from statefulnn.core import refusals
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import user_stack_level
from statefulnn.core.leaks import note_hook
from statefulnn.core.listeners import active, heard
from statefulnn.core.registry import GLOBAL_HOOKS, HookDict
from statefulnn.core.taps import tapped

if TYPE_CHECKING:
    from statefulnn.core.module import Module

_number = itertools.count().__next__


class RemovableHandle:
    """Removes a hook: by `remove`, or at the end of a ``with`` block."""

    def __init__(self, hooks: HookDict, number: int) -> None:
        self._hooks = weakref.ref(hooks)
        self.id = number

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        hooks = self._hooks()
        if hooks is not None and self.id in hooks:
            del hooks[self.id]

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def add_hook(hooks: HookDict, hook: tuple, prepend: bool = False) -> RemovableHandle:
    """Put a hook, (function, with_kwargs, always_call), at the end or the beginning."""
    if not callable(hook[0]):
        raise refusals.hook_without_call(type(hook[0]).__name__)
    number = _number()
    if prepend:
        hooks.put_first(number, hook)
    else:
        hooks[number] = hook
    return RemovableHandle(hooks, number)


def hooks_of(module: Module, name: str) -> list[Any]:
    """Return global hooks, then the module's own."""
    own = module.__dict__.get(name)
    everywhere = GLOBAL_HOOKS[name]
    return [*everywhere.values(), *(own.values() if own else ())]


def call_with_hooks(module: Module, args: tuple, kwargs: dict) -> Any:
    """Call ``forward`` with every hook that applies."""
    for entering in active.entering:
        entering(module, args, kwargs)
    if active.muted:
        return heard(module, module.forward(*args, **kwargs))
    called: set[int] = set()
    try:
        return _call(module, args, kwargs, called)
    except Exception:
        # always_call hooks that have not run yet still do, once; the first error propagates. One that
        # raised is among those that have run: it is not asked to clean up after itself.
        for index, (hook, with_kwargs, always) in enumerate(hooks_of(module, "_forward_hooks")):
            if always and index not in called:
                called.add(index)
                try:
                    if with_kwargs:
                        hook(module, args, kwargs, None)
                    else:
                        hook(module, args, None)
                except Exception as error:
                    text = refusals.second_error_in_a_hook(error)
                    warnings.warn(text, stacklevel=user_stack_level())
        raise


def _call(module: Module, args: tuple, kwargs: dict, called: set[int]) -> Any:
    for hook, with_kwargs, _ in hooks_of(module, "_forward_pre_hooks"):
        note_hook(hook, "forward pre-hook", module)
        if with_kwargs:
            result = hook(module, args, kwargs)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(
                        "forward pre-hook must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {result!r}."
                    )
                args, kwargs = result
        else:
            result = hook(module, args)
            if result is not None:
                args = result if isinstance(result, tuple) else (result,)

    # The forward hooks lie between the taps: what a backward hook sees as the output's gradient is that of
    # what they made of it, as in torch. The taps may call this twice.
    def forward(*args: Any) -> Any:
        out = module.forward(*args, **kwargs)
        for index, (hook, with_kwargs, _) in enumerate(hooks_of(module, "_forward_hooks")):
            called.add(index)
            note_hook(hook, "forward hook", module)
            result = hook(module, args, kwargs, out) if with_kwargs else hook(module, args, out)
            if result is not None:
                out = result
        return out

    before = hooks_of(module, "_backward_pre_hooks")
    after = hooks_of(module, "_backward_hooks")
    # Without a trace nobody differentiates, so no backward pass will come.
    if (before or after) and current_trace() is not EAGER:
        out = tapped(module, args, kwargs, forward, before, after)
    else:
        out = forward(*args)
    return heard(module, out)
