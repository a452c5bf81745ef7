"""PackedSequence: sequences of different lengths, one after another, step by step.

In comments: T the longest length, N sequences, S the sum of all lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.placement import resolve_device, supported
from statefulnn.functional._compiled import compiled


class _Fields(NamedTuple):
    data: Any
    batch_sizes: Any
    sorted_indices: Any
    unsorted_indices: Any


class PackedSequence(_Fields):
    """The steps of several sequences without padding, as `pack_padded_sequence` makes them.

    `data` holds the first step of all sequences, then the second of those that have one, and so on; the
    sequences are ordered by falling length. It is a pytree whose leaves are `data` and the indices:
    `batch_sizes` is static, so compiled code is for one set of lengths.

    Args:
        data: ``(S, *)``, S the sum of all lengths; or a pair of it and `batch_sizes`.
        batch_sizes: how many sequences have a first step, a second one, ...; numpy integers.
        sorted_indices: ``(N,)``: where each sequence of the falling order came from, or None.
        unsorted_indices: ``(N,)``: the inverse permutation; None computes it.

    Raises:
        DtypeError: if `batch_sizes` are traced.

    Source: ``torch.nn.utils.rnn.PackedSequence``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> packed = nn.utils.rnn.pack_sequence([jnp.array([1, 2, 3]), jnp.array([4, 5])])
        >>> packed.data.tolist(), packed.batch_sizes.tolist()
        ([1, 4, 2, 5, 3], [2, 2, 1])
    """

    __slots__ = ()

    def __new__(
        cls,
        data: Any,
        batch_sizes: ArrayLike | Sequence[int] | None = None,
        sorted_indices: jax.Array | np.ndarray | None = None,
        unsorted_indices: jax.Array | np.ndarray | None = None,
    ) -> Self:
        if batch_sizes is None:
            if not isinstance(data, (tuple, list)) or len(data) != 2:
                raise AssertionError(
                    explain(
                        "made a PackedSequence without batch_sizes",
                        "they say which elements of the data belong to which step",
                        "pack_padded_sequence(input, lengths), or PackedSequence(data, batch_sizes)",
                    )
                )
            data, batch_sizes = data
        sizes = static_integers(batch_sizes, "batch_sizes")
        if unsorted_indices is None:
            unsorted_indices = invert_permutation(sorted_indices)
        return super().__new__(cls, data, sizes, sorted_indices, unsorted_indices)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def _with_data(self, data: jax.Array) -> Self:
        return self if data is self.data else self._replace(data=data)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return it with `data` of another dtype, or with its arrays on another device.

        Args:
            args: a dtype, a device, a sharding or a platform's name, or an array to take both from.
            kwargs: `dtype` and `device` by name.
        """
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for ignored in ("non_blocking", "copy", "memory_format"):
            kwargs.pop(ignored, None)
        if kwargs:
            raise TypeError(f"to() got unexpected keyword arguments {sorted(kwargs)}")
        for arg in args:
            if isinstance(arg, (jax.Array, np.ndarray)):
                dtype, device = arg.dtype, getattr(arg, "sharding", None)
            elif isinstance(arg, (str, jax.Device, jax.sharding.Sharding)) and not _is_dtype(arg):
                device = arg
            elif arg is not None and not isinstance(arg, bool):
                dtype = arg
        data, place = self.data, resolve_device(device)
        if dtype is not None and data.dtype != supported(np.dtype(dtype)):
            data = data.astype(supported(np.dtype(dtype)))
        if place is None:
            return self._with_data(data)
        data, indices, inverse = jax.device_put(
            (data, self.sorted_indices, self.unsorted_indices), place
        )
        return self._replace(data=data, sorted_indices=indices, unsorted_indices=inverse)

    def cpu(self) -> Self:
        """Return it on the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> Self:
        """Return it on a GPU."""
        return self.to(f"cuda:{device or 0}")

    def double(self) -> Self:
        """Return it with `data` of float64."""
        return self.to(np.float64)

    def float(self) -> Self:
        """Return it with `data` of float32."""
        return self.to(np.float32)

    def half(self) -> Self:
        """Return it with `data` of float16."""
        return self.to(np.float16)

    def long(self) -> Self:
        """Return it with `data` of int64, of int32 unless 64-bit types are enabled."""
        return self.to(jax.dtypes.canonicalize_dtype(np.int64))

    def int(self) -> Self:
        """Return it with `data` of int32."""
        return self.to(np.int32)

    def short(self) -> Self:
        """Return it with `data` of int16."""
        return self.to(np.int16)

    def char(self) -> Self:
        """Return it with `data` of int8."""
        return self.to(np.int8)

    def byte(self) -> Self:
        """Return it with `data` of uint8."""
        return self.to(np.uint8)

    @property
    def is_cuda(self) -> bool:
        """Whether `data` is on a GPU."""
        return all(d.platform in ("gpu", "cuda") for d in self.data.devices())

    def is_pinned(self) -> bool:
        """Return False: arrays are not pinned."""
        return False

    def pin_memory(self) -> Self:
        """Return it as it is: arrays are not pinned."""
        return self


def _is_dtype(value: Any) -> bool:
    try:
        np.dtype(value)
    except TypeError:
        return False
    return True


_KEYS = tuple(
    jax.tree_util.GetAttrKey(name) for name in ("data", "sorted_indices", "unsorted_indices")
)


def _flatten(packed: PackedSequence) -> Any:
    data, sizes, indices, inverse = packed
    return (data, indices, inverse), tuple(sizes.tolist())


def _flatten_with_keys(packed: PackedSequence) -> Any:
    children, sizes = _flatten(packed)
    return tuple(zip(_KEYS, children, strict=True)), sizes


def _unflatten(sizes: tuple[int, ...], children: Iterable[Any]) -> PackedSequence:
    # Without checks: JAX puts other things than arrays in place of leaves.
    data, indices, inverse = children
    return tuple.__new__(PackedSequence, (data, np.array(sizes, np.int64), indices, inverse))


jax.tree_util.register_pytree_with_keys(PackedSequence, _flatten_with_keys, _unflatten, _flatten)


def static_integers(values: object, name: str) -> np.ndarray:
    """Return integers that are known while code is traced, as numpy int64 of one axis."""
    if isinstance(values, Tracer) or (
        isinstance(values, (list, tuple)) and any(isinstance(v, Tracer) for v in values)
    ):
        raise DtypeError(
            explain(
                f"packed sequences with {name} that are traced",
                "the shapes of the packed data follow from them, and shapes are static in compiled "
                "code",
                f"pass {name} as numpy integers or a tuple from outside: a closure, or an argument in "
                "static_argnums; or pack outside and pass the PackedSequence, which is a pytree",
            )
        )
    found = np.asarray(values)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        whole = found.astype(np.int64)
        if not np.issubdtype(found.dtype, np.floating) or (whole != found).any():
            raise DtypeError(
                explain(
                    f"packed sequences with {name} of dtype {found.dtype}",
                    "they count elements, so they are integers",
                    f"{name}=[3, 2, 1]",
                )
            )
    return found.astype(np.int64)


@compiled
def _inverse(permutation: jax.Array) -> Any:
    places = jnp.arange(permutation.shape[0], dtype=permutation.dtype)
    return jnp.zeros_like(permutation).at[permutation].set(places, unique_indices=True)


@overload
def invert_permutation(permutation: None) -> None: ...
@overload
def invert_permutation(permutation: np.ndarray) -> np.ndarray: ...
@overload
def invert_permutation(permutation: jax.Array) -> jax.Array: ...
def invert_permutation(permutation: jax.Array | np.ndarray | None) -> jax.Array | np.ndarray | None:
    """Return the inverse of a permutation, or None for None.

    Args:
        permutation: ``(N,)``, the numbers from 0 to ``N - 1`` in some order.

    Source: ``torch.nn.utils.rnn.invert_permutation``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.utils.rnn.invert_permutation(jnp.array([2, 0, 1])).tolist()
        [1, 2, 0]
    """
    if permutation is None:
        return None
    if isinstance(permutation, np.ndarray):
        return np.argsort(permutation).astype(permutation.dtype)
    return _inverse(permutation)


class Places(NamedTuple):
    """Where what lies, for one set of batch sizes."""

    mask: np.ndarray  # (T, N), True where a sequence goes on
    packed: np.ndarray  # (T, N): the position in the packed data, S and beyond where there is none
    padded: np.ndarray  # (S,): the position in (T N)
    lengths: np.ndarray  # (N,)


@functools.lru_cache(maxsize=64)
def _places(sizes: tuple[int, ...]) -> Places:
    counts = np.array(sizes, np.int64)
    mask = np.arange(counts[0] if len(counts) else 0)[None] < counts[:, None]
    padded = np.flatnonzero(mask)
    packed = np.cumsum(mask.reshape(-1)).reshape(mask.shape) - 1
    packed = np.where(mask, packed, len(padded))
    return Places(mask, packed.astype(np.int32), padded.astype(np.int32), mask.sum(0))


def places(batch_sizes: ArrayLike) -> Places:
    """Return where the elements of packed data lie; the arrays are shared, do not change them."""
    return _places(tuple(np.asarray(batch_sizes).tolist()))


@compiled
def _padded(data: jax.Array, index: jax.Array, value: ArrayLike | None) -> Any:
    # A gather that reads outside the data gives the value for padding, and its derivative is none.
    return (
        data.at[index].get(mode="fill", fill_value=0)
        if value is None
        else _filled(data, index, value)
    )


def _filled(data: jax.Array, index: jax.Array, value: ArrayLike) -> Any:
    rows = data.at[index].get(mode="fill", fill_value=0)
    inside = (index < data.shape[0]).reshape(*index.shape, *[1] * (data.ndim - 1))
    return jnp.where(inside, rows, value)


def padded_data(
    data: jax.Array, batch_sizes: ArrayLike, padding_value: ArrayLike | None = None
) -> jax.Array:
    """Return packed data ``(S, *)`` as ``(T, N, *)``, with zeros or a value where a sequence has ended."""
    value = None if padding_value is None else np.asarray(padding_value).astype(data.dtype)
    return _padded(data, places(batch_sizes).packed, value)


@compiled
def _taken(x: jax.Array, index: jax.Array) -> Any:
    return jnp.take(x.reshape(-1, *x.shape[2:]), index, axis=0, unique_indices=True, mode="clip")


def packed_data(x: jax.Array, batch_sizes: ArrayLike) -> jax.Array:
    """Return ``(T, N, *)`` as packed data ``(S, *)``."""
    return _taken(x, places(batch_sizes).padded)


@functools.partial(compiled, static_argnums=2)
def _along(x: Any, indices: jax.Array, axis: int) -> Any:
    return jax.tree.map(lambda s: jnp.take(s, indices, axis=axis), x)


def permuted(x: Any, indices: ArrayLike | None, axis: int = 1) -> Any:
    """Return arrays in another order along one axis; None for `indices` leaves them as they are."""
    return x if indices is None or x is None else _along(x, indices, axis)
