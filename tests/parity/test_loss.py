"""What the rows cannot say of losses: chunks, memory, warnings, classes that do not exist."""

from __future__ import annotations

import warnings
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
from tests.parity.oracle import array, close, integers, same_class, to_jax, to_torch
from tests.parity.rows.loss import TARGETS, TIMES
from tests.precision import in_float64
from tests.quick import diagonal, quickly

# --------------------------------------------------------------------------------------------------
# Linear cross entropy in chunks

X, TABLE, BIAS = array(11, 6), array(7, 6, seed=1), array(7)
TARGET = np.where(np.arange(11) % 4 == 1, -100, integers(7, 11))
CHUNKS = [
    {"batch_chunk_size": 4},
    {"batch_chunk_size": 1, "chunking_method": None},
    {"batch_chunk_size": 50},
    {"chunking_method": "aspect_ratio"},
    {"chunking_method": "aspect_ratio:3", "acc_policy": "compact"},
    {"acc_policy": "balanced"},
    {},
]


@pytest.mark.parametrize(
    "options, reduction, extra", diagonal(2, CHUNKS, ["mean", "sum", "none"], [False, True])
)
def test_chunks_give_torchs_values_and_gradients(
    options: dict, reduction: str, extra: bool
) -> None:
    bias = BIAS if extra else None
    kwargs = {"reduction": reduction, "weight": np.abs(array(7, seed=2)) if extra else None}
    tensors = [to_torch(x) for x in (X, TABLE, bias)]
    for t in tensors:
        if t is not None:
            t.requires_grad_(True)
    theirs = TF.linear_cross_entropy(
        tensors[0],
        tensors[1],
        to_torch(TARGET),
        linear_bias=tensors[2],
        options=torch.nn.LinearCrossEntropyOptions(**options),
        **{k: to_torch(v) for k, v in kwargs.items()},
    )
    cotangent = array(*theirs.shape, seed=5) if theirs.ndim else np.float32(1.5)
    (theirs * torch.as_tensor(cotangent)).sum().backward()

    def loss(arrays: Any) -> Any:
        out = F.linear_cross_entropy(
            arrays[0],
            arrays[1],
            to_jax(TARGET),
            linear_bias=arrays[2],
            options=nn.LinearCrossEntropyOptions(**options),
            **{k: to_jax(v) for k, v in kwargs.items()},
        )
        return (out * cotangent).sum(), out

    grads, ours = quickly(jax.grad(loss, has_aux=True))([to_jax(x) for x in (X, TABLE, bias)])
    close(ours, theirs, "loss", 2e-5)
    for got, wanted in zip(grads, tensors, strict=True):
        if wanted is not None:
            close(got, wanted.grad, "gradient", 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_chunks_of_low_precision_sum_in_float32(dtype: str) -> None:
    options = {"batch_chunk_size": 4}
    x, table = to_torch(X, dtype).requires_grad_(True), to_torch(TABLE, dtype).requires_grad_(True)
    theirs = TF.linear_cross_entropy(
        x, table, to_torch(TARGET), options=torch.nn.LinearCrossEntropyOptions(**options)
    )
    theirs.backward()
    loss = lambda x, table: F.linear_cross_entropy(
        x, table, to_jax(TARGET), options=nn.LinearCrossEntropyOptions(**options)
    )
    ours, grads = jax.value_and_grad(loss, (0, 1))(to_jax(X, dtype), to_jax(TABLE, dtype))
    assert ours.dtype == grads[1].dtype == jnp.dtype(dtype)
    close(ours, theirs, "loss", 1e-2)
    close(grads[0], x.grad, "input", 1e-2)
    close(grads[1], table.grad, "table", 1e-2)


def test_chunks_keep_less_than_the_logits_in_memory() -> None:
    rows, features, classes = 512, 32, 4096
    arguments = jnp.ones((rows, features)), jnp.ones((classes, features)), jnp.zeros(rows, int)

    def peak(options: Any) -> int:
        loss = lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * rows * classes
    assert peak(None) >= logits
    assert peak(nn.LinearCrossEntropyOptions(batch_chunk_size=32)) < logits / 2


def test_chunks_differentiate_twice_and_forward_and_map() -> None:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    x, table, y = jnp.asarray(X), jnp.asarray(TABLE), to_jax(TARGET)
    chunked = lambda x: F.linear_cross_entropy(x, table, y, options=options)
    whole = lambda x: F.linear_cross_entropy(x, table, y)
    close(jax.hessian(chunked)(x), jax.hessian(whole)(x), "hessian", 1e-5)
    both = jnp.stack([x, 2 * x])
    close(jax.vmap(jax.grad(chunked))(both), jax.vmap(jax.grad(whole))(both), "vmap", 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"acc_policy": "fast"},
        {"chunking_method": "ratio"},
        {"chunking_method": "aspect_ratio:0"},
        {"chunking_method": "aspect_ratio:x"},
        {"batch_chunk_size": 0},
        {"batch_chunk_size": -3},
        {"batch_chunk_size": 1.5},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError) as theirs:
        torch.nn.LinearCrossEntropyOptions(**options)
    with pytest.raises(ValueError) as ours:
        nn.LinearCrossEntropyOptions(**options)
    same_class(ours.value, theirs.value)


