"""Parameters and buffers whose shape is not known yet; a lazy module gives them one at its first call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core import refusals
from statefulnn.core.arrays import filled
from statefulnn.core.box import Box
from statefulnn.core.compat import Tracer
from statefulnn.core.default_dtype import dtype_of_new
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.placement import (
    META,
    DeviceLike,
    Value,
    is_meta,
    place_in_force,
    resolve_device,
    supported,
)
from statefulnn.core.stamps import clock, tick


class Uninitialized:
    """What both kinds share. Inside is an empty array, which has the dtype and the place."""

    __slots__ = ()

    def materialize(
        self: Any, shape: Sequence[int], device: DeviceLike = None, dtype: DTypeLike | None = None
    ) -> None:
        """Take a shape, and zeros for values; the object becomes an ordinary Parameter or Buffer.

        Args:
            shape: the shape.
            device: where the array is put; None for where the parameter was to be.
            dtype: its dtype; None for the one the parameter was made with.
        """
        like = self._value
        place = resolve_device(device)
        kept = like.dtype if dtype is None else supported(np.dtype(dtype))
        if place is None and is_meta(like):
            place = META
        elif place is None and not isinstance(like, Tracer) and getattr(like, "committed", False):
            place = like.sharding
        Box.write(self, filled(shape, kept, place))
        becomes: Any = Parameter if isinstance(self, Parameter) else Buffer
        self.__class__ = becomes
        clock.structure = tick()

    @property
    def value(self: Any) -> Any:
        """There is none: reading raises."""
        raise refusals.used_without_shape(self.label())

    def __getattr__(self: Any, name: str) -> Any:
        if name == "dtype":
            return self._value.dtype
        if name.startswith("__"):
            raise AttributeError(name)
        raise refusals.read_without_shape(name, self.label())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def _empty(device: DeviceLike, dtype: DTypeLike | None) -> Any:
    dtype = dtype_of_new(dtype)
    place = place_in_force() if device is None else resolve_device(device)
    return filled((0,), dtype, place)


class UninitializedParameter(Uninitialized, Parameter):
    """A Parameter whose shape is not known yet.

    Args:
        requires_grad: whether gradients will be taken with respect to it.
        device: where it will be put.
        dtype: its dtype.

    Source: ``torch.nn.UninitializedParameter``.

    Example:
        >>> import statefulnn as nn
        >>> p = nn.UninitializedParameter()
        >>> p.materialize((2, 3))
        >>> type(p).__name__, p.shape
        ('Parameter', (2, 3))
    """

    __slots__ = ()

    def __init__(
        self, requires_grad: bool = True, device: DeviceLike = None, dtype: DTypeLike | None = None
    ) -> None:
        Parameter.__init__(self, _empty(device, dtype), requires_grad)

    def __deepcopy__(self, memo: dict) -> UninitializedParameter:
        return _parameter_like(self._value, self._requires_grad)

    def __reduce__(self) -> Any:
        return _parameter_like, (self._value, self._requires_grad)


class UninitializedBuffer(Uninitialized, Buffer):
    """A Buffer whose shape is not known yet.

    Args:
        requires_grad: accepted for compatibility with torch.
        device: where it will be put.
        dtype: its dtype.
        persistent: whether it is to be part of ``state_dict``.

    Source: ``torch.nn.UninitializedBuffer``.

    Example:
        >>> import statefulnn as nn
        >>> b = nn.UninitializedBuffer()
        >>> b.materialize((3,))
        >>> type(b).__name__, b.shape
        ('Buffer', (3,))
    """

    __slots__ = ()

    def __init__(
        self,
        requires_grad: bool = False,
        device: DeviceLike = None,
        dtype: DTypeLike | None = None,
        persistent: bool = True,
    ) -> None:
        Buffer.__init__(self, _empty(device, dtype), persistent=persistent)

    def __deepcopy__(self, memo: dict) -> UninitializedBuffer:
        return _buffer_like(self._value, self.persistent)

    def __reduce__(self) -> Any:
        return _buffer_like, (self._value, self.persistent)


def _parameter_like(value: Value, requires_grad: bool) -> UninitializedParameter:
    box = UninitializedParameter(requires_grad)
    box._value = value
    return box


def _buffer_like(value: Value, persistent: bool) -> UninitializedBuffer:
    box = UninitializedBuffer(persistent=persistent)
    box._value = value
    return box


def is_lazy(param: object) -> bool:
    """Say whether a parameter or buffer has no shape yet.

    Source: ``torch.nn.parameter.is_lazy``.

    Example:
        >>> import statefulnn as nn
        >>> nn.parameter.is_lazy(nn.LazyLinear(3).weight)
        True
    """
    return isinstance(param, Uninitialized)


def _refuse(box: Box, _: object = None) -> Any:
    return box.value  # raises, with the name


for _cls in (UninitializedParameter, UninitializedBuffer):
    jax.tree_util.register_pytree_node(_cls, _refuse, _refuse)
