"""functional_call under its deprecated name.

Source: ``torch.nn.utils.stateless``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from statefulnn.core.errors import user_stack_level
from statefulnn.core.listing import listing
from statefulnn.core.module import Module
from statefulnn.transforms.functional_call import functional_call as _functional_call

__all__ = ["functional_call"]
__dir__ = listing(globals())


def functional_call(
    module: Module,
    parameters_and_buffers: Mapping[str, Any],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Do the same as `nn.functional_call`, under its deprecated name.

    Args:
        module: it is never touched.
        parameters_and_buffers: a dict of dotted name -> array. Unlike torch, it is not written to: what
            changes state in forward is called by ``nn.functional_call(..., mutable=True)``.
        args, kwargs, tie_weights, strict: see `nn.functional_call`.

    Returns:
        The output.

    Source: ``torch.nn.utils.stateless.functional_call``.

    Example:
        >>> import warnings, jax.numpy as jnp, statefulnn as nn
        >>> from statefulnn.utils import stateless
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     out = stateless.functional_call(
        ...         nn.Linear(2, 1), {"bias": jnp.ones(1)}, jnp.zeros((1, 2))
        ...     )
        >>> out.tolist()
        [[1.0]]
    """
    warnings.warn(
        "statefulnn.utils.stateless.functional_call is deprecated in favor of "
        "statefulnn.functional_call",
        FutureWarning,
        stacklevel=user_stack_level(),
    )
    return _functional_call(
        module, parameters_and_buffers, args, kwargs, tie_weights=tie_weights, strict=strict
    )
