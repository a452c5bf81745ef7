"""Pooling: what the rows of tests/parity/rows cannot say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import statefulnn as nn
import statefulnn.functional as F
from tests.parity.oracle import array, sixty_four_bits
from tests.quick import first

GEOMETRIES = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (2, 3), "stride": (3, 2), "padding": (0, 1), "dilation": (2, 1)},
    {"kernel_size": 9, "stride": 4, "padding": 4},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_forward_and_reverse_derivatives_of_a_max_pool_are_transposes(geometry: dict) -> None:
    pool = lambda x: F.max_pool2d(x, **geometry)
    x, dx = jnp.asarray(array(2, 3, 10, 11)), jnp.asarray(array(2, 3, 10, 11, seed=1))
    out, forward = jax.jvp(pool, (x,), (dx,))
    theirs = TF.max_pool2d(torch.as_tensor(np.array(x)), **geometry, return_indices=True)[1]
    picked = np.take_along_axis(
        np.asarray(dx).reshape(2, 3, -1), theirs.numpy().reshape(2, 3, -1), -1
    )
    np.testing.assert_array_equal(np.asarray(forward).reshape(2, 3, -1), picked)
    cotangent = jnp.asarray(array(*out.shape, seed=2))
    (back,) = jax.vjp(pool, x)[1](cotangent)
    np.testing.assert_allclose((back * dx).sum(), (cotangent * forward).sum(), rtol=1e-4)


def test_infinite_slopes_stay_with_their_elements() -> None:
    x = jnp.asarray(array(1, 1, 6, 6))
    for pool in (
        lambda x: F.max_pool2d(x, 3, 2),
        lambda x: F.avg_pool2d(x, 3, 2),
        lambda x: F.adaptive_max_pool2d(x, 4),
        lambda x: F.adaptive_avg_pool2d(x, 4),
    ):
        out, vjp = jax.vjp(pool, x)
        (slope,) = vjp(jnp.zeros_like(out).at[0, 0, 0, 0].set(jnp.inf))
        assert not np.isnan(slope).any()
        assert np.isinf(slope).any()
        assert (np.asarray(slope)[..., 3:, 3:] == 0).all()


@pytest.mark.parametrize("bits", first(1, [64, 32]))
def test_indices_have_the_default_integer_dtype(bits: int) -> None:
    def dtypes() -> set[str]:
        x, small = jnp.ones((1, 1, 6, 6)), jnp.full((1, 1, 2), 0.5)
        outs = [
            F.max_pool2d(x, 2, return_indices=True),
            F.max_pool2d_with_indices(jnp.ones((1, 1, 9, 9)), 9),
            F.adaptive_max_pool2d_with_indices(x, 4),
            F.adaptive_max_pool2d_with_indices(x, (0, 4)),
            F.fractional_max_pool2d_with_indices(x, 2, 3, _random_samples=small),
        ]
        return {str(index.dtype) for _, index in outs}

    if bits == 64:
        with sixty_four_bits():
            assert dtypes() == {"int64"}
    else:
        assert dtypes() == {"int32"}


def test_only_taps_are_kept_for_the_derivative_of_a_max_pool() -> None:
    x = jnp.ones((2, 3, 32, 32))
    out, vjp = jax.vjp(lambda x: F.max_pool2d(x, 3, 2, 1), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert kept <= out.size


def test_pooling_compiles_once_for_a_shape() -> None:
    count = 0

    @jax.jit
    def step(x):
        nonlocal count
        count += 1
        return jax.grad(lambda x: F.max_pool2d(F.avg_pool2d(x, 3, 1, 1), 2).sum())(x)

    for seed in range(3):
        step(jnp.asarray(array(1, 2, 8, 8, seed=seed)))
    assert count == 1


# Unpooling


@pytest.mark.parametrize("wrong", [-1, 16])
def test_an_unknown_index_outside_is_dropped(wrong: int) -> None:
    x, indices = jnp.ones((1, 2, 2)), jnp.array([[[0, 5], [10, wrong]]])
    out = jax.jit(lambda x, i: F.max_unpool2d(x, i, 2))(x, indices)
    assert np.flatnonzero(out).tolist() == [0, 5, 10]
    with pytest.raises(nn.ShapeError, match=f"{wrong}"):
        F.max_unpool2d(x, indices, 2)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unpooling_undoes_pooling_where_the_maxima_were(n: int) -> None:
    x = jnp.asarray(array(2, 3, *(6, 4, 8)[:n]))
    pool = getattr(nn, f"MaxPool{n}d")(2, return_indices=True)
    out, indices = pool(x)
    again = getattr(nn, f"MaxUnpool{n}d")(2)(out, indices, output_size=x.shape)
    kept = np.asarray(again) != 0
    np.testing.assert_array_equal(np.asarray(again)[kept], np.asarray(x)[kept])
    np.testing.assert_array_equal(np.sort(np.asarray(again)[kept]), np.sort(np.ravel(out)))


# Random windows


def _row_of_places(rng, size: int = 25, out: int = 10, kernel: int = 2, rows: int = 400):
    """Pool what grows along an axis: the maximum tells where the window ends."""
    x = jnp.broadcast_to(jnp.arange(float(size)), (1, rows, kernel, size))
    ends = F.fractional_max_pool2d(x, kernel, (1, out), rng=rng)[0, :, 0]
    return np.asarray(ends) - (kernel - 1)


def test_fractional_windows_start_at_neighbouring_distances_and_end_at_the_edge() -> None:
    starts = _row_of_places(jax.random.key(0))
    steps = np.diff(starts, axis=1)
    alpha = 23 / 9  # the room for starts over the number of steps
    assert set(np.unique(steps[:, :-1])) == {np.floor(alpha), np.ceil(alpha)}
    assert (starts[:, 0] == 0).all()
    assert (starts[:, -1] == 23).all()
    # Start i is floor((i + u) alpha) - floor(u alpha): i alpha on average, over uniform u, but for the
    # multiples of alpha that floor breaks off.
    means = starts[:, 1:-1].mean(0)
    error = 5 * 0.5 / np.sqrt(len(starts))
    exact = [
        np.mean(np.floor((i + u) * alpha) - np.floor(u * alpha))
        for u in [np.linspace(0, 1, 100_001)[:-1]]
        for i in range(1, 9)
    ]
    assert np.abs(means - exact).max() < error


def test_fractional_pooling_draws_for_each_example_channel_and_axis() -> None:
    x = jnp.broadcast_to(jnp.arange(400.0).reshape(20, 20), (2, 3, 20, 20))
    out = np.asarray(F.fractional_max_pool2d(x, 2, 8, rng=jax.random.key(1)))
    planes = {plane.tobytes() for plane in out.reshape(6, 8, 8)}
    assert len(planes) == 6
    rows, columns = out[0, 0, :, 0] // 20, out[0, 0, 0, :] % 20
    assert (rows != columns).any()


@pytest.mark.parametrize("n", [2, 3])
def test_fractional_layers_draw_anew_each_call_and_repeat_with_the_seed(n: int) -> None:
    pool = getattr(nn, f"FractionalMaxPool{n}d")(2, output_ratio=0.6).eval()
    x = jnp.asarray(array(1, 4, *(12,) * n))
    nn.manual_seed(3)
    first, second = pool(x), pool(x)
    nn.manual_seed(3)
    again = pool(x)
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)


def test_a_drawn_fractional_pool_is_one_compiled_call() -> None:
    x, key = jnp.ones((1, 2, 8, 8)), jax.random.key(0)
    jaxpr = jax.make_jaxpr(lambda x, key: F.fractional_max_pool2d(x, 2, 3, rng=key))(x, key)
    assert [e.primitive.name for e in jaxpr.eqns] == ["jit"]


def test_fractional_pooling_without_a_key_under_plain_jit_is_refused() -> None:
    with pytest.raises(nn.MissingRngError):
        jax.jit(lambda x: F.fractional_max_pool2d(x, 2, 2))(jnp.ones((1, 4, 4)))


def test_drawn_windows_agree_with_torch_in_distribution() -> None:
    torch.manual_seed(0)
    x = np.broadcast_to(np.arange(25, dtype=np.float32), (1, 400, 2, 25)).copy()
    theirs = TF.fractional_max_pool2d(torch.as_tensor(x), 2, (1, 10))[0, :, 0].numpy() - 1
    ours = _row_of_places(jax.random.key(5))
    # Two means of 400 draws each, of a standard deviation of at most a half.
    assert np.abs(theirs.mean(0) - ours.mean(0)).max() < 5 * 0.5 * np.sqrt(2 / 400)
