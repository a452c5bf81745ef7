"""The dicts in which a module keeps its members and hooks; every change of one stamps the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import RegistrationError, explain
from statefulnn.core.scope import Cell, ModuleBase, check_write


class Registry(dict):
    """The dict of a module's parameters, buffers or children; every change stamps the module."""

    __slots__ = ("__weakref__", "cell")

    def __init__(self, cell: Cell, items: Any = ()) -> None:
        super().__init__(items)
        self.cell = cell

    def __setitem__(self, name: Any, member: Any) -> None:
        # Module checks what it registers; this is for code that writes here by hand, as torch's does.
        if member is not None and not isinstance(member, (Box, ModuleBase)):
            raise RegistrationError(
                explain(
                    f"put an object of type {type(member).__name__} under {name!r} into a module's "
                    "registry",
                    "parameters and buffers are held in boxes there",
                    f"setattr(module, {name!r}, value), or wrap it: nn.Parameter(value), "
                    "nn.Buffer(value)",
                )
            )
        if current_trace() is not EAGER:
            value = member._value if isinstance(member, Box) else None
            check_write(self.cell.scope, value, repr(name))
        super().__setitem__(name, member)
        self.cell.touch()

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, member in dict(*args, **kwargs).items():
            self[name] = member

    def setdefault(self, name: Any, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

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


for _name in "__delitem__ pop popitem clear".split():
    setattr(Registry, _name, _stamping(_name))


class HookDict(Registry):
    """The hooks of one kind, by number: (function, with_kwargs, always_call)."""

    __slots__ = ()

    __setitem__ = _stamping("__setitem__")


# Hooks that fire for every module. They are part of each ModuleDef: compiled code contains them.
GLOBAL_CELL = Cell()
GLOBAL_HOOKS: dict[str, HookDict] = {
    name: HookDict(GLOBAL_CELL)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
}
