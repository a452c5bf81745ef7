"""Batch normalisation over a batch that is spread over devices."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike
from statefulnn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Normalise each channel over the batches of all devices (or lanes) that share a named axis.

    It is for code that sees one device's part of the batch: the body of ``jax.shard_map``,
    ``jax.pmap``, or ``jax.vmap`` with an axis name. Where no axis of that name is bound, it is
    a plain batch norm; so it is in evaluation. In ``nn.jit`` or ``jax.jit`` over a sharded batch the
    ordinary BatchNorm layers are global already.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the share of a new batch in the running statistics; None for their plain average.
        affine: whether the result is scaled and shifted.
        track_running_stats: False keeps no statistics, and uses the batch's own in both modes.
        process_group: accepted for compatibility with torch; in JAX devices are named by axes.
        device: where the parameters are put.
        dtype: their dtype.
        bias: whether there is a shift.
        axis_name: the name of the mapped axis, or a tuple of names.

    Shape:
        - input: ``(N, C, *)``; output: the same.

    Attributes:
        weight: ``(C,)``, 1, or None.
        bias: ``(C,)``, 0, or None.
        running_mean: ``(C,)``, buffer.
        running_var: ``(C,)``, buffer.
        num_batches_tracked: integer, buffer; int32 unless 64-bit types are enabled.

    Source: Ioffe and Szegedy 2015; ``torch.nn.SyncBatchNorm``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> norm = nn.SyncBatchNorm(1, axis_name="lane")
        >>> fn, params, state = nn.functionalize(norm, mutable=True)
        >>> run = jax.vmap(lambda x: fn(params, state, x)[0], axis_name="lane")
        >>> run(jnp.array([1.0, 3.0]).reshape(2, 1, 1)).round(3).ravel().tolist()
        [-1.0, 1.0]
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Hashable = None,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        axis_name: Hashable = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.process_group = process_group
        self.axis_name = axis_name

    def forward(self, input: ArrayLike) -> jax.Array:
        self._check_input_dim(input)
        return self._normalised(input, self.axis_name if self.training else None)

    def _check_input_dim(self, input: Any) -> None:
        shape = np.shape(input)
        if len(shape) < 2:
            raise ShapeError(
                explain(
                    f"SyncBatchNorm was given input of shape {shape}",
                    f"expected at least 2D input (got {len(shape)}D input): (N, C, *)",
                    "add the batch axis: input[None]",
                )
            )
        if shape[1] == 0:
            raise ShapeError(
                explain(
                    f"SyncBatchNorm was given input of shape {shape}",
                    "the number of input channels (axis 1) should be non-zero",
                    "an input with channels",
                )
            )

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Module, process_group: Hashable = None, *, axis_name: Hashable = None
    ) -> Module:
        """Replace every BatchNorm layer in a module by a SyncBatchNorm with the same state.

        Args:
            module: a module; its children are replaced in place.
            process_group: accepted for compatibility with torch.
            axis_name: the name of the mapped axis, or a tuple of names.

        Returns:
            The module, or the layer in its place if it is a BatchNorm itself. A layer that occurs
            twice is one layer afterwards, too.

        Example:
            >>> import statefulnn as nn
            >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
            >>> model = nn.SyncBatchNorm.convert_sync_batchnorm(model, axis_name="batch")
            >>> type(model[1]).__name__
            'SyncBatchNorm'
        """
        return _converted(cls, module, process_group, axis_name, {})


def _converted(
    cls: type[SyncBatchNorm],
    module: Module,
    process_group: object,
    axis_name: Hashable,
    done: dict[int, Module],
) -> Module:
    if id(module) in done:
        return done[id(module)]
    done[id(module)] = result = module
    if isinstance(module, _BatchNorm):
        result = cls(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            process_group,
            bias=module.bias is not None,
            axis_name=axis_name,
        )
        # The boxes themselves, so that tied parameters stay tied and optimizers keep their slots.
        for name, box in module._parameters.items():
            result.register_parameter(name, box)
        for name, box in module._buffers.items():
            result.register_buffer(name, box)
        result.train(module.training)
        done[id(module)] = done[id(result)] = result
    for name, child in list(module._modules.items()):
        if child is not None:
            converted = _converted(cls, child, process_group, axis_name, done)
            if converted is not child or result is not module:
                result.add_module(name, converted)
    return result
