"""Scaled dot-product attention.

In comments: H heads, L target positions, S source positions, D per head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.box import unwrap
from statefulnn.core.construction import allowed_backends
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.generator import State, advance, drawing_generator
from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._causal_bias import CausalBias
from statefulnn.functional._checks import (
    LOW_PRECISION,
    array,
    require_same_dtype,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional.dropout import kept_factors

# What a kernel gives.
Out = TypeVar("Out")

# --------------------------------------------------------------------------------------------------
# The formula


class Form(NamedTuple):
    """What is fixed when attention is compiled."""

    scale: float
    causal: int | None = None  # position i sees positions up to i + causal
    grouped: bool = False  # each head of keys serves several of queries


def _accumulated(x: jax.Array) -> Any:
    """Return the dtype in which products of arrays like `x` are summed."""
    return jnp.float32 if x.dtype in LOW_PRECISION else x.dtype


def masked_scores(form: Form, query: jax.Array, key: jax.Array, masks: Sequence[Any]) -> jax.Array:
    """Return the masked scores ``(*, H, L, S)``, at least in float32."""
    wide = _accumulated(query)
    low = query.dtype in LOW_PRECISION
    if not low:  # on L · D numbers and not on L · S; in low precision that would round
        query = query * jnp.asarray(form.scale, wide)
    if form.grouped:
        heads = key.shape[-3]
        query = query.reshape(*query.shape[:-3], heads, -1, *query.shape[-2:])
        out = jnp.einsum("...gld,...sd->...gls", query, key, preferred_element_type=wide)
        out = out.reshape(*out.shape[:-4], -1, *out.shape[-2:])
    else:
        out = jnp.einsum("...ld,...sd->...ls", query, key, preferred_element_type=wide)
    if low:
        out = out * jnp.asarray(form.scale, wide)
    if form.causal is not None:
        rows = lax.broadcasted_iota(jnp.int32, out.shape[-2:], 0)
        columns = lax.broadcasted_iota(jnp.int32, out.shape[-2:], 1)
        masks = [columns <= rows + form.causal, *masks]
    for mask in masks:
        if mask.dtype == jnp.bool_:  # True: take part
            mask = jnp.where(mask, 0.0, -jnp.inf)
        out = out + mask.astype(wide)  # a sum, and so NaN stays NaN, as in torch
    return out


def _exponentials(scores: jax.Array) -> tuple[Any, Any]:
    """Return ``exp(scores - highest)`` and its sum over S, 1 where everything is masked."""
    if scores.shape[-1]:
        highest = lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
        # Without a finite maximum nothing is subtracted.
        scores = scores - jnp.where(highest == -jnp.inf, jnp.zeros((), scores.dtype), highest)
    powers = jnp.exp(scores)
    total = jnp.sum(powers, -1, keepdims=True)
    return powers, jnp.where(total == 0, jnp.ones((), total.dtype), total)


@jax.custom_jvp
def softmax_of_scores(scores: jax.Array) -> jax.Array:
    """Return the softmax over the last axis, or 0 where everything is masked."""
    powers, total = _exponentials(scores)
    return powers / total


@softmax_of_scores.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    weights = softmax_of_scores(primals[0])  # of the result alone, so that nothing else is kept
    moved = weights * tangents[0]
    return weights, moved - weights * jnp.sum(moved, -1, keepdims=True)


def weighted_values(form: Form, weights: jax.Array, value: jax.Array) -> jax.Array:
    """Return ``weights V``, summed at least in float32."""
    wide = _accumulated(value)
    weights = weights.astype(value.dtype)
    if form.grouped:
        shape = (*weights.shape[:-3], value.shape[-3], -1, *weights.shape[-2:])
        out = jnp.einsum(
            "...gls,...sd->...gld", weights.reshape(shape), value, preferred_element_type=wide
        )
        return out.reshape(*out.shape[:-4], -1, *out.shape[-2:])
    return jnp.einsum("...ls,...sd->...ld", weights, value, preferred_element_type=wide)


def _by_weights(
    form: Form,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: Sequence[jax.Array],
    kept: jax.Array | None,
) -> Any:
    weights = softmax_of_scores(masked_scores(form, query, key, masks))
    if kept is not None:
        weights = weights * kept.astype(weights.dtype)
    return weighted_values(form, weights, value).astype(value.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(
    form: Form,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: Sequence[jax.Array],
    kept: jax.Array | None,
) -> jax.Array:
    """Return ``softmax(scale · Q Kᵀ + masks) V`` for arrays that fit.

    Args:
        form: what is static.
        query: ``(*, Hq, L, D)``.
        key: ``(*, H, S, D)``.
        value: ``(*, H, S, Dv)``.
        masks: a tuple of arrays for the scores: booleans, True to take part, or numbers to add.
        kept: factors of the weights (dropout), or None.
    """
    # The division comes after the product with the values, on L · Dv numbers and not on L · S. Under a
    # derivative the weights themselves are needed, and the division comes first.
    powers, total = _exponentials(masked_scores(form, query, key, masks))
    if kept is not None:
        powers = powers * kept.astype(powers.dtype)
    return (weighted_values(form, powers, value) / total).astype(value.dtype)


def _attend_jvp(form: Form, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    leaves, tree = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    # Only what really moves: zeros that are multiplied out would cost products of matrices.
    chosen = [i for i, t in enumerate(moves) if not isinstance(t, SymbolicZero)]

    def of_chosen(*arrays: Any) -> Any:
        filled = list(leaves)
        for i, x in zip(chosen, arrays, strict=True):
            filled[i] = x
        return _by_weights(form, *jax.tree.unflatten(tree, filled))

    return jax.jvp(of_chosen, [leaves[i] for i in chosen], [moves[i] for i in chosen])


attend.defjvp(_attend_jvp, symbolic_zeros=True)


# --------------------------------------------------------------------------------------------------
# Dropout


def with_draw(
    p: float, rng: jax.Array | None, kernel: Callable[[Any, Any], tuple[Out, Any]]
) -> Out:
    """Return what a kernel computes that may drop elements.

    Args:
        p: the share that is dropped.
        rng: the key to draw with; None for the generator in force.
        kernel: takes a key or None, and a generator's state or None; returns its output and the next state.
    """
    if not p > 0:
        return kernel(None, None)[0]
    if rng is not None:
        return kernel(unwrap(rng), None)[0]
    return drawing_generator().drawn(lambda state: kernel(None, state))


def kept_weights(
    key: Any, state: State | None, p: ArrayLike, shape: Sequence[int], dtype: DTypeLike
) -> tuple[Any, Any]:
    """Return the factors of dropout, or None where nothing is drawn, and the state after the draw."""
    if key is None:
        if state is None:
            return None, None
        key, state = advance(state)
    return kept_factors(key, shape, p, dtype), state


# --------------------------------------------------------------------------------------------------
# The choice of a kernel


def cudnn_serves(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    form: Form,
    plain: bool,
    capability: tuple[int, ...] | None,
) -> bool:
    """Say whether cuDNN's flash attention computes this, with the same result.

    Args:
        query: anything with a shape and a dtype; `key` and `value` likewise.
        form: what is static.
        plain: whether there are neither masks nor dropout. With masks cuDNN would average the values
            where everything is masked, and not give 0.
        capability: the GPU's compute capability, (major, minor), or None.
    """
    shapes = query.shape, key.shape, value.shape
    return (
        plain
        and form.causal in (None, 0)
        and capability is not None
        and capability >= (8, 0)
        and query.dtype in LOW_PRECISION
        and all(len(s) >= 3 and 0 not in s for s in shapes)
        and shapes[0][:-3] == shapes[1][:-3] == shapes[2][:-3]
        and shapes[1][-3] == shapes[2][-3]
        and (shapes[0][-3] == shapes[1][-3] or form.grouped)
        and shapes[0][-1] == shapes[2][-1]
        and shapes[0][-1] % 8 == 0
        and shapes[0][-1] <= 128
    )


@functools.cache
def _capability() -> tuple[int, ...] | None:
    """Return the compute capability of the default GPU, or None without an NVIDIA one."""
    if jax.default_backend() != "gpu":
        return None
    text = str(getattr(jax.devices()[0], "compute_capability", ""))
    parts = text.split(".")
    return tuple(map(int, parts)) if all(p.isdigit() for p in parts) else None


def _cudnn(form: Form, query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    batch = query.shape[:-3]

    def heads_third(x: jax.Array) -> Any:  # (*, H, L, D) -> (N, L, H, D)
        return jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2)

    out = jax.nn.dot_product_attention(
        heads_third(query),
        heads_third(key),
        heads_third(value),
        scale=form.scale,
        is_causal=form.causal is not None,
        implementation="cudnn",
    )
    return jnp.swapaxes(out, 1, 2).reshape(*batch, *query.shape[-3:])


def attend_by_platform(
    form: Form,
    backends: frozenset[str] | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: Sequence[jax.Array],
    kept: jax.Array | None,
) -> jax.Array:
    """As `attend`, by the platform's own kernel where that is as good and allowed."""
    allowed = backends is None or bool(
        backends & {"CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"}
    )
    plain = not masks and kept is None
    if allowed and cudnn_serves(query, key, value, form, plain, _capability()):
        formula = lambda q, k, v: attend(form, q, k, v, (), None)
        # The default device may be a GPU and this code still run on another one.
        return lax.platform_dependent(
            query, key, value, cuda=functools.partial(_cudnn, form), default=formula
        )
    if backends is not None and backends <= {"CUDNN_ATTENTION", "OVERRIDEABLE"}:
        raise RuntimeError(
            explain(
                f"attention of shapes {query.shape}, {key.shape}, {value.shape} and dtype "
                f"{query.dtype} was asked of {', '.join(sorted(backends)) or 'no backend'}",
                "No available kernel: cuDNN serves float16 and bfloat16 on NVIDIA GPUs, without masks "
                "and dropout, with at most 128 features a head, a multiple of 8",
                "with nn.attention.sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])",
            )
        )
    return attend(form, query, key, value, masks, kept)


