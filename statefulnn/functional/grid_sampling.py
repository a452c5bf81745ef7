"""Sampling images and volumes at given positions, and the positions of affine maps."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain, user_stack_level
from statefulnn.functional._checks import (
    array,
    is_float,
    require_float,
    require_same_dtype,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled

INTERPOLATIONS = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")


def _unnormalized(at: jax.Array, size: int, align_corners: bool, spatial: int) -> Any:
    """Return positions in [-1, 1] as positions among pixels, rounded as torch rounds them."""
    if spatial == 2:
        if align_corners:
            return (at + 1) * ((size - 1) / 2)
        return (at + 1) * (size / 2) - 0.5
    if align_corners:
        return ((at + 1) / 2) * (size - 1)
    return ((at + 1) * size - 1) / 2


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _clipped(at: jax.Array, size: int) -> Any:
    # Choices, not minimum and maximum: NaN becomes 0.
    inside = (at > 0) & (at < size - 1)
    return jnp.where(inside, at, jnp.where(at >= size - 1, size - 1, 0).astype(at.dtype))


@_clipped.defjvp
def _clipped_jvp(size: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # 0 on the border; a product, so that a pixel without a number gives NaN there as well, as in torch. The
    # factor is chosen from two numbers, since XLA makes a choice of a product with a boolean.
    (at,), (moved,) = primals, tangents
    slope = jnp.where((at > 0) & (at < size - 1), 1.0, 0.0).astype(at.dtype)
    return _clipped(at, size), slope * moved


def _reflected(at: jax.Array, low: float, high: float) -> Any:
    span = high - low
    if span == 0:
        return jnp.zeros_like(at)
    away = at - low
    away = jnp.where(away < 0, -away, away)
    rest = lax.rem(away, jnp.full_like(away, span))
    odd = jnp.floor(lax.stop_gradient(away) / span) % 2 == 1
    return jnp.where(odd, span - rest, rest) + low


def _padded(at: jax.Array, size: int, padding_mode: str, align_corners: bool) -> Any:
    """Return positions mapped into the image, where the padding mode does so."""
    if padding_mode == "zeros":
        return at
    if padding_mode == "reflection":
        ends = (0, size - 1) if align_corners else (-0.5, size - 0.5)
        at = _reflected(at, *ends)
    return _clipped(at, size)


A = -0.75


def _near(x: jax.Array) -> Any:
    return ((A + 2) * x - (A + 3)) * x * x + 1


def _far(x: jax.Array) -> Any:
    return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A


@jax.custom_jvp
def _cubic(part: jax.Array) -> tuple[Any, ...]:
    """Return Keys' cubic convolution with A = -0.75 at four taps."""
    return _far(part + 1), _near(part), _near(1 - part), _far(2 - part)


@_cubic.defjvp
def _cubic_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # One product for each tap: the chain rule's sums would subtract infinities.
    (part,), (moved,) = primals, tangents
    near = lambda x: (3 * (A + 2) * x - 2 * (A + 3)) * x
    far = lambda x: (3 * A * x - 10 * A) * x + 8 * A
    slopes = far(part + 1), near(part), -near(1 - part), -far(2 - part)
    return _cubic(part), tuple(slope * moved for slope in slopes)


def _taps(
    at: jax.Array, size: int, mode: str, padding_mode: str, align_corners: bool, n: int
) -> Any:
    """Return, for one axis, pairs of whole positions (as floats) and weights."""
    at = _unnormalized(at, size, align_corners, n)
    if mode == "bicubic":
        low = jnp.floor(lax.stop_gradient(at))
        around = [_padded(low + step, size, padding_mode, align_corners) for step in (-1, 0, 1, 2)]
        return list(zip(map(jnp.trunc, around), _cubic(at - low), strict=True))
    at = _padded(at, size, padding_mode, align_corners)
    if mode == "nearest":
        return [(jnp.round(lax.stop_gradient(at)), None)]
    low = jnp.floor(lax.stop_gradient(at))
    return [(low, low + 1 - at), (low + 1, at - low)]


