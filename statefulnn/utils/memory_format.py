"""Memory formats of weights: XLA chooses them, so there is nothing to convert.

Source: ``torch.nn.utils.memory_format``.
"""

from __future__ import annotations

from typing import TypeVar

Out = TypeVar("Out")


def convert_conv2d_weight_memory_format(module: Out, memory_format: object) -> Out:
    """Return the module as it is: the compiler chooses the layout in memory.

    Args:
        module: a module.
        memory_format: accepted for compatibility with torch.

    Source: ``torch.nn.utils.convert_conv2d_weight_memory_format``.

    Example:
        >>> import statefulnn as nn
        >>> nn.utils.convert_conv2d_weight_memory_format(nn.Conv2d(1, 2, 3), None)
        Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    return module


def convert_conv3d_weight_memory_format(module: Out, memory_format: object) -> Out:
    """Return the module as it is: the compiler chooses the layout in memory.

    Args:
        module: a module.
        memory_format: accepted for compatibility with torch.

    Source: ``torch.nn.utils.convert_conv3d_weight_memory_format``.

    Example:
        >>> import statefulnn as nn
        >>> nn.utils.convert_conv3d_weight_memory_format(nn.Conv3d(1, 2, 3), None)
        Conv3d(1, 2, kernel_size=(3, 3, 3), stride=(1, 1, 1))
    """
    return module
