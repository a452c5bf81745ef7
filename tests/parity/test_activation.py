"""What the rows cannot say of activations: draws, warnings, complex inputs, boxes."""

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
from tests.parity.oracle import array, close

LOGITS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)


# --------------------------------------------------------------------------------------------------
# Gumbel-softmax


def test_hard_gumbel_samples_have_the_frequencies_of_the_softmax() -> None:
    n = 20_000
    rows = jnp.broadcast_to(LOGITS, (n, 4))
    out = np.asarray(F.gumbel_softmax(rows, tau=3.0, hard=True, rng=jax.random.key(0)))
    np.testing.assert_allclose(np.sort(out, 1), np.tile([0, 0, 0, 1], (n, 1)), atol=1e-6)
    wanted = TF.softmax(torch.as_tensor(LOGITS), 0).numpy()
    error = 5 * np.sqrt(wanted * (1 - wanted) / n)
    assert (np.abs(out.mean(0) - wanted) < error).all()


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_soft_gumbel_samples_have_torchs_moments(tau: float) -> None:
    n = 40_000
    torch.manual_seed(0)
    theirs = TF.gumbel_softmax(torch.as_tensor(LOGITS).expand(n, 4), tau).numpy()
    rows = jnp.broadcast_to(LOGITS, (n, 4))
    ours = np.asarray(F.gumbel_softmax(rows, tau, rng=jax.random.key(0)))
    np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-5)
    for power in (1, 2):
        a, b = ours**power, theirs**power
        error = 5 * np.sqrt((a.var(0) + b.var(0)) / n)
        assert (np.abs(a.mean(0) - b.mean(0)) < error).all()


def test_a_hard_gumbel_sample_has_the_derivative_of_the_soft_one() -> None:
    x, c = jnp.asarray(array(5, 3)), jnp.asarray(array(5, 3, seed=1))

    def slope(hard: bool) -> Any:
        key = jax.random.key(1)
        return jax.grad(lambda x: (F.gumbel_softmax(x, 0.7, hard, dim=0, rng=key) * c).sum())(x)

    assert np.abs(slope(False)).max() > 0.01
    np.testing.assert_allclose(slope(True), slope(False), rtol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_of_a_scalar_and_of_nothing(hard: bool) -> None:
    key = jax.random.key(0)
    assert float(F.gumbel_softmax(jnp.array(3.0), hard=hard, dim=0, rng=key)) == 1.0
    assert F.gumbel_softmax(jnp.ones((0, 3)), hard=hard, rng=key).shape == (0, 3)


def test_gumbel_softmax_warns_of_eps_and_draws_from_the_generator() -> None:
    with pytest.warns(UserWarning, match="eps"):
        F.gumbel_softmax(jnp.zeros(3), eps=1e-5)
    nn.manual_seed(0)
    first, second = F.gumbel_softmax(jnp.zeros(3)), F.gumbel_softmax(jnp.zeros(3))
    assert (first != second).any()
    with pytest.raises(nn.MissingRngError):
        jax.jit(F.gumbel_softmax)(jnp.zeros(3))


# --------------------------------------------------------------------------------------------------
# RReLU


def test_slopes_of_rrelu_are_uniform_in_training_and_the_middle_in_evaluation() -> None:
    n, lower, upper = 40_000, 0.1, 0.7
    layer = nn.RReLU(lower, upper)
    out = -np.asarray(layer(-jnp.ones(n)))
    assert lower <= out.min() < lower + 0.01
    assert upper - 0.01 < out.max() <= upper
    width = upper - lower
    assert abs(out.mean() - 0.4) < 5 * width / np.sqrt(12 * n)
    assert abs(out.var() / (width**2 / 12) - 1) < 5 * np.sqrt(0.8 / n)
    np.testing.assert_array_equal(layer(jnp.ones(5)), np.ones(5))
    np.testing.assert_allclose(layer.eval()(-jnp.ones(5)), -0.4 * np.ones(5), rtol=1e-6)


def test_rrelu_differentiates_to_the_slopes_it_drew() -> None:
    x = jnp.asarray(array(50))
    run = lambda x: F.rrelu(x, training=True, rng=jax.random.key(0))
    slope = jax.grad(lambda x: run(x).sum())(x)
    np.testing.assert_allclose(run(x), x * slope, rtol=1e-6)
    assert (slope[x > 0] == 1).all()


def test_rrelu_in_training_needs_a_generator() -> None:
    with pytest.raises(nn.MissingRngError):
        jax.jit(lambda x: F.rrelu(x, training=True))(jnp.ones(3))


# --------------------------------------------------------------------------------------------------
# What is deprecated, and what is only accepted


def test_old_names_of_hardtanh_warn_and_work() -> None:
    with pytest.warns(FutureWarning, match="min_val"):
        ours = nn.Hardtanh(min_value=-2.0)
    with pytest.warns(FutureWarning, match="max_val"):
        both = nn.Hardtanh(max_value=3.0)
    assert repr(ours) == "Hardtanh(min_val=-2.0, max_val=1.0)"
    assert repr(both) == "Hardtanh(min_val=-1.0, max_val=3.0)"
    assert float(ours(jnp.array(-5.0))) == -2.0


@pytest.mark.parametrize("ndim", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", ["softmax", "softmin", "log_softmax"])
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_a_softmax_without_dim_warns_and_takes_torchs(name: str, ndim: int) -> None:
    x = array(*(2, 3, 4, 2)[:ndim])
    with pytest.warns(UserWarning, match="dim"):
        ours = getattr(F, name)(jnp.asarray(x))
    close(ours, getattr(TF, name)(torch.as_tensor(x)), name, 1e-6)


@pytest.mark.parametrize("name", ["Softmax", "Softmin", "LogSoftmax"])
def test_a_softmax_layer_without_dim_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="dim"):
        getattr(nn, name)()(jnp.ones((2, 3)))


@pytest.mark.parametrize("name", ["softmax", "softmin", "log_softmax"])
def test_softmax_casts_first_where_it_is_told(name: str) -> None:
    x = np.array([1, 2, 5])
    ours = getattr(F, name)(jnp.asarray(x, jnp.int32), 0, dtype=jnp.float32)
    close(ours, getattr(TF, name)(torch.as_tensor(x), 0, dtype=torch.float32), name, 1e-6)
    low = getattr(F, name)(jnp.asarray(x, jnp.bfloat16), 0, dtype=jnp.float32)
    assert low.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("relu_", ()),
        ("celu_", (0.5,)),
        ("elu_", (0.5,)),
        ("hardtanh_", (-0.5, 0.5)),
        ("leaky_relu_", (0.5,)),
        ("rrelu_", (0.25, 0.25, True)),
        ("selu_", ()),
        ("threshold_", (0.5, 7.0)),
    ],
)
def test_a_form_with_an_underscore_leaves_its_input_alone(name: str, args: tuple) -> None:
    x = array(8)
    given = jnp.asarray(x)
    ours = getattr(F, name)(given, *args)
    np.testing.assert_array_equal(given, x)
    theirs = torch.as_tensor(x.copy())
    getattr(TF, name)(theirs, *args)
    close(ours, theirs, name, 1e-6)


