"""Layer and root-mean-square normalisation."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.module import Module
from statefulnn.modules._empty import parameter


def _shape(normalized_shape: Any) -> tuple[int, ...]:
    if isinstance(normalized_shape, numbers.Integral):
        return (int(normalized_shape),)
    return tuple(int(n) for n in normalized_shape)


class LayerNorm(Module):
    """Normalise the last axes to mean 0 and variance 1, then scale and shift.

    Args:
        normalized_shape: the sizes of the last axes, which are normalised together.
        eps: added to the (biased) variance.
        elementwise_affine: whether the result is scaled and shifted.
        bias: whether there is a shift.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(*, *normalized_shape)``; output: the same.

    Attributes:
        weight: ``normalized_shape``, 1, or None.
        bias: ``normalized_shape``, 0, or None.

    Source: Ba, Kiros and Hinton 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LayerNorm(10)(jnp.ones((20, 5, 10))).shape
        (20, 5, 10)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        affine = elementwise_affine
        self.register_parameter("weight", parameter(shape, device, dtype) if affine else None)
        self.register_parameter(
            "bias", parameter(shape, device, dtype) if affine and bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight 1 and bias 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: Any) -> Any:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )


class RMSNorm(Module):
    """Divide the last axes by their root mean square, then scale.

    Args:
        normalized_shape: the sizes of the last axes, which are normalised together.
        eps: added to the mean square; None for the machine epsilon of the dtype computed in.
        elementwise_affine: whether the result is scaled.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - x: ``(*, *normalized_shape)``; output: the same.

    Attributes:
        weight: ``normalized_shape``, 1, or None.

    Source: Zhang and Sennrich 2019.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.RMSNorm((2, 3))(jnp.ones((4, 2, 3))).shape
        (4, 2, 3)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.register_parameter(
            "weight", parameter(shape, device, dtype) if elementwise_affine else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight 1."""
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, x: Any) -> Any:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )
