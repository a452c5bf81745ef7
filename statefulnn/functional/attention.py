"""Attention.

In comments: N batch, H heads, L target positions, S source positions, E embedding, D per head.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.core.box import unwrap
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.generator import next_key
from statefulnn.functional._checks import (
    array,
    require_rank,
    require_same_dtype,
    shape_error,
    widened,
)
from statefulnn.functional.linear import linear

# --------------------------------------------------------------------------------------------------
# Scaled dot-product attention


def _masked(scores: Any, mask: Any) -> Any:
    if mask is None:
        return scores
    if mask.dtype == jnp.bool_:  # True: take part
        return jnp.where(mask, scores, jnp.asarray(-jnp.inf, scores.dtype))
    return scores + mask.astype(scores.dtype)


def _dropped(weights: Any, key: Any, p: float) -> Any:
    if key is None:
        return weights
    keep = jax.random.uniform(key, weights.shape) < 1 - p
    scale = 1 / (1 - p) if p < 1 else 0.0
    return weights * jnp.where(keep, jnp.asarray(scale, weights.dtype), 0)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _attention(
    query: Any, key: Any, value: Any, mask: Any, rng: Any, p: float, is_causal: bool, scale: float
) -> Any:
    groups = query.shape[-3] // key.shape[-3] if query.ndim > 2 else 1
    if groups > 1:  # several heads of queries share one of keys and values
        key, value = jnp.repeat(key, groups, -3), jnp.repeat(value, groups, -3)
    scores = widened(jnp.einsum("...ld,...sd->...ls", query * jnp.asarray(scale, query.dtype), key))
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = _masked(scores, mask)
    # A position that may look at nothing gets 0, not NaN: without a finite maximum nothing is
    # subtracted, and the sum of no weights is replaced by 1.
    if scores.shape[-1]:
        highest = lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
        scores = scores - jnp.where(highest == -jnp.inf, jnp.zeros((), scores.dtype), highest)
    weights = jnp.exp(scores)
    total = jnp.sum(weights, -1, keepdims=True)
    weights = weights / jnp.where(total == 0, jnp.ones((), total.dtype), total)
    weights = _dropped(weights, rng, p).astype(value.dtype)
    return jnp.einsum("...ls,...sd->...ld", weights, value)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rng: Any = None,
) -> Any:
    """Return ``softmax(scale · Q Kᵀ + mask) V``.

    Args:
        query: ``(*, Hq, L, D)``.
        key: ``(*, H, S, D)``.
        value: ``(*, H, S, Dv)``.
        attn_mask: broadcast to ``(*, Hq, L, S)``: booleans, True where attention is allowed, or
            numbers added to the scores.
        dropout_p: the probability that a weight is dropped; applied whenever it is above 0.
        is_causal: position i of the target sees positions up to i of the source.
        scale: the factor of the scores; None for ``1 / sqrt(D)``.
        enable_gqa: allow a multiple of the heads of `key` in `query` (grouped-query attention).
        rng: a random key for the dropout; without one the draw comes from the generator in force.

    Returns:
        ``(*, Hq, L, Dv)``; 0 where everything is masked.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: Vaswani et al. 2017; ``torch.nn.functional.scaled_dot_product_attention``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.ones((2, 4, 5, 8))
        >>> F.scaled_dot_product_attention(x, x, x, is_causal=True).shape
        (2, 4, 5, 8)
    """
    function = "F.scaled_dot_product_attention"
    q, k, v = (
        array(query, "query", function),
        array(key, "key", function),
        array(value, "value", function),
    )
    mask = None if attn_mask is None else array(attn_mask, "attn_mask", function)
    given = f"{function} was given query {q.shape}, key {k.shape} and value {v.shape}"
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise shape_error(
            given,
            "the query is (*, L, D), the key (*, S, D) and the value (*, S, Dv)",
            "put positions on axis -2 and features on axis -1",
        )
    if mask is not None and is_causal:
        raise RuntimeError(
            explain(
                f"{function} was given attn_mask and is_causal=True",
                "Explicit attn_mask should not be set when is_causal=True",
                "is_causal=False, and the causal part in the mask",
            )
        )
    grouped = enable_gqa and q.ndim > 2 and k.shape[-3] and q.shape[-3] % k.shape[-3] == 0
    batches = [x.shape[:-3] if grouped else x.shape[:-2] for x in (q, k, v)]
    try:
        jnp.broadcast_shapes(*batches)
    except ValueError:
        raise shape_error(
            given,
            "the axes before the last two are batch and head axes and must agree",
            "enable_gqa=True for fewer heads of keys than of queries; or broadcast the arrays",
        ) from None
    require_same_dtype(function, query=q, key=k, value=v)
    if mask is not None and mask.dtype != jnp.bool_ and mask.dtype != q.dtype:
        require_same_dtype(function, query=q, attn_mask=mask)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(
            explain(
                f"{function} was given dropout_p={dropout_p}",
                "a probability is between 0 and 1",
                "dropout_p=0.1",
            )
        )
    if dropout_p > 0:
        rng = next_key() if rng is None else unwrap(rng)
    else:
        rng = None
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    return _attention(q, k, v, mask, rng, float(dropout_p), bool(is_causal), float(scale))


# --------------------------------------------------------------------------------------------------
# Multi-head attention


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10, 11))
def _multi_head(
    query: Any,  # (L, N, E)
    key: Any,  # (S, N, Ek)
    value: Any,  # (S, N, Ev)
    weights: dict[str, Any],
    attn_mask: Any,
    padding_mask: Any,
    rng: Any,
    num_heads: int,
    add_zero_attn: bool,
    p: float,
    need_weights: bool,
    average: bool,
) -> tuple[Any, Any]:
    length, batch, embed = query.shape
    head = embed // num_heads
    biases = [None] * 3 if weights["in_bias"] is None else jnp.split(weights["in_bias"], 3)
    packed = len(weights["in"]) == 1
    projections = jnp.split(weights["in"][0], 3) if packed else weights["in"]
    q = linear(query, projections[0], biases[0])

    def heads(x: Any) -> Any:  # (S, N, E) -> (N, H, S, D)
        return jnp.transpose(x.reshape(x.shape[0], batch, num_heads, head), (1, 2, 0, 3))

    def source(x: Any, static: Any, i: int, added: Any) -> Any:
        if static is not None:
            return static.reshape(batch, num_heads, -1, head)
        projected = linear(x, projections[i], biases[i])
        if added is not None:
            projected = jnp.concatenate([projected, jnp.broadcast_to(added, (1, batch, embed))])
        return heads(projected)

    def lengthened(mask: Any, by: int) -> Any:
        width = [(0, 0)] * (mask.ndim - 1) + [(0, by)]
        return jnp.pad(mask, width)

    q = heads(q)
    k = source(key, weights["static_k"], 1, weights["bias_k"])
    v = source(value, weights["static_v"], 2, weights["bias_v"])
    if weights["bias_k"] is not None:
        attn_mask = None if attn_mask is None else lengthened(attn_mask, 1)
        padding_mask = None if padding_mask is None else lengthened(padding_mask, 1)
    if add_zero_attn:
        nothing = jnp.zeros((batch, num_heads, 1, head), k.dtype)
        k, v = jnp.concatenate([k, nothing], 2), jnp.concatenate([v, nothing], 2)
        attn_mask = None if attn_mask is None else lengthened(attn_mask, 1)
        padding_mask = None if padding_mask is None else lengthened(padding_mask, 1)

    mask = attn_mask  # (L, S), or (N, H, L, S)
    if padding_mask is not None:
        columns = padding_mask[:, None, None, :]  # (N, 1, 1, S)
        mask = columns if mask is None else mask + columns

    if need_weights:
        scaled = q * jnp.asarray(1 / math.sqrt(head), q.dtype)
        scores = _masked(widened(jnp.einsum("nhld,nhsd->nhls", scaled, k)), mask)
        shifted = scores - lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
        attention = jnp.exp(shifted)
        attention = attention / jnp.sum(attention, -1, keepdims=True)
        attention = _dropped(attention, rng, p).astype(q.dtype)
        out = jnp.einsum("nhls,nhsd->nhld", attention, v)
        attention = jnp.mean(attention, 1) if average else attention
    else:
        if mask is not None:
            mask = jnp.broadcast_to(mask, (batch, num_heads, length, k.shape[2]))
        out = _attention(q, k, v, mask, rng, p, False, 1 / math.sqrt(head))
        attention = None
    out = jnp.transpose(out, (2, 0, 1, 3)).reshape(length, batch, embed)
    return linear(out, weights["out"], weights["out_bias"]), attention


def _additive(mask: Any, name: str, like: Any, function: str) -> Any:
    """Return a mask as numbers to add: True (here: leave out) becomes -inf."""
    if mask is None:
        return None
    mask = array(mask, name, function)
    if mask.dtype == jnp.bool_:
        return _as_additive(mask, like.dtype)
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        raise DtypeError(
            explain(
                f"{function} was given {name} of dtype {mask.dtype}",
                "only bool and floating types of masks are supported",
                f"{name}.astype(bool), True where attention is not allowed",
            )
        )
    return mask


@functools.partial(jax.jit, static_argnums=1)
def _as_additive(mask: Any, dtype: Any) -> Any:
    return jnp.where(mask, jnp.asarray(-jnp.inf, dtype), jnp.zeros((), dtype))


def multi_head_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    rng: Any = None,
) -> tuple[Any, Any]:
    """Project to queries, keys and values, attend with several heads, and project back.

    Args:
        query: ``(L, N, E)`` or ``(L, E)``.
        key: ``(S, N, E)`` or ``(S, E)``; another last axis with separate projections.
        value: ``(S, N, E)`` or ``(S, E)``; another last axis with separate projections.
        embed_dim_to_check: E.
        num_heads: the number of heads, which divides E.
        in_proj_weight: ``(3 E, E)``, the three input projections on top of each other.
        in_proj_bias: ``(3 E,)`` or None.
        bias_k: ``(1, 1, E)``, a key added to every sequence, or None.
        bias_v: ``(1, 1, E)``, the value added with it, or None.
        add_zero_attn: add a key and a value of zeros to every sequence.
        dropout_p: the probability that a weight is dropped in training.
        out_proj_weight: ``(E, E)``.
        out_proj_bias: ``(E,)`` or None.
        training: whether dropout applies.
        key_padding_mask: ``(N, S)`` or ``(S,)``: True leaves a position out; or numbers to add.
        need_weights: also return the attention weights. A row where everything is masked is then
            NaN, as in torch; without weights it attends to nothing and gives 0.
        attn_mask: ``(L, S)`` or ``(N num_heads, L, S)``: True leaves a pair out; or numbers to add.
        use_separate_proj_weight: take the next three weights in place of `in_proj_weight`.
        q_proj_weight: ``(E, E)``.
        k_proj_weight: ``(E, key features)``.
        v_proj_weight: ``(E, value features)``.
        static_k: ``(N num_heads, S, D)``, keys that are used as they are.
        static_v: ``(N num_heads, S, D)``, values that are used as they are.
        average_attn_weights: average the returned weights over the heads.
        is_causal: says that `attn_mask`, which must be given, is causal.
        rng: a random key for the dropout; without one the draw comes from the generator in force.

    Returns:
        The output, of the query's shape, and the weights ``(N, L, S)``, or ``(N, num_heads, L, S)``,
        or None.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes do not fit.

    Source: Vaswani et al. 2017; ``torch.nn.functional.multi_head_attention_forward``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> out, weights = attention(jnp.ones((3, 1, 8)), jnp.ones((5, 1, 8)), jnp.ones((5, 1, 8)))
        >>> out.shape, weights.shape
        ((3, 1, 8), (1, 3, 5))
    """
    function = "F.multi_head_attention_forward"
    q = array(query, "query", function)
    k = array(key, "key", function)
    v = array(value, "value", function)
    require_rank(q, (2, 3), "query", function, "(L, N, E) or (L, E)")
    batched = q.ndim == 3
    given = f"{function} was given query {q.shape}, key {k.shape} and value {v.shape}"
    if k.ndim != q.ndim or v.ndim != q.ndim or k.shape[:-1] != v.shape[:-1]:
        raise shape_error(
            given,
            "all three have a batch axis or none, and there is one value for each key",
            "key and value of shape (S, N, E), or (S, E) for a query of shape (L, E)",
        )
    if not batched:
        q, k, v = (_reshaped(x, (x.shape[0], 1, x.shape[1])) for x in (q, k, v))
    length, batch, embed = q.shape
    source = k.shape[0]
    if k.shape[1] != batch:
        raise shape_error(
            given, "the batch axis (axis 1) must agree", "batch_first=True if the batch is axis 0"
        )
    if embed != embed_dim_to_check:
        raise shape_error(
            given,
            f"was expecting embedding dimension of {embed_dim_to_check}, but got {embed}",
            f"an input whose last axis is {embed_dim_to_check}",
        )
    if embed % num_heads:
        raise shape_error(
            f"{function} was given embedding dimension {embed} and num_heads={num_heads}",
            f"embed_dim {embed} not divisible by num_heads {num_heads}",
            "a number of heads that divides it",
        )

    def taken(x: Any, name: str) -> Any:
        return None if x is None else array(x, name, function)

    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if use_separate_proj_weight:
        projections = [
            array(w, n, function)
            for w, n in zip((q_proj_weight, k_proj_weight, v_proj_weight), names, strict=True)
        ]
        wanted = [(embed, x.shape[-1]) for x in (q, k, v)]
    else:
        projections = [array(in_proj_weight, "in_proj_weight", function)]
        names, wanted = ("in_proj_weight",), [(3 * embed, embed)]
        if k.shape[-1] != embed or v.shape[-1] != embed:
            raise shape_error(
                given,
                "with one packed projection all three have the same number of features",
                f"kdim={k.shape[-1]}, vdim={v.shape[-1]} in nn.MultiheadAttention",
            )
    for name, weight, shape in zip(names, projections, wanted, strict=True):
        if weight.shape != shape:
            raise shape_error(
                f"{given}, and {name} of shape {weight.shape}",
                f"the projection needs shape {shape}",
                f"{name} of shape {shape}",
            )
    weights = {
        "in": projections,
        "in_bias": taken(in_proj_bias, "in_proj_bias"),
        "bias_k": taken(bias_k, "bias_k"),
        "bias_v": taken(bias_v, "bias_v"),
        "static_k": taken(static_k, "static_k"),
        "static_v": taken(static_v, "static_v"),
        "out": array(out_proj_weight, "out_proj_weight", function),
        "out_bias": taken(out_proj_bias, "out_proj_bias"),
    }
    floats = {n: w for n, w in weights.items() if n != "in"}
    require_same_dtype(
        function, query=q, key=k, value=v, **dict(zip(names, projections, strict=True)), **floats
    )
    if (bias_k is None) != (bias_v is None) or (
        bias_k is not None and (static_k is not None or static_v is not None)
    ):
        raise shape_error(
            f"{function} was given bias_k and bias_v, static_k and static_v that do not go together",
            "an added key needs an added value, and static keys and values take none",
            "both of bias_k and bias_v, or neither",
        )
    static_length = None if static_k is None else weights["static_k"].shape[1]
    source = source if static_length is None else static_length

    mask = _additive(attn_mask, "attn_mask", q, function)
    if is_causal and mask is None:
        raise RuntimeError(
            explain(
                f"{function} was given is_causal=True without attn_mask",
                "it only says that the mask is causal",
                "attn_mask=~jnp.tril(jnp.ones((L, S), bool)), is_causal=True",
            )
        )
    if mask is not None:
        wanted_masks = ((length, source), (batch * num_heads, length, source))
        if mask.shape not in wanted_masks:
            raise shape_error(
                f"{given}, and attn_mask of shape {mask.shape}",
                f"the mask is {wanted_masks[0]}, or {wanted_masks[1]} with one for each head",
                "reshape the mask to one of these",
            )
        if mask.ndim == 3:
            mask = _reshaped(mask, (batch, num_heads, length, source))
    padding = _additive(key_padding_mask, "key_padding_mask", q, function)
    if padding is not None:
        wanted_padding = (batch, source) if batched else (source,)
        if padding.shape != wanted_padding:
            raise shape_error(
                f"{given}, and key_padding_mask of shape {padding.shape}",
                f"there is one entry for each source position, {wanted_padding}",
                f"a key_padding_mask of shape {wanted_padding}",
            )
        if not batched:
            padding = _reshaped(padding, (1, source))
    p = float(dropout_p) if training else 0.0
    if p > 0:
        rng = next_key() if rng is None else unwrap(rng)
    else:
        rng = None
    out, attention = _multi_head(
        q,
        k,
        v,
        weights,
        mask,
        padding,
        rng,
        num_heads,
        bool(add_zero_attn),
        p,
        bool(need_weights),
        bool(average_attn_weights),
    )
    if not batched:
        out = _reshaped(out, (length, embed))
        if attention is not None:
            attention = _reshaped(attention, attention.shape[1:])
    return out, attention


@functools.partial(jax.jit, static_argnums=1)
def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape)
