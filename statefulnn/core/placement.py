"""Devices and dtypes by the names users give them.

Terms
  place        where arrays are put: a ``jax.Device``, a ``Sharding``, META, or None: JAX chooses
  META         nowhere: a box holds the shape and dtype only, a ``jax.ShapeDtypeStruct``; it may have the
               sharding with which the numbers will be drawn
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeGuard

import jax
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core import refusals
from statefulnn.core.compat import Tracer
from statefulnn.core.construction import devices_in_force


class Device(Protocol):
    """A ``jax.Device``, which type checkers do not take for a class."""

    id: int
    platform: str


META: Final = "meta"
Place: TypeAlias = Device | jax.sharding.Sharding | Literal["meta"] | None
# What a box holds: numbers, or a shape without them.
Value: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct


def is_meta(value: object) -> bool:
    """Say whether a box's value is a shape without numbers."""
    return isinstance(value, jax.ShapeDtypeStruct)


class device:
    """A place for arrays; in a ``with`` block, where everything that is built there is put.

    Args:
        device: a ``jax.Device``, a ``jax.sharding.Sharding``, a platform's name ("cpu", "gpu", "cuda:1"),
            or "meta" for shapes without numbers.
        index: the number of the device of that platform.

    Raises:
        ValueError: if there is no such platform or device.

    Source: ``torch.device``.

    Example:
        >>> import statefulnn as nn
        >>> with nn.device("meta"):
        ...     layer = nn.Linear(100_000, 100_000)
        >>> layer.weight.value
        ShapeDtypeStruct(shape=(100000, 100000), dtype=float32)
        >>> nn.device("cpu").type
        'cpu'
    """

    def __init__(self, device: DeviceLike, index: int | None = None) -> None:
        if isinstance(device, str) and index is not None:
            device = f"{device}:{index}"
        self.place = resolve_device(device)

    @property
    def type(self) -> str:
        """The platform's name, or "meta"."""
        if self.place == META:
            return META
        one = self.place
        if isinstance(one, jax.sharding.Sharding):
            one = next(iter(one.device_set))
        return one.platform

    def __enter__(self) -> device:
        devices_in_force.set((*devices_in_force.get(), self.place))
        return self

    def __exit__(self, *_: object) -> None:
        devices_in_force.set(devices_in_force.get()[:-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, device) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    def __repr__(self) -> str:
        return f"device({self.place!r})"


# What users name a place by.
DeviceLike: TypeAlias = Place | device | str | int


def resolve_device(place: object) -> Any:
    """Return the place for anything that users name one by; None if they leave the choice."""
    if place is None or isinstance(place, (jax.Device, jax.sharding.Sharding)):
        _note_mesh(place)
        return place
    if isinstance(place, device):
        return place.place
    if isinstance(place, int):
        place = f"gpu:{place}"
    if not isinstance(place, str):
        raise refusals.no_device(place)
    if place == META:
        return META
    platform, _, index = place.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        have = sorted({f"{d.platform}:{d.id}" for d in jax.devices()})
        raise refusals.absent_device(place, have, error) from None


def place_in_force() -> Any:
    """Return where arrays are put if nobody says otherwise."""
    places = devices_in_force.get()
    return places[-1] if places else None


@contextlib.contextmanager
def elsewhere(place: Place = None) -> Iterator[None]:
    """Take another place, or None for JAX's choice, than what the blocks around say."""
    before = devices_in_force.get()
    if place is None and not before:
        yield
        return
    devices_in_force.set((*before, place))
    try:
        yield
    finally:
        devices_in_force.set(before)


def placed(value: Value, place: Place, share: bool = True) -> Any:
    """Return an array at a place, or only its shape and dtype there.

    Args:
        share: whether it may be the memory of `value`; else a call that donates one leaves the other.

    Raises:
        NotImplementedError: if a shape without numbers is to be put on a device. On a mesh, it is noted.
    """
    if place is None:
        return value
    _note_mesh(place)
    if place == META:
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    if is_meta(value):
        if isinstance(place, jax.sharding.NamedSharding):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)
        raise refusals.moved_from_meta()
    return jax.device_put(value, place, may_alias=None if share else False)


class Plan(Protocol):
    """Says for all arrays of a model where they go."""

    def places(self, named: Sequence[tuple[Sequence[str], Value]]) -> Sequence[Any]:
        """Return the place of each array, which is given with all of its names."""
        ...


# A function of a name and an array, or its shape without numbers.
PlaceOf: TypeAlias = Callable[[str, Value], DeviceLike]


