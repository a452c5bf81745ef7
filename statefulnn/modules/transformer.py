"""The Transformer of Vaswani et al. 2017: its two kinds of layers, stacks of them, and the whole model.

In comments: N batch, S source positions, T target positions, E features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.arrays import from_numpy
from statefulnn.core.default_dtype import dtype_of_new
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike, resolve_device
from statefulnn.modules.attention import MultiheadAttention
from statefulnn.modules.containers import ModuleList
from statefulnn.modules.dropout import Dropout
from statefulnn.modules.linear import Linear
from statefulnn.modules.normalization import LayerNorm

Mask = ArrayLike | None
Activation = str | Callable[[Any], Any]


def _activation(given: Activation) -> Callable[[Any], Any]:
    known = {"relu": F.relu, "gelu": F.gelu}
    if not isinstance(given, str):
        return given
    if given not in known:
        raise RuntimeError(
            explain(
                f"made a transformer layer with activation={given!r}",
                f"activation should be relu/gelu, not {given}; others are given as functions",
                'activation="gelu", or activation=F.silu',
            )
        )
    return known[given]


def _reset(module: Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(module, name):
            getattr(module, name)()
            return


def _stack(layer: Module, count: int, rules: Any) -> ModuleList:
    """Return `count` copies of a layer, each drawn anew where the rules say so."""
    copies = [copy.deepcopy(layer) for _ in range(count)]
    if rules.independent_layers:
        for one in copies:
            one.apply(_reset)
    return ModuleList(copies)


class _Layer(Module):
    """The parts that encoder and decoder layers share."""

    activation: Any

    def reset_parameters(self) -> None:
        """Draw what the feed-forward layers do not draw by themselves; nothing in torch's version."""
        activation = self.activation
        name = getattr(activation, "__name__", type(activation).__name__).lower()
        init.rules(self).feedforward(self.linear1, self.linear2, name)

    def _attended(
        self,
        attention: Module,
        x: ArrayLike,
        memory: ArrayLike,
        mask: Mask,
        padding: Mask,
        causal: bool,
    ) -> Any:
        return attention(
            x,
            memory,
            memory,
            attn_mask=mask,
            key_padding_mask=padding,
            need_weights=False,
            is_causal=causal,
        )[0]

    def _fed_forward(self, x: ArrayLike) -> jax.Array:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(_Layer):
    """Self-attention and a feed-forward network, each with dropout, a residual and a LayerNorm.

    Args:
        d_model: E, the number of features.
        nhead: the number of heads, which divides E.
        dim_feedforward: the width of the feed-forward network.
        dropout: the probability that an element, or an attention weight, is dropped in training.
        activation: of the feed-forward network: "relu", "gelu" or a function.
        layer_norm_eps: `eps` of the LayerNorms.
        batch_first: whether the batch is the first axis, ``(N, S, E)``, instead of the second.
        norm_first: whether the LayerNorms come before attention and feed-forward, not after them.
        bias: whether Linear layers and LayerNorms have biases.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - src: ``(S, N, E)``, ``(N, S, E)`` with `batch_first`, or ``(S, E)``; output: the same.
        - src_mask: ``(S, S)`` or ``(N nhead, S, S)``: True leaves a pair out; or numbers to add.
        - src_key_padding_mask: ``(N, S)``: True leaves a position out; or numbers to add.
        - is_causal: says that `src_mask` is causal; without padding it then stands in for the mask.

    Source: Vaswani et al. 2017; `norm_first` is Xiong et al. 2020, arXiv:2002.04745.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True)
        >>> layer(jnp.ones((4, 5, 8))).shape
        (4, 5, 8)
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        to: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **to)
        self.linear1 = Linear(d_model, dim_feedforward, **to)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, **to)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, layer_norm_eps, **to)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, **to)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.activation = _activation(activation)
        self.reset_parameters()

    def forward(
        self,
        src: ArrayLike,
        src_mask: ArrayLike | None = None,
        src_key_padding_mask: ArrayLike | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        x = src
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, *masks))
        return self.norm2(x + self._ff_block(x))

    def _sa_block(self, x: ArrayLike, mask: Mask, padding: Mask, causal: bool) -> Any:
        return self.dropout1(self._attended(self.self_attn, x, x, mask, padding, causal))

    def _ff_block(self, x: ArrayLike) -> Any:
        return self.dropout2(self._fed_forward(x))


class TransformerDecoderLayer(_Layer):
    """Self-attention, attention to a memory and a feed-forward network, each with residual and LayerNorm.

    Args:
        d_model: E, the number of features.
        nhead: the number of heads, which divides E.
        dim_feedforward: the width of the feed-forward network.
        dropout: the probability that an element, or an attention weight, is dropped in training.
        activation: of the feed-forward network: "relu", "gelu" or a function.
        layer_norm_eps: `eps` of the LayerNorms.
        batch_first: whether the batch is the first axis, ``(N, T, E)``, instead of the second.
        norm_first: whether the LayerNorms come before attention and feed-forward, not after them.
        bias: whether Linear layers and LayerNorms have biases.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - tgt: ``(T, N, E)``, ``(N, T, E)`` with `batch_first`, or ``(T, E)``; output: the same.
        - memory: ``(S, N, E)``, arranged in the same way.
        - tgt_mask: ``(T, T)`` or ``(N nhead, T, T)``: True leaves a pair out; or numbers to add.
        - memory_mask: ``(T, S)`` or ``(N nhead, T, S)``, likewise.
        - tgt_key_padding_mask, memory_key_padding_mask: ``(N, T)`` and ``(N, S)``, likewise.
        - tgt_is_causal, memory_is_causal: say that the masks are causal.

    Source: Vaswani et al. 2017; `norm_first` is Xiong et al. 2020, arXiv:2002.04745.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.TransformerDecoderLayer(d_model=8, nhead=2, batch_first=True)
        >>> layer(jnp.ones((4, 5, 8)), jnp.ones((4, 7, 8))).shape
        (4, 5, 8)
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        to: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **to)
        self.multihead_attn = MultiheadAttention(
            d_model, nhead, dropout, batch_first=batch_first, **to
        )
        self.linear1 = Linear(d_model, dim_feedforward, **to)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, **to)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, layer_norm_eps, **to)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, **to)
        self.norm3 = LayerNorm(d_model, layer_norm_eps, **to)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.dropout3 = Dropout(dropout)
        self.activation = _activation(activation)
        self.reset_parameters()

    def forward(
        self,
        tgt: ArrayLike,
        memory: ArrayLike,
        tgt_mask: ArrayLike | None = None,
        memory_mask: ArrayLike | None = None,
        tgt_key_padding_mask: ArrayLike | None = None,
        memory_key_padding_mask: ArrayLike | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        x = tgt
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        across = memory_mask, memory_key_padding_mask, memory_is_causal
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *own)
            x = x + self._mha_block(self.norm2(x), memory, *across)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *own))
        x = self.norm2(x + self._mha_block(x, memory, *across))
        return self.norm3(x + self._ff_block(x))

    def _sa_block(self, x: ArrayLike, mask: Mask, padding: Mask, causal: bool) -> Any:
        return self.dropout1(self._attended(self.self_attn, x, x, mask, padding, causal))

    def _mha_block(
        self, x: ArrayLike, memory: ArrayLike, mask: Mask, padding: Mask, causal: bool
    ) -> Any:
        return self.dropout2(self._attended(self.multihead_attn, x, memory, mask, padding, causal))

    def _ff_block(self, x: ArrayLike) -> Any:
        return self.dropout3(self._fed_forward(x))


