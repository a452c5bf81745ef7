"""Plans: how the arrays of a model are split over a mesh, by patterns of their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from statefulnn.core import refusals
from statefulnn.core.errors import UnknownNameError
from statefulnn.core.names import chosen
from statefulnn.core.placement import Value, check_spec
from statefulnn.parallel.mesh import require_mesh

Layout: TypeAlias = PartitionSpec | Sharding
REST = "*"


class Plan:
    """Says for each name of a model how its array is split over a mesh.

    Args:
        mesh: the devices.
        rules: a ``PartitionSpec``, or a ``Sharding``, for each pattern of names. ``"*"`` stands for all names
            that no other pattern matches. Or a function of name and array that returns one of these.

    ``model.to(plan)`` applies it; ``nn.materialize``, ``nn.load`` and ``Checkpointer.restore`` take it as
    `device`. A pattern with a dot is compared with the whole name, one without with each part of it; a text
    without ``*``, ``?`` and ``[`` is one name. Of a tied parameter any name will do.

    Raises:
        UnknownNameError: when it is applied, if a pattern matches nothing, a name has no pattern, or the mesh
            lacks an axis.
        ArgumentError: if two patterns want different things of one array.
        ShapeError: if a shape does not divide. Nothing has been moved then.

    Example:
        >>> import jax, statefulnn as nn
        >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> plan = nn.parallel.Plan(mesh, {"0.weight": jax.P("model", None), "*": jax.P()})
        >>> model.to(plan)[0].weight.sharding.spec
        P('model', None)
    """

    def __init__(
        self, mesh: Mesh, rules: Mapping[str, Layout] | Callable[[str, Any], Layout]
    ) -> None:
        require_mesh(mesh, "nn.parallel.Plan")
        self.mesh = mesh
        self.rules: Any = rules if callable(rules) else dict(rules)
        if not callable(rules):
            for pattern, layout in self.rules.items():
                self._sharding(pattern, layout)

    def places(self, named: Sequence[tuple[Sequence[str], Value]]) -> list[Sharding]:
        """Return the shardings of arrays, each of which is given with all of its names."""
        if callable(self.rules):
            return [self(names[0], value) for names, value in named]
        everything = [name for names, _ in named for name in names]
        matching: dict[str, list[str]] = {}
        for pattern in self.rules:
            if pattern != REST:
                for name in chosen(everything, pattern, "nn.parallel.Plan"):
                    matching.setdefault(name, []).append(pattern)
        patterns = [[p for name in names for p in matching.get(name, ())] for names, _ in named]
        lost = [names[0] for (names, _), own in zip(named, patterns, strict=True) if not own]
        if lost and REST not in self.rules:
            raise refusals.names_without_spec(lost)
        return [
            self._decided(names[0], value, own or [REST])
            for (names, value), own in zip(named, patterns, strict=True)
        ]

    def __call__(self, name: str, value: Value | tuple[int, ...]) -> Sharding:
        """Return the sharding for one name and its array, or its shape."""
        if callable(self.rules):
            sharding = self._sharding(name, self.rules(name, value))
            return self._fitting(name, value, sharding)
        named = [p for p in self.rules if p != REST and _matches(p, name)]
        if not named and REST not in self.rules:
            raise refusals.names_without_spec([name])
        return self._decided(name, value, named or [REST])

    def _decided(
        self, name: str, value: Value | tuple[int, ...], patterns: Sequence[str]
    ) -> Sharding:
        layouts = {self.rules[p] for p in patterns}
        if len(layouts) > 1:
            raise refusals.name_with_two_specs(name, list(dict.fromkeys(patterns)))
        return self._fitting(name, value, self._sharding(name, layouts.pop()))

    def _fitting(self, name: str, value: Value | tuple[int, ...], sharding: Sharding) -> Sharding:
        if isinstance(sharding, NamedSharding):
            shape = value if isinstance(value, tuple) else value.shape
            check_spec(name, shape, sharding.mesh, sharding.spec)
        return sharding

    def _sharding(self, where: str, layout: object) -> Sharding:
        if isinstance(layout, Sharding):
            return layout
        if not isinstance(layout, PartitionSpec):
            raise refusals.no_spec(layout, f"a plan for {where!r}")
        for entry in layout:
            for axis in entry if isinstance(entry, tuple) else (entry,):
                if axis is not None and axis not in self.mesh.shape:
                    raise refusals.spec_of_unknown_axis(where, layout, axis, dict(self.mesh.shape))
        return NamedSharding(self.mesh, layout)

    def __repr__(self) -> str:
        return f"Plan({dict(self.mesh.shape)}, {self.rules})"


def _matches(pattern: str, name: str) -> bool:
    try:
        return bool(chosen([name], pattern, "nn.parallel.Plan"))
    except UnknownNameError:
        return False