def says_by_name(place: object) -> TypeGuard[Plan | PlaceOf]:
    """Say whether something is a plan or a function that tells the place of each name."""
    functions = (types.FunctionType, types.MethodType, functools.partial)
    return hasattr(place, "places") or isinstance(place, functions)


def places_by_name(named: Sequence[tuple[Sequence[str], Value]], plan: Any) -> list[Any]:
    """Return the places of arrays, each of which is given with all of its names.

    Args:
        named: the names and the arrays.
        plan: a `Plan`, or a `PlaceOf`, which is asked with the first name.

    Raises:
        ShapeError: if a sharding does not fit an array; also what the plan raises.
    """
    if hasattr(plan, "places"):
        places = plan.places(named)
    else:
        places = [resolve_device(plan(names[0], value)) for names, value in named]
    for (names, value), place in zip(named, places, strict=True):
        if isinstance(place, jax.sharding.NamedSharding):
            check_spec(names[0], value.shape, place.mesh, place.spec)
    return list(places)


def place_of_entry(place: Any, position: int, count: int = 1) -> Any:
    """Return where the entries of some axes lie, for an array that is laid out over a mesh."""
    if not isinstance(place, jax.sharding.NamedSharding):
        return place
    spec = [*place.spec]
    del spec[position : position + count]
    return place.update(spec=jax.sharding.PartitionSpec(*spec))


def place_of_whole(place: Any, position: int, count: int = 1) -> Any:
    """Return where an array lies whose entries along some axes lie at a place of a mesh."""
    if not isinstance(place, jax.sharding.NamedSharding):
        return place
    spec = [*place.spec]
    spec += [None] * (position - len(spec))
    spec[position:position] = [None] * count
    while spec and spec[-1] is None:  # as JAX writes it
        spec.pop()
    return place.update(spec=jax.sharding.PartitionSpec(*spec))


def check_spec(
    name: str,
    shape: tuple[int, ...],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    spec: jax.sharding.PartitionSpec,
) -> None:
    """Raise unless an array can be laid out so: the axes are the mesh's, and divide the shape.

    Raises:
        UnknownNameError: for an axis that the mesh lacks.
        ShapeError: for a spec with too many entries, or an axis that does not divide.
    """
    if len(spec) > len(shape):
        raise refusals.spec_of_other_rank(name, shape, spec)
    for i, entry in enumerate(spec):
        axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        parts = 1
        for axis in axes:
            if axis not in mesh.shape:
                raise refusals.spec_of_unknown_axis(name, spec, axis, dict(mesh.shape))
            parts *= mesh.shape[axis]
        if shape[i] % parts:
            raise refusals.spec_does_not_divide(name, shape, i, spec, parts)


_mesh_met = False


def _note_mesh(place: object) -> None:
    """Note that arrays are put on a mesh, also on one of a single device."""
    global _mesh_met
    _mesh_met = _mesh_met or isinstance(place, jax.sharding.NamedSharding)


@functools.cache
def _several_devices() -> bool:
    return jax.device_count() > 1


def placements_of(values: Sequence[Value]) -> tuple[Any, ...] | None:
    """Return for each array its sharding if it lies on several devices; None if no array does."""
    if not _several_devices():
        return None
    found = tuple(
        _canonical(v.sharding)
        if isinstance(v, jax.Array) and not isinstance(v, Tracer) and v.sharding.num_devices > 1
        else None
        for v in values
    )
    return found if any(found) else None


@functools.lru_cache(maxsize=4096)
def _canonical(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return one sharding for those that differ in None at the end: compiled code makes P(None) of P()."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = [*sharding.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(*spec), memory_kind=sharding.memory_kind
    )


def anywhere(value: Any) -> Any:
    """Return an array so that a computation on any devices takes it: from the host, if it was placed."""
    if not _several_devices() or isinstance(value, Tracer):
        return value
    return np.asarray(value) if getattr(value, "committed", False) else value


