"""Which changes of a module compile code that nobody asked for."""

from __future__ import annotations

from statefulnn.core.moduledef import ModuleDef, differences


def surprising(before: ModuleDef, after: ModuleDef) -> list[tuple[str, str]]:
    """List what differs between two ModuleDefs, unless a method was called to change it.

    A class names what such a method brings up to date, as `Optimizer.adapt` does: ``_adapted = ("name",)``.
    """
    changes = [] if before is after else differences(before, after)
    meant = {name for d in after.nodes for name in getattr(d.cls, "_adapted", ())}
    return [] if any(name.rpartition(".")[2] in meant for name, _ in changes) else changes
