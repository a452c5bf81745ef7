"""Resizing layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module


class Upsample(Module):
    """Resize the spatial axes to a size or by a factor.

    Args:
        size: the sizes afterwards, one number or one an axis.
        scale_factor: the sizes as a multiple of those before; this or `size`.
        mode: "nearest", "linear" (one axis), "bilinear", "bicubic" (two), "trilinear" (three), or another
            of ``F.interpolate``.
        align_corners: whether the centres of the outermost pixels stay where they are; None is False.
        recompute_scale_factor: whether positions are computed from the sizes, which are rounded down,
            and not from `scale_factor` itself.

    Shape:
        - input: ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``; output: ``(N, C, *sizes)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> up = nn.Upsample(scale_factor=2, mode="bilinear")
        >>> up(jnp.ones((1, 3, 8, 8))).shape
        (1, 3, 16, 16)
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | tuple[float, ...] | list[float] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.size = size
        if isinstance(scale_factor, (tuple, list)):
            self.scale_factor = tuple(float(f) for f in scale_factor)
        else:
            self.scale_factor = float(scale_factor) if scale_factor else None
        self.mode = mode
        self.align_corners = align_corners
        self.recompute_scale_factor = recompute_scale_factor

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            self.recompute_scale_factor,
        )

    def extra_repr(self) -> str:
        if self.scale_factor is not None:
            return f"scale_factor={self.scale_factor!r}, mode={self.mode!r}"
        return f"size={self.size!r}, mode={self.mode!r}"


class UpsamplingNearest2d(Upsample):
    """Resize images by nearest neighbours.

    Args:
        size: the sizes afterwards, one number or H and W.
        scale_factor: the sizes as a multiple of those before; this or `size`.

    Shape:
        - input: ``(N, C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.UpsamplingNearest2d(scale_factor=2)(jnp.ones((1, 3, 8, 8))).shape
        (1, 3, 16, 16)
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | tuple[float, ...] | list[float] | None = None,
    ) -> None:
        super().__init__(size, scale_factor, mode="nearest")


class UpsamplingBilinear2d(Upsample):
    """Resize images linearly, the centres of the corner pixels aligned.

    Args:
        size: the sizes afterwards, one number or H and W.
        scale_factor: the sizes as a multiple of those before; this or `size`.

    Shape:
        - input: ``(N, C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.UpsamplingBilinear2d(size=(12, 20))(jnp.ones((1, 3, 8, 8))).shape
        (1, 3, 12, 20)
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | tuple[float, ...] | list[float] | None = None,
    ) -> None:
        super().__init__(size, scale_factor, mode="bilinear", align_corners=True)
