"""Sequences of different lengths: padding them to one array, and packing them without padding.

Lengths are static: they decide on shapes, so under ``jax.jit`` they must not be traced.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.core.listing import listing
from statefulnn.functional._checks import array, shape_error
from statefulnn.functional.packed import (
    PackedSequence,
    invert_permutation,
    packed_data,
    padded_data,
    permuted,
    places,
    static_integers,
)

__all__ = [
    "PackedSequence",
    "invert_permutation",
    "pack_padded_sequence",
    "pack_sequence",
    "pad_packed_sequence",
    "pad_sequence",
    "unpack_sequence",
    "unpad_sequence",
]
__dir__ = listing(globals())


def _integers(values: ArrayLike) -> Any:
    return jnp.asarray(values, jax.dtypes.canonicalize_dtype(np.int64))


def pack_padded_sequence(
    input: ArrayLike,
    lengths: ArrayLike | Sequence[int],
    batch_first: bool = False,
    enforce_sorted: bool = True,
) -> PackedSequence:
    """Take the padding out of a batch of sequences.

    Args:
        input: ``(T, N, *)``, or ``(N, T, *)`` with `batch_first`; what lies beyond a length is dropped.
        lengths: ``(N,)``, integers from 1 to T, static.
        batch_first: whether the batch is the first axis.
        enforce_sorted: whether the lengths must fall; False sorts them, and the order is restored by
            what unpacks.

    Raises:
        RuntimeError: if lengths are out of range or, with `enforce_sorted`, do not fall.
        DtypeError: if lengths are traced.

    Source: ``torch.nn.utils.rnn.pack_padded_sequence``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> x = jnp.array([[1, 2, 0], [3, 0, 0], [4, 5, 6]])
        >>> packed = nn.utils.rnn.pack_padded_sequence(x, [2, 1, 3], True, enforce_sorted=False)
        >>> packed.data.tolist(), packed.batch_sizes.tolist(), packed.sorted_indices.tolist()
        ([4, 1, 3, 5, 2, 6], [3, 2, 1], [2, 0, 1])
    """
    function = "pack_padded_sequence"
    x = array(input, "input", function)
    sizes = static_integers(lengths, "lengths")
    given = f"{function} was given input of shape {tuple(x.shape)} and lengths {sizes.tolist()}"
    if x.ndim < 2:
        raise shape_error(
            given, "it needs an axis for time and one for the batch", "add one: input[:, None]"
        )
    if batch_first:
        x = _swapped(x)
    if sizes.shape != (x.shape[1],):
        raise shape_error(
            given,
            f"expected one length for each of {x.shape[1]} sequences",
            "batch_first=True if the first axis is the batch's",
        )
    if not sizes.size:
        raise shape_error(given, "there is nothing to pack", "leave empty batches out")
    order = None
    if not enforce_sorted:
        order = np.argsort(-sizes, kind="stable")
        sizes = sizes[order]
    elif (np.diff(sizes) > 0).any():
        raise RuntimeError(
            explain(
                given,
                "with enforce_sorted the sequences must come in the order of falling length",
                "enforce_sorted=False",
            )
        )
    if sizes[-1] <= 0:
        raise RuntimeError(
            explain(
                given,
                "the length of every sequence has to be larger than 0",
                "leave empty sequences out",
            )
        )
    if sizes[0] > x.shape[0]:
        raise shape_error(
            given,
            f"the longest length is {sizes[0]}, and there are {x.shape[0]} steps",
            f"lengths of at most {x.shape[0]}",
        )
    batch_sizes = (np.arange(sizes[0])[:, None] < sizes[None]).sum(1)
    indices = None if order is None else _integers(order)
    inverse = None if order is None else _integers(np.argsort(order))
    x = permuted(x, indices)
    return PackedSequence(packed_data(x, batch_sizes), batch_sizes, indices, inverse)


@jax.jit
def _swapped(x: jax.Array) -> Any:
    return jnp.swapaxes(x, 0, 1)


def pad_packed_sequence(
    sequence: PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Put the padding back in: the inverse of `pack_padded_sequence`.

    Args:
        sequence: what to pad.
        batch_first: whether the batch is the first axis of the result.
        padding_value: what stands where a sequence has ended.
        total_length: the number of steps of the result; None for the longest length.

    Returns:
        ``(T, N, *)``, or ``(N, T, *)`` with `batch_first`; and the lengths ``(N,)``, in the order that the
        sequences had before they were packed.

    Raises:
        ValueError: if `total_length` is less than the longest length.

    Source: ``torch.nn.utils.rnn.pad_packed_sequence``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> packed = nn.utils.rnn.pack_sequence([jnp.array([1, 2]), jnp.array([3])])
        >>> padded, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        >>> padded.tolist(), lengths.tolist()
        ([[1, 2], [3, 0]], [2, 1])
    """
    data, sizes, _, inverse = sequence
    data = array(data, "sequence.data", "pad_packed_sequence")
    longest = len(sizes)
    if total_length is not None:
        total_length = operator.index(total_length)
        if total_length < longest:
            raise ValueError(
                explain(
                    f"pad_packed_sequence was given total_length={total_length}",
                    f"the longest sequence has {longest} steps",
                    f"total_length={longest}, or more",
                )
            )
        sizes = np.concatenate([sizes, np.zeros(total_length - longest, np.int64)])
    x = padded_data(data, sizes, padding_value)
    lengths = _integers(places(sizes).lengths)
    if batch_first:
        x = _swapped(x)
    return permuted(x, inverse, 0 if batch_first else 1), permuted(lengths, inverse, 0)