# --------------------------------------------------------------------------------------------------
# The function


@functools.partial(compiled, static_argnums=(7, 8))
@ruled(Rule.LOW)
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    rng: jax.Array | None,
    state: State | None,
    p: ArrayLike,
    form: Form,
    backends: frozenset[str] | None,
) -> tuple[Any, Any]:
    shape = _check_attention(query, key, value, mask, form)
    kept, state = kept_weights(rng, state, p, shape, _accumulated(query))
    masks = () if mask is None else (mask,)
    return attend_by_platform(form, backends, query, key, value, masks, kept), state


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return ``softmax(scale · Q Kᵀ + mask) V``.

    On NVIDIA GPUs float16 and bfloat16 without mask and dropout go to cuDNN's flash attention, which
    has first derivatives in reverse mode only: for others write
    ``with nn.attention.sdpa_kernel(SDPBackend.MATH):`` around the call.

    Args:
        query: ``(*, Hq, L, D)``.
        key: ``(*, H, S, D)``.
        value: ``(*, H, S, Dv)``.
        attn_mask: broadcast to ``(*, Hq, L, S)``: booleans, True where attention is allowed, or
            numbers added to the scores; or a `CausalBias`.
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
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Vaswani et al. 2017; ``torch.nn.functional.scaled_dot_product_attention``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.ones((2, 4, 5, 8))
        >>> F.scaled_dot_product_attention(x, x, x, is_causal=True).shape
        (2, 4, 5, 8)
    """
    q = query if isinstance(query, jax.Array) else array(query, "query", _NAME)
    k = key if isinstance(key, jax.Array) else array(key, "key", _NAME)
    v = value if isinstance(value, jax.Array) else array(value, "value", _NAME)
    causal = 0 if is_causal else None
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError(
                explain(
                    f"{_NAME} was given a CausalBias and is_causal=True",
                    "CausalBias should not be used with causal=True: it says so itself",
                    "is_causal=False",
                )
            )
        _check_bias(attn_mask, q, k)
        causal, mask = attn_mask.offset, None
    else:
        mask = None if attn_mask is None else array(attn_mask, "attn_mask", _NAME)
    if mask is not None and is_causal:
        raise RuntimeError(
            explain(
                f"{_NAME} was given attn_mask and is_causal=True",
                "Explicit attn_mask should not be set when is_causal=True",
                "is_causal=False, and the causal part in the mask",
            )
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise shape_error(
            f"{_NAME} was given dropout_p={dropout_p}",
            "dropout probability has to be between 0 and 1",
            "dropout_p=0.1",
        )
    if scale is None:
        features = q.shape[-1] if q.ndim else 0
        scale = 1 / math.sqrt(features) if features else 1.0
    form = Form(float(scale), causal, bool(enable_gqa))
    backends = allowed_backends.get()
    kernel = lambda key, state: _attention(q, k, v, mask, key, state, dropout_p, form, backends)
    return with_draw(dropout_p, rng, kernel)


_NAME = "F.scaled_dot_product_attention"


def _check_bias(bias: CausalBias, q: jax.Array, k: jax.Array) -> None:
    sizes = (*q.shape[-2:-1], *k.shape[-2:-1])
    if bias.offset and sizes != bias.shape:
        raise shape_error(
            f"{_NAME} was given query {q.shape}, key {k.shape} and {bias!r}",
            f"the bias is aligned for {bias.shape[0]} target and {bias.shape[1]} source positions",
            f"causal_lower_right{sizes}",
        )


def _check_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, form: Form
) -> tuple[Any, ...]:
    """Raise unless the arrays fit; return the shape of the scores."""
    given = f"{_NAME} was given query {q.shape}, key {k.shape} and value {v.shape}"
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise shape_error(
            given,
            "the query is (*, L, D), the key (*, S, D) and the value (*, S, Dv)",
            "put positions on axis -2 and features on axis -1",
        )
    if form.grouped and (
        min(q.ndim, k.ndim, v.ndim) < 3
        or k.shape[-3] != v.shape[-3]
        or not k.shape[-3]
        or q.shape[-3] % k.shape[-3]
    ):
        raise shape_error(
            f"{given}, and enable_gqa=True",
            "the heads of the query (axis -3) are a multiple of those of key and value",
            "as many heads of keys as of values, which divide those of the query",
        )
    batches = [x.shape[:-3] if form.grouped else x.shape[:-2] for x in (q, k, v)]
    try:
        jnp.broadcast_shapes(*batches)
    except ValueError:
        raise shape_error(
            given,
            "the axes before the last two are batch and head axes and must agree",
            "enable_gqa=True for fewer heads of keys than of queries; or broadcast the arrays",
        ) from None
    require_same_dtype(_NAME, query=q, key=k, value=v)
    scores = (*jnp.broadcast_shapes(*batches[:2]), *q.shape[-3 if form.grouped else -2 : -1])
    scores = (*scores, k.shape[-2])
    if mask is None:
        return scores
    if jnp.issubdtype(mask.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"{_NAME} was given attn_mask of dtype {mask.dtype}",
                "a mask is boolean, or floating to be added to the scores",
                "attn_mask.astype(bool), True where attention is allowed",
            )
        )
    # A float32 mask serves low precision, as in torch.
    if mask.dtype != jnp.bool_ and mask.dtype != widened(jnp.zeros((), q.dtype)).dtype:
        require_same_dtype(_NAME, query=q, attn_mask=mask)
    try:
        fits = jnp.broadcast_shapes(scores, mask.shape) == scores
    except ValueError:
        fits = False
    if not fits:
        raise shape_error(
            f"{given}, and attn_mask of shape {mask.shape}",
            f"the mask is broadcast to the scores, of shape {scores}",
            f"a mask of shape {scores[-2:]}, or with the batch axes before",
        )
    return scores
