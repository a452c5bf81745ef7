"""Which group of an optimizer each parameter is in, by patterns of names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from statefulnn.core.module import Module
from statefulnn.core.names import chosen
from statefulnn.optim import _refusals as refusals

REST = "*"


def group_numbers(
    module: Module, patterns: Sequence[str], names: Collection[str]
) -> dict[str, int]:
    """Return the number of the group of each parameter.

    Args:
        module: the module.
        patterns: one for each group; ``"*"`` is the rest. A tied parameter is found by any of its names.
        names: of the parameters that are trained.

    Raises:
        UnknownNameError: for a pattern that matches no parameter of the module, frozen ones included, and
            for a parameter in no group.
        ArgumentError: for a parameter in two groups.
    """
    everything = list(module.named_parameters(remove_duplicate=False))
    group: dict[int, int] = {}
    for number, pattern in enumerate(patterns):
        if pattern == REST:
            continue
        own = set(chosen(dict(everything), pattern, "nn.Optimizer"))
        for name, p in everything:
            if name in own and group.setdefault(id(p), number) != number:
                raise refusals.in_two_groups(name, patterns[group[id(p)]], pattern)
    rest = patterns.index(REST) if REST in patterns else -1
    found = {n: group.get(id(p), rest) for n, p in module.named_parameters() if n in names}
    left = [name for name, number in found.items() if number < 0]
    if left:
        raise refusals.in_no_group(left, patterns)
    return found
