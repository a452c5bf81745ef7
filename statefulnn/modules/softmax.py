"""Normalised exponentials as layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module


class Softmax(Module):
    """Return ``exp(x) / sum(exp(x))`` along one axis.

    Args:
        dim: the axis that is normalised. Leaving it out is deprecated, as in torch.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Softmax(dim=1)(jnp.zeros((1, 2))).tolist()
        [[0.5, 0.5]]
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.softmax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmin(Module):
    """Return ``softmax(-x)`` along one axis.

    Args:
        dim: the axis that is normalised. Leaving it out is deprecated, as in torch.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Softmin(dim=0)(jnp.array([0.0, 1000.0])).tolist()
        [1.0, 0.0]
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.softmin(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogSoftmax(Module):
    """Return ``log(softmax(x))`` along one axis, computed without overflow.

    Args:
        dim: the axis that is normalised. Leaving it out is deprecated, as in torch.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LogSoftmax(dim=0)(jnp.array([0.0, 1000.0])).tolist()
        [-1000.0, 0.0]
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.log_softmax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmax2d(Module):
    """Return the softmax over the channels at every place of an image.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Softmax2d()(jnp.zeros((1, 4, 2, 2)))[0, :, 1, 1].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        ndim = jnp.ndim(input)
        if ndim not in (3, 4):
            raise ShapeError(
                explain(
                    f"Softmax2d was given input of shape {jnp.shape(input)}",
                    f"expected input to be 3D or 4D, got {ndim}D instead: (C, H, W) or (N, C, H, W)",
                    "nn.Softmax(dim=1)",
                )
            )
        return F.softmax(input, -3)
