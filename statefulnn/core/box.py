"""Box: the mutable cell that holds one array of a module.

Term
  Box         one array with an identity. Two attributes that hold the same box are tied.

What is held in boxes: parameters and buffers (`core.parameter`), states of generators (`core.generator`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, Self

import jax

from statefulnn.core.arrays import as_array, strong
from statefulnn.core.baked_in import BakedIn
from statefulnn.core.bypassed import note_read
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.lending import lend
from statefulnn.core.ownership import ModuleBase, Scope, birth_scope, check_write
from statefulnn.core.placement import Value, where_it_was
from statefulnn.core.stamps import value_changed

# What is shown each box of a clone before traced code reads it; nn.custom_vjp refuses some.
reads: ContextVar[Callable[[Box], None] | None] = ContextVar("reads", default=None)


class Box:
    """A mutable cell around one array, with an identity."""

    __slots__ = ("__weakref__", "_nn_home", "_scope", "_value", "baked_in")

    _value: Any
    _scope: Scope | None
    _nn_home: Any  # a leaf position in the scope, or (weak reference to the module, attribute name)
    baked_in: BakedIn | None  # that traced code took the value as a constant

    def __init__(self, value: Value | None) -> None:
        self._value = strong(value)
        self._scope = birth_scope()
        self._nn_home = None
        self.baked_in = None

    @classmethod
    def clone_of(cls, like: Hashable, value: Value, scope: Scope | None, position: int) -> Self:
        """Build a box without checks; `like` is what `static_part` gave."""
        box = cls.__new__(cls)
        box._value = value
        box._scope = scope
        box._nn_home = position
        box.baked_in = None
        box._set_static_part(like)
        return box

    @property
    def clone_class(self) -> type[Box]:
        """The class of a clone, and of whatever else holds an array of its own in place of this box."""
        return type(self)

    def static_part(self) -> Hashable:
        """Return what a clone needs beside the value."""
        return None

    def _set_static_part(self, like: object) -> None:
        pass

    def out(self) -> Any:
        """Return the array, and let the trace in force know that it has been read.

        Every way on which an array leaves a box comes through here: reading `value`, flattening, copying
        and pickling a box, taking a module apart.
        """
        if current_trace() is not EAGER:
            self._read_in_trace()
        return self._value

    def lend(self) -> Any:
        """Return the array to somebody who keeps it: a call that donates it leaves that one a copy."""
        return lend(self.out())

    @property
    def value(self) -> jax.Array:
        """The array. Writing checks that the write will be kept."""
        return self.out()

    @value.setter
    def value(self, new: object) -> None:
        self.write(lend(unwrap(new)))  # the caller may keep it

    def write(self, new: object) -> None:
        """Put another array into the box, which keeps its identity."""
        array = as_array(unwrap(new), self.label)
        # Eager writes of plain arrays to the user's boxes are always kept, and come often: no check.
        if current_trace() is not EAGER or self._scope is not None or isinstance(array, Tracer):
            check_write(self._scope, array, self.label)
        if self.baked_in is not None:
            self.baked_in.warn_of_value(self)
        self._value = strong(where_it_was(array, self))
        # Last, so that no cache made meanwhile takes the old value for the new one.
        value_changed()

    def _read_in_trace(self) -> None:
        # The box of a clone is an argument of its trace: `nn.grad` asks whether it was read at all. The
        # user's box is found through a closure, so its value may become a constant of compiled code.
        if self._scope is not None:
            self._scope.read = True
            check = reads.get()
            if check is not None:
                check(self)
            return
        note_read(self)
        if self.baked_in is None and not isinstance(self._value, Tracer):
            BakedIn.note(self)

    def label(self) -> str:
        """Return the dotted name under which the box was registered, for messages."""
        kind, home = self.clone_class.__name__, self._nn_home
        if isinstance(home, int):
            name = self._scope.leaf_name(home) if self._scope is not None else None
        else:
            name = dotted_name(*home) if home else None
        return f"{name!r} ({kind})" if name else f"a {kind}"


def dotted_name(module_ref: weakref.ref[ModuleBase], name: str) -> str:
    """Return the name of a member of a module, from the root of its tree; for messages only."""
    module = module_ref()
    return ".".join((*(() if module is None else path_of(module)), name))


def path_of(module: ModuleBase) -> tuple[str, ...]:
    """Follow the hints of where modules were registered up to the root; for messages only."""
    parts, seen = [], set()
    while id(module) not in seen:
        seen.add(id(module))
        home = module._nn_home
        parent = home[0]() if isinstance(home, tuple) else None
        # A hint is not kept up to date: the parent may be gone, or have another module there by now.
        if parent is None or parent._nn_child(home[1]) is not module:
            scope = module._nn_stamp.scope
            if isinstance(home, int) and scope is not None and scope.moduledef is not None:
                parts += reversed((scope.moduledef.paths[home] or ("",))[1:])
            break
        parts.append(home[1])
        module = parent
    return tuple(reversed(parts))


def unwrap(x: Any) -> Any:
    """Return the array of a box, and anything else as it is."""
    return x.value if isinstance(x, Box) else x
