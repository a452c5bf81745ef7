"""Weight norm in its older form, with parameters ``weight_g`` and ``weight_v``.

Source: ``torch.nn.utils.weight_norm``. Instead of setting the weight before each call, the module
computes it each time it is read, so it is never behind its parameters.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from statefulnn.core.box import unwrap
from statefulnn.core.errors import explain, user_stack_level
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter
from statefulnn.utils._computed import (
    Computation,
    add_computation,
    computation,
    remove_computation,
)
from statefulnn.utils._norms import norm_except_dim, weight_of
from statefulnn.utils._tensors import numbers_of, parameter_of


@dataclass(frozen=True)
class WeightNorm(Computation):
    """Computes a parameter from a magnitude and a direction; `weight_norm` applies it.

    Args:
        name: of the parameter.
        dim: the axis along which each slice has a norm of its own; -1 for one norm of everything.

    Source: ``torch.nn.utils.weight_norm.WeightNorm``.

    Example:
        >>> from statefulnn.utils.weight_norm import WeightNorm
        >>> WeightNorm("weight", 0)
        WeightNorm(name='weight', dim=0)
    """

    name: str
    dim: int

    def compute_weight(self, module: Module) -> Any:
        """Return g · v / ‖v‖."""
        g, v = getattr(module, f"{self.name}_g"), getattr(module, f"{self.name}_v")
        return weight_of(unwrap(v), unwrap(g), self.dim)

    read = compute_weight

    @staticmethod
    def apply(module: Module, name: str, dim: int | None) -> WeightNorm:
        """Exchange the parameter for magnitude and direction."""
        warnings.warn(
            "statefulnn.utils.weight_norm is deprecated in favor of "
            "statefulnn.utils.parametrizations.weight_norm",
            FutureWarning,
            stacklevel=user_stack_level(),
        )
        if computation(module, name, WeightNorm) is not None:
            raise RuntimeError(
                explain(
                    f"weight_norm of {name!r} of {type(module).__name__}, for the second time",
                    f"Cannot register two weight_norm hooks on the same parameter {name}",
                    "remove_weight_norm(module, name) first",
                )
            )
        weight = parameter_of(module, name, "weight_norm")
        value = numbers_of(weight, f"weight_norm of {name!r} of {type(module).__name__}")
        new = WeightNorm(name, -1 if dim is None else int(dim))
        magnitude = Parameter(norm_except_dim(value, new.dim))
        module._check_static_write(name, None)
        del module._parameters[name]
        module.register_parameter(f"{name}_g", magnitude)
        module.register_parameter(f"{name}_v", Parameter(value))
        add_computation(module, new)
        return new

    def remove(self, module: Module) -> None:
        """Make the computed weight a parameter again."""
        weight = self.compute_weight(module)
        remove_computation(module, self)
        del module._parameters[f"{self.name}_g"]
        del module._parameters[f"{self.name}_v"]
        module.register_parameter(self.name, Parameter(weight))


def weight_norm(module: Module, name: str = "weight", dim: int | None = 0) -> Module:
    """Split a parameter into magnitude and direction, w = g · v / ‖v‖: the older form.

    `statefulnn.utils.parametrizations.weight_norm` is the one to use; it loads the checkpoints of
    this one.

    Args:
        module: it is changed; it gets the parameters ``<name>_g`` and ``<name>_v``.
        name: of the parameter.
        dim: the axis along which each slice has a norm of its own; None for one norm of everything.

    Returns:
        The module.

    Raises:
        RuntimeError: if it was applied to this parameter already.
        ValueError: if the parameter is None or has no shape yet.
        AttributeError: if there is no such parameter.
        IndexError: if it has no such axis.

    Source: Salimans and Kingma 2016; ``torch.nn.utils.weight_norm``.

    Example:
        >>> import warnings, statefulnn as nn
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     layer = nn.utils.weight_norm(nn.Linear(20, 40))
        >>> list(layer.state_dict()), layer.weight.shape
        (['bias', 'weight_g', 'weight_v'], (40, 20))
    """
    WeightNorm.apply(module, name, dim)
    return module


def remove_weight_norm(module: Module, name: str = "weight") -> Module:
    """Undo `weight_norm`: make the weight a parameter again.

    Args:
        module: it is changed.
        name: of the parameter.

    Returns:
        The module.

    Raises:
        ValueError: if `weight_norm` was not applied to it.

    Source: ``torch.nn.utils.remove_weight_norm``.

    Example:
        >>> import warnings, statefulnn as nn
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     layer = nn.utils.weight_norm(nn.Linear(20, 40))
        >>> list(nn.utils.remove_weight_norm(layer).state_dict())
        ['bias', 'weight']
    """
    applied = computation(module, name, WeightNorm)
    if applied is None:
        raise ValueError(
            explain(
                f"remove_weight_norm(module, {name!r})",
                f"weight_norm of '{name}' not found in {type(module).__name__}",
                "parametrize.remove_parametrizations(module, name), if it was applied by "
                "parametrizations.weight_norm",
            )
        )
    applied.remove(module)
    return module
