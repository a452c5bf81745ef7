"""What averaging says when it refuses something: one function for each refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from statefulnn.core.errors import ArgumentError, ShapeError, StructureChangeError, explain
from statefulnn.core.refusals import Shape, listed


def decay_out_of_range(decay: float) -> ValueError:
    return ValueError(
        explain(
            f"made an exponential moving average with decay={decay}",
            f"Invalid decay value {decay}: it is the share of what was averaged before",
            "a number from 0 to 1, such as decay=0.999",
        )
    )


def two_rules() -> ArgumentError:
    return ArgumentError(
        explain(
            "made an AveragedModel with avg_fn and multi_avg_fn",
            "Only one of avg_fn and multi_avg_fn should be provided: each says how all arrays move",
            "nn.AveragedModel(model, avg_fn=rule)",
        )
    )


def other_model(where: str, only: Sequence[tuple[str, Sequence[str]]]) -> StructureChangeError:
    parts = [f"only the {owner} has {listed(names)}" for owner, names in only if names]
    return StructureChangeError(
        explain(
            f"{where} was given models of different structure: {'; '.join(parts)}",
            "what belongs together is known by its name, tied arrays by their first one",
            "build both alike, as copy.deepcopy(model) does, and tie, add and remove in both",
        )
    )


def other_shapes(
    where: str, owners: tuple[str, str], differing: Sequence[tuple[str, Shape, Shape]]
) -> ShapeError:
    (name, one, other), (ours, theirs) = differing[0], owners
    more = f", and {len(differing) - 1} more" if differing[1:] else ""
    return ShapeError(
        explain(
            f"{where} was given models of different shapes: {name!r} is {one} in the {ours} and {other} "
            f"in the {theirs}{more}",
            "a mean is taken number by number",
            "build both alike; after a change of shapes begin a new average",
        )
    )


def result_of_a_rule(what: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"an averaging rule returned {what}",
            "it returns the new average, and changes nothing in place",
            "avg_fn=lambda averaged, current, n: 0.9 * averaged + 0.1 * current; a multi_avg_fn "
            "takes and returns lists of arrays",
        )
    )


def no_share(t: Any) -> ArgumentError:
    given = f"of shape {np.shape(t)}" if hasattr(t, "shape") else f"of type {type(t).__name__}"
    return ArgumentError(
        explain(
            f"nn.lerp_ was given a t {given}",
            "it is the share of the source, the same for all numbers",
            "nn.lerp_(target, source, 0.005)",
        )
    )


def no_batches() -> ValueError:
    return ValueError(
        explain(
            "nn.update_bn was given a loader without batches",
            "there is nothing to take statistics of, and the old ones would be lost",
            "pass at least one batch; an iterator may be used up: pass the list, or the loader itself",
        )
    )
