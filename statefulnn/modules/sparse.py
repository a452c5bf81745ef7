"""Embedding tables."""

from __future__ import annotations

from typing import Any, Self

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.box import Parameter
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module
from statefulnn.functional._checks import array
from statefulnn.modules._empty import parameter


class Embedding(Module):
    """A table of vectors, looked up by number.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: the size of each.
        padding_idx: a row that starts at 0 and gets no gradient; negative numbers count from the end.
        max_norm: rows that are used and whose norm is larger are scaled down to it, in the table.
        norm_type: the p of that p-norm.
        scale_grad_by_freq: divide each row's gradient by how often the row occurs in the batch.
        sparse: accepted for torch's sake; gradients are dense.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: integers, any shape ``(*)``; output: ``(*, embedding_dim)``. A row that does not
          exist raises IndexError in eager code on a CPU, and gives NaN elsewhere.

    Attributes:
        weight: ``(num_embeddings, embedding_dim)``, from N(0, 1).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Embedding(10, 3, padding_idx=0)(jnp.array([[0, 2], [0, 5]])).shape
        (2, 2, 3)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Any = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise AssertionError(
                    explain(
                        f"made nn.Embedding with {num_embeddings} rows and padding_idx={padding_idx}",
                        "Padding_idx must be within num_embeddings",
                        f"a padding_idx from {-num_embeddings} to {num_embeddings - 1}",
                    )
                )
            padding_idx %= num_embeddings
        self.padding_idx = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        if _weight is None:
            self.weight = parameter((num_embeddings, embedding_dim), device, dtype)
            self.weight.requires_grad = not _freeze
            self.reset_parameters()
        else:
            weight = array(_weight, "_weight", "nn.Embedding")
            if weight.shape != (num_embeddings, embedding_dim):
                raise ShapeError(
                    explain(
                        f"made nn.Embedding with {(num_embeddings, embedding_dim)} and a weight of "
                        f"shape {weight.shape}",
                        "Shape of weight does not match num_embeddings and embedding_dim",
                        "nn.Embedding.from_pretrained(weight)",
                    )
                )
            self.weight = Parameter(weight, requires_grad=not _freeze)

    def reset_parameters(self) -> None:
        """Draw new initial values; the padding row is 0."""
        init.rules(self).embedding(self.weight, self.padding_idx)

    def forward(self, input: Any) -> Any:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Any,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Self:
        """Make a layer of a table.

        Args:
            embeddings: ``(num_embeddings, embedding_dim)``.
            freeze: whether the table is left out of training.
            padding_idx: as for the class; the row keeps its values.
            max_norm: as for the class.
            norm_type: as for the class.
            scale_grad_by_freq: as for the class.
            sparse: as for the class.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> nn.Embedding.from_pretrained(jnp.eye(3))(jnp.array([1])).tolist()
            [[0.0, 1.0, 0.0]]
        """
        table = array(embeddings, "embeddings", "nn.Embedding.from_pretrained")
        if table.ndim != 2:
            raise AssertionError(
                explain(
                    f"nn.Embedding.from_pretrained was given a table of shape {table.shape}",
                    "Embeddings parameter is expected to be 2-dimensional",
                    "a table of shape (num_embeddings, embedding_dim)",
                )
            )
        rows, size = table.shape
        return cls(
            rows,
            size,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight=table,
            _freeze=freeze,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}"]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.max_norm is not None:
            parts.append(f"max_norm={self.max_norm}")
        if self.norm_type != 2:
            parts.append(f"norm_type={self.norm_type}")
        if self.scale_grad_by_freq:
            parts.append(f"scale_grad_by_freq={self.scale_grad_by_freq}")
        if self.sparse:
            parts.append("sparse=True")
        return ", ".join(parts)
