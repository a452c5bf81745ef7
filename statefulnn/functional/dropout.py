"""Dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.box import unwrap
from statefulnn.core.errors import explain
from statefulnn.core.generator import advance, drawing_generator
from statefulnn.functional._checks import array, require_float


def _dropped(x: Any, key: Any, p: Any) -> Any:
    keep = 1 - jnp.asarray(p, jnp.float32)
    scale = jnp.where(keep > 0, 1 / keep, 0)
    mask = jax.random.uniform(key, x.shape) < keep
    # A product, not a choice: what is not a number stays visible where it is dropped.
    return x * jnp.where(mask, scale, 0).astype(x.dtype)


@jax.jit
def _dropout_with_key(x: Any, key: Any, p: Any) -> Any:
    return _dropped(x, key, p)


@jax.jit
def _dropout_and_advance(x: Any, state: Any, p: Any) -> tuple[Any, Any]:
    key, state = advance(state)
    return _dropped(x, key, p), state


def dropout(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, *, rng: Any = None
) -> Any:
    """Set elements to zero with probability `p`, and divide the others by ``1 - p``.

    Args:
        input: any shape, floating.
        p: the probability that an element is dropped.
        training: False returns the input as it is.
        inplace: accepted for torch's sake; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Raises:
        ValueError: if `p` is no probability.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Srivastava et al. 2014; ``torch.nn.functional.dropout``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> out = F.dropout(jnp.ones(1000), 0.25, rng=jax.random.key(0))
        >>> sorted(set(out.round(3).tolist()))
        [0.0, 1.333...]
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(
            explain(
                f"F.dropout was given p={p}",
                "dropout probability has to be between 0 and 1",
                "F.dropout(input, p=0.5)",
            )
        )
    x = array(input, "input", "F.dropout")
    if not training or p == 0:
        return x
    require_float(x, "input", "F.dropout")
    if rng is not None:
        return _dropout_with_key(x, unwrap(rng), p)
    generator = drawing_generator()
    out, state = _dropout_and_advance(x, generator.drawable_state(), p)
    generator.advanced(state)
    return out
