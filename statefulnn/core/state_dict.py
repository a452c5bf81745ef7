"""state_dict and load_state_dict: torch's names, order, metadata and hooks.

The values are arrays. They are immutable, so a state dict is a snapshot and never follows the module.
Loading is all or nothing: what a failed load wrote is put back. Names of one box are one entry: any of
them is enough, and those that are there have one value.
"""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core import refusals
from statefulnn.core.arrays import as_array
from statefulnn.core.box import Box
from statefulnn.core.compat import Tracer
from statefulnn.core.construction import DEFAULT_VERSION
from statefulnn.core.narrowing import numbers_beyond, span
from statefulnn.core.objects import CONTAINERS
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import Value, is_meta
from statefulnn.core.plan import NOT_STATIC
from statefulnn.core.static_keys import refuse_hidden
from statefulnn.core.uninitialized import Uninitialized, is_lazy
from statefulnn.core.walk import CALL, ENTER, LEAVE, overrides, under_way, walk

if TYPE_CHECKING:
    from statefulnn.core.module import Module

EXTRA_STATE = "_extra_state"
# Where a load keeps its `_Loaded`: the metadata of a module pass through what users override.
_LOADED = "statefulnn.loaded"


class IncompatibleKeys(NamedTuple):
    """What did not match in `load_state_dict`."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return (
            f"IncompatibleKeys(missing_keys={self.missing_keys}, "
            f"unexpected_keys={self.unexpected_keys})"
        )

    __str__ = __repr__


def state_dict(
    module: Module, destination: dict[str, Any] | None, prefix: str, keep_vars: bool
) -> Any:
    """Collect the module's own entries, then its children's."""
    if destination is None:
        destination = OrderedDict()
        destination._metadata = OrderedDict()  # pyright: ignore[reportAttributeAccessIssue]
    result = destination
    metadata: list[dict[str, Any]] = []  # of the modules that are not done
    with under_way(("state_dict", id(destination)), module) as met:
        for event, below, m in walk(module, _members, prefix, method="state_dict", met=met):
            if event is ENTER:
                metadata.append(_begin(m, destination, below, keep_vars))
            elif event is LEAVE:
                result = _end(m, destination, below, metadata.pop())
            elif event is CALL:
                m.state_dict(destination=destination, prefix=below, keep_vars=keep_vars)
    return result


def _members(module: Module, prefix: str) -> list[tuple[str, Any]]:
    return [(f"{prefix}{name}.", m) for name, m in module._nn_shown().items() if m is not None]


def _begin(
    module: Module, destination: dict[str, Any], prefix: str, keep_vars: bool
) -> dict[str, Any]:
    """Save what is the module's own; return its metadata."""
    refuse_hidden_members(module)
    metadata: dict[str, Any] = {"version": module._version}
    if module.init_version != DEFAULT_VERSION:
        metadata["init_version"] = module.init_version
    everywhere = getattr(destination, "_metadata", None)
    if everywhere is not None:
        everywhere[prefix[:-1]] = metadata
    for hook, _, _ in list(_hooks(module, "_state_dict_pre_hooks")):
        hook(module, prefix, keep_vars)
    module._save_to_state_dict(destination, prefix, keep_vars)
    return metadata


