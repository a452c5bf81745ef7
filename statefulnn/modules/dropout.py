"""Dropout layers."""

from __future__ import annotations

from typing import Any

from statefulnn import functional as F
from statefulnn.core.errors import explain
from statefulnn.core.module import Module


class Dropout(Module):
    """In training set elements to zero with probability p, and divide the others by ``1 - p``.

    Masks come from the generator in force (`nn.manual_seed`, or the key of a pure call), and differ
    from call to call.

    Args:
        p: the probability that an element is dropped.
        inplace: accepted for torch's sake; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Srivastava et al. 2014.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Dropout(0.2).eval()(jnp.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(
                explain(
                    f"made nn.Dropout with p={p}",
                    f"dropout probability has to be between 0 and 1, but got {p}",
                    "nn.Dropout(0.5)",
                )
            )
        self.p = p
        self.inplace = inplace

    def forward(self, input: Any) -> Any:
        return F.dropout(input, self.p, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"
