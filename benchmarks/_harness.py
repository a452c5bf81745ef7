"""Timing of things that take microseconds on a machine that does other work as well.

Terms: a *case* is one thing to call; a *round* times every case once, in a shuffled order, by a
*burst* of calls each (a very slow one only in some rounds); the first case is the *baseline*. Ratios
and differences are taken inside a round, where all cases saw the same machine, and then the median
over the rounds is reported: a slow second of the machine slows numerator and denominator alike.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

T = TypeVar("T")

# JAX on CPU lets about 32 computations wait; a burst stays far below, so that no call waits for an
# earlier one.
LONGEST_BURST = 12


@dataclass
class Case:
    """One thing to time.

    Args:
        label: the name in the tables.
        call: takes nothing, does one call and returns its result (arrays, or anything else).
        check: returns an array that must agree between the cases of one measurement, or None.
    """

    label: str
    call: Callable[[], Any]
    check: Callable[[], Any] | None = None


@dataclass
class Timing:
    """What was measured of one case, in microseconds a call, and what that is beside the baseline.

    `returned` is the time until the call gave its result back (the cost of dispatch), `done` the
    time until the arrays of the whole burst were there.
    """

    label: str
    returned: float
    done: float
    ratio: float
    difference: float
    ratio_done: float
    spread: tuple[float, float]
    rounds: int
    burst: int
    samples: list[float] = field(repr=False, default_factory=list)

    def row(self) -> dict[str, Any]:
        """The numbers as a plain dict for the JSON file."""
        return {
            "label": self.label,
            "returned_us": round(self.returned, 3),
            "done_us": round(self.done, 3),
            "ratio": round(self.ratio, 4),
            "difference_us": round(self.difference, 3),
            "ratio_done": round(self.ratio_done, 4),
            "ratio_quartiles": [round(q, 4) for q in self.spread],
            "rounds": self.rounds,
            "burst": self.burst,
        }


def progress(items: Iterable[T], description: str) -> Iterator[T]:
    """Yields `items` behind a progress bar on stderr, or plainly where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(description, file=sys.stderr)
        yield from items
        return
    yield from tqdm(items, desc=description, file=sys.stderr, leave=False)


def _rounds(seconds: float, fewest: int, most: int, description: str) -> Iterator[int]:
    """Yields round numbers until the time is up, behind a bar that shows the seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        bar = None
        print(description, file=sys.stderr)
    else:
        shape = "{l_bar}{bar}| {elapsed}<{remaining}"
        bar = tqdm(total=seconds, desc=description, file=sys.stderr, leave=False, bar_format=shape)
    start = last = time.perf_counter()
    for number in range(most):
        now = time.perf_counter()
        if bar is not None and now - last > 0.2:
            bar.update(min(now - start, seconds) - bar.n)
            last = now
        if number >= fewest and now - start > seconds:
            break
        yield number
    if bar is not None:
        bar.close()


def _burst(case: Case, calls: int) -> tuple[float, float]:
    """Microseconds a call of one case, until the calls returned and until their arrays were there."""
    call = case.call
    # One call that is not counted: other cases ran before, and fill the processor's caches.
    jax.block_until_ready(call())
    out = None
    start = time.perf_counter_ns()
    for _ in range(calls):
        out = call()
    returned = time.perf_counter_ns()
    jax.block_until_ready(out)
    done = time.perf_counter_ns()
    return (returned - start) / calls / 1e3, (done - start) / calls / 1e3


def _once(case: Case) -> float:
    """Microseconds of one call, roughly."""
    return min(_burst(case, 1)[1] for _ in range(3))


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of a few numbers, by linear interpolation."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def measure(
    cases: Sequence[Case],
    *,
    seconds: float,
    description: str,
    burst_us: float = 3000.0,
    fewest: int = 9,
    most: int = 1500,
    pause: float = 0.0,
) -> list[Timing]:
    """Times the cases in interleaved rounds; the first case is the baseline.

    Args:
        cases: what to time.
        seconds: how long to go on, about.
        description: the text of the progress bar.
        burst_us: how long the burst of one case may be, about, in microseconds.
        fewest: rounds at least.
        most: rounds at most.
        pause: seconds to wait before a burst: the threads of some libraries spin for milliseconds
            after their work, on cores that the next case needs.

    Returns:
        One `Timing` a case, in the same order.
    """
    once = [_once(case) for case in cases]
    bursts = [max(1, min(LONGEST_BURST, int(burst_us / max(us, 1e-3)))) for us in once]
    # A case that is many times slower than the baseline takes part in some rounds only: the others
    # would wait for it, and a large ratio needs no fine measurement.
    every = [max(1, min(8, int(us / (10 * once[0])))) for us in once]
    returned: list[list[float]] = [[] for _ in cases]
    done: list[list[float]] = [[] for _ in cases]
    order = list(range(len(cases)))
    shuffle = random.Random(0).shuffle
    # As in timeit: a collection would land on whoever happens to run.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in _rounds(seconds, fewest, most, description):
            shuffle(order)
            for i in order:
                if number % every[i]:
                    continue
                if pause:
                    time.sleep(pause)
                a, b = _burst(cases[i], bursts[i])
                returned[i].append(a)
                done[i].append(b)
    finally:
        if collecting:
            gc.enable()
        gc.collect()
    timings = []
    for i, case in enumerate(cases):
        pairs = list(zip(returned[i], returned[0][:: every[i]], strict=True))
        pairs_done = zip(done[i], done[0][:: every[i]], strict=True)
        ratios = [a / b for a, b in pairs]
        timings.append(
            Timing(
                label=case.label,
                returned=statistics.median(returned[i]),
                done=statistics.median(done[i]),
                ratio=statistics.median(ratios),
                difference=statistics.median(a - b for a, b in pairs),
                ratio_done=statistics.median(a / b for a, b in pairs_done),
                spread=(quantile(ratios, 0.25), quantile(ratios, 0.75)),
                rounds=len(ratios),
                burst=bursts[i],
                samples=returned[i],
            )
        )
    return timings


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    body = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in body) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(body[0]), "| " + " | ".join(rule) + " |", *map(line, body[1:])])
