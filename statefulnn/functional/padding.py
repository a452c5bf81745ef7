"""Padding: what lies beyond an array's border."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import array, shape_error
from statefulnn.functional._compiled import compiled

BORDERS = ("reflect", "replicate", "circular")


def check_border(size: int, low: int, high: int, mode: str, given: str) -> None:
    """Raise unless an axis of `size` can be continued by `low` and `high` positions (or be cut)."""
    if mode == "reflect" and max(low, high) >= size:
        raise shape_error(
            given,
            f"a border of {max(low, high)} cannot be mirrored from an axis of {size}",
            f"padding below {size}",
        )
    kept = size + min(low, 0) + min(high, 0)
    if mode == "circular" and kept < 0:
        raise shape_error(
            given, f"it cuts {size - kept} positions off an axis of {size}", "less negative padding"
        )
    if mode == "circular" and max(low, high) > kept:
        raise shape_error(
            given,
            f"a border of {max(low, high)} would wrap around an axis of {kept} more than once",
            f"padding of at most {kept}",
        )
    if mode != "circular" and size + low + high < 1:
        raise shape_error(
            given,
            f"it leaves {size + low + high} positions of an axis of {size}, and one is needed",
            "less negative padding",
        )


def continued(x: jax.Array, axis: int, low: int, high: int, mode: str) -> jax.Array:
    """Continue one axis beyond its border; negative numbers cut it."""
    size = x.shape[axis]
    cut = functools.partial(lax.slice_in_dim, axis=axis)
    if mode == "circular" and (low < 0 or high < 0):
        x = cut(x, max(-low, 0), size - max(-high, 0))
        low, high, size = max(low, 0), max(high, 0), x.shape[axis]
    before, after = max(low, 0), max(high, 0)
    parts = [x]
    if mode == "reflect":
        if before:
            parts.insert(0, lax.rev(cut(x, 1, before + 1), (axis,)))
        if after:
            parts.append(lax.rev(cut(x, size - 1 - after, size - 1), (axis,)))
    elif mode == "replicate":
        if before:
            parts.insert(0, _repeated(cut(x, 0, 1), axis, before))
        if after:
            parts.append(_repeated(cut(x, size - 1, size), axis, after))
    else:
        if before:
            parts.insert(0, cut(x, size - before, size))
        if after:
            parts.append(cut(x, 0, after))
    if len(parts) > 1:
        x = lax.concatenate(parts, axis)
    if low < 0 or high < 0:
        x = cut(x, max(-low, 0), x.shape[axis] - max(-high, 0))
    return x


def _repeated(x: jax.Array, axis: int, times: int) -> Any:
    return jnp.broadcast_to(x, (*x.shape[:axis], times, *x.shape[axis + 1 :]))


@functools.partial(compiled, static_argnums=(1, 2))
def _pad(x: jax.Array, pad: Sequence[int], mode: str, value: ArrayLike | None) -> Any:
    # Checked here, where the code runs once for each combination of shapes: an eager call like an
    # earlier one pays nothing for it.
    pairs = _pairs(x, pad, mode)
    if mode == "constant":
        given = f"F.pad was given pad={tuple(pad)} for an input of shape {x.shape}"
        for size, (low, high) in zip(reversed(x.shape), pairs, strict=False):
            if size + min(low, 0) + min(high, 0) < 0:
                raise shape_error(
                    given,
                    f"it cuts {-min(low, 0) - min(high, 0)} positions off an axis of {size}",
                    "less negative padding",
                )
        amounts = [(0, 0, 0)] * (x.ndim - len(pairs)) + [(*p, 0) for p in reversed(pairs)]
        fill = jnp.zeros((), x.dtype) if value is None else jnp.asarray(value).astype(x.dtype)
        return lax.pad(x, fill, amounts)
    for i, (low, high) in enumerate(pairs):
        x = continued(x, x.ndim - 1 - i, low, high, mode)
    return x


def _pairs(x: jax.Array, pad: Sequence[int], mode: str) -> list[tuple[int, int]]:
    """Return what is added before and after each axis, the last one first."""
    given = f"F.pad was given pad={pad!r} for an input of shape {x.shape}"
    try:
        amounts = [operator.index(p) for p in pad]
    except TypeError:
        raise DtypeError(
            explain(given, "pad is a tuple of integers", "pad=(left, right)")
        ) from None
    if len(amounts) % 2:
        raise shape_error(
            given, "each axis has a beginning and an end", "pad=(left, right, top, bottom)"
        )
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode == "constant":
        if len(pairs) > x.ndim:
            raise shape_error(
                given,
                f"pad names {len(pairs)} axes, from the last one on, and there are {x.ndim}",
                f"at most {2 * x.ndim} numbers",
            )
        return pairs
    if not 1 <= len(pairs) <= 3 or x.ndim not in (len(pairs) + 1, len(pairs) + 2):
        raise NotImplementedError(
            explain(
                f"{given}, and mode={mode!r}",
                "this mode pads all axes but the first two of a batch (N, C, *), or but the first "
                "of one example (C, *), and one to three of them",
                "two numbers for each such axis, or a loop over the axes",
            )
        )
    batched = x.ndim == len(pairs) + 2
    if mode != "circular" and math.prod(x.shape[1 if batched else 0 :]) == 0:
        raise shape_error(
            f"{given}, and mode={mode!r}",
            "there is nothing to continue: only the batch axis may be empty",
            "mode='constant'",
        )
    for size, (low, high) in zip(reversed(x.shape), pairs, strict=False):
        check_border(size, low, high, mode, f"{given}, and mode={mode!r}")
    return pairs


def pad(
    input: ArrayLike, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> jax.Array:
    """Add to the borders of the last axes, or cut them off.

    Args:
        input: any shape for "constant"; ``(N, C, *)`` or ``(C, *)`` with one to three axes ``*``
            otherwise.
        pad: two numbers an axis, before and after it, the last axis first:
            ``(left, right, top, bottom, front, back)``. Negative ones cut.
        mode: "constant"; "reflect" mirrors at the outermost element, "replicate" repeats it,
            "circular" continues at the opposite border.
        value: what is filled in by "constant"; None for 0.

    Returns:
        The padded array, of the input's dtype.

    Raises:
        ShapeError: if `pad` does not fit the shape, or a value is given that is not used.
        DtypeError: if `pad` is no tuple of integers.
        NotImplementedError: if there is no such mode, or not for so many axes.

    Source: ``torch.nn.functional.pad``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.pad(jnp.arange(3), (1, 2), value=9).tolist()
        [9, 0, 1, 2, 9, 9]
        >>> F.pad(jnp.arange(3)[None], (2, 1), mode="reflect").tolist()
        [[2, 1, 0, 1, 2, 1]]
    """
    x = array(input, "input", "F.pad")
    if mode != "constant":
        if mode not in BORDERS:
            raise NotImplementedError(
                explain(
                    f"F.pad was given mode={mode!r}",
                    f'the modes are "constant", {", ".join(map(repr, BORDERS))}',
                    'mode="reflect"',
                )
            )
        if value is not None and value != 0:
            raise shape_error(
                f"F.pad was given mode={mode!r} and value={value}",
                "this mode fills in what the input holds, no value",
                f"F.pad(input, {pad}, mode='constant', value={value})",
            )
        value = None
    elif value is not None and not isinstance(value, jax.Array):
        _check_value(value, x.dtype)
    return _pad(x, pad if type(pad) is tuple else _tuple(pad), mode, value)


def _tuple(pad: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(pad)
    except TypeError:
        raise DtypeError(
            explain(
                f"F.pad was given pad={pad!r}",
                "pad is a tuple of integers, two for each axis",
                "pad=(left, right)",
            )
        ) from None


def _check_value(value: Any, dtype: DTypeLike) -> None:
    given = f"F.pad was given value={value!r} for an input of dtype {dtype}"
    numbers: Any = (int, float, np.number, np.bool_)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        numbers = (*numbers, complex)
    elif isinstance(value, np.complexfloating):
        numbers = ()
    if not isinstance(value, numbers):
        raise DtypeError(explain(given, "a number of that dtype is needed", "value=0.0"))
    if jnp.issubdtype(dtype, jnp.integer):
        bounds = jnp.iinfo(dtype)
        # Not a number is within no bounds.
        if not int(bounds.min) - 1 < value < int(bounds.max) + 1:
            raise shape_error(
                given,
                f"it is not between {bounds.min} and {bounds.max}",
                "input.astype(jnp.float32), or another value",
            )
