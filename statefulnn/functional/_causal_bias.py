"""Causal masks that need not be written down."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import explain


class CausalVariant(enum.IntEnum):
    """Where the triangle of a causal mask that is not square is aligned.

    ``UPPER_LEFT``: position i sees positions up to i. ``LOWER_RIGHT``: the last position of the target
    sees the whole source. The two agree for square masks.

    Source: ``torch.nn.attention.bias.CausalVariant``.

    Example:
        >>> from statefulnn.attention.bias import CausalVariant
        >>> CausalVariant.LOWER_RIGHT.value
        2
    """

    UPPER_LEFT = 1
    LOWER_RIGHT = 2


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CausalBias:
    """A causal mask by its sizes, for `attn_mask` of ``F.scaled_dot_product_attention``.

    Elsewhere it is an array of booleans, True where attention is allowed.

    Args:
        variant: where the triangle is aligned.
        seq_len_q: L, the number of target positions.
        seq_len_kv: S, the number of source positions.

    Raises:
        AssertionError: if `variant` is no `CausalVariant`.

    Source: ``torch.nn.attention.bias.CausalBias``.

    Example:
        >>> from statefulnn.attention.bias import CausalBias, CausalVariant
        >>> import jax.numpy as jnp
        >>> jnp.asarray(CausalBias(CausalVariant.LOWER_RIGHT, 2, 3)).astype(int).tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    variant: CausalVariant
    seq_len_q: int
    seq_len_kv: int

    def __post_init__(self) -> None:
        if not isinstance(self.variant, CausalVariant):
            raise AssertionError(
                explain(
                    f"made a CausalBias with variant={self.variant!r}",
                    f"variant must be a CausalVariant, got {type(self.variant).__name__}",
                    "causal_lower_right(L, S)",
                )
            )
        if self.seq_len_q > self.seq_len_kv and self.variant is CausalVariant.LOWER_RIGHT:
            warnings.warn(
                f"A lower right causal bias of {self.seq_len_q} target and {self.seq_len_kv} source "
                "positions leaves the first target positions nothing to look at: they give 0.",
                stacklevel=4,
            )

    @property
    def offset(self) -> int:
        """Position i sees positions up to ``i + offset``."""
        lower = self.variant is CausalVariant.LOWER_RIGHT
        return self.seq_len_kv - self.seq_len_q if lower else 0

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes, ``(L, S)``."""
        return self.seq_len_q, self.seq_len_kv

    def __jax_array__(self) -> Any:
        return jnp.tri(self.seq_len_q, self.seq_len_kv, self.offset, dtype=jnp.bool_)

    def __repr__(self) -> str:
        return f"CausalBias({self.variant.name}, {self.seq_len_q}, {self.seq_len_kv})"
