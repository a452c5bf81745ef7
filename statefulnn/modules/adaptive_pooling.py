"""Adaptive pooling layers: the number of windows is given, not their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module

OutputSize = int | Sequence[int | None]


class _AdaptiveAvgPool(Module):
    def __init__(self, output_size: OutputSize) -> None:
        super().__init__()
        self.output_size: Any = output_size

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class _AdaptiveMaxPool(Module):
    def __init__(self, output_size: OutputSize, return_indices: bool = False) -> None:
        super().__init__()
        self.output_size: Any = output_size
        self.return_indices = return_indices

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        output_size: ``L'``.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AdaptiveAvgPool1d(5)(jnp.ones((1, 64, 8))).shape
        (1, 64, 5)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        output_size: ``H'`` and ``W'``, or one number for both; None keeps the input's size.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AdaptiveAvgPool2d((5, None))(jnp.ones((1, 64, 8, 9))).shape
        (1, 64, 5, 9)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """Take means over as many windows as asked for, which cover the input evenly.

    Args:
        output_size: ``D'``, ``H'`` and ``W'``, or one number for all; None keeps the input's size.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AdaptiveAvgPool3d((5, None, 2))(jnp.ones((1, 4, 8, 9, 10))).shape
        (1, 4, 5, 9, 2)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.adaptive_avg_pool3d(input, self.output_size)


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """Take maxima over as many windows as asked for, which cover the input evenly.

    Args:
        output_size: ``L'``.
        return_indices: also return where each maximum was, as positions in the flattened
            ``L``.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AdaptiveMaxPool1d(5)(jnp.ones((1, 64, 8))).shape
        (1, 64, 5)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """Take maxima over as many windows as asked for, which cover the input evenly.

    Args:
        output_size: ``H'`` and ``W'``, or one number for both; None keeps the input's size.
        return_indices: also return where each maximum was, as positions in the flattened
            ``H x W``.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AdaptiveMaxPool2d((5, None))(jnp.ones((1, 64, 8, 9))).shape
        (1, 64, 5, 9)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """Take maxima over as many windows as asked for, which cover the input evenly.

    Args:
        output_size: ``D'``, ``H'`` and ``W'``, or one number for all; None keeps the input's size.
        return_indices: also return where each maximum was, as positions in the flattened
            ``D x H x W``.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AdaptiveMaxPool3d((5, None, 2))(jnp.ones((1, 4, 8, 9, 10))).shape
        (1, 4, 5, 9, 2)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)
