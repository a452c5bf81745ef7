"""F against torch.nn.functional where the layers' table does not reach: functions without a layer,
values at the edges, randomness, misuse, and what a call costs.
"""

from __future__ import annotations

import time
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
from tests.parity.oracle import array, close, flat, integers, to_jax, to_torch

INF = np.inf
NAN = np.nan


def both(name: str, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """Call a function in both libraries."""
    ours = getattr(F, name)(*map(to_jax, args), **{k: to_jax(v) for k, v in kwargs.items()})
    theirs = getattr(TF, name)(*map(to_torch, args), **{k: to_torch(v) for k, v in kwargs.items()})
    return ours, theirs


Q, K, V = array(2, 4, 5, 8), array(2, 4, 6, 8, seed=1), array(2, 4, 6, 3, seed=2)
MASK = np.random.default_rng(0).random((5, 6)) < 0.6
MASK[2] = False  # a row that sees nothing

VALUES = [
    ("linear", (array(4, 3), array(3)), {}),
    ("linear", (integers(5, 2, 3), integers(5, 4, 3)), {}),
    ("log_softmax", (array(4, 3) * 100,), {"dim": -1}),
    ("softmax", (integers(5, 4),), {"dim": 0, "dtype": None}),
    ("tanh", (integers(5, 4),), {}),
    ("sigmoid", (integers(5, 4),), {}),
    ("relu", (integers(5, 4) - 2,), {}),
    ("relu", (np.array([NAN, -0.0, -INF, INF], np.float32),), {}),
    ("gelu", (np.array([NAN, INF, -50.0], np.float32),), {}),
    ("silu", (np.array([NAN, INF, -200.0], np.float32),), {}),
    ("softmax", (np.array([[1.0, NAN], [INF, 0.0], [-INF, 0.0]], np.float32),), {"dim": 1}),
    ("max_pool2d", (np.array([[[1.0, NAN], [3.0, 2.0]]], np.float32), 2), {}),
    ("max_pool2d", (np.array([[[1.0, NAN], [NAN, 2.0]]], np.float32), 2), {"return_indices": True}),
    ("max_pool2d", (integers(9, 1, 4, 4), 2), {}),
    ("max_pool2d_with_indices", (array(1, 5, 5), 3, 2, 1), {}),
    ("batch_norm", (array(3, 4), array(4), np.abs(array(4)) + 1), {}),
    ("batch_norm", (array(3, 4), None, None), {"training": True, "weight": array(4)}),
    ("mse_loss", (array(3, 4), array(3, 4, seed=1)), {"weight": np.abs(array(3, 4, seed=2))}),
    (
        "mse_loss",
        (array(3, 4), array(3, 4, seed=1)),
        {"weight": np.abs(array(3, 4, seed=2)), "reduction": "none"},
    ),
    ("mse_loss", (array(0, 4), array(0, 4)), {}),
    ("cross_entropy", (array(2, 3), np.array([-100, -100])), {}),
    ("cross_entropy", (array(0, 3), integers(3, 0)), {}),
    ("cross_entropy", (array(2, 3), np.array([[1.0, 0, 0], [0, 0.5, 0.5]])), {}),
    ("cross_entropy", (array(2, 3), np.array([0, 2], np.uint8)), {}),
    ("scaled_dot_product_attention", (Q, K, V), {}),
    ("scaled_dot_product_attention", (Q, K, V), {"is_causal": True}),
    ("scaled_dot_product_attention", (Q, K, V), {"scale": 0.1, "attn_mask": MASK}),
    ("scaled_dot_product_attention", (Q, K, V), {"attn_mask": np.where(MASK, 0, -INF)}),
    ("scaled_dot_product_attention", (Q, K, V), {"attn_mask": array(2, 1, 5, 6)}),
    ("scaled_dot_product_attention", (Q[0, 0], K[0, 0], V[0, 0]), {}),
    ("scaled_dot_product_attention", (Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
    ("scaled_dot_product_attention", (Q, K[:, :, :0], V[:, :, :0]), {}),
    ("dropout", (array(3),), {"training": False}),
    ("dropout", (array(3),), {"p": 0.0}),
    ("dropout", (array(3),), {"p": 1.0}),
    ("conv1d", (array(2, 3, 8), array(4, 3, 3), array(4)), {"padding": (2,), "stride": [2]}),
    ("conv2d", (array(3, 8, 8), array(6, 1, 3, 3)), {"groups": 3, "padding": "same"}),
    ("conv2d", (array(1, 2, 12, 12), array(2, 1, 12, 12)), {"groups": 2}),
    ("embedding", (np.array([[1, 2]], np.int32), array(4, 3)), {}),
]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("name", "args", "kwargs"), VALUES, ids=[f"{i}-{v[0]}" for i, v in enumerate(VALUES)]
)
def test_function_gives_torchs_values(name: str, args: tuple, kwargs: dict) -> None:
    if name == "softmax" and args[0].dtype.kind == "i":
        kwargs = {"dim": 0}
        ours = F.softmax(to_jax(args[0]), **kwargs, dtype=jnp.float32)
        theirs = TF.softmax(to_torch(args[0]), **kwargs, dtype=torch.float32)
    else:
        ours, theirs = both(name, args, kwargs)
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        close(a, b, name, 2e-5)


def test_gradient_of_a_fully_masked_row_is_zero() -> None:
    def loss(q: Any) -> Any:
        out = F.scaled_dot_product_attention(q, to_jax(K), to_jax(V), attn_mask=jnp.asarray(MASK))
        return (out**2).sum()

    q = to_torch(Q).requires_grad_(True)
    out = TF.scaled_dot_product_attention(q, to_torch(K), to_torch(V), to_torch(MASK))
    (out**2).sum().backward()
    close(jax.grad(loss)(to_jax(Q)), q.grad, "gradient", 1e-4)


@pytest.mark.parametrize("dim", [None, 5, -3])
def test_softmax_over_no_such_dimension(dim: int | None) -> None:
    x = array(2, 3)
    if dim is None:
        with pytest.warns(UserWarning, match="dim"):
            ours = F.softmax(jnp.asarray(x))
        close(ours, TF.softmax(torch.as_tensor(x), dim=1), "implicit dim", 1e-6)
    else:
        with pytest.raises(IndexError):
            F.softmax(jnp.asarray(x), dim)


# --------------------------------------------------------------------------------------------------
# Misuse: the builtin class of torch's error

T = array
HALF = jnp.bfloat16
MISUSE: list[tuple[str, tuple, dict]] = [
    ("linear", (T(2, 3), T(4, 5)), {}),
    ("linear", (T(2, 3), T(4, 3), T(2)), {}),
    ("bilinear", (T(2, 3), T(3, 3), T(3, 3, 3)), {}),
    ("bilinear", (T(2, 3), T(2, 4), T(3, 3, 3)), {}),
    ("gelu", (integers(3, 4),), {}),
    ("gelu", (T(3),), {"approximate": "erf"}),
    ("silu", (integers(3, 4),), {}),
    ("softmax", (T(2, 3),), {"dim": 2}),
    ("max_pool2d", (T(1, 1, 4, 4), 2), {"padding": 2}),
    ("max_pool2d", (T(1, 1, 4, 4), 5), {}),
    ("max_pool2d", (T(1, 0, 4, 4), 2), {}),
    ("max_pool2d", (T(4, 4), 2), {}),
    ("max_pool2d", (T(1, 1, 4, 4), (2, 2, 2)), {}),
    ("max_pool2d", (T(1, 1, 4, 4), 2), {"stride": 0}),
    ("avg_pool2d", (T(1, 1, 4, 4), 2), {"divisor_override": 0}),
    ("avg_pool2d", (T(1, 0, 4, 4), 2), {}),
    ("adaptive_avg_pool2d", (T(1, 1, 0, 4), (2, 2)), {}),
    ("adaptive_avg_pool2d", (T(1, 1, 4, 4), (-2, 2)), {}),
    ("cross_entropy", (T(2, 3), np.array([0, 3])), {}),
    ("cross_entropy", (T(2, 3), np.array([0, -1])), {}),
    ("cross_entropy", (T(2, 3), np.array([0, 1, 2])), {}),
    ("cross_entropy", (T(2, 3), np.array([0.0, 1.0])), {}),
    ("cross_entropy", (T(2, 3), np.ones((2, 3), np.int64)), {}),
    ("cross_entropy", (T(2, 3), np.ones((2, 3), np.float32)), {"ignore_index": 1}),
    ("cross_entropy", (T(2, 3), np.array([0, 1])), {"label_smoothing": 2.0}),
    ("cross_entropy", (T(2, 3), np.array([0, 1])), {"weight": T(2)}),
    ("cross_entropy", (T(2, 3), np.array([0, 1])), {"reduction": "average"}),
    ("mse_loss", (T(2, 3), T(2, 3)), {"reduction": "average"}),
    ("mse_loss", (T(2, 3), T(2, 3)), {"weight": T(3)}),
    ("embedding", (np.array([5]), T(3, 2)), {}),
    ("embedding", (np.array([-1]), T(3, 2)), {}),
    ("embedding", (T(2), T(3, 2)), {}),
    ("embedding", (np.array([1]), T(3, 2)), {"padding_idx": 3}),
    ("embedding", (np.array([1]), T(3)), {}),
    ("dropout", (T(2),), {"p": 1.5}),
    ("conv2d", (T(1, 2, 4, 4), T(3, 3, 3, 3)), {}),
    ("conv2d", (T(1, 2, 2, 2), T(3, 2, 3, 3)), {}),
    ("conv2d", (T(1, 2, 4, 4), T(3, 2, 3, 3)), {"padding": "same", "stride": 2}),
    ("conv2d", (T(1, 2, 4, 4), T(3, 1, 3, 3)), {"groups": 2}),
    ("conv2d", (T(1, 2, 4, 4), T(3, 2, 3, 3)), {"padding": -1}),
    ("conv2d", (T(1, 2, 4, 4), T(3, 2, 3, 3)), {"stride": 0}),
    ("conv2d", (T(1, 2, 4, 4), T(3, 2, 3, 3)), {"padding": "some"}),
    ("conv2d", (T(2, 4), T(3, 2, 3, 3)), {}),
    ("conv2d", (T(1, 2, 4, 4), T(3, 2, 3, 3), T(2)), {}),
    ("conv1d", (T(1, 2, 4), T(3, 2, 3)), {"dilation": 4}),
    ("batch_norm", (T(1, 3), None, None), {"training": True}),
    ("batch_norm", (T(2, 3), None, None), {}),
    ("batch_norm", (T(2, 3), T(4), T(4)), {}),
    ("layer_norm", (T(2, 3), (4,)), {}),
    ("layer_norm", (T(2, 3), (3,)), {"weight": T(2)}),
    ("rms_norm", (T(2, 3), (4,)), {}),
    ("scaled_dot_product_attention", (T(2, 4), T(2, 5), T(2, 4)), {}),
    (
        "scaled_dot_product_attention",
        (T(2, 4), T(2, 4), T(2, 4)),
        {"attn_mask": np.ones((2, 2), bool), "is_causal": True},
    ),
]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), MISUSE, ids=[f"{i}-{v[0]}" for i, v in enumerate(MISUSE)]
)
def test_misuse_raises_torchs_class_with_reason_and_remedy(
    name: str, args: tuple, kwargs: dict
) -> None:
    with pytest.raises(Exception) as ours:
        getattr(F, name)(*map(to_jax, args), **{k: to_jax(v) for k, v in kwargs.items()})
    with pytest.raises(Exception) as theirs:
        getattr(TF, name)(*map(to_torch, args), **{k: to_torch(v) for k, v in kwargs.items()})
    wanted = next(
        c
        for c in (AssertionError, IndexError, ValueError, TypeError, RuntimeError)
        if isinstance(theirs.value, c)
    )
    assert isinstance(ours.value, wanted), (type(ours.value), theirs.value)
    assert "Why: " in str(ours.value)
    assert "Instead: " in str(ours.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.linear(jnp.ones((2, 3)), jnp.ones((4, 3), HALF)),
        lambda: F.linear(jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones(4, HALF)),
        lambda: F.linear(jnp.ones((2, 3), jnp.int32), jnp.ones((4, 3))),
        lambda: F.bilinear(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((1, 3, 3), HALF)),
        lambda: F.conv2d(jnp.ones((1, 2, 4, 4)), jnp.ones((3, 2, 3, 3), HALF)),
        lambda: F.layer_norm(jnp.ones((2, 3)), (3,), jnp.ones(3, HALF)),
        lambda: F.rms_norm(jnp.ones((2, 3)), (3,), jnp.ones(3, HALF)),
        lambda: F.batch_norm(jnp.ones((2, 3)), jnp.ones(3, HALF), jnp.ones(3, HALF)),
        lambda: F.scaled_dot_product_attention(*[jnp.ones((2, 3), d) for d in "ffe"]),
        lambda: F.cross_entropy(jnp.ones((2, 3), HALF), jnp.array([0, 1]), jnp.ones(3)),
    ],
)
def test_mixed_dtypes_are_refused(call: Callable) -> None:
    with pytest.raises(nn.DtypeError, match="dtype"):
        call()