def test_options_that_contradict_each_other_are_refused() -> None:
    kwargs = {"batch_chunk_size": 3, "chunking_method": "aspect_ratio"}
    with pytest.raises(ValueError) as theirs:
        TF.linear_cross_entropy(
            *to_torch((X, TABLE, np.abs(TARGET) % 7)),
            options=torch.nn.LinearCrossEntropyOptions(**kwargs),
        )
    with pytest.raises(ValueError) as ours:
        F.linear_cross_entropy(
            *to_jax((X, TABLE, np.abs(TARGET) % 7)), options=nn.LinearCrossEntropyOptions(**kwargs)
        )
    same_class(ours.value, theirs.value)


def test_options_read_like_torchs_in_a_layer() -> None:
    ours = nn.LinearCrossEntropyLoss(3, 4, options=nn.LinearCrossEntropyOptions())
    theirs = torch.nn.LinearCrossEntropyLoss(3, 4, options=torch.nn.LinearCrossEntropyOptions())
    assert repr(ours) == repr(theirs)


def test_options_that_cannot_be_followed_are_said_to_be_left_aside() -> None:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    y = to_jax(TARGET)
    with pytest.warns(UserWarning, match="leaves options aside"):
        smoothed = F.linear_cross_entropy(
            jnp.asarray(X), jnp.asarray(TABLE), y, label_smoothing=0.1, options=options
        )
    wanted = TF.linear_cross_entropy(*to_torch((X, TABLE, TARGET)), label_smoothing=0.1)
    close(smoothed, wanted, "loss", 1e-5)


# --------------------------------------------------------------------------------------------------
# Memory and numbers


def test_cross_entropy_keeps_no_array_of_the_size_of_the_logits_besides_the_gradient() -> None:
    n, c = 256, 4096
    arguments = jnp.ones((n, c)), jnp.zeros(n, int)
    step = jax.jit(jax.value_and_grad(F.cross_entropy)).lower(*arguments).compile()
    assert step.memory_analysis().temp_size_in_bytes < 4 * n * c / 4


def test_soft_margin_does_not_overflow() -> None:
    x = jnp.array([-500.0, -90.0, 90.0])
    loss = lambda x: F.soft_margin_loss(x, jnp.ones(3), reduction="sum")
    exact = np.log1p(np.exp(-np.asarray(x, np.float64))).sum()
    np.testing.assert_allclose(loss(x), exact, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(x), [-1, -1, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["kl_div", "poisson_nll_loss"])
def test_a_target_of_zero_has_a_finite_derivative(name: str) -> None:
    option = {"full": True} if name == "poisson_nll_loss" else {}
    loss = lambda y: getattr(F, name)(jnp.full(3, -0.5), y, reduction="sum", **option)
    y = jnp.array([0.0, 0.5, 2.0])
    assert np.isfinite(jax.grad(loss)(y)).all()


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.nll_loss(x, y),
        lambda x, y: F.nll_loss(x, y, jnp.ones(3)),
        lambda x, y: F.multi_margin_loss(x, y),
        lambda x, y: F.multi_margin_loss(x, y, weight=jnp.ones(3)),
        lambda x, y: F.linear_cross_entropy(x, jnp.eye(3), y),
        lambda x, y: F.linear_cross_entropy(
            x, jnp.eye(3), y, options=nn.LinearCrossEntropyOptions(batch_chunk_size=1)
        ),
    ],
)
def test_wrong_class_in_compiled_code_gives_nan(loss: Callable, wrong: int) -> None:
    assert np.isnan(jax.jit(loss)(jnp.ones((2, 3)), jnp.array([0, wrong])))
    assert not np.isnan(jax.jit(loss)(jnp.ones((2, 3)), jnp.array([0, 2])))


def test_wrong_label_in_compiled_code_gives_nan() -> None:
    loss = jax.jit(F.multilabel_margin_loss)
    assert np.isnan(loss(jnp.ones((1, 3)), jnp.array([[1, 3, -1]])))
    assert not np.isnan(loss(jnp.ones((1, 3)), jnp.array([[1, 2, -1]])))


# --------------------------------------------------------------------------------------------------
# CTC


def test_ctc_lengths_may_be_tuples_of_traced_numbers() -> None:
    lengths = ((9, 9, 7), (4, 3, 2))
    ours = jax.jit(F.ctc_loss)(*to_jax((TIMES, TARGETS)), *lengths)
    close(ours, TF.ctc_loss(*to_torch((TIMES, TARGETS)), *lengths), "loss", 1e-5)


