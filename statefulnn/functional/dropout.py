"""Dropout: of elements, of whole channels, and of the kind that keeps mean and variance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import ArgumentError, explain
from statefulnn.core.threefry import traced_unit
from statefulnn.functional._checks import array, require_float, require_real_float, shape_error
from statefulnn.functional._compiled import compiled
from statefulnn.functional._random import drawing
from statefulnn.functional.rectifier import SELU_ALPHA, SELU_SCALE


def _kept(key: jax.Array, shape: Sequence[int], p: ArrayLike) -> Any:
    return traced_unit(key, shape) < 1 - jnp.asarray(p, jnp.float32)


def kept_factors(key: jax.Array, shape: Sequence[int], p: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Draw what dropout multiplies by: 0 with probability `p`, else ``1 / (1 - p)``."""
    keep = 1 - jnp.asarray(p, jnp.float32)
    scale = jnp.where(keep > 0, 1 / keep, 0)
    return jnp.where(_kept(key, shape, p), scale, 0).astype(dtype)


def dropped(
    x: jax.Array, key: jax.Array, p: ArrayLike, shape: Sequence[int] | None = None
) -> jax.Array:
    """Return x with elements dropped; of a smaller shape that is broadcast, whole parts of it."""
    # A product, not a choice: what is not a number stays visible where it is dropped.
    return x * kept_factors(key, x.shape if shape is None else shape, p, x.dtype)


def _by_channel(x: jax.Array) -> tuple[int, ...]:
    return (*x.shape[:2], *(1,) * (x.ndim - 2))


def _dropout_kernel(key: jax.Array, x: jax.Array, p: ArrayLike) -> Any:
    return dropped(x, key, p)


def _channels_kernel(key: jax.Array, x: jax.Array, p: ArrayLike, batched: bool) -> Any:
    if not batched:
        return dropped(x[None], key, p, _by_channel(x[None]))[0]
    return dropped(x, key, p, _by_channel(x))


def _alpha_kernel(key: jax.Array, x: jax.Array, p: ArrayLike, channels: bool) -> Any:
    keep = 1 - jnp.asarray(p, jnp.float32)
    mask = _kept(key, _by_channel(x) if channels else x.shape, p)
    # A dropped element becomes the limit of selu for very negative inputs; the affine map that
    # follows brings mean and variance back to 0 and 1.
    limit = -SELU_ALPHA * SELU_SCALE
    a = jax.lax.rsqrt(keep * (1 + (1 - keep) * limit**2))
    b = -a * (1 - keep) * limit
    scale = jnp.where(mask, a, 0).astype(x.dtype)
    shift = jnp.where(mask, b, a * limit + b).astype(x.dtype)
    return x * scale + shift


_dropout = drawing(_dropout_kernel)
_channel_dropout = drawing(_channels_kernel, static_argnums=(3,))
_alpha_dropout = drawing(_alpha_kernel, static_argnums=(3,))


@compiled
def _all_dropped(x: jax.Array) -> Any:
    return x * jnp.zeros((), x.dtype)


def _checked(input: ArrayLike, p: float, training: Any, function: str) -> tuple[Any, Any]:
    """Return the input, and the output where nothing is drawn (None if something is)."""
    if not 0.0 <= p <= 1.0:
        # Torch tells these apart: what is not a number passes its first question.
        error = RuntimeError if math.isnan(p) else ValueError
        raise error(
            explain(
                f"{function} was given p={p}",
                f"dropout probability has to be between 0 and 1, but got {p}",
                f"{function}(input, p=0.5)",
            )
        )
    if hasattr(training, "dtype") and not jnp.issubdtype(training.dtype, jnp.bool_):
        raise ArgumentError(
            explain(
                f"{function} was given an array of dtype {training.dtype} as training",
                "it is a flag, and a key has a name of its own",
                f"{function}(input, p, rng=key)",
            )
        )
    x = array(input, "input", function)
    if not training or p == 0 or x.size == 0:
        return x, x
    if p == 1:
        return x, _all_dropped(x)
    return x, None


