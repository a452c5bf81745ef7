"""Instance normalisation layers."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from statefulnn import functional as F
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.placement import DeviceLike
from statefulnn.modules.batchnorm import _NormBase


class _InstanceNorm(_NormBase):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )

    def forward(self, input: jax.Array) -> jax.Array:
        self._check_input_dim(input)
        unbatched = jnp.ndim(input) == self.ranks[0]
        self._check_channels(input.shape, 0 if unbatched else 1)
        if unbatched:
            return self._normalised(input[None])[0]
        return self._normalised(input)

    def _check_channels(self, shape: tuple[int, ...], axis: int) -> None:
        if shape[axis] == self.num_features:
            return
        if self.affine:
            raise ShapeError(
                explain(
                    f"{type(self).__name__}({self.num_features}) was given input of shape {shape}",
                    f"expected input's size at dim={axis} to match num_features "
                    f"({self.num_features}), but got: {shape[axis]}",
                    f"nn.{type(self).__name__}({shape[axis]}, affine=True)",
                )
            )
        warnings.warn(
            f"input's size at dim={axis} does not match num_features: {shape[axis]} channels go "
            f"through {type(self).__name__}({self.num_features}), which ignores the number because "
            "affine=False",
            UserWarning,
            stacklevel=4,
        )

    def _normalised(self, input: Any) -> Any:
        mean, var = self.running_mean, self.running_var
        if self.track_running_stats and not self.training:
            return F.instance_norm(
                input, mean, var, self.weight, self.bias, use_input_stats=False, eps=self.eps
            )
        if mean is None:
            return F.instance_norm(input, None, None, self.weight, self.bias, eps=self.eps)
        momentum = 0.0 if self.momentum is None else self.momentum
        out, self.running_mean, self.running_var = F.instance_norm_with_stats(
            input, mean, var, self.weight, self.bias, momentum, self.eps
        )
        return out

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
        if local_metadata.get("version") is None and not self.track_running_stats:
            # Layers of that age kept statistics always.
            found = [n for n in ("running_mean", "running_var") if prefix + n in state_dict]
            if found:
                name = type(self).__name__
                error_msgs.append(
                    f"Unexpected running stats buffer(s) {' and '.join(map(repr, found))} for {name} "
                    "with track_running_stats=False: remove the keys, or make the layer with "
                    f"nn.{name}({self.num_features}, track_running_stats=True)"
                )
                for key in found:
                    state_dict.pop(prefix + key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class InstanceNorm1d(_InstanceNorm):
    """Normalise each channel of each example over its length.

    In both modes by the input's own mean and biased variance, unless statistics are tracked: those
    are moved in training (variance unbiased) and used in evaluation.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the share of a new batch in the running statistics; None leaves them as they are.
        affine: whether the result is scaled and shifted.
        track_running_stats: whether statistics are kept, for evaluation.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.
        running_mean: ``(C,)``, buffer, or None.
        running_var: ``(C,)``, buffer, or None.
        num_batches_tracked: integer, buffer, or None; 0, as in torch.

    Source: Ulyanov, Vedaldi and Lempitsky 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.InstanceNorm1d(3)(jnp.ones((20, 3, 4))).shape
        (20, 3, 4)
    """

    ranks = (2, 3)
    layout = "(C, L) or (N, C, L)"


class InstanceNorm2d(_InstanceNorm):
    """Normalise each channel of each example over its spatial axes.

    In both modes by the input's own mean and biased variance, unless statistics are tracked: those
    are moved in training (variance unbiased) and used in evaluation.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the share of a new batch in the running statistics; None leaves them as they are.
        affine: whether the result is scaled and shifted.
        track_running_stats: whether statistics are kept, for evaluation.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.
        running_mean: ``(C,)``, buffer, or None.
        running_var: ``(C,)``, buffer, or None.
        num_batches_tracked: integer, buffer, or None; 0, as in torch.

    Source: Ulyanov, Vedaldi and Lempitsky 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.InstanceNorm2d(3)(jnp.ones((20, 3, 4, 4))).shape
        (20, 3, 4, 4)
    """

    ranks = (3, 4)
    layout = "(C, H, W) or (N, C, H, W)"


class InstanceNorm3d(_InstanceNorm):
    """Normalise each channel of each example over its spatial axes.

    In both modes by the input's own mean and biased variance, unless statistics are tracked: those
    are moved in training (variance unbiased) and used in evaluation.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the share of a new batch in the running statistics; None leaves them as they are.
        affine: whether the result is scaled and shifted.
        track_running_stats: whether statistics are kept, for evaluation.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.
        running_mean: ``(C,)``, buffer, or None.
        running_var: ``(C,)``, buffer, or None.
        num_batches_tracked: integer, buffer, or None; 0, as in torch.

    Source: Ulyanov, Vedaldi and Lempitsky 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.InstanceNorm3d(3)(jnp.ones((20, 3, 2, 4, 4))).shape
        (20, 3, 2, 4, 4)
    """

    ranks = (4, 5)
    layout = "(C, D, H, W) or (N, C, D, H, W)"
