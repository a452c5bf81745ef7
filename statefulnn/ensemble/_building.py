"""The members of an ensemble as one module: built in one compiled call, or put together of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.arrays import stack_arrays
from statefulnn.core.baked_in import BakedIn
from statefulnn.core.compat import EAGER, Tracer, current_trace, trace_of, varies
from statefulnn.core.errors import DtypeError, ShapeError, UninitializedParameterError, explain
from statefulnn.core.generator import as_key, drawing_generator, rng_scope
from statefulnn.core.module import Module
from statefulnn.core.moduledef import ModuleDef, differences
from statefulnn.core.objects import Identity
from statefulnn.core.placement import META, elsewhere, is_meta, place_in_force, placed
from statefulnn.core.plan import plan_of
from statefulnn.core.uninitialized import is_lazy

_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_ONE_BY_ONE = "nn.Ensemble.of([make_member() for _ in range(n)]) builds them one by one"


def check_factory(make_member: object) -> None:
    """Raise unless the argument can be called to build a member."""
    if isinstance(make_member, Module) or not callable(make_member):
        raise TypeError(
            explain(
                f"made an Ensemble of an object of type {type(make_member).__name__}",
                "the first argument builds a member: a class or function without arguments",
                "nn.Ensemble(lambda: nn.Linear(2, 3), n); of models that exist: nn.Ensemble.of(models)",
            )
        )


def first_key(rng: int | jax.Array | None) -> Any:
    """Return the key that the members' keys are folded from."""
    if rng is None:
        generator = drawing_generator()
        if current_trace() is EAGER and generator.is_concrete():
            # The same key as next_key(), without a compiled call.
            return np.array(generator.next_words(), np.uint32)
        return generator.next_key()
    return as_key(rng)


def _is_key(rng: jax.Array | np.ndarray) -> bool:
    return jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)


def build(
    make_member: Callable[[], Any], n: int, key: jax.Array | np.ndarray
) -> tuple[ModuleDef, list[Any]]:
    """Return the structure of the members and their stacked arrays, from one compiled call."""
    place = place_in_force()
    if place == META:
        raise _no_numbers("on the meta device")
    found: dict[str, Any] = {}
    eager = current_trace() is EAGER

    def lane(i: jax.Array | np.ndarray, key: jax.Array) -> Any:
        if not _is_key(key):
            key = jax.random.wrap_key_data(key)
        moduledef, leaves, once_more = _built_twice(make_member, jax.random.fold_in(key, i))
        # What does not depend on the key is the same for all members, and was meant to be unless another
        # call gives something else.
        fixed = [j for j, own in enumerate(varies(leaves, i)) if not own]
        same = [_equal(leaves[j], once_more[j]) for j in fixed]
        found.update(moduledef=moduledef, fixed=fixed)
        if eager:
            BakedIn.trace_failed()  # the code runs once: nothing it has read can become stale in it
        return leaves, jnp.stack(same) if same else jnp.ones(0, bool)

    numbers = np.arange(n, dtype=np.uint32)
    try:
        leaves, same = jax.jit(lambda key: jax.vmap(lane, (0, None), (0, None))(numbers, key))(key)
    except _UNTRACEABLE as error:
        raise ValueError(
            explain(
                "made an Ensemble with a function that looks at the values it draws",
                "all members are built in one traced call, in which values are not known: the structure "
                "cannot depend on them, and they cannot become numpy arrays",
                f"draw with nn.init functions and jax.random; or {_ONE_BY_ONE}",
            )
        ) from error
    moduledef = found["moduledef"]
    if not isinstance(same, Tracer) and not np.all(same):
        fixed = np.array(found["fixed"])[~np.asarray(same)]
        raise _drawn_elsewhere([moduledef.leaf_names[j] for j in fixed])
    return moduledef, [placed(leaf, place) for leaf in leaves]


def _built_twice(
    make_member: Callable[[], Any], key: jax.Array
) -> tuple[ModuleDef, list[Any], list[Any]]:
    """Return the structure of a member, its arrays, and those of a second one with the same key."""
    member, again = _built(make_member, key), _built(make_member, key)
    if member is again:
        raise ValueError(
            explain(
                f"made an Ensemble with a function that returns one {type(member).__name__} "
                "at each call",
                "all members would be the same module",
                "build it in the function, lambda: nn.Linear(2, 3); for n copies of a model: "
                "nn.Ensemble.of([model] * n)",
            )
        )
    (moduledef, leaves), (other, once_more) = _taken_apart(member), _taken_apart(again)
    if not _alike(moduledef.key, other.key):
        raise _changes(differences(moduledef, other))
    shapes = zip(moduledef.leaf_names, leaves, once_more, strict=True)
    changed = [(k, f"{a.shape} became {b.shape}") for k, a, b in shapes if a.shape != b.shape]
    if changed:
        raise _changes(changed)
    return moduledef, leaves, once_more


