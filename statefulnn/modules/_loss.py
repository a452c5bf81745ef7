"""What layers of losses share: the reduction, and the weight kept as a buffer."""

from __future__ import annotations

from typing import Any

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

    def _register_weight(self, name: str, weight: Any) -> None:
        if weight is not None:
            weight = array(weight, name, f"nn.{type(self).__name__}")
        self.register_buffer(name, weight)


class _WeightedLoss(_Loss):
    def __init__(
        self,
        weight: Any = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self._register_weight("weight", weight)