def dropout(
    input: ArrayLike,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Set elements to zero with probability `p`, and divide the others by ``1 - p``.

    Args:
        input: any shape, floating.
        p: the probability that an element is dropped.
        training: False returns the input as it is.
        inplace: accepted for compatibility with torch; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Raises:
        ValueError: if `p` is not a probability.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Srivastava et al. 2014; ``torch.nn.functional.dropout``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> out = F.dropout(jnp.ones(1000), 0.25, rng=jax.random.key(0))
        >>> sorted(set(out.round(3).tolist()))
        [0.0, 1.333...]
    """
    x, out = _checked(input, p, training, "F.dropout")
    if out is not None:
        return out
    if x.dtype.kind in "iub":
        require_float(x, "input", "F.dropout")
    return _dropout(rng, x, p)


def _without_channels(
    x: jax.Array,
    out: jax.Array | None,
    p: float,
    rng: jax.Array | None,
    function: str,
    batched: bool = True,
) -> Any:
    if out is not None:
        return out
    if x.dtype.kind in "iub":
        require_float(x, "input", function)
    if x.ndim + (not batched) < 2:
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            "it drops whole channels, and requires at least 2 dimensions: (N, C, *)",
            "F.dropout(input, p) drops single elements",
        )
    return _channel_dropout(rng, x, p, batched)


def dropout1d(
    input: ArrayLike,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Set whole channels to zero with probability `p`, and divide the others by ``1 - p``.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``, floating.
        p: the probability that a channel of an example is dropped.
        training: False returns the input as it is.
        inplace: accepted for compatibility with torch; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Raises:
        ValueError: if `p` is not a probability.
        ShapeError: if the input has neither 2 nor 3 axes.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Tompson et al. 2014; ``torch.nn.functional.dropout1d``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> out = F.dropout1d(jnp.ones((8, 4, 5)), rng=jax.random.key(0))
        >>> sorted(set(out.mean(-1).ravel().tolist()))
        [0.0, 2.0]
    """
    x, out = _checked(input, p, training, "F.dropout1d")
    if x.ndim not in (2, 3):
        raise shape_error(
            f"F.dropout1d was given input of shape {x.shape}",
            f"expected 2D or 3D input, but received a {x.ndim}D input: (C, L) or (N, C, L)",
            "F.dropout2d or F.dropout3d for more axes, F.dropout for single elements",
        )
    return _without_channels(x, out, p, rng, "F.dropout1d", x.ndim == 3)


def _odd_rank(function: str, ndim: int, usual: str) -> None:
    warnings.warn(
        f"{function}: Received a {ndim}-D input to {function}, which is deprecated and will result "
        f"in an error in a future release of torch; it drops channels of {usual} inputs. Use dropout "
        "to drop single elements",
        UserWarning,
        stacklevel=3,
    )


def dropout2d(
    input: ArrayLike,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Set whole channels to zero with probability `p`, and divide the others by ``1 - p``.

    An input of three axes is taken as ``(N, C, L)``, with a warning, as torch does.

    Args:
        input: ``(N, C, H, W)`` or ``(N, C, L)``, floating.
        p: the probability that a channel of an example is dropped.
        training: False returns the input as it is.
        inplace: accepted for compatibility with torch; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Raises:
        ValueError: if `p` is not a probability.
        ShapeError: if the input has fewer than 2 axes.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Tompson et al. 2014; ``torch.nn.functional.dropout2d``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> out = F.dropout2d(jnp.ones((8, 4, 5, 5)), rng=jax.random.key(0))
        >>> sorted(set(out.mean((2, 3)).ravel().tolist()))
        [0.0, 2.0]
    """
    x, out = _checked(input, p, training, "F.dropout2d")
    if x.ndim not in (3, 4):
        _odd_rank("dropout2d", x.ndim, "3D or 4D")
    if x.ndim == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout "
            "behavior is desired: the input is interpreted as (N, C, L), as torch does; to keep "
            "this use dropout1d, and for one image (C, H, W) add the batch axis: input[None]",
            UserWarning,
            stacklevel=2,
        )
    return _without_channels(x, out, p, rng, "F.dropout2d")


def dropout3d(
    input: ArrayLike,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Set whole channels to zero with probability `p`, and divide the others by ``1 - p``.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``, floating.
        p: the probability that a channel of an example is dropped.
        training: False returns the input as it is.
        inplace: accepted for compatibility with torch; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Raises:
        ValueError: if `p` is not a probability.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Tompson et al. 2014; ``torch.nn.functional.dropout3d``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> out = F.dropout3d(jnp.ones((8, 4, 2, 3, 3)), rng=jax.random.key(0))
        >>> sorted(set(out.mean((2, 3, 4)).ravel().tolist()))
        [0.0, 2.0]
    """
    x, out = _checked(input, p, training, "F.dropout3d")
    if x.ndim not in (4, 5):
        _odd_rank("dropout3d", x.ndim, "4D or 5D")
    return _without_channels(x, out, p, rng, "F.dropout3d", x.ndim == 5)


def alpha_dropout(
    input: ArrayLike,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Drop elements with probability `p` in a way that keeps mean 0 and variance 1, for `selu`.

    A dropped element is set to the negative limit of selu, and then all are scaled and shifted.

    Args:
        input: any shape, floating.
        p: the probability that an element is dropped.
        training: False, the default, returns the input as it is.
        inplace: accepted for compatibility with torch; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Returns:
        An array of the same shape; zeros for ``p=1``.

    Raises:
        ValueError: if `p` is not a probability.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Klambauer et al. 2017; ``torch.nn.functional.alpha_dropout``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> out = F.alpha_dropout(jnp.zeros(1000), training=True, rng=jax.random.key(0))
        >>> sorted(set(out.round(3).tolist()))
        [-0.779..., 0.779...]
    """
    x, out = _checked(input, p, training, "F.alpha_dropout")
    if out is not None:
        return out
    require_real_float(x, "input", "F.alpha_dropout")
    return _alpha_dropout(rng, x, p, False)


def feature_alpha_dropout(
    input: ArrayLike,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Drop whole channels with probability `p` in a way that keeps mean 0 and variance 1.

    Args:
        input: ``(N, C, *)``, floating.
        p: the probability that a channel of an example is dropped.
        training: False, the default, returns the input as it is.
        inplace: accepted for compatibility with torch; arrays are immutable.
        rng: a random key; without one the draw comes from the generator in force.

    Returns:
        An array of the same shape; zeros for ``p=1``.

    Raises:
        ValueError: if `p` is not a probability.
        ShapeError: if the input has fewer than 2 axes.
        MissingRngError: for a draw without `rng` where no generator can be advanced.

    Source: Klambauer et al. 2017; Tompson et al. 2014;
    ``torch.nn.functional.feature_alpha_dropout``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.zeros((8, 4, 5))
        >>> out = F.feature_alpha_dropout(x, training=True, rng=jax.random.key(0))
        >>> sorted(set(out.mean(-1).round(3).ravel().tolist()))
        [-0.779..., 0.779...]
    """
    x, out = _checked(input, p, training, "F.feature_alpha_dropout")
    if out is not None:
        return out
    require_real_float(x, "input", "F.feature_alpha_dropout")
    if x.ndim < 2:
        raise shape_error(
            f"F.feature_alpha_dropout was given input of shape {x.shape}",
            "it drops whole channels, and requires at least 2 dimensions: (N, C, *)",
            "F.alpha_dropout(input, p, training=True) drops single elements",
        )
    return _alpha_dropout(rng, x, p, True)
