"""The dicts in which a module keeps its members and hooks; every change of one stamps the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import RegistrationError, explain
from statefulnn.core.ownership import ModuleBase, check_write
from statefulnn.core.stamps import Cell


class Registry(dict):
    """The dict of a module's parameters, buffers or children; every change passes `_changed`."""

    __slots__ = ("__weakref__", "cell")

    def __init__(self, cell: Cell, items: Any = ()) -> None:
        super().__init__(items)
        self.cell = cell

    def _check_member(self, name: Any, member: Any) -> None:
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

    def _changed(self, change: Callable[[], Any], subject: Any, value: Any = None) -> Any:
        """Make a change if it is allowed here and would be kept, and stamp the module.

        Args:
            change: makes it, and returns what its caller is to return.
            subject: what is changed, for the message.
            value: the array that is put in, if one is.
        """
        scope = self.cell.scope
        if scope is not None or current_trace() is not EAGER:
            check_write(scope, value, subject)
        try:
            return change()
        finally:
            self.cell.touch()

    def __setitem__(self, name: Any, member: Any) -> None:
        self._check_member(name, member)
        value = member._value if isinstance(member, Box) else None
        self._changed(lambda: dict.__setitem__(self, name, member), lambda: repr(name), value)

    def __delitem__(self, name: Any) -> None:
        self._changed(lambda: dict.__delitem__(self, name), lambda: repr(name))

    def pop(self, name: Any, *default: Any) -> Any:
        """Remove a member and return it."""
        if name not in self and default:
            return default[0]
        return self._changed(lambda: dict.pop(self, name), lambda: repr(name))

    def popitem(self) -> tuple[Any, Any]:
        """Remove the last member and return it with its name."""
        return self._changed(lambda: dict.popitem(self), "the members of a module")

    def clear(self) -> None:
        """Remove all members."""
        if self:
            self._changed(lambda: dict.clear(self), "the members of a module")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Put members in by name."""
        for name, member in dict(*args, **kwargs).items():
            self[name] = member

    def setdefault(self, name: Any, default: Any = None) -> Any:
        """Return a member; put one in if there is none."""
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


class HookDict(Registry):
    """The hooks of one kind, by number: (function, with_kwargs, always_call)."""

    __slots__ = ()

    def _check_member(self, name: Any, member: Any) -> None:
        pass

    def _changed(self, change: Callable[[], Any], subject: Any, value: Any = None) -> Any:
        return super()._changed(change, "the hooks of a module", value)

    def put_first(self, name: Any, member: Any) -> None:
        """Put a hook before all others."""
        later = dict(self)

        def change() -> None:
            dict.clear(self)
            dict.update(self, {name: member, **later})

        self._changed(change, "the hooks of a module")


# Hooks that fire for every module. They are part of each ModuleDef: compiled code contains them.
GLOBAL_CELL = Cell()
GLOBAL_HOOKS: dict[str, HookDict] = {
    name: HookDict(GLOBAL_CELL)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
}
