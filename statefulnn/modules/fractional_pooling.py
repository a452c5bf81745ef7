"""Fractional max pooling layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.functional._checks import numbers

Size = int | Sequence[int]


class _FractionalMaxPool(Module):
    spatial: int

    def __init__(
        self,
        kernel_size: Size,
        output_size: Size | None = None,
        output_ratio: float | Sequence[float] | None = None,
        return_indices: bool = False,
        _random_samples: Any = None,
    ) -> None:
        super().__init__()
        name, n = f"nn.{type(self).__name__}", self.spatial
        self.kernel_size = numbers(kernel_size, n, "kernel_size", name)
        if any(k < 1 for k in self.kernel_size):
            raise ValueError(
                explain(
                    f"made {name} with kernel_size={kernel_size}",
                    "kernel_size must be greater than zero",
                    "kernel_size=2",
                )
            )
        if (output_size is None) == (output_ratio is None):
            raise ValueError(
                explain(
                    f"made {name} with output_size={output_size} and output_ratio={output_ratio}",
                    "one of them, and only one, says how many windows there are",
                    "output_ratio=0.5",
                )
            )
        self.return_indices = return_indices
        self.register_buffer("_random_samples", _random_samples)
        self.output_size = (
            None if output_size is None else numbers(output_size, n, "output_size", name)
        )
        self.output_ratio = None if output_ratio is None else self._ratios(output_ratio, name)

    def _ratios(self, given: float | Sequence[float], name: str) -> tuple[float, ...]:
        ratios = tuple(given) if isinstance(given, Sequence) else (given,) * self.spatial
        if len(ratios) != self.spatial or not all(0 < ratio < 1 for ratio in ratios):
            raise ValueError(
                explain(
                    f"made {name} with output_ratio={given}",
                    f"it is one number, or {self.spatial}, between 0 and 1, both excluded",
                    "output_ratio=0.5",
                )
            )
        return ratios


class FractionalMaxPool2d(_FractionalMaxPool):
    """Take the largest element of each of randomly placed, overlapping windows.

    Args:
        kernel_size: the size of the windows.
        output_size: how many windows there are along each axis.
        output_ratio: how many there are in parts of the input's size, between 0 and 1; either this or
            `output_size` is given.
        return_indices: also return where each maximum was, as positions in the flattened
            ``H x W``.
        _random_samples: ``(N, C, 2)``, numbers in [0, 1) that place the windows; a buffer. Otherwise
            they are drawn in each call, in evaluation as well.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')``.

    Source: Graham 2014, Fractional Max-Pooling.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.FractionalMaxPool2d(2, output_ratio=0.5)(jnp.ones((20, 16, 50, 32))).shape
        (20, 16, 25, 16)
    """

    spatial = 2

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.fractional_max_pool2d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,
        )


class FractionalMaxPool3d(_FractionalMaxPool):
    """Take the largest element of each of randomly placed, overlapping windows.

    Args:
        kernel_size: the size of the windows.
        output_size: how many windows there are along each axis.
        output_ratio: how many there are in parts of the input's size, between 0 and 1; either this or
            `output_size` is given.
        return_indices: also return where each maximum was, as positions in the flattened
            ``D x H x W``.
        _random_samples: ``(N, C, 3)``, numbers in [0, 1) that place the windows; a buffer. Otherwise
            they are drawn in each call, in evaluation as well.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')``.

    Source: Graham 2014, Fractional Max-Pooling.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.FractionalMaxPool3d(2, output_ratio=0.5)(jnp.ones((2, 4, 10, 9, 8))).shape
        (2, 4, 5, 4, 4)
    """

    spatial = 3

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.fractional_max_pool3d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,
        )
