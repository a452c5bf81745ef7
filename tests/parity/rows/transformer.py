"""Transformer layers, stacks and the whole model.

Dropout is 0: what it draws cannot be torch's, and is compared by itself.
"""

from __future__ import annotations

import numpy as np

from tests.parity.oracle import Case, array

E, H, F = 8, 2, 12
SRC, TGT = array(5, 3, E), array(4, 3, E, seed=1)
SRC_FIRST, TGT_FIRST = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (SRC, TGT))
CAUSAL_SRC = np.triu(np.ones((5, 5), bool), 1)
CAUSAL_TGT = np.where(np.triu(np.ones((4, 4), bool), 1), -np.inf, 0).astype(np.float32)
ACROSS = np.random.default_rng(0).random((4, 5)) < 0.3
ACROSS[:, 0] = False
PER_HEAD = np.random.default_rng(1).random((3 * H, 5, 5)) < 0.3
PER_HEAD[:, :, 0] = False
SRC_PADDING = np.zeros((3, 5), bool)
SRC_PADDING[0, 3:] = SRC_PADDING[2, 4] = True
TGT_PADDING = np.zeros((3, 4), bool)
TGT_PADDING[1, 2:] = True
ALL_PADDED = np.ones((3, 5), bool)
FLOAT_PADDING = array(3, 5, seed=5)

NO_SECOND = (
    "torch's fused attention has no second derivative; test_transformer compares with its formula"
)


def row(layer: str, args: tuple, inputs: tuple, call: dict | None = None, **kwargs: object) -> Case:
    """Make a case whose name shows the call's options."""
    call = call or {}
    shown = ", ".join(f"{k}={'array' if isinstance(v, np.ndarray) else v}" for k, v in call.items())
    return Case(layer, args, {"dropout": 0.0, **kwargs}, inputs, call, shown, no_second=NO_SECOND)


def encoder_layer(call: dict | None = None, inputs: tuple = (SRC,), **kwargs: object) -> Case:
    return row("TransformerEncoderLayer", (E, H, F), inputs, call, **kwargs)


def decoder_layer(call: dict | None = None, inputs: tuple = (TGT, SRC), **kwargs: object) -> Case:
    return row("TransformerDecoderLayer", (E, H, F), inputs, call, **kwargs)


def whole(call: dict | None = None, inputs: tuple = (SRC, TGT), **kwargs: object) -> Case:
    return row("Transformer", (E, H, 2, 1, F), inputs, call, **kwargs)


LAYERS = [
    # First without a kink: in float16 one relu on the other side of 0 is a large error in its weights.
    encoder_layer(activation="gelu"),
    encoder_layer(),
    encoder_layer(norm_first=True),
    encoder_layer(bias=False),
    encoder_layer(inputs=(SRC_FIRST,), batch_first=True, layer_norm_eps=0.1),
    encoder_layer(inputs=(SRC[:, 0],), call={"src_key_padding_mask": SRC_PADDING[0]}),
    encoder_layer({"src_mask": CAUSAL_SRC, "is_causal": True}),
    encoder_layer({"src_mask": CAUSAL_SRC, "src_key_padding_mask": SRC_PADDING, "is_causal": True}),
    encoder_layer({"src_mask": PER_HEAD}, norm_first=True),
    encoder_layer({"src_mask": array(5, 5, seed=4), "src_key_padding_mask": FLOAT_PADDING}),
    # Rows where everything is masked attend to nothing.
    encoder_layer({"src_key_padding_mask": ALL_PADDED}),
    encoder_layer(inputs=(SRC[:, :0],)),
    decoder_layer(activation="gelu"),
    decoder_layer(),
    decoder_layer(norm_first=True, activation="gelu"),
    decoder_layer(bias=False),
    decoder_layer(inputs=(TGT_FIRST, SRC_FIRST), batch_first=True),
    decoder_layer(inputs=(TGT[:, 0], SRC[:, 0])),
    decoder_layer(
        {
            "tgt_mask": CAUSAL_TGT,
            "memory_mask": ACROSS,
            "tgt_key_padding_mask": TGT_PADDING,
            "memory_key_padding_mask": SRC_PADDING,
            "tgt_is_causal": True,
        }
    ),
    decoder_layer({"tgt_mask": CAUSAL_TGT, "tgt_is_causal": True}, norm_first=True),
    whole(activation="gelu"),
    whole(),
    whole({"src_mask": CAUSAL_SRC, "tgt_mask": CAUSAL_TGT, "memory_mask": ACROSS}, norm_first=True),
    whole(
        {
            "src_key_padding_mask": SRC_PADDING,
            "tgt_key_padding_mask": TGT_PADDING,
            "memory_key_padding_mask": SRC_PADDING,
        },
        (SRC_FIRST, TGT_FIRST),
        batch_first=True,
        activation="gelu",
    ),
    whole({"tgt_mask": CAUSAL_TGT, "tgt_is_causal": True}, bias=False),
    whole(inputs=(SRC[:, 0], TGT[:, 0])),
]

LAYER_MISUSE = [
    Case("TransformerEncoderLayer", (E, 3)),
    Case("TransformerEncoderLayer", (E, H, F), {"activation": "tanh"}),
    Case("TransformerEncoderLayer", (E, H, F), {"dropout": 1.5}),
    Case("TransformerEncoderLayer", (E, H, F), inputs=(array(5, 3, 7),)),
    Case("TransformerEncoderLayer", (E, H, F), inputs=(array(1, 5, 3, E),)),
    Case("TransformerEncoderLayer", (E, H, F), inputs=(SRC,), call={"is_causal": True}),
    Case("TransformerEncoderLayer", (E, H, F), inputs=(SRC,), call={"src_mask": CAUSAL_SRC[1:]}),
    Case(
        "TransformerEncoderLayer",
        (E, H, F),
        inputs=(SRC,),
        call={"src_mask": np.zeros((5, 5), np.int64)},
    ),
    Case(
        "TransformerEncoderLayer",
        (E, H, F),
        inputs=(SRC,),
        call={"src_key_padding_mask": SRC_PADDING.T},
    ),
    Case("TransformerDecoderLayer", (E, H, F), inputs=(TGT, SRC[:, :2])),
    Case("TransformerDecoderLayer", (E, H, F), inputs=(TGT, array(5, 3, 6))),
    Case("TransformerDecoderLayer", (E, H, F), inputs=(TGT, SRC[:, 0])),
    Case("Transformer", (E, H, 1, 1, F), inputs=(SRC, TGT[:, :2])),
    Case("Transformer", (E, H, 1, 1, F), {"batch_first": True}, (SRC, TGT)),
    Case("Transformer", (E, H, 1, 1, F), inputs=(SRC[..., :7], TGT)),
    Case("Transformer", (E, H, 1, 1, F), inputs=(SRC, TGT[..., :7])),
    Case("Transformer", (E, 3)),
]
