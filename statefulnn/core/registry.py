"""The dicts in which a module keeps its members and hooks; every change of one stamps the module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Self

from statefulnn.core import refusals
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.ownership import ModuleBase, check_write
from statefulnn.core.refusals import Subject
from statefulnn.core.stamps import Stamp

REGISTRIES = ("_parameters", "_buffers", "_modules")

_MEMBERS = "the members of a module"
_HOOKS = "the hooks of a module"


class Registry(dict):
    """The dict of a module's parameters, buffers or children; every change passes `_changed`.

    Each method of a dict that changes it is here: those of `dict` itself would call none of ours.
    """

    __slots__ = ("__weakref__", "stamp")

    # Copies and pickles hold these; `Module.__setstate__` makes registries of them, with the new stamp.
    _bare: type[dict] = dict

    def __init__(self, stamp: Stamp, items: Iterable[tuple] | Mapping = ()) -> None:
        super().__init__(items)
        self.stamp = stamp

    def _check_member(self, name: Hashable, member: object) -> None:
        # Module checks what it registers; this is for code that writes here by hand, as torch's does.
        if member is not None and not isinstance(member, (Box, ModuleBase)):
            raise refusals.not_in_a_box(type(member).__name__, name)

    def _changed(self, change: Callable[[], Any], subject: Subject, value: object = None) -> Any:
        """Make a change if it is allowed here and would be kept, and stamp the module.

        Args:
            change: makes it, and returns what its caller is to return.
            subject: what is changed, for the message.
            value: the array that is put in, if one is.
        """
        scope = self.stamp.scope
        if scope is not None or current_trace() is not EAGER:
            check_write(scope, value, subject)
        try:
            return change()
        finally:
            # Also if it raised half-way: a stamp too many costs a walk, one too few a wrong result.
            self.stamp.touch()

    def __setitem__(self, name: Hashable, member: object) -> None:
        self._check_member(name, member)
        # A box built from a traced value must not get into a module outside of that trace either.
        value = member._value if isinstance(member, Box) else None
        self._changed(lambda: dict.__setitem__(self, name, member), lambda: repr(name), value)

    def __delitem__(self, name: Hashable) -> None:
        self._changed(lambda: dict.__delitem__(self, name), lambda: repr(name))

    def pop(self, name: Hashable, *default: Any) -> Any:
        """Remove a member and return it."""
        if name not in self and default:
            return default[0]
        return self._changed(lambda: dict.pop(self, name), lambda: repr(name))

    def popitem(self) -> tuple[Any, Any]:
        """Remove the last member and return it with its name."""
        return self._changed(lambda: dict.popitem(self), _MEMBERS)

    def clear(self) -> None:
        """Remove all members."""
        if self:
            self._changed(lambda: dict.clear(self), _MEMBERS)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Put members in by name."""
        for name, member in dict(*args, **kwargs).items():
            self[name] = member

    def setdefault(self, name: Hashable, default: Any = None) -> Any:
        """Return a member; put one in if there is none."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return self._bare, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict:
        return self._bare((k, copy.deepcopy(v, memo)) for k, v in self.items())


class BareHooks(dict):
    """What a `HookDict` is in a copy or pickle, before it belongs to a module again."""


class HookDict(Registry):
    """The hooks of one kind, by number: (function, with_kwargs, always_call)."""

    __slots__ = ()

    _bare = BareHooks

    def _check_member(self, name: Hashable, member: object) -> None:
        pass

    def _changed(self, change: Callable[[], Any], subject: Subject, value: object = None) -> Any:
        return super()._changed(change, _HOOKS, value)

    def put_first(self, name: Hashable, member: object) -> None:
        """Put a hook before all others."""
        later = dict(self)

        def change() -> None:
            dict.clear(self)
            dict.update(self, {name: member, **later})

        self._changed(change, _HOOKS)


# Hooks that fire for every module. They are part of each ModuleDef: compiled code contains them.
GLOBAL_STAMP = Stamp()
GLOBAL_HOOKS: dict[str, HookDict] = {
    name: HookDict(GLOBAL_STAMP)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
}
