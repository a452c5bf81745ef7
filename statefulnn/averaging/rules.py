"""How an average moves: functions of the average, the current value and how many were averaged before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from statefulnn.averaging import _refusals as refusals

Rule: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
MultiRule: TypeAlias = Callable[
    [Sequence[jax.Array], Sequence[jax.Array], jax.Array], Sequence[jax.Array]
]


def get_ema_avg_fn(decay: float = 0.999) -> Rule:
    """Return the rule of an exponential moving average, ``decay * averaged + (1 - decay) * current``.

    Args:
        decay: the share of what was averaged before, from 0 to 1.

    Returns:
        A function ``(averaged, current, n) -> array`` for `AveragedModel`.

    Raises:
        ValueError: if `decay` lies outside of 0 to 1.

    Source: ``torch.optim.swa_utils.get_ema_avg_fn``.

    Example:
        >>> import statefulnn as nn
        >>> nn.averaging.get_ema_avg_fn(0.75)(8.0, 4.0, 1)
        7.0
    """
    if not 0 <= decay <= 1:
        raise refusals.decay_out_of_range(decay)
    return functools.partial(_ema, decay)


def get_swa_avg_fn() -> Rule:
    """Return the rule of stochastic weight averaging: all models count the same.

    Returns:
        A function ``(averaged, current, n) -> array`` for `AveragedModel`, which takes it by default.

    Source: ``torch.optim.swa_utils.get_swa_avg_fn``; Izmailov et al. 2018, arXiv:1803.05407.

    Example:
        >>> import statefulnn as nn
        >>> nn.averaging.get_swa_avg_fn()(8.0, 4.0, 3)
        7.0
    """
    return _swa


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiRule:
    """Return `get_ema_avg_fn` as a function of all arrays at once. It costs the same.

    Args:
        decay: the share of what was averaged before, from 0 to 1.

    Returns:
        A function ``(averaged, current, n) -> arrays`` of lists, for the argument ``multi_avg_fn``.

    Raises:
        ValueError: if `decay` lies outside of 0 to 1.

    Source: ``torch.optim.swa_utils.get_ema_multi_avg_fn``, which writes in place.

    Example:
        >>> import statefulnn as nn
        >>> nn.averaging.get_ema_multi_avg_fn(0.75)([8.0, 0.0], [4.0, 4.0], 1)
        [7.0, 1.0]
    """
    return for_all(get_ema_avg_fn(decay))


def get_swa_multi_avg_fn() -> MultiRule:
    """Return `get_swa_avg_fn` as a function of all arrays at once. It costs the same.

    Returns:
        A function ``(averaged, current, n) -> arrays`` of lists, for the argument ``multi_avg_fn``.

    Source: ``torch.optim.swa_utils.get_swa_multi_avg_fn``, which writes in place.

    Example:
        >>> import statefulnn as nn
        >>> nn.averaging.get_swa_multi_avg_fn()([8.0, 0.0], [4.0, 4.0], 3)
        [7.0, 1.0]
    """
    return for_all(get_swa_avg_fn())


def for_all(rule: Callable[..., Any]) -> MultiRule:
    """Return a rule of one array as a rule of lists."""
    return functools.partial(_for_all, rule)


# Not closures: a model with a rule can be pickled.


def _ema(decay: float, averaged: jax.Array, current: jax.Array, n: jax.Array) -> jax.Array:
    return decay * averaged + (1 - decay) * current


def _swa(averaged: jax.Array, current: jax.Array, n: jax.Array) -> jax.Array:
    return averaged + (current - averaged) / (n + 1)


def _for_all(
    rule: Callable[..., Any], averaged: Any, current: Any, n: jax.Array
) -> list[jax.Array]:
    return [rule(a, c, n) for a, c in zip(averaged, current, strict=True)]
