"""The dicts in which a module keeps its members and hooks; every change of one stamps the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statefulnn.core.scope import Cell


class Registry(dict):
    """The dict of a module's parameters, buffers or children; every change stamps the module."""

    __slots__ = ("__weakref__", "cell")

    def __init__(self, cell: Cell, items: Any = ()) -> None:
        super().__init__(items)
        self.cell = cell

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict) -> dict:
        import copy

        return {k: copy.deepcopy(v, memo) for k, v in self.items()}


def _stamping(name: str) -> Callable:
    original = getattr(dict, name)

    def method(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        finally:
            self.cell.touch()

    method.__name__ = name
    method.__doc__ = original.__doc__
    return method


for _name in "__setitem__ __delitem__ pop popitem clear update setdefault __ior__".split():
    setattr(Registry, _name, _stamping(_name))


class HookDict(Registry):
    """The hooks of one kind, by number: (function, with_kwargs, always_call)."""

    __slots__ = ()


# Hooks that fire for every module. They are part of each ModuleDef: compiled code contains them.
GLOBAL_CELL = Cell()
GLOBAL_HOOKS: dict[str, HookDict] = {
    name: HookDict(GLOBAL_CELL)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
}
