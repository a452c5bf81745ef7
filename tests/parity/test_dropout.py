"""What the rows cannot say of dropout: which elements are dropped, how often, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import statefulnn as nn
import statefulnn.functional as F

P = 0.3
KEY = 1

# The function, the shape, and the axes along which one decision holds.
CHANNELS = [
    ("dropout1d", (40, 50, 3), (2,)),
    ("dropout1d", (2000, 3), (1,)),
    ("dropout2d", (40, 50, 2, 2), (2, 3)),
    ("dropout2d", (40, 50, 3), (2,)),
    ("dropout2d", (40, 50), ()),
    ("dropout3d", (40, 50, 2, 2, 2), (2, 3, 4)),
    ("dropout3d", (2000, 2, 2, 2), (1, 2, 3)),
    ("dropout3d", (2000, 2, 2), (1, 2)),
    ("feature_alpha_dropout", (40, 50), ()),
    ("feature_alpha_dropout", (40, 50, 3), (2,)),
    ("feature_alpha_dropout", (40, 50, 2, 2), (2, 3)),
]
odd_ranks = pytest.mark.filterwarnings("ignore:dropout[23]d. Received a")


@odd_ranks
@pytest.mark.parametrize(("name", "shape", "together"), CHANNELS)
def test_channels_are_dropped_as_a_whole_where_torch_drops_them(
    name: str, shape: tuple[int, ...], together: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    theirs = getattr(TF, name)(torch.ones(shape), P, True).numpy()
    ours = np.asarray(getattr(F, name)(jnp.ones(shape), P, True, rng=jax.random.key(KEY)))
    values = np.unique(theirs)
    assert len(values) == 2
    low, high = np.unique(ours)
    np.testing.assert_allclose([low, high], values, rtol=1e-5, atol=1e-6)
    for out in (ours, theirs):
        assert (out.min(together) == out.max(together)).all()
        kept = (out.min(together) == out.max()).ravel()
        error = 5 * np.sqrt(P * (1 - P) / kept.size)
        assert abs(kept.mean() - (1 - P)) < error
    decisions = ours.max(together) == high
    # Neighbours along every other axis are independent of each other.
    for axis in range(decisions.ndim):
        if decisions.shape[axis] == 1:
            continue
        moved = np.roll(decisions, 1, axis)
        error = 5 / np.sqrt(decisions.size)
        assert abs(np.corrcoef(decisions.ravel(), moved.ravel())[0, 1]) < error


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_alpha_dropout_keeps_mean_and_variance(name: str, p: float) -> None:
    n = 40_000
    x = np.random.default_rng(0).standard_normal((200, n // 200)).astype(np.float32)
    out = np.asarray(getattr(F, name)(jnp.asarray(x), p, True, rng=jax.random.key(KEY)))
    # 5 standard errors, with the fourth moment that was measured.
    assert abs(out.mean()) < 5 / np.sqrt(n)
    spread = np.sqrt(((out**2 - 1) ** 2).mean() / n)
    assert abs((out**2).mean() - 1) < 5 * spread


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_gives_torchs_two_affine_maps(name: str) -> None:
    x = np.linspace(0, 2, 400, dtype=np.float32).reshape(20, 20)
    torch.manual_seed(0)
    theirs = getattr(TF, name)(torch.as_tensor(x), P, True).numpy()
    ours = np.asarray(getattr(F, name)(jnp.asarray(x), P, True, rng=jax.random.key(KEY)))
    dropped = theirs.min()  # what was dropped has one value, and no kept one is as low
    assert (ours == ours.min()).sum() > 50
    np.testing.assert_allclose(ours.min(), dropped, rtol=1e-5)
    ours_kept, theirs_kept = ours != ours.min(), theirs != dropped
    fit = np.polyfit(x[theirs_kept], theirs[theirs_kept], 1)
    np.testing.assert_allclose(ours[ours_kept], np.polyval(fit, x[ours_kept]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Dropout", (8, 40)),
        ("Dropout1d", (8, 40, 2)),
        ("Dropout2d", (8, 40, 2, 2)),
        ("Dropout3d", (8, 40, 2, 2, 2)),
        ("AlphaDropout", (8, 40)),
        ("FeatureAlphaDropout", (8, 40, 2)),
    ],
)
def test_a_layer_draws_in_training_from_the_generator_and_not_in_evaluation(
    name: str, shape: tuple[int, ...]
) -> None:
    layer, x = getattr(nn, name)(0.5), jnp.ones(shape)
    nn.manual_seed(3)
    first, second = layer(x), layer(x)
    nn.manual_seed(3)
    np.testing.assert_array_equal(layer(x), first)
    assert (first != second).any()
    np.testing.assert_array_equal(layer.eval()(x), x)
    compiled = nn.jit(lambda model, x: model(x))
    layer.train()
    nn.manual_seed(3)
    np.testing.assert_allclose(compiled(layer, x), first, rtol=1e-6)
    assert (compiled(layer, x) != first).any()


@pytest.mark.parametrize(
    "call",
    [
        lambda key: F.dropout(jnp.ones(9), P, rng=key),
        lambda key: F.dropout1d(jnp.ones((9, 2)), P, rng=key),
        lambda key: F.dropout2d(jnp.ones((3, 9, 2, 2)), P, rng=key),
        lambda key: F.dropout3d(jnp.ones((9, 2, 2, 2)), P, rng=key),
        lambda key: F.alpha_dropout(jnp.ones(9), P, True, rng=key),
        lambda key: F.feature_alpha_dropout(jnp.ones((3, 9)), P, True, rng=key),
    ],
)
def test_a_key_decides_alone(call: Callable) -> None:
    key = jax.random.key(5)
    np.testing.assert_array_equal(call(key), call(key))
    np.testing.assert_allclose(jax.jit(call)(key), call(key), rtol=1e-6)
    with pytest.raises(nn.MissingRngError):
        jax.jit(lambda: call(None))()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_is_drawn_where_nothing_is_left_to_chance(p: float) -> None:
    state = nn.get_rng_state()
    F.dropout(jnp.ones(3), p)
    F.alpha_dropout(jnp.ones(3), p, True)
    F.dropout1d(jnp.ones((2, 3)), p)
    np.testing.assert_array_equal(nn.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("dropout2d", (2, 3), 1),
        ("dropout2d", (2, 3, 4), 1),
        ("dropout2d", (1, 2, 3, 4, 5), 1),
        ("dropout3d", (2, 3), 1),
        ("dropout3d", (2, 3, 4), 1),
        ("dropout3d", (1, 1, 2, 3, 4, 5), 1),
    ],
)
def test_odd_ranks_warn_as_in_torch(name: str, shape: tuple[int, ...], count: int) -> None:
    for function, x in (
        (getattr(F, name), jnp.ones(shape)),
        (getattr(TF, name), torch.ones(shape)),
    ):
        with pytest.warns(UserWarning, match=name) as record:
            function(x, 0.5, False)
        assert len(record) == count


def test_channel_dropout_of_a_vector_is_refused_only_where_it_would_draw() -> None:
    with pytest.warns(UserWarning, match="dropout2d"):
        with pytest.raises(nn.ShapeError, match="at least 2 dimensions"):
            F.dropout2d(jnp.ones(3), rng=jax.random.key(0))
    with pytest.warns(UserWarning, match="dropout2d"):
        np.testing.assert_array_equal(F.dropout2d(jnp.ones(3), 1.0), np.zeros(3))


def test_alpha_dropout_has_the_slope_of_its_map() -> None:
    def total(x: Any) -> Any:
        return F.alpha_dropout(x, P, True, rng=jax.random.key(KEY)).sum()

    x = jnp.zeros(200)
    out = np.asarray(F.alpha_dropout(x, P, True, rng=jax.random.key(KEY)))
    slope = np.asarray(jax.grad(total)(x))
    assert (slope[out == out.min()] == 0).all()
    scale = TF.alpha_dropout(torch.ones(999), P, True) - TF.alpha_dropout(torch.zeros(999), P, True)
    # Of torch: where neither was dropped both kept, the difference is the slope.
    kept = [v for v in scale.unique().tolist() if abs(v - slope.max()) < 1e-5]
    assert kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout", "dropout2d"])
@odd_ranks
def test_dropout_of_every_kind_keeps_the_dtype(name: str, dtype: str) -> None:
    out = getattr(F, name)(jnp.ones((8, 4), dtype), P, True, rng=jax.random.key(0))
    assert out.dtype == dtype


@pytest.mark.parametrize("rng", [0, 1.5, np.zeros(2, np.float32), np.zeros((3, 2), np.uint32)])
def test_what_is_no_key_is_refused(rng) -> None:
    with pytest.raises(TypeError, match="as a random key"):
        F.dropout(jnp.ones(4), 0.5, rng=rng)


def test_keys_of_any_kind_draw() -> None:
    x = jnp.ones(1000)
    typed = jax.random.key(3)
    same = F.dropout(x, 0.5, rng=typed)
    np.testing.assert_array_equal(same, F.dropout(x, 0.5, rng=jax.random.key_data(typed)))
    other = F.dropout(x, 0.5, rng=jax.random.key(3, impl="rbg"))
    assert 400 < int((other == 0).sum()) < 600
    assert bool((other != same).any())
