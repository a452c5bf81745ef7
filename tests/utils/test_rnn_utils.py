"""nn.utils.rnn against torch.nn.utils.rnn."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.utils.rnn as theirs

import statefulnn as nn
from statefulnn.utils import rnn as ours
from tests.parity.oracle import array, integers, same_class, to_jax, to_torch

LENGTHS = [3, 5, 1, 3]
SEQUENCES = [array(n, 2, seed=n + i) for i, n in enumerate(LENGTHS)]
FALLING = sorted(SEQUENCES, key=len, reverse=True)
NUMBERS = [integers(9, n, seed=n + i) for i, n in enumerate(LENGTHS)]


def same(a: Any, b: Any) -> None:
    """Assert equal shapes and exactly equal values."""
    if b is None:
        assert a is None
        return
    b = b.numpy()
    assert a.shape == b.shape
    np.testing.assert_array_equal(a, b)


def same_packed(a: Any, b: Any) -> None:
    """Assert that two packed sequences hold the same."""
    for x, y in zip(a, b, strict=True):
        same(x, y)


def test_the_names_are_torchs() -> None:
    assert sorted(ours.__all__) == sorted(theirs.__all__)
    assert nn.utils.rnn is ours


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sequences", [SEQUENCES, NUMBERS], ids=["features", "numbers"])
@pytest.mark.parametrize("value", [0, -2])
def test_pad_sequence(batch_first: bool, side: str, sequences: Any, value: float) -> None:
    same(
        ours.pad_sequence(to_jax(sequences), batch_first, value, side),
        theirs.pad_sequence(to_torch(sequences), batch_first, value, side),
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_packing_and_unpacking(batch_first: bool, sort: bool, dtype: str) -> None:
    sequences = FALLING if sort else SEQUENCES
    lengths = [len(s) for s in sequences]
    x = theirs.pad_sequence(to_torch(sequences), batch_first).to(getattr(torch, dtype))
    a = ours.pack_padded_sequence(
        jnp.asarray(x.float().numpy(), dtype), lengths, batch_first, enforce_sorted=sort
    )
    b = theirs.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=sort)
    assert a.data.dtype == dtype
    same_packed(a._replace(data=a.data.astype(jnp.float32)), b.to(torch.float32))
    for total in (None, 5, 8):
        for x, y in zip(
            ours.pad_packed_sequence(a, batch_first, -1, total),
            theirs.pad_packed_sequence(b, batch_first, -1, total),
            strict=True,
        ):
            same(x.astype(jnp.float32), y.float())


@pytest.mark.parametrize("sort", [False, True])
def test_pack_sequence_and_unpack_sequence(sort: bool) -> None:
    for sequences in (FALLING, [s[:, 0] for s in FALLING]) if sort else (SEQUENCES, NUMBERS):
        a = ours.pack_sequence(to_jax(sequences), enforce_sorted=sort)
        b = theirs.pack_sequence(to_torch(sequences), enforce_sorted=sort)
        same_packed(a, b)
        for x, y in zip(ours.unpack_sequence(a), theirs.unpack_sequence(b), strict=True):
            same(x, y)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unpad_sequence(batch_first: bool) -> None:
    padded = theirs.pad_sequence(to_torch(SEQUENCES), batch_first)
    lengths = torch.tensor([3, 0, 1, 9])
    wanted = theirs.unpad_sequence(padded.clone(), lengths, batch_first)
    got = ours.unpad_sequence(
        jnp.asarray(padded.numpy()), jnp.asarray(lengths.numpy()), batch_first
    )
    for x, y in zip(got, wanted, strict=True):
        same(x, y)


def test_invert_permutation() -> None:
    assert ours.invert_permutation(None) is None
    for order in ([0], [2, 0, 1], [4, 3, 1, 0, 2]):
        same(
            ours.invert_permutation(jnp.array(order)),
            theirs.invert_permutation(torch.tensor(order)),
        )
        same(
            ours.invert_permutation(np.array(order)), theirs.invert_permutation(torch.tensor(order))
        )


def test_gradients_pass_through_packing_and_padding() -> None:
    x = array(5, 4, 2)
    weight = array(6, 4, 2, seed=1)
    tensor = torch.as_tensor(x).requires_grad_(True)
    packed = theirs.pack_padded_sequence(tensor, LENGTHS, enforce_sorted=False)
    out, _ = theirs.pad_packed_sequence(packed, total_length=6)
    (out * torch.as_tensor(weight)).sum().backward()

    def loss(x: Any) -> Any:
        packed = ours.pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        return (ours.pad_packed_sequence(packed, total_length=6)[0] * weight).sum()

    same(jax.jit(jax.grad(loss))(jnp.asarray(x)), tensor.grad)


MISUSE: list[Callable[[Any, Any], Any]] = [
    lambda lib, x: lib.pack_padded_sequence(x((5, 4, 2)), [3, 5, 1, 3]),
    lambda lib, x: lib.pack_padded_sequence(x((5, 4, 2)), [5, 3, 0, 0]),
    lambda lib, x: lib.pack_padded_sequence(x((5, 4, 2)), [5, 3, 1]),
    lambda lib, x: lib.pack_padded_sequence(x((5, 0, 2)), []),
    lambda lib, x: lib.pack_sequence([x((2, 3)), x((3, 3))]),
    lambda lib, x: lib.pack_sequence([x((2, 3)), x((0, 3))]),
    lambda lib, x: lib.pad_sequence(3),
    lambda lib, x: lib.pad_sequence([]),
    lambda lib, x: lib.pad_sequence([x((2,))], padding_side="middle"),
    lambda lib, x: lib.pad_sequence([x((2, 3)), x((2, 4))]),
    lambda lib, x: lib.pad_packed_sequence(lib.pack_sequence([x((3,))]), total_length=2),
    lambda lib, x: lib.unpad_sequence(
        x((5, 4)), np.array([1, 2]) if lib is ours else torch.ones(2)
    ),
    lambda lib, x: lib.PackedSequence(x((3,))),
]


@pytest.mark.parametrize("call", MISUSE)
def test_misuse_raises_torchs_class(call: Callable) -> None:
    with pytest.raises(Exception) as a:
        call(ours, jnp.ones)
    with pytest.raises(Exception) as b:
        call(theirs, torch.ones)
    same_class(a.value, b.value)


def test_a_length_beyond_the_input_is_refused() -> None:
    # torch reads on in memory there.
    with pytest.raises(nn.ShapeError, match="(?s)longest length is 6.*5 steps.*Instead"):
        ours.pack_padded_sequence(jnp.ones((5, 4, 2)), [6, 3, 1, 1])


def test_traced_lengths_are_refused() -> None:
    pack = jax.jit(lambda x, n: ours.pack_padded_sequence(x, n).data)
    with pytest.raises(nn.DtypeError, match=r"(?s)traced.*static_argnums"):
        pack(jnp.ones((3, 2)), jnp.array([3, 2]))
    with pytest.raises(nn.DtypeError, match="traced"):
        jax.jit(lambda x, n: ours.unpad_sequence(x, n))(jnp.ones((3, 2)), jnp.array([3, 2]))
    with pytest.raises(nn.DtypeError, match="integers"):
        ours.pack_padded_sequence(jnp.ones((3, 2)), [2.5, 1.0])


# --------------------------------------------------------------------------------------------------
# PackedSequence


@pytest.fixture
def packed() -> Any:
    return ours.pack_sequence(to_jax(SEQUENCES), enforce_sorted=False)


def test_a_packed_sequence_unpacks_as_a_named_tuple(packed: Any) -> None:
    data, sizes, indices, inverse = packed
    assert data is packed.data
    assert isinstance(sizes, np.ndarray)
    again = ours.PackedSequence((data, sizes), sorted_indices=indices)
    np.testing.assert_array_equal(again.unsorted_indices, inverse)
    assert repr(packed).startswith("PackedSequence(data=")


def test_a_packed_sequence_is_a_pytree_with_static_sizes(packed: Any) -> None:
    leaves, tree = jax.tree.flatten(packed)
    assert len(leaves) == 3
    back = jax.tree.unflatten(tree, leaves)
    assert type(back) is ours.PackedSequence
    np.testing.assert_array_equal(back.batch_sizes, packed.batch_sizes)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)]
    assert paths == [".data", ".sorted_indices", ".unsorted_indices"]
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p))(packed)
    np.testing.assert_array_equal(doubled.data, 2 * packed.data)

    traces = []

    @jax.jit
    def padded(p: Any) -> Any:
        traces.append(1)
        return ours.pad_packed_sequence(p)[0]

    padded(packed)
    padded(jax.tree.map(lambda x: x, packed))
    assert len(traces) == 1
    longer = ours.pack_sequence([jnp.ones((n, 2)) for n in (4, 4, 2, 2)])
    padded(longer)
    assert len(traces) == 2


def test_conversions_keep_the_order(packed: Any) -> None:
    torch_packed = theirs.pack_sequence(to_torch(SEQUENCES), enforce_sorted=False)
    for name in ("half", "float", "int", "short", "char"):
        got, wanted = getattr(packed, name)(), getattr(torch_packed, name)()
        assert str(got.data.dtype) == str(wanted.data.dtype).removeprefix("torch.")
        same_packed(got, wanted)
    assert packed.to(jnp.float32) is packed
    assert packed.to(dtype=jnp.bfloat16).data.dtype == jnp.bfloat16
    assert packed.to(jnp.zeros(1, jnp.int32)).data.dtype == jnp.int32
    assert packed.to("float16").data.dtype == jnp.float16
    assert packed.cpu().data.dtype == jnp.float32
    assert packed.long().data.dtype == jax.dtypes.canonicalize_dtype(np.int64)
    assert not packed.is_cuda
    assert not packed.is_pinned()
    assert packed.pin_memory() is packed
    with pytest.raises(nn.DtypeError, match="64"):
        packed.double()


def test_a_packed_sequence_is_copied_and_pickled(packed: Any) -> None:
    for again in (copy.copy(packed), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(again) is ours.PackedSequence
        for a, b in zip(again, packed, strict=True):
            np.testing.assert_array_equal(a, b)
