"""Layers that move channels into the image and back."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module


class PixelShuffle(Module):
    """Move channels into the image: each r² of them become a block of r by r pixels.

    Args:
        upscale_factor: r.

    Shape:
        - input: ``(*, C r², H, W)``; output: ``(*, C, H r, W r)``.

    Source: Shi et al. 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.PixelShuffle(3)(jnp.ones((1, 9, 4, 4))).shape
        (1, 1, 12, 12)
    """

    def __init__(self, upscale_factor: int) -> None:
        super().__init__()
        self.upscale_factor = upscale_factor

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.pixel_shuffle(input, self.upscale_factor)

    def extra_repr(self) -> str:
        return f"upscale_factor={self.upscale_factor}"


class PixelUnshuffle(Module):
    """Move pixels into channels: each block of r by r pixels becomes r² channels.

    Args:
        downscale_factor: r.

    Shape:
        - input: ``(*, C, H r, W r)``; output: ``(*, C r², H, W)``.

    Source: Shi et al. 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.PixelUnshuffle(3)(jnp.ones((1, 1, 12, 12))).shape
        (1, 9, 4, 4)
    """

    def __init__(self, downscale_factor: int) -> None:
        super().__init__()
        self.downscale_factor = downscale_factor

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.pixel_unshuffle(input, self.downscale_factor)

    def extra_repr(self) -> str:
        return f"downscale_factor={self.downscale_factor}"
