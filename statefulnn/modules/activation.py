"""Smooth non-linearities, their piecewise linear stand-ins, and gating, as layers."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.module import Module


class Sigmoid(Module):
    """Return ``1 / (1 + exp(-x))`` elementwise.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Sigmoid()(jnp.array([0.0])).tolist()
        [0.5]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.sigmoid(input)


class LogSigmoid(Module):
    """Return ``log(sigmoid(x))`` elementwise, computed without overflow.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LogSigmoid()(jnp.array([-1000.0, 0.0])).round(4).tolist()
        [-1000.0, -0.693...]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.logsigmoid(input)


class Tanh(Module):
    """Return the hyperbolic tangent elementwise.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Tanh()(jnp.array([0.0])).tolist()
        [0.0]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.tanh(input)


class Tanhshrink(Module):
    """Return ``x - tanh(x)`` elementwise.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Tanhshrink()(jnp.array([0.0, 100.0])).tolist()
        [0.0, 99.0]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.tanhshrink(input)


class Softsign(Module):
    """Return ``x / (1 + |x|)`` elementwise.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Softsign()(jnp.array([-3.0, 1.0])).tolist()
        [-0.75, 0.5]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.softsign(input)


class Softplus(Module):
    """Return ``log(1 + exp(beta · x)) / beta`` elementwise, a smooth relu.

    Args:
        beta: how sharp the bend is.
        threshold: where ``beta · x`` is above it, x itself is returned.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Softplus()(jnp.array([0.0, 30.0])).round(4).tolist()
        [0.693..., 30.0]
    """

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta = beta
        self.threshold = threshold

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.softplus(input, self.beta, self.threshold)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, threshold={self.threshold}"


class GELU(Module):
    """Return ``x Φ(x)`` elementwise, Φ the distribution function of the normal distribution.

    Args:
        approximate: "none" for the exact function, "tanh" for the usual approximation.

    Shape:
        - input: any; output: the same.

    Source: Hendrycks and Gimpel 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.GELU()(jnp.array([0.0])).tolist()
        [0.0]
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.gelu(input, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(Module):
    """Return ``x σ(x)`` elementwise, also called swish.

    Args:
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Hendrycks and Gimpel 2016; Elfwing, Uchibe and Doya 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.SiLU()(jnp.array([0.0])).tolist()
        [0.0]
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.silu(input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class Mish(Module):
    """Return ``x · tanh(softplus(x))`` elementwise.

    Args:
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Misra 2019.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Mish()(jnp.array([0.0, 1.0])).round(4).tolist()
        [0.0, 0.865...]
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.mish(input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class Hardsigmoid(Module):
    """Return ``relu6(x + 3) / 6`` elementwise.

    Args:
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Courbariaux, Bengio and David 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Hardsigmoid()(jnp.array([-4.0, 0.0, 4.0])).tolist()
        [0.0, 0.5, 1.0]
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.hardsigmoid(input)


class Hardswish(Module):
    """Return ``x · relu6(x + 3) / 6`` elementwise.

    Args:
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Source: Howard et al. 2019.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Hardswish()(jnp.array([0.0, 4.0])).tolist()
        [0.0, 4.0]
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.hardswish(input)


class Hardshrink(Module):
    """Return x where ``|x| > lambd``, and 0 elsewhere.

    Args:
        lambd: half the width of the band that becomes 0.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Hardshrink()(jnp.array([-1.0, 0.5, 1.0])).tolist()
        [-1.0, 0.0, 1.0]
    """

    def __init__(self, lambd: float = 0.5) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.hardshrink(input, self.lambd)

    def extra_repr(self) -> str:
        return f"{self.lambd}"


class Softshrink(Module):
    """Move x towards 0 by `lambd`, and no further than 0.

    Args:
        lambd: how far, not negative.

    Shape:
        - input: any; output: the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Softshrink()(jnp.array([-1.0, 0.5, 1.0])).tolist()
        [-0.5, 0.0, 0.5]
    """

    def __init__(self, lambd: float = 0.5) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.softshrink(input, self.lambd)

    def extra_repr(self) -> str:
        return f"{self.lambd}"


class GLU(Module):
    """Return ``a σ(b)``, a and b the halves of the input along an axis.

    Args:
        dim: the axis, of an even size, that is halved.

    Shape:
        - input: ``(*, 2n, *)``; output: ``(*, n, *)``.

    Source: Dauphin et al. 2016.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.GLU()(jnp.ones((3, 8))).shape
        (3, 4)
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.glu(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
