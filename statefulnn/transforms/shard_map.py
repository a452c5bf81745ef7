"""nn.shard_map: run a function on each device of a mesh, on its part of arrays and modules."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from typing import Any, overload

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from statefulnn.core.errors import StateWriteError, explain
from statefulnn.core.generator import Generator, advance
from statefulnn.core.names import chosen
from statefulnn.core.plan import build_plan
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.lift import SplitCall, Writes, spread, template, unbound
from statefulnn.transforms.types import P, R

_RANDOMNESS = ("different", "same")


@overload
def shard_map(
    fun: Callable[P, R],
    *,
    in_specs: PartitionSpec | tuple[Any, ...] | list[Any] | None,
    out_specs: Any,
    mesh: Mesh | AbstractMesh | None = None,
    axis_names: Set[Hashable] = frozenset(),
    check_vma: bool = True,
    randomness: str = "different",
) -> Callable[P, R]: ...
@overload
def shard_map(
    fun: None = None,
    *,
    in_specs: PartitionSpec | tuple[Any, ...] | list[Any] | None,
    out_specs: Any,
    mesh: Mesh | AbstractMesh | None = None,
    axis_names: Set[Hashable] = frozenset(),
    check_vma: bool = True,
    randomness: str = "different",
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def shard_map(
    fun: Callable | None = None,
    *,
    in_specs: PartitionSpec | tuple[Any, ...] | list[Any] | None,
    out_specs: Any,
    mesh: Mesh | AbstractMesh | None = None,
    axis_names: Set[Hashable] = frozenset(),
    check_vma: bool = True,
    randomness: str = "different",
) -> Any:
    """Return a function that runs on every device with its part of the arguments, as ``jax.shard_map``.

    Inside, a module holds this device's part of its arrays. What is written to an array that is spread over
    the devices stays spread; what is written to a replicated one must be equal on all devices, so take
    ``jax.lax.pmean`` or ``psum`` first. Both are written back, as arrays on the mesh: with a model that lies
    there already, ``model.to(NamedSharding(mesh, P()))``, the second call needs no compilation.

    A gradient by what is replicated is the sum over the devices, as JAX has it. Gradients of single examples
    (`nn.func.per_sample_grad`, DP-SGD), and those inside a task of `nn.meta.over_tasks`, are of their device.

    Args:
        fun: the function of one device; for a Module or a method of one, the module is replicated.
        in_specs: one entry per positional argument, or one for all. The entry of a module is a
            PartitionSpec for all its arrays, or a dict of name or pattern (``"*.weight"``) ->
            PartitionSpec, or None; arrays that no entry names are replicated.
        out_specs: the PartitionSpecs of the outputs, which are arrays.
        mesh: the mesh; None for the one that ``jax.set_mesh`` has set.
        axis_names: the axes to split over; all of the mesh if it is empty.
        check_vma: whether JAX checks that what is replicated is equal on all devices.
        randomness: "different" draws other numbers on each device, "same" the same. Different numbers where
            equal ones are needed are found by `check_vma`, equal masks for different examples by nothing.

    Returns:
        the function of whole arrays and modules; it takes positional arguments.

    Raises:
        StateWriteError: if devices write different values to a replicated array.
        UnknownNameError: for a name or pattern in `in_specs` that matches nothing.

    Source: ``jax.shard_map``; `randomness` after ``torch.func.vmap``.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, statefulnn as nn
        >>> from jax.sharding import Mesh, PartitionSpec as P
        >>> mesh = Mesh(np.array(jax.devices()), ("batch",))
        >>> norm = nn.SyncBatchNorm(2, axis_name="batch")
        >>> step = nn.shard_map(norm, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
        >>> x = jnp.ones((8 * len(jax.devices()), 2))
        >>> nn.jit(step)(x).shape == x.shape, int(norm.num_batches_tracked)
        (True, 1)
    """
    given: Any = {"mesh": mesh, "axis_names": axis_names, "check_vma": check_vma}
    if fun is None:
        return functools.partial(
            shard_map, in_specs=in_specs, out_specs=out_specs, randomness=randomness, **given
        )
    if randomness not in _RANDOMNESS:
        raise ValueError(f"randomness must be one of {_RANDOMNESS}, got {randomness!r}")
    function, owner = unbound(fun)

    @shortened
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        count = len(args) - (owner is not None)
        specs = tuple(in_specs) if isinstance(in_specs, (tuple, list)) else (in_specs,) * count
        specs = specs if owner is None else (None, *specs)
        call = SplitCall((args, {}))
        names = call.moduledef.leaf_names
        leaf_specs, dynamic_specs = _specs(call, specs)
        own = {i for i in range(len(names)) if call.moduledef.kind_of(i) == "generator"}
        own = own if randomness == "different" else set()
        found: list[Writes] = []

        def body(
            modules: dict[str, jax.Array], arrays: list[Any]
        ) -> tuple[Any, dict[str, jax.Array]]:
            before = [modules[name] for name in names]
            leaves = [
                _of_device(v, mesh, axis_names) if i in own else v for i, v in enumerate(before)
            ]
            out, written = call.run(function, leaves, arrays)
            if written.out is not None:
                raise _returned_module(function)
            found[:] = [written]
            after = dict(zip(names, before, strict=True))
            for i, value in zip(written.indices, written.values, strict=True):
                if i not in own:
                    after[names[i]] = _agreed(names[i], value, leaf_specs[i])
            return out, after

        body.__name__ = getattr(function, "__name__", "f")
        by_name = dict(zip(names, leaf_specs, strict=True))
        mapped = jax.shard_map(
            body, in_specs=(by_name, dynamic_specs), out_specs=(out_specs, by_name), **given
        )
        leaves = call.leaves
        out, after = mapped(dict(zip(names, leaves, strict=True)), call.dynamic)
        indices = found[0].indices
        values = [advance(leaves[i])[1] if i in own else after[names[i]] for i in indices]
        return call.finish(out, Writes(indices, values))

    return wrapper if owner is None else types.MethodType(wrapper, owner)


def _is_spec(entry: object) -> bool:
    return entry is None or isinstance(entry, PartitionSpec)


def _specs(call: SplitCall, specs: tuple) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
    """Return the spec of each leaf of the modules, and of each other leaf."""
    try:
        entries = list(spread(specs, template(call.signature.treedef)[0], _is_spec))
    except ValueError as error:
        raise ValueError(
            explain(
                f"nn.shard_map was given in_specs that do not fit the arguments ({error})",
                "there is one entry for each positional argument, or for each of its parts",
                "pass a tuple, such as in_specs=(None, P('batch')) for a replicated module and a batch",
            )
        ) from None
    leaf_specs: dict[int, PartitionSpec] = {}
    dynamic_specs = [PartitionSpec()] * len(call.dynamic)
    for mark, entry in entries:
        if mark.is_leaf:
            dynamic_specs[mark.number] = PartitionSpec() if entry is None else entry
            continue
        for i, spec in _specs_of_module(call, call.roots[mark.number], entry):
            if leaf_specs.setdefault(i, spec) != spec:
                raise ValueError(
                    explain(
                        f"nn.shard_map was given {leaf_specs[i]} and {spec} for "
                        f"{call.moduledef.leaf_names[i]!r}",
                        "an array has one spec, also if two arguments share it or two patterns match it",
                        "give both the same spec",
                    )
                )
    whole = PartitionSpec()
    return [leaf_specs.get(i, whole) for i in range(call.moduledef.num_leaves)], dynamic_specs


def _specs_of_module(call: SplitCall, root: Any, entry: Any) -> Iterator[tuple[int, PartitionSpec]]:
    """Yield the leaf positions below a module, or box, that an entry names, with their specs."""
    position = {id(box): i for i, box in enumerate(call.plan.boxes)}
    plan = build_plan([root])
    named = {
        name: position[id(box)]
        for name, box in zip(plan.moduledef.leaf_names, plan.boxes, strict=True)
        if not isinstance(box, Generator)
    }
    for wanted, spec in entry.items() if isinstance(entry, Mapping) else [(None, entry)]:
        for name in chosen(named, wanted, "nn.shard_map"):
            yield named[name], PartitionSpec() if spec is None else spec


def _of_device(
    state: jax.Array, mesh: Mesh | AbstractMesh | None, axis_names: Set[Hashable]
) -> jax.Array:
    """Return a generator state of this device's own."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = tuple(n for n in mesh.axis_names if not axis_names or n in axis_names)
    return Generator(jax.random.fold_in(advance(state)[0], jax.lax.axis_index(axes))).state


def _agreed(name: str, value: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return what is written to an array; raise if devices differ where the spec says they are equal."""
    kind = jax.typeof(value)
    varying = getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())
    split = {n for part in spec for n in (part if isinstance(part, tuple) else (part,))}
    alone = tuple(n for n in varying - split if jax.lax.axis_size(n) == 1)
    if alone:  # JAX does not know that one device agrees with itself
        value = jax.lax.psum(value, alone).astype(value.dtype)
    differs = sorted(map(str, varying - split - {*alone}))
    if differs:
        raise StateWriteError(
            explain(
                f"wrote to {name!r} under nn.shard_map a value that may differ over {', '.join(differs)}",
                "the array is replicated over these axes of the mesh, so all devices must write the same",
                "take the mean over the devices first, jax.lax.pmean(value, axis) (a SyncBatchNorm with "
                "axis_name does); or spread the array by in_specs; or put the layer into eval mode",
            )
        )
    return value


def _returned_module(function: Callable) -> TypeError:
    return TypeError(
        explain(
            f"{getattr(function, '__name__', 'the function')!r} returned a module, or a box of one, "
            "under nn.shard_map",
            "out_specs says how arrays are put together",
            "return arrays (p.value); what is written to a module in the arguments is written back",
        )
    )