def test_float32_parameters_serve_a_low_precision_input_in_normalisations() -> None:
    x = array(4, 3)
    ours = F.layer_norm(jnp.asarray(x, HALF), (3,), jnp.ones(3), jnp.ones(3))
    theirs = TF.layer_norm(torch.as_tensor(x).bfloat16(), (3,), torch.ones(3), torch.ones(3))
    assert ours.dtype == HALF
    close(ours, theirs, "layer_norm", 2e-2)


def test_shapes_that_broadcast_in_a_loss_warn_as_in_torch() -> None:
    with pytest.warns(UserWarning, match="broadcasts both"):
        ours = F.mse_loss(jnp.ones((3, 1)), jnp.zeros(3))
    assert float(ours) == 1.0


def test_something_that_is_no_array_is_refused() -> None:
    with pytest.raises(TypeError, match=r"jnp\.asarray"):
        F.linear([[1.0]], jnp.ones((1, 1)))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# State


def test_training_batch_norm_writes_the_buffers_it_is_given() -> None:
    x = array(5, 3)
    mean, var = nn.Buffer(jnp.zeros(3)), nn.Buffer(jnp.ones(3))
    t_mean, t_var = torch.zeros(3), torch.ones(3)
    ours = F.batch_norm(jnp.asarray(x), mean, var, training=True)
    close(ours, TF.batch_norm(torch.as_tensor(x), t_mean, t_var, training=True), "out", 1e-5)
    close(mean.value, t_mean, "mean", 1e-6)
    close(var.value, t_var, "var", 1e-6)