@functools.partial(compiled, static_argnums=(2, 3, 4))
def _grid_sample(
    x: jax.Array, grid: jax.Array, mode: str, padding_mode: str, align_corners: bool
) -> Any:
    _check(x, grid, mode)
    sizes = x.shape[2:]
    dtype = x.dtype
    # Positions in low precision would be off by whole pixels.
    x, grid = widened(x), widened(grid)
    points = math.prod(grid.shape[1:-1])
    # The channels of a pixel lie together: one read, and in the derivative one write, for all of them.
    pixels = x.reshape(*x.shape[:2], math.prod(sizes)).swapaxes(1, 2)  # (N, H W, C)
    read = jax.vmap(lambda image, index: image.at[index].get(mode="promise_in_bounds"))
    places = grid.reshape(grid.shape[0], points, len(sizes))  # (N, P, 2): the last axis first
    by_axis = [
        _taps(places[..., -1 - i], n, mode, padding_mode, align_corners, len(sizes))
        for i, n in enumerate(sizes)
    ]
    terms = []
    for corner in itertools.product(*by_axis):
        index: Any = 0
        inside: Any = True
        weight = None
        for (at, part), size in zip(corner, sizes, strict=True):
            here = (at >= 0) & (at <= size - 1)
            index = index * size + jnp.where(here, at, 0).astype(np.int32)
            inside = here & inside
            if part is not None:
                weight = part if weight is None else weight * part
        value = jnp.where(inside[..., None], read(pixels, index), 0)  # (N, P, C)
        terms.append(value if weight is None else value * weight[..., None])
    out = functools.reduce(lax.add, terms)
    return out.swapaxes(1, 2).reshape(*x.shape[:2], *grid.shape[1:-1]).astype(dtype)


def _check(x: jax.Array, grid: jax.Array, mode: str) -> None:
    given = f"F.grid_sample was given input of shape {x.shape} and grid of shape {grid.shape}"
    if x.ndim not in (4, 5) or grid.ndim != x.ndim:
        raise shape_error(
            given,
            "images (N, C, H, W) go with a grid (N, H', W', 2), volumes (N, C, D, H, W) with "
            "(N, D', H', W', 3)",
            "add the missing axes: input[None]",
        )
    if x.shape[0] != grid.shape[0]:
        raise shape_error(
            given,
            "each example has a grid of its own: the batch sizes must be the same",
            "jnp.broadcast_to(grid, (input.shape[0], *grid.shape[1:])) for one grid for all",
        )
    if grid.shape[-1] != x.ndim - 2:
        raise shape_error(
            given,
            f"a position among {x.ndim - 2} spatial axes has {x.ndim - 2} coordinates",
            f"a grid with {x.ndim - 2} numbers on its last axis, x first",
        )
    if 0 in x.shape[2:]:
        raise shape_error(
            given, "the input has no pixels to sample", "an input with pixels on each spatial axis"
        )
    if x.ndim == 5 and mode == "bicubic":
        raise shape_error(
            f"{given}, and mode='bicubic'",
            "bicubic interpolation is for images only",
            'mode="bilinear", which is trilinear for volumes',
        )
    require_same_dtype("F.grid_sample", input=x, grid=grid)
    require_float(x, "input", "F.grid_sample")


def _aligned(align_corners: bool | None, function: str) -> bool:
    if align_corners is None:
        warnings.warn(
            f"{function} was given no align_corners: the default is False, and was True before "
            "torch 1.3. Pass align_corners=False or True",
            UserWarning,
            stacklevel=user_stack_level(),
        )
        return False
    return align_corners


