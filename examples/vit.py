"""Vision transformers under torchvision's names: its checkpoints load key for key.

python examples/vit.py photo.jpg --weights vit_b_16-c867db91.pth
python examples/vit.py          # the picture of a flower, random weights
"""

from __future__ import annotations

import math
from collections import OrderedDict

import jax
import jax.numpy as jnp

import statefulnn as nn
from resnet import classify


class MLPBlock(nn.Sequential):
    """Two linear layers with dropout; as a Sequential, which gives the names 0 and 3."""

    def __init__(self, in_dim: int, mlp_dim: int, dropout: float):
        super().__init__(
            nn.Linear(in_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, in_dim),
            nn.Dropout(dropout),
        )
        for m in (self[0], self[3]):
            nn.init.xavier_uniform_(m.weight)
            nn.init.normal_(m.bias, std=1e-6)
        self.register_load_state_dict_pre_hook(_of_version_1)


def _of_version_1(module, state_dict, prefix, *_):
    """Read the names of the first version, which torchvision's own weights have."""
    for old, new in (("linear_1", "0"), ("linear_2", "3")):
        for kind in ("weight", "bias"):
            if f"{prefix}{old}.{kind}" in state_dict:
                state_dict[f"{prefix}{new}.{kind}"] = state_dict.pop(f"{prefix}{old}.{kind}")


class EncoderBlock(nn.Module):
    def __init__(self, num_heads: int, hidden_dim: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.mlp = MLPBlock(hidden_dim, mlp_dim, dropout)

    def forward(self, x: jax.Array) -> jax.Array:
        y = self.ln_1(x)  # (N, S, E)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, seq_length, num_layers, num_heads, hidden_dim, mlp_dim, dropout):
        super().__init__()
        self.pos_embedding = nn.Parameter(jnp.zeros((1, seq_length, hidden_dim)))
        nn.init.normal_(self.pos_embedding, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            OrderedDict(
                (f"encoder_layer_{i}", EncoderBlock(num_heads, hidden_dim, mlp_dim, dropout))
                for i in range(num_layers)
            )
        )
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)

    def forward(self, x):
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))  # (N, S, E)


class VisionTransformer(nn.Module):
    """Source: Dosovitskiy et al., An image is worth 16x16 words, 2021;
    ``torchvision.models.VisionTransformer``."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float = 0.0,
        num_classes: int = 1000,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is no multiple of patch_size={patch_size}")
        self.image_size = image_size
        self.conv_proj = nn.Conv2d(3, hidden_dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(jnp.zeros((1, 1, hidden_dim)))
        seq_length = (image_size // patch_size) ** 2 + 1  # the patches and the class token
        self.encoder = Encoder(seq_length, num_layers, num_heads, hidden_dim, mlp_dim, dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(hidden_dim, num_classes)))
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (3 * patch_size**2)))
        nn.init.zeros_(self.conv_proj.bias)
        nn.init.zeros_(self.heads.head.weight)
        nn.init.zeros_(self.heads.head.bias)

    def forward(self, x: jax.Array) -> jax.Array:
        N, _, H, W = x.shape
        if (H, W) != (self.image_size, self.image_size):
            raise ValueError(f"images of {H} x {W}; this model is for {self.image_size} squared")
        x = self.conv_proj(x)  # (N, 3, H, W) -> (N, E, H / patch, W / patch)
        x = x.reshape(N, x.shape[1], -1).swapaxes(1, 2)  # (N, S - 1, E)
        token = jnp.broadcast_to(self.class_token.value, (N, 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1)  # (N, S, E)
        x = self.encoder(x)
        return self.heads(x[:, 0])  # (N, num_classes)


def vit_b_16(num_classes: int = 1000) -> VisionTransformer:
    return VisionTransformer(224, 16, 12, 12, 768, 3072, num_classes=num_classes)


def vit_b_32(num_classes: int = 1000) -> VisionTransformer:
    return VisionTransformer(224, 32, 12, 12, 768, 3072, num_classes=num_classes)


def vit_l_16(num_classes: int = 1000) -> VisionTransformer:
    return VisionTransformer(224, 16, 24, 16, 1024, 4096, num_classes=num_classes)


if __name__ == "__main__":
    classify(__doc__, {"vit_b_16": vit_b_16, "vit_b_32": vit_b_32, "vit_l_16": vit_l_16})
