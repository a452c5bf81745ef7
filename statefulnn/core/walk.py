"""Goes through trees of modules without recursion: depth costs no stack, and cycles end.

A module that has its own version of a method (`overrides`) is left to it, as in torch, where a method
calls itself on each child.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.ownership import ModuleBase, set_home

# What happens to a module: its children come next; they are all done; it is left to its own version of
# a method; it is not entered, since it was before.
ENTER, LEAVE, CALL, SEEN = "enter", "leave", "call", "seen"

_REDUCTION = ("__reduce__", "__reduce_ex__")


def walk(
    root: Any,
    below: Callable[[Any, str], Iterable[tuple[str, Any]]],
    label: str = "",
    *,
    method: str | None = None,
    met: set[int] | None = None,
    once: bool = False,
) -> Iterator[tuple[str, str, Any]]:
    """Yield what happens to each module, depth first: (ENTER, LEAVE, CALL or SEEN; label; module).

    Args:
        root: the first module; its own version of the method, if it has one, is what asks.
        below: gives for a module and its label the labels and modules below, when it is entered.
        label: that of the root.
        method: modules with their own version of this method are not entered.
        met: the ids of modules that are not entered; kept up to date.
        once: whether a module is entered once at all, instead of once on each path.
    """
    met = set() if met is None else met
    todo = [(ENTER, label, root)]
    while todo:
        event, label, module = todo.pop()
        if event is LEAVE:
            if not once:
                met.discard(id(module))
            yield LEAVE, label, module
        elif id(module) in met:
            yield SEEN, label, module
        elif method is not None and module is not root and overrides(module, method):
            yield CALL, label, module
        else:
            met.add(id(module))
            yield ENTER, label, module
            todo.append((LEAVE, label, module))
            todo += reversed([(ENTER, *child) for child in below(module, label)])


def overrides(module: Any, method: str) -> bool:
    """Say whether a module has its own version of a method of `Module`, or of ``object``."""
    if method in module.__dict__:
        return True
    owner = next((cls for cls in type(module).__mro__ if method in vars(cls)), object)
    return owner.__module__ not in ("statefulnn.core.module", "builtins")


class _UnderWay(threading.local):
    def __init__(self) -> None:
        self.roots: dict[Hashable, list[int]] = {}


_under_way = _UnderWay()


@contextlib.contextmanager
def under_way(call: Hashable, root: Any) -> Iterator[set[int]]:
    """Note that a call runs on a module in this thread; give the ids of those it was running on already.

    Where modules with their own versions of a method lie on a cycle, this ends it.
    """
    roots = _under_way.roots.setdefault(call, [])
    around = set(roots)
    roots.append(id(root))
    try:
        yield around
    finally:
        roots.pop()
        if not roots:
            del _under_way.roots[call]


def deepcopied(root: Any, memo: dict[int, Any]) -> Any:
    """Return what ``copy.deepcopy`` makes of a module, without its recursion.

    Bare copies of all modules come first. Then each is given a copy of its state, in which the modules
    are known already; children before parents. pickle offers no such way: it ends, as for torch's modules,
    below some 200 levels.
    """
    reduced: dict[int, tuple] = {}
    twins = []

    def below(module: object, _: str) -> Iterable[tuple[str, Any]]:
        reduced[id(module)] = (*module.__reduce_ex__(4), None)[:3]
        state = reduced[id(module)][2]
        if not isinstance(state, dict):
            return []
        held = [*(state.get("_modules") or {}).values(), *state.values()]
        return [("", value) for value in held if isinstance(value, ModuleBase)]

    for event, _, module in walk(root, below, method="__deepcopy__", met=set(memo), once=True):
        if event is LEAVE:
            function, args, state = reduced[id(module)]
            memo[id(module)] = twin = function(*copy.deepcopy(args, memo))
            twins.append((twin, state))
    for twin, state in twins:
        if state is not None:
            twin.__setstate__(copy.deepcopy(state, memo))
    return memo[id(root)]


def leave_copies_to_reduction(cls: type) -> None:
    """Let ``copy.deepcopy`` ask a class's own ``__reduce__``, which `Module.__deepcopy__` would hide."""
    if "__deepcopy__" not in vars(cls) and any(name in vars(cls) for name in _REDUCTION):
        cls.__deepcopy__ = None  # pyright: ignore[reportAttributeAccessIssue]


def set_homes(root: Any, given: Collection[Any] = ()) -> None:
    """Let modules and boxes know under which names they are registered; not those in `given`."""
    set_home(root, None)
    met = {id(m) for m in given}
    below = lambda m, _: [("", child) for child in m._modules.values() if child is not None]
    for event, _, owner in walk(root, below, met=met, once=True):
        if event is ENTER:
            reference = weakref.ref(owner)
            for name, child in owner._modules.items():
                if child is not None and child not in given:
                    set_home(child, (reference, name))
            for name, box in (*owner._parameters.items(), *owner._buffers.items()):
                if box is not None:
                    box._nn_home = (reference, name)


def owned(module: Any) -> Any:
    """Give the user a module that was merged: its boxes know their names by their owners."""
    if current_trace() is EAGER:
        set_homes(module)
    return module
