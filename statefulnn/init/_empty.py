"""Arrays and parameters before they are initialised."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from jax.typing import DTypeLike

from statefulnn.core import arrays, refusals
from statefulnn.core.default_dtype import dtype_of_new
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import DeviceLike, elsewhere, place_in_force, resolve_device


def sizes(shape: object) -> tuple[int, ...]:
    """Return a shape as integers, or raise for what is none, such as the float that ``n / 2`` gives."""
    given: Any = shape if isinstance(shape, (tuple, list)) else (shape,)
    try:
        found = tuple(map(operator.index, given))
    except TypeError:
        raise refusals.no_size(given) from None
    if min(found, default=0) < 0:
        raise refusals.negative_size(found)
    return found


def filled(
    shape: int | Sequence[int],
    value: float,
    dtype: DTypeLike | None = None,
    device: DeviceLike | None = None,
) -> Any:
    """Return an array of one value.

    Args:
        shape: its shape.
        value: the value.
        dtype: its dtype; None for the default, `nn.get_default_dtype()`.
        device: a device, a sharding or a platform's name; None leaves the choice to JAX.
    """
    dtype = dtype_of_new(dtype)
    shape = sizes(shape)
    place = place_in_force() if device is None else resolve_device(device)
    return arrays.filled(shape, dtype, place, value)


def empty_parameter(
    shape: int | Sequence[int],
    dtype: DTypeLike | None = None,
    device: DeviceLike | None = None,
    requires_grad: bool = True,
) -> Parameter:
    """Return a Parameter that ``reset_parameters`` is to give its values; until then it is zeros.

    It is what the layers of this package make their parameters of. It minds ``nn.device`` around it, the
    meta device included, and compiles nothing.

    Args:
        shape: its shape, an integer for one axis.
        dtype: its dtype; None for the default, `nn.get_default_dtype()`.
        device: a device, a sharding or a platform's name; None for the ``nn.device`` block around, or JAX's
            choice.
        requires_grad: whether it is trained.

    Returns:
        a Parameter.

    Source: ``torch.nn.Parameter(torch.empty(...))``, as torch's layers have it.

    Example:
        >>> import statefulnn as nn
        >>> class Scale(nn.Module):
        ...     def __init__(self, size, bias=True, device=None, dtype=None):
        ...         super().__init__()
        ...         self.weight = nn.init.empty_parameter(size, dtype, device)
        ...         bias = nn.init.empty_parameter(size, dtype, device) if bias else None
        ...         self.register_parameter("bias", bias)
        ...         self.reset_parameters()
        ...
        ...     def reset_parameters(self):
        ...         nn.init.ones_(self.weight)
        ...         if self.bias is not None:
        ...             nn.init.zeros_(self.bias)
        >>> layer = Scale(3, bias=False)
        >>> layer.weight.tolist(), layer.bias, Scale(3, device="meta").weight.shape
        ([1.0, 1.0, 1.0], None, (3,))
    """
    value = filled(shape, 0, dtype, device)
    if device is None:
        return Parameter(value, requires_grad)
    with elsewhere():  # what the caller says wins over the block around
        return Parameter(value, requires_grad)
