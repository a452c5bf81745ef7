"""Causal biases for ``attn_mask``: their sizes say all, and no mask is written down."""

from __future__ import annotations

from statefulnn.core.errors import explain
from statefulnn.core.listing import listing
from statefulnn.functional._causal_bias import CausalBias, CausalVariant

__all__ = ["CausalBias", "CausalVariant", "causal_lower_right", "causal_upper_left"]
__dir__ = listing(globals())


def causal_upper_left(*size: int) -> CausalBias:
    """Return a causal bias aligned to the upper left corner: position i sees positions up to i.

    Args:
        size: L and S.

    Raises:
        AssertionError: unless there are two sizes.

    Source: ``torch.nn.attention.bias.causal_upper_left``.

    Example:
        >>> import jax.numpy as jnp
        >>> from statefulnn.attention.bias import causal_upper_left
        >>> jnp.asarray(causal_upper_left(2, 3)).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0]]
    """
    return CausalBias(CausalVariant.UPPER_LEFT, *_two(size, "causal_upper_left"))


def causal_lower_right(*size: int) -> CausalBias:
    """Return a causal bias aligned to the lower right corner: the last position sees the whole source.

    Args:
        size: L and S.

    Raises:
        AssertionError: unless there are two sizes.

    Source: ``torch.nn.attention.bias.causal_lower_right``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> from statefulnn.attention.bias import causal_lower_right
        >>> q, kv = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 5, 4))
        >>> F.scaled_dot_product_attention(q, kv, kv, causal_lower_right(3, 5)).shape
        (1, 2, 3, 4)
    """
    return CausalBias(CausalVariant.LOWER_RIGHT, *_two(size, "causal_lower_right"))


def _two(size: tuple[int, ...], function: str) -> tuple[int, ...]:
    if len(size) != 2:
        raise AssertionError(
            explain(
                f"{function} was given {len(size)} sizes",
                f"{function} only supports 2D tensors: target and source positions",
                f"{function}(L, S)",
            )
        )
    return size