def _end(module: Module, destination: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> Any:
    """Call the hooks that come after the children; return the dict that they leave."""
    for hook, post, _ in list(_hooks(module, "_state_dict_hooks")):
        result = hook(module, destination, prefix, metadata)
        if post and result is not None:
            raise RuntimeError("state_dict post-hook must return None")
        if not post and result is not None:
            destination = result
    return destination


def refuse_hidden_members(module: Module) -> None:
    """Raise for a module or parameter that was put into a list after the list was assigned (law 7)."""
    caches = type(module)._python_cache
    for name, value in module.__dict__.items():
        if isinstance(value, CONTAINERS) and name not in NOT_STATIC and name not in caches:
            refuse_hidden(
                lambda n=name, v=value: f"the {type(v).__name__} {module._label(n)!r}", value
            )


def save_own(module: Module, destination: dict, prefix: str, keep_vars: bool) -> None:
    """Put the module's own parameters, persistent buffers and extra state into a dict."""
    for name, box in module._parameters.items():
        if box is not None:
            destination[prefix + name] = box if keep_vars or is_lazy(box) else box.lend()
    for name, box in module._buffers.items():
        if box is not None and name not in module._non_persistent_buffers_set:
            destination[prefix + name] = box if keep_vars or is_lazy(box) else box.lend()
    if overrides(module, "get_extra_state"):
        destination[prefix + EXTRA_STATE] = module.get_extra_state()


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """Return what stands before the missing names in those that were given; "" if they differ otherwise."""
    name, given = missing[0] if missing else "", set(unexpected)
    prefixes = [key.removesuffix(name) for key in unexpected if key.endswith(f".{name}")]
    prefixes = [p for p in prefixes if {p + n for n in missing} <= given]
    # Adam has two moments of each parameter, and their number of steps; momentum is a trace.
    if prefixes and (
        prefixes[0] == "trace." or {"count", "mu." + name} & given == {"count", "mu." + name}
    ):
        return refusals.OF_AN_OPTIMIZER
    return prefixes[0] if prefixes else ""


def _nested(state: Mapping[str, object], missing: list[str]) -> str:
    """Return the entry that is a dict with all names that are missing; "" if there is none."""
    within = (k for k, v in state.items() if isinstance(v, Mapping) and {*missing} <= {*v})
    return next(within, "") if missing else ""


def load_state_dict(module: Module, given: object, strict: bool, assign: bool) -> IncompatibleKeys:
    """Load names into boxes, or raise and leave every box as it was."""
    if not isinstance(given, Mapping):
        raise refusals.no_state_dict(type(module).__name__, given)
    metadata = getattr(given, "_metadata", None)
    state = OrderedDict(given)
    for key in state:
        if not isinstance(key, str):
            raise refusals.key_of_no_text(type(module).__name__, key, type(key).__name__)
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    before = [(box, type(box), box._value) for box in _boxes(module)]
    loaded = _Loaded()
    try:
        _load(module, state, metadata, assign, loaded, missing, unexpected, errors)
        loaded.settle(missing)
        if strict:
            if unexpected:
                names = ", ".join(f'"{k}"' for k in unexpected)
                errors.insert(0, f"Unexpected key(s) in state_dict: {names}. ")
            if missing:
                names = ", ".join(f'"{k}"' for k in missing)
                errors.insert(0, f"Missing key(s) in state_dict: {names}. ")
        if errors:
            tensors = any(type(v).__module__ == "torch" for v in state.values())
            raise refusals.state_dict_does_not_fit(
                type(module).__name__,
                errors,
                tensors,
                _prefix(missing, unexpected),
                any(name.split(".")[-1] == "kernel" for name in unexpected),
                loaded.misshapen,
                _nested(state, missing),
            )
    except BaseException:
        # All or nothing. A lazy parameter that was given a shape becomes a lazy one again.
        for box, cls, value in before:
            if box._value is not value:
                box.__class__ = cls
                Box.write(box, value)
        raise
    return IncompatibleKeys(missing, unexpected)


class _Loaded:
    """Which boxes a load has met, so that names of one box count as one.

    The same holds for the extra state of a module that has several names.
    """

    def __init__(self) -> None:
        self._there: dict[int, object] = {}
        self._values: dict[int, tuple[str, Any]] = {}
        self._missing: dict[int, list[str]] = {}
        self._found: set[str] = set()
        self.misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # key, given, own

    def met(self, owner: object) -> None:
        """Record that there is an entry for a box, or for the extra state of a module."""
        self._there[id(owner)] = owner  # which also keeps its id from being used again
        self._found.update(self._missing.pop(id(owner), ()))

    def lacks(self, owner: object, key: str) -> bool:
        """Say whether a name that is not there is missing, as far as is known by now."""
        if id(owner) in self._there:
            return False
        self._missing.setdefault(id(owner), []).append(key)
        return True

    def first(self, box: Box, key: str, value: Any) -> tuple[str, Any]:
        """Return the first name that gave a box its value, and the value; maybe this one."""
        return self._values.setdefault(id(box), (key, value))

    def settle(self, missing: list[str]) -> None:
        """Take out of the missing names those that were found under another one since."""
        if self._found:
            missing[:] = [key for key in missing if key not in self._found]
            self._found.clear()


class _Entries:
    """The entries of a state dict, in the order of their keys: what lies below a prefix is one slice."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._keys = sorted(state)
        self._place = {key: i for i, key in enumerate(state)}

    def below(self, prefix: str) -> OrderedDict[str, Any]:
        """Return all entries below a prefix."""
        return self._in_order(self._keys[slice(*self._range(prefix))])

    def of_module(self, prefix: str, children: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Return the entries below a prefix that are not below a child."""
        found: list[str] = []
        i, end = self._range(prefix)
        while i < end:
            key = self._keys[i]
            dot = key.find(".", len(prefix))
            stop = i + 1 if dot < 0 else self._after(key[:dot], i, end)
            if dot < 0 or children.get(key[len(prefix) : dot]) is None:
                found += self._keys[i:stop]
            i = stop
        return self._in_order(found)

    def _range(self, prefix: str) -> tuple[int, int]:
        keys = self._keys
        if not prefix:
            return 0, len(keys)
        start = bisect.bisect_left(keys, prefix)
        return start, self._after(prefix[:-1], start, len(keys))

    def _after(self, name: str, start: int, end: int) -> int:
        # "/" comes right after ".".
        return bisect.bisect_left(self._keys, f"{name}/", start, end)

    def _in_order(self, keys: list[str]) -> OrderedDict[str, Any]:
        return OrderedDict((k, self._state[k]) for k in sorted(keys, key=self._place.__getitem__))


def _load(
    module: Module,
    state: dict[str, Any],
    metadata: Mapping[str, Any] | None,
    assign: bool,
    loaded: _Loaded,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    entries = [_Entries(state)]
    for event, prefix, m in walk(module, _members):
        if event is ENTER:
            refuse_hidden_members(m)
            local = {} if metadata is None else dict(metadata.get(prefix[:-1], {}))
            local["assign_to_params_buffers"] = assign
            local[_LOADED] = loaded
            around = entries[-1]
            hooked = "_load_state_dict_pre_hooks" in m.__dict__
            if hooked or overrides(m, "_load_from_state_dict"):
                # It may look at, and change, what goes to the modules below.
                part = state if m is module else around.below(prefix)
                m._load_from_state_dict(part, prefix, local, True, missing, unexpected, errors)
                entries.append(_Entries(part) if m._nn_shown() else around)
            else:
                own = around.of_module(prefix, m._nn_shown())
                m._load_from_state_dict(own, prefix, local, True, missing, unexpected, errors)
                entries.append(around)
        elif event is LEAVE:
            entries.pop()
            _after_load(m, loaded, IncompatibleKeys(missing, unexpected))


def _after_load(module: Module, loaded: _Loaded, incompatible: IncompatibleKeys) -> None:
    hooks = list(_hooks(module, "_load_state_dict_post_hooks"))
    if hooks:
        loaded.settle(incompatible.missing_keys)
    for hook, _, _ in hooks:
        if hook(module, incompatible) is not None:
            raise RuntimeError(
                "Hooks registered with ``register_load_state_dict_post_hook`` are not expected to "
                "return new values, if incompatible_keys need to be modified, it should be done "
                "inplace."
            )


def load_own(
    module: Module,
    state: dict,
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load the entries of one module; problems go into the three lists."""
    for hook, with_module, _ in list(_hooks(module, "_load_state_dict_pre_hooks")):
        arguments = (state, prefix, local_metadata, strict, missing, unexpected, errors)
        hook(*((module, *arguments) if with_module else arguments))
    assign = local_metadata.get("assign_to_params_buffers", False)
    shared = local_metadata.get(_LOADED)
    # A user's override may hand on metadata of its own: then this module is looked at by itself.
    loaded: _Loaded = _Loaded() if shared is None else shared
    own = {
        name: box
        for name, box in itertools.chain(module._parameters.items(), module._buffers.items())
        if box is not None and name not in module._non_persistent_buffers_set
    }
    for name, box in own.items():
        key = prefix + name
        if key in state:
            loaded.met(box)
            problem = _put(box, key, state[key], assign, loaded)
            if problem:
                errors.append(problem)
        elif strict and loaded.lacks(box, key):
            missing.append(key)

    extra = prefix + EXTRA_STATE
    if overrides(module, "set_extra_state"):
        if extra in state:
            loaded.met(module)
            module.set_extra_state(state[extra])
        elif strict and loaded.lacks(module, extra):
            missing.append(extra)
    elif strict and extra in state:
        unexpected.append(extra)
    if shared is None:
        loaded.settle(missing)

    if strict:
        children = module._nn_shown()
        for key in state:
            if key.startswith(prefix) and key != extra:
                head, _, rest = key[len(prefix) :].partition(".")
                if (rest and head not in children) or (not rest and head not in own):
                    unexpected.append(key)
                elif rest and children[head] is None:
                    unexpected.append(key)


def _put(box: Box, key: str, value: Any, assign: bool, loaded: _Loaded) -> str | None:
    """Write one entry into its box; return what is wrong with it, None if nothing is."""
    if value is box:
        return None  # as it is, or as another name of it says
    if is_lazy(value):
        return None if is_lazy(box) else f'"{key}" has no shape in the checkpoint, and has one here'
    if isinstance(value, Box):
        value = value.value
    arrays: Any = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    if not isinstance(value, arrays):
        return refusals.entry_of_no_array(key, type(value))
    if is_meta(value) and not (assign or is_meta(box._value)):
        return f'"{key}" is on the meta device in the checkpoint, which has no data to copy'
    if isinstance(box, Uninitialized):
        box.materialize(value.shape)
    have = box._value
    if tuple(value.shape) == (1,) and have.shape == ():
        value = value.reshape(())  # torch before 0.4 had no scalars
    if tuple(value.shape) != tuple(have.shape):
        loaded.misshapen.append((key, tuple(value.shape), tuple(have.shape)))
        return refusals.entry_of_other_shape(key, tuple(value.shape), tuple(have.shape))
    if _dtype_kind(value.dtype) != _dtype_kind(have.dtype):
        return refusals.entry_of_other_dtype(key, value.dtype, have.dtype)
    dtype = _kept_dtype(value, have, assign)
    beyond = numbers_beyond(value, dtype)
    if beyond is not None:
        return _cut_off(key, value.dtype, beyond, dtype)

    # Tied names are several entries of one box. A later one is compared with the first as the checkpoint
    # has it, both cast: what differs by its dtype alone is the same once it is here.
    first, earlier = loaded.first(box, key, value)
    if first != key:
        if earlier is value:
            return None
        # What is traced cannot be compared: then the last name wins.
        if not isinstance(earlier, Tracer) and not isinstance(value, Tracer):
            if _equal(_cast(earlier, _kept_dtype(earlier, have, assign)), _cast(value, dtype)):
                return None
            return refusals.entries_of_one_box_differ(first, key, _kind(box))
    new = as_array(_cast(value, dtype), box.label)
    # The values are copied into the box, so they lie where it lies.
    if not assign:
        sharding = getattr(have, "sharding", None)
        if sharding is not None and getattr(have, "committed", False):
            new = jax.device_put(new, sharding)
    # `data` takes another dtype too, which `assign` may bring; a buffer's `value` always does.
    if isinstance(box, Parameter):
        box.data = new
    else:
        box.value = new
    return None


def _kind(box: Box) -> str:
    return "parameter" if isinstance(box, Parameter) else "buffer"


def _kept_dtype(value: Value, have: Value, assign: bool) -> Any:
    """Return the dtype that an entry has in the box: with 64-bit types off JAX has fewer dtypes."""
    dtype = value.dtype if assign else have.dtype
    if is_meta(value) or (isinstance(value, jax.Array) and value.dtype == dtype):
        return value.dtype
    return jax.dtypes.canonicalize_dtype(dtype)


def _cast(value: Any, dtype: DTypeLike) -> Any:
    return value if value.dtype == dtype else value.astype(dtype)


def _cut_off(key: str, given: DTypeLike, numbers: tuple[int, int], dtype: DTypeLike) -> str:
    """Say what would be lost of an entry, and what keeps it."""
    low, high = numbers
    widest = jax.dtypes.canonicalize_dtype(given)
    if jnp.iinfo(widest).min <= low and high <= jnp.iinfo(widest).max:
        remedy = "assign=True takes the dtype of the entry"
    else:
        remedy = 'call jax.config.update("jax_enable_x64", True) before the model is built'
        if dtype != widest:
            remedy += ", and load with assign=True"
    limits = jnp.iinfo(dtype)
    return f'"{key}" {span(numbers)}, and {dtype} has {limits.min} to {limits.max}: {remedy}'


def _equal(a: Any, b: Any) -> bool:
    """Say whether two arrays have the same dtype and values; NaN equals NaN."""
    if a.dtype != b.dtype or is_meta(a) or is_meta(b):
        return a.dtype == b.dtype and is_meta(a) and is_meta(b)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    both = (a, b)
    if not all(getattr(x, "is_fully_addressable", True) for x in both):
        return bool(jnp.array_equal(a, b, equal_nan=True))
    return np.array_equal(*map(np.asarray, both), equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))


def _dtype_kind(dtype: DTypeLike) -> str:
    for kind, parent in (
        ("bool", jnp.bool_),
        ("integer", jnp.integer),
        ("floating", jnp.floating),
        ("complex", jnp.complexfloating),
    ):
        if jnp.issubdtype(dtype, parent):
            return kind
    return str(dtype)


def _boxes(module: Module) -> list[Box]:
    return [box for _, box in module._named_boxes()]


def _hooks(module: Module, name: str) -> Any:
    return module.__dict__.get(name, {}).values()
