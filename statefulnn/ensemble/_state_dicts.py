"""State dicts of the members, and the one of their stack."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from statefulnn.core.arrays import stack_arrays, unstack
from statefulnn.core.errors import StateDictError, explain


def unstacked(stacked: Mapping[str, Any], n: int) -> list[OrderedDict[str, Any]]:
    """Return the state dict of a stack as one for each member."""
    parts = {k: unstack(v) if isinstance(v, jax.Array) else [v] * n for k, v in stacked.items()}
    metadata = getattr(stacked, "_metadata", None)
    dicts = []
    for i in range(n):
        own: OrderedDict[str, Any] = OrderedDict((k, v[i]) for k, v in parts.items())
        if metadata is not None:
            own._metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
        dicts.append(own)
    return dicts


def stacked_dicts(dicts: Sequence[Any], n: int) -> OrderedDict[str, Any]:
    """Return n state dicts of members as one of the ensemble."""
    if len(dicts) != n or not all(isinstance(d, Mapping) for d in dicts):
        kinds = ", ".join(sorted({type(d).__name__ for d in dicts}))
        raise StateDictError(
            explain(
                f"loaded {len(dicts)} state dicts ({kinds}) into an Ensemble of {n} members",
                "each member takes one",
                "pass a list of n dicts; or ensemble.load_member(i, state_dict) for one member",
            )
        )
    stacked: OrderedDict[str, Any] = OrderedDict()
    first = dicts[0]
    for number, d in enumerate(dicts):
        odd = sorted(d.keys() ^ first.keys())
        if odd:
            raise StateDictError(
                explain(
                    f"loaded state dicts with other names: number {number} against number 0 "
                    f"({', '.join(map(repr, odd[:5]))} in one of them only)",
                    "the arrays of all members become one",
                    "pass state dicts of models of one structure",
                )
            )
    for name, value in first.items():
        values = [d[name] for d in dicts]
        if hasattr(value, "shape"):
            shapes = {tuple(np.shape(v)) for v in values}
            if len(shapes) > 1:
                raise StateDictError(
                    explain(
                        f"loaded state dicts whose {name!r} has the shapes {sorted(shapes)}",
                        "the arrays of all members become one",
                        "pass state dicts of models of one structure",
                    )
                )
            value = stack_arrays(values)
        elif any(v is not value and v != value for v in values):
            raise StateDictError(
                explain(
                    f"loaded state dicts with different {name!r}",
                    "it is no array, and all members have one",
                    "make it the same in all of them",
                )
            )
        stacked[f"stack.{name}"] = value
    metadata = getattr(first, "_metadata", None)
    if metadata is not None:
        below = {f"stack.{k}" if k else "stack": v for k, v in metadata.items()}
        stacked._metadata = OrderedDict(below)  # pyright: ignore[reportAttributeAccessIssue]
    return stacked
