"""update_bn: running statistics of a model that was not trained with its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.averaging import _refusals as refusals
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike, resolve_device
from statefulnn.core.tracebacks import shortened
from statefulnn.modules.batchnorm import _BatchNorm
from statefulnn.transforms.jit import jit
from statefulnn.transforms.types import PyTree


@shortened
def update_bn(loader: Iterable[Any], model: Module, device: DeviceLike | None = None) -> None:
    """Compute the running statistics of batch normalisation anew: plain averages over a loader.

    Averaged parameters have other statistics than those that were trained. The model runs in training mode,
    compiled, on each batch. Momentum and modes are as before afterwards; where a batch fails, statistics too.

    Args:
        loader: the batches: arrays, or tuples and lists whose first member is the input.
        model: the model, such as an `AveragedModel`. One without batch normalisation is left alone.
        device: where the batches are put first.

    Raises:
        ValueError: for no batches.
        ArgumentError: for no module.

    Source: ``torch.optim.swa_utils.update_bn``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.BatchNorm1d(1)
        >>> nn.update_bn([jnp.zeros((4, 1)), jnp.ones((4, 1))], model)
        >>> model.running_mean.tolist(), model.momentum
        ([0.5], 0.1)
    """
    require_module(model, "nn.update_bn")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    place = resolve_device(device)
    with _averaging(model, norms):
        for norm in norms:
            norm.reset_running_stats()
        empty = True
        for batch in loader:
            x = jax.tree.map(jnp.asarray, batch[0] if isinstance(batch, (list, tuple)) else batch)
            _run(model, x if place is None else jax.device_put(x, place))
            empty = False
        if empty:
            raise refusals.no_batches()


@jit
def _run(model: Module, x: PyTree) -> None:
    model(x)


@contextmanager
def _averaging(model: Module, norms: list[Any]) -> Iterator[None]:
    """Have layers take plain averages, in training mode; after a failure they have their old statistics."""
    modes = [(m, m.training) for m in model.modules()]
    momenta = [norm.momentum for norm in norms]
    boxes = [box for norm in norms for box in norm._buffers.values() if box is not None]
    before = [box.value for box in boxes]
    try:
        model.train()
        for norm in norms:
            norm.momentum = None
        yield
    except BaseException:
        for box, value in zip(boxes, before, strict=True):
            box.value = value
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