def pad_sequence(
    sequences: Iterable[ArrayLike],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> jax.Array:
    """Stack sequences of different lengths, padded to the longest.

    Args:
        sequences: arrays ``(L, *)`` that differ in L only.
        batch_first: whether the batch is the first axis of the result.
        padding_value: what the padding consists of.
        padding_side: "right" or "left".

    Returns:
        ``(T, N, *)``, or ``(N, T, *)`` with `batch_first`, T the longest length.

    Raises:
        RuntimeError: if there are no sequences, or `padding_side` is neither of the two.
        ShapeError: if the other axes differ.

    Source: ``torch.nn.utils.rnn.pad_sequence``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.utils.rnn.pad_sequence(
        ...     [jnp.array([1, 2]), jnp.array([3])], batch_first=True
        ... ).tolist()
        [[1, 2], [3, 0]]
    """
    function = "pad_sequence"
    if not isinstance(sequences, Iterable):
        raise RuntimeError(
            explain(
                f"{function} was given sequences={type(sequences).__name__}",
                "it stacks several arrays",
                f"a list of arrays: {function}([a, b])",
            )
        )
    arrays = [array(x, f"sequences[{i}]", function) for i, x in enumerate(sequences)]
    if not arrays:
        raise RuntimeError(
            explain(
                f"{function} was given no sequences",
                "a batch has at least one",
                f"{function}([a, b])",
            )
        )
    if padding_side not in ("left", "right"):
        raise RuntimeError(
            explain(
                f"{function} was given padding_side={padding_side!r}",
                "padding is put at one end",
                'padding_side="right", or padding_side="left"',
            )
        )
    first = arrays[0]
    for i, x in enumerate(arrays):
        if x.ndim == 0 or x.shape[1:] != first.shape[1:]:
            raise shape_error(
                f"{function} was given sequences[0] of shape {tuple(first.shape)} and sequences[{i}] "
                f"of shape {tuple(x.shape)}",
                "sequences may differ in the first axis only",
                "reshape them to (length, *), with the same other axes",
            )
    longest = max(x.shape[0] for x in arrays)
    rows = []
    for x in arrays:
        missing = longest - x.shape[0]
        low, high = (missing, 0) if padding_side == "left" else (0, missing)
        value = np.asarray(padding_value).astype(first.dtype)
        widths = [(low, high, 0)] + [(0, 0, 0)] * (x.ndim - 1)
        rows.append(jax.lax.pad(x.astype(first.dtype), value, widths))
    return jnp.stack(rows, 0 if batch_first else 1)


def unpad_sequence(
    padded_sequences: ArrayLike, lengths: ArrayLike | Sequence[int], batch_first: bool = False
) -> list[jax.Array]:
    """Split a padded batch into its sequences.

    Args:
        padded_sequences: ``(T, N, *)``, or ``(N, T, *)`` with `batch_first`.
        lengths: ``(N,)``, static.
        batch_first: whether the batch is the first axis.

    Returns:
        N arrays ``(L, *)``.

    Raises:
        ShapeError: if there is not one length for each sequence.
        DtypeError: if lengths are traced.

    Source: ``torch.nn.utils.rnn.unpad_sequence``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> parts = nn.utils.rnn.unpad_sequence(
        ...     jnp.array([[1, 2], [3, 0]]), [2, 1], batch_first=True
        ... )
        >>> [x.tolist() for x in parts]
        [[1, 2], [3]]
    """
    x = array(padded_sequences, "padded_sequences", "unpad_sequence")
    sizes = static_integers(lengths, "lengths")
    axis = 0 if batch_first else 1
    if x.ndim < 2 or sizes.shape != (x.shape[axis],):
        raise shape_error(
            f"unpad_sequence was given padded_sequences of shape {tuple(x.shape)} and lengths of shape "
            f"{sizes.shape}",
            "one length for each sequence is needed",
            "batch_first=True if the first axis is the batch's",
        )
    if batch_first:
        return [x[i, : max(n, 0)] for i, n in enumerate(sizes.tolist())]
    return [x[: max(n, 0), i] for i, n in enumerate(sizes.tolist())]


def pack_sequence(sequences: Sequence[ArrayLike], enforce_sorted: bool = True) -> PackedSequence:
    """Pack sequences of different lengths.

    Args:
        sequences: arrays ``(L, *)`` that differ in L only.
        enforce_sorted: whether the lengths must fall; False sorts them.

    Raises:
        RuntimeError: if lengths are 0 or, with `enforce_sorted`, do not fall.
        ShapeError: if the other axes differ.

    Source: ``torch.nn.utils.rnn.pack_sequence``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.utils.rnn.pack_sequence([jnp.array([1, 2]), jnp.array([3])]).data.tolist()
        [1, 3, 2]
    """
    padded = pad_sequence(sequences)
    lengths = [np.shape(x)[0] for x in sequences]
    return pack_padded_sequence(padded, lengths, enforce_sorted=enforce_sorted)


def unpack_sequence(packed_sequences: PackedSequence) -> list[jax.Array]:
    """Split packed sequences into a list: the inverse of `pack_sequence`.

    Args:
        packed_sequences: what to split.

    Returns:
        N arrays ``(L, *)``, in the order that they had before they were packed.

    Source: ``torch.nn.utils.rnn.unpack_sequence``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> packed = nn.utils.rnn.pack_sequence([jnp.array([1, 2]), jnp.array([3])])
        >>> [x.tolist() for x in nn.utils.rnn.unpack_sequence(packed)]
        [[1, 2], [3]]
    """
    padded, _ = pad_packed_sequence(packed_sequences, batch_first=True)
    lengths = places(packed_sequences.batch_sizes).lengths
    inverse = packed_sequences.unsorted_indices
    if inverse is not None:
        lengths = lengths[static_integers(inverse, "unsorted_indices")]
    return unpad_sequence(padded, lengths, batch_first=True)
