"""F against torch.nn.functional: values and gradients of every row of tests/parity/rows, misuse, and
what the rows cannot say: state, randomness, what a call costs.
"""

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
from tests.parity.oracle import (
    Call,
    array,
    close,
    flat,
    is_float,
    same_class,
    to_jax,
    to_torch,
)
from tests.parity.rows.attention import VISIBLE, K, Q, V
from tests.parity.table import FUNCTIONS, MISUSE, thinned
from tests.quick import quickly

HALF = jnp.bfloat16


def _separated(args: tuple) -> tuple[list[Any], Callable]:
    """Return the arrays among arguments, and a function that puts others in their places."""
    leaves, tree = jax.tree.flatten(args, is_leaf=lambda x: x is None)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def whole(arrays: Any) -> tuple:
        filled = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            filled[i] = x
        return jax.tree.unflatten(tree, filled)

    return [leaves[i] for i in places], whole


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("call", thinned(FUNCTIONS, every=2))
def test_function_gives_torchs_values(call: Call) -> None:
    kwargs = {k: to_jax(v) for k, v in call.kwargs.items()}
    ours = getattr(F, call.name)(*to_jax(call.args), **kwargs)
    theirs = getattr(TF, call.name)(
        *to_torch(call.args), **{k: to_torch(v) for k, v in call.kwargs.items()}
    )
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        close(a, b, call.name, 2e-5 * call.tolerance)


def _has_floats(call: Call) -> bool:
    return any(is_float(x) for x in jax.tree.leaves(call.args) if isinstance(x, np.ndarray))


@pytest.mark.parametrize("call", thinned(c for c in FUNCTIONS if not c.no_grad and _has_floats(c)))
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_compiled_function_has_torchs_values_and_gradients(call: Call) -> None:
    tensors, whole = _separated(jax.tree.map(lambda x: x, to_jax(call.args)))
    kwargs = {k: to_jax(v) for k, v in call.kwargs.items()}
    places = [i for i, x in enumerate(tensors) if is_float(x)]
    theirs_in = [
        torch.as_tensor(np.array(x)).requires_grad_(i in places) for i, x in enumerate(tensors)
    ]
    theirs_in = [
        t.long() if not t.is_floating_point() and t.dtype != torch.bool else t for t in theirs_in
    ]
    # The arguments again, with tensors for arrays.
    leaves, tree = jax.tree.flatten(to_jax(call.args), is_leaf=lambda x: x is None)
    given = iter([t.clone() if t.requires_grad else t for t in theirs_in])
    args = jax.tree.unflatten(
        tree, [next(given) if isinstance(x, jax.Array) else x for x in leaves]
    )
    expected = flat(
        getattr(TF, call.name)(*args, **{k: to_torch(v) for k, v in call.kwargs.items()})
    )
    weights = [array(*out.shape, seed=100 + i) for i, out in enumerate(expected)]
    loss = sum(
        (out * torch.as_tensor(w).to(out.dtype)).sum()
        for out, w in zip(expected, weights, strict=True)
        if is_float(out)
    )

    @quickly
    def run(arrays: list[Any]) -> Any:
        def loss_of(floats: list[Any]) -> Any:
            filled = list(arrays)
            for i, x in zip(places, floats, strict=True):
                filled[i] = x
            outs = flat(getattr(F, call.name)(*whole(filled), **kwargs))
            terms = [
                (out * jnp.asarray(w, out.dtype)).sum()
                for out, w in zip(outs, weights, strict=True)
                if is_float(out)
            ]
            return sum(terms, jnp.zeros(())), outs

        return jax.grad(loss_of, has_aux=True)([arrays[i] for i in places])

    if not (isinstance(loss, torch.Tensor) and loss.requires_grad):
        pytest.fail("torch gives no gradient: say why in no_grad")
    loss.backward()
    grads, outs = run(tensors)
    for a, b in zip(outs, expected, strict=True):
        close(a, b, call.name, 2e-5 * call.tolerance)
    for i, got in zip(places, grads, strict=True):
        wanted = theirs_in[i].grad
        wanted = torch.zeros_like(theirs_in[i]) if wanted is None else wanted
        close(got, wanted, f"gradient of argument {i}", 1e-4 * call.tolerance)


@pytest.mark.parametrize("call", MISUSE, ids=str)
def test_misuse_raises_torchs_class_with_reason_and_remedy(call: Call) -> None:
    with pytest.raises(Exception) as ours:
        getattr(F, call.name)(*to_jax(call.args), **{k: to_jax(v) for k, v in call.kwargs.items()})
    with pytest.raises(Exception) as theirs:
        getattr(TF, call.name)(
            *to_torch(call.args), **{k: to_torch(v) for k, v in call.kwargs.items()}
        )
    same_class(ours.value, theirs.value)


def test_gradient_of_a_fully_masked_row_is_zero() -> None:
    def loss(q: Any) -> Any:
        out = F.scaled_dot_product_attention(
            q, to_jax(K), to_jax(V), attn_mask=jnp.asarray(VISIBLE)
        )
        return (out**2).sum()

    q = to_torch(Q).requires_grad_(True)
    out = TF.scaled_dot_product_attention(q, to_torch(K), to_torch(V), to_torch(VISIBLE))
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


def _first_of_each() -> list[Call]:
    return list({c.name: c for c in reversed(FUNCTIONS) if not c.many}.values())


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("call", _first_of_each(), ids=lambda c: c.name)
def test_function_is_one_compiled_call(call: Call) -> None:
    kwargs = {k: to_jax(v) for k, v in call.kwargs.items()}
    arrays, whole = _separated(to_jax(call.args))
    function = lambda *xs: getattr(F, call.name)(*whole(xs), **kwargs)
    equations = jax.make_jaxpr(function)(*arrays).eqns
    assert [e.primitive.name for e in equations] == ["jit"]


def test_a_box_is_taken_wherever_an_array_is() -> None:
    x, w, b = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones(4)
    plain = F.linear(x, w, b)
    boxed = F.linear(nn.Buffer(x), nn.Parameter(w), nn.Parameter(b))
    np.testing.assert_array_equal(plain, boxed)
