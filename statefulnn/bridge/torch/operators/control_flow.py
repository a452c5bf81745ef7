"""Operators that are given functions: branches and loops.

Such a function takes arrays and returns a list of them; the operators return tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from statefulnn.bridge.torch.operators._table import operator
from statefulnn.transforms import branches, loops
from statefulnn.transforms import scan as scans

if TYPE_CHECKING:
    import jax
    from jax.typing import ArrayLike

_SPACE = "torch.ops.higher_order."
Body = Callable[..., list[Any]]


def _as(arrays: Sequence[jax.Array], likes: Sequence[ArrayLike]) -> tuple[jax.Array, ...]:
    """Return what goes round in a loop with the dtypes that it had before."""
    return tuple(jnp.asarray(a, jnp.result_type(x)) for a, x in zip(arrays, likes, strict=True))


def _arrays(values: Sequence[ArrayLike]) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.asarray, values))


@operator(_SPACE + "cond")
def cond(predicate: ArrayLike, true: Body, false: Body, operands: Sequence[ArrayLike] = ()) -> Any:
    arrays = _arrays(operands)
    return branches.cond(
        jnp.reshape(predicate, ()),
        lambda *given: tuple(true(*given)),
        lambda *given: tuple(false(*given)),
        *arrays,
    )


@operator(_SPACE + "while_loop")
def while_loop(
    condition: Body, body: Body, carried: Sequence[ArrayLike], constant: Sequence[ArrayLike]
) -> Any:
    start, constant = _arrays(carried), _arrays(constant)
    goes_on = lambda carry: jnp.reshape(condition(*carry, *constant)[0], ())
    step = lambda carry: _as(body(*carry, *constant), start)
    return loops.while_loop(goes_on, step, start)


@operator(_SPACE + "scan")
def scan(
    combine: Body, init: Sequence[ArrayLike], xs: Sequence[jax.Array], constant: Sequence[ArrayLike]
) -> tuple[jax.Array, ...]:
    start, constant = _arrays(init), _arrays(constant)

    def step(
        carry: tuple[jax.Array, ...], x: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        out = combine(*carry, *x, *constant)
        return _as(out[: len(start)], start), tuple(out[len(start) :])

    carry, ys = scans.scan(step, start, tuple(xs))
    return (*carry, *ys)


@operator(_SPACE + "map_impl")
def map_impl(body: Body, xs: Sequence[jax.Array], constant: Sequence[ArrayLike]) -> Any:
    constant = _arrays(constant)
    return loops.map(lambda x: tuple(body(*x, *constant)), tuple(xs))
