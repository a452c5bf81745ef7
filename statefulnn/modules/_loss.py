"""What layers of losses share: the reduction, and the weight kept as a buffer."""

from __future__ import annotations

from typing import Any

from statefulnn.core.habits import array_for_an_option
from statefulnn.core.module import Module
from statefulnn.functional._checks import array, reduction_of


class _Loss(Module):
    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        name = f"nn.{type(self).__name__}"
        self.reduction = reduction_of(reduction, size_average, reduce, name)

    def _register_weight(self, name: str, weight: object) -> None:
        if weight is not None:
            weight = array(weight, name, f"nn.{type(self).__name__}")
        self.register_buffer(name, weight)


class _WeightedLoss(_Loss):
    _by_class = False  # whether the weight has an entry for each class

    def __init__(
        self,
        weight: Any = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        if self._by_class and getattr(weight, "ndim", 1) > 1:  # outputs of a model
            raise array_for_an_option(type(self), "weight")
        self._register_weight("weight", weight)
