"""When two functions are equal: the same code, reaching equal values.

Two functions of one piece of source do the same if everything that they reach is the same: what they
close over, their defaults, and the global names in their code. Numbers, strings and other functions are
compared by value; modules and functions of known libraries never change. A function that reaches anything
else (a model, a list, a class of the user's) equals only itself: such objects change in place.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.ownership import ModuleBase

_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "statefulnn",
}
_ATOMS = (str, bytes, bool, int, float, complex, type(None), type(...))
# What a library is made of; an instance of one of its classes may hold anything of the user's.
_PARTS = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    np.ufunc,
    jnp.ufunc,
    jax.custom_jvp,
    jax.custom_vjp,
    type(jnp.tanh),
    type(jnp.add),
)


class FunctionKey:
    """What a function is told by.

    Attributes:
        key: hashable; functions with equal keys do the same if `reason` is empty.
        reason: why the function equals only itself, empty if it does not.
        modules: the identities of the modules and boxes that it reaches.
    """

    def __init__(self, function: Callable) -> None:
        self.reason = ""
        self.modules: list[int] = []
        self._active: list[types.FunctionType] = []  # those whose parts are being looked at
        self.key = self._of(function, "it")

    def _of(self, value: Any, name: str) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            # repr tells 0.0 from -0.0, and one NaN is as good as another.
            return (kind, repr(value) if kind in (float, complex) else value)
        if kind in (tuple, frozenset):
            return (kind, kind(self._of(v, name) for v in value))
        if isinstance(value, _PARTS) and _is_of_a_library(value):
            return value
        if kind is functools.partial:
            parts = (value.func, value.args, *(x for item in value.keywords.items() for x in item))
            return (kind, *(self._of(part, name) for part in parts))
        if kind is not types.FunctionType:
            # The key is then compared with no other one; what else is reached is looked through all the same,
            # for its modules.
            if isinstance(value, (ModuleBase, Box)):
                self.modules.append(id(value))
            self.reason = (
                self.reason or f"{name} is of type {kind.__name__}, which may change in place"
            )
            return id(value)
        if value in self._active:  # it calls itself, or one that calls it
            return ("above", self._active.index(value))
        self._active.append(value)
        try:
            return (kind, value.__code__, *((n, self._of(v, n)) for n, v in _reached(value)))
        finally:
            self._active.pop()


def _is_of_a_library(part: object) -> bool:
    home = (
        part.__name__ if isinstance(part, types.ModuleType) else getattr(part, "__module__", None)
    )
    if isinstance(part, np.ufunc):
        home = "numpy"
    return isinstance(home, str) and home.partition(".")[0] in _LIBRARIES


def _reached(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function closes over, its defaults, and the globals that its code names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{name!r}, which it closes over,", cell.cell_contents
        except ValueError:  # not bound yet
            yield f"{name!r}, which it closes over,", cell
    yield "a default", function.__defaults__ or ()
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f"the default of {name!r}", value
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield f"the global {name!r}, which it uses,", function.__globals__[name]


def _names(code: types.CodeType) -> set[str]:
    # Names of attributes are among them. A global that happens to have such a name is compared as well, which
    # at worst tells functions apart that do the same. Inner functions have code of their own.
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
