"""Non-linearities that are the identity, or nearly, on one side of a threshold, as layers."""

from __future__ import annotations

import warnings

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn import init as initializers
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike


class ReLU(Module):
    """Return ``max(x, 0)`` elementwise.

    Args:
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReLU()(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.relu(input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class Threshold(Module):
    """Return x where it is above a threshold, and a constant elsewhere.

    Args:
        threshold: elements up to and including it are replaced.
        value: by this.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Threshold(1.0, 20.0)(jnp.array([1.0, 2.0])).tolist()
        [20.0, 2.0]
    """

    def __init__(self, threshold: float, value: float, inplace: bool = False) -> None:
        super().__init__()
        self.threshold = threshold
        self.value = value
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.threshold(input, self.threshold, self.value)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, value={self.value}" + (
            ", inplace=True" if self.inplace else ""
        )


class Hardtanh(Module):
    """Limit x to an interval.

    Args:
        min_val: the lower end.
        max_val: the upper end.
        inplace: accepted for compatibility with torch; arrays are immutable.
        min_value: the old name of `min_val`, deprecated.
        max_value: the old name of `max_val`, deprecated.

    Shape:
        - input: any; output: the same.

    Raises:
        AssertionError: if `max_val` is not above `min_val`.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Hardtanh(-2, 2)(jnp.array([-3.0, 0.5])).tolist()
        [-2.0, 0.5]
    """

    def __init__(
        self,
        min_val: float = -1.0,
        max_val: float = 1.0,
        inplace: bool = False,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> None:
        super().__init__()
        if min_value is not None:
            _renamed("min_value", "min_val")
            min_val = min_value
        if max_value is not None:
            _renamed("max_value", "max_val")
            max_val = max_value
        if max_val <= min_val:
            raise AssertionError(
                explain(
                    f"made nn.Hardtanh with min_val={min_val} and max_val={max_val}",
                    "max_val must be greater than min_val",
                    "nn.Hardtanh(-1.0, 1.0)",
                )
            )
        self.min_val = min_val
        self.max_val = max_val
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.hardtanh(input, self.min_val, self.max_val)

    def extra_repr(self) -> str:
        shown = f"min_val={self.min_val}, max_val={self.max_val}"
        return shown + (", inplace=True" if self.inplace else "")


def _renamed(old: str, new: str) -> None:
    warnings.warn(
        f"keyword argument `{old}` is deprecated and renamed to `{new}`",
        FutureWarning,
        stacklevel=4,
    )


class ReLU6(Hardtanh):
    """Return ``min(max(x, 0), 6)`` elementwise.

    Args:
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReLU6()(jnp.array([-1.0, 5.0, 7.0])).tolist()
        [0.0, 5.0, 6.0]
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(0.0, 6.0, inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class LeakyReLU(Module):
    """Return x where it is positive, and ``negative_slope · x`` elsewhere.

    Args:
        negative_slope: the derivative for x ≤ 0.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Maas, Hannun and Ng 2013.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LeakyReLU(0.5)(jnp.array([-2.0, 2.0])).tolist()
        [-1.0, 2.0]
    """

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.leaky_relu(input, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}" + (", inplace=True" if self.inplace else "")


class PReLU(Module):
    """Return x where it is positive, and ``weight · x`` elsewhere, with a weight that is learnt.

    Args:
        num_parameters: 1, or C for a weight for each channel.
        init: the initial value of the weight.
        device: where the parameter is put.
        dtype: its dtype.

    Shape:
        - input: ``(N, C, *)``, or any for a single weight; output: the same.

    Attributes:
        weight: ``(num_parameters,)``.

    Source: He et al. 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.PReLU()(jnp.array([-2.0, 2.0])).tolist()
        [-0.5, 2.0]
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        self.num_parameters = num_parameters
        self.init = init
        self.weight = initializers.empty_parameter(num_parameters, dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to its initial value."""
        initializers.constant_(self.weight, self.init)

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.prelu(input, self.weight)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"


class RReLU(Module):
    """Return x where it is positive, and elsewhere x times a slope that is random in training.

    Args:
        lower: the least slope.
        upper: the largest slope; in evaluation it is the middle of the two.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Xu et al. 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.RReLU(0.25, 0.75).eval()(jnp.array([-2.0, 2.0])).tolist()
        [-1.0, 2.0]
    """

    def __init__(
        self, lower: float = 1.0 / 8, upper: float = 1.0 / 3, inplace: bool = False
    ) -> None:
        super().__init__()
        self.lower = lower
        self.upper = upper
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.rrelu(input, self.lower, self.upper, self.training)

    def extra_repr(self) -> str:
        return f"lower={self.lower}, upper={self.upper}" + (
            ", inplace=True" if self.inplace else ""
        )


class ELU(Module):
    """Return x where it is positive, and ``alpha · (exp(x) - 1)`` elsewhere.

    Args:
        alpha: minus the limit for very negative x.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Clevert, Unterthiner and Hochreiter 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ELU(0.5)(jnp.array([-100.0, 2.0])).tolist()
        [-0.5, 2.0]
    """

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.elu(input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" + (", inplace=True" if self.inplace else "")


class SELU(Module):
    """Return ``scale · elu(x, alpha)`` with the constants that keep mean 0 and variance 1.

    Args:
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Klambauer et al. 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.SELU()(jnp.array([-100.0, 1.0])).round(4).tolist()
        [-1.758..., 1.050...]
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.selu(input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class CELU(Module):
    """Return x where it is positive, and ``alpha · (exp(x / alpha) - 1)`` elsewhere.

    Args:
        alpha: minus the limit for very negative x.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Barron 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.CELU(0.5)(jnp.array([-100.0, 2.0])).tolist()
        [-0.5, 2.0]
    """

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.celu(input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" + (", inplace=True" if self.inplace else "")
