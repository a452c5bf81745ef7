"""Multi-head attention.

In comments: N batch, H heads, L target positions, S source positions, E embedding, D per head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.construction import allowed_backends
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.generator import State
from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import (
    LOW_PRECISION,
    array,
    require_same_dtype,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional.attention import (
    Form,
    attend_by_platform,
    kept_weights,
    masked_scores,
    softmax_of_scores,
    weighted_values,
    with_draw,
)
from statefulnn.functional.linear import linear

_NAME = "F.multi_head_attention_forward"


class _Options(NamedTuple):
    """What is fixed when multi-head attention is compiled."""

    embed_dim: int
    num_heads: int
    separate: bool
    add_zero_attn: bool
    need_weights: bool
    average: bool
    causal: bool
    batch_first: bool
    backends: frozenset[str] | None


class _Arrays(NamedTuple):
    """The arrays that may be absent; key and value are absent where they are the one before."""

    key: Any
    value: Any
    in_proj: tuple[Any, ...]  # one (3 E, E), or three
    in_bias: Any
    bias_k: Any
    bias_v: Any
    static_k: Any
    static_v: Any
    out: Any
    out_bias: Any
    attn_mask: Any
    padding_mask: Any


@functools.partial(compiled, static_argnums=5)
@ruled(Rule.LOW)
def _multi_head(
    query: jax.Array,
    arrays: _Arrays,
    rng: jax.Array | None,
    state: State | None,
    p: ArrayLike,
    options: _Options,
) -> tuple[Any, Any, Any]:
    key = query if arrays.key is None else arrays.key
    value = key if arrays.value is None else arrays.value
    _check(query, key, value, arrays, options)
    batched = query.ndim == 3
    batch_axis = 0 if options.batch_first and batched else 1
    embed, heads = options.embed_dim, options.num_heads

    if not batched:
        query, key, value = query[:, None], key[:, None], value[:, None]
    q, k, v = _projected(query, key, value, arrays, options)

    def by_head(x: jax.Array) -> Any:  # (L, N, E) or (N, L, E) -> (N, H, L, D)
        x = x.reshape(*x.shape[:2], heads, embed // heads)
        return jnp.transpose(x, (0, 2, 1, 3) if batch_axis == 0 else (1, 2, 0, 3))

    batch = query.shape[batch_axis]
    q, k, v = by_head(q), by_head(k), by_head(v)
    if arrays.static_k is not None:
        k = arrays.static_k.reshape(batch, heads, *arrays.static_k.shape[1:])
    if arrays.static_v is not None:
        v = arrays.static_v.reshape(batch, heads, *arrays.static_v.shape[1:])
    added = 0  # positions after those that the masks are about
    if arrays.bias_k is not None:
        added += 1
        k = jnp.concatenate([k, _one_position(arrays.bias_k, k)], 2)
        v = jnp.concatenate([v, _one_position(arrays.bias_v, v)], 2)
    if options.add_zero_attn:
        added += 1
        k = jnp.pad(k, ((0, 0), (0, 0), (0, 1), (0, 0)))
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 1), (0, 0)))

    # torch lets the hint stand in for the mask only where nothing else needs it.
    hint = options.causal and arrays.padding_mask is None and not options.need_weights
    masks = [] if hint else _masks(arrays, batch, heads, added)
    form = Form(1 / math.sqrt(embed // heads), 0 if hint else None)
    shape = (batch, heads, q.shape[2], k.shape[2])
    kept, state = kept_weights(rng, state, p, shape, widened(q).dtype)
    if options.need_weights:
        weights = softmax_of_scores(masked_scores(form, q, k, masks))
        weights = (weights if kept is None else weights * kept).astype(q.dtype)
        out = weighted_values(form, weights, v).astype(q.dtype)
        weights = jnp.mean(weights, 1) if options.average else weights
        weights = weights if batched else weights[0]
    else:
        weights = None
        out = attend_by_platform(form, options.backends, q, k, v, tuple(masks), kept)
    out = jnp.transpose(out, (0, 2, 1, 3) if batch_axis == 0 else (2, 0, 1, 3))
    out = linear(out.reshape(*out.shape[:2], embed), arrays.out, arrays.out_bias)
    return out if batched else out[:, 0], weights, state


def _projected(
    query: jax.Array, key: jax.Array, value: jax.Array, arrays: _Arrays, options: _Options
) -> Any:
    """Return the three input projections, by one product for inputs that are the same array."""
    embed, bias = options.embed_dim, arrays.in_bias
    if options.separate:
        biases = (
            [None] * 3 if bias is None else [bias[i * embed : (i + 1) * embed] for i in (0, 1, 2)]
        )
        return [
            linear(x, w, b)
            for x, w, b in zip((query, key, value), arrays.in_proj, biases, strict=True)
        ]
    (weight,) = arrays.in_proj

    def rows(x: jax.Array, first: int, last: int) -> list[Any]:
        part = slice(first * embed, last * embed)
        out = linear(x, weight[part], None if bias is None else bias[part])
        return jnp.split(out, last - first, -1)

    if arrays.key is None and arrays.value is None:
        return rows(query, 0, 3)
    if arrays.value is None:
        return rows(query, 0, 1) + rows(key, 1, 3)
    return rows(query, 0, 1) + rows(key, 1, 2) + rows(value, 2, 3)


def _one_position(bias: jax.Array, like: jax.Array) -> Any:  # (1, 1, E) -> (N, H, 1, D)
    batch, heads, _, head = like.shape
    return jnp.broadcast_to(bias.reshape(1, heads, 1, head), (batch, heads, 1, head))


def _masks(arrays: _Arrays, batch: int, heads: int, added: int) -> list[Any]:
    """Return the masks in a shape that fits the scores; booleans are True to take part."""
    masks = []
    attn, padding = arrays.attn_mask, arrays.padding_mask
    if attn is not None:  # (L, S) or (N H, L, S)
        masks.append(attn.reshape(batch, heads, *attn.shape[1:]) if attn.ndim == 3 else attn)
    if padding is not None:  # (N, S) or (S,)
        masks.append(padding.reshape(batch, 1, 1, padding.shape[-1]))
    if added:
        masks = [jnp.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, added)]) for m in masks]
    return [~m if m.dtype == jnp.bool_ else m for m in masks]


def multi_head_attention_forward(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: ArrayLike,
    in_proj_bias: ArrayLike | None,
    bias_k: ArrayLike | None,
    bias_v: ArrayLike | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: ArrayLike,
    out_proj_bias: ArrayLike | None,
    training: bool = True,
    key_padding_mask: ArrayLike | None = None,
    need_weights: bool = True,
    attn_mask: ArrayLike | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: ArrayLike | None = None,
    k_proj_weight: ArrayLike | None = None,
    v_proj_weight: ArrayLike | None = None,
    static_k: ArrayLike | None = None,
    static_v: ArrayLike | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    batch_first: bool = False,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
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
        need_weights: also return the attention weights. A row where everything is masked attends to
            nothing, with and without them: its weights are 0, and its gradients. In torch they are NaN
            where the weights are asked for.
        attn_mask: ``(L, S)`` or ``(N num_heads, L, S)``: True leaves a pair out; or numbers to add.
        use_separate_proj_weight: take the next three weights in place of `in_proj_weight`.
        q_proj_weight: ``(E, E)``.
        k_proj_weight: ``(E, key features)``.
        v_proj_weight: ``(E, value features)``.
        static_k: ``(N num_heads, S, D)``, keys that are used as they are.
        static_v: ``(N num_heads, S, D)``, values that are used as they are.
        average_attn_weights: average the returned weights over the heads.
        is_causal: says that `attn_mask`, which must be given, is causal. Without weights and padding
            the hint is then used in place of the mask, as in torch.
        batch_first: the batch is the first axis, ``(N, L, E)``, instead of the second.
        rng: a random key for the dropout; without one the draw comes from the generator in force.

    Returns:
        The output, of the query's shape, and the weights ``(N, L, S)``, or ``(N, num_heads, L, S)``,
        or None.

    Raises:
        AssertionError: if query, key, value and weights do not fit together (torch's class).
        ShapeError: if a mask does not fit.
        DtypeError: if the dtypes do not fit.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Vaswani et al. 2017; ``torch.nn.functional.multi_head_attention_forward``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> out, weights = attention(jnp.ones((3, 1, 8)), jnp.ones((5, 1, 8)), jnp.ones((5, 1, 8)))
        >>> out.shape, weights.shape
        ((3, 1, 8), (1, 3, 5))
    """

    def taken(x: ArrayLike | None, name: str) -> Any:
        return x if x is None or isinstance(x, jax.Array) else array(x, name, _NAME)

    if use_separate_proj_weight:
        projections = (
            array(q_proj_weight, "q_proj_weight", _NAME),
            array(k_proj_weight, "k_proj_weight", _NAME),
            array(v_proj_weight, "v_proj_weight", _NAME),
        )
    else:
        projections = (array(in_proj_weight, "in_proj_weight", _NAME),)
    arrays = _Arrays(
        None if key is query else array(key, "key", _NAME),
        None if value is key else array(value, "value", _NAME),
        projections,
        taken(in_proj_bias, "in_proj_bias"),
        taken(bias_k, "bias_k"),
        taken(bias_v, "bias_v"),
        taken(static_k, "static_k"),
        taken(static_v, "static_v"),
        array(out_proj_weight, "out_proj_weight", _NAME),
        taken(out_proj_bias, "out_proj_bias"),
        taken(attn_mask, "attn_mask"),
        taken(key_padding_mask, "key_padding_mask"),
    )
    options = _Options(
        embed_dim_to_check,
        num_heads,
        bool(use_separate_proj_weight),
        bool(add_zero_attn),
        bool(need_weights),
        bool(average_attn_weights),
        bool(is_causal),
        bool(batch_first),
        allowed_backends.get(),
    )

    def kernel(
        key: jax.Array | None, state: State | None
    ) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
        out, weights, state = _multi_head(q, arrays, key, state, dropout_p, options)
        return (out, weights), state

    q = array(query, "query", _NAME)
    return with_draw(dropout_p if training else 0.0, rng, kernel)


# --------------------------------------------------------------------------------------------------
# Checks


def _assert(fits: bool, what: str, why: str, instead: str) -> None:
    # torch raises AssertionError for these.
    if not fits:
        raise AssertionError(explain(what, why, instead))


def _check(q: jax.Array, k: jax.Array, v: jax.Array, arrays: _Arrays, options: _Options) -> None:
    """Raise torch's classes unless everything fits. Runs once for each combination of shapes."""
    given = f"{_NAME} was given query {q.shape}, key {k.shape} and value {v.shape}"
    _assert(
        q.ndim in (2, 3),
        given,
        f"the query is (L, N, E), or (L, E) without a batch, and has {q.ndim} axes",
        "a query of three axes, or of two",
    )
    batched = q.ndim == 3
    _assert(
        k.ndim == q.ndim and v.ndim == q.ndim,
        given,
        "all three have a batch axis, or none has",
        "key and value of shape (S, N, E), or (S, E) for a query of shape (L, E)",
    )
    batch_axis = 0 if options.batch_first and batched else 1
    batch = q.shape[batch_axis] if batched else 1
    length, source = (x.shape[1 - batch_axis if batched else 0] for x in (q, k))
    embed, heads = options.embed_dim, options.num_heads
    _assert(
        q.shape[-1] == embed,
        given,
        f"was expecting embedding dimension of {embed}, but got {q.shape[-1]}",
        f"an input whose last axis is {embed}",
    )
    _assert(
        heads > 0 and embed % heads == 0,
        f"{_NAME} was given embedding dimension {embed} and num_heads={heads}",
        f"embed_dim {embed} not divisible by num_heads {heads}",
        "a number of heads that divides it",
    )
    same = (lambda x: x.shape[:-1]) if options.separate else (lambda x: x.shape)
    _assert(
        same(k) == same(v),
        given,
        "there is one value for each key"
        + ("" if options.separate else ", and one packed projection serves both"),
        f"value of shape {k.shape}; or kdim={k.shape[-1]}, vdim={v.shape[-1]} in "
        "nn.MultiheadAttention",
    )
    if batched and k.shape[batch_axis] != batch:
        raise shape_error(
            given,
            f"the batch axis (axis {batch_axis}) must agree",
            f"batch_first={not options.batch_first} if the batch is axis {1 - batch_axis}",
        )
    _check_weights(given, (q, k, v), arrays, options)
    _check_static(given, arrays, batch, heads, embed // heads)
    if arrays.static_k is not None:
        source = arrays.static_k.shape[1]
    _check_masks(given, q, arrays, options, (batch, heads, length, source), batched)


def _check_weights(given: str, inputs: Sequence[Any], arrays: _Arrays, options: _Options) -> None:
    embed = options.embed_dim
    if options.separate:
        wanted = [(embed, x.shape[-1]) for x in inputs]
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    else:
        wanted, names = [(3 * embed, inputs[1].shape[-1])], ["in_proj_weight"]
    shapes = list(zip(names, arrays.in_proj, wanted, strict=True))
    shapes += [
        ("in_proj_bias", arrays.in_bias, (3 * embed,)),
        ("bias_k", arrays.bias_k, (1, 1, embed)),
        ("bias_v", arrays.bias_v, (1, 1, embed)),
    ]
    for name, weight, shape in shapes:
        if weight is not None and weight.shape != shape:
            what = f"{given}, and {name} of shape {weight.shape}"
            why = f"the projections to {embed} features need {name} of shape {shape}"
            _assert(not options.separate, what, why, f"{name} of shape {shape}")
            raise shape_error(what, why, f"{name} of shape {shape}")
    weights = dict(zip(names, arrays.in_proj, strict=True))
    fields = ("in_bias", "bias_k", "bias_v", "static_k", "static_v", "out", "out_bias")
    require_same_dtype(
        _NAME,
        query=inputs[0],
        key=inputs[1],
        value=inputs[2],
        **weights,
        **{name: getattr(arrays, name) for name in fields},
    )


def _check_static(given: str, arrays: _Arrays, batch: int, heads: int, head: int) -> None:
    _assert(
        (arrays.bias_k is None) == (arrays.bias_v is None),
        f"{given}, and one of bias_k and bias_v",
        "an added key needs an added value",
        "both of them, or neither",
    )
    statics = (("static_k", arrays.static_k), ("static_v", arrays.static_v))
    for name, static in statics:
        if static is None:
            continue
        _assert(
            arrays.bias_k is None,
            f"{given}, {name} and bias_k",
            f"bias cannot be added to {name}, which is used as it is",
            "bias_k=None, bias_v=None",
        )
        _assert(
            static.ndim == 3 and static.shape[0] == batch * heads and static.shape[2] == head,
            f"{given}, and {name} of shape {static.shape}",
            f"it is (N num_heads, S, D), here ({batch * heads}, S, {head})",
            f"{name} of shape ({batch * heads}, S, {head})",
        )
    lengths = [x.shape[1] for _, x in statics if x is not None]
    if len(lengths) == 2 and lengths[0] != lengths[1]:
        raise shape_error(
            f"{given}, static_k of {lengths[0]} and static_v of {lengths[1]} positions",
            "there is one value for each key",
            "the same number of positions in both",
        )


def _check_masks(
    given: str,
    query: jax.Array,
    arrays: _Arrays,
    options: _Options,
    sizes: tuple[int, int, int, int],
    batched: bool,
) -> None:
    batch, heads, length, source = sizes
    mask, padding = arrays.attn_mask, arrays.padding_mask
    for name, x in (("attn_mask", mask), ("key_padding_mask", padding)):
        if x is None or x.dtype == jnp.bool_:
            continue
        _assert(
            jnp.issubdtype(x.dtype, jnp.floating),
            f"{_NAME} was given {name} of dtype {x.dtype}",
            f"only bool and floating types of {name} are supported",
            f"{name}.astype(bool), True where attention is not allowed",
        )
        low = query.dtype in LOW_PRECISION and x.dtype == jnp.float32
        if x.dtype != query.dtype and not low:
            raise DtypeError(
                explain(
                    f"{_NAME} was given query of dtype {query.dtype} and {name} of dtype {x.dtype}",
                    "the mask is added to the scores, and mixed dtypes are not promoted",
                    f"{name}.astype({query.dtype}), or a mask of booleans",
                )
            )
    if options.causal and mask is None:
        raise RuntimeError(
            explain(
                f"{_NAME} was given is_causal=True without attn_mask",
                "Need attn_mask if specifying the is_causal hint: it only says that the mask is causal",
                f"attn_mask=nn.Transformer.generate_square_subsequent_mask({length}), is_causal=True",
            )
        )
    if mask is not None:
        wanted = ((length, source), (batch * heads, length, source))
        what = f"{given}, and attn_mask of shape {mask.shape}"
        why = f"the mask is {wanted[0]}, or {wanted[1]} with one for each head"
        _assert(mask.ndim in (2, 3), what, why, "reshape the mask to one of these")
        if mask.shape not in wanted:
            _assert(batched or mask.ndim == 2, what, why, "reshape the mask to one of these")
            raise shape_error(what, why, "reshape the mask to one of these")
    if padding is not None:
        shape = (batch, source) if batched else (source,)
        _assert(
            padding.shape == shape,
            f"{given}, and key_padding_mask of shape {padding.shape}",
            f"there is one entry for each source position, {shape}",
            f"a key_padding_mask of shape {shape}",
        )