def test_training_batch_norm_does_not_drop_statistics_silently() -> None:
    with pytest.raises(nn.StateWriteError, match="batch_norm_with_stats"):
        F.batch_norm(jnp.ones((2, 3)), jnp.zeros(3), jnp.ones(3), training=True)


def test_no_gradient_flows_through_running_statistics() -> None:
    def statistics(x: Any) -> Any:
        _, mean, var = F.batch_norm_with_stats(x, jnp.zeros(3), jnp.ones(3))
        return mean.sum() + var.sum()

    assert (np.asarray(jax.grad(statistics)(jnp.asarray(array(5, 3)))) == 0).all()


def test_max_norm_of_a_plain_array_is_refused() -> None:
    with pytest.raises(nn.StateWriteError, match="pass the Parameter"):
        F.embedding(jnp.array([0]), jnp.ones((2, 3)), max_norm=1.0)


def test_wrong_index_in_compiled_code_gives_nan() -> None:
    table = jnp.ones((3, 2))
    for wrong in (3, -1):
        out = jax.jit(F.embedding)(jnp.array([0, wrong]), table)
        assert np.isnan(np.asarray(out)).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize("weight", [None, np.ones(3, np.float32)], ids=["plain", "weighted"])
def test_wrong_class_in_compiled_code_gives_nan(wrong: int, weight: Any) -> None:
    loss = jax.jit(lambda x, y: F.cross_entropy(x, y, to_jax(weight)))
    assert np.isnan(loss(jnp.ones((2, 3)), jnp.array([0, wrong])))
    assert not np.isnan(loss(jnp.ones((2, 3)), jnp.array([0, -100])))


