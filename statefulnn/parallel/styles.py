"""How one layer is split for tensor parallelism, under the names of ``torch.distributed.tensor.parallel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from statefulnn.core import refusals
from statefulnn.core.module import Module
from statefulnn.core.placement import kept_in_place
from statefulnn.modules.linear import Linear
from statefulnn.modules.sparse import Embedding


class ParallelStyle:
    """How `nn.parallel.parallelize_module` splits one module; a class of your own derives from it.

    Attributes:
        layouts: for each class of modules, which axis of each parameter is split. A parameter that is not
            named is on every device.

    Source: ``torch.distributed.tensor.parallel.ParallelStyle``.
    """

    layouts: ClassVar[Mapping[type[Module], Mapping[str, int]]] = {}

    def specs(self, name: str, module: Module, axis: str) -> dict[str, PartitionSpec]:
        """Return the PartitionSpec of each of the module's own parameters that is split.

        Raises:
            ArgumentError: if the style does not know the module's class.
        """
        for cls, split in self.layouts.items():
            if isinstance(module, cls):
                return {p: PartitionSpec(*[None] * i, axis) for p, i in split.items()}
        kinds = [cls.__name__ for cls in self.layouts]
        raise refusals.style_of_other_module(
            type(self).__name__, name, type(module).__name__, kinds
        )

    def apply(self, module: Module, mesh: Mesh, axis: str) -> None:
        """Do what else the style asks for, such as registering hooks."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ColwiseParallel(ParallelStyle):
    """Split a Linear by its outputs, an Embedding by its features: each device computes a part of them.

    Source: ``torch.distributed.tensor.parallel.ColwiseParallel``.
    """

    layouts: ClassVar = {Linear: {"weight": 0, "bias": 0}, Embedding: {"weight": 1}}


class RowwiseParallel(ParallelStyle):
    """Split a Linear by its inputs, an Embedding by its rows: XLA adds up the parts of the result.

    Source: ``torch.distributed.tensor.parallel.RowwiseParallel``.
    """

    layouts: ClassVar = {Linear: {"weight": 1}, Embedding: {"weight": 0}}


class SequenceParallel(ParallelStyle):
    """Keep parameters on every device, and split what a module returns along its sequence.

    For norms and dropout between layers that are split: each device computes a part of the positions.

    Args:
        sequence_dim: the axis of the output with the positions.

    Source: ``torch.distributed.tensor.parallel.SequenceParallel``.
    """

    def __init__(self, *, sequence_dim: int = 1) -> None:
        self.sequence_dim = sequence_dim

    def specs(self, name: str, module: Module, axis: str) -> dict[str, PartitionSpec]:
        """Return no PartitionSpec: nothing is split."""
        return {}

    def apply(self, module: Module, mesh: Mesh, axis: str) -> None:
        """Register a hook that lays out what the module returns."""
        dim = self.sequence_dim

        def split(module: Module, args: object, output: jax.Array) -> jax.Array:
            if AxisType.Explicit in mesh.axis_types:
                now = jax.typeof(output).sharding.spec
                spec: list[Any] = [*now, *[None] * (output.ndim - len(now))]
            else:
                spec = [PartitionSpec.UNCONSTRAINED] * output.ndim
            spec[dim] = axis
            return kept_in_place(output, NamedSharding(mesh, PartitionSpec(*spec)))

        module.register_forward_hook(split)
