"""Normalisation over the last axes, over groups of channels, and over neighbouring channels."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike
from statefulnn.functional.local_response_norm import cross_map_lrn2d


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
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        affine = elementwise_affine
        self.register_parameter(
            "weight", init.empty_parameter(shape, dtype, device) if affine else None
        )
        self.register_parameter(
            "bias", init.empty_parameter(shape, dtype, device) if affine and bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight 1 and bias 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: ArrayLike) -> jax.Array:
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
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.register_parameter(
            "weight", init.empty_parameter(shape, dtype, device) if elementwise_affine else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight 1."""
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, x: ArrayLike) -> jax.Array:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )


class GroupNorm(Module):
    """Normalise each group of channels of each example to mean 0 and variance 1, then scale and shift.

    Args:
        num_groups: into how many groups the channels are divided.
        num_channels: C, a multiple of it.
        eps: added to the (biased) variance.
        affine: whether the result is scaled and shifted, each channel by itself.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.

    Shape:
        - input: ``(N, C, *)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.

    Raises:
        ValueError: if `num_groups` does not divide `num_channels`.

    Source: Wu and He 2018.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.GroupNorm(3, 6)(jnp.ones((20, 6, 10, 10))).shape
        (20, 6, 10, 10)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_groups <= 0 or num_channels % num_groups:
            raise ValueError(
                explain(
                    f"made nn.GroupNorm({num_groups}, {num_channels})",
                    f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups}), "
                    "a positive number",
                    "a number of groups that divides the number of channels",
                )
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self.register_parameter(
            "weight", init.empty_parameter(num_channels, dtype, device) if affine else None
        )
        self.register_parameter(
            "bias", init.empty_parameter(num_channels, dtype, device) if affine and bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight 1 and bias 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}"
        )


class LocalResponseNorm(Module):
    """Divide each channel by ``(k + alpha · mean of squares over `size` channels around it) ** beta``.

    Args:
        size: the number of channels in the mean.
        alpha: its factor.
        beta: the exponent.
        k: what is added to the mean.

    Shape:
        - input: ``(N, C, *)`` with at least one spatial axis; output: the same.

    Source: Krizhevsky, Sutskever and Hinton 2012.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LocalResponseNorm(2)(jnp.ones((32, 5, 24, 24))).shape
        (32, 5, 24, 24)
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class CrossMapLRN2d(Module):
    """Normalise by neighbouring channels as old checkpoints expect; prefer `LocalResponseNorm`.

    The values are torch's, whose running sum keeps channel 0 in every later window. The derivative is
    that of these values; torch's own is of a window one channel off.

    Args:
        size: the number of channels in the mean; an even one counts as the odd one below.
        alpha: its factor.
        beta: the exponent.
        k: what is added to the mean.

    Shape:
        - input: ``(N, C, H, W)``; output: the same.

    Source: ``torch.nn.CrossMapLRN2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.CrossMapLRN2d(3)(jnp.ones((2, 5, 4, 4))).shape
        (2, 5, 4, 4)
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, input: ArrayLike) -> jax.Array:
        return cross_map_lrn2d(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
