"""Padding as layers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from statefulnn import functional as F
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.module import Module
from statefulnn.functional._checks import array, require_rank

Size = int | Sequence[int]


class _Pad(Module):
    spatial: int
    mode = "constant"

    def __init__(self, padding: Size) -> None:
        super().__init__()
        self.padding = self._amounts(padding)

    def _amounts(self, padding: Any) -> tuple[int, ...]:
        try:
            if isinstance(padding, Sequence):
                return tuple(operator.index(p) for p in padding)
            return (operator.index(padding),) * (2 * self.spatial)
        except TypeError:
            name = f"nn.{type(self).__name__}"
            raise DtypeError(
                explain(
                    f"made {name} with padding={padding!r}",
                    "an integer, or two integers an axis, the last axis first, are needed",
                    f"{name}(padding=1)",
                )
            ) from None

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.pad(input, self.padding, self.mode)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class _ConstantPad(_Pad):
    def __init__(self, padding: Size, value: float) -> None:
        super().__init__(padding)
        self.value = value

    def forward(self, input: ArrayLike) -> jax.Array:
        return F.pad(input, self.padding, "constant", self.value)

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class _ZeroPad(_ConstantPad):
    def __init__(self, padding: Size) -> None:
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class _CircularPad(_Pad):
    mode = "circular"

    def forward(self, input: ArrayLike) -> jax.Array:
        n = self.spatial
        axes = ", ".join("DHW"[-n:])
        layout = f"(N, C, {axes}) or (C, {axes})"
        name = f"nn.{type(self).__name__}"
        x = array(input, "input", name)
        require_rank(x, (n + 1, n + 2), "input", name, layout)
        return super().forward(x)


class ConstantPad1d(_ConstantPad):
    """Fill a border around one axis with a value.

    Args:
        padding: one number, or left and right;
            negative numbers cut.
        value: what is filled in.

    Shape:
        - input: ``(*, L)``; output: ``(*, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ConstantPad1d(1, 3.5)(jnp.ones((1, 2))).tolist()
        [[3.5, 1.0, 1.0, 3.5]]
    """

    spatial = 1


class ConstantPad2d(_ConstantPad):
    """Fill a border around two axes with a value.

    Args:
        padding: one number, or left, right, top and bottom;
            negative numbers cut.
        value: what is filled in.

    Shape:
        - input: ``(*, H, W)``; output: ``(*, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ConstantPad2d(1, 3.5)(jnp.ones((1, 2, 4, 4))).shape
        (1, 2, 6, 6)
    """

    spatial = 2


class ConstantPad3d(_ConstantPad):
    """Fill a border around three axes with a value.

    Args:
        padding: one number, or left, right, top, bottom, front and back;
            negative numbers cut.
        value: what is filled in.

    Shape:
        - input: ``(*, D, H, W)``; output: ``(*, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ConstantPad3d(1, 3.5)(jnp.ones((1, 2, 4, 4, 4))).shape
        (1, 2, 6, 6, 6)
    """

    spatial = 3


class ZeroPad1d(_ZeroPad):
    """Fill a border around one axis with zeros.

    Args:
        padding: one number, or left and right;
            negative numbers cut.

    Shape:
        - input: ``(*, L)``; output: ``(*, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ZeroPad1d(1)(jnp.ones((1, 2))).tolist()
        [[0.0, 1.0, 1.0, 0.0]]
    """

    spatial = 1


class ZeroPad2d(_ZeroPad):
    """Fill a border around two axes with zeros.

    Args:
        padding: one number, or left, right, top and bottom;
            negative numbers cut.

    Shape:
        - input: ``(*, H, W)``; output: ``(*, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ZeroPad2d(1)(jnp.ones((1, 2, 4, 4))).shape
        (1, 2, 6, 6)
    """

    spatial = 2


class ZeroPad3d(_ZeroPad):
    """Fill a border around three axes with zeros.

    Args:
        padding: one number, or left, right, top, bottom, front and back;
            negative numbers cut.

    Shape:
        - input: ``(*, D, H, W)``; output: ``(*, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ZeroPad3d(1)(jnp.ones((1, 2, 4, 4, 4))).shape
        (1, 2, 6, 6, 6)
    """

    spatial = 3


class ReflectionPad1d(_Pad):
    """Fill a border around one axis with the mirror image of what it surrounds.

    Args:
        padding: one number, or left and right;
            each below the size of its axis; negative numbers cut.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')`` or ``(C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReflectionPad1d(1)(jnp.arange(3.0)[None]).tolist()
        [[1.0, 0.0, 1.0, 2.0, 1.0]]
    """

    spatial = 1
    mode = "reflect"


class ReflectionPad2d(_Pad):
    """Fill a border around two axes with the mirror image of what it surrounds.

    Args:
        padding: one number, or left, right, top and bottom;
            each below the size of its axis; negative numbers cut.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')`` or ``(C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReflectionPad2d(1)(jnp.ones((1, 2, 4, 4))).shape
        (1, 2, 6, 6)
    """

    spatial = 2
    mode = "reflect"


class ReflectionPad3d(_Pad):
    """Fill a border around three axes with the mirror image of what it surrounds.

    Args:
        padding: one number, or left, right, top, bottom, front and back;
            each below the size of its axis; negative numbers cut.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')`` or
          ``(C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReflectionPad3d(1)(jnp.ones((1, 2, 4, 4, 4))).shape
        (1, 2, 6, 6, 6)
    """

    spatial = 3
    mode = "reflect"


class ReplicationPad1d(_Pad):
    """Fill a border around one axis with copies of the outermost elements.

    Args:
        padding: one number, or left and right;
            negative numbers cut.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')`` or ``(C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReplicationPad1d(1)(jnp.arange(3.0)[None]).tolist()
        [[0.0, 0.0, 1.0, 2.0, 2.0]]
    """

    spatial = 1
    mode = "replicate"


class ReplicationPad2d(_Pad):
    """Fill a border around two axes with copies of the outermost elements.

    Args:
        padding: one number, or left, right, top and bottom;
            negative numbers cut.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')`` or ``(C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReplicationPad2d(1)(jnp.ones((1, 2, 4, 4))).shape
        (1, 2, 6, 6)
    """

    spatial = 2
    mode = "replicate"


class ReplicationPad3d(_Pad):
    """Fill a border around three axes with copies of the outermost elements.

    Args:
        padding: one number, or left, right, top, bottom, front and back;
            negative numbers cut.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')`` or
          ``(C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.ReplicationPad3d(1)(jnp.ones((1, 2, 4, 4, 4))).shape
        (1, 2, 6, 6, 6)
    """

    spatial = 3
    mode = "replicate"


class CircularPad1d(_CircularPad):
    """Fill a border around one axis with what lies at the opposite border.

    Args:
        padding: one number, or left and right;
            each at most the size of its axis; negative numbers cut.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: ``(N, C, L')`` or ``(C, L')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.CircularPad1d(1)(jnp.arange(3.0)[None]).tolist()
        [[2.0, 0.0, 1.0, 2.0, 0.0]]
    """

    spatial = 1


class CircularPad2d(_CircularPad):
    """Fill a border around two axes with what lies at the opposite border.

    Args:
        padding: one number, or left, right, top and bottom;
            each at most the size of its axis; negative numbers cut.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: ``(N, C, H', W')`` or ``(C, H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.CircularPad2d(1)(jnp.ones((1, 2, 4, 4))).shape
        (1, 2, 6, 6)
    """

    spatial = 2


class CircularPad3d(_CircularPad):
    """Fill a border around three axes with what lies at the opposite border.

    Args:
        padding: one number, or left, right, top, bottom, front and back;
            each at most the size of its axis; negative numbers cut.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: ``(N, C, D', H', W')`` or
          ``(C, D', H', W')``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.CircularPad3d(1)(jnp.ones((1, 2, 4, 4, 4))).shape
        (1, 2, 6, 6, 6)
    """

    spatial = 3
