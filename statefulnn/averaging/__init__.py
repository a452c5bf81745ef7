"""Averages of models: of parameters over the steps of a training, of batch statistics over a loader."""

from statefulnn.averaging.averaged_model import AveragedModel, lerp_
from statefulnn.averaging.batch_norm import update_bn
from statefulnn.averaging.rules import (
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from statefulnn.core.listing import listing

__all__ = [
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "lerp_",
    "update_bn",
]
__dir__ = listing(globals())
