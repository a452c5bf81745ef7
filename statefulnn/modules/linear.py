"""Linear layers."""

from __future__ import annotations

from typing import TypeVar

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn import init
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike

Value = TypeVar("Value")


class Identity(Module):
    """Return the input as it is; all arguments are ignored.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Identity(54, unused=0.1)(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def forward(self, input: Value) -> Value:
        return input


class Linear(Module):
    """Apply ``y = x Aᵀ + b`` to the last axis.

    Args:
        in_features: the size of each input.
        out_features: the size of each output.
        bias: whether there is a b.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(*, in_features)``; output: ``(*, out_features)``.

    Attributes:
        weight: ``(out_features, in_features)``, from U(±1/√in_features).
        bias: ``(out_features,)``, likewise, or None.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Linear(20, 30)(jnp.ones((128, 20))).shape
        (128, 30)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = init.empty_parameter((out_features, in_features), dtype, device)
        self.register_parameter(
            "bias", init.empty_parameter(out_features, dtype, device) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        init.rules(self).linear(self.weight, self.bias)

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class Bilinear(Module):
    """Apply ``y_o = x1ᵀ A_o x2 + b_o`` to the last axes.

    Args:
        in1_features: the size of each first input.
        in2_features: the size of each second input.
        out_features: the size of each output.
        bias: whether there is a b.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input1: ``(*, in1_features)``; input2: ``(*, in2_features)``; output: ``(*, out_features)``.

    Attributes:
        weight: ``(out_features, in1_features, in2_features)``, from U(±1/√in1_features).
        bias: ``(out_features,)``, likewise, or None.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Bilinear(20, 30, 40)(jnp.ones((128, 20)), jnp.ones((128, 30))).shape
        (128, 40)
    """

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        if in1_features <= 0:
            raise ValueError(
                explain(
                    f"made nn.Bilinear with in1_features={in1_features}",
                    "in1_features must be > 0: the initial values are divided by its root",
                    "nn.Bilinear(20, 30, 40)",
                )
            )
        self.in1_features = in1_features
        self.in2_features = in2_features
        self.out_features = out_features
        self.weight = init.empty_parameter(
            (out_features, in1_features, in2_features), dtype, device
        )
        self.register_parameter(
            "bias", init.empty_parameter(out_features, dtype, device) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        init.rules(self).bilinear(self.weight, self.bias)

    def forward(self, input1: ArrayLike, input2: ArrayLike) -> jax.Array:
        return F.bilinear(input1, input2, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )
