"""Say which tests a run leaves out because the machine lacks what they need."""

from __future__ import annotations

import os

import pytest

from tests.browsers import HOW_TO_INSTALL, find_browser

collect_ignore = ["typed_code.py"]  # type checkers read it; it has no examples to run


def _left_out() -> bool:
    # CI has to run them: there the fixture fails instead.
    return find_browser() is None and not os.environ.get("CI")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that drive a browser where there is none."""
    if _left_out():
        browser = [item for item in items if item.path.parent.name == "browser"]
        config.hook.pytest_deselected(items=browser)
        items[:] = [item for item in items if item not in browser]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that were left out, and how to have them."""
    if _left_out():
        terminalreporter.write_line(
            f"left out: tests/browser, for want of a browser. {HOW_TO_INSTALL}", yellow=True
        )