class TransformerEncoder(Module):
    """A stack of encoder layers.

    All layers start with the values of the one that is given, as in torch; under an initialisation
    version with independent layers (``nn.init.version("2026.1")``) each is drawn anew.

    Args:
        encoder_layer: the layer that is copied.
        num_layers: the number of copies.
        norm: what the last layer's output goes through, or None.
        enable_nested_tensor: accepted for compatibility with torch; there are no nested tensors here.
        mask_check: accepted for compatibility with torch.

    Shape:
        - src: ``(S, N, E)``, ``(N, S, E)`` with `batch_first` layers, or ``(S, E)``; output: the same.
        - mask: ``(S, S)`` or ``(N nhead, S, S)``: True leaves a pair out; or numbers to add.
        - src_key_padding_mask: ``(N, S)``: True leaves a position out; or numbers to add.
        - is_causal: True says that `mask` is causal. None is False: the mask is not looked into.

    Source: Vaswani et al. 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2)
        >>> nn.TransformerEncoder(layer, num_layers=3)(jnp.ones((5, 4, 8))).shape
        (5, 4, 8)
    """

    def __init__(
        self,
        encoder_layer: Module,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = _stack(encoder_layer, num_layers, init.rules(self))
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        self.mask_check = mask_check

    def forward(
        self,
        src: ArrayLike,
        mask: ArrayLike | None = None,
        src_key_padding_mask: ArrayLike | None = None,
        is_causal: bool | None = None,
    ) -> jax.Array:
        output: Any = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                is_causal=bool(is_causal),
                src_key_padding_mask=src_key_padding_mask,
            )
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(Module):
    """A stack of decoder layers.

    All layers start with the values of the one that is given, as in torch; under an initialisation
    version with independent layers (``nn.init.version("2026.1")``) each is drawn anew.

    Args:
        decoder_layer: the layer that is copied.
        num_layers: the number of copies.
        norm: what the last layer's output goes through, or None.

    Shape:
        - tgt: ``(T, N, E)``, ``(N, T, E)`` with `batch_first` layers, or ``(T, E)``; output: the same.
        - memory: ``(S, N, E)``, arranged in the same way.
        - tgt_mask: ``(T, T)`` or ``(N nhead, T, T)``: True leaves a pair out; or numbers to add.
        - memory_mask: ``(T, S)`` or ``(N nhead, T, S)``, likewise.
        - tgt_key_padding_mask, memory_key_padding_mask: ``(N, T)`` and ``(N, S)``, likewise.
        - tgt_is_causal, memory_is_causal: say that the masks are causal; None is False.

    Source: Vaswani et al. 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.TransformerDecoderLayer(d_model=8, nhead=2)
        >>> nn.TransformerDecoder(layer, 3)(jnp.ones((5, 4, 8)), jnp.ones((7, 4, 8))).shape
        (5, 4, 8)
    """

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__()
        self.layers = _stack(decoder_layer, num_layers, init.rules(self))
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: ArrayLike,
        memory: ArrayLike,
        tgt_mask: ArrayLike | None = None,
        memory_mask: ArrayLike | None = None,
        tgt_key_padding_mask: ArrayLike | None = None,
        memory_key_padding_mask: ArrayLike | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        output: Any = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)


