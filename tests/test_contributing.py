"""The recipes of CONTRIBUTING.md run, and its table of tests names what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import jax

from tests.test_docs import ROOT, blocks, run_doctest

PAGE = ROOT / "CONTRIBUTING.md"


def rows() -> list[tuple[list[Path], list[Path]]]:
    """Return the sources and the tests of each row of the table."""
    table = PAGE.read_text().split("## Where the tests of a file are")[1]
    columns = [line.strip("|").split("|") for line in table.splitlines() if line[:1] == "|"][2:]
    return [tuple([ROOT / p for p in re.findall(r"`([^`]+)`", c)] for c in row) for row in columns]


def test_the_recipes_run_and_so_does_the_example_in_a_docstring():
    names: dict = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"):  # JAX's own setting, which a reader has
        for line, _, code in blocks(PAGE):
            exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), names)
        run_doctest(inspect.getdoc(names["ScaledRMS"]), names, PAGE, 1)


def test_the_table_names_files_that_exist():
    missing = [str(p) for row in rows() for column in row for p in column if not p.exists()]
    assert not missing
    assert all(tests for _, tests in rows())


def test_the_table_leads_to_tests_for_every_source():
    named = {source for sources, _ in rows() for source in sources}
    for source in (ROOT / "statefulnn").rglob("*.py"):
        assert named & {source, *source.parents}, f"{source.relative_to(ROOT)} is in no row"


def test_every_test_is_in_the_table():
    named = {path for _, tests in rows() for path in tests}
    for test in (ROOT / "tests").rglob("test_*.py"):
        assert named & {test, *test.parents}, f"{test.relative_to(ROOT)} is in no row"
