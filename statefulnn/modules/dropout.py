"""Dropout layers."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.errors import explain
from statefulnn.core.module import Module


class _DropoutNd(Module):
    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if p < 0 or p > 1:
            name = type(self).__name__
            raise ValueError(
                explain(
                    f"made nn.{name} with p={p}",
                    f"dropout probability has to be between 0 and 1, but got {p}",
                    f"nn.{name}(0.5)",
                )
            )
        self.p = p
        self.inplace = inplace

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout(_DropoutNd):
    """In training set elements to zero with probability p, and divide the others by ``1 - p``.

    Masks come from the generator in force (`nn.manual_seed`, or the key of a pure call), and differ
    from call to call. In evaluation the input is returned as it is.

    Args:
        p: the probability that an element is dropped.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Raises:
        ValueError: if `p` is not a probability.

    Source: Srivastava et al. 2014.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Dropout(0.2).eval()(jnp.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.dropout(input, self.p, self.training)


class Dropout1d(_DropoutNd):
    """In training set whole channels to zero with probability p, and divide the others by ``1 - p``.

    Masks come from the generator in force (`nn.manual_seed`, or the key of a pure call), and differ
    from call to call. In evaluation the input is returned as it is.

    Args:
        p: the probability that a channel of an example is dropped.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: the same.

    Raises:
        ValueError: if `p` is not a probability.

    Source: Tompson et al. 2014.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Dropout1d(0.2).eval()(jnp.ones((2, 3, 4))).shape
        (2, 3, 4)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.dropout1d(input, self.p, self.training)


class Dropout2d(_DropoutNd):
    """In training set whole channels to zero with probability p, and divide the others by ``1 - p``.

    Masks come from the generator in force (`nn.manual_seed`, or the key of a pure call), and differ
    from call to call. In evaluation the input is returned as it is.

    Args:
        p: the probability that a channel of an example is dropped.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: ``(N, C, H, W)``, or ``(N, C, L)`` with a warning; output: the same.

    Raises:
        ValueError: if `p` is not a probability.

    Source: Tompson et al. 2014.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Dropout2d(0.2).eval()(jnp.ones((2, 3, 4, 4))).shape
        (2, 3, 4, 4)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.dropout2d(input, self.p, self.training)


class Dropout3d(_DropoutNd):
    """In training set whole channels to zero with probability p, and divide the others by ``1 - p``.

    Masks come from the generator in force (`nn.manual_seed`, or the key of a pure call), and differ
    from call to call. In evaluation the input is returned as it is.

    Args:
        p: the probability that a channel of an example is dropped.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: the same.

    Raises:
        ValueError: if `p` is not a probability.

    Source: Tompson et al. 2014.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Dropout3d(0.2).eval()(jnp.ones((2, 3, 4, 4, 4))).shape
        (2, 3, 4, 4, 4)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.dropout3d(input, self.p, self.training)


class AlphaDropout(_DropoutNd):
    """In training drop elements in a way that keeps mean 0 and variance 1, for `SELU`.

    Masks come from the generator in force (`nn.manual_seed`, or the key of a pure call), and differ
    from call to call. In evaluation the input is returned as it is.

    Args:
        p: the probability that an element is dropped.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: any; output: the same.

    Raises:
        ValueError: if `p` is not a probability.

    Source: Klambauer et al. 2017.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.AlphaDropout(0.2).eval()(jnp.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(_DropoutNd):
    """In training drop whole channels in a way that keeps mean 0 and variance 1, for `SELU`.

    Masks come from the generator in force (`nn.manual_seed`, or the key of a pure call), and differ
    from call to call. In evaluation the input is returned as it is.

    Args:
        p: the probability that a channel of an example is dropped.
        inplace: accepted for compatibility with torch; arrays are immutable.

    Shape:
        - input: ``(N, C, *)``; output: the same.

    Raises:
        ValueError: if `p` is not a probability.

    Source: Klambauer et al. 2017; Tompson et al. 2014.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.FeatureAlphaDropout(0.2).eval()(jnp.ones((2, 3, 4))).shape
        (2, 3, 4)
    """

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.feature_alpha_dropout(input, self.p, self.training)
