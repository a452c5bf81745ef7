"""What nn.quantize says when it refuses something: one function for each refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from statefulnn.core.errors import (
    ArgumentError,
    ShapeError,
    StructureChangeError,
    UnknownNameError,
    explain,
)
from statefulnn.core.refusals import Shape, listed, named

TIED = "is tied to {}: untie it first, or leave the layer out"
QUANTIZED = "is quantised already"
COMPUTED = "is computed by {}: remove that first, and put it on again afterwards"
DTYPE = "has dtype {}: only floating numbers are quantised"
MAX_NORM = "is written by each call, max_norm={}: a layer without max_norm can be quantised"
STACKED = "is stored in a stack: quantise the blocks, then nn.LayerStack(blocks)"
MEMBERS = (
    "has {} axes, one of them of an nn.Ensemble: quantise members, then nn.Ensemble.of(members)"
)
NOT_FINITE = "has numbers that are not finite"


def no_format(given: object, known: Sequence[str]) -> ArgumentError:
    return ArgumentError(
        explain(
            f"nn.quantize was given {given!r} as a format",
            f"it knows {named(known)}",
            'nn.quantize(model, "*.mlp.*", "nf4")',
        )
    )


def no_weight(kinds: Mapping[str, str]) -> UnknownNameError:
    chosen = listed([f"{name!r}, a {kind}" for name, kind in kinds.items()])
    return UnknownNameError(
        explain(
            f"nn.quantize was asked for {chosen}",
            "a layer that can be quantised has a parameter `weight` that is a matrix or a kernel",
            'name such layers, as nn.Linear, nn.Embedding and nn.Conv2d, or all below: "mlp.*"',
        )
    )


def cannot(reasons: Mapping[str, str]) -> ArgumentError:
    of: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        of.setdefault(reason, []).append(repr(name))
    return ArgumentError(
        explain(
            f"nn.quantize was asked for {named(reasons)}",
            "; ".join(f"the weight of {listed(names)} {reason}" for reason, names in of.items()),
            "choose other layers: patterns, a list of names, or a function of the name. Nothing was changed",
        )
    )


def while_tracing() -> StructureChangeError:
    return StructureChangeError(
        explain(
            "called nn.quantize in a traced function",
            "it exchanges parameters for codes, and reports numbers",
            "quantise the model before the call that is compiled",
        )
    )


def other_shape(new: Shape, old: Shape) -> ShapeError:
    return ShapeError(
        explain(
            f"assigned an array of shape {new} to a quantised weight of shape {old}",
            "its codes are quantised anew from it",
            f"an array of shape {old}",
        )
    )
