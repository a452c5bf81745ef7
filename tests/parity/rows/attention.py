"""Attention."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array, integers

QUERY, KEY, VALUE = array(5, 3, 8), array(6, 3, 8, seed=1), array(6, 3, 8, seed=2)
BATCH_FIRST = tuple(np.ascontiguousarray(x.swapaxes(0, 1)) for x in (QUERY, KEY, VALUE))
UNBATCHED = (QUERY[:, 0], KEY[:, 0], VALUE[:, 0])
SELF = (QUERY, QUERY, QUERY)
CAUSAL = np.triu(np.ones((5, 5), bool), 1)
BOOL_MASK = np.random.default_rng(0).random((5, 6)) < 0.3
BOOL_MASK[:, 0] = False
PER_HEAD = np.random.default_rng(1).random((6, 5, 6)) < 0.3
PER_HEAD[:, :, 0] = False
FLOAT_MASK = array(5, 6, seed=3)
PADDING = np.zeros((3, 6), bool)
PADDING[0, 4:] = PADDING[2, 1] = True
FLOAT_PADDING = np.where(PADDING, -np.inf, 0).astype(np.float32)


def attention(inputs: tuple = (QUERY, KEY, VALUE), note: str = "", **kwargs: object) -> Case:
    """Make a case from options of the constructor and of the call."""
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    call = {k: kwargs.pop(k) for k in names if k in kwargs}
    shown = ", ".join(f"{k}={'array' if isinstance(v, np.ndarray) else v}" for k, v in call.items())
    return Case("MultiheadAttention", (8, 2), kwargs, inputs, call, f"{note} {shown}".strip())


LAYERS = [
    attention(),
    attention(need_weights=False),
    attention(average_attn_weights=False),
    attention(SELF, "self"),
    attention(BATCH_FIRST, batch_first=True),
    attention(BATCH_FIRST, batch_first=True, average_attn_weights=False),
    attention(UNBATCHED, "one example"),
    attention(UNBATCHED, "one example", batch_first=True, key_padding_mask=PADDING[0]),
    attention(UNBATCHED, "one example", average_attn_weights=False, attn_mask=BOOL_MASK),
    attention(bias=False),
    attention(add_bias_kv=True),
    attention(add_zero_attn=True),
    attention(add_bias_kv=True, add_zero_attn=True, attn_mask=BOOL_MASK, key_padding_mask=PADDING),
    attention(add_bias_kv=True, attn_mask=FLOAT_MASK, need_weights=False),
    attention((QUERY, array(6, 3, 5), array(6, 3, 7)), kdim=5, vdim=7),
    attention((QUERY, array(6, 3, 5), VALUE), kdim=5, bias=False, need_weights=False),
    attention(attn_mask=BOOL_MASK),
    attention(attn_mask=BOOL_MASK, need_weights=False),
    attention(attn_mask=FLOAT_MASK),
    attention(attn_mask=FLOAT_MASK, need_weights=False),
    attention(attn_mask=PER_HEAD),
    attention(attn_mask=PER_HEAD, need_weights=False, key_padding_mask=PADDING),
    attention(key_padding_mask=PADDING),
    attention(key_padding_mask=PADDING, need_weights=False),
    attention(key_padding_mask=FLOAT_PADDING, attn_mask=FLOAT_MASK),
    attention(SELF, "self", attn_mask=CAUSAL, is_causal=True),
    attention(SELF, "self", attn_mask=CAUSAL, is_causal=True, need_weights=False),
    attention(key_padding_mask=np.ones((3, 6), bool), note="all masked", need_weights=False),
    attention(
        (QUERY, KEY, KEY), "key is value", attn_mask=BOOL_MASK, key_padding_mask=FLOAT_PADDING
    ),
    attention((QUERY[:, :0], KEY[:, :0], VALUE[:, :0]), "empty batch"),
]


Q, K, V = array(2, 4, 5, 8), array(2, 4, 6, 8, seed=1), array(2, 4, 6, 3, seed=2)
VISIBLE = np.random.default_rng(0).random((5, 6)) < 0.6
VISIBLE[2] = False  # a row that sees nothing


WEIGHTS = (array(24, 8, seed=4) / 3, array(24, seed=5), array(8, 8, seed=6) / 3, array(8, seed=7))
STATIC = array(6, 7, 4, seed=8)
ADDED = (array(1, 1, 8, seed=9), array(1, 1, 8, seed=10))


def forward(
    inputs: tuple = (QUERY, KEY, VALUE),
    note: str = "",
    packed: object = WEIGHTS[0],
    added: tuple = (None, None),
    heads: int = 2,
    embed: int = 8,
    zero: bool = False,
    **kwargs: object,
) -> Call:
    """Make a call of multi_head_attention_forward."""
    weights = (embed, heads, packed, WEIGHTS[1], *added, zero, 0.0, *WEIGHTS[2:])
    return Call("multi_head_attention_forward", (*inputs, *weights), kwargs, note)


SEPARATE = {
    "use_separate_proj_weight": True,
    "q_proj_weight": array(8, 8, seed=11),
    "k_proj_weight": array(8, 5, seed=12),
    "v_proj_weight": array(8, 7, seed=13),
}

FUNCTIONS = [
    Call("scaled_dot_product_attention", (Q, K, V)),
    Call("scaled_dot_product_attention", (Q, K, V), {"is_causal": True}),
    Call("scaled_dot_product_attention", (K, Q, Q), {"is_causal": True}, note="fewer sources"),
    Call("scaled_dot_product_attention", (Q, K, V), {"scale": 0.1, "attn_mask": VISIBLE}),
    Call("scaled_dot_product_attention", (Q, K, V), {"attn_mask": np.where(VISIBLE, 0, -np.inf)}),
    Call("scaled_dot_product_attention", (Q, K, V), {"attn_mask": array(2, 1, 5, 6)}),
    Call(
        "scaled_dot_product_attention", (Q, K, V, array(5, 6, seed=3)), note="mask differentiated"
    ),
    Call("scaled_dot_product_attention", (Q[0, 0], K[0, 0], V[0, 0])),
    Call("scaled_dot_product_attention", (Q * 60, K * 60, V), note="saturated", tolerance=5),
    Call("scaled_dot_product_attention", (Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
    Call(
        "scaled_dot_product_attention",
        (Q, K[:, :2], V[:, :2]),
        {"enable_gqa": True, "attn_mask": array(2, 4, 5, 6) > 0},
    ),
    Call(
        "scaled_dot_product_attention",
        (Q, K[:, :1], V[:, :1]),
        {"enable_gqa": True, "is_causal": True},
    ),
    Call("scaled_dot_product_attention", (Q, K[:1], V[:, :1]), note="broadcast"),
    Call("scaled_dot_product_attention", (Q, K[:, :, :0], V[:, :, :0])),
    Call("scaled_dot_product_attention", (Q[:0], K[:0], V[:0])),
    Call("scaled_dot_product_attention", (Q[:, :, :0], K, V), note="no target"),
    forward(),
    forward(need_weights=False),
    forward(note="static_k", static_k=STATIC, static_v=STATIC[::-1].copy()),
    forward(note="static_k alone", static_k=STATIC[:, :6], need_weights=False, zero=True),
    forward(note="added", added=ADDED, key_padding_mask=PADDING, need_weights=False),
    forward((QUERY, array(6, 3, 5), array(6, 3, 7)), "separate", None, **SEPARATE),
    forward(UNBATCHED, "one example", key_padding_mask=FLOAT_PADDING[0], attn_mask=FLOAT_MASK),
    forward(SELF, "hint", attn_mask=CAUSAL, is_causal=True, need_weights=False),
]

MISUSE = [
    Call("scaled_dot_product_attention", (array(2, 4), array(2, 5), array(2, 4))),
    Call("scaled_dot_product_attention", (array(4), array(2, 4), array(2, 4))),
    Call("scaled_dot_product_attention", (array(2, 4), array(2, 4), array(3, 4))),
    Call("scaled_dot_product_attention", (Q, K[:, :3], V)),
    Call("scaled_dot_product_attention", (Q, K[:, :3], V[:, :3]), {"enable_gqa": True}),
    Call("scaled_dot_product_attention", (Q, K, V), {"attn_mask": array(5, 7)}),
    Call("scaled_dot_product_attention", (Q, K, V), {"attn_mask": integers(2, 5, 6)}),
    Call("scaled_dot_product_attention", (Q, K, V), {"dropout_p": 1.5}),
    Call(
        "scaled_dot_product_attention",
        (array(2, 4), array(2, 4), array(2, 4)),
        {"attn_mask": np.ones((2, 2), bool), "is_causal": True},
    ),
    forward((array(2, 3, 3, 8), KEY, VALUE), "rank"),
    forward((QUERY, KEY[:, 0], VALUE), "ranks differ"),
    forward((QUERY[:, 0], KEY, VALUE), "ranks differ, unbatched"),
    forward((QUERY, KEY, VALUE[:5]), "lengths differ"),
    forward((QUERY, KEY[:, :2], VALUE[:, :2]), "batches differ"),
    forward((QUERY, array(6, 3, 5), array(6, 3, 5)), "features"),
    forward(note="embed", embed=7),
    forward(note="heads", heads=3),
    forward(note="packed", packed=WEIGHTS[0][:9]),
    forward(note="one added", added=(ADDED[0], None)),
    forward(note="added and static", added=ADDED, static_k=STATIC),
    forward(note="static", static_k=STATIC[:4]),
    forward(note="static features", static_v=STATIC[..., :3]),
    forward(note="hint alone", is_causal=True),
    forward(attn_mask=array(5, 7)),
    forward(attn_mask=array(5, 5, 6)),
    forward(attn_mask=array(6)),
    forward(attn_mask=integers(2, 5, 6)),
    forward(UNBATCHED, attn_mask=array(3, 5, 6)),
    forward(key_padding_mask=PADDING[:2]),
    forward(key_padding_mask=PADDING[0]),
    forward(key_padding_mask=PADDING[:, :5]),
    forward(UNBATCHED, key_padding_mask=PADDING),
    forward(key_padding_mask=integers(2, 3, 6)),
]

LAYER_MISUSE = [
    Case("MultiheadAttention", (8, 3)),
    Case("MultiheadAttention", (0, 1)),
    Case("MultiheadAttention", (8, 0)),
    Case("MultiheadAttention", (-8, 2)),
    Case("MultiheadAttention", (8, 2), inputs=(array(5, 3, 7), KEY, VALUE)),
    Case("MultiheadAttention", (8, 2), {"kdim": 5}, (QUERY, KEY, VALUE)),
    Case("MultiheadAttention", (8, 2), inputs=(QUERY, KEY, VALUE), call={"is_causal": True}),
]
