"""Which trainable parameters of a module are meant: those that a filter chooses, by name or by object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeGuard

from statefulnn.core import refusals
from statefulnn.core.module import Module
from statefulnn.core.names import chosen
from statefulnn.core.parameter import Parameter

Part: TypeAlias = str | Module | Parameter
Selection: TypeAlias = Part | Iterable[Part] | Callable[[str], bool] | None
# A selection of names alone, which can be kept: it refers to no module, and compares by content.
Names: TypeAlias = str | tuple[str, ...] | Callable[[str], bool] | None


def is_several(only: object) -> TypeGuard[Iterable[Any]]:
    """Say whether a selection is several parts, such as ``model.head.parameters()``."""
    return isinstance(only, Iterable) and not isinstance(only, (str, Module, Parameter))


def names_in(roots: Sequence[Module], only: Selection, where: str) -> Names:
    """Return a selection with names in place of modules and parameters.

    Args:
        roots: the modules that hold them.
        only: names, patterns, modules and parameters, one or several; or a function of the name.
        where: the caller, for the message.

    Raises:
        UnknownNameError: for a module or parameter that is in none of the roots.
        TypeError: for anything else.
    """
    if only is None or isinstance(only, str):
        return only
    if not isinstance(only, (Module, Parameter)) and callable(only):
        return only
    if not is_several(only) and not isinstance(only, (Module, Parameter)):
        raise refusals.filter_of_no_text(f"a filter of type {type(only).__name__}", where)
    parts = tuple(only) if is_several(only) else (only,)
    names: dict[int, str] = {}
    for root in roots if any(not isinstance(part, str) for part in parts) else ():
        for path, module in root.named_modules(remove_duplicate=False):
            names.setdefault(id(module), f"{path}.*" if path else "*")
        for name, parameter in root.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), name)
    found = []
    for part in parts:
        if isinstance(part, (Module, Parameter)) and id(part) not in names:
            raise refusals.part_of_no_module(type(part).__name__, where)
        found.append(names.get(id(part), part))
    return tuple(found)


def trainable(
    roots: Sequence[Module], only: Selection, where: str, *, required: bool = True
) -> list[dict[str, Parameter]]:
    """Return the trainable parameters of modules that a selection chooses, each tied one once.

    A tied parameter is chosen by any of its names, and stands under its first one.

    Args:
        roots: the modules. A name may be that of any.
        only: names, patterns, modules and parameters, one or several; or a function of the name. None
            chooses all.
        where: the caller, for the message.
        required: whether it is an error to choose no trainable parameter.

    Returns:
        for each root a dict of name -> parameter, in the order of its ``named_parameters()``.

    Raises:
        UnknownNameError: if a part of the selection matches nothing, or nothing that is trainable.
        TypeError: for another kind of filter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> [list(found) for found in trainable([model], "*.bias", "nn.grad")]
        [['0.bias', '1.bias']]
    """
    own = [{n: p for n, p in root.named_parameters() if p.requires_grad} for root in roots]
    if only is None:
        return own
    everything = [pair for r in roots for pair in r.named_parameters(remove_duplicate=False)]
    every_name = dict(everything)
    try:
        wanted = set(chosen(every_name, names_in(roots, only, where), where))
    except refusals.UnknownNameError:
        if required:
            raise
        wanted = set()
    ids = {id(p) for name, p in everything if name in wanted}
    found = [{n: p for n, p in those.items() if id(p) in ids} for those in own]
    if required and not any(found):
        raise refusals.nothing_trainable_chosen([n for n in every_name if n in wanted], where)
    return found
