"""Embedding tables, and bags of their rows."""

from __future__ import annotations

from typing import Self

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import DeviceLike
from statefulnn.functional._checks import array, shape_error


class Embedding(Module):
    """A table of vectors, looked up by number.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: the size of each.
        padding_idx: a row that starts at 0 and gets no gradient; negative numbers count from the end.
        max_norm: rows that are used and whose norm is larger are scaled down to it, in the table.
        norm_type: the p of that p-norm.
        scale_grad_by_freq: divide each row's gradient by how often the row occurs in the batch.
        sparse: accepted for compatibility with torch; gradients are dense.
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
        _weight: ArrayLike | None = None,
        _freeze: bool = False,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        _check_size(num_embeddings, embedding_dim, "nn.Embedding")
        self.padding_idx = _row(padding_idx, num_embeddings, "nn.Embedding")
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        if _weight is None:
            self.weight = init.empty_parameter((num_embeddings, embedding_dim), dtype, device)
            self.reset_parameters()
        else:
            self.weight = _given_table(_weight, num_embeddings, embedding_dim, "nn.Embedding")
        self.weight.requires_grad = not _freeze

    def reset_parameters(self) -> None:
        """Draw new initial values; the padding row is 0."""
        init.rules(self).embedding(self.weight, self.padding_idx)

    def forward(self, input: ArrayLike) -> jax.Array:
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
        embeddings: ArrayLike,
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
        rows, size = _table_shape(embeddings, "nn.Embedding.from_pretrained")
        return cls(
            rows,
            size,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight=embeddings,
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


class EmbeddingBag(Module):
    """A table of vectors, looked up in bags that are each reduced to one vector.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: the size of each.
        max_norm: rows that are used and whose norm is larger are scaled down to it, in the table.
        norm_type: the p of that p-norm.
        scale_grad_by_freq: divide each row's gradient by how often the row occurs in the batch.
        mode: "sum", "mean" or "max".
        sparse: accepted for compatibility with torch; gradients are dense.
        include_last_offset: whether offsets say where the last bag ends, too.
        padding_idx: a row that starts at 0 and that bags leave out; negative numbers count from the end.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: integers, ``(B, L)``, or ``(n,)`` with offsets.
        - offsets: ``(B,)``: where each bag starts, or ``(B + 1,)`` with `include_last_offset`.
        - per_sample_weights: the input's shape, for sums.
        - output: ``(B, embedding_dim)``. A row that does not exist raises RuntimeError in eager code on
          a CPU, and gives NaN elsewhere.

    Attributes:
        weight: ``(num_embeddings, embedding_dim)``, from N(0, 1).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> bag = nn.EmbeddingBag(10, 3, mode="sum")
        >>> bag(jnp.array([1, 2, 4, 5, 4]), jnp.array([0, 3])).shape
        (2, 3)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: ArrayLike | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        _check_size(num_embeddings, embedding_dim, "nn.EmbeddingBag")
        self.padding_idx = _row(padding_idx, num_embeddings, "nn.EmbeddingBag")
        if _weight is None:
            self.weight = init.empty_parameter((num_embeddings, embedding_dim), dtype, device)
            self.reset_parameters()
        else:
            self.weight = _given_table(_weight, num_embeddings, embedding_dim, "nn.EmbeddingBag")
        self.mode = mode
        self.sparse = sparse
        self.include_last_offset = include_last_offset

    def reset_parameters(self) -> None:
        """Draw new initial values; the padding row is 0."""
        init.rules(self).embedding(self.weight, self.padding_idx)

    def forward(
        self,
        input: ArrayLike,
        offsets: ArrayLike | None = None,
        per_sample_weights: ArrayLike | None = None,
    ) -> jax.Array:
        return F.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: ArrayLike,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> Self:
        """Make a layer of a table.

        Args:
            embeddings: ``(num_embeddings, embedding_dim)``.
            freeze: whether the table is left out of training.
            max_norm: as for the class.
            norm_type: as for the class.
            scale_grad_by_freq: as for the class.
            mode: as for the class.
            sparse: as for the class.
            include_last_offset: as for the class.
            padding_idx: as for the class; the row keeps its values.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> nn.EmbeddingBag.from_pretrained(jnp.eye(2))(jnp.array([[0, 1]])).tolist()
            [[0.5, 0.5]]
        """
        rows, size = _table_shape(embeddings, "nn.EmbeddingBag.from_pretrained")
        layer = cls(
            rows,
            size,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            embeddings,
            include_last_offset,
            padding_idx,
        )
        layer.weight.requires_grad = not freeze
        return layer

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}"]
        if self.max_norm is not None:
            parts.append(f"max_norm={self.max_norm}")
        if self.norm_type != 2:
            parts.append(f"norm_type={self.norm_type}")
        if self.scale_grad_by_freq:
            parts.append(f"scale_grad_by_freq={self.scale_grad_by_freq}")
        parts.append(f"mode={self.mode!r}")
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        return ", ".join(parts)


def _check_size(rows: int, size: int, name: str) -> None:
    if rows < 0 or size < 0:
        raise shape_error(
            f"made {name} with {rows} rows of {size}",
            "a table cannot have a negative dimension",
            f"{name}(num_embeddings=10, embedding_dim=3)",
        )


def _row(padding_idx: int | None, rows: int, name: str) -> int | None:
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise AssertionError(
            explain(
                f"made {name} with {rows} rows and padding_idx={padding_idx}",
                "padding_idx must be within num_embeddings",
                f"a padding_idx from {-rows} to {rows - 1}",
            )
        )
    return padding_idx % rows


def _given_table(table: object, rows: int, size: int, name: str) -> Parameter:
    weight = array(table, "_weight", name)
    if weight.shape != (rows, size):
        raise AssertionError(
            explain(
                f"made {name} with {(rows, size)} and a weight of shape {weight.shape}",
                "the shape of the weight does not match num_embeddings and embedding_dim",
                f"{name}.from_pretrained(weight)",
            )
        )
    return Parameter(weight)


def _table_shape(table: object, name: str) -> tuple[int, int]:
    shape = array(table, "embeddings", name).shape
    if len(shape) != 2:
        raise AssertionError(
            explain(
                f"{name} was given a table of shape {shape}",
                "the table is expected to be 2-dimensional",
                "a table of shape (num_embeddings, embedding_dim)",
            )
        )
    return shape
