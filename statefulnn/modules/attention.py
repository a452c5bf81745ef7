"""Multi-head attention."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike
from statefulnn.modules.linear import Linear


class MultiheadAttention(Module):
    """Attention with several heads, between projections of queries, keys and values.

    Args:
        embed_dim: E, the size of queries and outputs.
        num_heads: the number of heads, which divides E.
        dropout: the probability that an attention weight is dropped in training.
        bias: whether the projections have biases.
        add_bias_kv: whether a learned key and value are added to every sequence.
        add_zero_attn: whether a key and a value of zeros are added to every sequence.
        kdim: the size of keys; None for E.
        vdim: the size of values; None for E.
        batch_first: whether the batch is the first axis, ``(N, L, E)``, instead of the second.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - query: ``(L, N, E)``, ``(N, L, E)`` with `batch_first`, or ``(L, E)``.
        - key, value: ``(S, N, kdim)`` and ``(S, N, vdim)``, arranged in the same way.
        - key_padding_mask: ``(N, S)``: True leaves a position out; or numbers to add to the scores.
        - attn_mask: ``(L, S)`` or ``(N num_heads, L, S)``: True leaves a pair out; or numbers to add.
        - outputs: the query's shape; and ``(N, L, S)``, ``(N, num_heads, L, S)`` without
          `average_attn_weights`, or None without `need_weights`. Weights are 0 where
          everything is masked.

    Attributes:
        in_proj_weight: ``(3 E, E)``, or None if `kdim` or `vdim` differ from E.
        q_proj_weight: ``(E, E)``, or None; `k_proj_weight` and `v_proj_weight` likewise.
        in_proj_bias: ``(3 E,)`` or None.
        bias_k: ``(1, 1, E)`` or None; `bias_v` likewise.
        out_proj: the last `Linear`.

    Source: Vaswani et al. 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = jnp.ones((4, 5, 8))
        >>> out, weights = attention(x, x, x)
        >>> out.shape, weights.shape
        ((4, 5, 8), (4, 5, 5))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                explain(
                    f"made nn.MultiheadAttention with embed_dim={embed_dim}, num_heads={num_heads}",
                    "embed_dim and num_heads must be greater than 0",
                    "nn.MultiheadAttention(8, 2)",
                )
            )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads
        if self.head_dim * num_heads != embed_dim:
            raise AssertionError(
                explain(
                    f"made nn.MultiheadAttention with embed_dim={embed_dim}, num_heads={num_heads}",
                    "embed_dim must be divisible by num_heads",
                    "a number of heads that divides embed_dim",
                )
            )

        def weight(*shape: int) -> Any:
            return init.empty_parameter(shape, dtype, device)

        packed = self._qkv_same_embed_dim
        self.register_parameter(
            "in_proj_weight", weight(3 * embed_dim, embed_dim) if packed else None
        )
        self.register_parameter("q_proj_weight", None if packed else weight(embed_dim, embed_dim))
        self.register_parameter("k_proj_weight", None if packed else weight(embed_dim, self.kdim))
        self.register_parameter("v_proj_weight", None if packed else weight(embed_dim, self.vdim))
        self.register_parameter("in_proj_bias", weight(3 * embed_dim) if bias else None)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.register_parameter("bias_k", weight(1, 1, embed_dim) if add_bias_kv else None)
        self.register_parameter("bias_v", weight(1, 1, embed_dim) if add_bias_kv else None)
        self.add_zero_attn = add_zero_attn
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Draw new initial values; `out_proj` keeps its weight, as in torch."""
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        in_proj = [self._parameters[n] for n in names if self._parameters[n] is not None]
        init.rules(self).attention(
            in_proj, self.in_proj_bias, self.out_proj, self.bias_k, self.bias_v
        )

    def forward(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        key_padding_mask: ArrayLike | None = None,
        need_weights: bool = True,
        attn_mask: ArrayLike | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        return F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batch_first=self.batch_first,
        )
