"""Operators that are given functions: branches and loops.

Such a function takes arrays and returns a list of them; the operators return tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from statefulnn.bridge.torch.operators._table import operator
from statefulnn.transforms import branches, loops
from statefulnn.transforms import scan as scans

_SPACE = "torch.ops.higher_order."
Body = Callable[..., list[Any]]


def _as(arrays: Sequence[Any], likes: Sequence[Any]) -> tuple[Any, ...]:
    """Return what goes round in a loop with the dtypes that it had before."""
    return tuple(jnp.asarray(a, jnp.result_type(x)) for a, x in zip(arrays, likes, strict=True))


def _arrays(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(jnp.asarray, values))


@operator(_SPACE + "cond")
def cond(predicate: Any, true: Body, false: Body, operands: Sequence[Any] = ()) -> Any:
    arrays = _arrays(operands)
    return branches.cond(
        jnp.reshape(predicate, ()),
        lambda *given: tuple(true(*given)),
        lambda *given: tuple(false(*given)),
        *arrays,
    )


@operator(_SPACE + "while_loop")
def while_loop(condition: Body, body: Body, carried: Sequence[Any], constant: Sequence[Any]) -> Any:
    start, constant = _arrays(carried), _arrays(constant)
    goes_on = lambda carry: jnp.reshape(condition(*carry, *constant)[0], ())
    step = lambda carry: _as(body(*carry, *constant), start)
    return loops.while_loop(goes_on, step, start)


@operator(_SPACE + "scan")
def scan(combine: Body, init: Sequence[Any], xs: Sequence[Any], constant: Sequence[Any]) -> Any:
    start, constant = _arrays(init), _arrays(constant)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        out = combine(*carry, *x, *constant)
        return _as(out[: len(start)], start), tuple(out[len(start) :])

    carry, ys = scans.scan(step, start, tuple(xs))
    return (*carry, *ys)


@operator(_SPACE + "map_impl")
def map_impl(body: Body, xs: Sequence[Any], constant: Sequence[Any]) -> Any:
    constant = _arrays(constant)
    return loops.map(lambda x: tuple(body(*x, *constant)), tuple(xs))
