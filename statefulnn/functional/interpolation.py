"""Resizing: interpolation between the positions of one, two or three spatial axes."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain, user_stack_level
from statefulnn.functional._checks import LOW_PRECISION, array, is_float, shape_error
from statefulnn.functional._compiled import compiled
from statefulnn.functional._resampling import (
    How,
    along_axis,
    along_axis_of_bytes,
)

# The modes for each number of spatial axes, as torch names them.
ANYWHERE = ("nearest", "nearest-exact", "area")
MODES = {
    1: (*ANYWHERE, "linear"),
    2: (*ANYWHERE, "bilinear", "bicubic", "lanczos"),
    3: (*ANYWHERE, "trilinear"),
}
LINEAR = ("linear", "bilinear", "trilinear")
BYTES = {1: ANYWHERE[:2], 2: (*ANYWHERE[:2], "bilinear", "bicubic", "lanczos"), 3: ANYWHERE[:2]}

Size = int | Sequence[int] | None
Factor = float | Sequence[float] | None


@functools.partial(compiled, static_argnums=(1, 2, 3, 4, 5, 6))
def _interpolate(
    x: jax.Array,
    size: int | tuple[int, ...] | None,
    factor: float | tuple[float, ...] | None,
    mode: str,
    align_corners: bool | None,
    recompute: bool | None,
    antialias: bool,
) -> Any:
    # Checked here, where the code runs once for each combination of shapes and arguments: an eager
    # call like an earlier one pays nothing for it.
    _check_mode(x, mode, align_corners, antialias)
    sizes, factors = _sizes(x, size, factor, mode, recompute)
    kind = "linear" if mode in LINEAR else mode
    # torch computes nearest neighbours of small images in one place and of large ones in another.
    small = len(sizes) == 2 and sum(sizes) <= 128
    wide = x.dtype == np.dtype(np.float64) or (x.dtype == np.dtype(np.uint8) and kind in AVERAGED)
    steps = [
        (axis, How(kind, x.shape[axis], o, f, bool(align_corners), antialias, wide, small))
        for axis, (o, f) in enumerate(zip(sizes, factors, strict=True), 2)
    ]
    if x.dtype == np.dtype(np.uint8):
        for axis, how in reversed(steps):
            x = along_axis_of_bytes(x, axis, how)
        return x
    out = x.astype(np.float32) if x.dtype in LOW_PRECISION and kind in AVERAGED else x
    # What shrinks goes first and what grows goes last, so that each step has little to do.
    shrinking = [s for s in steps if s[1].after < s[1].before]
    growing = [s for s in steps if s[1].after >= s[1].before]
    for axis, how in shrinking + growing[::-1]:
        out = along_axis(out, axis, how)
    return out.astype(x.dtype)


# The kinds that compute averages; the others pick positions.
AVERAGED = ("linear", "bicubic", "lanczos", "area")


def _check_mode(x: jax.Array, mode: str, align_corners: bool | None, antialias: bool) -> None:
    given = f"F.interpolate was given input of shape {x.shape} and mode={mode!r}"
    if mode in ANYWHERE and align_corners is not None:
        raise ValueError(
            explain(
                f"F.interpolate was given mode={mode!r} and align_corners={align_corners}",
                "align_corners says where positions between others lie: it can only be set with "
                "linear, bilinear, bicubic and trilinear",
                f"F.interpolate(input, ..., mode={mode!r})",
            )
        )
    if antialias and not (mode in ("bilinear", "bicubic", "lanczos") and x.ndim == 4):
        raise ValueError(
            explain(
                f"{given}, and antialias=True",
                "antialias is restricted to bilinear, bicubic and lanczos, and to (N, C, H, W)",
                'mode="bilinear", or antialias=False',
            )
        )
    modes = MODES.get(x.ndim - 2)
    if modes is None:
        raise NotImplementedError(
            explain(
                given,
                "(N, C, L), (N, C, H, W) or (N, C, D, H, W) is needed",
                "add the missing axes: input[None]",
            )
        )
    if mode not in modes:
        raise NotImplementedError(
            explain(
                given,
                f"the modes for {x.ndim - 2} spatial axes are {', '.join(modes)}",
                f"mode={modes[-1 if x.ndim != 4 else 3]!r}",
            )
        )
    if mode == "lanczos" and (align_corners or not antialias):
        raise ValueError(
            explain(
                f"{given}, align_corners={align_corners} and antialias={antialias}",
                "lanczos is a filter against aliasing: it requires antialias=True, and "
                "align_corners=False",
                'F.interpolate(input, ..., mode="lanczos", antialias=True)',
            )
        )
    if not is_float(x.dtype) and not (x.dtype == np.uint8 and mode in BYTES[x.ndim - 2]):
        raise DtypeError(
            explain(
                f"{given}, of dtype {x.dtype}",
                "it is defined for floating dtypes, and for uint8 images "
                f"({', '.join(BYTES[x.ndim - 2])})",
                "cast it first: input.astype(jnp.float32)",
            )
        )


def _sizes(
    x: jax.Array, size: object, factor: object, mode: str, recompute: bool | None
) -> tuple[list[int], list[float | None]]:
    """Return the size of each spatial axis afterwards, and the factor to compute positions with."""
    spatial = x.shape[2:]
    if (size is None) == (factor is None):
        raise ValueError(
            explain(
                f"F.interpolate was given size={size} and scale_factor={factor}",
                "exactly one of size or scale_factor should be defined",
                "F.interpolate(input, scale_factor=2)",
            )
        )
    if recompute and size is not None:
        raise ValueError(
            explain(
                f"F.interpolate was given size={size} and recompute_scale_factor=True",
                "a size given outright leaves no scale factor to recompute",
                f"F.interpolate(input, size={size})",
            )
        )
    name, value = ("size", size) if factor is None else ("scale_factor", factor)
    values: tuple[Any, ...] = value if isinstance(value, tuple) else (value,) * len(spatial)
    if len(values) != len(spatial):
        raise ValueError(
            explain(
                f"F.interpolate was given input of shape {x.shape} and {name}={value}",
                f"one number is needed, or one for each of {len(spatial)} spatial axes",
                f"{name}={values[:1] * len(spatial)}",
            )
        )
    factors: list[float | None] = [None] * len(spatial)
    sizes: list[Any] = list(values)
    if factor is not None:
        sizes = [int(n * f) for n, f in zip(spatial, values, strict=True)]
        if not recompute and mode != "area":
            factors = list(values)
    empty = mode != "area" and (min(sizes) < 1 or 0 in spatial)
    if empty or min(sizes) < 0:
        raise shape_error(
            f"F.interpolate was given input of shape {x.shape} and {name}={value}: output sizes {sizes}",
            "input and output sizes should be greater than 0",
            "a larger size or scale_factor",
        )
    if x.shape[1] == 0 and mode != "area":
        raise shape_error(
            f"F.interpolate was given input of shape {x.shape}",
            "only the batch may be empty",
            "one channel at least",
        )
    return sizes, factors


def _whole(value: Any) -> Any:
    """Return a size as an integer or a tuple of integers."""
    if type(value) is int or value is None:
        return value
    try:
        if isinstance(value, (tuple, list)):
            return tuple(operator.index(v) for v in value)
        return operator.index(value)
    except TypeError:
        raise DtypeError(
            explain(
                f"F.interpolate was given size={value!r}",
                "an integer is needed, or a tuple of one for each spatial axis",
                "size=(64, 64), or scale_factor=1.5",
            )
        ) from None


def _real(value: object) -> Any:
    """Return a scale factor as a float or a tuple of floats."""
    if type(value) is float or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_real(v) for v in value)
    if not isinstance(value, (int, float, np.floating, np.integer)):
        raise DtypeError(
            explain(
                f"F.interpolate was given scale_factor={value!r}",
                "a number is needed, or a tuple of one for each spatial axis: the size of an array "
                "cannot depend on traced values",
                "scale_factor=2.0",
            )
        )
    return float(value)


def interpolate(
    input: ArrayLike,
    size: Size = None,
    scale_factor: Factor = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> jax.Array:
    """Resize the spatial axes.

    Args:
        input: ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``, floating; uint8 for nearest
            neighbours and for images.
        size: the sizes afterwards, one number or one an axis.
        scale_factor: the sizes as a multiple of those before; this or `size`.
        mode: "nearest", "nearest-exact" (positions at the centres of pixels), "area" (means over
            windows), "linear" (one axis), "bilinear", "bicubic", "lanczos" (two axes), "trilinear"
            (three axes).
        align_corners: whether the centres of the outermost pixels stay where they are, instead of their
            outer edges; None is False.
        recompute_scale_factor: whether positions are computed from the sizes, which are rounded down,
            and not from `scale_factor` itself.
        antialias: whether shrinking widens the filter, as image libraries do; for bilinear, bicubic,
            lanczos (which requires it).

    Returns:
        ``(N, C, *sizes)``.

    Raises:
        ValueError: if the arguments do not go together.
        ShapeError: if a size would be zero.
        NotImplementedError: if the mode is not one for this number of axes.
        DtypeError: if the dtype is not one for this mode.

    Source: ``torch.nn.functional.interpolate``; bicubic with Keys' a = -0.75, and -0.5 with antialias.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> x = jnp.arange(3.0)[None, None]
        >>> F.interpolate(x, scale_factor=2).tolist()
        [[[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]]
        >>> F.interpolate(x, size=5, mode="linear", align_corners=True).tolist()
        [[[0.0, 0.5, 1.0, 1.5, 2.0]]]
    """
    return _interpolate(
        array(input, "input", "F.interpolate"),
        _whole(size),
        _real(scale_factor),
        mode,
        align_corners,
        recompute_scale_factor,
        antialias,
    )


def _deprecated(name: str, instead: str) -> None:
    warnings.warn(
        f"`nn.functional.{name}` is deprecated. Use `nn.functional.interpolate` instead: {instead}",
        UserWarning,
        stacklevel=user_stack_level(),
    )


def upsample(
    input: ArrayLike,
    size: Size = None,
    scale_factor: Factor = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> jax.Array:
    """Resize the spatial axes: the old name of `interpolate`, which warns.

    Args:
        input: ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
        size: the sizes afterwards.
        scale_factor: the sizes as a multiple of those before; this or `size`.
        mode: as of `interpolate`.
        align_corners: as of `interpolate`.

    Returns:
        ``(N, C, *sizes)``.

    Raises:
        ValueError, ShapeError, NotImplementedError, DtypeError: as `interpolate`.

    Source: ``torch.nn.functional.upsample``.

    Example:
        >>> import warnings, jax.numpy as jnp, statefulnn.functional as F
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     out = F.upsample(jnp.ones((1, 1, 2)), scale_factor=2)
        >>> out.shape
        (1, 1, 4)
    """
    _deprecated("upsample", "the arguments are the same")
    return interpolate(input, size, scale_factor, mode, align_corners)


def upsample_nearest(input: ArrayLike, size: Size = None, scale_factor: Factor = None) -> jax.Array:
    """Resize by nearest neighbours: the old name of ``interpolate(mode="nearest")``, which warns.

    Args:
        input: ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
        size: the sizes afterwards.
        scale_factor: the sizes as a multiple of those before; this or `size`.

    Returns:
        ``(N, C, *sizes)``.

    Raises:
        ValueError, ShapeError, NotImplementedError, DtypeError: as `interpolate`.

    Source: ``torch.nn.functional.upsample_nearest``.

    Example:
        >>> import warnings, jax.numpy as jnp, statefulnn.functional as F
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     out = F.upsample_nearest(jnp.ones((1, 1, 2, 2)), scale_factor=2)
        >>> out.shape
        (1, 1, 4, 4)
    """
    _deprecated("upsample_nearest", 'mode="nearest"')
    return interpolate(input, size, scale_factor, mode="nearest")


def upsample_bilinear(
    input: ArrayLike, size: Size = None, scale_factor: Factor = None
) -> jax.Array:
    """Resize images linearly, corners aligned: an old name of `interpolate`, which warns.

    Args:
        input: ``(N, C, H, W)``.
        size: the sizes afterwards.
        scale_factor: the sizes as a multiple of those before; this or `size`.

    Returns:
        ``(N, C, *sizes)``.

    Raises:
        ValueError, ShapeError, NotImplementedError, DtypeError: as `interpolate`.

    Source: ``torch.nn.functional.upsample_bilinear``.

    Example:
        >>> import warnings, jax.numpy as jnp, statefulnn.functional as F
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     out = F.upsample_bilinear(jnp.ones((1, 1, 2, 2)), scale_factor=2)
        >>> out.shape
        (1, 1, 4, 4)
    """
    _deprecated("upsample_bilinear", 'mode="bilinear", align_corners=True')
    return interpolate(input, size, scale_factor, mode="bilinear", align_corners=True)
