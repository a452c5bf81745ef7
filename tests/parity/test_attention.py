"""What the rows cannot say about attention: kernels, causal biases, functions of positions, dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as TF
from torch.nn.attention import bias as torch_bias

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.attention import SDPBackend, bias, sdpa_kernel
from statefulnn.attention.flex_attention import (
    AuxRequest,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
    noop_mask,
    or_masks,
)
from statefulnn.functional.attention import Form, cudnn_serves
from tests.parity.oracle import array, close
from tests.quick import diagonal, quickly

Q, K, V = array(2, 4, 5, 8), array(2, 4, 6, 8, seed=1), array(2, 4, 6, 3, seed=2)
OURS = tuple(map(jnp.asarray, (Q, K, V)))
THEIRS = tuple(map(torch.as_tensor, (Q, K, V)))


# --------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_dropout_has_the_right_mean_and_varies(need_weights: bool) -> None:
    layer = nn.MultiheadAttention(4, 1, dropout=0.4, bias=False)
    eye = jnp.eye(4)
    # Queries of zeros look at everything alike; values of ones come through as they are.
    layer.in_proj_weight.value = jnp.concatenate([0 * eye, 0 * eye, eye])
    layer.out_proj.weight.value = eye
    n, sources = 2000, 8
    x = jnp.ones((sources, n, 4))
    out, weights = layer(x[:1], x, x, need_weights=need_weights)
    error = 5 * np.sqrt(0.4 / 0.6 / (sources * n))
    assert abs(float(out[..., 0].mean()) - 1) < error
    assert (out != layer(x[:1], x, x, need_weights=need_weights)[0]).any()
    if need_weights:  # what is returned is what was used
        assert abs(float((weights == 0).mean()) - 0.4) < 5 * np.sqrt(0.24 / (sources * n))
    layer.eval()
    close(layer(x[:1], x, x)[0], np.ones((1, n, 4), np.float32), "evaluation", 1e-6)


def test_dropout_of_everything_gives_zero() -> None:
    out = F.scaled_dot_product_attention(*OURS, dropout_p=1.0, rng=jax.random.key(0))
    assert (np.asarray(out) == 0).all()


def test_dropout_scales_gradients_by_the_mask_of_the_output() -> None:
    key = jax.random.key(0)
    # The output is linear in the values: the gradient is the same map as the forward.
    f = lambda v: F.scaled_dot_product_attention(*OURS[:2], v, dropout_p=0.5, rng=key)
    _, moved = jax.jvp(f, (OURS[2],), (OURS[2],))
    np.testing.assert_allclose(moved, f(OURS[2]), atol=1e-5)


def test_attention_dropout_without_a_key_under_plain_jit_is_refused() -> None:
    with pytest.raises(nn.MissingRngError):
        jax.jit(lambda q: F.scaled_dot_product_attention(q, *OURS[1:], dropout_p=0.5))(OURS[0])


# --------------------------------------------------------------------------------------------------
# Derivatives


def test_forward_mode_agrees_with_reverse_mode() -> None:
    f = lambda q: F.scaled_dot_product_attention(q, *OURS[1:], is_causal=True)[0, 0]
    forward, reverse = jax.jacfwd(f)(OURS[0]), jax.jacrev(f)(OURS[0])
    np.testing.assert_allclose(forward, reverse, atol=1e-5)


def test_derivative_of_some_arguments_multiplies_no_zeros() -> None:
    # A gradient of the values alone needs one product more than the forward's two.
    def products(argnums: Any) -> int:
        loss = lambda *x: F.scaled_dot_product_attention(*x).sum()
        text = jax.jit(jax.grad(loss, argnums)).lower(*OURS).compile().as_text()
        return sum(" dot(" in line or "__onednn$matmul" in line for line in text.splitlines())

    assert products(2) < products((0, 1, 2))


# --------------------------------------------------------------------------------------------------
# Kernels


def test_multi_head_attention_is_one_compiled_call() -> None:
    layer = nn.MultiheadAttention(8, 2)
    x = jnp.ones((3, 2, 8))
    fn, params = nn.functionalize(layer)
    equations = jax.make_jaxpr(lambda p, x: fn(p, x, x, x))(params, x).eqns
    assert [e.primitive.name for e in equations] == ["jit"]


def test_equal_inputs_are_projected_by_one_product() -> None:
    layer = nn.MultiheadAttention(8, 2)
    fn, params = nn.functionalize(layer)

    def projections(call: Any, *inputs: Any) -> int:
        return str(jax.make_jaxpr(call)(params, *inputs)).count("name=_linear")

    x, y, z = (jnp.ones((3, 2, 8)) for _ in range(3))
    # With the output's own projection.
    assert projections(lambda p, x: fn(p, x, x, x), x) == 2
    assert projections(lambda p, x, y: fn(p, x, y, y), x, y) == 3
    assert projections(lambda p, x, y, z: fn(p, x, y, z), x, y, z) == 4


GPU = (9, 0)


def _like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("served", "change"),
    [
        (True, {}),
        (True, {"form": Form(1.0, 0)}),
        (True, {"capability": (8, 0)}),
        (
            True,
            {
                "key": _like(2, 2, 16, 64),
                "value": _like(2, 2, 16, 64),
                "form": Form(1.0, None, True),
            },
        ),
        (False, {"capability": None}),
        (False, {"capability": (7, 5)}),
        (False, {"plain": False}),
        (False, {"form": Form(1.0, 3)}),
        (False, {"query": _like(2, 4, 16, 64, dtype=jnp.float32)}),
        (False, {"key": _like(2, 2, 16, 64), "value": _like(2, 2, 16, 64)}),
        (False, {"key": _like(1, 4, 16, 64)}),
        (False, {"value": _like(2, 4, 16, 32)}),
        (False, {"query": _like(2, 4, 0, 64)}),
        (False, {"query": _like(16, 64), "key": _like(16, 64), "value": _like(16, 64)}),
        (False, {n: _like(2, 4, 16, 60) for n in ("query", "key", "value")}),
        (False, {n: _like(2, 4, 16, 136) for n in ("query", "key", "value")}),
    ],
)
def test_cudnn_serves_what_it_computes_alike(served: bool, change: dict) -> None:
    x = _like(2, 4, 16, 64)
    given = {"query": x, "key": x, "value": x, "form": Form(1.0), "plain": True, "capability": GPU}
    assert cudnn_serves(**{**given, **change}) is served


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_allowed_kernel_computes_the_same(backend: str) -> None:
    with sdpa_kernel(SDPBackend[backend]):
        out = F.scaled_dot_product_attention(*OURS)
    close(out, TF.scaled_dot_product_attention(*THEIRS), "output", 2e-5)


def test_kernel_that_does_not_serve_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="No available kernel"):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(*OURS)
    F.scaled_dot_product_attention(*OURS)  # the block has ended


@pytest.mark.parametrize("given", ["MATH", ["MATH"], (SDPBackend.MATH,), None])
def test_what_is_no_backend_is_refused(given: Any) -> None:
    with pytest.raises(AssertionError, match="Backend must be"):
        with sdpa_kernel(given):
            pass


# --------------------------------------------------------------------------------------------------
# Causal biases


@pytest.mark.parametrize("sizes", [(5, 6), (6, 6), (1, 6)])
@pytest.mark.parametrize("name", ["causal_upper_left", "causal_lower_right"])
def test_causal_bias_masks_as_torchs(name: str, sizes: tuple[int, int]) -> None:
    ours, theirs = getattr(bias, name)(*sizes), getattr(torch_bias, name)(*sizes)
    close(jnp.asarray(ours), theirs._materialize(), "mask", 0)
    q = array(2, 4, sizes[0], 8)
    out = F.scaled_dot_product_attention(jnp.asarray(q), *OURS[1:], ours)
    expected = TF.scaled_dot_product_attention(
        torch.as_tensor(q), *THEIRS[1:], theirs._materialize()
    )
    close(out, expected, "output", 2e-5)


def test_causal_bias_with_nothing_to_look_at_warns_and_gives_zero() -> None:
    with pytest.warns(UserWarning, match="nothing to look at"):
        mask = bias.causal_lower_right(7, 6)
    out = F.scaled_dot_product_attention(jnp.ones((1, 7, 8)), *(x[0, :1] for x in OURS[1:]), mask)
    assert (np.asarray(out[:, 0]) == 0).all()
    assert (np.asarray(out[:, 1:]) != 0).all()


def test_causal_bias_is_an_argument_of_compiled_code() -> None:
    run = jax.jit(lambda q, m: F.scaled_dot_product_attention(q, *OURS[1:], m))
    mask = bias.causal_lower_right(5, 6)
    close(run(OURS[0], mask), F.scaled_dot_product_attention(*OURS, mask), "output", 1e-6)


def test_misuse_of_causal_biases() -> None:
    with pytest.raises(ValueError, match="causal=True"):
        F.scaled_dot_product_attention(*OURS, bias.causal_upper_left(5, 6), is_causal=True)
    with pytest.raises(nn.ShapeError, match="aligned"):
        F.scaled_dot_product_attention(*OURS, bias.causal_lower_right(4, 6))
    with pytest.raises(AssertionError, match="2D"):
        bias.causal_upper_left(4)
    with pytest.raises(AssertionError, match="CausalVariant"):
        bias.CausalBias("upper", 2, 2)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Scores and masks as functions


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return abs(q_idx - kv_idx) <= h + b


def far(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score * 2 - 0.5 * (q_idx - kv_idx)


def ours_far(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score * 2 - 0.5 * (q_idx - kv_idx).astype(score.dtype)


@pytest.mark.parametrize("mod", [causal, window])
def test_mask_of_a_function_is_torchs(mod: Any) -> None:
    sizes = (2, 4, 5, 6)
    theirs = torch_flex.create_mask(mod, *sizes, device="cpu")
    close(create_mask(mod, *sizes), theirs, "mask", 0)
    blocks = torch_flex.create_block_mask(mod, *sizes, device="cpu", BLOCK_SIZE=(2, 4))
    ours = create_block_mask(mod, *sizes, BLOCK_SIZE=(2, 4))
    assert ours.shape == blocks.shape
    close(ours.to_dense(), blocks.to_dense(), "blocks", 0)
    assert ours.sparsity() == pytest.approx(blocks.sparsity())


def test_score_function_masks_where_it_gives_minus_infinity() -> None:
    ours = lambda s, b, h, q, k: jnp.where(q >= k, s, -jnp.inf)
    theirs = lambda s, b, h, q, k: torch.where(q >= k, s, -torch.inf)
    close(
        create_mask(ours, None, None, 4, 5),
        torch_flex.create_mask(theirs, None, None, 4, 5, device="cpu"),
        "mask",
        0,
    )


def test_combined_masks_are_torchs() -> None:
    for name, ours in (("or_masks", or_masks), ("and_masks", and_masks)):
        theirs = getattr(torch_flex, name)(causal, window)
        wanted = torch_flex.create_mask(theirs, 1, 2, 4, 5, device="cpu")
        close(create_mask(ours(causal, window), 1, 2, 4, 5), wanted, name, 0)
        with pytest.raises(RuntimeError, match="callable"):
            ours(causal, 3)  # type: ignore[arg-type]
    assert create_mask(noop_mask, 1, 1, 2, 2).all()


@pytest.mark.parametrize(
    "score_mod, mod, heads", diagonal(2, [None, far], [None, causal, window], [4, 2])
)
def test_flex_attention_is_the_formula(score_mod: Any, mod: Any, heads: int) -> None:
    sizes = (2, 4, 5, 6)
    q, k, v = (
        x.clone().requires_grad_(True) for x in (THEIRS[0], *(x[:, :heads] for x in THEIRS[1:]))
    )
    wide_k, wide_v = (x.repeat_interleave(4 // heads, 1) for x in (k, v))
    scores = q @ wide_k.mT * 0.3
    if score_mod is not None:
        rows, columns = torch.arange(5)[:, None], torch.arange(6)
        scores = score_mod(scores, 0, 0, rows, columns)
    if mod is not None:
        seen = torch_flex.create_mask(mod, *sizes, device="cpu")
        scores = scores.masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1) @ wide_v
    (expected**2).sum().backward()

    block = None if mod is None else create_block_mask(mod, 2, 4, 5, 6)
    call = lambda q, k, v: flex_attention(
        q,
        k,
        v,
        ours_far if score_mod else None,
        block,
        0.3,
        True,
        return_aux=AuxRequest(True, True),
    )
    inputs = [jnp.asarray(x.detach().numpy()) for x in (q, k, v)]
    squares = lambda *x: (call(*x)[0] ** 2).sum()
    (out, aux), grads = quickly(lambda *x: (call(*x), jax.grad(squares, (0, 1, 2))(*x)))(*inputs)
    close(out, expected, "output", 2e-5)
    close(aux.lse, scores.logsumexp(-1), "lse", 2e-5)
    close(aux.max_scores, scores.amax(-1), "max", 2e-5)
    for got, x in zip(grads, (q, k, v), strict=True):
        close(got, x.grad, "gradient", 1e-4)


def test_mask_for_all_batches_and_heads_serves_each() -> None:
    block = create_block_mask(causal, None, None, 5, 6)
    out = flex_attention(*OURS, block_mask=block)
    close(out, TF.scaled_dot_product_attention(*THEIRS, is_causal=True), "output", 2e-5)


def test_gradients_flow_to_arrays_that_a_score_function_uses() -> None:
    def loss(slope: Any) -> Any:
        mod = lambda s, b, h, q, k: s + slope[h] * (q - k).astype(s.dtype)
        return (flex_attention(*OURS, score_mod=mod) ** 2).sum()

    slope = torch.zeros(4, requires_grad=True)
    distance = (torch.arange(5)[:, None] - torch.arange(6)).float()
    mask = slope[:, None, None] * distance
    (TF.scaled_dot_product_attention(*THEIRS, mask.expand(2, -1, -1, -1)) ** 2).sum().backward()
    close(jax.grad(loss)(jnp.zeros(4)), slope.grad, "gradient", 1e-4)


def test_misuse_of_flex_attention() -> None:
    q, k, v = OURS
    with pytest.raises(NotImplementedError, match="4D"):
        flex_attention(q[0], k[0], v[0])
    with pytest.raises(nn.ShapeError, match="enable_gqa"):
        flex_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(nn.ShapeError, match="other sizes"):
        flex_attention(q, k, v, block_mask=create_block_mask(causal, 2, 4, 5, 7))
    with pytest.raises(ValueError, match="Cannot specify both"):
        flex_attention(q, k, v, return_lse=True, return_aux=AuxRequest())
    with pytest.raises(AssertionError, match="mask_mod"):
        create_block_mask(ours_far, 1, 1, 2, 2)
    with pytest.raises(AssertionError, match="arguments"):
        create_mask(lambda q, k: q >= k, 1, 1, 2, 2)