def gathered(values: Sequence[Value], movable: Collection[int]) -> list[tuple[int, Any]]:
    """Return the arrays that have to move so that one computation can take all of them, by position.

    What nobody placed goes to all devices of the mesh that the others lie on. A computation does so anyway;
    done beforehand, it is compiled once and not again for its own results. A generator that serves several
    models comes from the devices of the last one, and goes where this one lies.

    Args:
        values: the arrays.
        movable: which of them are generators.
    """
    if not (_mesh_met or _several_devices()) or len(movable) == len(values):
        return []
    placed = {
        i: v.sharding
        for i, v in enumerate(values)
        if isinstance(v, jax.Array) and not isinstance(v, Tracer) and v.committed
    }
    fixed = [s for i, s in placed.items() if i not in movable]
    devices = [s.device_set for s in fixed]
    moved: dict[int, Any] = {
        i: jax.numpy.asarray(np.asarray(values[i]))
        for i in movable
        if i in placed and placed[i].device_set not in devices
    }
    for i in moved:
        del placed[i]
    meshes = {s.mesh for s in fixed if isinstance(s, jax.sharding.NamedSharding)}
    if len(meshes) == 1 and all(d == devices[0] for d in devices):
        everywhere = jax.sharding.NamedSharding(meshes.pop(), jax.sharding.PartitionSpec())
        for i, value in enumerate(values):
            if i not in placed and isinstance(value, jax.Array) and not isinstance(value, Tracer):
                moved[i] = jax.device_put(moved.get(i, value), everywhere, may_alias=False)
    return list(moved.items())


def where_it_was(new: Any, box: Any) -> Any:
    """Return an array that nobody placed where the one lies that it replaces, if that is on a mesh."""
    if not _several_devices() or isinstance(new, Tracer) or getattr(new, "committed", True):
        return new
    old = box._value
    place = getattr(old, "sharding", None)
    if not isinstance(place, jax.sharding.NamedSharding) or new.shape != old.shape:
        return new
    return jax.device_put(new, place, may_alias=False)


def kept_in_place(value: jax.Array, sharding: jax.sharding.Sharding | None) -> Any:
    """Return a traced array with the sharding that its box has; None leaves the choice to XLA."""
    if sharding is None or isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return value
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(value, sharding)
    return jax.lax.with_sharding_constraint(value, sharding)


# The mesh that the modules lie on whose code is being traced.
_mesh_in_trace: contextvars.ContextVar[Any] = contextvars.ContextVar("mesh_in_trace", default=None)


@contextlib.contextmanager
def traced_on(placements: Sequence[Any] | None) -> Iterator[None]:
    """Let traced code know the mesh on which the leaves lie, see `placements_of`."""
    meshes = (s.mesh for s in placements or () if isinstance(s, jax.sharding.NamedSharding))
    mesh = next(meshes, None)
    token = None if mesh is None else _mesh_in_trace.set(mesh)
    try:
        yield
    finally:
        if token is not None:
            _mesh_in_trace.reset(token)


def split_by_first_axis(tree: Any, axis: str) -> Any:
    """Split the first axes of traced arrays, where they divide, over an axis of the mesh in force.

    Only if XLA chooses layouts on that axis; their other axes are left to it.
    """
    mesh: Any = _mesh_in_trace.get()
    if mesh is None or axis not in mesh.shape:
        return tree
    kind = mesh.axis_types[mesh.axis_names.index(axis)]
    inside = jax.sharding.get_abstract_mesh()  # nn.shard_map has taken some axes over
    if kind != jax.sharding.AxisType.Auto or axis in inside.manual_axes:
        return tree

    def split(x: object) -> Any:
        if not isinstance(x, Tracer) or not x.ndim or x.shape[0] % mesh.shape[axis]:
            return x
        free = [jax.sharding.PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        spec = jax.sharding.PartitionSpec(axis, *free)
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(split, tree)


def cast(value: Value, dtype: DTypeLike) -> Any:
    """Return an array, or a shape without numbers, in another dtype."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, dtype, sharding=value.sharding)
    return value.astype(dtype)


def as_dtype(given: Any) -> np.dtype:
    """Return the dtype for anything that users name one by."""
    try:
        return np.dtype(given)
    except TypeError:
        raise refusals.no_dtype(given) from None


def floating(given: Any, call: str, why: str) -> np.dtype:
    """Return the floating dtype for anything that users name one by.

    Args:
        given: the dtype.
        call: what they wrote, with ``{}`` in its place.
        why: why it is to be floating.

    Raises:
        DtypeError: for another dtype, and for float64 unless 64-bit types are enabled.
    """
    found = as_dtype(given)
    if not jax.numpy.issubdtype(found, jax.numpy.floating):
        raise refusals.no_floating_dtype(call, found.name, why)
    return supported(found)


def supported(dtype: np.dtype) -> np.dtype:
    """Return the dtype, or raise if it has 64 bits and JAX would silently give 32."""
    if dtype.itemsize == 8 * (1 + (dtype.kind == "c")) and dtype.kind in "fc":
        if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            raise refusals.dtype_of_64_bits(dtype)
    return dtype
