"""Files changed at random: bytes flipped, cut out, put in, or the end missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def for_mutations(whole: bytes, header: int, examples: int, check: Callable[[bytes], Any]) -> None:
    """Call `check` with changed contents of a file, most of them changed in its first bytes."""
    place = st.one_of(st.integers(0, 12), st.integers(0, header), st.integers(0, len(whole)))
    change = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(1, 255)),
        st.tuples(st.just("cut"), place, st.integers(0, 40)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("end"), place, st.just(0)),
    )

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(change, min_size=1, max_size=3))
    def run(changes: list) -> None:
        content = bytearray(whole)
        for kind, at, what in changes:
            if kind == "flip" and at < len(content):
                content[at] ^= what
            elif kind == "cut":
                del content[at : at + what]
            elif kind == "insert":
                content[at:at] = what
            elif kind == "end":
                del content[at:]
        check(bytes(content))

    run()
