"""What an update of an exponential moving average costs beside a jitted function written by hand."""

from __future__ import annotations

from typing import Any

import jax
from _harness import Case, Timing, measure

import statefulnn as nn

DECAY = 0.999


@jax.jit
def _by_hand(average: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda a, c: DECAY * a + (1 - DECAY) * c, average, current)


def ema_cases(tensors: int, width: int) -> list[Case]:
    """Updates of an average of a model of Linear layers: by hand first, which is the baseline."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(tensors // 2)))
    averaged = nn.AveragedModel(model, avg_fn=nn.averaging.get_ema_avg_fn(DECAY))
    averaged.update_parameters(model)  # takes the model over, as the dict below
    hand = dict(averaged.module.state_dict())
    for p in model.parameters():
        p.value = p.value + 1
    current = dict(model.state_dict())
    first = next(iter(hand))

    def call_by_hand() -> Any:
        nonlocal hand
        hand = _by_hand(hand, current)
        return hand[first]

    weight = next(averaged.parameters())

    def call() -> Any:
        averaged.update_parameters(model)
        return weight.value

    return [Case("jitted, by hand", call_by_hand), Case("AveragedModel", call)]


def ema_timings(quick: bool = False, tensors: int = 300) -> dict[str, list[Timing]]:
    """Return timings of updates of small tensors, where dispatch is what costs, and of larger ones.

    Args:
        quick: whether to measure for a second each instead of six.
        tensors: how many there are.
    """
    timings = {}
    for width in (16, 256):
        cases = ema_cases(tensors, width)
        for case in cases:
            jax.block_until_ready(case.call())
        title = f"{tensors} tensors of width {width}"
        timings[title] = measure(cases, seconds=1 if quick else 6, description=title)
    return timings
