"""The layer that mixes groups of channels."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module


class ChannelShuffle(Module):
    """Take the channels in turn from each of several groups.

    Args:
        groups: the number of groups, a divisor of C.

    Shape:
        - input: ``(N, C, *)``, at least three axes; output: the same.

    Source: Zhang et al. 2018 (ShuffleNet).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ChannelShuffle(2)(jnp.arange(4).reshape(1, 4, 1)).ravel().tolist()
        [0, 2, 1, 3]
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.channel_shuffle(input, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
