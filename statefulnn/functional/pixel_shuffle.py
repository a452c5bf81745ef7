"""Rearrangements between channels and pixels, and among channels."""

from __future__ import annotations

import functools
import operator
from typing import Any, SupportsIndex

import jax
from jax.typing import ArrayLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._checks import array, shape_error
from statefulnn.functional._compiled import compiled


def _whole(value: SupportsIndex, name: str, function: str) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise DtypeError(
            explain(f"{function} was given {name}={value!r}", "an integer is needed", f"{name}=2")
        ) from None
    if value < 1:
        raise shape_error(
            f"{function} was given {name}={value}", f"{name} must be positive", f"{name}=2"
        )
    return value


def _images(x: jax.Array, function: str) -> None:
    if x.ndim < 3:
        raise shape_error(
            f"{function} was given input of shape {x.shape}",
            "at least three axes are needed, (*, C, H, W)",
            "add the missing axes: input[None]",
        )


@functools.partial(compiled, static_argnums=1)
def _pixel_shuffle(x: jax.Array, r: int) -> Any:
    _images(x, "F.pixel_shuffle")
    *batch, c, h, w = x.shape
    if c % (r * r):
        raise shape_error(
            f"F.pixel_shuffle was given input of shape {x.shape} and upscale_factor={r}",
            f"the {c} channels must be divisible by upscale_factor² = {r * r}",
            f"an input with {max(c // (r * r), 1) * r * r} channels",
        )
    n = len(batch)
    x = x.reshape(*batch, c // (r * r), r, r, h, w)
    x = x.transpose(*range(n), n, n + 3, n + 1, n + 4, n + 2)  # (*, C, H, r, W, r)
    return x.reshape(*batch, c // (r * r), h * r, w * r)


def pixel_shuffle(input: ArrayLike, upscale_factor: int) -> jax.Array:
    """Move channels into the image: each r² of them become a block of r by r pixels.

    Args:
        input: ``(*, C r², H, W)``.
        upscale_factor: r.

    Returns:
        ``(*, C, H r, W r)``.

    Raises:
        ShapeError: if there are fewer than three axes, r is not positive, or r² does not divide the
            channels.
        DtypeError: if r is not an integer.

    Source: Shi et al. 2016; ``torch.nn.functional.pixel_shuffle``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.pixel_shuffle(jnp.arange(4).reshape(4, 1, 1), 2).tolist()
        [[[0, 1], [2, 3]]]
    """
    x = array(input, "input", "F.pixel_shuffle")
    return _pixel_shuffle(x, _whole(upscale_factor, "upscale_factor", "F.pixel_shuffle"))


@functools.partial(compiled, static_argnums=1)
def _pixel_unshuffle(x: jax.Array, r: int) -> Any:
    _images(x, "F.pixel_unshuffle")
    *batch, c, h, w = x.shape
    if h % r or w % r:
        raise shape_error(
            f"F.pixel_unshuffle was given input of shape {x.shape} and downscale_factor={r}",
            f"height {h} and width {w} must be divisible by downscale_factor",
            "pad or cut the image: F.pad(input, (0, more, 0, more))",
        )
    n = len(batch)
    x = x.reshape(*batch, c, h // r, r, w // r, r)
    x = x.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3)  # (*, C, r, r, H, W)
    return x.reshape(*batch, c * r * r, h // r, w // r)


def pixel_unshuffle(input: ArrayLike, downscale_factor: int) -> jax.Array:
    """Move pixels into channels: each block of r by r pixels becomes r² channels.

    Args:
        input: ``(*, C, H r, W r)``.
        downscale_factor: r.

    Returns:
        ``(*, C r², H, W)``.

    Raises:
        ShapeError: if there are fewer than three axes, r is not positive, or does not divide H and W.
        DtypeError: if r is not an integer.

    Source: Shi et al. 2016; ``torch.nn.functional.pixel_unshuffle``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.pixel_unshuffle(jnp.arange(4).reshape(1, 2, 2), 2).tolist()
        [[[0]], [[1]], [[2]], [[3]]]
    """
    x = array(input, "input", "F.pixel_unshuffle")
    return _pixel_unshuffle(x, _whole(downscale_factor, "downscale_factor", "F.pixel_unshuffle"))


@functools.partial(compiled, static_argnums=1)
def _channel_shuffle(x: jax.Array, groups: int) -> Any:
    if x.ndim < 3:
        raise shape_error(
            f"F.channel_shuffle was given input of shape {x.shape}",
            "more than two axes are needed, (N, C, *)",
            "add the missing axes: input[..., None]",
        )
    n, c, *rest = x.shape
    if c % groups:
        raise shape_error(
            f"F.channel_shuffle was given input of shape {x.shape} and groups={groups}",
            f"the number of channels, {c}, must be divisible by groups",
            f"a number of groups that divides {c}",
        )
    return x.reshape(n, groups, c // groups, *rest).swapaxes(1, 2).reshape(x.shape)


def channel_shuffle(input: ArrayLike, groups: int) -> jax.Array:
    """Take the channels in turn from each of several groups.

    Args:
        input: ``(N, C, *)``, at least three axes.
        groups: the number of groups, a divisor of C.

    Returns:
        ``(N, C, *)``: the first channel of each group, then the second of each, and so on.

    Raises:
        ShapeError: if there are fewer than three axes, or `groups` does not divide the channels.
        DtypeError: if `groups` is not an integer.

    Source: Zhang et al. 2018 (ShuffleNet); ``torch.nn.functional.channel_shuffle``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.channel_shuffle(jnp.arange(6).reshape(1, 6, 1), 2).ravel().tolist()
        [0, 3, 1, 4, 2, 5]
    """
    x = array(input, "input", "F.channel_shuffle")
    return _channel_shuffle(x, _whole(groups, "groups", "F.channel_shuffle"))


def native_channel_shuffle(input: ArrayLike, groups: int) -> jax.Array:
    """Take the channels in turn from each of several groups: another name of `channel_shuffle`.

    Args:
        input: ``(N, C, *)``, at least three axes.
        groups: the number of groups, a divisor of C.

    Returns:
        ``(N, C, *)``.

    Raises:
        ShapeError, DtypeError: as `channel_shuffle`.

    Source: ``torch.nn.functional.native_channel_shuffle``.

    Example:
        >>> import jax.numpy as jnp, statefulnn.functional as F
        >>> F.native_channel_shuffle(jnp.arange(4).reshape(1, 4, 1), 2).ravel().tolist()
        [0, 2, 1, 3]
    """
    return channel_shuffle(input, groups)
