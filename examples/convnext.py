"""ConvNeXt under torchvision's names: its checkpoints load key for key.

python examples/convnext.py photo.jpg --weights convnext_tiny-983f1562.pth
python examples/convnext.py          # the picture of a flower, random weights
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import statefulnn as nn
import statefulnn.functional as F
from resnet import classify


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of images."""

    def forward(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(super().forward(jnp.moveaxis(x, 1, -1)), -1, 1)  # (N, C, H, W)


class Permute(nn.Module):
    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: jax.Array) -> jax.Array:
        return x.transpose(self.dims)


class CNBlock(nn.Module):
    """A 7x7 convolution of each channel, then two linear layers at each pixel."""

    def __init__(self, dim: int, layer_scale: float, stochastic_depth_prob: float):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim),
            Permute(0, 2, 3, 1),  # (N, H, W, C)
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            Permute(0, 3, 1, 2),  # (N, C, H, W)
        )
        self.layer_scale = nn.Parameter(jnp.full((dim, 1, 1), layer_scale))
        self.stochastic_depth_prob = stochastic_depth_prob

    def forward(self, x: jax.Array) -> jax.Array:
        y = self.layer_scale * self.block(x)
        kept = jnp.ones((len(x), 1, 1, 1), y.dtype)  # some images skip the block in training
        return x + y * F.dropout(kept, self.stochastic_depth_prob, self.training)


class ConvNeXt(nn.Module):
    """Source: Liu et al., A ConvNet for the 2020s, 2022; ``torchvision.models.ConvNeXt``.

    Args:
        dims: the channels of each stage.
        depths: the blocks of each stage.
        stochastic_depth_prob: of the last block; it grows from 0 at the first.
        layer_scale: where the factors of the blocks start.
        num_classes: the number of logits.
    """

    def __init__(
        self,
        dims: list[int],
        depths: list[int],
        stochastic_depth_prob: float = 0.0,
        layer_scale: float = 1e-6,
        num_classes: int = 1000,
    ):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), LayerNorm2d(dims[0], eps=1e-6))
        features: list[nn.Module] = [stem]
        probabilities = iter(
            stochastic_depth_prob * i / max(1, sum(depths) - 1) for i in range(sum(depths))
        )
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if i:
                features.append(
                    nn.Sequential(
                        LayerNorm2d(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dim, 2, stride=2)
                    )
                )
            blocks = [CNBlock(dim, layer_scale, next(probabilities)) for _ in range(depth)]
            features.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(dims[-1], eps=1e-6), nn.Flatten(1), nn.Linear(dims[-1], num_classes)
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x: jax.Array) -> jax.Array:
        x = self.features(x)  # (N, 3, H, W) -> (N, dims[-1], H/32, W/32)
        x = self.avgpool(x)  # (N, dims[-1], 1, 1)
        return self.classifier(x)  # (N, num_classes)


def convnext_tiny(num_classes: int = 1000) -> ConvNeXt:
    return ConvNeXt([96, 192, 384, 768], [3, 3, 9, 3], 0.1, num_classes=num_classes)


def convnext_small(num_classes: int = 1000) -> ConvNeXt:
    return ConvNeXt([96, 192, 384, 768], [3, 3, 27, 3], 0.4, num_classes=num_classes)


if __name__ == "__main__":
    classify(__doc__, {"convnext_tiny": convnext_tiny, "convnext_small": convnext_small})