def _built(make_member: Callable[[], Any], key: jax.Array) -> Module:
    with rng_scope(key), elsewhere():
        member = make_member()
    if not isinstance(member, Module):
        raise TypeError(
            explain(
                f"made an Ensemble with a function that returned {described(member)}",
                "each call builds one member",
                "return a Module: nn.Ensemble(lambda: nn.Linear(2, 3), n)",
            )
        )
    return member


def _taken_apart(member: Module) -> tuple[ModuleDef, list[Any]]:
    boxes = [b for m in member.modules() for b in (*m._parameters.values(), *m._buffers.values())]
    if any(is_lazy(box) for box in boxes):
        raise _no_numbers("without a shape")
    plan = plan_of(member)
    leaves = [jnp.asarray(v) if isinstance(v, np.ndarray) else v for v in plan.leaves()]
    if any(map(is_meta, leaves)):
        raise _no_numbers("on the meta device")
    if not leaves:
        raise _no_arrays(member)
    return plan.moduledef, leaves


def _equal(a: jax.Array, b: jax.Array) -> Any:
    """Say whether two arrays are the same, NaN for NaN."""
    if trace_of(b) is current_trace():
        return jnp.zeros((), bool)
    return ((a == b) | ((a != a) & (b != b))).all()


def _alike(a: object, b: object) -> bool:
    """Compare two frozen structures; objects of unknown classes are alike if their classes are."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if type(a) is Identity and type(b) is Identity:
        return type(a.obj) is type(b.obj)
    return a == b


def stacked(models: list[Any]) -> tuple[ModuleDef, list[Any]]:
    """Return the structure of models that exist, and their arrays stacked."""
    if not models:
        raise ValueError(
            explain(
                "made an Ensemble of no models",
                "it has at least one member",
                "nn.Ensemble.of([nn.Linear(2, 3) for _ in range(5)])",
            )
        )
    for model in models:
        if not isinstance(model, Module):
            raise TypeError(
                explain(
                    f"made an Ensemble of {described(model)}",
                    "the members are modules",
                    "nn.Ensemble.of([model_0, model_1]); from a class: nn.Ensemble(make_member, n)",
                )
            )
    taken = [_taken_apart(model) for model in models]
    moduledef, first = taken[0]
    for number, (other, leaves) in enumerate(taken):
        if other is not moduledef:
            listed = "; ".join(f"{n}: {c}" for n, c in differences(moduledef, other)[:5])
            raise ValueError(
                explain(
                    f"made an Ensemble of models that differ: number {number} against number 0 ({listed})",
                    "one function has to serve them all",
                    "build them the same way and put them into the same mode",
                )
            )
        for name, a, b in zip(moduledef.leaf_names, first, leaves, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                error = ShapeError if a.shape != b.shape else DtypeError
                raise error(
                    explain(
                        f"made an Ensemble of models whose {name!r} differ: {b.dtype}{list(b.shape)} in "
                        f"number {number}, {a.dtype}{list(a.shape)} in number 0",
                        "they become one array",
                        "build the models with the same sizes and dtypes",
                    )
                )
    arrays = zip(*(leaves for _, leaves in taken), strict=True)
    return moduledef, [stack_arrays(values) for values in arrays]


def described(value: object, shape: tuple[int, ...] | None = None) -> str:
    """Say what an object is, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an array of shape {shape}" if shape is not None else f"a {type(value).__name__}"


def _changes(changed: list[tuple[str, str]]) -> ValueError:
    listed = "; ".join(f"{name}: {change}" for name, change in changed[:5])
    return ValueError(
        explain(
            f"made an Ensemble with a function that builds another structure at each call ({listed})",
            "one function has to serve all members",
            "build all members alike; what is to differ goes into parameters or buffers",
        )
    )


def _drawn_elsewhere(names: list[str]) -> ValueError:
    return ValueError(
        explain(
            f"made an Ensemble whose members draw {', '.join(map(repr, names[:5]))} from somewhere "
            "else than the generator in force",
            "all members are built in one traced call, so what numpy's or Python's generator gives, "
            "or a Generator() without a seed, would be the same in all of them",
            f"draw with nn.init functions, or jax.random and nn.next_key(); or {_ONE_BY_ONE}",
        )
    )


def _no_numbers(how: str) -> UninitializedParameterError:
    return UninitializedParameterError(
        explain(
            f"made an Ensemble of members with parameters {how}",
            "the members are built with their values",
            "call nn.materialize(member, x) on each and put them together with nn.Ensemble.of(members); "
            "or use ordinary layers and a real device",
        )
    )


def _no_arrays(member: Module) -> ValueError:
    return ValueError(
        explain(
            f"made an Ensemble of {type(member).__name__}, which has neither parameters nor buffers",
            "nothing tells its members apart, and nothing says how many there are",
            "nn.vmap(member, axis_size=n) runs it n times",
        )
    )
