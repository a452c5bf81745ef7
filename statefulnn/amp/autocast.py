"""A block of code, or a function, whose matrix products run in low precision."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
from jax.typing import DTypeLike

from statefulnn.core.errors import ArgumentError, DtypeError, explain
from statefulnn.core.module import Module
from statefulnn.core.placement import as_dtype
from statefulnn.functional._autocast import dtype_in_force, open_blocks
from statefulnn.functional._checks import LOW_PRECISION
from statefulnn.transforms.types import P, R

_DEVICES = ("cpu", "cuda", "gpu", "tpu", "mps", "xpu")


class autocast:  # noqa: N801 (torch's name)
    """Run matrix products in low precision, and what needs range or digits in float32.

    It is a context manager and a decorator, as torch's, and holds for the functions of F and the layers:
    linear layers, convolutions, attention and recurrent layers cast what they are given to `dtype`; norms,
    softmax and losses cast it to float32. Any other function takes what it is given, and so do ``x @ y``
    and `jax.numpy`. float64 is left as it is. The lists are those of torch for CUDA.

    Parameters keep their dtype, and so do their gradients and everything that is written back: the casts are
    part of the computation. What `nn.jit` and `jax.jit` compile is compiled for each value.

    Args:
        dtype: bfloat16, or float16, whose gradients need a `GradScaler`.
        enabled: False leaves arrays as they are, also inside of another block.

    Raises:
        DtypeError: for another dtype.

    Source: ``torch.autocast``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), jnp.ones((2, 3))
        >>> with nn.amp.autocast():
        ...     str(model[0](x).dtype), str(model(x).dtype)
        ('bfloat16', 'float32')
        >>> str(model[0](x).dtype)
        'float32'
    """

    def __new__(cls, *given: object, **named: object) -> Self:
        # torch's autocast("cuda", dtype=...) would be two dtypes to Python, of which __init__ says nothing.
        device = named.get("device_type", given[0] if given else None)
        if isinstance(device, str) and device.partition(":")[0] in _DEVICES:
            raise ArgumentError(
                explain(
                    f"nn.amp.autocast({device!r}) was given a device",
                    "JAX computes where its arrays are, so that only the dtype is chosen here",
                    "nn.amp.autocast(jnp.bfloat16)",
                )
            )
        return super().__new__(cls)

    def __init__(self, dtype: DTypeLike = jnp.bfloat16, enabled: bool = True) -> None:
        found = as_dtype(dtype)
        if enabled and found not in LOW_PRECISION:
            raise DtypeError(
                explain(
                    f"nn.amp.autocast({found.name})",
                    "it runs products in low precision: bfloat16, or float16 with a GradScaler",
                    "nn.amp.autocast(jnp.bfloat16); to switch it off, nn.amp.autocast(enabled=False)",
                )
            )
        self.dtype = found
        self.enabled = enabled
        self._open = threading.local()  # the blocks of each thread, in the order they were entered

    def __enter__(self) -> autocast:
        block = dtype_in_force(self.dtype if self.enabled else None)
        block.__enter__()
        open_blocks.add(block)
        self._open.__dict__.setdefault("blocks", []).append(block)
        return self

    def __exit__(self, *exception: object) -> None:
        block = self._open.blocks.pop()
        open_blocks.discard(block)
        block.__exit__(*exception)

    def __call__(self, fun: Callable[P, R]) -> Callable[P, R]:
        """Return the function, run in a block of its own each time."""
        if isinstance(fun, Module):
            raise ArgumentError(
                explain(
                    f"nn.amp.autocast decorated a {type(fun).__name__}",
                    "it decorates functions, and a function around the model would hide its parameters",
                    "decorate the class's forward, or open a block around the call: "
                    "with nn.amp.autocast(): model(x)",
                )
            )

        @functools.wraps(fun)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with autocast(self.dtype, self.enabled):
                return fun(*args, **kwargs)

        return wrapper  # pyright: ignore[reportReturnType]
