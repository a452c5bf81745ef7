"""What the rows cannot say of embeddings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import statefulnn as nn
import statefulnn.functional as F
from tests.parity.oracle import Case, array, close, integers, pair, to_jax, to_torch


def test_max_norm_shrinks_rows_in_the_table_as_torch_does() -> None:
    theirs, ours = pair(Case("Embedding", (7, 3), {"max_norm": 0.5}))
    index = integers(7, 3)
    theirs(torch.as_tensor(index))
    ours(jnp.asarray(index, jnp.int32))
    np.testing.assert_allclose(ours.weight.value, theirs.weight.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_offsets_may_be_traced(mode: str) -> None:
    table, index = array(7, 3), integers(7, 9)
    run = jax.jit(functools.partial(F.embedding_bag, mode=mode))
    for offsets in ([0, 3, 4], [0, 0, 9], [0, 8, 8]):
        ours = run(*to_jax((index, table, np.array(offsets))))
        theirs = TF.embedding_bag(*to_torch((index, table, np.array(offsets))), mode=mode)
        close(ours, theirs, str(offsets), 1e-6)
    assert run._cache_size() == 1


def test_wrong_index_in_a_bag_in_compiled_code_gives_nan() -> None:
    for mode in ("sum", "mean", "max"):
        run = jax.jit(functools.partial(F.embedding_bag, mode=mode))
        for wrong in (3, -1):
            out = run(jnp.array([[0, 1], [1, wrong]]), jnp.ones((3, 2)))
            assert np.isnan(out).tolist() == [[False, False], [True, True]], mode


def test_max_norm_of_a_bag_shrinks_rows_in_the_table() -> None:
    theirs, ours = pair(Case("EmbeddingBag", (7, 3), {"max_norm": 0.5}))
    index = integers(7, 3, 2)
    theirs(torch.as_tensor(index))
    ours(jnp.asarray(index, jnp.int32))
    np.testing.assert_allclose(ours.weight.value, theirs.weight.detach().numpy(), rtol=1e-5)


def test_the_old_order_of_arguments_of_a_bag_warns() -> None:
    index, table = integers(4, 2, 2), array(4, 3)
    with pytest.warns(UserWarning, match="deprecated"):
        ours = F.embedding_bag(*to_jax((table, index)))
    close(ours, TF.embedding_bag(*to_torch((index, table))), "bags", 1e-6)


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("freeze", [True, False])
def test_a_layer_of_a_given_table_is_frozen_unless_told_otherwise(name: str, freeze: bool) -> None:
    table, index = array(5, 3), integers(5, 4, 2)
    ours = getattr(nn, name).from_pretrained(jnp.asarray(table), freeze=freeze, padding_idx=1)
    theirs = getattr(torch.nn, name).from_pretrained(to_torch(table), freeze=freeze, padding_idx=1)
    assert ours.weight.requires_grad == theirs.weight.requires_grad == (not freeze)
    assert repr(ours) == repr(theirs)
    close(ours.weight.value, theirs.weight, "the table as it was", 0)
    close(ours(to_jax(index)), theirs(to_torch(index)), "rows", 1e-6)


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_a_table_starts_normal_with_the_padding_row_zero(name: str) -> None:
    values = np.asarray(getattr(nn, name)(500, 40, padding_idx=-2).weight.value)
    assert (values[498] == 0).all()
    drawn = np.delete(values, 498, 0)
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert abs(drawn.std() - 1) < 5 / np.sqrt(2 * drawn.size)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients_of_bags_are_divided_by_the_frequency_of_their_own_row(mode: str) -> None:
    # torch's bags divide by the frequency of another row (the count is looked up at the position among
    # the distinct indices): the oracle is torch's embedding, summed up.
    table, index, sizes = array(7, 3), integers(7, 9), [3, 1, 5]
    cotangent = array(3, 3, seed=1)
    offsets = np.array([0, 3, 4])

    theirs = to_torch(table).requires_grad_(True)
    rows = TF.embedding(to_torch(index), theirs, scale_grad_by_freq=True).split(sizes)
    bags = torch.stack([getattr(bag, mode)(0) for bag in rows])
    (bags * torch.as_tensor(cotangent)).sum().backward()

    def loss(table: jax.Array) -> jax.Array:
        arrays = to_jax(index), table, to_jax(offsets)
        return (F.embedding_bag(*arrays, mode=mode, scale_grad_by_freq=True) * cotangent).sum()

    assert (np.bincount(index) > 1).any()
    close(jax.grad(loss)(to_jax(table)), theirs.grad, "gradient", 1e-5)
