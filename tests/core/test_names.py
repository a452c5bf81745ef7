"""Filters of dotted names: whole names, patterns of a part, patterns of the whole, functions."""

from __future__ import annotations

import fnmatch
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import statefulnn as nn
from statefulnn.core.names import chosen

NAMES = [
    "encoder.0.weight",
    "encoder.0.lora_A",
    "q.lora_B.weight",
    "head.weight",
    "head.bias",
    "steps",
]


def test_no_filter_chooses_all_names() -> None:
    assert chosen(NAMES, None, "nn.save") == NAMES


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("head.bias", ["head.bias"]),
        ("steps", ["steps"]),
        ("lora_*", ["encoder.0.lora_A", "q.lora_B.weight"]),
        ("lora_?", ["encoder.0.lora_A", "q.lora_B.weight"]),
        ("lora_[AC]", ["encoder.0.lora_A"]),
        ("lora_[!A]", ["q.lora_B.weight"]),
        ("[0]", ["encoder.0.weight", "encoder.0.lora_A"]),
        ("*", NAMES),
        ("*.*", NAMES[:5]),
        ("head.*", ["head.weight", "head.bias"]),
        ("*.weight", ["encoder.0.weight", "q.lora_B.weight", "head.weight"]),
        ("?.*.weight", ["q.lora_B.weight"]),
        (["steps", "head.*"], ["head.weight", "head.bias", "steps"]),
        (("head.bias", "head.*", "head.bias"), ["head.weight", "head.bias"]),
        ({"steps", "lora_*"}, ["encoder.0.lora_A", "q.lora_B.weight", "steps"]),
        (iter(["head.bias", "encoder.0.weight"]), ["encoder.0.weight", "head.bias"]),
        ([], []),
        (lambda name: name.count(".") == 2, NAMES[:3]),
        (lambda name: False, []),
    ],
)
def test_a_filter_chooses_in_the_order_of_the_names(wanted: Any, expected: list[str]) -> None:
    assert chosen(iter(NAMES), wanted, "nn.save") == expected


def test_a_pattern_tells_upper_case_from_lower_case() -> None:
    assert chosen(["LORA_a", "lora_A"], "lora_*", "nn.save") == ["lora_A"]


@pytest.mark.parametrize("odd", ["a*", "a[b]", "x.?", "["])
def test_a_name_with_a_wildcard_in_it_is_chosen_as_it_stands(odd: str) -> None:
    names = ["ab", "x.y", odd, "abc"]
    assert chosen(names, odd, "nn.save") == [odd]
    assert chosen(names, [odd, "abc"], "nn.save") == [odd, "abc"]


def test_a_name_that_occurs_twice_is_chosen_twice() -> None:
    assert chosen(["a.w", "b.w", "a.w"], "a.*", "nn.save") == ["a.w", "a.w"]


PART = st.text("abA0_[]*?!-", min_size=1, max_size=4)
NAME = st.lists(PART, min_size=1, max_size=3).map(".".join)


@given(
    names=st.lists(NAME, unique=True, max_size=8),
    wanted=st.lists(st.text("abA0_[]*?!-.", max_size=5), max_size=4),
)
def test_a_filter_means_what_the_shell_s_patterns_say(names: list[str], wanted: list[str]) -> None:
    def matches(name: str, text: str) -> bool:
        if text in names:
            return name == text
        if not set(text) & set("*?["):
            return False
        parts = [name] if "." in text else name.split(".")
        return any(fnmatch.fnmatchcase(part, text) for part in parts)

    if all(any(matches(name, text) for name in names) for text in wanted):
        expected = [name for name in names if any(matches(name, text) for text in wanted)]
        assert chosen(names, wanted, "nn.save") == expected
    else:
        with pytest.raises(nn.UnknownNameError):
            chosen(names, wanted, "nn.save")


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("head.wieght", "'head.weight'"),
        (["steps", "head.bais"], "'head.bias'"),
        ("encoder", "'encoder.*'"),
        ("encoder.0", "'encoder.0.*'"),
        ("weight", "did you mean|or a pattern"),
        ("zzz", "or a pattern"),
        ("zz*", "or a pattern"),
        ("zz.*", "or a pattern"),
        ("", "or a pattern"),
    ],
)
def test_what_matches_nothing_is_an_error_with_a_hint(wanted: Any, meant: str) -> None:
    with pytest.raises(nn.UnknownNameError, match=f"Instead: .*{meant}") as info:
        chosen(NAMES, wanted, "nn.load")
    message = str(info.value)
    assert (
        "nn.load was asked for " + repr(wanted if isinstance(wanted, str) else wanted[1]) in message
    )
    assert "Why: the names are 'encoder.0.weight'" in message


def test_the_message_about_many_unknown_names_among_many_is_short() -> None:
    names = [f"layer{i}.weight" for i in range(1000)]
    with pytest.raises(nn.UnknownNameError) as info:
        chosen(names, [f"nothing{i}" for i in range(1000)], "nn.load")
    assert len(str(info.value)) < 1000
    assert str(info.value).count("and 992 more") == 2


def test_where_there_are_no_names_the_message_says_so() -> None:
    with pytest.raises(nn.UnknownNameError, match="there are no names"):
        chosen([], "*", "nn.load")
    assert chosen([], lambda name: True, "nn.load") == []


@pytest.mark.parametrize("wanted", [3, ["steps", 3], b"steps", [None], {1: "steps"}])
def test_a_filter_that_is_no_text_is_a_type_error(wanted: Any) -> None:
    with pytest.raises(TypeError, match=r"nn\.load was given [\s\S]*Instead: pass a name"):
        chosen(NAMES, wanted, "nn.load")


@pytest.mark.parametrize("wanted", ["steps", ["s*"], lambda name: True])
def test_names_that_are_no_texts_are_a_type_error(wanted: Any) -> None:
    names: list[Any] = ["steps", 3]
    with pytest.raises(TypeError, match="one of which is 3"):
        chosen(names, wanted, "nn.load")


def test_many_names_are_looked_up_and_not_searched_for() -> None:
    def seconds(count: int) -> float:
        names = [f"blocks.{i}.attention.weight" for i in range(count)]
        start = time.perf_counter()
        assert chosen(names, reversed(names), "nn.load") == names
        return time.perf_counter() - start

    seconds(1000)
    # Ten times the names take ten times the time, and a hundred times if each is searched for.
    assert min(seconds(20_000) for _ in range(3)) < 40 * min(seconds(2000) for _ in range(5)) + 0.05
