"""The choice of the kernel that computes attention."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator

from statefulnn.core.construction import allowed_backends, in_force
from statefulnn.core.errors import explain


class SDPBackend(enum.IntEnum):
    """Kernels of scaled dot-product attention.

    ``MATH`` is the formula, compiled by XLA; ``CUDNN_ATTENTION`` is cuDNN's flash attention on NVIDIA
    GPUs. ``FLASH_ATTENTION`` and ``EFFICIENT_ATTENTION`` stand for the best that the platform has:
    cuDNN's where it applies, else the formula.

    Source: ``torch.nn.attention.SDPBackend``.

    Example:
        >>> from statefulnn.attention import SDPBackend
        >>> SDPBackend.MATH.name
        'MATH'
    """

    ERROR = -1
    MATH = 0
    FLASH_ATTENTION = 1
    EFFICIENT_ATTENTION = 2
    CUDNN_ATTENTION = 3
    OVERRIDEABLE = 4


@contextlib.contextmanager
def sdpa_kernel(
    backends: list[SDPBackend] | SDPBackend, set_priority: bool = False
) -> Iterator[None]:
    """Allow only some kernels for attention inside a ``with`` block.

    `nn.jit` compiles for each choice; what ``jax.jit`` compiled keeps the kernel that was allowed while it
    was traced.

    Args:
        backends: one, or a list.
        set_priority: accepted for compatibility with torch; cuDNN's kernel comes first wherever it applies.

    Raises:
        AssertionError: if `backends` is neither an `SDPBackend` nor a list of them.
        RuntimeError: inside, for attention that none of the allowed kernels computes.

    Source: ``torch.nn.attention.sdpa_kernel``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> from statefulnn.attention import SDPBackend, sdpa_kernel
        >>> x = jnp.ones((1, 2, 3, 4))
        >>> with sdpa_kernel(SDPBackend.MATH):
        ...     F.scaled_dot_product_attention(x, x, x).shape
        (1, 2, 3, 4)
    """
    given = [backends] if isinstance(backends, SDPBackend) else backends
    if not isinstance(given, list) or not all(isinstance(b, SDPBackend) for b in given):
        raise AssertionError(
            explain(
                f"sdpa_kernel was given {backends!r}",
                "Backend must be an instance of SDPBackend or a list of SDPBackend instances",
                "sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])",
            )
        )
    with in_force(allowed_backends, frozenset(b.name for b in given)):
        yield