class Transformer(Module):
    """An encoder of a source sequence, and a decoder of a target sequence that attends to it.

    Args:
        d_model: E, the number of features.
        nhead: the number of heads, which divides E.
        num_encoder_layers: the number of layers of the encoder.
        num_decoder_layers: the number of layers of the decoder.
        dim_feedforward: the width of the feed-forward networks.
        dropout: the probability that an element, or an attention weight, is dropped in training.
        activation: of the feed-forward networks: "relu", "gelu" or a function.
        custom_encoder: a module in place of the encoder, called as `TransformerEncoder` is.
        custom_decoder: a module in place of the decoder, called as `TransformerDecoder` is.
        layer_norm_eps: `eps` of the LayerNorms.
        batch_first: whether the batch is the first axis, ``(N, S, E)``, instead of the second.
        norm_first: whether the LayerNorms come before attention and feed-forward, not after them.
        bias: whether Linear layers and LayerNorms have biases.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - src: ``(S, N, E)``, ``(N, S, E)`` with `batch_first`, or ``(S, E)``.
        - tgt: ``(T, N, E)``, arranged in the same way; output: the same.
        - src_mask, tgt_mask, memory_mask: ``(S, S)``, ``(T, T)``, ``(T, S)``, or one for each head,
          ``(N nhead, ...)``: True leaves a pair out; or numbers to add to the scores.
        - src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask: ``(N, S)``, ``(N, T)``,
          ``(N, S)``, likewise.
        - src_is_causal, tgt_is_causal, memory_is_causal: say that the masks are causal; None is False.

    Raises:
        ShapeError: if batches or features do not fit.

    Source: Vaswani et al. 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Transformer(8, 2, 1, 1, 16)
        >>> mask = model.generate_square_subsequent_mask(7)
        >>> model(jnp.ones((5, 4, 8)), jnp.ones((7, 4, 8)), tgt_mask=mask, tgt_is_causal=True).shape
        (7, 4, 8)
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Module | None = None,
        custom_decoder: Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        options = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        options += (batch_first, norm_first, bias, device, dtype)

        def norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is not None:
            self.encoder = custom_encoder
        else:
            layer = TransformerEncoderLayer(*options)
            self.encoder = TransformerEncoder(layer, num_encoder_layers, norm())
        if custom_decoder is not None:
            self.decoder = custom_decoder
        else:
            layer = TransformerDecoderLayer(*options)
            self.decoder = TransformerDecoder(layer, num_decoder_layers, norm())
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first

    def _reset_parameters(self) -> None:
        init.rules(self).transformer(self)

    def forward(
        self,
        src: ArrayLike,
        tgt: ArrayLike,
        src_mask: ArrayLike | None = None,
        tgt_mask: ArrayLike | None = None,
        memory_mask: ArrayLike | None = None,
        src_key_padding_mask: ArrayLike | None = None,
        tgt_key_padding_mask: ArrayLike | None = None,
        memory_key_padding_mask: ArrayLike | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        self._check(jnp.shape(src), jnp.shape(tgt))
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )

    def _check(self, src: tuple[int, ...], tgt: tuple[int, ...]) -> None:
        given = f"nn.Transformer was given src of shape {src} and tgt of shape {tgt}"
        batch = 0 if self.batch_first else 1
        if len(src) == 3 and src[batch] != (tgt[batch] if len(tgt) > batch else None):
            raise ShapeError(
                explain(
                    given,
                    f"the batch number of src and tgt (axis {batch}) must be equal",
                    f"batch_first={not self.batch_first} if the batch is axis {1 - batch}",
                )
            )
        if src[-1:] != (self.d_model,) or tgt[-1:] != (self.d_model,):
            raise ShapeError(
                explain(
                    given,
                    f"the feature number of src and tgt must be equal to d_model={self.d_model}",
                    f"inputs whose last axis is {self.d_model}",
                )
            )

    @staticmethod
    def generate_square_subsequent_mask(
        sz: int, device: DeviceLike | None = None, dtype: DTypeLike | None = None
    ) -> jax.Array:
        """Return the causal mask ``(sz, sz)``: 0 up to the diagonal and -inf above it.

        Args:
            sz: the number of positions.
            device: where it is put.
            dtype: its dtype; None for the default, `nn.get_default_dtype()`.

        Example:
            >>> import statefulnn as nn
            >>> nn.Transformer.generate_square_subsequent_mask(2).tolist()
            [[0.0, -inf], [0.0, 0.0]]
        """
        dtype = dtype_of_new(dtype)
        mask = np.where(np.tri(sz, dtype=bool), 0, -np.inf).astype(dtype)
        return from_numpy(mask, resolve_device(device))