# --------------------------------------------------------------------------------------------------
# Inputs of other kinds


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "tanhshrink", "silu", "softsign"])
def test_complex_inputs_give_torchs_values(name: str) -> None:
    z = (array(6) + 1j * array(6, seed=1)).astype(np.complex64)
    ours = np.asarray(getattr(F, name)(jnp.asarray(z)))
    np.testing.assert_allclose(ours, getattr(TF, name)(torch.as_tensor(z)).numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["relu", "mish", "softplus", "hardtanh", "prelu"])
def test_complex_inputs_are_refused_where_torch_refuses_them(name: str) -> None:
    extra = (jnp.ones(1, jnp.complex64),) if name == "prelu" else ()
    with pytest.raises(nn.DtypeError, match="complex64"):
        getattr(F, name)(jnp.ones(3, jnp.complex64), *extra)


def test_mixed_dtypes_in_prelu_are_refused() -> None:
    with pytest.raises(nn.DtypeError, match="bfloat16"):
        F.prelu(jnp.ones(3, jnp.bfloat16), jnp.ones(1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_slopes_and_bends_of_low_precision_are_rounded_once(dtype: Any) -> None:
    x = jnp.asarray(array(500) * 4, dtype)
    for name, args in (("elu", (0.3,)), ("mish", ()), ("softplus", (1.7,)), ("gelu", ())):
        once = getattr(F, name)(x.astype(jnp.float32), *args).astype(dtype)
        np.testing.assert_array_equal(getattr(F, name)(x, *args), once)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.glu(x),
        lambda x: F.softmax(x, 5),
        lambda x: F.prelu(x, jnp.ones(2)),
        lambda x: F.gelu(x, "erf"),
    ],
)
def test_misuse_is_found_in_compiled_code_too(call: Callable) -> None:
    with pytest.raises((RuntimeError, IndexError), match="Why: "):
        jax.jit(call)(jnp.ones((2, 3)))


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "elu", "softplus", "logsigmoid"])
def test_forward_and_reverse_mode_agree(name: str) -> None:
    x = jnp.asarray(array(9) * 5)
    function = lambda x: getattr(F, name)(x).sum()
    forward = jax.jvp(function, (x,), (jnp.ones(9),))[1]
    np.testing.assert_allclose(forward, jax.grad(function)(x).sum(), rtol=1e-5)


def test_mish_keeps_its_slope_far_from_zero() -> None:
    x = np.linspace(5, 25, 200, dtype=np.float32)
    ours = jax.vmap(jax.grad(F.mish))(jnp.asarray(x))
    exact = torch.as_tensor(x, dtype=torch.float64).requires_grad_(True)
    TF.mish(exact).sum().backward()
    np.testing.assert_allclose(ours, exact.grad.numpy(), atol=3e-7)
