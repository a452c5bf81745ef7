"""The code in README.md and docs/ runs, block after block, as a reader would paste it."""

from __future__ import annotations

import doctest
import re
import textwrap
from pathlib import Path

import jax
import matplotlib
import pytest

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^(?P<indent> *)```python(?P<flags>[^\n]*)\n(?P<code>.*?)^ *```", re.M | re.S)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Return (line, flags, code) of the Python blocks of a page."""
    text = page.read_text()
    return [
        (text.count("\n", 0, m.start("code")) + 1, m["flags"], textwrap.dedent(m["code"]))
        for m in FENCE.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write files
    names: dict = {"__name__": "__main__"}
    # A reader's session has JAX's own setting, not the strict one of the test session.
    with jax.numpy_dtype_promotion("standard"):
        for line, flags, code in blocks(page):
            if "no-run" in flags:
                continue
            if ">>>" in code:
                run_doctest(code, names, page, line)
            else:
                # Line numbers in a traceback are those of the page.
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def run_doctest(code: str, names: dict, page: Path, line: int) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line - 1)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert runner.failures == 0, "".join(report)


def test_readme_shows_code_on_its_first_screen():
    first = (ROOT / "README.md").read_text().splitlines()[:90]
    text = "\n".join(first)
    for shown in ("class ", "nn.jit", "functionalize", "make demo", "make test"):
        assert shown in text, f"{shown!r} is not on the first screen"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
