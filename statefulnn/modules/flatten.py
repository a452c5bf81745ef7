"""Changes of shape as layers."""

from __future__ import annotations

from typing import Any

from statefulnn import functional as F
from statefulnn.core.module import Module


class Flatten(Module):
    """Merge neighbouring axes into one; by default all but the batch axis.

    Args:
        start_dim: the first axis to merge.
        end_dim: the last one.

    Shape:
        - input: any; output: ``(*, product of the merged axes, *)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Flatten()(jnp.ones((32, 1, 5, 5))).shape
        (32, 25)
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, input: Any) -> Any:
        return F.flatten(input, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"