def test_an_infinite_ctc_loss_has_a_derivative_that_is_no_number() -> None:
    lengths = ((9, 3, 9), (4, 4, 2))
    x = to_torch(TIMES).requires_grad_(True)
    TF.ctc_loss(x, to_torch(TARGETS), *lengths).backward()
    slope = jax.grad(lambda x: F.ctc_loss(x, to_jax(TARGETS), *lengths))(jnp.asarray(TIMES))
    for example, bad in enumerate((False, True, False)):
        assert x.grad[:, example].isnan().any().item() == bad
        assert (~np.isfinite(slope[:, example])).any() == bad


def test_ctc_after_log_softmax_has_the_derivative_of_the_likelihood() -> None:
    logits = array(7, 2, 4)
    lengths = {"input_lengths": (7, 5), "target_lengths": (2, 3)}
    targets = np.array([[1, 2, 0], [3, 3, 1]])
    loss = lambda x: F.ctc_loss(jax.nn.log_softmax(x, -1), to_jax(targets), **lengths)
    with in_float64():
        x = jnp.asarray(logits, jnp.float64)
        slope, step = jax.grad(loss)(x), 1e-5
        for place in ((0, 0, 1), (4, 1, 3), (6, 1, 2), (3, 0, 0)):
            moved = [loss(x.at[place].add(sign * step)) for sign in (1, -1)]
            numeric = float((moved[0] - moved[1]) / (2 * step))
            np.testing.assert_allclose(slope[place], numeric, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# Warnings, options, other libraries' objects


def test_old_arguments_warn_and_name_the_reduction() -> None:
    x = jnp.ones(3)
    for old, reduction in (
        ({"size_average": True}, "mean"),
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
    ):
        with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
            F.l1_loss(x, x, **old)
        with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
            assert nn.L1Loss(**old).reduction == reduction


def test_the_mean_of_a_divergence_warns() -> None:
    with pytest.warns(UserWarning, match="batchmean"):
        F.kl_div(jnp.zeros((2, 3)), jnp.ones((2, 3)))


def test_nll_loss_2d_is_deprecated() -> None:
    with pytest.warns(FutureWarning, match="NLLLoss"):
        nn.NLLLoss2d()


@pytest.mark.parametrize("name", ["l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"])
def test_shapes_that_broadcast_warn_as_in_torch(name: str) -> None:
    x, y = array(3, 1), array(3)
    with pytest.warns(UserWarning, match="broadcasts both"):
        ours = getattr(F, name)(jnp.asarray(x), jnp.asarray(y))
    with warnings.catch_warnings(action="ignore"):
        theirs = getattr(TF, name)(to_torch(x), to_torch(y))
    close(ours, theirs, name, 1e-6)


@pytest.mark.parametrize("name", ["l1_loss", "mse_loss", "kl_div"])
def test_losses_promote_mixed_dtypes_as_torch_does(name: str) -> None:
    x, y = array(3, 4), np.abs(array(3, 4, seed=1))
    ours = getattr(F, name)(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y), reduction="sum")
    theirs = getattr(TF, name)(to_torch(x, "bfloat16"), to_torch(y), reduction="sum")
    assert str(theirs.dtype) == f"torch.{ours.dtype}" == "torch.float32"
    close(ours, theirs, name, 1e-5)


def test_a_distance_may_be_a_module() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(jnp.array(2.0))

        def forward(self, a: Any, b: Any) -> Any:
            return self.scale * abs(a - b).sum(-1)

    loss = nn.TripletMarginWithDistanceLoss(distance_function=Scaled())
    assert [name for name, _ in loss.named_parameters()] == ["distance_function.scale"]
    a, p, n = (jnp.asarray(array(4, 3, seed=i)) for i in range(3))
    theirs = TF.triplet_margin_with_distance_loss(
        *(torch.as_tensor(np.array(x)) for x in (a, p, n)),
        distance_function=lambda a, b: 2 * abs(a - b).sum(-1),
    )
    close(nn.jit(loss)(a, p, n), theirs, "loss", 1e-5)


def test_weights_of_losses_are_buffers_as_in_torch() -> None:
    loss = nn.BCEWithLogitsLoss(pos_weight=jnp.ones(3))
    theirs = torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))
    assert list(loss.state_dict()) == list(theirs.state_dict()) == ["pos_weight"]


def test_margin_losses_of_no_examples_sum_to_zero() -> None:
    # No row of the table: torch 2.13 returns memory that nobody wrote.
    x = jnp.ones((0, 3))
    assert float(F.multi_margin_loss(x, jnp.zeros(0, jnp.int32), reduction="sum")) == 0
    assert float(F.multilabel_margin_loss(x, jnp.zeros((0, 3), jnp.int32), reduction="sum")) == 0