def grid_sample(
    input: ArrayLike,
    grid: ArrayLike,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> jax.Array:
    """Sample images or volumes at positions between their pixels.

    Args:
        input: ``(N, C, H, W)`` or ``(N, C, D, H, W)``, floating.
        grid: ``(N, H', W', 2)`` or ``(N, D', H', W', 3)``, the positions; x comes first, and -1 and 1
            are the ends of an axis.
        mode: "bilinear" (trilinear in volumes), "nearest" or "bicubic" (images only).
        padding_mode: what lies outside: "zeros", the "border" continued, or its "reflection".
        align_corners: whether -1 and 1 are the centres of the outermost pixels, or their outer edges;
            None is False, and warns.

    Returns:
        ``(N, C, H', W')`` or ``(N, C, D', H', W')``.

    Raises:
        ValueError: if there is no such mode.
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ, or are not floating.

    Source: ``torch.nn.functional.grid_sample``; Jaderberg et al. 2015.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> image = jnp.arange(4.0).reshape(1, 1, 2, 2)
        >>> F.grid_sample(image, jnp.zeros((1, 1, 1, 2)), align_corners=False).tolist()
        [[[[1.5]]]]
    """
    for name, value, known in (
        ("mode", mode, INTERPOLATIONS),
        ("padding_mode", padding_mode, PADDINGS),
    ):
        if value not in known:
            raise ValueError(
                explain(
                    f"F.grid_sample was given {name}={value!r}",
                    f"{name} is one of {', '.join(known)}",
                    f"{name}={known[0]!r}",
                )
            )
    align_corners = _aligned(align_corners, "F.grid_sample")
    x = array(input, "input", "F.grid_sample")
    return _grid_sample(
        x, array(grid, "grid", "F.grid_sample"), mode, padding_mode, bool(align_corners)
    )


@functools.partial(compiled, static_argnums=(1, 2))
def _affine_grid(theta: jax.Array, size: tuple[int, ...], align_corners: bool) -> Any:
    spatial = len(size) - 2
    if not is_float(theta.dtype):
        # ValueError, as in torch; DtypeError is not one.
        raise ValueError(
            explain(
                f"F.affine_grid was given theta of dtype {theta.dtype}",
                "expected theta to have a floating dtype",
                "theta.astype(jnp.float32)",
            )
        )
    if theta.ndim != 3 or theta.shape[1:] != (spatial, spatial + 1) or theta.shape[0] != size[0]:
        raise shape_error(
            f"F.affine_grid was given theta of shape {theta.shape} and size={size}",
            f"one matrix ({spatial}, {spatial + 1}) for each of {size[0]} examples is needed",
            f"theta of shape {(size[0], spatial, spatial + 1)}",
        )
    if any(n < 1 for n in size):
        raise shape_error(
            f"F.affine_grid was given size={size}",
            "expected non-zero, positive output sizes",
            "a size with one position at least on each axis",
        )
    out = theta[:, :, -1].reshape(size[0], *(1,) * spatial, spatial)
    for axis, steps in enumerate(size[2:]):
        ends = 1.0 if align_corners else (steps - 1) / steps
        places = np.linspace(-ends, ends, steps) if steps > 1 else np.zeros(1)
        shape = [1] * (spatial + 2)
        shape[1 + axis] = steps
        column = theta[:, :, spatial - 1 - axis].reshape(size[0], *(1,) * spatial, spatial)
        out = out + places.reshape(shape).astype(theta.dtype) * column
    return out


def affine_grid(
    theta: ArrayLike, size: Sequence[int], align_corners: bool | None = None
) -> jax.Array:
    """Return the grid with which `grid_sample` applies an affine map.

    Args:
        theta: ``(N, 2, 3)`` for images or ``(N, 3, 4)`` for volumes: from positions in the output to
            positions in the input, x first.
        size: the shape of the output, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
        align_corners: as of `grid_sample`; None is False, and warns.

    Returns:
        ``(N, H, W, 2)`` or ``(N, D, H, W, 3)``.

    Raises:
        NotImplementedError: if the size is not of four or five numbers.
        ShapeError: if theta does not fit the size, or the size is not positive.
        ValueError: if theta is not floating.

    Source: ``torch.nn.functional.affine_grid``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> identity = jnp.eye(2, 3)[None]
        >>> F.affine_grid(identity, (1, 1, 1, 2), align_corners=False).tolist()
        [[[[-0.5, 0.0], [0.5, 0.0]]]]
    """
    t = array(theta, "theta", "F.affine_grid")
    try:
        shape = tuple(operator.index(n) for n in size)
    except TypeError:
        raise DtypeError(
            explain(
                f"F.affine_grid was given size={size!r}",
                "a tuple of integers is needed",
                "size=(N, C, H, W)",
            )
        ) from None
    if len(shape) not in (4, 5):
        raise NotImplementedError(
            explain(
                f"F.affine_grid was given size={shape}",
                "images (N, C, H, W) and volumes (N, C, D, H, W) are supported",
                "size=(N, C, H, W)",
            )
        )
    align_corners = _aligned(align_corners, "F.affine_grid")
    if align_corners and 1 in shape[2:]:
        warnings.warn(
            f"F.affine_grid was given size={shape} and align_corners=True: a single position has no two "
            "corners to align, and is taken as the centre (before torch 1.3, as -1). Pass "
            "align_corners=False",
            UserWarning,
            stacklevel=2,
        )
    return _affine_grid(t, shape, bool(align_corners))
