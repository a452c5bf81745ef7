"""Meshes of devices, and batches spread over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from statefulnn.core import refusals
from statefulnn.core.placement import check_spec
from statefulnn.core.tracebacks import shortened

_T = TypeVar("_T")


@shortened
def init_device_mesh(
    device_type: str, mesh_shape: Sequence[int], *, mesh_dim_names: Sequence[str]
) -> Mesh:
    """Return a mesh of devices whose axes are automatic: XLA chooses how intermediate values are laid out.

    ``jax.make_mesh`` has explicit axes unless told otherwise. There the layout is part of each array's type,
    and an operation with several possible layouts asks for one. Layers take both kinds.

    Args:
        device_type: the platform: "cpu", "gpu", "cuda", "tpu".
        mesh_shape: how many devices there are along each axis.
        mesh_dim_names: the names of the axes.

    Raises:
        ValueError: if there are fewer devices, or not a size and a name of its own for each axis.

    Source: ``torch.distributed.device_mesh.init_device_mesh``.

    Example:
        >>> mesh = nn.parallel.init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
        >>> dict(mesh.shape)
        {'data': 1}
    """
    shape, names = _tuple(mesh_shape), _tuple(mesh_dim_names)
    sizes = [isinstance(n, (int, np.integer)) and n > 0 for n in shape]
    if not all(sizes) or not len(sizes) == len(names) == len(set(names)) > 0:
        raise refusals.wrong_mesh_shape(mesh_shape, mesh_dim_names)
    devices = jax.devices(device_type)
    if math.prod(shape) > len(devices):
        raise refusals.too_few_devices(shape, len(devices), device_type)
    types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[: math.prod(shape)])


def _tuple(given: object) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def require_mesh(mesh: object, where: str, axis: str | Sequence[str] = ()) -> None:
    """Raise unless an argument is a mesh that has some axes."""
    if not isinstance(mesh, Mesh):
        raise refusals.no_mesh(mesh, where)
    for name in (axis,) if isinstance(axis, str) else axis:
        if name not in mesh.shape:
            raise refusals.mesh_without_axis(where, name, dict(mesh.shape))


@shortened
def shard_batch(
    batch: _T, mesh: Mesh, axis: str | Sequence[str] = "data", *, parts: bool = False
) -> _T:
    """Spread the arrays of a batch over a mesh, along their first axes.

    Args:
        batch: an array, or a dict, tuple or list of arrays; with several processes, the same in each.
        mesh: the devices.
        axis: the axis of the mesh, or several.
        parts: with several processes, whether each passes only the part of the batch that it has read. The
            whole has them in the order of the processes' devices on the mesh.

    Returns:
        the batch; numbers without axes are on every device.

    Raises:
        ShapeError: if a first axis does not divide.
        UnknownNameError: if the mesh lacks the axis.
        ArgumentError: for `parts`, if a part belongs to several processes.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> nn.parallel.shard_batch({"x": jnp.ones((8, 3))}, mesh)["x"].shape
        (8, 3)
    """
    require_mesh(mesh, "nn.parallel.shard_batch", axis)
    several = jax.process_count() > 1
    if parts:
        _require_own_parts(mesh, axis)
    axes = axis if isinstance(axis, str) else tuple(axis)

    def place(path: Any, x: Any) -> Any:
        spec = PartitionSpec(axes) if np.ndim(x) else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        if parts:
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))
        check_spec(f"batch{jax.tree_util.keystr(path)}", np.shape(x), mesh, spec)
        if several:  # without comparing what the processes have, as device_put does
            whole = np.asarray(x)
            return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
        return jax.device_put(x, sharding)

    return jax.tree_util.tree_map_with_path(place, batch)


def _require_own_parts(mesh: Mesh, axis: str | Sequence[str]) -> None:
    """Raise if some processes hold the same part of a batch: they might pass different ones."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    count = math.prod(mesh.shape[a] for a in axes)
    places = NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((count,))
    holders: dict[int, set[int]] = {}
    for device, (index,) in places.items():
        holders.setdefault(index.start or 0, set()).add(device.process_index)
    for processes in holders.values():
        if len(processes) > 1:
            raise refusals.part_of_several_processes(dict(mesh.shape), axes, sorted(processes))
