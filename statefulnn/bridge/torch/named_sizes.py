"""Conditions on sizes that have names instead of numbers, as jax.export has them."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.export

from statefulnn.bridge.torch.structures import Size

# jax.export proves what is linear. Of the rest, what holds for all of these holds.
_TRIED = (
    *range(1, 34),
    63,
    64,
    65,
    100,
    127,
    128,
    255,
    256,
    257,
    1000,
    1024,
    4095,
    4096,
    65536,
    10**6 + 3,
)
_AT_MOST = 3000
_FUNCTIONS = {"floordiv": operator.floordiv, "mod": operator.mod, "max": max, "min": min}


def holds_for_all(condition: str, sizes: Mapping[str, Any]) -> bool:
    """Say whether a condition holds for all numbers that the names can stand for, of those that are tried."""
    texts = {k: str(v) for k, v in sizes.items() if re.search(rf"\b{k}\b", condition)}
    names = sorted(
        {n for t in texts.values() for n in re.findall(r"[A-Za-z_]\w*", t)} - set(_FUNCTIONS)
    )
    scope = next(v.scope for v in sizes.values() if jax.export.is_symbolic_dim(v))
    possible = [_possible(jax.export.symbolic_shape(name, scope=scope)[0]) for name in names]
    code = {k: compile(t.replace("^", "**"), "<size>", "eval") for k, t in texts.items()}
    for numbers in _combinations(possible):
        given = dict(zip(names, numbers, strict=True))
        if not Size(condition)({k: eval(c, _FUNCTIONS, given) for k, c in code.items()}):
            return False
    return True


def _possible(size: Any) -> list[int]:
    """Return the numbers to try for a name: those that its constraints allow."""
    rests = {m: r for m in (2, 3, 4, 8, 16, 32, 64) for r in range(m) if size % m == r}
    tried = [
        number
        for number in [*_TRIED, *(64 * n for n in _TRIED if n < 34)]
        if all(number % m == r for m, r in rests.items())
    ]
    return [
        n for n in tried if not _surely(lambda n=n: size > n) and not _surely(lambda n=n: size < n)
    ]


def _surely(comparison: Any) -> bool:
    try:
        return bool(comparison())
    except Exception:  # jax.export cannot say: its class for that is not public
        return False


def _combinations(possible: list[list[int]]) -> Iterator[tuple[int, ...]]:
    count = 1
    for numbers in possible:
        count *= len(numbers)
    # A step without common factors with the counts visits combinations of all kinds.
    step = max(1, count // _AT_MOST) | 1
    return itertools.islice(itertools.product(*possible), 0, None, step)


def as_constraint(condition: str, sizes: Mapping[str, Any]) -> str:
    """Return a condition in the words of jax.export's constraints."""
    compared = re.fullmatch(r"(.*) (<=|>=|<|>|==|!=) (.*)", condition)
    if compared is None:
        return condition
    left, right = (Size(side)(sizes) for side in compared.group(1, 3))
    if compared[2] in ("<", "<="):
        left, right = right, left
    if compared[2] in ("<", ">"):
        right = right + 1
    return f"{left} {'==' if compared[2] in ('==', '!=') else '>='} {right}"
