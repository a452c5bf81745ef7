"""Attention."""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Call, Case, array

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
    attention(key_padding_mask=np.ones((3, 6), bool), note="all masked"),
]


Q, K, V = array(2, 4, 5, 8), array(2, 4, 6, 8, seed=1), array(2, 4, 6, 3, seed=2)
VISIBLE = np.random.default_rng(0).random((5, 6)) < 0.6
VISIBLE[2] = False  # a row that sees nothing


FUNCTIONS = [
    Call("scaled_dot_product_attention", (Q, K, V)),
    Call("scaled_dot_product_attention", (Q, K, V), {"is_causal": True}),
    Call("scaled_dot_product_attention", (Q, K, V), {"scale": 0.1, "attn_mask": VISIBLE}),
    Call("scaled_dot_product_attention", (Q, K, V), {"attn_mask": np.where(VISIBLE, 0, -np.inf)}),
    Call("scaled_dot_product_attention", (Q, K, V), {"attn_mask": array(2, 1, 5, 6)}),
    Call("scaled_dot_product_attention", (Q[0, 0], K[0, 0], V[0, 0])),
    Call("scaled_dot_product_attention", (Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
    Call("scaled_dot_product_attention", (Q, K[:, :, :0], V[:, :, :0])),
]

MISUSE = [
    Call("scaled_dot_product_attention", (array(2, 4), array(2, 5), array(2, 4))),
    Call(
        "scaled_dot_product_attention",
        (array(2, 4), array(2, 4), array(2, 4)),
        {"attn_mask": np.ones((2, 2), bool), "is_causal": True},
    ),
]