# --------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_the_mean(p: float) -> None:
    n = 40_000
    out = np.asarray(F.dropout(jnp.ones(n), p, rng=jax.random.key(1)))
    kept = (out != 0).mean()
    error = 5 * np.sqrt(p * (1 - p) / n)
    assert abs(kept - (1 - p)) < error
    np.testing.assert_allclose(out[out != 0], 1 / (1 - p), rtol=1e-6)


def test_dropout_scales_the_gradient_by_its_mask() -> None:
    key = jax.random.key(0)
    out = F.dropout(jnp.ones(50), 0.4, rng=key)
    slope = jax.grad(lambda x: F.dropout(x, 0.4, rng=key).sum())(jnp.ones(50))
    np.testing.assert_array_equal(out, slope)


def test_dropout_masks_differ_from_call_to_call_and_repeat_with_the_seed() -> None:
    drop, x = nn.Dropout(0.5), jnp.ones(64)
    nn.manual_seed(3)
    first, second = drop(x), drop(x)
    nn.manual_seed(3)
    again = drop(x)
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dropout_keeps_the_dtype(dtype: str) -> None:
    assert F.dropout(jnp.ones(8, dtype), 0.5, rng=jax.random.key(0)).dtype == dtype


def test_dropout_without_a_key_under_plain_jit_is_refused() -> None:
    with pytest.raises(nn.MissingRngError):
        jax.jit(lambda x: F.dropout(x, 0.5))(jnp.ones(3))


