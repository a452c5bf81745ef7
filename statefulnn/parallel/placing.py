"""Whole models laid out by one rule: copies, shards, or split layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from statefulnn.core import refusals
from statefulnn.core.module import Module
from statefulnn.core.names import chosen
from statefulnn.core.placement import Value
from statefulnn.core.tracebacks import shortened
from statefulnn.layer_stack import LayerStack
from statefulnn.parallel.mesh import require_mesh
from statefulnn.parallel.plan import Plan
from statefulnn.parallel.styles import ParallelStyle

_M = TypeVar("_M", bound=Module)
Spec = list[Any]  # an entry for each axis of an array


class _Rule:
    """A plan that decides by all names of an array, its shape, and how it is laid out on the mesh now."""

    def __init__(self, mesh: Mesh, rule: Callable[[Sequence[str], Value, Spec], Spec]) -> None:
        self._mesh, self._rule = mesh, rule

    def places(self, named: Sequence[tuple[Sequence[str], Value]]) -> list[NamedSharding]:
        specs = [self._rule(names, value, self._now(value)) for names, value in named]
        for spec in specs:
            while spec and spec[-1] is None:  # as JAX writes it
                spec.pop()
        return [NamedSharding(self._mesh, PartitionSpec(*spec)) for spec in specs]

    def _now(self, value: Value) -> Spec:
        """Return the layout of an array on this mesh; that of a copy on every device, if it is elsewhere."""
        sharding = getattr(value, "sharding", None)
        free: Spec = [None] * len(value.shape)
        if not isinstance(sharding, NamedSharding) or sharding.mesh != self._mesh:
            return free
        return [*sharding.spec, *free[len(sharding.spec) :]]


@shortened
def data_parallel(module: _M, mesh: Mesh) -> _M:
    """Put a copy of every parameter and buffer on each device of a mesh, and return the module.

    The batch is split, ``x = nn.parallel.shard_batch(x, mesh)``. Each device computes the gradient of its
    part, and XLA adds them up. Statistics of BatchNorm are those of the whole batch.

    Args:
        module: the module; an optimizer that exists already is another.
        mesh: the devices.

    Source: ``torch.nn.parallel.DistributedDataParallel``.

    Example:
        >>> import jax, statefulnn as nn
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> model = nn.parallel.data_parallel(nn.Linear(3, 4), mesh)
        >>> model.weight.sharding.spec
        P()
    """
    return module.to(Plan(mesh, {"*": PartitionSpec()}))


@shortened
def fully_shard(module: _M, mesh: Mesh, *, axis: str = "data", min_size: int = 1024) -> _M:
    """Split every parameter and buffer over an axis of a mesh, and return the module.

    Each device keeps a part of every array, and XLA gathers it where it is used. The largest axis of an array
    is split, the first one of equals, of those that the devices divide and that are not split yet. What
    has fewer than `min_size` numbers, or no such axis, is not split. So it composes with
    `parallelize_module`, called before. On an optimizer it splits the slots: ``fully_shard(opt, mesh)`` is
    ZeRO-1, for a model whose parameters are on every device.

    Args:
        module: a model, also on the meta device, where it is noted for `nn.materialize`; or an optimizer.
        mesh: the devices.
        axis: the axis of the mesh.
        min_size: how many numbers an array has at least that is split.

    Raises:
        UnknownNameError: if the mesh lacks the axis.

    Source: ``torch.distributed.fsdp.fully_shard``.

    Example:
        >>> import jax, statefulnn as nn
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> model = nn.parallel.fully_shard(nn.Linear(32, 64), mesh)
        >>> model.weight.sharding.spec == jax.P("data")
        True
    """
    require_mesh(mesh, "nn.parallel.fully_shard", axis)
    parts = mesh.shape[axis]

    def split(names: Sequence[str], value: Value, now: Spec) -> Spec:
        used = {a for entry in now for a in (entry if isinstance(entry, tuple) else (entry,))}
        free = [i for i, n in enumerate(value.shape) if now[i] is None and n > 0 and n % parts == 0]
        if axis not in used and free and math.prod(value.shape) >= min_size:
            now[max(free, key=lambda i: value.shape[i])] = axis
        return now

    module.to(_Rule(mesh, split))
    for part in [m for m in module.modules() if isinstance(m, LayerStack)]:
        part.batch_axis = axis
    return module


@shortened
def parallelize_module(
    module: _M,
    device_mesh: Mesh,
    parallelize_plan: ParallelStyle | Mapping[str, ParallelStyle],
    *,
    axis: str = "model",
) -> _M:
    """Split layers over an axis of a mesh, each in its style, and return the module.

    Parameters that no style splits stay as they are on this mesh; those from elsewhere are put on every
    device.

    Args:
        module: the model.
        device_mesh: the devices.
        parallelize_plan: a style for each pattern of names of modules, or one for the module itself.
        axis: the axis of the mesh.

    Raises:
        UnknownNameError: if a pattern matches no module, or the mesh lacks the axis.
        ArgumentError: if something else is given as a style, if a style does not know a layer, or if two
            styles want different things of one parameter.
        ShapeError: if a parameter does not divide. Nothing has been moved then.

    Source: ``torch.distributed.tensor.parallel.parallelize_module``.

    Example:
        >>> import jax, statefulnn as nn
        >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> styles = {"0": nn.parallel.ColwiseParallel(), "2": nn.parallel.RowwiseParallel()}
        >>> model = nn.parallel.parallelize_module(model, mesh, styles)
        >>> model[0].bias.sharding.spec, model[2].weight.sharding.spec
        (P('model',), P(None, 'model'))
    """
    require_mesh(device_mesh, "nn.parallel.parallelize_module", axis)
    modules = dict(module.named_modules())
    if not isinstance(parallelize_plan, Mapping):
        styled = [("", parallelize_plan)]
    else:
        styled = [
            (name, style)
            for pattern, style in parallelize_plan.items()
            for name in chosen(modules, pattern, "nn.parallel.parallelize_module")
        ]
    specs: dict[str, list[tuple[ParallelStyle, PartitionSpec]]] = {}
    for name, style in styled:
        if not isinstance(style, ParallelStyle):
            raise refusals.no_style(style, name)
        for own, spec in style.specs(name, modules[name], axis).items():
            specs.setdefault(f"{name}.{own}" if name else own, []).append((style, spec))

    def split(names: Sequence[str], value: Value, now: Spec) -> Spec:
        found = [pair for name in names for pair in specs.get(name, ())]
        if len({spec for _, spec in found}) > 1:
            raise refusals.name_with_two_specs(names[0], [repr(style) for style, _ in found])
        return list(found[0][1]) if found else now

    module.to(_Rule(device_mesh, split))
    for name, style in styled:
        style.apply(modules[name], device_mesh, axis)
    return module
