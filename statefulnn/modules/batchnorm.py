"""Batch normalisation layers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.arrays import filled as box_filled
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike, is_meta, resolve_device
from statefulnn.init._empty import filled


class _NormBase(Module):
    # State of version 1 has no num_batches_tracked.
    _version = 2
    ranks: tuple[int, ...]
    layout: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.register_parameter(
            "weight", init.empty_parameter(num_features, dtype, device) if affine else None
        )
        self.register_parameter(
            "bias", init.empty_parameter(num_features, dtype, device) if affine and bias else None
        )
        if track_running_stats:
            self.register_buffer("running_mean", filled(num_features, 0, dtype, device))
            self.register_buffer("running_var", filled(num_features, 1, dtype, device))
            self.register_buffer("num_batches_tracked", _zero_count(device))
        else:
            self.register_buffer("running_mean", None)
            self.register_buffer("running_var", None)
            self.register_buffer("num_batches_tracked", None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        if self.track_running_stats:
            init.zeros_(self._buffers["running_mean"])
            init.ones_(self._buffers["running_var"])
            init.zeros_(self._buffers["num_batches_tracked"])

    def reset_parameters(self) -> None:
        """Set weight 1, bias 0, and forget the running statistics."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def _check_input_dim(self, input: Any) -> None:
        ndim = np.ndim(input)
        if ndim not in self.ranks:
            wanted = " or ".join(f"{n}D" for n in self.ranks)
            raise ShapeError(
                explain(
                    f"{type(self).__name__} was given input of shape {tuple(np.shape(input))}",
                    f"expected {wanted} input (got {ndim}D input): {self.layout}",
                    "reshape the input, or take the layer of its number of spatial axes",
                )
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version = local_metadata.get("version")
        name = prefix + "num_batches_tracked"
        if (version is None or version < 2) and self.track_running_stats:
            if name not in state_dict:
                count = self._buffers["num_batches_tracked"]
                if count is not None and is_meta(count._value):
                    count.write(_zero_count())
                # The buffer stands for itself: where the layer has a second name, that one may tell.
                state_dict[name] = _zero_count() if count is None else count
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )


def _zero_count(device: object = None) -> Any:
    return box_filled((), jax.dtypes.canonicalize_dtype(np.int64), resolve_device(device))


class _BatchNorm(_NormBase):
    def forward(self, input: ArrayLike) -> jax.Array:
        self._check_input_dim(input)
        return self._normalised(input)

    def _normalised(self, input: Any, axis_name: Hashable = None) -> Any:
        mean, var = self.running_mean, self.running_var
        if not self.training and mean is not None:
            return F.batch_norm(input, mean, var, self.weight, self.bias, eps=self.eps)
        if mean is None or not self.track_running_stats:
            # Without running statistics the batch's own are used in evaluation, too.
            return F.batch_norm_with_stats(
                input, None, None, self.weight, self.bias, eps=self.eps, axis_name=axis_name
            )[0]
        out, self.running_mean, self.running_var, self.num_batches_tracked = (
            F.batch_norm_with_stats(
                input,
                mean,
                var,
                self.weight,
                self.bias,
                self.momentum,
                self.eps,
                self.num_batches_tracked,
                axis_name,
            )
        )
        return out


class BatchNorm1d(_BatchNorm):
    """Normalise each channel over the batch (and over the length, if there is one).

    In training mode by the batch's mean and biased variance, which also move the running statistics
    (variance unbiased there); in evaluation mode by the running statistics. In compiled code over a
    batch that is sharded across devices the statistics are those of the whole batch.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the share of a new batch in the running statistics; None for their plain average.
        affine: whether the result is scaled and shifted.
        track_running_stats: False keeps no statistics, and uses the batch's own in both modes.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.

    Shape:
        - input: ``(N, C)`` or ``(N, C, L)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.
        running_mean: ``(C,)``, buffer.
        running_var: ``(C,)``, buffer.
        num_batches_tracked: integer, buffer; int32 unless 64-bit types are enabled. It stays at the
            largest number of its dtype.

    Source: Ioffe and Szegedy 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> norm = nn.BatchNorm1d(3)
        >>> norm(jnp.ones((20, 3))).shape, int(norm.num_batches_tracked)
        ((20, 3), 1)
    """

    ranks = (2, 3)
    layout = "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm):
    """Normalise each channel over the batch and both spatial axes.

    In training mode by the batch's mean and biased variance, which also move the running statistics
    (variance unbiased there); in evaluation mode by the running statistics. In compiled code over a
    batch that is sharded across devices the statistics are those of the whole batch.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the share of a new batch in the running statistics; None for their plain average.
        affine: whether the result is scaled and shifted.
        track_running_stats: False keeps no statistics, and uses the batch's own in both modes.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.

    Shape:
        - input: ``(N, C, H, W)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.
        running_mean: ``(C,)``, buffer.
        running_var: ``(C,)``, buffer.
        num_batches_tracked: integer, buffer; int32 unless 64-bit types are enabled. It stays at the
            largest number of its dtype.

    Source: Ioffe and Szegedy 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.BatchNorm2d(3)(jnp.ones((20, 3, 4, 4))).shape
        (20, 3, 4, 4)
    """

    ranks = (4,)
    layout = "(N, C, H, W)"


class BatchNorm3d(_BatchNorm):
    """Normalise each channel over the batch and all three spatial axes.

    In training mode by the batch's mean and biased variance, which also move the running statistics
    (variance unbiased there); in evaluation mode by the running statistics. In compiled code over a
    batch that is sharded across devices the statistics are those of the whole batch.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the share of a new batch in the running statistics; None for their plain average.
        affine: whether the result is scaled and shifted.
        track_running_stats: False keeps no statistics, and uses the batch's own in both modes.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.

    Shape:
        - input: ``(N, C, D, H, W)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.
        running_mean: ``(C,)``, buffer.
        running_var: ``(C,)``, buffer.
        num_batches_tracked: integer, buffer; int32 unless 64-bit types are enabled. It stays at the
            largest number of its dtype.

    Source: Ioffe and Szegedy 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.BatchNorm3d(3)(jnp.ones((20, 3, 2, 4, 4))).shape
        (20, 3, 2, 4, 4)
    """

    ranks = (5,)
    layout = "(N, C, D, H, W)"