def test_attention_dropout_has_the_right_mean() -> None:
    n = 3000
    q, k, v = jnp.zeros((n, 1, 4)), jnp.zeros((n, 8, 4)), jnp.ones((n, 8, 1))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, rng=jax.random.key(0))
    # Each output is the mean of 8 kept values of 1 / 0.7.
    error = 5 * np.sqrt(0.3 / 0.7 / (8 * n))
    assert abs(float(out.mean()) - 1) < error
    assert float(out.std()) > 0.1


# --------------------------------------------------------------------------------------------------
# Cost and composition

ONE_CALL: dict[str, Callable] = {
    "linear": lambda: (F.linear, jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones(4)),
    "bilinear": lambda: (F.bilinear, jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((4, 3, 3))),
    "conv2d": lambda: (F.conv2d, jnp.ones((2, 3, 5, 5)), jnp.ones((4, 3, 3, 3)), jnp.ones(4)),
    "layer_norm": lambda: (lambda x, w, b: F.layer_norm(x, (3,), w, b), *[jnp.ones(3)] * 3),
    "rms_norm": lambda: (lambda x, w: F.rms_norm(x, (3,), w), *[jnp.ones(3)] * 2),
    "batch_norm": lambda: (F.batch_norm, jnp.ones((2, 3)), *[jnp.ones(3)] * 4),
    "batch_norm_with_stats": lambda: (
        F.batch_norm_with_stats,
        jnp.ones((2, 3)),
        *[jnp.ones(3)] * 4,
    ),
    "gelu": lambda: (F.gelu, jnp.ones(3)),
    "relu": lambda: (F.relu, jnp.ones(3)),
    "silu": lambda: (F.silu, jnp.ones(3)),
    "softmax": lambda: (lambda x: F.softmax(x, 0), jnp.ones(3)),
    "dropout": lambda: (lambda x, key: F.dropout(x, rng=key), jnp.ones(3), jax.random.key(0)),
    "embedding": lambda: (F.embedding, jnp.array([1]), jnp.ones((3, 2))),
    "cross_entropy": lambda: (F.cross_entropy, jnp.ones((2, 3)), jnp.array([1, 0])),
    "mse_loss": lambda: (F.mse_loss, jnp.ones(3), jnp.ones(3)),
    "max_pool2d": lambda: (lambda x: F.max_pool2d(x, 2), jnp.ones((1, 4, 4))),
    "avg_pool2d": lambda: (lambda x: F.avg_pool2d(x, 2), jnp.ones((1, 4, 4))),
    "adaptive_avg_pool2d": lambda: (lambda x: F.adaptive_avg_pool2d(x, 2), jnp.ones((1, 4, 4))),
    "flatten": lambda: (F.flatten, jnp.ones((2, 3))),
    "scaled_dot_product_attention": lambda: (
        F.scaled_dot_product_attention,
        *[jnp.ones((2, 3, 4))] * 3,
    ),
}


@pytest.mark.parametrize("name", ONE_CALL)
def test_function_is_one_compiled_call(name: str) -> None:
    function, *args = ONE_CALL[name]()
    equations = jax.make_jaxpr(function)(*args).eqns
    assert [e.primitive.name for e in equations] == ["jit"]


def test_a_box_is_taken_wherever_an_array_is() -> None:
    x, w, b = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones(4)
    plain = F.linear(x, w, b)
    boxed = F.linear(nn.Buffer(x), nn.Parameter(w), nn.Parameter(b))
    np.testing.assert_array_equal(plain, boxed)


def test_eager_linear_costs_at_most_twice_the_bare_compiled_function() -> None:
    layer = nn.Linear(8, 16)
    x, w, b = jnp.ones((4, 8)), layer.weight.value, layer.bias.value
    bare = jax.jit(lambda x, w, b: x @ w.T + b)

    def seconds(call: Callable) -> float:
        start = time.perf_counter()
        for _ in range(100):
            call()
        return time.perf_counter() - start

    calls = (lambda: bare(x, w, b), lambda: F.linear(x, w, b), lambda: layer(x))
    for call in calls:
        call()
    rounds = [[seconds(call) for call in calls] for _ in range(40)]
    best = [min(column) for column in zip(*rounds, strict=True)]
    # Best of interleaved rounds, with a margin for busy machines; the benchmark prints the numbers.
    assert best[1] < 2 * best[0]
    assert best[2] < 3 * best[0]
